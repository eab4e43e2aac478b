"""`generate`: a prompt in, the model's answer on stdout as it comes, and nothing else there."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora_core.commands.devices import Device, choose_compute_dtype, choose_device
from qlora_core.commands.endings import guarded
from qlora_core.commands.printable import printable
from qlora_core.commands.quantization import (
    BlockSize,
    DoubleQuant,
    Quantize,
    QuantizeHead,
    Scale,
    ScaleSearch,
    SkipModule,
    load_base,
)
from qlora_core.errors import ConfigError

Prompt = str | list[dict[str, Any]]

# What a decoder gives for the first bytes of a character whose last ones are still to come.
_INCOMPLETE = "\ufffd"


@guarded
def generate(
    model: Annotated[Path, typer.Argument(help="Folder of the base model.")],
    prompt: Annotated[
        str | None,
        typer.Argument(help="A question; a text to go on with where there is no chat template."),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of an adapter, in PEFT's format.")
    ] = None,
    messages: Annotated[
        Path | None, typer.Option(help="A JSON file with a list of messages, instead of PROMPT.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The answer's most tokens.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, max=100.0, help="0 for the likeliest token each time.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of what is drawn.")] = 0,
    quantize: Quantize = True,
    block_size: BlockSize = 64,
    double_quant: DoubleQuant = True,
    skip_module: SkipModule = None,
    quantize_head: QuantizeHead = False,
    scale: ScaleSearch = Scale.ABSMAX,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.AUTO,
) -> None:
    """Answer a prompt with a model, in NF4 unless told otherwise, with or without an adapter."""
    from qlora_core.commands.prompts import encode_prompt
    from qlora_core.export import load_adapter
    from qlora_core.export.adapter_folder import read_adapter
    from qlora_core.text import TextEncoder
    from qlora_core.train.generate import continue_prompt

    asked = _prompt(prompt, messages)
    encoder = TextEncoder.from_folder(model)
    if isinstance(asked, str) and encoder.has_chat_template:
        asked = [{"role": "user", "content": asked}]
    ids = encode_prompt(encoder, asked, name=str(messages) if messages else "the prompt")
    if adapter is not None:
        read_adapter(adapter)  # what is wrong with it is told before the base is loaded
    target = choose_device(device)
    base = load_base(
        model,
        target,
        choose_compute_dtype(target),
        quantize=quantize,
        block_size=block_size,
        double_quant=double_quant,
        skip_module=skip_module,
        quantize_head=quantize_head,
        scale=scale,
    )
    if adapter is not None:
        load_adapter(base, adapter)
    answer = continue_prompt(
        base,
        encoder,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    _write(text_as_it_comes(answer, encoder.decode))


def text_as_it_comes(ids: Iterable[int], decode: Callable[[Sequence[int]], str]) -> Iterator[str]:
    """Decode token by token; together the pieces are what decoding all at once gives.

    A token may be a part of a character, and what it means may depend on the one before it: each piece is decoded
    together with the last one, and held back while it ends within a character.
    """
    held: list[int] = []
    told = 0  # of the held ids, so many are told already
    for token in ids:
        held.append(token)
        before, now = decode(held[:told]), decode(held)
        if len(now) > len(before) and not now.endswith(_INCOMPLETE):
            yield now[len(before) :]
            held = held[told:]
            told = len(held)
    yield decode(held)[len(decode(held[:told])) :]


def _prompt(prompt: str | None, messages: Path | None) -> Prompt:
    if (prompt is None) == (messages is None):
        raise ConfigError("give either a PROMPT or --messages, one of them")
    if messages is None:
        return prompt or ""
    try:
        found = json.loads(messages.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{messages} is not JSON: {error}") from error
    if isinstance(found, dict):  # a line of a training file is as good
        found = found.get("messages")
    if not isinstance(found, list):
        raise ConfigError(f"{messages} must hold a list of messages")
    return found


def _write(pieces: Iterable[str]) -> None:
    """Write to stdout; a terminal does not get what could steer it."""
    shown = printable if sys.stdout.isatty() else str
    for piece in pieces:
        sys.stdout.write(shown(piece))
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
