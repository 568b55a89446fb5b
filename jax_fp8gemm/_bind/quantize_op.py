"""The custom call of the casts: its operands, its results and its rules.

Operands, in order (`CastSpec.names`): x [b, m, k]; with `pair` a second one beside it; the scales
of x where it is FP8; the index of a gather; the gradient and the row weights of SwiGLU; group
sizes. Results: qvalue and scale of x as it lies, then of its transposed copy. Of SwiGLU's backward
pass: of the gradient to gate and up as rows; of gate's, up's and the activation's transposed
copies; and the gradient to the row weights in parts. What they mean: reference.copies and
reference.swiglu_gradients. Above the kernel x has any leading dims.
"""

import dataclasses
import functools
import itertools
import math
import string
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_fp8gemm._bind import meshes
from jax_fp8gemm._bind.native import QUANTIZE_TARGET
from jax_fp8gemm._bind.op import (
    Arrays,
    Op,
    Results,
    Shape,
    bind,
    bind_primitive,
    loop,
    rebind,
    run_batch,
    spread,
    typical,
)
from jax_fp8gemm._bind.partition import Batch, Dim, Rule, Total, blocked_letters, scale_dims
from jax_fp8gemm._bind.shared_blocks import Shares, cast_part
from jax_fp8gemm._core import reference
from jax_fp8gemm._core.groups import grouped_tokens
from jax_fp8gemm._core.layout import (
    BLOCKS,
    ROW_BLOCKS,
    ROWS,
    SCALE_BLOCK,
    TILE_NAMES,
    TOKEN_MULTIPLE,
    Tile,
    round_up,
    scale_from_kernel,
    scale_shape,
    scale_shape_in_kernel,
    scale_to_kernel,
)
from jax_fp8gemm._core.qarray import FP8
from jax_fp8gemm._core.types import ScaleRounding, SourceName
from jax_fp8gemm._select.cost import streaming_microseconds

FLOAT_NAMES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
MATRICES = ("x", "beside", "x_scale", "gradient")  # operands with the leading dims of x


