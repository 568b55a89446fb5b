"""Compares lowered programs before and after a change: does restructuring change what XLA gets?

    python tests/compare_programs.py dump FOLDER       one file per program and platform
    python tests/compare_programs.py compare OLD NEW   lists the files that differ; 1 if any does

Run `dump` in both checkouts. `compare` reads text alone. What it does not count as a difference:

- Names of functions inside a program (@local, @gemm_…): they are numbered as they appear. Shared
  helper functions are emitted in the order of use, so their order still counts.
- The address of a partitioning callback: it is another one in every process.
- Places in source files (loc), which exported programs carry.
- Names of results (jax.result_info): they follow the fields of a NamedTuple.
- `IGNORED` attributes of the custom calls, each with its reason.
"""

import difflib
import os
import pathlib
import re
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

# Attributes of the custom calls that one side may have and the other not.
IGNORED = {
    "shared_bytes": "memory plan: follows from the spec, csrc/kernels/plan.cuh",
    "store": "memory plan: likewise",
    "aligned": "whether rows of a GEMM's result are whole 16 bytes; `store` followed from it",
    "num_sms": "stored only where the user limits it",
    "pair": "whether a bf16 rhs lies in two arrays; was seen from shapes",
}

# Programs that may differ, with the reason: since the last release.
ROUTER = "the router's products are of bf16 parts, and its sort has narrower keys"
EXPECTED = {
    "moe_casts": "a bf16 rhs has operands of its own; its second array stood in the scale's place",
    "ragged_casts": "likewise",
    "permute": "its sort has narrower keys, and rows are counted without a scatter",
    **dict.fromkeys(("moe", "moe_grad", "moe_capacity", "moe_sigmoid"), ROUTER),
    **dict.fromkeys(("experts_all_gather", "experts_all_to_all"), ROUTER),
}


