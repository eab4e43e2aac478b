"""The text that tiny-llama is trained on: the installed Python's standard library.

Nothing of `HELD_OUT_MODULES` is in `training_documents`; all of it is in `held_out_documents`.
"""

import ast
import random
from collections.abc import Iterable, Iterator

import torch
from tokenizers import Tokenizer
from torch import Tensor

from operations.demo.docstrings import (
    SourceFile,
    documented_in,
    source_files,
    standard_library_folder,
)
from operations.demo.heldout import is_held_out


def training_documents(seed: int) -> list[str]:
    """Return the training texts in a shuffled order: sources, docstrings and language topics."""
    documents = list(_documents(held_out=False))
    random.Random(seed).shuffle(documents)  # noqa: S311 - an order, not a secret
    return documents


def held_out_documents() -> list[str]:
    """Return the held-out modules' sources and docstrings, in the order of their names."""
    return list(_documents(held_out=True))


def encode(tokenizer: Tokenizer, documents: Iterable[str], separator: str) -> Tensor:
    """Return the documents as one stream of token ids, int16 [tokens], each after a separator.

    int16 holds every id of a vocabulary below 32,768 in a quarter of the memory of int64.
    """
    separator_id = tokenizer.token_to_id(separator)
    stream: list[int] = []
    for encoding in tokenizer.encode_batch_fast(list(documents), add_special_tokens=False):
        stream.append(separator_id)
        stream.extend(encoding.ids)
    return torch.tensor(stream, dtype=torch.int16)


def _documents(*, held_out: bool) -> Iterator[str]:
    for source in source_files(standard_library_folder()):
        if is_held_out(source.module) != held_out:
            continue
        if source.module == "pydoc_data.topics":
            yield from _topics(source)
            continue
        text = source.path.read_text(encoding="utf-8", errors="ignore")
        if not text.strip() or _is_table(source, text):
            continue
        yield text
        described = "\n\n".join(
            f"{item.qualified_name}{item.signature}\n    "
            + item.docstring.replace("\n", "\n    ").replace("\n    \n", "\n\n")
            for item in documented_in(source)
        )
        if described:
            yield described + "\n"


def _is_table(source: SourceFile, text: str) -> bool:
    """Say whether a file holds generated tables (or this build's paths) instead of writing."""
    return source.module.startswith("_sysconfigdata") or (
        source.module.startswith("encodings.") and "_table" in text
    )


def _topics(source: SourceFile) -> Iterator[str]:
    """Yield the language reference's chapters, which the library keeps as one dict of strings."""
    for node in ast.parse(source.path.read_bytes()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            yield from ast.literal_eval(node.value).values()