@dataclasses.dataclass(frozen=True, kw_only=True)
class CastSpec:
    """Static description of one cast; as QuantizeSpec of params.cuh.

    Attributes:
      source: "float", "fp8" (scaled 1x128), "swiglu" (of [1, m, 2f]) or "swiglu_backward" (x is
        FP8 [1, m, 2f]).
      rows, transposed: which copies are made.
      grouped: the transposed copy is placed by groups; rows past them are not read.
      gather: row i is row index[i] of x.
      pair: two operands lie side by side along k.
      shared_columns: in the transposed copy 128 neighbouring columns of x get one scale where their
        own lie close, see reference.share_scales. Of SwiGLU's backward pass those of the gradients
        do, and those of the activation do not. Scales of "none" stay as they are.
      token_dims: how many dims of x before k count tokens, which a transposed copy has last. The
        dims before them count matrices. Two or more need a last one that is a multiple of 128.
      share: of the rows of a grouped cast that are expected to lie in groups, for XLA's scheduler.
    """

    source: SourceName = "float"
    tile: Tile = ROW_BLOCKS
    scale_rounding: ScaleRounding = "pow2"
    rows: bool = True
    transposed: bool = False
    grouped: bool = False
    gather: bool = False
    pair: bool = False
    shared_columns: bool = False
    token_dims: int = 1
    share: float = 1.0

    @functools.cached_property
    def is_backward(self) -> bool:
        return self.source == "swiglu_backward"

    @functools.cached_property
    def shares(self) -> bool:
        """Whether columns of a transposed copy can have a common scale."""
        return self.shared_columns and self.transposed and self.scale_rounding == "pow2"

    @functools.cached_property
    def agrees(self) -> bool:
        """Whether devices that have parts of a block can agree on its scale."""
        plain = not (self.grouped or self.gather or self.shares)
        return self.source == "float" and self.tile == BLOCKS and self.token_dims == 1 and plain

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the operands."""
        present = {
            "x": True,
            "beside": self.pair,
            "x_scale": self.source in ("fp8", "swiglu_backward"),
            "index": self.gather,
            "gradient": self.is_backward,
            "row_weight": self.source in ("swiglu", "swiglu_backward"),
            "group_sizes": self.grouped,
        }
        return tuple(name for name, there in present.items() if there)

    def named(self, operands: Sequence) -> dict:
        """Returns the operands by name."""
        return dict(zip(self.names, operands, strict=True))

    def split(self, shape: Shape) -> tuple[Shape, Shape, int]:
        """Returns the dims of x that count matrices, those that count tokens, and k."""
        lead = len(shape) - 1 - self.token_dims
        return tuple(shape[:lead]), tuple(shape[lead:-1]), shape[-1]

    def sizes(self, operands: Sequence) -> "CastSizes":
        """Returns the sizes of a call; k is what is quantized."""
        named = self.named(operands)
        lead, tokens, k = self.split(named["x"].shape)
        k = k * (2 if self.pair else 1) // (2 if self.source == "swiglu" else 1)
        m = named["index"].shape[0] if self.gather else math.prod(tokens)
        columns = m if self.tile == BLOCKS else round_up(m, TOKEN_MULTIPLE)
        if self.grouped:
            columns = grouped_tokens(m, named["group_sizes"].shape[0])
        return CastSizes(math.prod(lead), m, k, columns)

    def results(self, sizes: "CastSizes") -> tuple[list[Shape], list[Shape]]:
        """Returns the shapes of the FP8 results, and of the gradient to row weights, in parts."""
        b, m, k, tokens = sizes
        rows: list[Shape] = [(b, m, k)] * self.rows
        if self.is_backward:
            return rows + [(b, k // 2, tokens)] * 3, [(k // 2 // SCALE_BLOCK, m)]
        return rows + [(b, k, tokens)] * self.transposed, []


class CastSizes(NamedTuple):
    """Matrices, rows and columns of a cast, and the tokens of its transposed copy."""

    b: int
    m: int
    k: int
    tokens: int


def cast(spec: CastSpec, *operands: jax.Array) -> Arrays:
    """Returns the results of one cast, under every transformation. Arguments have been checked.

    Qvalues and scales in turns, with the leading dims of x and scales in their logical layout.
    Several dims of tokens stay apart: [..., k, *tokens].
    """
    return bind(QUANTIZE, spec, operands)


# ---- the kernel's meaning and specification -----------------------------------------------------


def _results(spec: CastSpec, operands: Arrays) -> Results:
    copies, parts = spec.results(spec.sizes(operands))
    found: Results = []
    for shape in copies:
        found += [(shape, FP8), (scale_shape_in_kernel(shape, spec.tile), jnp.float32)]
    return found + [(shape, jnp.float32) for shape in parts]


def _reference(spec: CastSpec, operands: Arrays) -> Arrays:
    named = spec.named(operands)
    x, sizes = named["x"], named.get("group_sizes")
    if spec.pair:
        x = jnp.concatenate([x, named["beside"]], axis=-1)
    if "x_scale" in named:
        scale = scale_from_kernel(named["x_scale"], x.shape, ROW_BLOCKS)
        x = reference.dequantize(x, scale, ROW_BLOCKS)
    if spec.gather:
        x = x[:, jnp.clip(named["index"], 0, x.shape[1] - 1)]
    made = functools.partial(
        reference.copies, tile=spec.tile, rounding=spec.scale_rounding, group_sizes=sizes
    )
    if spec.source == "swiglu":
        x = reference.swiglu(x)[3] * named["row_weight"][None, :, None]
    if not spec.is_backward:
        return made(x, rows=spec.rows, transposed=spec.transposed, shared_columns=spec.shares)
    dh, activation, parts = reference.swiglu_gradients(
        x[0], named["gradient"][0], named["row_weight"]
    )
    copies = [made(dh[None], rows=True, transposed=False)]
    turn = functools.partial(made, rows=False, transposed=True)
    copies += [turn(y[None], shared_columns=spec.shares) for y in jnp.split(dh, 2, axis=1)]
    copies.append(turn(activation[None]))
    return [*itertools.chain(*copies), parts]


def attributes(spec: CastSpec, dtype: jnp.dtype, m: int, k: int) -> dict[str, np.int64 | str]:
    """Returns the attributes of the custom call for x of `dtype`: the kernel's specification."""
    # Whether threads may read eight columns at once, and write them, or sixteen of a transpose.
    aligned = k % 8 == 0 and (spec.tile != BLOCKS or not spec.transposed or m % 16 == 0)
    flags = ["rows", "transposed", "grouped", "gather", "pair"]
    flags += ["shared_columns"] if spec.shares else []
    return {
        "source": spec.source,
        "type": FLOAT_NAMES.get(jnp.dtype(dtype).name, "bf16"),
        "tile": TILE_NAMES[spec.tile],
        "pow2": np.int64(spec.scale_rounding == "pow2"),
        "aligned": np.int64(aligned),
        **{flag: np.int64(getattr(spec, flag)) for flag in flags},
    }


