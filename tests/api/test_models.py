"""Models through the official SDK: the catalog's, and what this project's jobs made."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI
from sqlalchemy.orm import Session

from service import clock
from service.ids import new_id
from service.tables import DEFAULT_PROJECT, Adapter, Checkpoint, File, Job

NAME = "ft:tiny-llama:org-nibble:support:AbC1dE2f"
CHECKPOINT = "ft:tiny-llama:org-nibble:support:ZyX9wV8u:ckpt-step-100"


@pytest.fixture
def strict(base_url: str, key: str) -> Iterator[OpenAI]:
    """The SDK, holding every answer to its types."""
    with OpenAI(
        base_url=f"{base_url}/v1", api_key=key, max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


@pytest.fixture
def add_job(session: Session) -> Callable[..., Job]:
    """Enter a job as a worker leaves it."""

    def add(**fields: Any) -> Job:
        now = clock.now()
        file = File(
            id=new_id("file-"),
            project_id=DEFAULT_PROJECT,
            filename="a.jsonl",
            purpose="fine-tune",
            bytes=1,
            sha256="00",
            blob_key="files/a",
            created_at=now,
        )
        session.add(file)
        session.flush()
        job = Job(
            **{
                "id": new_id("ftjob-"),
                "project_id": DEFAULT_PROJECT,
                "created_at": now,
                "finished_at": now + timedelta(seconds=60),
                "status": "succeeded",
                "model": "tiny-llama",
                "training_file": file.id,
                "seed": 1,
                "spec": {},
                "hyperparameters": {},
                "fine_tuned_model": NAME,
            }
            | fields
        )
        session.add(job)
        session.commit()
        return job

    return add


def test_the_catalog_s_models_are_listed_in_its_order(strict: OpenAI) -> None:
    models = strict.models.list().data

    assert [model.id for model in models] == ["tiny-llama", "far-llama"]
    assert [model.owned_by for model in models] == ["nibble", "somebody"]
    assert strict.models.retrieve("tiny-llama") == models[0]


def test_what_a_job_made_is_a_model_once_the_job_has_succeeded(
    strict: OpenAI, add_job: Callable[..., Job]
) -> None:
    job = add_job()
    add_job(status="running", finished_at=None, fine_tuned_model="ft:tiny-llama:org::notreadyy")

    models = strict.models.list().data

    assert [model.id for model in models][2:] == [NAME]
    one = strict.models.retrieve(NAME)
    assert (one.id, one.owned_by) == (NAME, "org-nibble")
    assert one.created == int(job.finished_at.timestamp() if job.finished_at else 0)
    with pytest.raises(openai.NotFoundError):
        strict.models.retrieve("ft:tiny-llama:org::notreadyy")


def test_a_checkpoint_can_be_looked_up_by_its_name(
    strict: OpenAI, add_job: Callable[..., Job], session: Session
) -> None:
    job = add_job()
    common: dict[str, Any] = {
        "project_id": DEFAULT_PROJECT,
        "job_id": job.id,
        "attempt_no": 1,
        "step_number": 100,
        "created_at": clock.now(),
    }
    session.add(Adapter(id="adapter_1", files=[], bytes=0, **common))
    session.flush()
    session.add(
        Checkpoint(id="ftckpt_1", name=CHECKPOINT, metrics={}, adapter_id="adapter_1", **common)
    )
    session.commit()

    assert strict.models.retrieve(CHECKPOINT).id == CHECKPOINT


def test_another_team_s_models_do_not_exist(
    other_team: OpenAI, add_job: Callable[..., Job]
) -> None:
    add_job()

    assert [model.id for model in other_team.models.list()] == ["tiny-llama", "far-llama"]
    with pytest.raises(openai.NotFoundError):
        other_team.models.retrieve(NAME)


@pytest.mark.parametrize("path", ["meta-llama%2FLlama", "meta-llama/Llama", "a/b/c", "ü"])
def test_an_unknown_model_is_named_whatever_its_name_holds(
    steady: httpx2.Client, path: str
) -> None:
    answer = steady.get(f"/v1/models/{path}")

    error = answer.json()["error"]
    name = path.replace("%2F", "/")
    assert answer.status_code == 404
    assert error["code"] == "model_not_found"
    assert error["message"].startswith(f"The model '{name}' does not exist")


def test_a_model_cannot_be_deleted_yet(strict: OpenAI, add_job: Callable[..., Job]) -> None:
    add_job()

    with pytest.raises(openai.APIStatusError) as caught:
        strict.models.delete(NAME)

    assert caught.value.status_code == 405
