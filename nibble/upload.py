"""Uploading one file, read as it is sent, with a progress bar on a terminal."""

import io
import re
import stat
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nibble import output
from nibble.answers import expect
from nibble.endings import refused
from nibble.failures import is_passing
from nibble.progress import transfer

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types import FileObject

_FILE_ID = re.compile(r"file-[A-Za-z0-9_-]+")


def is_file_id(text: str) -> bool:
    """Whether an argument names an uploaded file; a local one of such a name is written `./file-…`."""
    return _FILE_ID.fullmatch(text) is not None


def check_local(path: Path) -> Path:
    """`path`, which is a file that can be read and is not empty.

    Raises:
        Ending: it is not (refused).
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
            raise refused(f"{path} is not a regular file.")
        with path.open("rb") as file:
            if file.read(1):
                return path
    except OSError as error:
        raise refused(f"cannot read {path}: {error.strerror}.") from None
    except ValueError:  # a NUL in the name
        raise refused(f"{str(path)!r} is no file's name.") from None
    raise refused(f"{path} is empty.")


def upload(client: "OpenAI", path: Path, *, purpose: str = "fine-tune") -> "FileObject":
    """Send a file and return what the service made of it; the SDK's retries read it again from its start.

    Raises:
        Ending: the file cannot be read (refused).
    """
    from openai.types import FileObject

    check_local(path)
    total = path.stat().st_size
    with transfer(f"uploading {path.name}") as told, path.open("rb") as raw:
        file = _Watched(raw, lambda position: told(position, total))
        create: Any = client.files.create  # the service judges the purpose, not the SDK's types
        answer = create(file=(path.name, file), purpose=purpose)
    uploaded = expect(FileObject, answer)
    output.say(f"Uploaded {path.name} ({output.size(total)}) as {uploaded.id}.")
    return uploaded


@contextmanager
def taken_back(client: "OpenAI", file_ids: Sequence[str]) -> Generator[None]:
    """Delete these files again if the service refuses what they were uploaded for: the next try uploads anew."""
    import openai

    try:
        yield
    except openai.APIStatusError as error:
        if not is_passing(error):
            for file_id in file_ids:
                with suppress(openai.OpenAIError):
                    client.files.delete(file_id)
        raise


class _Watched(io.BufferedIOBase):
    """A file that tells how far it has been read."""

    def __init__(self, raw: io.BufferedReader, on_position: Callable[[int], None]) -> None:
        self._raw = raw
        self._on_position = on_position

    def read(self, size: int | None = -1, /) -> bytes:
        data = self._raw.read(size)
        self._on_position(self._raw.tell())
        return data

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        return self._raw.tell()

    def fileno(self) -> int:
        return self._raw.fileno()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True
