"""The tokenizer beside an adapter renders and encodes as the base model's does."""

from __future__ import annotations

from pathlib import Path

from qlora_core import TextEncoder
from qlora_core.export import save_tokenizer_files
from tests.tiny_models import save_tiny_tokenizer


def test_the_copy_encodes_the_same(tmp_path: Path) -> None:
    base = save_tiny_tokenizer(tmp_path / "base")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/tool_use.jinja").write_text("tools", encoding="utf-8")
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    (base / "model.safetensors").write_bytes(b"not this")

    written = save_tokenizer_files(base, tmp_path / "adapter")

    assert sorted(str(path.relative_to(tmp_path / "adapter")) for path in written) == [
        "additional_chat_templates/tool_use.jinja",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    messages = [{"role": "user", "content": "hi"}]
    copy = TextEncoder.from_folder(tmp_path / "adapter")
    original = TextEncoder.from_folder(base)
    assert copy.encode_prompt(messages) == original.encode_prompt(messages)
    assert copy.stop_ids == original.stop_ids
