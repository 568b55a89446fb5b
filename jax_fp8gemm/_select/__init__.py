"""Which kernel a GEMM gets."""
