"""How XLA compiles programs of these tests. What our kernels do does not depend on it."""

# Products of XLA's check ours. It need not compile and time several kernels for each of them.
FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"

# For programs whose products are XLA's work and are checked themselves: XLA's own choices.
AS_USERS = {"xla_gpu_autotune_level": 4, "xla_gpu_enable_triton_gemm": True}
