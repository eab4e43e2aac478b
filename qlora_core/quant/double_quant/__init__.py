"""Double quantization: the scales themselves as 8-bit codes in nested blocks of 256."""
