"""One process of `bench.loading`: imports, says so, loads a model when told to, says what came of it, and waits."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    """Load the folder that the arguments name, with the contender that they name."""
    contender, folder = sys.argv[1], Path(sys.argv[2])
    load = {"ours": _ours, "bitsandbytes": _bitsandbytes}[contender]()
    _say({"ready": True})
    sys.stdin.readline()
    began = time.perf_counter()
    model = load(folder)
    seconds = time.perf_counter() - began
    tensors = [*model.parameters(), *model.buffers()]
    _say({"seconds": seconds, "result_bytes": _bytes_of(tensors)})
    sys.stdin.readline()


def _ours() -> Callable[[Path], Any]:
    import torch

    from qlora_core.models.loading import load_model

    return lambda folder: load_model(folder, device="cpu", compute_dtype=torch.bfloat16)


def _bitsandbytes() -> Callable[[Path], Any]:
    import bitsandbytes  # noqa: F401 - so that the load itself need not import it
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM
    from transformers.quantizers import quantizer_bnb_4bit  # noqa: F401

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    assert LlamaForCausalLM  # noqa: S101 - imported for the same reason
    return lambda folder: AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16
    )


def _bytes_of(tensors: list[Any]) -> int:
    """Bytes of tensors and of what bitsandbytes keeps beside them; what is shared counts once."""
    total, seen = 0, set()
    for tensor in tensors:
        state = getattr(tensor, "quant_state", None)
        parts = [tensor]
        if state is not None:
            parts += [state.absmax, state.code]
            parts += [state.state2.absmax, state.state2.code] if state.nested else []
        for part in parts:
            if part.data_ptr() not in seen:
                seen.add(part.data_ptr())
                total += part.numel() * part.element_size()
    return total


def _say(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
