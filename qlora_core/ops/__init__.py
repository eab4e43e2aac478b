"""Operations of training beside the storage format, each with a reference in PyTorch and Triton kernels."""
