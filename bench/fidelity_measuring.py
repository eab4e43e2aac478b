"""Measures what each storage format loses: of tiny-llama's weights, and of its predictions on text it never saw."""

import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Protocol

import torch
from rich.progress import Progress
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from bench.surroundings import ROOT
from qlora_core import NF4Linear, load_model, quantize_nf4
from qlora_core.quant.comparators import (
    quantize_e2m1,
    quantize_fp4,
    quantize_int4,
    quantize_int8,
)

MODEL = ROOT / "examples" / "tiny-llama"
WINDOW_TOKENS = 256  # nearly all of tiny-llama's training was on sequences of this length
WINDOWS_AT_ONCE = 8


class Quantized(Protocol):
    """What every format has in common."""

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        ...

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Give the weight back."""
        ...


FORMATS: dict[str, Callable[[Tensor], Quantized]] = {
    "int8": quantize_int8,
    "int4": quantize_int4,
    "FP4": quantize_fp4,
    "FP4 E2M1": quantize_e2m1,
    "NF4": partial(quantize_nf4, double_quant=False),
    "NF4+DQ": quantize_nf4,
    "NF4 mse": partial(quantize_nf4, double_quant=False, scale="mse"),
    "NF4+DQ mse": partial(quantize_nf4, scale="mse"),
}
# Mean perplexity on Pile Common Crawl of OPT, BLOOM, LLaMA and Pythia, 125M to 13B. QLoRA, arXiv:2305.14314, table 2.
PAPER_PERPLEXITY = {"int4": 34.34, "FP4 E2M1": 31.07, "NF4+DQ": 27.41}


@dataclass(frozen=True)
class Row:
    """One format: what its weights cost in memory and lost, and what the model lost with them."""

    name: str
    bits_per_parameter: float
    mean_squared_error: float
    """Of the quantized layers' weights."""
    sqnr_db: float | None
    """Signal to quantization noise: 10 log10 of the weights' mean square over the error's."""
    perplexity: float
    loss_added: float
    """Nats per token more than in 16 bits."""
    loss_added_standard_error: float
    """Over the windows of text."""
    divergence: float
    """Nats per token from the 16-bit model's predictions (Kullback-Leibler)."""
    divergence_standard_error: float
    """Over the windows of text."""
    paper_perplexity: float | None


def held_out_text() -> Tensor:
    """Give the modules that tiny-llama never saw as one stream of token ids, int16 [tokens]."""
    sys.path.insert(0, str(MODEL))  # its scripts stand beside it
    corpus, vocabulary = import_module("corpus"), import_module("vocabulary")
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    return corpus.encode(tokenizer, corpus.held_out_documents(), vocabulary.DOCUMENT_START)


def quantized_weights() -> dict[str, Tensor]:
    """Give the 16-bit weights of the layers that `load_model` quantizes, by the layer's path."""
    quantized = load_model(MODEL, device="cpu", compute_dtype=torch.float32)
    paths = [path for path, module in quantized.named_modules() if isinstance(module, NF4Linear)]
    dense = load_model(MODEL, device="cpu", compute_dtype=torch.bfloat16, quantize=False)
    return {path: dense.get_parameter(f"{path}.weight").detach() for path in paths}


def measure(weights: dict[str, Tensor], text: Tensor) -> list[Row]:
    """Quantize the weights to each format, and read the text with each of the models side by side."""
    in_16_bits = load_model(MODEL, device="cpu", compute_dtype=torch.float32, quantize=False)
    models = {"16-bit": in_16_bits}
    memory: dict[str, tuple[float, float, float | None]] = {"16-bit": (16.0, 0.0, None)}
    for name, quantize in FORMATS.items():
        models[name] = deepcopy(in_16_bits)
        memory[name] = quantize_into(models[name], weights, quantize)

    losses, divergences = read(models, text)
    rows: list[Row] = []
    for name in models:
        added, divergence = losses[name] - losses["16-bit"], divergences[name]
        bits, error, sqnr = memory[name]
        rows.append(
            Row(
                name=name,
                bits_per_parameter=bits,
                mean_squared_error=error,
                sqnr_db=sqnr,
                perplexity=math.exp(float(losses[name].mean())),
                loss_added=float(added.mean()),
                loss_added_standard_error=float(added.std()) / math.sqrt(len(added)),
                divergence=float(divergence.mean()),
                divergence_standard_error=float(divergence.std()) / math.sqrt(len(added)),
                paper_perplexity=PAPER_PERPLEXITY.get(name),
            )
        )
    return rows


