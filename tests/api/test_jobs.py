"""Jobs through the official SDK: create, list, look at, cancel, and what is refused."""

from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from operations.embedded.valkey import Valkey
from service.jobs.spec import CreateJob
from tests.api.conftest import CHAT_LINE
from tests.hand_worker import HandWorker

JOBS = "/v1/fine_tuning/jobs"


def create(client: OpenAI, training_file: str, **fields: Any) -> FineTuningJob:
    wanted: dict[str, Any] = {"model": "tiny-llama", "training_file": training_file}
    return client.fine_tuning.jobs.create(**(wanted | fields))


def refused(http: httpx2.Client, file_id: str, **fields: Any) -> dict[str, Any]:
    """Send a create call that must be refused with 400, and return its error."""
    body = {"model": "tiny-llama", "training_file": file_id} | fields
    answer = http.post(JOBS, json=body)
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error


@pytest.fixture
def strict(base_url: str, key: str) -> Iterator[OpenAI]:
    """The SDK, refusing every response that does not fit its models."""
    with OpenAI(
        base_url=f"{base_url}/v1", api_key=key, max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


def test_a_new_job_is_what_the_sdk_expects(strict: OpenAI, training_file: str) -> None:
    job = create(strict, training_file)

    assert job.id.startswith("ftjob-")
    assert (job.object, job.status) == ("fine_tuning.job", "validating_files")
    assert (job.model, job.training_file, job.validation_file) == (
        "tiny-llama",
        training_file,
        None,
    )
    assert job.hyperparameters.to_dict() == {
        "n_epochs": "auto",
        "batch_size": "auto",
        "learning_rate_multiplier": "auto",
    }
    assert job.method is not None
    assert job.method.type == "supervised"
    assert (job.fine_tuned_model, job.finished_at, job.error, job.trained_tokens) == (None,) * 4
    assert (job.result_files, job.integrations, job.metadata) == ([], [], None)
    assert 0 <= job.seed < 2**31
    assert job.organization_id
    extra = job.model_extra
    assert extra is not None
    assert (extra["is_terminal"], extra["cancel_requested"]) == (False, False)
    assert strict.fine_tuning.jobs.retrieve(job.id).to_dict() == job.to_dict()


def test_every_state_of_a_job_fits_the_sdks_strict_models(
    strict: OpenAI, training_file: str, worker: HandWorker
) -> None:
    job_id = create(strict, training_file, suffix="mine", seed=7).id

    worker.validate()
    queued = strict.fine_tuning.jobs.retrieve(job_id)
    run = worker.claim("train")
    worker.step(run, 3)
    running = strict.fine_tuning.jobs.retrieve(job_id)
    worker.succeed(run)
    succeeded = strict.fine_tuning.jobs.retrieve(job_id)

    assert queued.status == "queued"
    assert queued.hyperparameters.n_epochs == 8  # 100 // 12: OpenAI's rule for twelve examples
    assert queued.hyperparameters.batch_size == 1
    assert running.status == "running"
    assert running.model_extra is not None
    assert (running.model_extra["trained_steps"], running.model_extra["total_steps"]) == (3, 10)
    assert succeeded.status == "succeeded"
    assert succeeded.fine_tuned_model is not None
    assert succeeded.fine_tuned_model.startswith("ft:tiny-llama:org-nibble:mine:")
    assert succeeded.trained_tokens == 1234
    assert len(succeeded.result_files) == 1
    assert succeeded.finished_at is not None
    assert succeeded.model_extra is not None
    assert succeeded.model_extra["is_terminal"] is True
    assert succeeded.model_extra["user_provided_suffix"] == "mine"
    assert succeeded.seed == 7


def test_the_dataset_report_is_whole_on_a_job_and_short_in_a_list(
    client: OpenAI, training_file: str, worker: HandWorker
) -> None:
    job_id = create(client, training_file).id
    worker.validate()

    whole = client.fine_tuning.jobs.retrieve(job_id).to_dict()["dataset_report"]
    short = client.fine_tuning.jobs.list().data[0].to_dict()["dataset_report"]

    summary = {"format": "chat", "n_examples": 12, "n_errors": 1}
    assert whole == {
        "training_file": summary | {"errors": [{"line": 3}]},
        "validation_file": None,
    }
    assert short == {"training_file": summary, "validation_file": None}


def test_a_failed_job_says_why(strict: OpenAI, training_file: str, worker: HandWorker) -> None:
    job_id = create(strict, training_file).id

    worker.fail(worker.start())

    job = strict.fine_tuning.jobs.retrieve(job_id)
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error.code, job.error.message, job.error.param) == (
        "loss_not_finite",
        "The loss is not a number.",
        None,
    )
    assert job.error.to_dict()["hint"] == "Use a lower learning rate."
    assert job.error.to_dict()["log_tail"] == "step 3\nNaN"


