"""The output folder of a run: what began it, what it told, and one process at a time in it.

Beside what the trainer writes (checkpoints, resume points, the adapter) it holds ``config.toml`` as it was given,
``inputs.json`` with what a resumed run must find unchanged, and ``events.jsonl``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_core.errors import ConfigError
from qlora_core.models.header import HeaderError, read_header

if TYPE_CHECKING:
    from qlora_core.train import Event

CONFIG, INPUTS, EVENTS = "config.toml", "inputs.json", "events.jsonl"
_TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
_TEMPLATES = "additional_chat_templates"
_PART_BYTES = 4096
_STARTED = '"kind": "run_started"'


class RunFolder:
    """The folder of one run, new or begun before.

    Args:
        path: made by `begun`; new, empty, or one that a run has been started in.
        resume: whether to go on with a run that is in it.

    Attributes:
        path: as given.
        is_begun: whether a run has been started in it before.
        changed_versions: what `settled` found to be of another version than when the run began.

    Raises:
        ConfigError: there is a run in it and it is not to go on, or files of somebody else's.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path = path
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path} is a file; name a folder for the run")
        self.is_begun = _holds_run(path)
        if self.is_begun and not resume:
            raise ConfigError(
                f"{path} has a run in it; go on with it by --resume, or name another folder by --out"
            )
        # What never came to its first step left no more than these.
        strangers = {one.name for one in path.glob("*")} - {CONFIG, INPUTS, EVENTS}
        if strangers and not self.is_begun:
            raise ConfigError(f"{path} has files in it; name another folder by --out")
        self.changed_versions: list[str] = []
        self._file: Any = None

    def settled(
        self, inputs: Mapping[str, Any], versions: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Give the inputs with the time the run began, the first run's where there was one.

        Args:
            inputs: what the result depends on beside the trainer's settings, as JSON values.
            versions: of the libraries, by name; others are no reason to lose a run, only to be told.

        Raises:
            ConfigError: one of the inputs is not what it was when the run began, or nothing says what they were.
        """
        if not self.is_begun:
            return {"began": time.time(), **inputs, "versions": dict(versions or {})}
        before = self.path / INPUTS
        try:
            found = dict(json.loads(before.read_text(encoding="utf-8")))
            float(found["began"])
            then = dict(found["versions"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{before} is not what began the run: {error!r}") from error
        for name, value in inputs.items():
            if found.get(name) != value:
                raise ConfigError(
                    f"{name} is not what it was when the run in {self.path} began; a run goes on only as it began"
                )
        self.changed_versions = [
            f"{name} {then.get(name)}, now {now}"
            for name, now in (versions or {}).items()
            if then.get(name) != now
        ]
        return found

    @contextmanager
    def begun(self, config: bytes, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Hold the folder for this process; inside, `tell` writes.

        Args:
            config: what the run's file held when it was read; the file may be the folder's own.
            inputs: as `settled` gave them.

        Raises:
            ConfigError: another process is training in it, or has done so since this one looked.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / EVENTS).open("a+", encoding="utf-8") as self._file:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"another process is training in {self.path}") from None
            if self.is_begun != _holds_run(self.path):
                raise ConfigError(f"another process has begun a run in {self.path} meanwhile")
            if self.is_begun:
                self._end_torn_line()
            else:
                self._file.truncate(0)
                (self.path / CONFIG).write_bytes(config)
                (self.path / INPUTS).write_text(json.dumps(inputs, indent=1), encoding="utf-8")
            yield

    def tell(self, event: Event) -> None:
        """Append an event with its time; flushed, so that a kill loses none."""
        line = {"at": time.time(), **event.as_dict()}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def events(self) -> Iterator[dict[str, Any]]:
        """Read what the run has told so far, one event at a time; a line that a kill has torn is passed over."""
        for line in _lines(self.path / EVENTS):
            with suppress(ValueError):
                yield json.loads(line)

    def _end_torn_line(self) -> None:
        with (self.path / EVENTS).open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return
            file.seek(-1, os.SEEK_END)
            is_torn = file.read() != b"\n"
        if is_torn:
            self._file.write("\n")


def fingerprint(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_fingerprints(model: Path) -> dict[str, str | None]:
    """Return the sha256 of each file that says how text becomes tokens, None where there is none.

    They are the files of `read_text_files`; the additional templates have one sum together.
    """
    sums = {
        f"model.path/{name}": fingerprint(model / name) if (model / name).is_file() else None
        for name in _TEXT_FILES
    }
    templates = sorted((model / _TEMPLATES).glob("*.jinja"))
    listed = "".join(f"{path.name} {fingerprint(path)}\n" for path in templates)
    sums[f"model.path/{_TEMPLATES}"] = hashlib.sha256(listed.encode()).hexdigest()
    return sums


def weights_fingerprint(model: Path) -> str:
    """Return a sha256 of each file's name, length and header, and of three short parts of every tensor.

    A base model has too many bytes to read them twice. Training moves whole tensors, and is seen; a few values changed
    by hand elsewhere are not.
    """
    digest = hashlib.sha256()
    for path in sorted(model.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        try:
            places = read_header(path)
        except HeaderError:
            continue  # loading refuses it by a better sentence
        with path.open("rb") as file:
            for name, place in places.items():
                digest.update(f"{name} {place.dtype} {place.shape}\n".encode())
                last = max(0, place.nbytes - _PART_BYTES)
                for offset in sorted({0, last // 2, last}):
                    file.seek(place.start + offset)
                    digest.update(file.read(min(_PART_BYTES, place.nbytes)))
    return digest.hexdigest()


def _holds_run(folder: Path) -> bool:
    return any(_STARTED in line for line in _lines(folder / EVENTS))


def _lines(path: Path) -> Iterator[str]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        yield from file
