"""From a config.json and the settings of a run to what it will take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from qlora_core.errors import ConfigError
from qlora_core.estimate.adapter import choose_adapter
from qlora_core.estimate.architecture import Architecture
from qlora_core.estimate.describing import describe
from qlora_core.estimate.devices import CPU_CORE, Figures, figures_of, known_cards
from qlora_core.estimate.memory import estimate_memory
from qlora_core.estimate.operations import FLOAT32
from qlora_core.estimate.optimizers import OPTIMIZERS
from qlora_core.estimate.parameters import Storage, count_parameters
from qlora_core.estimate.reading import ModelConfig, read_model_config
from qlora_core.estimate.result import Estimate
from qlora_core.estimate.resume_point import resume_point_bytes
from qlora_core.estimate.rows import Examples, count_passes, largest_pass
from qlora_core.estimate.settings import HasDict, TrainSettings, check_integer, read_settings
from qlora_core.estimate.step_time import assumptions, estimate_time

_BLOCK_SIZES = tuple(2**power for power in range(5, 13))
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# Names, shapes and places of a tensor in a safetensors header.
_HEADER_BYTES = 180


def estimate(
    model_config: ModelConfig,
    train_config: Mapping[str, Any] | HasDict | None = None,
    *,
    device: Literal["cuda", "cpu"] = "cuda",
    compute_dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    card: str = "H100",
    cores: int = 1,
    longest_tokens: int | None = None,
    mean_tokens: float | None = None,
    trained_share: float = 1.0,
    block_size: int = 64,
    double_quant: bool = True,
    inputs_on_host: bool = False,
) -> Estimate:
    """Calculate memory and time of a run; nothing is loaded, and torch is not needed.

    Args:
        model_config: the fields of the base model's config.json, that file, or a folder with it.
        train_config: the run's settings: a `TrainConfig`, or a mapping with its names; what is left out has its default.
        device: where the run is.
        compute_dtype: of hidden states and of what is not quantized; "bfloat16" on a GPU and "float32" on a CPU if not
            given.
        card: for the time on a GPU: its name, as `torch.cuda.get_device_name` gives it or a part of that.
        cores: for the time on a CPU.
        longest_tokens: of the longest example; ``context_length`` if not known.
        mean_tokens: of an example; ``longest_tokens`` if not known.
        trained_share: of all tokens, how many carry loss.
        block_size: elements per scale of a quantized weight.
        double_quant: whether the scales are 8-bit codes.
        inputs_on_host: whether what is kept for the backward pass is in the host's memory until then, as in a run that
            ran out of memory.

    Returns:
        The estimate. Memory is that of tensors in a step after the first.

    Raises:
        ModelNotFound: there is no such config.json.
        ModelUnsupported: it is not JSON, or not of a decoder that is known here.
        ConfigError: a setting is unknown or has a wrong value.
        LoraTargetError: a name of the adapter's settings means nothing in this model.
    """
    settings = read_settings(train_config)
    model = describe(*read_model_config(model_config))
    figures = _figures(device, card, cores)
    examples = _examples(settings, model, longest_tokens, mean_tokens, trained_share)
    storage = _storage(device, compute_dtype, block_size, double_quant=double_quant)
    product_bytes = storage.dense_bytes if device == "cuda" else FLOAT32
    adapter = choose_adapter(model, settings.lora)
    optimizer = OPTIMIZERS[settings.optimizer]
    counts = count_parameters(model, adapter, storage)
    largest = largest_pass(settings, examples)
    tokens = round(settings.batch_size * examples.mean)
    passes = count_passes(settings, examples, largest)
    memory = estimate_memory(
        model,
        adapter,
        counts,
        storage,
        largest,
        optimizer,
        checkpointing=settings.gradient_checkpointing,
        dropout=settings.lora.dropout > 0,
        product_bytes=product_bytes,
        on_gpu=device == "cuda",
        inputs_on_host=inputs_on_host,
    )
    step_time = estimate_time(
        model,
        adapter,
        storage,
        figures,
        tokens=tokens,
        mean_tokens=examples.mean,
        trained=tokens * trained_share,
        passes=passes,
        checkpointing=settings.gradient_checkpointing,
        product_bytes=product_bytes,
    )
    return Estimate(
        tokens_per_step=tokens,
        largest_pass_tokens=largest.tokens,
        passes_per_step=passes,
        parameters=counts,
        memory=memory,
        step_time=step_time,
        adapter_file_bytes=FLOAT32 * adapter.file_elements + _HEADER_BYTES * len(adapter.tensors),
        resume_point_bytes=resume_point_bytes(
            adapter.tensors, optimizer, keeps_best=settings.keeps_best
        ),
        assumed=(*_assumed(model, longest_tokens, device), assumptions(figures)),
    )


def _figures(device: str, card: str, cores: int) -> Figures:
    if device == "cuda":
        figures = figures_of(card)
        if figures is None:
            raise ConfigError(
                f"no figures are known of the card {card!r}; there are {', '.join(known_cards())}"
            )
        return figures
    if device != "cpu":
        raise ConfigError(f'device must be "cuda" or "cpu", not {device!r}')
    check_integer("cores", cores, 1, 1024)
    return Figures(f"{cores} x {CPU_CORE.name}", cores * CPU_CORE.tflops, cores * CPU_CORE.gb_per_s)


def _storage(device: str, dtype: str | None, block_size: int, *, double_quant: bool) -> Storage:
    """Say how the base model is kept."""
    if block_size not in _BLOCK_SIZES:
        raise ConfigError(f"block_size must be a power of two from 32 to 4096, not {block_size!r}")
    dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
    if dtype not in _BYTES:
        raise ConfigError(f"compute_dtype must be one of {', '.join(_BYTES)}, not {dtype!r}")
    return Storage(_BYTES[dtype], block_size, double_quant)


def _examples(
    settings: TrainSettings,
    model: Architecture,
    longest: int | None,
    mean: float | None,
    trained_share: float,
) -> Examples:
    """Check what is known of the examples, and take the longest they can be for what is not."""
    if longest is None:
        longest = settings.context_length
    check_integer("longest_tokens", longest, 2, 2**24)
    # Longer ones are cut.
    longest = min(longest, settings.context_length)
    mean = float(longest) if mean is None else mean
    if isinstance(mean, bool) or not isinstance(mean, int | float) or not 1 <= mean <= 2**24:
        raise ConfigError(f"mean_tokens must be a number from 1 to {2**24}, not {mean!r}")
    if not 0 < trained_share <= 1:
        raise ConfigError(f"trained_share must be above 0 and at most 1, not {trained_share!r}")
    return Examples(longest, min(float(mean), longest), trained_share, model.alone_above)


def _assumed(model: Architecture, longest: int | None, device: str) -> list[str]:
    said = list(model.assumed)
    if longest is None:
        said.append("every example is taken to be as long as context_length")
    if any(layer.experts for layer in model.layers):
        said.append("tokens are taken to be spread evenly over the experts")
    if device == "cuda":
        said.append(
            "memory is that of tensors: a CUDA context and the allocator's losses come on top and were never measured"
        )
    return said