def test_hyperparameters_of_both_places_merge_and_the_methods_win(
    client: OpenAI, training_file: str
) -> None:
    job = create(
        client,
        training_file,
        hyperparameters={"n_epochs": 2, "batch_size": 4, "lora_r": 8},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 5, "max_seq_length": 128}},
            "dpo": {"hyperparameters": {"beta": 0.1}},
            "reinforcement": {"grader": {"type": "string_check"}},
        },
    )

    expected = {
        "n_epochs": 5,
        "batch_size": 4,
        "learning_rate_multiplier": "auto",
        "lora_r": 8,
        "context_length": 128,
    }
    assert job.hyperparameters.to_dict() == expected
    assert job.method is not None
    assert job.method.to_dict() == {
        "type": "supervised",
        "supervised": {"hyperparameters": expected},
    }


def test_explicit_nulls_are_as_good_as_nothing(http: httpx2.Client, training_file: str) -> None:
    body = {
        "model": "tiny-llama",
        "training_file": training_file,
        **dict.fromkeys(
            (
                "validation_file",
                "suffix",
                "seed",
                "metadata",
                "integrations",
                "method",
                "hyperparameters",
                "sample_prompts",
            )
        ),
    }

    answer = http.post(JOBS, json=body)

    assert answer.status_code == 200, answer.text


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"lora_rank": 8}, "lora_rank", "Unknown parameter: 'lora_rank'."),
    ({"hyperparameters": {"epochs": 1}}, "hyperparameters.epochs", "Unknown parameter"),
    ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "from 1 to 50; got 0"),
    ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs", "from 1 to 50"),
    ({"hyperparameters": {"n_epochs": "3"}}, "hyperparameters.n_epochs", "got '3'"),
    ({"hyperparameters": {"n_epochs": True}}, "hyperparameters.n_epochs", "got True"),
    ({"hyperparameters": {"batch_size": 257}}, "hyperparameters.batch_size", "from 1 to 256"),
    (
        {"hyperparameters": {"learning_rate_multiplier": 0}},
        "hyperparameters.learning_rate_multiplier",
        "a number above 0",
    ),
    ({"hyperparameters": {"lora_dropout": 1}}, "hyperparameters.lora_dropout", "0 to 0.9"),
    (
        {"hyperparameters": {"lora_target_modules": []}},
        "hyperparameters.lora_target_modules",
        "all-linear",
    ),
    (
        {"hyperparameters": {"lora_exclude_modules": "all-linear"}},
        "hyperparameters.lora_exclude_modules",
        '"auto" or a list of 1 to 64',
    ),
    ({"hyperparameters": {"max_steps": 0}}, "hyperparameters.max_steps", "from 1 to 10000000"),
    ({"hyperparameters": {"eval_steps": 0.5}}, "hyperparameters.eval_steps", "got 0.5"),
    ({"hyperparameters": {"packing": 1}}, "hyperparameters.packing", "true or false; got 1"),
    (
        {"hyperparameters": {"train_on_inputs": "yes"}},
        "hyperparameters.train_on_inputs",
        "true or false; got 'yes'",
    ),
    (
        {"hyperparameters": {"warmup_steps": 1, "warmup_ratio": 0.1}},
        "hyperparameters.warmup_steps",
        "keep one of them",
    ),
    (
        {"hyperparameters": {"early_stopping_patience": 3}},
        "hyperparameters.early_stopping_patience",
        "needs a validation file",
    ),
    (
        {"hyperparameters": {"optimizer": "sgd"}},
        "hyperparameters.optimizer",
        '"auto" or "adamw" or "adamw_8bit" or "paged_adamw" or "paged_adamw_8bit"',
    ),
    (
        {"hyperparameters": {"context_length": 10, "max_seq_length": 20}},
        "hyperparameters",
        "given twice",
    ),
    ({"seed": -1}, "seed", "from 0 to 2147483647"),
    ({"seed": 2**31}, "seed", "from 0 to 2147483647"),
    ({"suffix": "a:b"}, "suffix", "letters, digits"),
    ({"suffix": ""}, "suffix", "1 to 64"),
    ({"suffix": "x" * 65}, "suffix", "1 to 64"),
    ({"metadata": {"k" * 65: "v"}}, "metadata", "64 are allowed"),
    ({"metadata": {"k": "v" * 513}}, "metadata", "512"),
    ({"metadata": {str(i): "v" for i in range(17)}}, "metadata", "16 pairs"),
    ({"metadata": {"k": 1}}, "metadata", "strings"),
    ({"sample_prompts": ["hi"] * 9}, "sample_prompts", "at most 8"),
    ({"sample_prompts": [""]}, "sample_prompts", "1 to 16000 characters"),
    ({"sample_prompts": [[{"role": "user"}]]}, "sample_prompts[0][0].content", "Missing"),
    ({"method": {"type": "magic"}}, "method.type", "'supervised', 'dpo' or 'reinforcement'"),
    ({"method": {}}, "method.type", "Missing required parameter: 'method.type'."),
]
"""What is sent, which field the answer names, and a part of what it says."""


