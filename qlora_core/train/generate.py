"""Answers to prompts, token by token: the likeliest ones, so that a person can see what training changed, or drawn ones."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_core.text import TextEncoder
from qlora_core.train.vocabulary import refuse_unknown_ids


def generate(
    model: PreTrainedModel,
    encoder: TextEncoder,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int = 128,
) -> list[int]:
    """Continue a prompt with the likeliest token each time; all of `continue_prompt`'s ids at once."""
    return list(continue_prompt(model, encoder, prompt_ids, max_new_tokens=max_new_tokens))


@torch.no_grad()
def continue_prompt(
    model: PreTrainedModel,
    encoder: TextEncoder,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[int]:
    """Continue a prompt token by token.

    Args:
        model: in any mode; put into the one it was in when the iterator ends or is closed.
        encoder: knows the stop tokens and the context length.
        prompt_ids: at least one id.
        max_new_tokens: at most this many; fewer where the context ends.
        temperature: 0 for the likeliest token each time; else logits are divided by it and a token is drawn.
        seed: of what is drawn.

    Yields:
        The new ids, without the stop token.

    Raises:
        ModelUnsupported: the prompt holds an id that the model has no embedding for.
    """
    refuse_unknown_ids(model, max(prompt_ids))
    was_training = model.training
    model.eval()
    room = max_new_tokens
    if encoder.context_length is not None:
        room = min(room, encoder.context_length - len(prompt_ids))
    input_ids = torch.tensor([list(prompt_ids)], device=model.device)
    # Only the last place's logits are wanted; a few families cannot be asked for just these.
    last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"logits_to_keep": 1} if last_only else {}
    generator = torch.Generator().manual_seed(seed)
    cache: Any = None
    try:
        for _ in range(room):
            output = model(input_ids=input_ids, past_key_values=cache, use_cache=True, **options)
            cache = output.past_key_values
            token = choose_token(output.logits[0, -1], temperature, generator)
            if token in encoder.stop_ids:
                break
            yield token
            input_ids = torch.tensor([[token]], device=model.device)
    finally:
        model.train(was_training)


def choose_token(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """Choose the next token from logits [vocabulary]: the likeliest at temperature 0, else one drawn from their softmax.

    Drawn on the CPU, so that a seed means the same on every device.
    """
    if temperature == 0:
        return int(logits.argmax())
    shares = (logits.double() / temperature).softmax(-1).cpu()
    return int(torch.multinomial(shares, 1, generator=generator))


def answer_samples(
    model: PreTrainedModel,
    encoder: TextEncoder,
    prompts: Sequence[Sequence[dict[str, Any]]],
    *,
    max_new_tokens: int = 128,
) -> list[dict[str, Any]]:
    """Answer each conversation; returns ``{"messages": […], "answer": str}`` for each.

    Raises:
        ExampleError: a prompt is malformed.
        TemplateError: the chat template refuses a prompt.
    """
    samples: list[dict[str, Any]] = []
    for messages in prompts:
        prompt_ids = encoder.encode_prompt(messages)
        ids = generate(model, encoder, prompt_ids, max_new_tokens=max_new_tokens)
        samples.append({"messages": list(messages), "answer": encoder.decode(ids)})
    return samples
