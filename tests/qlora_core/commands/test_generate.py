"""`python -m qlora_core generate`: the answer on stdout, and nothing else."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner, Result

from qlora_core import TextEncoder, load_adapter, load_model
from qlora_core.commands import app
from qlora_core.commands.generate import text_as_it_comes
from qlora_core.commands.printable import printable
from qlora_core.train.generate import generate
from tests.qlora_core.commands.adapters import save_strong_adapter
from tests.tiny_models import save_tiny_llama, save_tiny_tokenizer

QUESTION = [{"role": "user", "content": "What is a nibble?"}]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


def refusal(*arguments: object) -> str:
    result = run(*arguments)

    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


def expected(base: Path, prompt: Any, *, adapter: Path | None = None, quantize: bool = True) -> str:
    encoder = TextEncoder.from_folder(base)
    model = load_model(base, device="cpu", compute_dtype=torch.float32, quantize=quantize)
    if adapter is not None:
        load_adapter(model, adapter)
    return encoder.decode(generate(model, encoder, encoder.encode_prompt(prompt), max_new_tokens=9))


def test_a_question_goes_through_the_chat_template(base: Path) -> None:
    result = run(base, QUESTION[0]["content"], "--max-new-tokens", 9)

    assert result.exit_code == 0, result.output
    assert result.stdout == expected(base, QUESTION) + "\n"
    assert result.stderr == ""


def test_an_adapter_answers_otherwise(base: Path, tmp_path: Path) -> None:
    adapter = save_strong_adapter(base, tmp_path / "adapter")

    result = run(base, QUESTION[0]["content"], "--max-new-tokens", 9, "--adapter", adapter)

    assert result.stdout == expected(base, QUESTION, adapter=adapter) + "\n"
    assert result.stdout != expected(base, QUESTION) + "\n"


def test_an_adapter_trained_over_a_dense_base_answers_over_it(base: Path, tmp_path: Path) -> None:
    adapter = save_strong_adapter(base, tmp_path / "adapter")

    result = run(base, "Hm?", "--max-new-tokens", 9, "--adapter", adapter, "--no-quantize")

    question = [{"role": "user", "content": "Hm?"}]
    dense = expected(base, question, adapter=adapter, quantize=False)
    assert result.stdout == dense + "\n"


def test_a_wrong_adapter_is_told_before_the_base_is_loaded(base: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    (broken / "model.safetensors").write_bytes(b"no weights")

    assert "nowhere" in refusal(broken, "x", "--adapter", tmp_path / "nowhere")


def test_without_a_chat_template_a_text_is_gone_on_with(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base", initializer_range=0.2)
    save_tiny_tokenizer(base, chat_template=None)

    result = run(base, "A nibble is", "--max-new-tokens", 9)

    assert result.stdout == expected(base, "A nibble is") + "\n"


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_file_may_hold_messages_or_a_line_of_a_training_file(
    base: Path, tmp_path: Path, wrapped: bool
) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *QUESTION]
    file = tmp_path / "messages.json"
    file.write_text(json.dumps({"messages": messages} if wrapped else messages))

    result = run(base, "--messages", file, "--max-new-tokens", 9)

    assert result.stdout == expected(base, messages) + "\n"


def test_what_is_drawn_follows_the_seed(base: Path) -> None:
    def drawn(seed: int) -> str:
        return run(base, "Hm?", "--temperature", 2, "--max-new-tokens", 9, "--seed", seed).stdout

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(3)}) > 1


def test_what_the_user_did_wrong_is_one_sentence(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "messages.json"

    assert "one of them" in refusal(base)
    assert "messages.json: No such file" in refusal(base, "--messages", file)
    file.write_text("{")
    assert "is not JSON" in refusal(base, "--messages", file)
    file.write_text('"hi"')
    assert "must hold a list of messages" in refusal(base, "--messages", file)
    file.write_text('[{"role": "robot", "content": "x"}]')
    assert "messages.json" in refusal(base, "--messages", file)
    assert "There is no model folder" in refusal(tmp_path / "nowhere", "x")
    assert "adapter" in refusal(base, "x", "--adapter", tmp_path / "nowhere")
    assert "leaves no room for an answer" in refusal(base, "word " * 200)


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({one: n for n, one in enumerate(alphabet)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def with_byte_fallback() -> Tokenizer:
    """As Llama 2's: words begin with ▁, of which the first of a text is left out; unknown characters are bytes."""
    words = ["▁a", "▁bc", "d", "▁", *(f"<0x{n:02X}>" for n in range(256))]
    tokenizer = Tokenizer(
        models.BPE({one: n for n, one in enumerate(words)}, [], byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def test_the_pieces_are_together_what_decoding_at_once_gives() -> None:
    tokenizer = byte_level()
    drawn = random.Random(0)

    for n in [0, 1, 2, 3, 7, 40, 200]:  # mostly no text at all
        ids = [drawn.randrange(256) for _ in range(n)]
        assert "".join(text_as_it_comes(ids, tokenizer.decode)) == tokenizer.decode(ids)


def test_spaces_before_words_come_though_each_piece_alone_would_lose_them() -> None:
    tokenizer = with_byte_fallback()
    tokens = ["▁a", "▁bc", "d", "▁", *(f"<0x{byte:02X}>" for byte in "日🦙".encode()), "▁a"]
    ids = [tokenizer.token_to_id(token) or 0 for token in tokens]

    pieces = [*text_as_it_comes(ids, tokenizer.decode)]

    assert "".join(pieces) == tokenizer.decode(ids) == "a bcd 日🦙 a"
    assert len(pieces) > 5


def test_a_character_of_several_tokens_comes_whole() -> None:
    encoder = byte_level()
    text = "é 🦙 日本"
    vocabulary = dict(zip(byte_values(), sorted(pre_tokenizers.ByteLevel.alphabet()), strict=True))
    ids = [encoder.token_to_id(vocabulary[byte]) or 0 for byte in text.encode()]

    pieces = [piece for piece in text_as_it_comes(ids, encoder.decode) if piece]

    assert pieces == [*text]


def byte_values() -> list[int]:
    """Which byte each character of the byte-level alphabet stands for, in the order of the characters.

    Printable bytes stand for themselves, the others for 256, 257, … in their order (GPT-2's table).
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return plain + [byte for byte in range(256) if byte not in plain]


def test_a_terminal_gets_nothing_that_steers_it() -> None:
    assert printable("a\x1b[31mb\x07\tc\nd\x9b é") == "a[31mb\tc\nd é"
