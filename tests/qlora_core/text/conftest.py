"""Model folders with a small byte-level tokenizer of our own and one of the template fixtures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEMPLATES = Path(__file__).parent / "templates"

SPECIAL = [
    "<|endoftext|>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<bos>", "<eos>", "<start_of_turn>",
    "<end_of_turn>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<|user|>", "<|assistant|>", "<|system|>", "[gMASK]", "<sop>",
]  # fmt: skip
# Qwen's are added tokens, but not special ones.
ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>"]

# template -> (bos, eos, pad), and eos_token_id of generation_config.json where it says more
FAMILIES: dict[str, tuple[str | None, str, str | None, list[str]]] = {
    "chatml": (None, "<|im_end|>", "<|endoftext|>", ["<|im_end|>", "<|endoftext|>"]),
    "headers": ("<|begin_of_text|>", "<|eot_id|>", None, []),
    "inst": ("<s>", "</s>", None, []),
    "turns": ("<bos>", "<eos>", "<pad>", ["<eos>", "<end_of_turn>"]),
    "thinking": (None, "<|im_end|>", "<|endoftext|>", ["<|im_end|>", "<|endoftext|>"]),
    "opened_thinking": ("<s>", "</s>", "</s>", []),
    "next_header": (None, "<|endoftext|>", "<|endoftext|>", ["<|endoftext|>", "<|user|>"]),
    "channels": (None, "<|return|>", "<|endoftext|>", ["<|return|>", "<|call|>"]),
    "plain": ("<s>", "</s>", None, []),
    "turns_only_at_the_end": ("<s>", "</s>", None, []),
}

# Templates that mark what the assistant says with {% generation %}, as transformers wants it for its masks.
TAGGED = [path.stem for path in sorted(TEMPLATES.glob("*.jinja")) if "generation %}" in path.read_text("utf-8")]  # fmt: skip

MakeFolder = Callable[..., Path]


def read_template(family: str, *, tagged: bool) -> str:
    """Return a family's template, with or without the tags; both render to the same text."""
    source = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    return source if tagged else re.sub(r"{%-? (end)?generation %}", "", source)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Train a byte-level BPE on this repository's own words; 600 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    tokenizer.add_tokens(ADDED)
    return tokenizer


@pytest.fixture
def make_folder(tmp_path: Path, tokenizer: Tokenizer) -> MakeFolder:
    """Write a model folder's text files for one family; returns the folder."""

    def make(
        family: str,
        *,
        adds_bos: bool = False,
        tagged: bool = False,
        trim_offsets: bool = True,
        **config: Any,
    ) -> Path:
        folder = tmp_path / f"{family}{'-tagged' * tagged}"
        folder.mkdir()
        bos, eos, pad, stops = FAMILIES[family]
        copy = Tokenizer.from_str(tokenizer.to_str())
        copy.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
        if adds_bos and bos is not None:
            copy.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, copy.token_to_id(bos))]
            )
        copy.save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": pad,
            "chat_template": read_template(family, tagged=tagged),
        }
        _write(folder / "tokenizer_config.json", settings)
        _write(folder / "config.json", {"max_position_embeddings": 512, **config})
        if stops:
            stop_ids = [copy.token_to_id(token) for token in stops]
            _write(folder / "generation_config.json", {"eos_token_id": stop_ids})
        return folder

    return make


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
