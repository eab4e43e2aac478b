"""What known GPUs multiply at most, by name: what MFU is measured against.

Dense 16-bit tensor-core rates with 32-bit accumulation, from NVIDIA's documents, which often print only
the doubled figure "with sparsity". A card that is not here has no MFU, and neither has a CPU.
"""

from __future__ import annotations

import re

# TFLOP/s by words of the name that `torch.cuda.get_device_name` gives, the more particular first.
_PEAKS = (
    ("B200", 2250.0),  # HGX B200 data sheet: 36 PFLOP/s for eight, with sparsity
    ("GH200", 989.4),  # GH200 data sheet: 1,979 with sparsity
    ("H200 NVL", 835.5),  # H200 data sheet: 1,671 with sparsity
    ("H200", 989.4),  # H200 data sheet: 1,979 with sparsity
    ("H100 NVL", 835.5),  # H100 data sheet: 1,671 with sparsity
    ("H100 PCIe", 756.0),  # H100 data sheet: 1,513 with sparsity
    ("H100", 989.4),  # H100 data sheet: 1,979 with sparsity
    ("A100", 312.0),  # A100 data sheet
    ("A40", 149.7),  # A40 data sheet
    ("A30", 165.0),  # A30 data sheet
    ("A10", 125.0),  # A10 data sheet
    ("L40S", 362.0),  # L40S data sheet
    ("L40", 181.0),  # L40 data sheet
    ("L4", 121.0),  # L4 data sheet: 242 with sparsity
    ("RTX 6000 Ada", 364.2),  # Ada architecture white paper
    ("RTX A6000", 154.8),  # GA102 architecture white paper
    ("RTX 4090", 165.2),  # Ada architecture white paper
    ("RTX 3090", 71.0),  # GA102 architecture white paper
    ("V100 PCIE", 112.0),  # V100 data sheet
    ("V100", 125.0),  # V100 data sheet
    ("T4", 65.0),  # T4 data sheet
)
# Words that make another chip, or a part of one, of a known name.
_OTHERWISE = re.compile(r"\b(Laptop|Mobile|Max-Q|MIG|Ti|D)\b")


def peak_flops_per_s(device_name: str) -> float | None:
    """Return a device's peak in operations per second, None where it is not known."""
    if _OTHERWISE.search(device_name):
        return None
    for words, tflops in _PEAKS:
        # Whole words: an L40 is no L4, and an A10G no A10.
        if re.search(rf"\b{words}\b", device_name.replace("-", " "), re.IGNORECASE):
            return tflops * 1e12
    return None
