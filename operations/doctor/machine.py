"""Is there room in the data folder, and is it ours alone?"""

import os
import shutil
import stat

from nibble.output import size
from operations.doctor.finding import Finding, fail, ok, warn
from service.settings import Settings

_EARLY = 10
"""So many times the least free space is little: a resume point of a 7B adapter alone takes hundreds of megabytes."""


def examine_disk(settings: Settings) -> Finding:
    """Compare the free space with what uploads must leave."""
    free = shutil.disk_usage(settings.data_dir).free
    words = f"{size(free)} free in {settings.data_dir}"
    if free < settings.min_free_bytes:
        return fail(
            "disk",
            f"{words}, less than NIBBLE_MIN_FREE_BYTES",
            "free some: uploads are refused (507), and running jobs may fail with disk_full",
        )
    if free < _EARLY * settings.min_free_bytes:
        return warn("disk", words, "free some soon, before uploads are refused")
    return ok("disk", words)


def examine_folder(settings: Settings) -> Finding:
    """Look at whose the data folder is, and who else may enter."""
    folder = settings.data_dir
    about = folder.stat()
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return fail("data folder", f"{folder} cannot be written", "run as its owner, or chown it")
    key = settings.first_key_file
    if key.exists() and stat.S_IMODE(key.stat().st_mode) & 0o077:
        return fail(
            "data folder",
            f"others may read the API key in {key}",
            f"chmod 600 {key}, and revoke the key if strangers have accounts here",
        )
    if stat.S_IMODE(about.st_mode) & 0o077:
        return warn("data folder", f"others may look into {folder}", f"chmod 700 {folder}")
    if about.st_uid != os.geteuid():
        return warn("data folder", f"{folder} is another user's", "run as its owner")
    return ok("data folder", f"{folder} is ours alone")