def _attributes(spec: CastSpec, operands: Arrays) -> dict[str, np.int64 | str]:
    _, m, k, _ = spec.sizes(operands)
    return attributes(spec, operands[0].dtype, m, k)


def _seconds(spec: CastSpec, operands: Arrays) -> float:
    """What is read and written, at the rate of the memory."""
    arrays = [(x.shape, x.dtype) for x in operands] + _results(spec, operands)
    sizes = [math.prod(map(typical, shape)) * jnp.dtype(dtype).itemsize for shape, dtype in arrays]
    return 1e-6 * streaming_microseconds(round(spec.share * sum(sizes)))


# ---- one device ---------------------------------------------------------------------------------


def _empty(spec: CastSpec, operands: Arrays) -> Arrays | None:
    sizes = spec.sizes(operands)
    if 0 not in sizes:
        return None
    like = meshes.vary_alike(*operands)[0]
    copies, parts = spec.results(sizes)
    found: list[jax.Array] = []
    for shape in copies:
        scales = scale_shape(shape, spec.tile)
        found += [jnp.zeros_like(like, FP8, shape), jnp.ones_like(like, jnp.float32, scales)]
    zeros = [jnp.zeros_like(like, jnp.float32, shape) for shape in parts]
    return _unmerged(spec, operands[0].shape, found) + zeros


def _local(spec: CastSpec, operands: Arrays, batch: Batch, total: Total | None) -> Arrays:
    """One device's share; nothing is contracted."""
    one = lambda operands: _on_one_device(*operands, spec=spec)  # noqa: E731
    return run_batch(one, functools.partial(_many, spec), batch, operands)


def _local_part(spec: CastSpec, operands: Arrays, shares: Shares) -> Arrays:
    """A shard whose blocks of scales other devices have parts of. XLA casts it."""
    x = jnp.concatenate(operands, axis=-1) if spec.pair else operands[0]
    copy = cast_part(x, spec.scale_rounding, shares.get("m"), shares.get("k"))
    turned = [jnp.swapaxes(y, -1, -2) for y in copy]
    return [*copy] * spec.rows + turned * spec.transposed


def _many(spec: CastSpec, size: int, batched: Sequence[bool], operands: Arrays) -> Arrays:
    """A batch of casts: more rows, or a loop where groups are placed or tokens padded by element.

    Rows past the groups are read too, if there is only a copy of rows.
    """
    if spec.transposed or spec.tile[0] != 1:
        return loop(lambda one: _on_one_device(*one, spec=spec), batched, operands)
    named, own = spec.named(operands), spec.named(spread(size, batched, operands))
    merged = {name: x.reshape(-1, *x.shape[2:]) for name, x in own.items()}
    merged.pop("group_sizes", None)
    if spec.gather:
        batched_x = any(b for name, b in spec.named(batched).items() if name in MATRICES)
        if batched_x:
            rows = named["x"].shape[-2]
            first = rows * jnp.arange(size, dtype=jnp.int32)[:, None]
            merged["index"] = (first + jnp.clip(own["index"], 0, rows - 1)).reshape(-1)
        else:
            merged |= {name: x for name, x in named.items() if name in MATRICES}
    plain = dataclasses.replace(spec, grouped=False)
    found = _on_one_device(*merged.values(), spec=plain)
    return [x.reshape(size, -1, *x.shape[1:]) for x in found]


@functools.partial(jax.jit, static_argnames="spec")
def _on_one_device(*operands: jax.Array, spec: CastSpec) -> Arrays:
    """Makes one leading dim of many, and lays scales out as the kernel has them."""
    named = spec.named(operands)
    lead, tokens, _ = spec.split(named["x"].shape)
    for name in MATRICES:
        if name in named:
            shape = (math.prod(lead), math.prod(tokens), named[name].shape[-1])
            named[name] = named[name].reshape(shape)
    if "x_scale" in named:
        named["x_scale"] = scale_to_kernel(named["x_scale"], ROW_BLOCKS)
    flat = dataclasses.replace(spec, token_dims=1)
    _, m, k, _ = flat.sizes(tuple(named.values()))
    with jax.named_scope(f"fp8_quantize_{spec.source}_m{m}_k{k}"):  # what profilers show
        results = bind_primitive(QUANTIZE, flat, tuple(named.values()))
    pairs = len(results) // 2 * 2
    logical = []
    for qvalue, scale in zip(results[:pairs:2], results[1:pairs:2], strict=True):
        logical += [qvalue, scale_from_kernel(scale, qvalue.shape, spec.tile)]
    return _unmerged(spec, operands[0].shape, logical) + list(results[pairs:])


