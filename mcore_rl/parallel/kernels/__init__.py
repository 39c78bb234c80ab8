"""The row kernels of the head: what is done with logits between their GEMM and the two of the gradient."""
