"""Whatever a run's file says, it is read or refused in a sentence."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from qlora_core import LoraConfig, TrainConfig
from qlora_core.commands.run_file import KNOWN, read_run_file
from qlora_core.errors import ConfigError

HUGE = 10**400
ODD = {
    "huge": str(HUGE),
    "huge-negative": str(-HUGE),
    "beyond-64-bits": str(2**63),
    "too-many-digits": "9" * 5000,
    "hexadecimal": "0x" + "f" * 5000,
    "nan": "nan",
    "infinite": "-inf",
    "true": "true",
    "empty": '""',
    "nobody": '"~nosuchuser/x"',
    "nul": '"a\\u0000b"',
    "newline": '"a\\nb"',
    "repeated": '"a{99999999999999999999}"',
    "groups": '"' + "(" * 2000 + '"',
    "time": "1979-05-27T07:32:00Z",
    "list": "[1]",
    "lists": "[[1], [2]]",
    "nested-list": "[" * 50 + "]" * 50,
    "deep-list": "[" * 5000 + "]" * 5000,
    "table": "{ a = 1 }",
    "table-of-huge": f"{{ a = {HUGE} }}",
    "deep-table": "{ " + ".".join("a" * 3000) + " = 1 }",
}
LEAST = {"model": {"path": '"model"'}, "data": {"train": '"train.jsonl"'}}


def write(folder: Path, section: str, key: str, value: str) -> Path:
    content = {name: {**LEAST.get(name, {})} for name in KNOWN}
    lines = [f"{key} = {value}"] if not section else []
    if section:
        content[section][key] = value
    for name, settings in content.items():
        lines += [f"[{name}]", *(f"{one} = {text}" for one, text in settings.items())]
    file = folder / "run.toml"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_value_of_any_setting_is_read_or_refused_in_a_sentence(
    tmp_path: Path, odd: str
) -> None:
    settings = [("", "output"), ("lora", "lora_alpha"), ("lora", "lora_dropout")]
    settings += [(section, key) for section, keys in KNOWN.items() for key in keys]

    for section, key in settings:
        file = write(tmp_path, section, key, ODD[odd])
        with suppress(ConfigError):
            read_run_file(file)


@pytest.mark.parametrize(
    "value",
    [HUGE, -HUGE, 10**5000, float("nan"), float("inf")],
    ids=["huge", "huge-negative", "unprintable", "nan", "infinite"],
)
def test_the_settings_themselves_refuse_numbers_without_bounds(value: float) -> None:
    for name in ("learning_rate", "weight_decay", "resume_point_every_s", "n_epochs"):
        with pytest.raises(ConfigError, match=name):
            TrainConfig(**{name: value})  # type: ignore[arg-type]
    for name in ("alpha", "dropout", "r"):
        with pytest.raises(ConfigError, match=name):
            LoraConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("path", ODD["nobody"], "model.path is in the home of a user who is not here, '~nosuchuser/x'"),
        ("path", ODD["nul"], r"model.path must have no NUL in it, not 'a\x00b'"),
        ("block_size", ODD["huge"], "a number has more than 64 bits"),
        ("name", ODD["deep-list"], "is nested too deeply"),
        ("name", ODD["nested-list"], "is nested too deeply"),
    ],
)  # fmt: skip
def test_oddities_are_named(tmp_path: Path, key: str, value: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_run_file(write(tmp_path, "model", key, value))

    assert sentence in refused.value.message
    assert len(refused.value.message) < 1000
