"""Where a server's Unix socket lives: a path may hold 107 bytes, and data folders are often deeper than that."""

import hashlib
import os
import pwd
import stat
import tempfile
from pathlib import Path

from operations.embedded.processes import EmbeddedError

_MAX_PATH_BYTES = 107


def socket_folder(wanted: Path, socket_name: str, *, run_as: str = "self") -> Path:
    """Return `wanted`, made 0700; or a short folder of ours under the temporary folder where the path is too long.

    The short one has the same name every time, so that a launcher that was killed leaves no litter behind. It belongs
    to whom the server runs as, see `tied.py`.

    Raises:
        EmbeddedError: the short folder exists and is somebody else's.
    """
    inherited = run_as in ("self", "namespace")
    uid = os.geteuid() if inherited else pwd.getpwnam(run_as).pw_uid
    folder = wanted
    if len(os.fsencode(wanted / socket_name)) > _MAX_PATH_BYTES:
        digest = hashlib.sha256(os.fsencode(wanted)).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"nibble-{uid}-{digest}"
        if len(os.fsencode(folder / socket_name)) > _MAX_PATH_BYTES:
            folder = Path("/tmp") / folder.name  # noqa: S108  (checked below)
    folder.mkdir(mode=0o700, parents=folder == wanted, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (uid, os.geteuid()):
        raise EmbeddedError(f"{folder} is not ours: remove it, or choose a shorter data folder")
    folder.chmod(0o700)
    if found.st_uid != uid:
        os.chown(folder, uid, -1)
    return folder
