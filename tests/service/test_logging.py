"""Log lines are JSON, carry what is bound to their context, and never hold a secret."""

import json
import logging
import subprocess
import sys

import pytest

from service.logging import blank_secrets, configure

SCRIPT = """
import logging
import structlog
from service.logging import configure, get_logger
configure("INFO")
log = get_logger("here")
with structlog.contextvars.bound_contextvars(request_id="req_1"):
    log.info("happened", nested={"key": ["sk-nibble-abc_DEF-1"]}, url="postgresql://me:pass@host/db")
    logging.getLogger("there").warning("header %s", "Authorization: Bearer My-Key")
    log.debug("not shown")
try:
    raise ValueError("sk-nibble-inside")
except ValueError:
    log.exception("broke")
"""


def test_lines_of_both_kinds_are_json_with_context_and_without_secrets() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True
    )

    happened, header, broke = [json.loads(line) for line in done.stderr.splitlines()]
    assert happened["event"] == "happened"
    assert happened["request_id"] == header["request_id"] == "req_1"
    assert happened["nested"] == {"key": ["[secret]"]}
    assert happened["url"] == "postgresql://[secret]@host/db"
    assert (header["event"], header["level"]) == (
        "header Authorization: Bearer [secret]",
        "warning",
    )
    assert header["logger"] == "there"
    assert "Traceback" in broke["exception"]
    assert "sk-nibble-inside" not in done.stderr
    assert "request_id" not in broke


@pytest.mark.parametrize(
    ("text", "blanked"),
    [
        ("GET /v1/models/sk-nibble-abc", "GET /v1/models/[secret]"),
        ("bearer abc", "bearer [secret]"),
        ('{"a": "Bearer abc"}', '{"a": "Bearer [secret]"}'),
        ("redis://:pw@host:1/0", "redis://[secret]@host:1/0"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
    ],
)
def test_secrets_are_blanked_and_nothing_else(text: str, blanked: str) -> None:
    assert blank_secrets(text) == blanked


def test_an_unknown_level_is_refused_before_anything_changes() -> None:
    before = logging.getLogger().handlers

    with pytest.raises(ValueError, match="log level 'LOUD' is none of DEBUG, INFO"):
        configure("LOUD")

    assert logging.getLogger().handlers == before
