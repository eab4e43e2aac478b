"""What of a run would fit into given memory: the largest micro-batch, failing that context, failing that rank.

Found by bisection over the estimate, so that what is named was estimated and found to fit; that the next larger does not
is true where memory grows with each of the three, as it does but for odd lengths of packed rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_core.estimate.estimating import estimate
from qlora_core.estimate.reading import ModelConfig, read_model_config
from qlora_core.estimate.result import Estimate
from qlora_core.estimate.settings import HasDict, read_settings
from qlora_core.units import size

# What is shorter is hardly worth training on.
_LEAST_CONTEXT = 128
_Values = dict[str, Any]


@dataclass(frozen=True)
class Fitting:
    """What would fit, or the smallest that does not.

    Attributes:
        fits: whether anything does.
        settings: of a run, by the names of `TrainConfig`: what has to change, to which value.
        estimate: with these changes.
        room_bytes: what it was to fit into.
    """

    fits: bool
    settings: dict[str, Any]
    estimate: Estimate
    room_bytes: int

    @property
    def sentence(self) -> str:
        """The same in words; calculated, not measured."""
        memory = self.estimate.memory
        total, room = size(memory.total_bytes), size(self.room_bytes)
        if not self.fits:
            return (
                f"By the estimate nothing fits into {room}: even with {_list(self.settings)} it takes {total}, "
                f"{size(memory.base_bytes)} of it for the base model."
            )
        if not self.settings:
            return f"By the estimate it fits into {room} as it is, with {total}."
        return f"By the estimate it fits into {room} with {_list(self.settings)}: it takes {total}."

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON-able values, without what is not about memory."""
        return {
            "fits": self.fits,
            "settings": self.settings,
            "total_bytes": self.estimate.memory.total_bytes,
            "sentence": self.sentence,
        }


def largest_fitting(
    model_config: ModelConfig,
    train_config: Mapping[str, Any] | HasDict | None = None,
    *,
    room_bytes: int,
    **options: Any,  # noqa: ANN401 - estimate's own
) -> Fitting:
    """Find what of a run fits, with the most frugal settings that do not make it smaller.

    Those are gradient checkpointing and moments in 8 bits, paged on a GPU; where one of them is not needed it stays as it
    is. Takes some thirty estimates at most, a second or two for the largest models.

    Args:
        model_config: as for `estimate`.
        train_config: as for `estimate`.
        room_bytes: for tensors. Of a run that ran out of memory although its estimate fits, give less than the estimate.
        options: of `estimate`.

    Raises:
        ModelNotFound, ModelUnsupported, ConfigError, LoraTargetError: as `estimate`.
    """
    fields, _ = read_model_config(model_config)
    given = _as_values(train_config)

    def estimated(changes: _Values) -> Estimate:
        return estimate(fields, _changed(given, changes), **options)

    def fits(changes: _Values) -> bool:
        return estimated(changes).fits(room_bytes)

    on_gpu = options.get("device", "cuda") == "cuda"
    frugal = {
        "gradient_checkpointing": True,
        "optimizer": "paged_adamw_8bit" if on_gpu else "adamw_8bit",
    }
    smallest: _Values = frugal
    for low, high, make in _sizes(given, options.get("longest_tokens")):
        largest = _bisect(low, high, lambda one, make=make: fits({**frugal, **make(one)}))
        smallest = {**frugal, **make(low)}
        if largest is not None:
            changes = _needed({**frugal, **make(largest)}, list(frugal), fits)
            changes = _without_idle_tokens(changes, estimated(changes), given)
            return Fitting(True, _differing(given, changes), estimated(changes), room_bytes)
    return Fitting(False, _differing(given, smallest), estimated(smallest), room_bytes)


def _sizes(
    given: _Values, longest: int | None
) -> Iterator[tuple[int, int, Callable[[int], _Values]]]:
    """Give what is made smaller, in turn: from which value to which, and the changes that a value means."""
    settings = read_settings(given)
    tokens, context, rank = settings.micro_batch_tokens, settings.context_length, settings.lora.r
    longest = context if longest is None else min(longest, context)
    yield min(longest, tokens), tokens, lambda most: {"micro_batch_tokens": most}
    least = min(_LEAST_CONTEXT, longest)

    def shorter(length: int) -> _Values:
        return {"context_length": length, "micro_batch_tokens": min(tokens, length)}

    yield least, longest, shorter
    yield 1, rank, lambda r: {**shorter(least), "lora.r": r}


def _bisect(low: int, high: int, fits: Callable[[int], bool]) -> int | None:
    """Give the largest size from low to high that fits, None where the lowest does not."""
    if not fits(low):
        return None
    if fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def _needed(changes: _Values, names: list[str], fits: Callable[[_Values], bool]) -> _Values:
    """Leave out of the changes those of some names without which it fits, too."""
    for name in names:
        fewer = {one: value for one, value in changes.items() if one != name}
        if fits(fewer):
            changes = fewer
    return changes


def _without_idle_tokens(changes: _Values, found: Estimate, given: _Values) -> _Values:
    """Lower a smaller micro-batch to the tokens that its largest pass has, where no further example has room in it."""
    most = changes["micro_batch_tokens"]
    if most == read_settings(given).micro_batch_tokens:
        return changes
    return {**changes, "micro_batch_tokens": min(most, found.largest_pass_tokens)}


def _as_values(config: Mapping[str, Any] | HasDict | None) -> _Values:
    """Give a run's settings as a table, after a look at what counts of them."""
    read_settings(config)
    if config is None:
        return {}
    return dict(config) if isinstance(config, Mapping) else config.as_dict()


def _changed(given: _Values, changes: _Values) -> _Values:
    values = {**given, **changes}
    if "lora.r" in values:
        values["lora"] = {**(values.get("lora") or {}), "r": values.pop("lora.r")}
    return values


def _differing(given: _Values, changes: _Values) -> _Values:
    settings = read_settings(given)
    before = {name: getattr(settings, name) for name in changes if name != "lora.r"}
    before["lora.r"] = settings.lora.r
    return {name: value for name, value in changes.items() if value != before[name]}


def _list(settings: Mapping[str, Any]) -> str:
    said = [f"{name} = {_toml(value)}" for name, value in settings.items()]
    if len(said) < 2:
        return "".join(said) or "the settings given"
    return f"{', '.join(said[:-1])} and {said[-1]}"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
