"""A prompt that a person gave, as token ids, or the reason why it is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qlora_core.errors import ConfigError

if TYPE_CHECKING:
    from qlora_core.text import TextEncoder


def encode_prompt(
    encoder: TextEncoder, prompt: Sequence[Mapping[str, Any]] | str, *, name: str
) -> list[int]:
    """Encode a conversation, or a text as it stands.

    Args:
        encoder: of the model that is asked.
        prompt: messages, or a text.
        name: of the setting or option that it came from.

    Raises:
        ConfigError: it cannot be encoded, or leaves no room for an answer.
    """
    from qlora_core.text import ExampleError, TemplateError

    try:
        ids = encoder.encode_prompt(prompt)
    except ExampleError as error:
        raise ConfigError(error.message.replace("{example}", name, 1)) from error
    except TemplateError as error:
        raise ConfigError(f"{name}: {error.message}") from error
    if encoder.context_length is not None and len(ids) >= encoder.context_length:
        raise ConfigError(
            f"{name} has {len(ids):,} tokens, which leaves no room for an answer: the model was made for "
            f"{encoder.context_length:,}"
        )
    return ids