def programs() -> dict:
    """Returns the representative programs: name -> (function, arguments)."""
    import functools

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    import jax_fp8gemm as fp8

    bf16, f32, i32 = jnp.bfloat16, jnp.float32, jnp.int32

    def shape(*dims, dtype=bf16, at=None):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=at)

    def total(f):
        return lambda *a: jnp.sum(jax.tree.leaves(f(*a))[0].astype(f32) ** 2)

    def grad(f, *argnums):
        return jax.grad(total(f), argnums or (0, 1))

    def q(*dims, tile=(1, 128)):
        return fp8.quantize(jnp.ones(dims), tile)

    x, w = shape(256, 512), shape(512, 384, dtype=f32)
    found = {
        "matmul": (fp8.fp8_matmul, (x, w)),
        "matmul_grad": (grad(fp8.fp8_matmul), (x, w)),
        "matmul_grad_tokens": (grad(fp8.fp8_matmul), (shape(4, 128, 512), w)),
        "matmul_odd": (grad(fp8.fp8_matmul), (shape(3, 37, 100), shape(100, 72))),
        "matmul_vmap_rows": (jax.vmap(fp8.fp8_matmul, (0, None)), (shape(3, 64, 512), w)),
        "matmul_vmap_both": (
            jax.vmap(grad(fp8.fp8_matmul)), (shape(3, 64, 512), shape(3, 512, 384))
        ),
        "matmul_prepared": (
            lambda x, w: grad(lambda x, w: fp8.fp8_matmul(x, fp8.prepare_weight(w)))(x, w), (x, w)
        ),
        "dot_general": (
            grad(lambda a, b: fp8.fp8_dot_general(a, b, (((2,), (0,)), ((), ())))),
            (shape(2, 64, 512), shape(512, 4, 32)),
        ),
    }  # fmt: skip
    for residuals in ("fp8", "input"):
        call = functools.partial(fp8.fp8_matmul, residuals=residuals)
        found[f"matmul_{residuals}"] = (grad(call), (x, w))
    sizes = shape(4, dtype=i32)
    for name, dtype in (("copies", f32), ("casts", bf16)):
        rhs = shape(4, 512, 384, dtype=dtype)
        found[f"ragged_{name}"] = (grad(fp8.fp8_ragged_dot), (shape(300, 512), rhs, sizes))
    found["remat_scan"] = (
        grad(
            lambda x, w: jax.lax.scan(
                lambda y, w: (jax.checkpoint(fp8.fp8_matmul)(y, w).astype(bf16), None), x, w
            )[0]
        ),
        (x, shape(3, 512, 512)),
    )
    # Kernel level: every variant, every cast.
    lhs, rhs = q(256, 512), q(384, 512, tile=(128, 128))
    many, matrices = q(4, 256, 512), q(4, 384, 512, tile=(128, 128))
    rows = jnp.zeros(256, i32)
    found |= {
        "gemm_dense": (fp8.gemm, (lhs, rhs)),
        "gemm_batched": (functools.partial(fp8.gemm, variant="batched"), (many, matrices)),
        "gemm_init": (
            lambda a, b, c: fp8.gemm(a, b, init=c, out_dtype=f32),
            (lhs, rhs, shape(256, 384, dtype=f32)),
        ),
        "gemm_ragged": (functools.partial(fp8.gemm, variant="ragged"), (lhs, matrices, sizes)),
        "gemm_masked": (functools.partial(fp8.gemm, variant="masked"), (many, matrices, sizes)),
        "gemm_contiguous": (
            lambda a, b, g: fp8.gemm(a, b, groups=g, variant="contiguous"), (lhs, matrices, rows)
        ),
        "gemm_contracting": (
            lambda a, b, s: fp8.gemm(a, b, s, variant="ragged_contracting", out_dtype=f32),
            (lhs, q(128, 512), sizes),
        ),
        "gemm_rows": (fp8.gemm, (q(256, 512, tile=(1, None)), q(384, 512, tile=(1, None)))),
        "gemm_sms": (functools.partial(fp8.gemm, num_sms=20), (lhs, rhs)),
        "gemm_vmap": (jax.vmap(fp8.gemm, (0, None)), (many, rhs)),
        "gemm_vmap_columns": (jax.vmap(fp8.gemm, (None, 0)), (lhs, matrices)),
        "quantize": (fp8.quantize, (x,)),
        "quantize_none": (functools.partial(fp8.quantize, scale_rounding="none"), (x,)),
        "quantize_weight": (lambda w: fp8.quantize_both(w, (128, 128)), (w,)),
        "quantize_groups": (lambda x, s: fp8.quantize_both(x, group_sizes=s), (x, sizes)),
        "quantize_gather": (
            lambda x, s, i: fp8.quantize_both(x, group_sizes=s, index=i),
            (x, sizes, shape(700, dtype=i32)),
        ),
        "quantize_vmap": (jax.vmap(lambda x: fp8.quantize_both(x)), (shape(3, 256, 512),)),
        "requantize": (fp8.requantize, (lhs,)),
        "dequantize": (fp8.dequantize, (lhs,)),
        "swiglu": (fp8.swiglu_quantize_both, (x, shape(256, dtype=f32))),
        "swiglu_backward": (
            fp8.swiglu_backward, (lhs, shape(256, 256), shape(256, dtype=f32), sizes)
        ),
    }  # fmt: skip

    # A mixture of experts.
    e, h, f, t = 4, 256, 384, 128

    def layer(x, gate, wi_0, wi_1, wo, **options):
        kernels = fp8.ExpertKernels(wi_0=wi_0, wi_1=wi_1, wo=wo)
        return fp8.moe(x, gate, kernels, top_k=2, **options)[0]

    def parameters(dtype, experts=e, at=None):
        wi = shape(experts, h, f, dtype=dtype, at=at)
        return wi, wi, shape(experts, f, h, dtype=dtype, at=at)

    gate = shape(h, e, dtype=f32)
    moe_grad = grad(layer, 0, 1, 2, 4)
    capped = functools.partial(layer, capacity_factor=1.25)
    sigmoid = functools.partial(layer, score_function="sigmoid", routed_scaling_factor=2.5)
    found |= {
        "moe": (layer, (shape(t, h), gate, *parameters(f32))),
        "moe_grad": (moe_grad, (shape(t, h), gate, *parameters(f32))),
        "moe_casts": (moe_grad, (shape(t, h), gate, *parameters(bf16))),
        "moe_capacity": (grad(capped, 0, 1, 2, 4), (shape(t, h), gate, *parameters(f32))),
        "moe_sigmoid": (sigmoid, (shape(t, h), gate, *parameters(f32))),
        "permute": (lambda x, i: fp8.permute(x, i, e), (shape(t, h), shape(t, 2, dtype=i32))),
    }

    # Meshes.
    auto = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def placed(*dims, spec, dtype=bf16):
        return shape(*dims, dtype=dtype, at=NamedSharding(auto, P(*spec)))

    found["sharded_matmul"] = (
        grad(fp8.fp8_matmul),
        (placed(512, 512, spec=("data",)), placed(512, 512, spec=("data", "model"), dtype=f32)),
    )
    expert = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    split = P("x")
    routing = (split, split, split, P(), P())
    for exchange in ("all_gather", "all_to_all"):

        def part(x, gate, wi_0, wi_1, wo, exchange=exchange):
            kernels = fp8.ExpertKernels(wi_0=wi_0, wi_1=wi_1, wo=wo)
            y, r = fp8.moe(x, gate, kernels, top_k=2, expert_axis="x", exchange=exchange)
            return y, tuple(jax.tree.leaves(r))

        whole = jax.shard_map(
            part,
            mesh=expert,
            in_specs=(split, P(), split, split, split),
            out_specs=(split, routing),
        )
        arguments = (shape(4 * t, h), shape(h, 8, dtype=f32), *parameters(f32, 8))
        found[f"experts_{exchange}"] = (grad(whole, 0, 1, 2, 4), arguments)
    del np
    return found


