"""NF4: four-bit codes with one scale (absmax) per block of consecutive elements."""
