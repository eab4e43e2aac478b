"""The command line that teams use, from a shell or from CI.

It speaks HTTP through the official `openai` SDK and nothing else; `main.py` alone reaches for `operations`, and only
where the server's packages are installed. Results go to stdout, everything for people to stderr.
"""
