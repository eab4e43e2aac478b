"""Merges a model's adapters into a plain checkpoint of its base.

Which base is the caller's explicit choice. The adapters were trained over the dequantized weights, whose errors they
may have learned to make good; over the 16-bit originals those errors are gone, which is mostly better and sometimes
much worse. How far the merged model's answers are from the trained one's is measured on a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_core.errors import AdapterError, ConfigError
from qlora_core.export.base_weights import BaseWeights, InFolder, InMemory, Originals
from qlora_core.export.comparison import LogitDifference, compare, draw_sample
from qlora_core.export.merged_weights import MergedWeights, own_dtype, quantized_names
from qlora_core.models.checkpoint_folder import (
    copy_beside,
    find_source,
    refuse_target,
    whole_config,
)
from qlora_core.models.skeleton import build_again
from qlora_core.models.writing import fill_shards, shard_names, write_file, write_index
from qlora_core.nn import lora_modules
from qlora_core.whole_folder import written_whole

_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class MergeResult:
    """What a merge has written, and how it answers.

    Attributes:
        folder: a plain checkpoint that transformers loads.
        files: everything in it.
        onto: the base that was chosen.
        dtype: of the merged weights, such as "bfloat16".
        weight_bytes: of all weights.
        difference: of the merged model's answers from those of the model with adapters.
    """

    folder: Path
    files: tuple[Path, ...]
    onto: Literal["dequantized", "original"]
    dtype: str
    weight_bytes: int
    difference: LogitDifference


def merge(
    model: PreTrainedModel,
    onto: Literal["dequantized", "original"],
    *,
    output_folder: Path | str,
    original_folder: Path | str | None = None,
    source: Path | str | None = None,
    dtype: torch.dtype | None = None,
    sample: Tensor | None = None,
    shard_bytes: int = _SHARD_BYTES,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> MergeResult:
    """Write a plain checkpoint of the base with the model's adapters merged in; the model is left as it was.

    The sums are taken in float32 and rounded once. Beside the model, memory holds one weight file's content.

    Args:
        model: with adapters.
        onto: "dequantized": the weights that the model has in NF4, over which the adapters were trained; "original":
            those it was quantized from, read from ``original_folder``.
        output_folder: where to; it must not be there yet, or be empty.
        original_folder: of the 16- or 32-bit base.
        source: the folder from which the tokenizer, chat templates and licence are copied; ``original_folder``, or where
            the model was loaded from, if not given.
        dtype: float16, bfloat16 or float32, of all weights; if not given, that of the weights which the base was
            quantized from, and what was never quantized nor trained keeps its own where rounding would change it.
        sample: token ids to compare the answers on, int64 [texts, tokens]; drawn at random if not given.
        shard_bytes: about the size of a weight file; a larger model is cut into several.
        overwrite: whether a folder with files in it is replaced.
        on_progress: called with (bytes done, bytes in all) of the weights, as estimated.

    Returns:
        What was written and the difference measured.

    Raises:
        AdapterError: the model has no adapters, or one over a weight that other layers share.
        ConfigError: a choice is not one of those above, or the output folder has files in it, or holds what is read.
        ModelError: the original weights cannot be used, or are not those the model was quantized from.
        OSError: the disk is full, or refuses to be written to.
    """
    output_folder = Path(output_folder)
    original = _check_choice(onto, original_folder, dtype)
    _check_adapters(model)
    source = find_source(model, source or original)
    read = (original, find_source(model, None))
    refuse_target(
        output_folder, source, overwrite=overwrite, inputs=[one for one in read if one is not None]
    )
    skeleton = build_again(model)
    ids = draw_sample(model) if sample is None else _check_sample(model, sample)
    with written_whole(output_folder) as unfinished:
        with ExitStack() as stack:
            base: BaseWeights = InMemory(model, skeleton)
            if original is not None:
                weights = stack.enter_context(InFolder(original, skeleton, model.device))
                base = Originals(weights, base, quantized_names(model), original)
            merged = MergedWeights(model, skeleton, base, dtype)
            weight_bytes = _write(unfinished, merged, shard_bytes, on_progress)
        config = _plain_config(model, source, dtype or own_dtype(model))
        config.save_pretrained(unfinished)
        copy_beside(model, source, unfinished)
        with InFolder(unfinished, skeleton, model.device) as written:
            difference = compare(model, skeleton, written, merged.groups, ids)
        files = [path.relative_to(unfinished) for path in unfinished.rglob("*") if path.is_file()]
    return MergeResult(
        folder=output_folder,
        files=tuple(sorted(output_folder / file for file in files)),
        onto=onto,
        dtype=str(dtype or own_dtype(model)).removeprefix("torch."),
        weight_bytes=weight_bytes,
        difference=difference,
    )


def _check_choice(
    onto: str, original_folder: Path | str | None, dtype: torch.dtype | None
) -> Path | None:
    if onto not in ("dequantized", "original"):
        raise ConfigError(
            f'an adapter is merged onto "dequantized" (what it was trained over) or "original" (the 16-bit weights), '
            f"not {onto!r}"
        )
    if (onto == "original") != (original_folder is not None):
        raise ConfigError(
            'merging onto "original" needs original_folder, the folder of the weights that the model was quantized from'
            if original_folder is None
            else 'merging onto "dequantized" reads no folder; leave original_folder out, or merge onto "original"'
        )
    if dtype not in (None, torch.float16, torch.bfloat16, torch.float32):
        raise ConfigError(f"merged weights are float16, bfloat16 or float32, not {dtype}")
    return None if original_folder is None else Path(original_folder)


def _check_adapters(model: PreTrainedModel) -> None:
    adapters = lora_modules(model)
    if not adapters:
        raise AdapterError("The model has no LoRA adapters to merge.")
    shared = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    for path in adapters:
        if f"{path}.weight" in shared:
            raise AdapterError(
                f"{path} shares its weight with another layer, which merging its adapter would part; use the adapter "
                "as it is."
            )


def _check_sample(model: PreTrainedModel, sample: Tensor) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    is_ids = sample.dim() == 2 and sample.numel() > 0 and sample.dtype == torch.int64
    if not is_ids or int(sample.min()) < 0 or int(sample.max()) >= vocabulary:
        raise ConfigError(
            f"the sample must be token ids below {vocabulary}, int64 [texts, tokens], not {sample.dtype} "
            f"{list(sample.shape)}"
        )
    return sample.to(model.device)


def _write(
    folder: Path,
    merged: MergedWeights,
    shard_bytes: int,
    on_progress: Callable[[int, int], None] | None,
) -> int:
    """Write the weight files and their index; give the bytes of all weights."""
    sizes = merged.sizes()
    shards = fill_shards(sizes, shard_bytes)
    files = [folder / name for name in shard_names(len(shards))]
    estimate, done = sum(sizes.values()), 0

    def wrote(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if on_progress is not None:
            on_progress(min(done, estimate), estimate)

    stored: list[list[str]] = []
    for file, layers in zip(files, shards, strict=True):
        tensors: dict[str, Tensor] = {}
        for layer in layers:
            tensors |= merged.take(layer)
        write_file(file, tensors, wrote)
        stored.append(list(tensors))
    write_index(files, stored, done)
    return done


def _plain_config(model: PreTrainedModel, source: Path | None, dtype: torch.dtype) -> Any:  # noqa: ANN401
    """Give a configuration of the merged model, true about its dtype and about what it ties."""
    config = whole_config(model, source)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = str(dtype).removeprefix("torch.")
    # The loader parts what a checkpoint holds as two different matrices, whatever its config says.
    tied = bool(model.all_tied_weights_keys)
    for one in (config, config.get_text_config()):
        if not tied and getattr(one, "tie_word_embeddings", False):
            one.tie_word_embeddings = False
    return config
