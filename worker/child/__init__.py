"""The child: one process, one attempt. It has no database; it reads and writes the attempt's folder.

__main__.py   gets ready, waits for a folder's path, runs the attempt, writes result.json
validate.py   checks the files; no torch
prompts.py    checks the sample prompts
plan.py       spec.json into the engine's own terms
train.py      loads, trains, exports with qlora_core
report.py     events.jsonl
wording.py    messages without folders of this machine
lease.py      waits while the lease may be over
failures.py   exceptions into {code, message, hint}
"""