def test_what_is_out_of_bounds_is_refused_by_name(http: httpx2.Client, training_file: str) -> None:
    for fields, param, message in REFUSED:
        error = refused(http, training_file, **fields)

        assert error["param"] == param, fields
        assert message in error["message"], fields


def test_methods_that_are_not_there_yet_are_refused_in_a_sentence(
    http: httpx2.Client, training_file: str
) -> None:
    for kind in ("dpo", "reinforcement"):
        error = refused(http, training_file, method={"type": kind})

        assert (error["code"], error["param"]) == ("unsupported_method", "method.type")
        assert kind in error["message"]


def test_an_integration_is_refused_rather_than_ignored(
    http: httpx2.Client, training_file: str
) -> None:
    wandb = {"type": "wandb", "wandb": {"project": "p"}}

    error = refused(http, training_file, integrations=[wandb])

    assert (error["code"], error["param"]) == ("unsupported_integration", "integrations")


def test_an_unknown_model_is_refused_in_openais_words(
    http: httpx2.Client, training_file: str
) -> None:
    error = refused(http, training_file, model="gpt-9")

    assert error["message"] == "Model gpt-9 is not available for fine-tuning or does not exist."
    assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_files_that_cannot_be_used_are_refused(
    client: OpenAI,
    http: httpx2.Client,
    training_file: str,
    other_team: OpenAI,
) -> None:
    deleted = client.files.create(file=("d.jsonl", CHAT_LINE), purpose="fine-tune").id
    client.files.delete(deleted)
    theirs = other_team.files.create(file=("t.jsonl", CHAT_LINE), purpose="fine-tune").id
    picture = client.files.create(file=("p.txt", b"x"), purpose="user_data").id

    for param in ("training_file", "validation_file"):
        for unusable in ("file-none", deleted, theirs):
            error = refused(http, training_file, **{param: unusable})
            assert error["message"] == f"No such File object: {unusable}"
            assert (error["param"], error["code"]) == (param, "invalid_file_id")
        error = refused(http, training_file, **{param: picture})
        assert "purpose 'user_data'" in error["message"]
        assert error["param"] == param


def test_a_bad_files_content_is_no_reason_to_refuse_the_job(client: OpenAI) -> None:
    nonsense = client.files.create(file=("n.jsonl", b'{"a": 1}\n'), purpose="fine-tune").id

    job = create(client, nonsense)

    assert job.status == "validating_files"


def test_jobs_are_listed_newest_first_in_pages(strict: OpenAI, training_file: str) -> None:
    made = [create(strict, training_file).id for _ in range(5)]

    first = strict.fine_tuning.jobs.list(limit=2)
    every = [job.id for job in strict.fine_tuning.jobs.list(limit=2)]

    assert [job.id for job in first.data] == [made[4], made[3]]
    assert first.has_more
    assert every == made[::-1]


def test_odd_pages_are_answered_all_the_same(client: OpenAI, training_file: str) -> None:
    create(client, training_file)

    none_asked = client.fine_tuning.jobs.list(limit=0)
    unknown = client.fine_tuning.jobs.list(after="ftjob-unknown")
    many = client.fine_tuning.jobs.list(limit=100_000)

    assert none_asked.data == []
    assert (unknown.data, unknown.has_more) == ([], False)
    assert len(many.data) == 1


def test_a_negative_page_is_refused(http: httpx2.Client) -> None:
    answer = http.get(JOBS, params={"limit": -1})

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "limit"


