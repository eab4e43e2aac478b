"""Become another program that dies with the process that started us.

Run as a script by `operations.embedded.processes`, never imported by it: everything here must happen in the child
itself, between fork and exec, and `preexec_fn` is not safe where the parent has threads. Standard library only.

    python -I -S tied.py PARENT_PID SIGNAL IDENTITY PROGRAM [ARGUMENT…]

IDENTITY: `self`; `namespace`, root of the machine who is the ordinary user 1000 inside a user namespace of its own
(files stay root's); or the name of a user to become.
"""

import ctypes
import os
import pwd
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1
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
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)


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
