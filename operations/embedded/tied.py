"""Become another program that dies with the process that started us.

Run as a script by `operations.embedded.processes`, never imported by it: everything here must happen in the child
itself, between fork and exec, and `preexec_fn` is not safe where the parent has threads. Standard library only.

    python -I -S tied.py PARENT_PID SIGNAL IDENTITY PROGRAM [ARGUMENT…]

IDENTITY: `self`; `namespace`, root of the machine who is the ordinary user 1000 inside a user namespace of its own
(files stay root's); or the name of a user to become, who keeps root's right to pass closed folders: PostgreSQL refuses
user 0, not this capability, and so a data folder or an installation under a 0700 home needs no change there.
"""

import ctypes
import os
import pwd
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_KEEPCAPS = 8
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_CAP_DAC_OVERRIDE = 1
_CAPABILITY_VERSION_3 = 0x20080522
_CLONE_NEWUSER = 0x10000000
_INNER_ID = 1000

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def _enter_user_namespace() -> None:
    """What `unshare --user --map-user=1000 --map-group=1000` does."""
    uid, gid = os.geteuid(), os.getegid()
    _checked(_libc.unshare(_CLONE_NEWUSER), "unshare(CLONE_NEWUSER)")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{_INNER_ID} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{_INNER_ID} {gid} 1")


def _become(user: str) -> None:
    entry = pwd.getpwnam(user)
    _checked(_libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0), "prctl(PR_SET_KEEPCAPS)")
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
    if _permitted_capabilities() >> _CAP_DAC_OVERRIDE & 1:
        _keep_capability(_CAP_DAC_OVERRIDE)


def _permitted_capabilities() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("CapPrm:", 1)[1].split(None, 1)[0], 16)


def _keep_capability(number: int) -> None:
    """Hold this capability and no other, and take it along through exec (capset(2), "ambient")."""
    mask = 1 << number
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    # effective, permitted and inheritable, first of capabilities 0 to 31, then of the others
    sets = (ctypes.c_uint32 * 6)(mask, mask, mask, 0, 0, 0)
    _checked(_libc.capset(header, sets), "capset")
    _checked(
        _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, number, 0, 0),
        "prctl(PR_CAP_AMBIENT_RAISE)",
    )


def _main() -> None:
    parent, signal, identity = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    program = sys.argv[4:]
    if identity == "namespace":
        _enter_user_namespace()
    elif identity != "self":
        _become(identity)
    # After the change of user: the kernel forgets the wish when credentials change.
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, signal, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the wish was heard
        sys.exit(1)
    os.execv(program[0], program)  # noqa: S606  (a list, no shell)


if __name__ == "__main__":
    try:
        _main()
    except OSError as error:
        sys.exit(f"cannot start {sys.argv[4]}: {error}")