def dump(folder: pathlib.Path) -> None:
    import jax
    from jax.sharding import AxisType

    import jax_fp8gemm as fp8

    folder.mkdir(parents=True, exist_ok=True)
    for name, (function, arguments) in programs().items():
        traced = jax.jit(function).trace(*arguments)
        for platform in ("cpu", "cuda"):
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            (folder / f"{name}.{platform}.mlir").write_text(text)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        x = jax.device_put(jax.numpy.ones((512, 512)), jax.P("data"))
        w = jax.device_put(jax.numpy.ones((512, 256)), jax.P(None, "model"))
        gradient = jax.grad(lambda x, w: fp8.fp8_matmul(x, w).sum(), (0, 1))
        text = jax.jit(gradient).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
        (folder / "explicit.cuda.mlir").write_text(text)
    exported = jax.export.export(
        jax.jit(fp8.fp8_matmul), platforms=("cpu", "cuda"), disabled_checks=fp8.EXPORT_CHECKS
    )(jax.numpy.ones((32, 64)), jax.numpy.ones((64, 48)))
    (folder / "export.both.mlir").write_text(exported.mlir_module())
    print(f"{len(list(folder.iterdir()))} programs in {folder}")


def normalized(text: str) -> list[str]:
    names: dict[str, str] = {}

    def number(match) -> str:
        if match[0] in ("@main", "@Sharding") or match[0].startswith("@jax_fp8gemm_"):
            return match[0]
        return names.setdefault(match[0], f"@f{len(names)}")

    text = re.sub(r'@"?[A-Za-z_][\w.<>]*"?', number, text)
    text = re.sub(r'(backend_config|has_side_effect_ptr) = "\d{6,}"', r'\1 = "pointer"', text)
    text = re.sub(r"(?m)^#loc.*\n| loc\((#\w+|unknown|\"[^\n]*)\)", "", text)
    text = re.sub(r'jax\.result_info = "[^"]*"', 'jax.result_info = ""', text)
    for name in IGNORED:
        if "source =" not in text or name not in ("aligned", "pair"):
            text = re.sub(rf"\b{name} = (\"\w+\"|\d+)( : i64)?,? ?", "", text)
        else:  # casts have attributes of these names, too
            lines = text.split("\n")
            for i, line in enumerate(lines):
                if "@jax_fp8gemm_gemm" in line:
                    lines[i] = re.sub(rf"\b{name} = \d+( : i64)?,? ?", "", line)
            text = "\n".join(lines)
    return [line.replace(", }", "}") for line in text.split("\n")]


def compare(old: pathlib.Path, new: pathlib.Path) -> int:
    names = sorted({path.name for folder in (old, new) for path in folder.iterdir()})
    differing = 0
    for name in names:
        if not (old / name).exists() or not (new / name).exists():
            print(f"{name}: only in {'new' if (new / name).exists() else 'old'}")
            differing += 1
            continue
        a, b = (normalized((folder / name).read_text()) for folder in (old, new))
        if a != b and name.split(".")[0] in EXPECTED:
            print(f"{name}: differs as expected: {EXPECTED[name.split('.')[0]]}")
        elif a != b:
            differing += 1
            lines = list(difflib.unified_diff(a, b, lineterm="", n=0))
            print(f"{name}: {len(lines)} lines differ")
            print("\n".join(line[:400] for line in lines[:6]))
    print(f"{differing} of {len(names)} programs differ")
    return 1 if differing else 0


def main() -> int:
    verb, *folders = sys.argv[1:]
    paths = [pathlib.Path(folder) for folder in folders]
    if verb == "dump":
        dump(*paths)
        return 0
    return compare(*paths)


if __name__ == "__main__":
    sys.exit(main())
