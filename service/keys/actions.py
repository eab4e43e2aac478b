"""Making keys, and knowing a caller by one.

A key is 256 random bits; the table has only its SHA-256, so a leaked database opens nothing, and comparing hashes of
random keys needs neither salt nor slow hashing.
"""

import hashlib
import os
import secrets
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from sqlalchemy.orm import Session

from service import clock
from service.errors import InvalidApiKey, InvalidRequest, NotFound
from service.ids import new_id
from service.keys import repository
from service.settings import Settings
from service.tables import DEFAULT_PROJECT, ApiKey

SECRET_PREFIX = "sk-nibble-"  # noqa: S105  (the public part)
_SECRET_BYTES = 32
_HINT_LENGTH = len(SECRET_PREFIX) + 4
_TOUCH_EVERY = timedelta(minutes=1)
_MAX_NAME_LENGTH = 200


@dataclass(frozen=True)
class Caller:
    """Who sent a request."""

    project_id: str
    key_id: str


def create_key(session: Session, project_id: str, name: str) -> tuple[ApiKey, str]:
    """Make a key and return it with its secret, which is shown now and never again.

    Raises:
        InvalidRequest: the name is empty, too long or has control characters.
        NotFound: there is no such project.
    """
    if not name.strip() or len(name) > _MAX_NAME_LENGTH or not name.isprintable():
        raise InvalidRequest(
            f"A key's name has 1 to {_MAX_NAME_LENGTH} printable characters.", param="name"
        )
    if not repository.project_exists(session, project_id):
        raise NotFound(f"No such project: {project_id}", param="project_id")
    return _insert(session, project_id, name, SECRET_PREFIX + secrets.token_urlsafe(_SECRET_BYTES))


def authenticate(session: Session, secret: str) -> Caller:
    """Return who holds `secret`, and note that it was used (at most once a minute).

    Raises:
        InvalidApiKey: no key has this secret, or it is revoked.
    """
    key = repository.find_by_sha256(session, _sha256(secret))
    if key is None:
        raise InvalidApiKey("Incorrect API key provided.")
    if key.revoked_at is not None:
        raise InvalidApiKey(f"The API key {key.hint}… has been revoked.")
    now = clock.now()
    if key.last_used_at is None or key.last_used_at < now - _TOUCH_EVERY:
        repository.touch(session, key.id, now=now, unless_since=now - _TOUCH_EVERY)
    return Caller(project_id=key.project_id, key_id=key.id)


def revoke_key(session: Session, project_id: str, key_id: str) -> None:
    """Refuse the key from now on.

    Raises:
        NotFound: the project has no such key, or it is revoked already.
    """
    if not repository.revoke(session, project_id, key_id, clock.now()):
        raise NotFound(f"No such API key: {key_id}", param="id")


def ensure_first_key(session: Session, settings: Settings) -> Path:
    """See that there is a default project and a key to begin with, and return the file that holds the key.

    A no-op once any key is there. The file (mode 0600) is complete before the key is committed: a crash in between
    leaves a file whose key is then taken up, never a key that nobody can know. Processes that start at once take turns.

    Raises:
        OSError: the file cannot be written.
    """
    path = settings.first_key_file
    repository.lock_first_start(session)
    repository.ensure_project(session, DEFAULT_PROJECT, "Default", clock.now())
    if repository.has_live_keys(session):
        return path
    secret = _kept_secret(path)
    if secret is None or repository.find_by_sha256(session, _sha256(secret)) is not None:
        secret = SECRET_PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
        _write_private(path, secret + "\n")
    _insert(session, DEFAULT_PROJECT, "first key", secret)
    return path


def _insert(session: Session, project_id: str, name: str, secret: str) -> tuple[ApiKey, str]:
    key = ApiKey(
        id=new_id("key_"),
        project_id=project_id,
        name=name,
        hint=secret[:_HINT_LENGTH],
        sha256=_sha256(secret),
        created_at=clock.now(),
    )
    repository.insert_key(session, key)
    return key, secret


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _kept_secret(path: Path) -> str | None:
    """Return the secret of a file that a crash left behind; None if there is no whole, private one."""
    try:
        if path.stat().st_mode & 0o077:
            return None
        text = path.read_text(encoding="ascii").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    whole = len(text) == len(SECRET_PREFIX) + 43 and text.startswith(SECRET_PREFIX)
    return text if whole else None


def _write_private(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    # Created with its mode: there is no moment in which others could read it.
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
