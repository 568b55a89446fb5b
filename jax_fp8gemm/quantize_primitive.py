"""The primitive of the quantising kernels and its rules: shapes, lowering, batching.

Operands, in order: x [b, m, k]; with `pair` a second one beside it; the scales of x where it is FP8
(in the kernel's layout); the index of a gather; the gradient and the row weights of SwiGLU; group
sizes. Results: qvalue and scale (in the kernel's layout) of x as it lies, then of its transposed
copy. Of SwiGLU's backward: of the gradient to gate and up as rows; of gate's, up's and the
activation's transposed copies; and the gradient to the row weights in parts. What they mean:
reference.copies, reference.swiglu_gradients.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir
from jax.sharding import NamedSharding, PartitionSpec

from jax_fp8gemm import reference
from jax_fp8gemm._native import QUANTIZE_TARGET
from jax_fp8gemm.config import TILE_NAMES
from jax_fp8gemm.primitives import no_derivative
from jax_fp8gemm.qarray import (
    BLOCK,
    BLOCKS,
    FP8,
    ROW_BLOCKS,
    Tile,
    ceil_div,
    round_up,
    scale_shape,
)

FLOAT_NAMES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


@dataclasses.dataclass(frozen=True)
class QuantizeStatic:
    """What of a quantising call is known when it is traced; as QuantizeSpec of params.cuh.

    Attributes:
      source: "float", "fp8" (scaled 1x128), "swiglu" (of [1, m, 2f]) or "swiglu_backward" (x is
        FP8 [1, m, 2f]).
      scale: "pow2" or "float32".
      rows, transposed: which copies are made.
      grouped: the transposed copy is placed by groups; rows past them are not read.
      gather: row i is row index[i] of x.
      pair: two operands lie side by side along k.
    """

    source: str = "float"
    tile: Tile = ROW_BLOCKS
    scale: str = "pow2"
    rows: bool = True
    transposed: bool = False
    grouped: bool = False
    gather: bool = False
    pair: bool = False

    def named(self, operands) -> dict[str, jax.Array]:
        """Returns the operands by name."""
        backward = self.source == "swiglu_backward"
        present = {
            "x": True,
            "beside": self.pair,
            "x_scale": self.source == "fp8" or backward,
            "index": self.gather,
            "gradient": backward,
            "row_weight": self.source == "swiglu" or backward,
            "group_sizes": self.grouped,
        }
        return dict(zip([name for name, there in present.items() if there], operands, strict=True))

    def sizes(self, operands) -> tuple[int, int, int, int]:
        """Returns b, m, k and the tokens of a transposed copy; k is what is quantised."""
        named = self.named(operands)
        b, m, k = named["x"].shape
        k = k * (2 if self.pair else 1) // (2 if self.source == "swiglu" else 1)
        m = named["index"].shape[0] if self.gather else m
        tokens = m if self.tile == BLOCKS else round_up(m, BLOCK)
        if self.grouped:
            tokens = reference.grouped_tokens(m, named["group_sizes"].shape[0])
        return b, m, k, tokens

    def results(self, operands) -> list[tuple[tuple[int, ...], jnp.dtype]]:
        """Returns shape and dtype of every result."""
        b, m, k, tokens = self.sizes(operands)
        backward = self.source == "swiglu_backward"
        turned = [(b, k // 2, tokens)] * 3 if backward else [(b, k, tokens)] * self.transposed
        shapes = [(b, m, k)] * self.rows + turned
        found = []
        for shape in shapes:
            lead, lines, columns = shape
            steps = ceil_div(columns, BLOCK)
            scales = (steps, round_up(lines, 4))
            if self.tile == BLOCKS:
                scales = (ceil_div(lines, BLOCK), round_up(steps, 4))
            found += [(shape, FP8), ((lead, *scales), jnp.float32)]
        return found + [((k // 2 // BLOCK, m), jnp.float32)] * backward


quantize_p = Primitive("jax_fp8gemm_quantize")
quantize_p.multiple_results = True


def _abstract(*operands, static: QuantizeStatic):
    x = operands[0]

    def like_x(shape, dtype):
        # The update carries the manual axes of a shard_map along; the mesh too, unsharded.
        sharding = NamedSharding(x.sharding.mesh, PartitionSpec(*[None] * len(shape)))
        return x.update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False, sharding=sharding)

    return [like_x(*result) for result in static.results(operands)]


quantize_p.def_abstract_eval(_abstract)


def _reference(*operands, static: QuantizeStatic):
    named = static.named(operands)
    x, sizes = named["x"], named.get("group_sizes")
    if static.pair:
        x = jnp.concatenate([x, named["beside"]], axis=-1)
    if "x_scale" in named:
        scale = reference.scale_from_kernel(named["x_scale"], x.shape, ROW_BLOCKS)
        x = reference.dequantize(x, scale, ROW_BLOCKS)
    if static.gather:
        x = x[:, jnp.clip(named["index"], 0, x.shape[1] - 1)]
    made = functools.partial(
        reference.copies, tile=static.tile, mode=static.scale, group_sizes=sizes
    )
    if static.source == "swiglu":
        x = reference.swiglu(x)[3] * named["row_weight"][:, None]
    if static.source != "swiglu_backward":
        return made(x, rows=static.rows, transposed=static.transposed)
    dh, activation, parts = reference.swiglu_gradients(
        x[0], named["gradient"][0], named["row_weight"]
    )
    turned = [*jnp.split(dh, 2, axis=1), activation]
    copies = [made(dh[None], rows=True, transposed=False)]
    copies += [made(y[None], rows=False, transposed=True) for y in turned]
    return [*itertools.chain(*copies), parts]


ad.primitive_jvps[quantize_p] = no_derivative("quantize")
mlir.register_lowering(quantize_p, mlir.lower_fun(_reference, multiple_results=True))


def attributes(
    static: QuantizeStatic, dtype: jnp.dtype, m: int, k: int
) -> dict[str, np.int64 | str]:
    """Returns the attributes of the custom call for x of `dtype`: the kernel's specification."""
    # Whether threads may read eight columns at once, and write them, or sixteen of a transpose.
    aligned = k % 8 == 0 and (static.tile != BLOCKS or not static.transposed or m % 16 == 0)
    flags = ("rows", "transposed", "grouped", "gather", "pair")
    return {
        "source": static.source,
        "type": FLOAT_NAMES.get(jnp.dtype(dtype).name, "bf16"),
        "tile": TILE_NAMES[static.tile],
        "pow2": np.int64(static.scale == "pow2"),
        "aligned": np.int64(aligned),
        **{flag: np.int64(getattr(static, flag)) for flag in flags},
    }