def quantize_into(
    model: PreTrainedModel, weights: dict[str, Tensor], quantize: Callable[[Tensor], Quantized]
) -> tuple[float, float, float]:
    """Give the model what is left of its weights; return bits per parameter, mean squared error, SQNR in dB."""
    n, n_bytes, error, signal = 0, 0, 0.0, 0.0
    for path, weight in weights.items():
        quantized = quantize(weight)
        back = quantized.dequantize(torch.float32)
        model.get_parameter(f"{path}.weight").data.copy_(back)
        n += weight.numel()
        n_bytes += quantized.nbytes
        error += squared_error(weight, back)
        signal += float(weight.double().square().sum())
    return 8 * n_bytes / n, error / n, 10 * math.log10(signal / error)


@torch.inference_mode()
def read(
    models: dict[str, PreTrainedModel], text: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Give each model's loss, and its divergence from the first one's predictions.

    Both by the model's name, in nats per token, the mean of each window: float64 [windows].
    """
    windows = (len(text) - 1) // WINDOW_TOKENS
    inputs = text[: windows * WINDOW_TOKENS].long().view(windows, WINDOW_TOKENS)
    targets = text[1 : windows * WINDOW_TOKENS + 1].long().view(windows, WINDOW_TOKENS)
    losses, divergences = (
        {name: torch.empty(windows, dtype=torch.float64) for name in models} for _ in range(2)
    )
    with Progress() as progress:
        task = progress.add_task("reading", total=windows)
        for start in range(0, windows, WINDOWS_AT_ONCE):
            place = slice(start, start + WINDOWS_AT_ONCE)
            expected = probabilities = None
            for name, model in models.items():
                logits = model(input_ids=inputs[place], use_cache=False).logits
                predicted = torch.log_softmax(logits, dim=-1)
                if expected is None or probabilities is None:  # the first model's
                    expected, probabilities = predicted, predicted.exp()
                of_targets = predicted.gather(2, targets[place, :, None]).squeeze(2)
                losses[name][place] = -of_targets.double().mean(dim=1)
                divergence = torch.linalg.vecdot(probabilities, expected - predicted)
                divergences[name][place] = divergence.double().mean(dim=1)
            progress.update(task, completed=min(place.stop, windows))
    return losses, divergences


def squared_error(weight: Tensor, back: Tensor) -> float:
    """Give the sum of squared errors."""
    return float((weight.double() - back.double()).square().sum())


def gains_by_kind(weights: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Give for each kind of layer the share of squared error that scale="mse" removes."""
    errors: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    names = ("NF4", "NF4 mse", "NF4+DQ", "NF4+DQ mse")
    for path, weight in weights.items():
        for name in names:
            back = FORMATS[name](weight).dequantize(torch.float32)
            errors[path.rpartition(".")[2]][name] += squared_error(weight, back)
    errors["all"] = {name: sum(of[name] for of in errors.values()) for name in names}
    return {
        kind: {name: 1 - of[f"{name} mse"] / of[name] for name in ("NF4", "NF4+DQ")}
        for kind, of in errors.items()
    }


def costs_in_ms() -> dict[str, float]:
    """Give the median time of quantizing a matrix of an 8B model, by format."""
    weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    medians: dict[str, float] = {}
    for name in ("NF4", "NF4 mse", "NF4+DQ", "NF4+DQ mse"):
        times: list[float] = []
        for _ in range(8):
            began = time.perf_counter()
            FORMATS[name](weight)
            times.append(1e3 * (time.perf_counter() - began))
        medians[name] = statistics.median(times[1:])  # the first one makes tables and threads
    return medians
