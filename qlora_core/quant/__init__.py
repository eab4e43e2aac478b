"""QLoRA's storage format: NF4 codes, doubly quantized scales, and the weight that holds both.

Each idea has a folder: `reference.py` is the specification in PyTorch, `kernels.py` the Triton
kernels, `ops.py` checks its arguments and picks the device's path.
"""

from qlora_core.quant.weight import NF4Weight, quantize_nf4

__all__ = ["NF4Weight", "quantize_nf4"]
