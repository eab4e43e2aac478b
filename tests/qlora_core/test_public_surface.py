"""What a user of the library calls, by the names and in the order that was promised, and what each docstring tells."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

import qlora_core
from qlora_core.estimate.estimating import estimate
from qlora_core.train.loop import train

# How each may be called: positional names, and the keywords that have to be given beside them.
CALLS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "load_model": (("path",), ("device", "compute_dtype")),
    "add_lora": (("model", "config"), ()),
    "save_adapter": (("model", "folder"), ()),
    "load_adapter": (("model", "folder"), ()),
    "merge": (("model", "onto"), ("output_folder",)),
    "train": (("model", "encoder", "dataset", "config", "sink"), ("output_dir",)),
    "estimate": (("model_config", "train_config"), ()),
}


def function(name: str) -> Callable[..., Any]:
    # Two names are bound to their packages, once these were imported.
    return {"train": train, "estimate": estimate}.get(name) or getattr(qlora_core, name)


@pytest.mark.parametrize("name", CALLS)
def test_it_is_called_as_promised(name: str) -> None:
    positional, keywords = CALLS[name]

    parameters = inspect.signature(function(name)).parameters

    required = [one.name for one in parameters.values() if one.default is inspect.Parameter.empty]
    assert tuple(parameters)[: len(positional)] == positional
    assert {*required} <= {*positional, *keywords}
    assert {*keywords} <= {*required}


@pytest.mark.parametrize("name", CALLS)
def test_its_docstring_says_what_goes_in_what_comes_out_and_what_is_raised(name: str) -> None:
    told = inspect.getdoc(function(name)) or ""

    for section in ("Args:", "Returns:", "Raises:"):
        assert section in told, section


@pytest.mark.parametrize("name", ["TrainConfig", "LoraConfig"])
def test_every_setting_is_described(name: str) -> None:
    config = getattr(qlora_core, name)
    told = inspect.getdoc(config) or ""

    missing = [one for one in inspect.signature(config).parameters if f"\n    {one}" not in told]

    assert missing == []
