"""Linear layers that have to stay what transformers made them, since something besides a call of them uses their weight.

They are neither quantized nor, unless somebody names them, adapted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

ROUTER = re.compile(r"Router|(MoE|Moe|TopK|Topk)\w*Gate$")
"""Found in the names of classes that send tokens to experts; a wrong expert costs more than the bits of its layers."""

# Kinds of modules that read the weight of these layers of theirs, instead of calling them.
_READ_DIRECTLY = {
    "MambaMixer": ("dt_proj",),
    "FalconMambaMixer": ("dt_proj",),
    "JambaMambaMixer": ("dt_proj",),
    "Dots3NoteTextIndexer": ("weights_proj",),
    "Gemma3nTextAltUp": ("correction_coefs", "prediction_coefs"),
}


def paths_kept_plain(model: nn.Module) -> set[str]:
    """Give the paths of modules that stay plain: routers' layers, layers read by others, and what is wanted in float32.

    Args:
        model: of transformers, or any other; its parameters may be on the meta device.
    """
    of_class: Any = model
    # transformers does not let bitsandbytes quantize these either.
    in_float32 = [
        *(getattr(of_class, "_keep_in_fp32_modules", None) or ()),
        *(getattr(of_class, "_keep_in_fp32_modules_strict", None) or ()),
    ]
    paths: set[str] = set()
    for path, module in model.named_modules():
        if is_named(path, in_float32):
            paths.add(path)
        kind = type(module).__name__
        children = [child for child, _ in module.named_children()] if ROUTER.search(kind) else ()
        paths |= {f"{path}.{child}" for child in (*children, *_READ_DIRECTLY.get(kind, ()))}
    return paths


def is_named(path: str, names: Sequence[str]) -> bool:
    """Whether one of the names is the path, the end of it, or a part it lies under."""
    dotted = f".{path}."
    return any(f".{name}." in dotted for name in names)
