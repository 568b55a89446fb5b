"""How JAX sees a kernel."""
