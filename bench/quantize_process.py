"""One fresh process of `bench.quantize`: times one contender on one weight, and prints what it found as JSON.

Both contenders dequantize the same doubly quantized weight, ours, which bitsandbytes takes as it is. What they compute
is hashed, so that the caller can see that they computed the same.
"""

import ctypes
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_core import quantize_nf4

SECONDS = 0.6  # for each thing timed, if it does not take longer to do it three times
Found = dict[str, dict[str, Any]]


def main(contender: str, rows: int, columns: int, dtype_name: str, threads: int) -> None:
    """Time everything that the contender does, and print it."""
    torch.set_num_threads(threads)
    if torch.get_num_threads() != threads:
        raise SystemExit(f"torch uses {torch.get_num_threads()} threads instead of {threads}")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator).mul_(0.02)
    weight = weight.to(getattr(torch, dtype_name))
    found = (by_bitsandbytes if contender == "bitsandbytes" else by_us)(weight)
    other = torch.zeros_like(weight)
    found["copy"] = measure(lambda: other.copy_(weight), 2 * weight.nbytes)
    capability = torch.backends.cpu.get_cpu_capability()
    print(json.dumps({"found": found, "capability": capability}))


def by_us(weight: Tensor) -> Found:
    """Time `qlora_core`."""
    quantized, out = quantize_nf4(weight), torch.full_like(weight, torch.nan)
    moved = quantized.nbytes + weight.nbytes
    quantize_nf4(weight[:1]).dequantize()  # llvmlite's own memory is not the operation's
    return {
        "quantize": measure(lambda: quantize_nf4(weight), moved, lambda made: made.packed),
        "dequantize": measure(quantized.dequantize, moved, same),
        "dequantize into out": measure(lambda: quantized.dequantize(out=out), moved, same),
    }


def by_bitsandbytes(weight: Tensor) -> Found:
    """Time bitsandbytes: what it offers, and its C kernels alone on scales in float32 and memory that is there."""
    from bitsandbytes import functional as bnb
    from bitsandbytes.cextension import lib

    ours = quantize_nf4(weight)
    packed, *beside = ours.to_bitsandbytes("w").items()
    state = bnb.QuantState.from_dict(dict(beside), device=torch.device("cpu"))
    out, scales = torch.full_like(weight, torch.nan), ours.scales()
    moved = ours.nbytes + weight.nbytes

    def quantize() -> Tensor:
        return bnb.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")[0]

    def kernel(rows: int, columns: int) -> Tensor:
        name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[weight.dtype]
        pointers = (bnb.get_ptr(tensor) for tensor in (packed[1], scales, out))
        sizes = (ctypes.c_longlong(size) for size in (64, rows, columns))
        lib[f"cdequantize_blockwise_cpu_nf4_{name}"](*pointers, *sizes)
        return out

    return {
        "quantize": measure(quantize, moved, lambda codes: codes.view(-1)),
        "dequantize": measure(lambda: bnb.dequantize_4bit(packed[1], state), moved, same),
        "kernel": measure(lambda: kernel(*weight.shape), moved, same),
        # Rows of eight keep it from AVX512: this is what a CPU without it runs. The values are the same.
        "kernel without AVX512": measure(lambda: kernel(weight.numel() // 8, 8), moved, same),
    }


def same(result: Tensor) -> Tensor:
    """Hash the result itself."""
    return result


def measure(
    action: Callable[[], Any], moved: int, to_hash: Callable[[Any], Tensor] | None = None
) -> dict[str, Any]:
    """Do it once for the memory that it takes and for its result, then again and again for the time."""
    peak_bytes, result = _watched(action)
    content = to_hash(result).view(torch.uint8).numpy().tobytes() if to_hash else b""
    digest = hashlib.sha256(content).hexdigest()
    del result, content
    time.sleep(0.05)  # OpenMP's threads go on spinning for a while, on a core that others need
    milliseconds: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(milliseconds) < 3 or (time.perf_counter() < end and len(milliseconds) < 50):
        began = time.perf_counter()
        action()
        milliseconds.append(1e3 * (time.perf_counter() - began))
    return {"ms": milliseconds, "bytes": moved, "peak_bytes": peak_bytes, "digest": digest}


def _watched(action: Callable[[], Any]) -> tuple[int | None, Any]:
    """Return by how much memory rose at most, where Linux tells, and the result."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    except OSError:
        return None, action()
    before = _status("VmRSS")
    result = action()
    return max(_status("VmHWM") - before, 0), result


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    raise SystemExit(f"/proc/self/status has no {key}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
