"""The committed base model, used as anybody would use it: through transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).parents[2] / "examples" / "tiny-llama"
MODEL_FILES = [
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]
# textwrap.dedent of Python 3.11: one of the modules that pre-training left out.
HELD_OUT_DOCSTRING = """Remove any common leading whitespace from every line in `text`.

    This can be used to make triple-quoted strings line up with the left
    edge of the display, while still presenting them in the source code
    in indented form.

    Note that tabs and spaces are both treated as whitespace, but they
    are not equal: the lines "  hello" and "\\thello" are
    considered to have no common leading whitespace.

    Entirely blank lines are normalized to a newline character.
"""


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return json.loads((FOLDER / "training.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_the_model_files_fit_in_eight_million_bytes() -> None:
    assert sum((FOLDER / name).stat().st_size for name in MODEL_FILES) <= 8_000_000


def test_every_weight_is_bfloat16_and_their_number_is_the_one_stated(
    figures: dict[str, Any],
) -> None:
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert sum(weight.numel() for weight in weights.values()) == figures["parameters"]
    assert all(weight.isfinite().all() for weight in weights.values())


def test_every_linear_weight_divides_into_nf4_blocks_of_64_along_its_rows() -> None:
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118

    linear = {name: shape for name, shape in shapes.items() if "_proj" in name}
    assert len(linear) == 4 * 7
    assert all(side % 64 == 0 for shape in linear.values() for side in shape)


def test_attention_is_grouped_and_embeddings_are_tied(model: Any) -> None:
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_held_out_docstring_is_predicted_much_better_than_by_token_counts(
    model: Any, tokenizer: Any, figures: dict[str, Any]
) -> None:
    ids = tokenizer(HELD_OUT_DOCSTRING, return_tensors="pt")["input_ids"]

    with torch.inference_mode():
        logits = model(input_ids=ids).logits

    loss = functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()
    assert loss < figures["unigram_loss"] - 1.5


def test_the_stated_held_out_loss_is_well_below_the_unigram_models(
    figures: dict[str, Any],
) -> None:
    assert figures["held_out_loss_256"] < figures["unigram_loss"] - 2
    assert figures["held_out_loss_1024"] < figures["unigram_loss"] - 2


def test_text_survives_encoding_and_decoding(tokenizer: Any) -> None:
    text = "def f(x):\n\treturn 'naïve ☃ 日本'  # \r\n\n\n    <pre> 12345"

    ids = tokenizer(text)["input_ids"]

    assert tokenizer.decode(ids) == text


def test_the_chat_template_renders_turns_that_end_with_the_end_of_turn_token(
    tokenizer: Any,
) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What does `heapq.heapify(x)` do?"},
    ]

    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat does `heapq.heapify(x)` do?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 2
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3


def test_the_chat_template_shows_tools_and_a_call_without_content(tokenizer: Any) -> None:
    weather = {"name": "weather", "parameters": {}}
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}

    text = tokenizer.apply_chat_template(
        [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "sunny"}],
        tools=[{"type": "function", "function": weather}],
        tokenize=False,
    )

    assert text == (
        '<|im_start|>tools\n{"name": "weather", "parameters": {}}\n<|im_end|>\n'
        '<|im_start|>assistant\n<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
        "<|im_end|>\n<|im_start|>tool\nsunny<|im_end|>\n"
    )


def test_special_tokens_are_distinct_and_the_configs_agree_with_the_tokenizer(
    model: Any, tokenizer: Any
) -> None:
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }

    assert tokenizer.decode([tokenizer.eos_token_id]) == "<|im_end|>"
    assert len(set(special.values())) == 3
    assert len(tokenizer) == model.config.vocab_size
    for name, value in special.items():
        assert getattr(model.config, name) == value
        assert getattr(model.generation_config, name) == value


def test_the_special_tokens_have_rows_of_their_own_among_the_trained_ones(model: Any) -> None:
    rows = model.model.embed_tokens.weight.detach()
    untrained, trained = rows[1:4], rows[4:]

    lengths = trained.norm(dim=1)

    assert torch.pdist(untrained).min() > 0.5 * lengths.median()
    assert bool((untrained.norm(dim=1) < lengths.max()).all())
    assert bool((untrained.norm(dim=1) > lengths.min()).all())
