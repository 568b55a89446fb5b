"""One GEMM whose result is known to the bit: its operands, its program, and how many are wrong."""

import dataclasses

import jax
import jax.numpy as jnp
from soak import exact, extremes

import jax_fp8gemm as fp8
from jax_fp8gemm._ops.gemm import multiply, multiply_casting
from jax_fp8gemm._select.problem import GemmConfig

DIMS = {  # of lhs, rhs, result
    "dense": ("mk", "nk", "mn"),
    "batched": ("gmk", "gnk", "gmn"),
    "ragged": ("mk", "gnk", "mn"),
    "contiguous": ("mk", "gnk", "mn"),
    "masked": ("gmk", "gnk", "gmn"),
    "ragged_contracting": ("mk", "nk", "gmn"),
}
DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32}


@dataclasses.dataclass(frozen=True)
class Gemm:
    """What of a GEMM its compiled program depends on.

    Attributes:
      rhs: "fp8"; "bf16" [g, n, k] or "bf16_transposed" [g, k, n], which the kernel casts.
      cast: operands in FP8 are made of bf16 by other kernels of the same program.
      pair: a rhs that the kernel casts lies in two arrays.
      extremes: NaN, infinities, 3e38 and denormals in some rows and columns.
      config: None: the chosen one.
      leave_rest: of ragged: rows past the groups hold anything, as layers of experts ask for.
    """

    variant: str
    m: int
    n: int
    k: int
    g: int = 1
    scales: str = "1x128_128x128"
    out: str = "bf16"
    init: bool = False
    rhs: str = "fp8"
    cast: bool = False
    pair: bool = False
    extremes: bool = False
    config: GemmConfig | None = None
    leave_rest: bool = False

    products = 1

    @property
    def name(self) -> str:
        name = self.variant if self.rhs == "fp8" else f"{self.variant}, bf16 rhs"
        return f"{name}, rest left" if self.leave_rest else name

    @property
    def work(self) -> int:
        return self.m * self.n * self.k * self.g

    def shape(self, operand: int) -> tuple[int, ...]:
        return tuple(getattr(self, letter) for letter in DIMS[self.variant][operand])

    @property
    def results(self) -> list[tuple[tuple[int, ...], jnp.dtype]]:
        return [(self.shape(2), jnp.dtype(DTYPES[self.out]))]

    # ---- operands ----

    def make(self, key: jax.Array) -> dict[str, jax.Array]:
        """Returns operands: FP8 values as whole float32 numbers, scales, groups, init."""
        keys = jax.random.split(key, 8)
        e, tiles = exact.exponents(self.k), exact.SCALES[self.scales]
        made = {}
        for i, name in enumerate(("lhs", "rhs")):
            shape = self.shape(i)
            made[name] = exact.integers(keys[i], shape)
            made[f"{name}_scale"] = exact.powers(keys[2 + i], exact.scale_shape(shape, tiles[i]), e)
        if tiles[1] in ("1x128", "row"):
            made["rhs_scale"] = exact.shared(keys[7], made["rhs_scale"])
        if self.variant == "contiguous":
            made["groups"] = exact.blocks_of_rows(keys[4], self.g, self.m)
        elif self.variant in ("ragged", "ragged_contracting"):
            places = self.m if self.variant == "ragged" else self.k
            made["groups"] = exact.group_sizes(keys[4], self.g, places)
        elif self.variant == "masked":
            made["groups"] = jax.random.randint(keys[4], (self.g,), -3, self.m + 4)
        if self.init:
            made["init"] = exact.integers(keys[5], self.shape(2), 100)
        if self.extremes:
            made |= extremes.draw(keys[6], self)
        return made

    # ---- the product ----

    def run(self, operands: dict[str, jax.Array]) -> list[jax.Array]:
        """Returns what jax_fp8gemm says."""
        if self.rhs != "fp8":
            return [self._run_casting(operands)]
        lhs, rhs = (self._operand(operands, i, name) for i, name in enumerate(("lhs", "rhs")))
        if self.leave_rest:
            how = {"variant": "ragged", "scales": self.scales, "leave_rest": True}
            return [multiply(lhs, rhs, DTYPES[self.out], operands["groups"], **how)]
        options = {"variant": self.variant, "out_dtype": DTYPES[self.out], "config": self.config}
        if "groups" in operands:
            name = "groups" if self.variant == "contiguous" else "group_sizes"
            options[name] = operands["groups"]
        return [fp8.gemm(lhs, rhs, init=operands.get("init"), **options)]

    def _operand(self, operands, i: int, name: str) -> fp8.QArray:
        tile = exact.SCALES[self.scales][i]
        if self.cast:
            return fp8.quantize(
                self._floats(operands, i, name).astype(jnp.bfloat16), exact.TILES[tile]
            )
        if self.extremes:
            return extremes.dirty(self, operands, name)
        return fp8.QArray(operands[name].astype(jnp.float8_e4m3fn), operands[f"{name}_scale"])

    def _floats(self, operands, i: int, name: str) -> jax.Array:
        tile = exact.SCALES[self.scales][i]
        return operands[name] * exact.spread(operands[f"{name}_scale"], tile, self.shape(i))

    def _run_casting(self, operands) -> jax.Array:
        weights = self._floats(operands, 1, "rhs").astype(jnp.bfloat16)
        transposed = self.rhs == "bf16_transposed"
        weights = jnp.swapaxes(weights, 1, 2) if transposed else weights
        parts = tuple(jnp.split(weights, 2, -1)) if self.pair else (weights,)
        return multiply_casting(
            self._operand(operands, 0, "lhs"),
            parts,
            operands["groups"],
            transposed=transposed,
            variant=self.variant,
            leave_rest=self.leave_rest,
        )

    # ---- what is right ----

    def product(self, operands) -> tuple[jax.Array, jax.Array]:
        """Returns the result in float32, and which of its values are defined."""
        lhs, rhs = (self._floats(operands, i, name) for i, name in enumerate(("lhs", "rhs")))
        own = self.own(operands)
        defined = jnp.ones(self.shape(2), bool)
        if self.variant in ("ragged", "contiguous"):
            lhs = jnp.where(own[:, :, None], lhs, 0)
            formula = "gmk,gnk->mn"
            if self.leave_rest:
                defined &= own.any(0)[:, None]
        elif self.variant == "ragged_contracting":
            lhs = jnp.where(own[:, None, :], lhs, 0)
            formula = "gmk,nk->gmn"
        else:
            left, right, result = DIMS[self.variant]
            formula = f"{left},{right}->{result}"
            if self.variant == "masked":
                defined &= own[:, :, None]
        out = jnp.einsum(formula, lhs, rhs, precision=jax.lax.Precision.HIGHEST)
        return out + operands["init"] if self.init else out, defined

    def own(self, operands) -> jax.Array | None:
        """Returns which rows (or, contracting, which of k) each group has, bool [g, m or k]."""
        groups = operands.get("groups")
        if self.variant == "ragged":
            return exact.inside(groups, self.m)
        if self.variant == "contiguous":
            return groups == jnp.arange(self.g)[:, None]
        if self.variant == "masked":
            return jnp.arange(self.m) < groups[:, None]
        if self.variant == "ragged_contracting":  # groups have whole steps of 128
            steps = -(-self.k // 128)
            needed = -(-jnp.clip(groups, 0, 128 * steps) // 128)
            return jnp.repeat(exact.inside(needed, steps), 128, 1)[:, : self.k]
        return None

    def wrong(self, operands, outs: list[jax.Array]) -> jax.Array:
        """Returns how many values of the result are wrong."""
        return jnp.sum(self.marks(operands, outs)[0])

    def marks(self, operands, outs: list[jax.Array]) -> list[jax.Array]:
        """Returns for each result which of its values are wrong."""
        want, defined = self.product(operands)
        want = exact.to_bf16(want) if self.out == "bf16" else want
        out = outs[0].astype(jnp.float32)
        right = out == want
        if self.extremes:
            right = extremes.right(self, operands, out, right)
        return [defined & ~right]
