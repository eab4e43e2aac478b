"""Fetching a job's adapter: resumed where it broke off, checked, unpacked ready for peft.

The archive is kept beside the target folder while it is incomplete (`.NAME.JOB.part`, with the ETag it belongs to), so
that another run of the same command goes on where this one stopped.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from nibble import output
from nibble.connection import open_body, read_body
from nibble.endings import Ending, ExitCode, refused
from nibble.failures import ending_of, is_passing, unreachable
from nibble.progress import transfer
from nibble.unpack import BadArchiveError, Unpacked, unpack

if TYPE_CHECKING:
    from openai import OpenAI, Stream


def check_target(folder: Path) -> Path:
    """`folder`, made absolute, which an adapter can be unpacked into; asked before any work is done.

    Raises:
        Ending: it holds something, is a file, or cannot be made (refused).
    """
    folder = folder.expanduser().absolute()
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise refused(f"{folder} is not an empty folder; name another one for the adapter.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(folder.parent, os.W_OK | os.X_OK):
            raise refused(f"cannot write to {folder.parent}; name another folder for the adapter.")
    except OSError as error:
        raise refused(f"cannot make {folder}: {error.strerror}.") from None
    return folder


def download(
    client: "OpenAI",
    job_id: str,
    folder: Path,
    *,
    checkpoint: str | None = None,
    patience_s: float = 300.0,
) -> list[Unpacked]:
    """Fetch the adapter of a succeeded job, or of a checkpoint of any job, into `folder` and return its files.

    Raises:
        Ending: refused by the service; out of reach for `patience_s`; or what came is damaged (failed).
    """
    wanted = checkpoint or job_id
    part = folder.parent / f".{folder.name}.{Path(wanted).name}.part"
    path = f"/fine_tuning/jobs/{quote(job_id, safe='')}/adapter"
    if checkpoint:
        path += f"?checkpoint={quote(checkpoint, safe='')}"
    fetch = _Fetch(client, path, part, patience_s)
    fetch.run()
    try:
        files = unpack(part, folder)
    except BadArchiveError as error:
        fetch.discard()
        again = "run the same command again to fetch it anew"
        raise Ending(
            ExitCode.FAILED, f"the adapter's archive is not whole: {error}; {again}"
        ) from error
    fetch.discard()
    return files


class _Fetch:
    """The bytes of one archive, into `part`, over as many connections as it takes."""

    def __init__(self, client: "OpenAI", path: str, part: Path, patience_s: float) -> None:
        self._client = client
        self._path = path
        self._part = part
        self._etag_file = part.with_name(part.name + ".etag")
        self._patience_s = patience_s

    def run(self) -> None:
        with transfer("downloading the adapter") as told:
            self._persist(told)

    def discard(self) -> None:
        self._part.unlink(missing_ok=True)
        self._etag_file.unlink(missing_ok=True)

    def _persist(self, on_bytes: Callable[[int, int | None], None]) -> None:
        """Try until the archive is complete; patience starts anew whenever bytes have come."""
        reached_at, have, failures = time.monotonic(), self._have(), 0
        while True:
            try:
                if self._attempt(on_bytes):
                    return
                error = None
            except Exception as raised:
                if isinstance(raised, OSError) or not is_passing(raised):
                    raise
                error = raised
            if self._have() != have:
                reached_at, have, failures = time.monotonic(), self._have(), 0
            left_s = self._patience_s - (time.monotonic() - reached_at)
            if left_s <= 0:
                raise (error and ending_of(error)) or unreachable("the download never completes")
            if failures == 0:
                output.say("The download broke off; going on with it.", style="yellow")
            time.sleep(min(0.5 * 2**failures, 8.0, left_s))
            failures = min(failures + 1, 5)

    def _attempt(self, on_bytes: Callable[[int, int | None], None]) -> bool:
        """One connection; return whether the archive is complete now."""
        from openai import APIStatusError

        have = self._have()
        headers = {"Accept": "application/x-tar", "Accept-Encoding": "identity"}
        if have:
            headers |= {"Range": f"bytes={have}-", "If-Range": self._etag_file.read_text()}
        try:
            stream = open_body(self._client, self._path, headers)
        except APIStatusError as error:
            if error.status_code == 416:  # what we have is not a part of it
                self.discard()
                return False
            raise
        with stream:
            return self._receive(stream, on_bytes)

    def _receive(
        self, stream: "Stream[object]", on_bytes: Callable[[int, int | None], None]
    ) -> bool:
        headers = stream.response.headers
        resumed = stream.response.status_code == 206
        if not resumed:
            self._part.unlink(missing_ok=True)
        have = self._have() if resumed else 0
        etag = headers.get("etag", "")
        if etag and not etag.startswith("W/"):  # a weak one cannot vouch for a byte range
            self._etag_file.write_text(etag)
        else:
            self._etag_file.unlink(missing_ok=True)
        length = headers.get("content-length")
        total = have + int(length) if length and length.isdigit() else None
        with self._part.open("ab") as file:
            for chunk in read_body(stream):
                file.write(chunk)
                have += len(chunk)
                on_bytes(have, total)
        return total is None or have == total

    def _have(self) -> int:
        """How many bytes are there that a Range request can go on from."""
        try:
            return self._part.stat().st_size if self._etag_file.exists() else 0
        except FileNotFoundError:
            return 0
