from pathlib import Path
from typing import Any

import pytest

from worker.child.report import Report
from worker.child.wording import public_words
from worker.folder import AttemptFolder
from worker.relay import Tail

ATTEMPT = AttemptFolder(Path("/srv/data/attempts/ftjob-1/3"))
SPEC: dict[str, Any] = {
    "base_model": "tiny",
    "model": {"id": "tiny", "path": "/srv/models/tiny-1.0"},
    "model_cache": "/srv/data/models",
}
HUB: dict[str, Any] = SPEC | {"model": {"id": "llama", "path": None}, "base_model": "llama"}


@pytest.mark.parametrize(
    ("spec", "text", "told"),
    [
        (
            SPEC,
            "the model folder /srv/models/tiny-1.0 has no model.safetensors",
            "the model folder tiny has no model.safetensors",
        ),
        (
            SPEC,
            "/srv/models/tiny-1.0/config.json is not valid JSON",
            "tiny/config.json is not valid JSON",
        ),
        (
            HUB,
            "the weight files of /srv/data/models/models--org--llama/snapshots/0123abc hold no tensors",
            "the weight files of llama hold no tensors",
        ),
        (
            HUB,
            "cannot be fetched ([Errno 13] Permission denied: '/srv/data/models/models--org--llama')",
            "cannot be fetched ([Errno 13] Permission denied: 'the model cache/models--org--llama')",
        ),
        (
            SPEC,
            "There is no whole resume point in /srv/data/attempts/ftjob-1/2/run/resume: starting anew.",
            "There is no whole resume point in attempt 2: starting anew.",
        ),
        (SPEC, "The file is empty.", "The file is empty."),
    ],
)
def test_a_message_names_the_model_and_the_attempt_and_no_folder(
    spec: dict[str, Any], text: str, told: str
) -> None:
    assert public_words(ATTEMPT, spec)(text) == told


def test_events_are_told_in_these_words(tmp_path: Path) -> None:
    with Report(tmp_path / "events.jsonl", public_words(ATTEMPT, SPEC)) as report:
        report.message("/srv/models/tiny-1.0 is odd", level="warn")

    assert Tail(tmp_path / "events.jsonl").read()[0].message == "tiny is odd"
