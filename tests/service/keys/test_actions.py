"""Keys: shown once, stored hashed, refused when revoked; the first one is made once, whoever starts first."""

import hashlib
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session, sessionmaker

from service import clock
from service.db import transaction
from service.errors import InvalidApiKey, InvalidRequest, NotFound
from service.keys.actions import authenticate, create_key, ensure_first_key, revoke_key
from service.settings import Settings
from service.tables import DEFAULT_PROJECT, ApiKey


def test_a_key_opens_the_door_of_its_project_and_is_nowhere_in_the_table(
    session: Session,
) -> None:
    key, secret = create_key(session, DEFAULT_PROJECT, "CI")

    caller = authenticate(session, secret)

    assert (caller.project_id, caller.key_id) == (DEFAULT_PROJECT, key.id)
    assert secret.startswith("sk-nibble-")
    assert len(secret) == len("sk-nibble-") + 43  # 256 bits in base64
    assert key.sha256 == hashlib.sha256(secret.encode()).hexdigest()
    row = session.execute(text("SELECT api_keys::text FROM api_keys")).scalar_one()
    assert secret not in row
    assert key.hint == secret[:14]


@pytest.mark.parametrize("secret", ["", "sk-nibble-", "sk-nibble-" + "x" * 43, "ü", "\udcff"])
def test_an_unknown_key_is_refused(session: Session, secret: str) -> None:
    with pytest.raises(InvalidApiKey, match="Incorrect API key"):
        authenticate(session, secret)


def test_a_revoked_key_is_refused_by_its_hint(session: Session) -> None:
    key, secret = create_key(session, DEFAULT_PROJECT, "CI")

    revoke_key(session, DEFAULT_PROJECT, key.id)

    session.expire_all()
    with pytest.raises(InvalidApiKey, match="has been revoked") as caught:
        authenticate(session, secret)
    assert secret not in caught.value.message
    with pytest.raises(NotFound):
        revoke_key(session, DEFAULT_PROJECT, key.id)


def test_another_project_s_key_cannot_be_revoked(session: Session) -> None:
    key, secret = create_key(session, DEFAULT_PROJECT, "CI")

    with pytest.raises(NotFound):
        revoke_key(session, "proj_other", key.id)

    assert authenticate(session, secret)


def test_a_key_s_last_use_is_written_once_a_minute(session: Session) -> None:
    key, secret = create_key(session, DEFAULT_PROJECT, "CI")

    def used_at() -> object:
        session.expire_all()
        authenticate(session, secret)
        session.expire_all()
        return session.get_one(ApiKey, key.id).last_used_at

    first = used_at()
    again = used_at()
    a_minute_ago = clock.now() - timedelta(seconds=61)
    session.execute(update(ApiKey).values(last_used_at=a_minute_ago))
    later = used_at()

    assert first is not None
    assert again == first
    assert later not in {first, a_minute_ago}


@pytest.mark.parametrize("name", ["", "  ", "x" * 201, "a\x00b", "a\nb"])
def test_a_name_that_is_none_is_refused(session: Session, name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        create_key(session, DEFAULT_PROJECT, name)

    assert caught.value.param == "name"


def test_a_key_needs_a_project(session: Session) -> None:
    with pytest.raises(NotFound, match="proj_nowhere"):
        create_key(session, "proj_nowhere", "CI")


def test_the_first_key_is_in_a_file_that_only_its_owner_reads(
    session: Session, settings: Settings
) -> None:
    path = ensure_first_key(session, settings)

    assert path.stat().st_mode & 0o777 == 0o600
    assert authenticate(session, path.read_text().strip()).project_id == DEFAULT_PROJECT


def test_a_second_start_changes_nothing(session: Session, settings: Settings) -> None:
    before = ensure_first_key(session, settings).read_text()
    session.commit()

    after = ensure_first_key(session, settings).read_text()

    assert after == before
    assert count_keys(session) == 1


def test_no_key_is_made_where_the_file_was_removed_on_purpose(
    session: Session, settings: Settings
) -> None:
    ensure_first_key(session, settings).unlink()

    path = ensure_first_key(session, settings)

    assert not path.exists()
    assert count_keys(session) == 1


def test_a_crash_before_the_commit_leaves_a_file_whose_key_is_taken_up(
    session: Session, settings: Settings
) -> None:
    secret = ensure_first_key(session, settings).read_text().strip()
    session.rollback()

    ensure_first_key(session, settings)

    assert authenticate(session, secret)


@pytest.mark.parametrize(("content", "mode"), [(b"", 0o600), (b"sk-nib", 0o600), (b"\xff", 0o600)])
def test_a_file_without_a_whole_key_is_written_anew(
    session: Session, settings: Settings, content: bytes, mode: int
) -> None:
    settings.data_dir.mkdir()
    settings.first_key_file.write_bytes(content)

    ensure_first_key(session, settings)

    assert authenticate(session, settings.first_key_file.read_text().strip())
    assert settings.first_key_file.stat().st_mode & 0o777 == mode


def test_a_key_that_others_could_have_read_is_not_taken_up(
    session: Session, settings: Settings
) -> None:
    settings.data_dir.mkdir()
    known = "sk-nibble-" + "a" * 43
    settings.first_key_file.write_text(known)
    settings.first_key_file.chmod(0o644)

    ensure_first_key(session, settings)

    with pytest.raises(InvalidApiKey):
        authenticate(session, known)
    assert settings.first_key_file.stat().st_mode & 0o777 == 0o600


def test_processes_that_start_at_once_agree_on_one_key(
    sessions: sessionmaker[Session], settings: Settings
) -> None:
    together = threading.Barrier(4)
    found: list[Path] = []

    def start() -> None:
        together.wait()
        with transaction(sessions) as session:
            found.append(ensure_first_key(session, settings))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    with transaction(sessions) as session:
        assert len(found) == 4
        assert count_keys(session) == 1
        assert authenticate(session, settings.first_key_file.read_text().strip())


def count_keys(session: Session) -> int:
    return session.scalars(select(func.count()).select_from(ApiKey)).one()
