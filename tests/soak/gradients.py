"""A matmul of floats with both gradients, whose three results are known to the bit."""

import dataclasses

import jax
import jax.numpy as jnp
from soak import exact

import jax_fp8gemm as fp8

DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32}


@dataclasses.dataclass(frozen=True)
class Gradients:
    """fp8_matmul, or with g > 0 fp8_ragged_dot, forward and backward; operands are integers.

    Attributes:
      cast_in_gemm: of fp8_ragged_dot.
      residuals: what is kept for the backward pass.
    """

    m: int
    n: int
    k: int
    g: int = 0
    dtype: str = "bf16"
    residuals: str = "fp8_t"
    cast_in_gemm: bool = False

    products = 3

    @property
    def name(self) -> str:
        return "fp8_ragged_dot and gradients" if self.g else "fp8_matmul and gradients"

    @property
    def work(self) -> int:
        return 3 * self.m * self.n * self.k * max(self.g, 1)

    @property
    def results(self) -> list[tuple[tuple[int, ...], jnp.dtype]]:
        shapes = [(self.m, self.n), (self.m, self.k), self._weight()]
        return [(shape, jnp.dtype(DTYPES[self.dtype])) for shape in shapes]

    def _weight(self) -> tuple[int, ...]:
        return (self.g, self.k, self.n) if self.g else (self.k, self.n)

    def make(self, key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 5)
        shapes = {"x": (self.m, self.k), "w": self._weight(), "dy": (self.m, self.n)}
        made = {}
        for own, (name, shape) in zip(keys, shapes.items(), strict=False):
            largest = exact.LARGEST if self.m <= 2048 else 1
            made[name] = exact.integers(own, shape, largest).astype(DTYPES[self.dtype])
        if self.g:
            made["sizes"] = exact.group_sizes(keys[3], self.g, self.m)
            past = jnp.arange(self.m) >= exact.ranges(made["sizes"], self.m)[1][-1]
            made["x"] = jnp.where(past[:, None], jnp.nan, made["x"])  # nobody reads it
        return made

    def run(self, operands: dict[str, jax.Array]) -> list[jax.Array]:
        def multiply(x, w):
            if not self.g:
                return fp8.fp8_matmul(x, w, residuals=self.residuals)
            return fp8.fp8_ragged_dot(
                x,
                w,
                operands["sizes"],
                residuals=self.residuals,
                cast_in_gemm=self.cast_in_gemm,
            )

        y, pull = jax.vjp(multiply, operands["x"], operands["w"])
        return [y, *pull(operands["dy"])]

    def product(self, operands) -> list[jax.Array]:
        x, w, dy = (operands[name].astype(jnp.float32) for name in ("x", "w", "dy"))
        formulas = ["mk,kn->mn", "mn,kn->mk", "mk,mn->kn"]
        if self.g:
            own = exact.inside(operands["sizes"], self.m)[:, :, None]
            x, dy = jnp.where(own, x, 0), jnp.where(own, dy, 0)
            formulas = ["gmk,gkn->mn", "gmn,gkn->mk", "gmk,gmn->gkn"]
        pairs = [(x, w), (dy, w), (x, dy)]
        return [
            jnp.einsum(formula, *pair, precision=jax.lax.Precision.HIGHEST)
            for formula, pair in zip(formulas, pairs, strict=True)
        ]

    def marks(self, operands, outs: list[jax.Array]) -> list[jax.Array]:
        """Returns for each result which of its values are wrong."""
        wants = self.product(operands)
        wants = [exact.to_bf16(want) for want in wants] if self.dtype == "bf16" else wants
        return [out.astype(jnp.float32) != want for out, want in zip(outs, wants, strict=True)]