def test_jobs_are_found_by_metadata(client: OpenAI, training_file: str) -> None:
    plain = create(client, training_file).id
    red = create(client, training_file, metadata={"colour": "red", "no. of legs": "4 & more"}).id
    blue = create(client, training_file, metadata={"colour": "blue"}).id
    empty = create(client, training_file, metadata={}).id

    def found(query: dict[str, Any]) -> list[str]:
        return [job.id for job in client.fine_tuning.jobs.list(extra_query=query).data]

    assert found({"metadata": {"colour": "red"}}) == [red]
    assert found({"metadata": {"colour": "red", "no. of legs": "4 & more"}}) == [red]
    assert found({"metadata": {"colour": "green"}}) == []
    assert found({"metadata": "null"}) == [empty, plain]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"colour": "blue"}).data] == [
        blue
    ]


def test_another_projects_jobs_do_not_exist(
    client: OpenAI, other_team: OpenAI, training_file: str
) -> None:
    mine = create(client, training_file).id

    assert other_team.fine_tuning.jobs.list().data == []
    assert other_team.fine_tuning.jobs.list(after=mine).data == []
    for call in (
        other_team.fine_tuning.jobs.retrieve,
        other_team.fine_tuning.jobs.cancel,
        other_team.fine_tuning.jobs.list_events,
        other_team.fine_tuning.jobs.checkpoints.list,
    ):
        with pytest.raises(openai.NotFoundError, match="No such fine-tuning job"):
            call(mine)


def test_an_unknown_job_is_a_404(http: httpx2.Client) -> None:
    for job_id in ("ftjob-none", "x" * 300, "é%2F", "'; --"):
        for path in ("", "/events", "/checkpoints", "/adapter", "/stream"):
            answer = http.get(f"{JOBS}/{job_id}{path}")

            assert answer.status_code == 404, (job_id, path, answer.text)
            assert answer.json()["error"]["message"]


def test_a_job_nobody_works_on_is_cancelled_at_once(strict: OpenAI, training_file: str) -> None:
    job_id = create(strict, training_file).id

    job = strict.fine_tuning.jobs.cancel(job_id)

    assert job.status == "cancelled"
    assert job.finished_at is not None
    assert strict.fine_tuning.jobs.list_events(job_id).data[0].message == (
        "Fine-tuning job cancelled"
    )


def test_of_a_job_at_work_the_wish_is_noted_until_the_worker_has_stopped(
    strict: OpenAI, training_file: str, worker: HandWorker
) -> None:
    job_id = create(strict, training_file).id
    run = worker.start()

    asked = strict.fine_tuning.jobs.cancel(job_id)
    again = strict.fine_tuning.jobs.cancel(job_id)
    worker.cancelled(run)

    for job in (asked, again):
        assert job.status == "running"
        assert job.model_extra is not None
        assert job.model_extra["cancel_requested"] is True
    done = strict.fine_tuning.jobs.retrieve(job_id)
    assert done.status == "cancelled"
    assert done.model_extra is not None
    assert done.model_extra["cancel_requested"] is False
    told = [event.message for event in strict.fine_tuning.jobs.list_events(job_id).data]
    assert told.count("Cancelling: waiting for the worker to stop") == 1


def test_a_job_that_has_ended_cannot_be_cancelled(
    client: OpenAI, training_file: str, worker: HandWorker
) -> None:
    for end in (worker.succeed, worker.fail, worker.cancelled):
        job_id = create(client, training_file).id
        end(worker.start())

        with pytest.raises(openai.BadRequestError, match="has already") as refusal:
            client.fine_tuning.jobs.cancel(job_id)

        assert refusal.value.code == "job_already_ended"


def test_a_created_job_wakes_a_worker_for_validation(
    client: OpenAI, training_file: str, valkey_server: Valkey
) -> None:
    create(client, training_file)

    with valkey_server.client() as broker:
        assert broker.llen("nibble:validate") == 1


odd = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "auto", "supervised", "tiny-llama", "null", "\u2028", "x" * 600]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "supervised", "hyperparameters", "n_epochs", "role", "a"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
FIELDS = ("model", "training_file", *CreateJob.model_fields, "hyperparameter")


@settings_of_hypothesis(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(fields=st.dictionaries(st.sampled_from(FIELDS), odd, max_size=4))
def test_no_body_is_answered_with_anything_but_a_job_or_a_reason(
    http: httpx2.Client, training_file: str, fields: dict[str, Any]
) -> None:
    body = {"model": "tiny-llama", "training_file": training_file} | fields

    answer = http.post(JOBS, json=body)

    assert answer.status_code in {200, 400}, answer.text
    if answer.status_code == 400:
        assert answer.json()["error"]["message"]
