"""The dtypes that torch and the safetensors format share, by the format's names (`header.BITS_OF` has all of these)."""

from __future__ import annotations

import torch

DTYPE_OF = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
NAME_OF = {dtype: name for name, dtype in DTYPE_OF.items()}
