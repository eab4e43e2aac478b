"""Token ids that a model has no embedding for: on a GPU looking one up breaks the whole process, so they are refused before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from qlora_core.data import Dataset
from qlora_core.errors import ModelUnsupported
from qlora_core.text import TextEncoder


def refuse_unknown_ids(model: PreTrainedModel, largest_id: int) -> None:
    """Hold a tokenizer's ids to the rows of a model's input embedding.

    Raises:
        ModelUnsupported: the model does not know the id; the message has both sizes.
    """
    rows = embedding_rows(model)
    if largest_id >= rows:
        raise ModelUnsupported(
            f"the tokenizer gives ids up to {largest_id:,}, but the model's embeddings know {rows:,} of them "
            f"(0 to {rows - 1:,}): take the tokenizer that belongs to the model"
        )


def refuse_unknown_examples(model: PreTrainedModel, datasets: Sequence[Dataset | None]) -> None:
    """Hold the ids that are really in the data to the model's input embedding; see `refuse_unknown_ids`."""
    largest = max(dataset.largest_id for dataset in datasets if dataset is not None)
    refuse_unknown_ids(model, largest)


def known_pad_id(model: PreTrainedModel, encoder: TextEncoder) -> int:
    """Give the id to pad with: any will do that the model knows, since padding is never looked at."""
    return encoder.pad_id if encoder.pad_id < embedding_rows(model) else 0


def embedding_rows(model: PreTrainedModel) -> int:
    """Count the ids that a model's input embedding has a row for."""
    embedding: Any = model.get_input_embeddings()
    return int(getattr(embedding, "original", embedding).weight.shape[0])
