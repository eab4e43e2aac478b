"""A run's TOML file: sections of settings in, checked ones out, each mistake by its dotted name.

``[train]`` and ``[lora]`` are `TrainConfig` and `LoraConfig`, name by name; what they mean is written there. Paths are
relative to the file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from qlora_core.errors import ConfigError
from qlora_core.nn.config import LoraConfig
from qlora_core.quoting import shown
from qlora_core.train.config import TrainConfig

_ALSO_SPELLED = ("lora_alpha", "lora_dropout")


@dataclass(frozen=True)
class ModelSettings:
    """``[model]``: the base model and how it is loaded.

    Attributes:
        path: folder with config.json, tokenizer.json and safetensors weights.
        name: of the base model, for whoever loads the adapter; its path if not given.
        adapter: a PEFT folder to train on, instead of beginning anew.
        device: where to train.
        compute_dtype: of what is not quantized, and of products; "auto" is float32 on a CPU, else bfloat16, or float16
            on a GPU without it.
        quantize, block_size, double_quant, scale, skip_modules: as in `load_model`.
    """

    path: Path
    name: str | None = None
    adapter: Path | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantize: bool = True
    block_size: int = 64
    double_quant: bool = True
    scale: Literal["absmax", "mse"] = "absmax"
    skip_modules: tuple[str, ...] = ("lm_head",)


@dataclass(frozen=True)
class DataSettings:
    """``[data]``: JSONL files of chats, prompt/completion pairs or plain text.

    Attributes:
        train: what to train on.
        validation: what to measure on.
        samples: questions that the base model and the adapter answer, before and after.
    """

    train: Path
    validation: Path | None = None
    samples: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunFile:
    """The settings of a run.

    Attributes:
        path: of the file.
        content: its bytes.
        output: the folder that the run writes, None where the file names none.
        config: ``[train]`` and ``[lora]``.
        has_context_length: whether the file says one.
    """

    path: Path
    content: bytes
    output: Path | None
    model: ModelSettings
    data: DataSettings
    config: TrainConfig
    has_context_length: bool

    def with_context(self, most_tokens: int | None) -> TrainConfig:
        """Give the settings with a context length that the model has room for.

        Args:
            most_tokens: that the model was made for, None where it does not say.

        Raises:
            ConfigError: the file asks for more.
        """
        wanted = self.config.context_length
        if most_tokens is None or wanted <= most_tokens:
            return self.config
        if self.has_context_length:
            raise ConfigError(
                f"{self.path}: train.context_length is {wanted}, but the model was made for {most_tokens} tokens"
            )
        return replace(self.config, context_length=most_tokens)


_MODEL_KINDS: dict[str, object] = {
    "path": Path,
    "name": str,
    "adapter": Path,
    "device": ("auto", "cpu", "cuda"),
    "compute_dtype": ("auto", "float32", "bfloat16", "float16"),
    "quantize": bool,
    "block_size": int,
    "double_quant": bool,
    "scale": ("absmax", "mse"),
    "skip_modules": list,
}
_DATA_KINDS: dict[str, object] = {"train": Path, "validation": Path, "samples": list}
KNOWN: dict[str, list[str]] = {
    "model": [*_MODEL_KINDS],
    "data": [*_DATA_KINDS],
    "train": [one.name for one in fields(TrainConfig) if one.name != "lora"],
    "lora": [one.name for one in fields(LoraConfig)],
}
"""The settings of each section."""

_MOST_NESTED = 8  # a rank by pattern is three deep


def read_run_file(path: Path) -> RunFile:
    """Read and check a run's file.

    Raises:
        ConfigError: it is not TOML, a key is missing or unknown, or a value is wrong; the message names the line or
            the key.
        OSError: it cannot be read.
    """
    try:
        text = path.read_bytes()
        content = tomllib.loads(text.decode("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    except RecursionError:
        raise ConfigError(f"{path}: it is nested too deeply") from None
    try:
        _refuse_boundless(content)
        return _checked(path, text, content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}") from error


def _refuse_boundless(content: dict[str, Any]) -> None:
    """Refuse what Python reads of TOML, but cannot print, or make a float of."""
    level: list[Any] = [content]
    for _ in range(_MOST_NESTED):
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict | list):
                below += one.values() if isinstance(one, dict) else one
            elif isinstance(one, int) and not -(2**63) <= one < 2**63:
                raise ConfigError("a number has more than 64 bits")
        level = below
    if level:
        raise ConfigError("it is nested too deeply")


def _checked(path: Path, text: bytes, content: dict[str, Any]) -> RunFile:
    _refuse_unknown("", content, ["output", *KNOWN])
    sections: dict[str, dict[str, Any]] = {}
    for name, known in KNOWN.items():
        section = content.get(name, {})
        if not isinstance(section, dict):
            raise ConfigError(f"{name} must be a section, [{name}], not {shown(section)}")
        _refuse_unknown(name, section, [*known, *(_ALSO_SPELLED if name == "lora" else ())])
        sections[name] = section
    _require("model", "path", sections["model"])
    _require("data", "train", sections["data"])
    folder = path.parent
    output = content.get("output")
    return RunFile(
        path=path,
        content=text,
        output=None if output is None else _value("output", output, Path, folder),
        model=ModelSettings(**_values("model", sections["model"], _MODEL_KINDS, folder)),
        data=DataSettings(**_values("data", sections["data"], _DATA_KINDS, folder)),
        config=_config(sections["train"], sections["lora"]),
        has_context_length="context_length" in sections["train"],
    )


def _config(train: Mapping[str, Any], lora: Mapping[str, Any]) -> TrainConfig:
    try:
        adapter = LoraConfig.from_dict(lora)
    except ConfigError as error:
        told = error.message.removeprefix("LoRA's ")
        raise ConfigError(f"lora.{told}") from error
    try:
        return TrainConfig(**train, lora=adapter)
    except ConfigError as error:
        raise ConfigError(f"train.{error.message}") from error


def _values(
    section: str, given: Mapping[str, Any], kinds: Mapping[str, object], folder: Path
) -> dict[str, Any]:
    return {
        name: _value(f"{section}.{name}", value, kinds[name], folder)
        for name, value in given.items()
    }


def _value(name: str, value: object, kind: object, folder: Path) -> Any:  # noqa: ANN401 - as its kind is
    """Check one value; a path becomes one from the file's folder."""
    if isinstance(kind, tuple):
        if value not in kind:
            raise ConfigError(f"{name} must be one of {', '.join(kind)}, not {shown(value)}")
        return value
    if kind is list:
        if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
            raise ConfigError(f"{name} must be a list of strings, not {shown(value)}")
        return tuple(value)
    if kind is bool or kind is int:
        if type(value) is not kind:
            wanted = "true or false" if kind is bool else "a whole number"
            raise ConfigError(f"{name} must be {wanted}, not {shown(value)}")
        return value
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name} must be a string, not {shown(value)}")
    return _path(name, value, folder) if kind is Path else value


def _path(name: str, value: str, folder: Path) -> Path:
    if "\0" in value:
        raise ConfigError(f"{name} must have no NUL in it, not {shown(value)}")
    try:
        return folder / Path(value).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{name} is in the home of a user who is not here, {shown(value)}"
        ) from None


def _require(section: str, name: str, given: Mapping[str, Any]) -> None:
    if name not in given:
        raise ConfigError(f"{section}.{name} is missing")


def _refuse_unknown(section: str, given: Iterable[str], known: list[str]) -> None:
    for key in given:
        if key in known:
            continue
        where = f"[{section}] has no setting {key}" if section else f"there is no setting {key}"
        elsewhere = [name for name, keys in KNOWN.items() if key in keys]
        nearest = get_close_matches(key, known, n=1)
        if elsewhere:
            raise ConfigError(f"{where}; it belongs in [{elsewhere[0]}]")
        if nearest:
            raise ConfigError(f"{where}; did you mean {nearest[0]}?")
        raise ConfigError(f"{where}; it has {', '.join(known)}")
