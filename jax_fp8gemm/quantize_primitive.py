"""The primitive of the quantising kernels and its rules: shapes, lowering, batching.

Operands, in order: x [b, m, k]; with `pair` a second one beside it; the scales of x where it is FP8
(in the kernel's layout); the index of a gather; the gradient and the row weights of SwiGLU; group
sizes. Results: qvalue and scale (in the kernel's layout) of x as it lies, then of its transposed
copy. Of SwiGLU's backward: of the gradient to gate and up as rows; of gate's, up's and the
activation's transposed copies; and the gradient to the row weights in parts. What they mean:
reference.copies, reference.swiglu_gradients.
Above the primitive itself x has any leading dims, and scales are in their logical layout.
"""

import dataclasses
import functools
import itertools
import math
import string

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec

from jax_fp8gemm import meshes, reference, sharding
from jax_fp8gemm._native import QUANTIZE_TARGET
from jax_fp8gemm.config import TILE_NAMES
from jax_fp8gemm.primitives import empty_batch, no_derivative, primitive
from jax_fp8gemm.qarray import (
    BLOCK,
    BLOCKS,
    FP8,
    ROW_BLOCKS,
    ROWS,
    Tile,
    ceil_div,
    round_up,
    scale_shape,
)
from jax_fp8gemm.sharding import Dim, Rule, blocked_letters, scale_dims

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
      token_dims: how many dims of x before k count tokens, which a transposed copy has last. The
        dims before them count matrices. Two or more need a last one that is a multiple of 128.
    """

    source: str = "float"
    tile: Tile = ROW_BLOCKS
    scale: str = "pow2"
    rows: bool = True
    transposed: bool = False
    grouped: bool = False
    gather: bool = False
    pair: bool = False
    token_dims: int = 1

    @property
    def names(self) -> list[str]:
        """The names of the operands."""
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
        return [name for name, there in present.items() if there]

    def named(self, operands) -> dict[str, jax.Array]:
        """Returns the operands by name."""
        return dict(zip(self.names, operands, strict=True))

    def split(self, shape) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Returns the dims of x that count matrices, those that count tokens, and k."""
        lead = len(shape) - 1 - self.token_dims
        return tuple(shape[:lead]), tuple(shape[lead:-1]), shape[-1]

    def sizes(self, operands) -> tuple[int, int, int, int]:
        """Returns b, m, k and the tokens of a transposed copy; k is what is quantised."""
        named = self.named(operands)
        lead, tokens, k = self.split(named["x"].shape)
        b, m = math.prod(lead), math.prod(tokens)
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
            steps = 1 if self.tile == ROWS else ceil_div(columns, BLOCK)
            scales = (steps, round_up(lines, 4))
            if self.tile == BLOCKS:
                scales = (ceil_div(lines, BLOCK), round_up(steps, 4))
            found += [(shape, FP8), ((lead, *scales), jnp.float32)]
        return found + [((k // 2 // BLOCK, m), jnp.float32)] * backward


quantize_p = primitive("jax_fp8gemm_quantize", multiple_results=True)


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


MATRICES = ("x", "beside", "x_scale", "gradient")  # operands with the leading dims of x


@functools.partial(jax.jit, static_argnames="static")
def _bind(*operands, static: QuantizeStatic):
    """One call on one device. Scales in their logical layout; leading dims become one."""
    named = static.named(operands)
    lead, tokens, _ = static.split(named["x"].shape)
    for name in MATRICES:
        if name in named:
            shape = (math.prod(lead), math.prod(tokens), named[name].shape[-1])
            named[name] = named[name].reshape(shape)
    if "x_scale" in named:
        named["x_scale"] = reference.scale_to_kernel(named["x_scale"], ROW_BLOCKS)
    flat = dataclasses.replace(static, token_dims=1)
    results = quantize_p.bind(*named.values(), static=flat)
    pairs = len(results) // 2 * 2
    logical = []
    for qvalue, scale in zip(results[:pairs:2], results[1:pairs:2], strict=True):
        logical += [qvalue, reference.scale_from_kernel(scale, qvalue.shape, static.tile)]
    return _unmerged(static, operands[0].shape, logical) + list(results[pairs:])


def _unmerged(static: QuantizeStatic, shape, copies) -> list[jax.Array]:
    """Gives copies and their scales, in turns, the leading dims of x."""
    lead, tokens, _ = static.split(shape)
    found = []
    for i, x in enumerate(copies):
        dims = x.shape[1:]
        if static.token_dims > 1 and static.rows and i < 2:
            dims = (*tokens, dims[1])
        elif static.token_dims > 1:  # the last is a multiple of 128: blocks lie inside it
            dims = (dims[0], *tokens[:-1], tokens[-1] // (BLOCK if i % 2 else 1))
        found.append(x.reshape(*lead, *dims))
    return found


@functools.cache
def sharding_rule(static: QuantizeStatic, rank: int, whole_tokens: bool) -> Rule:
    """Returns how a call is cut up. Groups, gathered rows and columns that lie in pairs stay whole.

    Args:
      rank: of x. whole_tokens: whether x has a multiple of 128 tokens.
    """
    names = string.ascii_uppercase[: rank - 2]
    lead, tokens = names[: rank - 1 - static.token_dims], names[rank - 1 - static.token_dims :]
    paired = static.pair or static.source.startswith("swiglu")
    uncut = paired or static.tile == ROWS
    rows, k = lead + tokens + "m", "h" if paired else "k"
    padded = static.grouped or (static.tile == ROW_BLOCKS and not whole_tokens)
    last = "t" if padded else tokens + "m"  # what a transposed copy has last
    x = lead + "r" + k if static.gather else rows + k
    letters = {"x": x, "beside": x, "x_scale": x, "index": "m", "gradient": rows + "f"}
    letters |= {"row_weight": "m", "group_sizes": "g"}
    operands = {name: tuple(map(Dim, letters[name])) for name in static.names}
    if "x_scale" in operands:
        operands["x_scale"] = scale_dims(x, ROW_BLOCKS)
    backward = static.source == "swiglu_backward"
    k = "h" if backward else "k"
    turned = [lead + "f" + last] * 3 if backward else [lead + k + last] * static.transposed
    copies = [rows + k] * static.rows + turned
    results = [dims for c in copies for dims in (tuple(map(Dim, c)), scale_dims(c, static.tile))]
    results += [(Dim("p"), Dim("m"))] * backward
    return Rule(
        "quantize",
        tuple(operands.values()),
        tuple(results),
        deciding=(0,) * 10,  # x outvotes its copies: rather these travel, being smaller
        whole=frozenset("rtgp" + "m" * (static.grouped or static.gather) + "hkf" * uncut),
        blocked=blocked_letters(*operands.values(), *results) | set("m" * static.transposed),
    )


def call(static: QuantizeStatic, *operands) -> list[jax.Array]:
    """Binds one quantising call, under every transformation. Shapes have been checked.

    Returns qvalues and scales as `QuantizeStatic.results`, with the leading dims of x and scales in
    their logical layout. Several dims of tokens stay apart: [..., k, *tokens].
    """
    if 0 in static.sizes(operands):
        return _empty(static, operands)
    run = meshes.explicit(_rule(static, operands), _batchable(static), operands)
    return run(*meshes.vary_alike(*operands))


def _empty(static: QuantizeStatic, operands) -> list[jax.Array]:
    shapes = [shape for shape, _ in static.results(operands)]
    copies = shapes[: len(shapes) // 2 * 2 : 2]
    like = meshes.vary_alike(*operands)[0]
    found = []
    for shape in copies:
        scales = scale_shape(shape, static.tile)
        found += [jnp.zeros_like(like, FP8, shape), jnp.ones_like(like, jnp.float32, scales)]
    found = _unmerged(static, operands[0].shape, found)
    rest = shapes[2 * len(copies) :]
    return found + [jnp.zeros_like(like, jnp.float32, shape) for shape in rest]


def _rule(static: QuantizeStatic, operands) -> Rule:
    m = operands[static.names.index("index")].shape[0] if static.gather else operands[0].shape[-2]
    return sharding_rule(static, operands[0].ndim, m % BLOCK == 0)


@functools.cache
def _placed(static: QuantizeStatic, rule: Rule):
    """Returns the call with its rule for partitioning."""
    return sharding.partitioned(functools.partial(_bind, static=static), rule, static)


@functools.cache
def _batchable(static: QuantizeStatic):
    """Returns the call for `static` with its rule for vmap: more matrices, or one by one."""

    @jax.custom_jvp
    def on_devices(*operands):
        if meshes.is_manual():
            return _bind(*operands, static=static)
        return _placed(static, _rule(static, operands))(*operands)

    on_devices.defjvp(no_derivative("quantize"))

    @custom_vmap
    def many(*operands):
        return on_devices(*operands)

    @many.def_vmap
    def rule(size, batched, *operands):
        if size == 0:
            out = empty_batch(many, batched, operands)
            return out, [True] * len(out)
        spread = [
            x if own else jnp.broadcast_to(x, (size, *x.shape))
            for x, own in zip(operands, batched, strict=True)
        ]
        if static.source in ("float", "fp8") and not static.grouped and not static.gather:
            out = _batchable(static)(*spread)
        else:
            out = jax.lax.map(lambda one: _batchable(static)(*one), spread)
        return out, [True] * len(out)

    return many
