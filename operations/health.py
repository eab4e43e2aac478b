"""`python -m operations.health api|worker`: for containers; exit status 0 if that part of this machine works."""

import http.client
import socket
import sys

from sqlalchemy.exc import SQLAlchemyError

from service import db
from service.queue.workers import is_alive
from service.settings import Settings, SettingsInvalid, read_settings

WORKER_SILENCE_S = 45.0
"""A worker signs in every ten seconds."""
_ANSWER_WITHIN_S = 5.0


def reachable(host: str) -> str:
    """Return where a client on this machine reaches what listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104


def problem_of_api(settings: Settings) -> str | None:
    """Return what the API on this machine lacks, None if it is ready."""
    host = reachable(settings.host)
    connection = http.client.HTTPConnection(host, settings.port, timeout=_ANSWER_WITHIN_S)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        body = answer.read(2000).decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        return f"the API does not answer on {host} port {settings.port}: {error}"
    finally:
        connection.close()
    return None if answer.status == http.client.OK else body


def problem_of_worker(settings: Settings) -> str | None:
    """Return why the worker of this host counts as ill, None if it has been heard of just now."""
    engine = db.connect(settings, pool_size=1)
    try:
        with db.transaction(db.sessions(engine)) as session:
            alive = is_alive(session, socket.gethostname(), within_s=WORKER_SILENCE_S)
    except SQLAlchemyError as error:
        return f"the database does not answer: {error}"
    finally:
        engine.dispose()
    return None if alive else f"no worker of this host was heard of for {WORKER_SILENCE_S:.0f} s"


def main(arguments: list[str]) -> int:
    """Examine the part named by the one argument, say its problem, and return the exit status."""
    parts = {"api": problem_of_api, "worker": problem_of_worker}
    if len(arguments) != 1 or arguments[0] not in parts:
        print("usage: python -m operations.health api|worker", file=sys.stderr)
        return 2
    try:
        problem = parts[arguments[0]](read_settings())
    except (SettingsInvalid, db.DatabaseUrlMissing) as error:
        problem = str(error)
    print(problem or "ok")
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
