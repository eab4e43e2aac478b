"""What a user reads of a child's messages: the base model by its id, an attempt by its number, no folders of this machine."""

import re
from collections.abc import Callable
from typing import Any

from worker.folder import AttemptFolder


def public_words(folder: AttemptFolder, spec: dict[str, Any]) -> Callable[[str], str]:
    """Return what makes a message of this attempt fit for the job's error and events."""
    model = str(spec["base_model"]).replace("\\", r"\\")  # as the pattern of a replacement
    cache = re.escape(str(spec["model_cache"]))
    job = re.escape(str(folder.path.parent))
    words: list[tuple[str, str]] = [
        (rf"{cache}/models--[^/\s]+/snapshots/[^/\s]+", model),
        (cache, "the model cache"),
        (rf"{job}/(\d+)(?:/[\w./-]*\w)?", r"attempt \1"),
    ]
    if spec["model"]["path"] is not None:
        words.insert(0, (rf"{re.escape(str(spec['model']['path']))}(?![\w-])", model))
    patterns = [(re.compile(pattern), word) for pattern, word in words]

    def say(text: str) -> str:
        for pattern, word in patterns:
            text = pattern.sub(word, text)
        return text

    return say
