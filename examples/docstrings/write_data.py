"""Writes train.jsonl and validation.jsonl beside this file: questions about Python's standard library and its docstrings.

They are made of the library of the Python that runs this, so another version gives other files.
"""

from pathlib import Path

from operations.demo.docstrings import write_demo_files

if __name__ == "__main__":
    files = write_demo_files(Path(__file__).parent, max_train=1600, max_validation=200)
    print(f"{files.train}: {files.n_train} examples")
    print(f"{files.validation}: {files.n_validation} examples, of modules that the base never saw")
