"""Counts what a model is made of: what is in NF4, and what is not."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from qlora_core.nn.nf4_experts import NF4Stack
from qlora_core.nn.nf4_linear import NF4Linear


@dataclass(frozen=True)
class Census:
    """Parameters of a model and the bytes they take; what is shared counts once.

    Attributes:
        quantized: parameters in NF4.
        quantized_bytes: of their codes and scales.
        embeddings: dense parameters of embeddings and of the output head.
        others: other dense parameters.
        dense_bytes: of all that is dense.
    """

    quantized: int
    quantized_bytes: int
    embeddings: int
    others: int
    dense_bytes: int

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.quantized + self.embeddings + self.others

    @property
    def quantized_bits(self) -> float:
        """Bits per parameter in NF4; zero where there is none."""
        return 8 * self.quantized_bytes / self.quantized if self.quantized else 0.0

    @property
    def bits(self) -> float:
        """Bits per parameter, of all."""
        return 8 * (self.quantized_bytes + self.dense_bytes) / self.parameters


def take_census(model: PreTrainedModel) -> Census:
    """Count the parameters of a model."""
    quantized = quantized_bytes = embeddings = others = dense_bytes = 0
    head = model.get_output_embeddings()
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, NF4Linear | NF4Stack):
            quantized += _size(module)
            quantized_bytes += sum(buffer.nbytes for buffer in module.buffers(recurse=False))
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            dense_bytes += parameter.nbytes
            if isinstance(module, nn.Embedding) or module is head:
                embeddings += parameter.numel()
            else:
                others += parameter.numel()
    return Census(quantized, quantized_bytes, embeddings, others, dense_bytes)


def _size(module: NF4Linear | NF4Stack) -> int:
    each = module.out_features * module.in_features
    return each * len(module) if isinstance(module, NF4Stack) else each
