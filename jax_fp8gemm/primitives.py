"""The inner primitive and its rules: shape, lowering for each platform, batching.

Operands, in order: lhs, rhs (e4m3), lhs scale, rhs scale (f32, in the kernel's layout, see
reference.scale_to_kernel), and init (f32) when accumulating. The stack above it is
custom_vjp (ops.py) > custom_vmap (here) > sharding (its place is between `product` and `_bind`).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir
from jax.sharding import NamedSharding, PartitionSpec

from jax_fp8gemm import config as configs
from jax_fp8gemm import reference
from jax_fp8gemm._native import TARGET
from jax_fp8gemm.errors import message
from jax_fp8gemm.qarray import BLOCK, BLOCKS, TENSOR, QArray
from jax_fp8gemm.variants import SCALES, VARIANTS

# For jax.export.export(..., disabled_checks=EXPORT_CHECKS): XLA promises nothing about the
# stability of foreign custom calls; this library does, by the version in the target's name.
EXPORT_CHECKS = (jax.export.DisabledSafetyCheck.custom_call(TARGET),)

DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32}


@dataclasses.dataclass(frozen=True)
class Static:
    """What of a product is known when it is traced."""

    variant: str
    scales: str
    out: str
    num_sms: int = 0
    config: configs.GemmConfig | None = None


gemm_p = Primitive("jax_fp8gemm_gemm")


def _abstract(lhs, rhs, lhs_scale, rhs_scale, *init, static: Static):
    shape = VARIANTS[static.variant].out_shape(lhs.shape, rhs.shape)
    # The update carries the manual axes of a shard_map along; the mesh too, unsharded.
    sharding = NamedSharding(lhs.sharding.mesh, PartitionSpec(*[None] * len(shape)))
    return lhs.update(shape=shape, dtype=DTYPES[static.out], weak_type=False, sharding=sharding)


gemm_p.def_abstract_eval(_abstract)


def _reference(*operands, static: Static):
    return reference.gemm(*operands, tiles=SCALES[static.scales], dtype=DTYPES[static.out])


def _no_derivative(primals, tangents, **params):
    raise NotImplementedError(
        message(
            "gemm",
            "a product of FP8 operands has no derivative.",
            got="jax.grad (or a second derivative) through gemm",
            expected="first derivatives, through fp8_matmul",
            mend="differentiate fp8_matmul once; for second derivatives use jnp.dot",
        )
    )


ad.primitive_jvps[gemm_p] = _no_derivative
mlir.register_lowering(gemm_p, mlir.lower_fun(_reference, multiple_results=False))


def _device_kind() -> str:
    """Returns the kind of the GPU in use, or the default when programs are made without one."""
    device = jax.devices()[0]
    return device.device_kind if device.platform in ("gpu", "cuda") else configs.DEFAULT_DEVICE


def _problem(static: Static, shapes, accumulate: bool) -> configs.Problem:
    lhs, rhs = shapes
    g = lhs[0] if len(lhs) == 3 else 1
    m, n, k = lhs[-2], rhs[-2], lhs[-1]
    return configs.Problem(
        static.variant, m, n, k, g, static.scales, static.out, accumulate, static.num_sms,
        _device_kind(),
    )  # fmt: skip


def _lower_cuda(ctx, *operands, static: Static):
    accumulate = len(operands) == 5
    problem = _problem(static, [aval.shape for aval in ctx.avals_in[:2]], accumulate)
    config = static.config or configs.select(problem)
    reason = configs.legal(problem, config)
    if reason:
        raise ValueError(
            message(
                "gemm",
                "the config cannot run this product.",
                got=f"{config}: {reason}",
                expected=f"a legal config for {problem}",
                mend="leave config out, or take one of jax_fp8gemm.config.candidates(problem)",
            )
        )
    aliases = {4: 0} if accumulate else None
    rule = jax.ffi.ffi_lowering(TARGET, operand_output_aliases=aliases)
    return rule(ctx, *operands, **configs.attributes(problem, config))


mlir.register_lowering(gemm_p, _lower_cuda, platform="cuda")


@functools.partial(jax.jit, static_argnames="static")
def _bind(lhs, rhs, lhs_scale, rhs_scale, *init, static: Static):
    """One product on one device. Scales in their logical layout."""
    lhs_tile, rhs_tile = SCALES[static.scales]
    return gemm_p.bind(
        lhs,
        rhs,
        reference.scale_to_kernel(lhs_scale, lhs_tile),
        reference.scale_to_kernel(rhs_scale, rhs_tile),
        *init,
        static=static,
    )


def product(lhs: QArray, rhs: QArray, init: jax.Array | None, static: Static) -> jax.Array:
    """Binds one product, under every transformation. Shapes have been checked."""
    operands = (lhs.qvalue, rhs.qvalue, lhs.scale, rhs.scale, *(() if init is None else (init,)))
    shape = VARIANTS[static.variant].out_shape(lhs.shape, rhs.shape)
    if 0 in (*shape, lhs.shape[-1]):
        return jnp.zeros(shape, DTYPES[static.out]) if init is None else init
    return _batchable(static)(*operands)


@functools.cache
def _batchable(static: Static):
    """Returns `_bind` for `static` with its rule for vmap."""

    @custom_vmap
    def call(*operands):
        return _bind(*operands, static=static)

    @call.def_vmap
    def rule(size, batched, *operands):
        def spread(*which):
            return [
                x if batched[i] else jnp.broadcast_to(x, (size, *x.shape))
                for i, x in enumerate(operands)
                if i in which
            ]

        if static.variant == "batched":
            merged = [x.reshape(-1, *x.shape[2:]) for x in spread(0, 1, 2, 3, 4)]
            out = _batchable(static)(*merged)
            return out.reshape(size, -1, *out.shape[1:]), True
        return _vmap_dense(static, size, batched, operands, spread), True

    return call


def _vmap_dense(static: Static, size: int, batched, operands, spread):
    """vmap of a dense product: more rows, more columns, or the batched variant."""
    lhs_tile, rhs_tile = SCALES[static.scales]
    lhs_batched, rhs_batched = batched[0] or batched[2], batched[1] or batched[3]
    m, n = operands[0].shape[-2], operands[1].shape[-2]
    if lhs_batched and not rhs_batched and lhs_tile != TENSOR:
        lhs, lhs_scale, *init = (x.reshape(size * m, -1) for x in spread(0, 2, 4))
        out = _batchable(static)(lhs, operands[1], lhs_scale, operands[3], *init)
        return out.reshape(size, m, n)
    whole_blocks = rhs_tile != BLOCKS or n % BLOCK == 0
    if (
        rhs_batched
        and not lhs_batched
        and rhs_tile != TENSOR
        and whole_blocks
        and len(batched) == 4
    ):
        rhs, rhs_scale = (x.reshape(-1, x.shape[-1]) for x in spread(1, 3))
        out = _batchable(static)(operands[0], rhs, operands[2], rhs_scale)
        return jnp.moveaxis(out.reshape(m, size, n), 1, 0)
    partner = dataclasses.replace(static, variant=VARIANTS[static.variant].vmap)
    return _batchable(partner)(*spread(0, 1, 2, 3, 4))