def _lower_cuda(ctx, *operands, static: QuantizeStatic):
    rule = jax.ffi.ffi_lowering(QUANTIZE_TARGET)
    _, m, k, _ = static.sizes(ctx.avals_in)
    return rule(ctx, *operands, **attributes(static, ctx.avals_in[0].dtype, m, k))


mlir.register_lowering(quantize_p, _lower_cuda, platform="cuda")


@functools.partial(jax.jit, static_argnames="static")
def _bind(*operands, static: QuantizeStatic):
    """One call on one device. Scales in their logical layout."""
    named = static.named(operands)
    if "x_scale" in named:
        named["x_scale"] = reference.scale_to_kernel(named["x_scale"], ROW_BLOCKS)
    results = quantize_p.bind(*named.values(), static=static)
    pairs = len(results) // 2 * 2
    logical = []
    for qvalue, scale in zip(results[:pairs:2], results[1:pairs:2], strict=True):
        logical += [qvalue, reference.scale_from_kernel(scale, qvalue.shape, static.tile)]
    return logical + list(results[pairs:])


def call(static: QuantizeStatic, *operands) -> list[jax.Array]:
    """Binds one quantising call, under every transformation. Shapes have been checked.

    Returns qvalues and scales as `QuantizeStatic.results`, scales in their logical layout.
    """
    if 0 in static.sizes(operands):
        return _empty(static, operands)
    return _batchable(static)(*operands)


def _empty(static: QuantizeStatic, operands) -> list[jax.Array]:
    shapes = [shape for shape, _ in static.results(operands)]
    copies = shapes[: len(shapes) // 2 * 2 : 2]
    found = [
        part
        for shape in copies
        for part in (jnp.zeros(shape, FP8), jnp.ones(scale_shape(shape, static.tile)))
    ]
    return found + [jnp.zeros(shape) for shape in shapes[2 * len(copies) :]]


@functools.cache
def _batchable(static: QuantizeStatic):
    """Returns `_bind` for `static` with its rule for vmap: more matrices, or one by one."""

    @custom_vmap
    def many(*operands):
        return _bind(*operands, static=static)

    @many.def_vmap
    def rule(size, batched, *operands):
        spread = [
            x if own else jnp.broadcast_to(x, (size, *x.shape))
            for x, own in zip(operands, batched, strict=True)
        ]
        if static.source in ("float", "fp8") and not static.grouped and not static.gather:
            merged = _batchable(static)(*[x.reshape(-1, *x.shape[2:]) for x in spread])
            out = [x.reshape(size, -1, *x.shape[1:]) for x in merged]
        else:
            out = jax.lax.map(lambda one: _batchable(static)(*one), spread)
        return out, [True] * len(out)

    return many
