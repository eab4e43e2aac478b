"""The short form of `make chaos`: thirty jobs in one run, a worker, a child, the doorbell and the database hit meanwhile."""

from pathlib import Path

import pytest

from tests.chaos.__main__ import JOBS
from tests.chaos.faults import SHORT
from tests.chaos.storm import run
from tests.tiny_models import save_tiny_llama


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_of_jobs_under_fire_none_is_lost_or_done_twice_and_nothing_is_left_over(
    tmp_path: Path,
) -> None:
    model = save_tiny_llama(tmp_path / "tiny")
    folder = tmp_path / "service"
    folder.mkdir()
    story: list[str] = []

    outcome = run(folder, model, seed=1, jobs=JOBS, faults=SHORT, say=story.append)

    assert outcome.findings.all() == [], "\n".join(story)
    assert [strike.fault for strike in outcome.strikes] == SHORT
