"""Greedy answers to sample prompts, so that a person can see what training changed."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_core.text import TextEncoder


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    encoder: TextEncoder,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int = 128,
) -> list[int]:
    """Continue a prompt with the likeliest token each time.

    Args:
        model: in any mode; left in the one it was in.
        encoder: knows the stop tokens and the context length.
        prompt_ids: at least one id.
        max_new_tokens: at most this many; fewer where the context ends.

    Returns:
        The new ids, without the stop token.
    """
    was_training = model.training
    model.eval()
    room = max_new_tokens
    if encoder.context_length is not None:
        room = min(room, encoder.context_length - len(prompt_ids))
    input_ids = torch.tensor([list(prompt_ids)], device=model.device)
    # Only the last place's logits are wanted; a few families cannot be asked for just these.
    last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"logits_to_keep": 1} if last_only else {}
    answer: list[int] = []
    cache: Any = None
    while len(answer) < room:
        output = model(input_ids=input_ids, past_key_values=cache, use_cache=True, **options)
        cache = output.past_key_values
        token = int(output.logits[0, -1].argmax())
        if token in encoder.stop_ids:
            break
        answer.append(token)
        input_ids = torch.tensor([[token]], device=model.device)
    model.train(was_training)
    return answer


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
