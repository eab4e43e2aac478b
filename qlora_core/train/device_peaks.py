"""What a device multiplies at most: what MFU is measured against."""

from __future__ import annotations

from qlora_core.estimate.devices import figures_of


def peak_flops_per_s(device_name: str) -> float | None:
    """Return a device's peak in operations per second, None where it is not known."""
    figures = figures_of(device_name)
    return None if figures is None else figures.tflops * 1e12