def _unmerged(spec: CastSpec, shape: Shape, copies: Arrays) -> list[jax.Array]:
    """Gives copies and their scales, in turns, the leading dims of x."""
    lead, tokens, _ = spec.split(shape)
    found = []
    for i, x in enumerate(copies):
        dims = x.shape[1:]
        if spec.token_dims > 1 and spec.rows and i < 2:
            dims = (*tokens, dims[1])
        elif spec.token_dims > 1:  # the last is a multiple of 128: blocks lie inside it
            dims = (dims[0], *tokens[:-1], tokens[-1] // (SCALE_BLOCK if i % 2 else 1))
        found.append(x.reshape(*lead, *dims))
    return found


# ---- many devices, many casts -------------------------------------------------------------------


def _rule(spec: CastSpec, operands: Arrays) -> Rule:
    m = spec.named(operands)["index"].shape[0] if spec.gather else operands[0].shape[-2]
    return sharding_rule(spec, operands[0].ndim, m % SCALE_BLOCK == 0)


@functools.cache
def sharding_rule(spec: CastSpec, rank: int, whole_tokens: bool) -> Rule:
    """Returns how a cast is cut up. Groups, gathered rows and columns that lie in pairs stay whole.

    Args:
      rank: of x. whole_tokens: whether x has a multiple of 128 tokens.
    """
    names = string.ascii_uppercase[: rank - 2]
    lead, tokens = names[: rank - 1 - spec.token_dims], names[rank - 1 - spec.token_dims :]
    paired = spec.pair or spec.source.startswith("swiglu")
    uncut = paired or spec.tile == ROWS
    rows, k = lead + tokens + "m", "h" if paired else "k"
    padded = spec.grouped or (spec.tile == ROW_BLOCKS and not whole_tokens)
    last = "t" if padded else tokens + "m"  # what a transposed copy has last
    x = lead + "r" + k if spec.gather else rows + k
    letters = {"x": x, "beside": x, "x_scale": x, "index": "m", "gradient": rows + "f"}
    letters |= {"row_weight": "m", "group_sizes": "g"}
    operands = {name: tuple(map(Dim, letters[name])) for name in spec.names}
    if "x_scale" in operands:
        operands["x_scale"] = scale_dims(x, ROW_BLOCKS)
    k = "h" if spec.is_backward else "k"
    copies = [rows + k] * spec.rows + [lead + k + last] * spec.transposed
    if spec.is_backward:
        copies = [rows + k, *[lead + "f" + last] * 3]
    results = [dims for c in copies for dims in (tuple(map(Dim, c)), scale_dims(c, spec.tile))]
    results += [(Dim("p"), Dim("m"))] * spec.is_backward
    return Rule(
        op="quantize",
        operands=tuple(operands.values()),
        results=tuple(results),
        voters=((0, 10),),  # x outvotes its copies: rather these travel, being smaller
        whole=frozenset("rtgp" + "m" * (spec.grouped or spec.gather) + "hkf" * uncut),
        blocked=blocked_letters(*operands.values(), *results)
        | set("m" * spec.transposed + k * spec.shares),
        shared=frozenset("m" + "k" * (not paired)) if spec.agrees else frozenset(),
        names=spec.names,
    )


def _vmap(spec: CastSpec, size: int, batched: Sequence[bool], operands: Arrays) -> Arrays | None:
    """More matrices. Groups, indices and row weights are those of one element."""
    if spec.source in ("float", "fp8") and not spec.grouped and not spec.gather:
        return rebind(QUANTIZE, spec, spread(size, batched, operands))
    return None


QUANTIZE = Op(
    name="quantize",
    target=QUANTIZE_TARGET,
    results=_results,
    reference=_reference,
    attributes=_attributes,
    seconds=_seconds,
    aliases=lambda spec: {},
    empty=_empty,
    rule=_rule,
    local=_local,
    local_part=_local_part,
    vmap=_vmap,
)
