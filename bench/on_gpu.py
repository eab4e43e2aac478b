"""Everything that wants a GPU, in one command of a few minutes: `make gpu-bench`.

Parts that are done are kept and not run again (`--again` runs them all), so a cut-off run goes on where it was. Needs
only what `qlora_core` needs. `--device cpu` tries the same code on small sizes, through Triton's interpreter; what it
prints then measures nothing, and nothing is kept.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
SHAPES = ((4096, 4096), (14336, 4096))

Rows = list[dict[str, Any]]


def kernels(device: str) -> Rows:
    """Hold both kernels to the PyTorch reference, bit for bit, over odd sizes, block sizes and dtypes."""
    import torch

    from qlora_core.quant.double_quant import reference as scales
    from qlora_core.quant.nf4 import ops, reference

    rows: Rows = []
    dtypes = [torch.float32, torch.float16]
    if device == "cuda":
        dtypes.append(torch.bfloat16)  # which Triton's interpreter truncates where a GPU rounds
    for dtype in dtypes:
        for block_size in (32, 64, 4096):
            n = 3 * block_size + 17
            values = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
            packed, absmax = reference.quantize_nf4(values, block_size=block_size)
            got_packed, got_absmax = ops.launch_quantize(values.to(device), block_size=block_size)
            nested, nested_absmax, offset = scales.quantize_absmax(absmax)
            expected = reference.dequantize_nf4(
                packed,
                scales.dequantize_absmax(nested, nested_absmax, offset),
                n=n,
                block_size=block_size,
                dtype=dtype,
            )
            out = torch.full((n,), float("nan"), dtype=dtype, device=device)
            ops.launch_dequantize(
                packed.to(device),
                nested.to(device),
                nested_absmax.to(device),
                offset.to(device),
                out,
                block_size=block_size,
            )
            rows.append(
                {
                    "dtype": str(dtype),
                    "block_size": block_size,
                    "wrong_codes": int((got_packed.cpu() != packed).sum()),
                    "wrong_scales": int((got_absmax.cpu() != absmax).sum()),
                    "wrong_values": int((out.cpu() != expected).sum()),
                }
            )
    return rows


def dequantize(device: str) -> Rows:
    """Time NF4 with double quantization to bfloat16, beside a copy of as many bytes."""
    import torch

    from qlora_core import quantize_nf4

    rows: Rows = []
    for shape in SHAPES if device == "cuda" else ((64, 128),):
        weight = quantize_nf4(torch.randn(shape, device=device))
        out = torch.empty(shape, dtype=torch.bfloat16, device=device)
        moved = weight.nbytes + out.nbytes
        source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        ours = _milliseconds(device, lambda weight=weight, out=out: weight.dequantize(out=out))
        copy = _milliseconds(device, lambda s=source, t=target: t.copy_(s))
        rows.append(
            {
                "shape": list(shape),
                "ms": ours,
                "gb_per_s": moved / ours / 1e6,
                "copy_gb_per_s": moved / copy / 1e6,
                "share_of_copy": copy / ours,
            }
        )
    return rows


def finetune(device: str) -> Rows:
    """Fine-tune tiny-llama on the demo's data with the engine alone; what the first steps and the end say."""
    import torch

    from operations.demo.docstrings import write_demo_files
    from qlora_core import LoraConfig, TextEncoder, TrainConfig, load_dataset, load_model
    from qlora_core.train import StepMetrics, ValidationMetrics, train

    model_folder = ROOT / "examples" / "tiny-llama"
    encoder = TextEncoder.from_folder(model_folder)
    size = 1600 if device == "cuda" else 32
    with tempfile.TemporaryDirectory() as scratch:
        files = write_demo_files(Path(scratch), max_train=size, max_validation=size // 8)
        data = [
            load_dataset(path, encoder, context_length=1024)
            for path in (files.train, files.validation)
        ]
        compute_dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = load_model(model_folder, device=device, compute_dtype=compute_dtype)
        config = TrainConfig(n_epochs=2, learning_rate=1e-3, context_length=1024, lora=LoraConfig())
        events: list[Any] = []
        train(
            model, encoder, data[0], config, events.append, output_dir=scratch, validation=data[1]
        )
    steps = [event for event in events if isinstance(event, StepMetrics)]
    valid = [event.full_valid_loss for event in events if isinstance(event, ValidationMetrics)]
    return [
        {
            "steps": len(steps),
            "train_loss_first": steps[0].train_loss,
            "train_loss_last": steps[-1].train_loss,
            "valid_loss_first": valid[0],
            "valid_loss_last": valid[-1],
            "tokens_per_s": statistics.median(step.tokens_per_s for step in steps),
            **steps[-1].memory,
        }
    ]


PARTS: dict[str, Callable[[str], Rows]] = {
    "kernels": kernels,
    "dequantize": dequantize,
    "finetune": finetune,
}


def main() -> int:
    """Run what has no result yet, print it, keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--again", action="store_true", help="run parts that have a result, too")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which nothing has yet
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("There is no NVIDIA GPU that torch can use on this machine: nothing to measure.")
        return 0
    about = _about(arguments.device)
    file = RESULTS / f"on_gpu-{about['device'].replace(' ', '-').lower()}-{about['commit']}.json"
    kept = json.loads(file.read_text()) if file.exists() and not arguments.again else {}
    for name, part in PARTS.items():
        if name not in kept.get("parts", {}):
            began = time.monotonic()
            rows = part(arguments.device)
            kept = about | {"parts": kept.get("parts", {}) | {name: rows}}
            if arguments.device == "cuda":
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(kept, indent=2) + "\n")
            print(f"\n{name} ({time.monotonic() - began:.0f} s)")
        for row in kept["parts"][name]:
            print("  " + "  ".join(f"{key}={_short(value)}" for key, value in row.items()))
    print(f"\nKept in {file}" if arguments.device == "cuda" else "\nOn a CPU nothing is kept.")
    wrong = any(row[key] for row in kept["parts"]["kernels"] for key in row if "wrong" in key)
    return 1 if wrong else 0


def _about(device: str) -> dict[str, Any]:
    import torch

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD") or "unknown",
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "triton", "transformers")},
    }


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _milliseconds(device: str, action: Callable[[], object]) -> float:
    """Return the median of 20 runs of `action` after 5 warm-ups."""
    import torch

    times: list[float] = []
    for _ in range(25):
        if device != "cuda":
            began = time.perf_counter()
            action()
            times.append(1e3 * (time.perf_counter() - began))
            continue
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        action()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last))
    return statistics.median(times[5:])


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
