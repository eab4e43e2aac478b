"""`python -m worker.child.probe PARENT`: launches one of our kernels on the GPU it sees. Status 0, or one sentence and 1.

Triton compiles a small C driver at run time, so a machine with a GPU may still lack a compiler or Python's headers.
"""

import sys
import traceback

from worker.child.tied import die_with


def main() -> int:
    """Quantize and dequantize a small weight, and compare."""
    die_with(int(sys.argv[1]))
    problem = _problem()
    if problem is not None:
        print(problem)  # noqa: T201  (this is the answer)
    return 0 if problem is None else 1


def _problem() -> str | None:
    try:
        import torch

        from qlora_core.quant import quantize_nf4
    except ImportError as error:
        return f"The engine cannot be loaded ({error}): install nibble[engine]."
    if not torch.cuda.is_available():
        return (
            f"PyTorch {torch.__version__} sees no CUDA device although the machine has one: install a build of torch"
            " for CUDA, and a driver that is new enough for it."
        )
    try:
        weight = torch.randn(64, 64, device="cuda")
        back = quantize_nf4(weight).dequantize(torch.float32)
        is_near = bool(((back - weight).abs().max() < 1).item())
    except Exception as error:  # noqa: BLE001  (whatever it is, it is the answer)
        traceback.print_exc()
        return (
            f"A Triton kernel does not run here ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}):"
            " install a C compiler and the headers of Python (gcc, python3-dev), and let TRITON_CACHE_DIR name a"
            " folder that can be written."
        )
    return None if is_near else "A Triton kernel gives wrong results here: update the GPU's driver."


if __name__ == "__main__":
    sys.exit(main())
