"""An adapter's manifest: what belongs to it, how large each file is and what it hashes to.

The manifest's own SHA-256 stands for the whole adapter: it is the download's ETag.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from service.tables import Job

NAME = "manifest.json"
FORMAT = "nibble-adapter/1"
REQUIRED = ("adapter_config.json", "adapter_model.safetensors")

_PACKAGES = ("nibble", "torch", "transformers", "tokenizers", "safetensors")
_CHUNK_BYTES = 1 << 20


class AdapterIncomplete(Exception):
    """The folder is no adapter: a file that PEFT needs is missing, or something in it is no plain file."""


@dataclass(frozen=True)
class Entry:
    """One file of an adapter."""

    name: str
    bytes: int
    sha256: str


def entries(folder: Path) -> list[Entry]:
    """Hash a PEFT folder's files, sorted by name; a manifest from before does not count.

    Raises:
        AdapterIncomplete: see there.
    """
    paths = sorted(path for path in folder.iterdir() if path.name != NAME)
    for path in paths:
        if path.is_symlink() or not path.is_file():
            raise AdapterIncomplete(f"{path.name} in the adapter's folder is no plain file")
    missing = [name for name in REQUIRED if name not in {path.name for path in paths}]
    if missing:
        raise AdapterIncomplete(f"the adapter's folder has no {' and no '.join(missing)}")
    return [_entry(path) for path in paths]


def render(job: Job, attempt_no: int, step: int, files: list[Entry]) -> bytes:
    """Return the manifest's bytes; the same adapter always gives the same ones."""
    manifest = {
        "format": FORMAT,
        "job": job.id,
        "attempt": attempt_no,
        "step": step,
        "base_model": job.model,
        "seed": job.seed,
        "hyperparameters": job.hyperparameters,
        "versions": _versions(),
        "files": [asdict(file) for file in files],
    }
    return (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()


def _entry(path: Path) -> Entry:
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while piece := file.read(_CHUNK_BYTES):
            digest.update(piece)
            size += len(piece)
    return Entry(path.name, size, digest.hexdigest())


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
