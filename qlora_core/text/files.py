"""What a model folder says about text: tokenizer, named special tokens, chat templates, stop tokens.

Everything is read from JSON and jinja files; nothing in the folder is ever executed except the
template, and that in a sandbox.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from qlora_core.errors import ModelNotFound, ModelUnsupported

# Order as in transformers; a template sees each of them that is set.
_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# The longest context that is believed; "unlimited" is written as 1e30 in some folders.
_LONGEST_CONTEXT_TOKENS = 2**31 - 1


@dataclass(frozen=True)
class TextFiles:
    """The files of one model folder, decoded.

    Attributes:
        tokenizer: as saved, added tokens of ``tokenizer_config.json`` included.
        named_tokens: ``bos_token`` and the like, as strings, as templates see them.
        templates: chat templates by name; the one without a name is ``default``.
        stop_ids: ``eos_token_id`` of ``generation_config.json`` and ``config.json``.
        context_length: ``max_position_embeddings``, None where the config does not say.
        vocab_size: rows of the embedding, None where the config does not say.
    """

    tokenizer: Tokenizer
    named_tokens: dict[str, str]
    templates: dict[str, str]
    stop_ids: frozenset[int]
    context_length: int | None
    vocab_size: int | None


def read_text_files(folder: Path) -> TextFiles:
    """Read everything about text from a model folder.

    Raises:
        ModelNotFound: there is no such folder.
        ModelUnsupported: there is no ``tokenizer.json``, or a file is malformed.
    """
    if not folder.is_dir():
        raise ModelNotFound(f"There is no model folder {folder}.")
    settings = _read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings = {**settings, **_read_json(folder / "special_tokens_map.json")}
    tokenizer = _read_tokenizer(folder / "tokenizer.json")
    _add_tokens(tokenizer, settings.get("added_tokens_decoder", {}), folder)
    config = _read_json(folder / "config.json")
    return TextFiles(
        tokenizer=tokenizer,
        named_tokens=_named_tokens(settings),
        templates=_templates(folder, settings),
        stop_ids=_ids(_read_json(folder / "generation_config.json").get("eos_token_id"))
        | _ids(_from_config(config, "eos_token_id")),
        context_length=_size(_from_config(config, "max_position_embeddings")),
        vocab_size=_size(_from_config(config, "vocab_size")),
    )


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file; an absent file is an empty one."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelUnsupported(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelUnsupported(f"{path} must hold a JSON object.")
    return value


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise ModelUnsupported(
            f"The model folder {path.parent} has no tokenizer.json; save the model's fast tokenizer there."
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelUnsupported(f"{path} is not a tokenizer: {error}") from error


def _add_tokens(tokenizer: Tokenizer, added: object, folder: Path) -> None:
    """Add what ``tokenizer_config.json`` adds beyond ``tokenizer.json``, at the ids it names."""
    if not isinstance(added, dict):
        raise ModelUnsupported(f"added_tokens_decoder in {folder} must be an object.")
    for token_id, token in sorted(added.items(), key=lambda item: int(item[0])):
        content = token.get("content") if isinstance(token, dict) else None
        if not isinstance(content, str):
            raise ModelUnsupported(f"The added token {token_id} in {folder} has no content.")
        if tokenizer.token_to_id(content) is not None:
            continue
        flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
        settings = {name: bool(token[name]) for name in flags if name in token}
        tokenizer.add_tokens([AddedToken(content, **settings)])
        if tokenizer.token_to_id(content) != int(token_id):
            raise ModelUnsupported(
                f"The added token {content!r} in {folder} should have the id {token_id}, "
                f"but gets {tokenizer.token_to_id(content)}: tokenizer.json is of another version."
            )


def _named_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """Return the named tokens as strings, and the model's own ``…_token`` keys as templates see them."""
    names = [*_NAMED_TOKENS]
    names += [
        name
        for name, value in settings.items()
        if name.endswith("_token") and name not in names and isinstance(value, str | dict)
    ]
    tokens = {name: _token_text(settings.get(name)) for name in names}
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, dict):
        tokens |= {name: _token_text(value) for name, value in extra.items()}
    return {name: text for name, text in tokens.items() if text is not None}


def _token_text(token: object) -> str | None:
    """A token is saved as its text, or as an AddedToken's fields."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _templates(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Return the chat templates; files win over what ``tokenizer_config.json`` holds."""
    files = {
        path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))
    }
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    inline = settings.get("chat_template")
    if isinstance(inline, str):
        return {"default": inline}
    if isinstance(inline, list):
        return {
            str(item["name"]): str(item["template"])
            for item in inline
            if isinstance(item, dict) and {"name", "template"} <= item.keys()
        }
    return {}


def _from_config(config: dict[str, Any], name: str) -> object:
    """Models with several parts keep the language model's settings in ``text_config``."""
    inner = config.get("text_config")
    if config.get(name) is None and isinstance(inner, dict):
        return inner.get(name)
    return config.get(name)


def _ids(value: object) -> frozenset[int]:
    values = value if isinstance(value, list) else [value]
    return frozenset(
        item for item in values if isinstance(item, int) and not isinstance(item, bool)
    )


def _size(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        return None
    return min(int(value), _LONGEST_CONTEXT_TOKENS)
