import errno

import pytest

from qlora_core.errors import DatasetError, LossNotFiniteError, ModelWeightsPickle
from service.models.actions import ModelUnavailable
from worker.child.failures import explain


@pytest.mark.parametrize(
    ("error", "code", "param", "has_hint"),
    [
        (ModelWeightsPickle("only pickle"), "model_weights_pickle", "model", True),
        (LossNotFiniteError("NaN"), "loss_not_finite", None, True),
        (
            DatasetError("bad", code="invalid_n_examples"),
            "invalid_n_examples",
            "training_file",
            False,
        ),
        (ModelUnavailable("no network"), "model_unavailable", "model", False),
        (OSError(errno.ENOSPC, "full"), "disk_full", None, True),
        (MemoryError(), "out_of_memory", None, True),
        (ValueError("secret detail"), "internal_error", None, True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_every_failure_has_a_code_and_a_sentence(
    error: Exception, code: str, param: str | None, has_hint: bool
) -> None:
    told = explain(error)

    assert (told["code"], told["param"], "hint" in told) == (code, param, has_hint)
    assert told["message"]


def test_the_log_keeps_the_folders_that_users_do_not_see(
    capsys: pytest.CaptureFixture[str],
) -> None:
    explain(ModelWeightsPickle("the model in /srv/models/a has only pickle files"))

    assert "/srv/models/a" in capsys.readouterr().err


def test_what_nobody_expected_keeps_its_details_to_the_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = explain(ValueError("secret detail"))

    assert "secret detail" not in told["message"]
    assert "ValueError: secret detail" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", ["CUDA out of memory", "DefaultCPUAllocator: can't allocate memory"]
)
def test_torchs_own_errors_are_out_of_memory_too(words: str) -> None:
    import torch

    error = torch.OutOfMemoryError if words.startswith("CUDA") else RuntimeError
    told = explain(error(words))

    assert told["code"] == "out_of_memory"
