import signal
from pathlib import Path
from typing import Any

import pytest

from service.queue.finish import LOG_TAIL
from service.settings import Settings
from worker.folder import AttemptFolder, write_json
from worker.limits import TimeLimit
from worker.outcome import judge
from worker.reasons import DISK_FULL_STATUS


@pytest.fixture
def folder(tmp_path: Path) -> AttemptFolder:
    folder = AttemptFolder(tmp_path)
    folder.log.write_text("a first line\nthe last words\n", encoding="utf-8")
    return folder


SETTINGS = Settings(validate_time_s=60)
ERROR = {"code": "loss_not_finite", "message": "NaN", "param": None}


@pytest.mark.parametrize(
    ("result", "cause", "status", "kind", "lost"),
    [
        ({"outcome": "succeeded"}, None, 0, "succeeded", False),
        ({"outcome": "succeeded"}, "cancel", 0, "succeeded", False),  # it was done before the wish
        ({"outcome": "succeeded"}, "shutdown", -9, "succeeded", False),
        ({"outcome": "failed", "error": ERROR}, None, 0, "failed", False),
        ({"outcome": "failed", "error": ERROR}, "cancel", 0, "cancelled", False),
        ({"outcome": "stopped"}, "shutdown", 0, "requeue", False),
        ({"outcome": "stopped"}, None, 0, "requeue", True),  # stopped by nobody we know
        ({"outcome": "stopped"}, "pause", 0, "requeue", False),
        ({"outcome": "stopped"}, "preempt", 0, "requeue", False),
        ({"outcome": "succeeded"}, "pause", 0, "succeeded", False),
        ({"outcome": "failed", "error": ERROR}, "pause", 0, "failed", False),
        (None, "pause", -9, "requeue", False),  # it did not stop in time
        (None, "shutdown", -9, "requeue", False),
        (None, "cancel", -15, "cancelled", False),
        (None, None, -9, "requeue", True),
        (None, None, -11, "requeue", True),
        (None, None, 1, "requeue", True),
        (None, None, DISK_FULL_STATUS, "failed", False),
    ],
)
def test_an_ended_child_is_judged_by_its_result_then_by_why_it_ended(
    folder: AttemptFolder,
    result: dict[str, Any] | None,
    cause: Any,
    status: int,
    kind: str,
    lost: bool,
) -> None:
    if result is not None:
        write_json(folder.result, result)

    verdict = judge("train", folder, status, cause, SETTINGS)

    assert (verdict.kind, verdict.lost) == (kind, lost)


def test_a_death_keeps_the_signal_and_the_logs_end(folder: AttemptFolder) -> None:
    verdict = judge("train", folder, -signal.SIGSEGV, None, SETTINGS)

    assert "SIGSEGV" in verdict.reason
    assert verdict.detail["log_tail"].endswith("the last words")
    assert verdict.detail["exit_status"] == -11


def test_a_check_that_ran_out_of_time_or_memory_fails_at_once(folder: AttemptFolder) -> None:
    late = judge("validate", folder, -signal.SIGALRM, None, SETTINGS)
    folder.log.write_text("memory allocation of 5 bytes failed\n", encoding="utf-8")
    big = judge("validate", folder, -signal.SIGABRT, None, SETTINGS)

    assert late.error is not None
    assert big.error is not None
    assert late.error["code"] == "validation_timeout"
    assert big.error["code"] == "validation_out_of_memory"


@pytest.mark.parametrize("said", ["memory allocation of 5 bytes failed", "what(): std::bad_alloc"])
def test_a_training_that_aborts_for_want_of_memory_fails_at_once(
    folder: AttemptFolder, said: str
) -> None:
    folder.log.write_text(f"{said}\n", encoding="utf-8")

    verdict = judge("train", folder, -signal.SIGABRT, None, SETTINGS)

    assert verdict.error is not None
    assert (verdict.kind, verdict.error["code"]) == ("failed", "out_of_memory")


@pytest.mark.parametrize("result", [{"outcome": "stopped"}, None])
def test_a_training_that_took_too_long_fails_with_the_limits_name(
    folder: AttemptFolder, result: dict[str, Any] | None
) -> None:
    if result is not None:
        write_json(folder.result, result)
    limit = TimeLimit(90.0, is_own=True, ends_at=0.0)

    verdict = judge("train", folder, -9, "time_limit", SETTINGS, time_limit=limit)

    assert verdict.error is not None
    assert (verdict.kind, verdict.error["code"]) == ("failed", "time_limit")
    assert "90 seconds that max_time_s allows" in verdict.error["message"]


def test_a_failure_keeps_the_logs_end_without_this_machines_folders(folder: AttemptFolder) -> None:
    folder.log.write_text(f"cannot read {folder.path}/inputs/a\n", encoding="utf-8")
    write_json(folder.result, {"outcome": "failed", "error": ERROR})

    failed = judge("train", folder, 0, None, SETTINGS)
    folder.result.unlink()
    lost = judge("train", folder, -9, None, SETTINGS)

    assert failed.detail[LOG_TAIL] == lost.detail[LOG_TAIL] == "cannot read <attempt>/inputs/a"


def test_a_torn_result_counts_as_none(folder: AttemptFolder) -> None:
    folder.result.write_text('{"outcome": "succ', encoding="utf-8")

    verdict = judge("train", folder, -9, None, SETTINGS)

    assert (verdict.kind, verdict.lost) == ("requeue", True)
