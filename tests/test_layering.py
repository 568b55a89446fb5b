"""Who may import whom: left to right only, in Python and in C++."""

import ast
import pathlib
import re

from jax_fp8gemm import _native
from jax_fp8gemm.variants import VARIANTS

ROOT = pathlib.Path(__file__).parent.parent
PYTHON = [
    "errors",
    "qarray",
    "variants",
    "reference",
    "_native",
    "config",
    "sharding",
    "meshes",
    "primitives",
    "quantize_primitive",
    "kernel_level",
    "quantizing",
    "prepared",
    "ops",
    "dot_general",
    "routing",
    "expert_parallel",
    "expert_weights",
    "experts",
    "moe",
    "linen",
    "nnx",
]
LEAVES = ["deep_gemm", "checkpoint", "tuning", "__init__", "__main__"]  # nothing imports them
HOST = [
    ["params.cuh", "status.h", "files.h", "kernel_sources.h"],
    ["plan.cuh"],
    ["attributes.h", "driver.h", "disk_cache.h"],
    ["tensor_map.h", "jit.h"],
    ["gemm_spec.h", "quantize_spec.h", "ffi_common.h", "ffi_buffers.h"],
    ["ffi_gemm.h", "ffi_quantize.h"],
]
DEVICE = [
    ["params.cuh"],
    ["plan.cuh"],
    ["ptx.cuh"],
    ["ptx_arithmetic.cuh"],
    ["shared_memory.cuh"],
    ["group_walk.cuh", "promotion.cuh"],
    ["scheduler.cuh", "quantize_source.cuh", "quantize_scale.cuh"],
    ["producer.cuh", "epilogue.cuh", "rhs_cast.cuh"],
    ["quantize_whole_rows.cuh", "swiglu_backward.cuh", "exchange.cuh"],
    ["quantize.cuh"],
    ["gemm.cuh", "gemm_few_rows.cuh"],
]


def test_python_imports_go_one_way():
    for path in (ROOT / "jax_fp8gemm").glob("*.py"):
        if path.stem in LEAVES:
            continue
        assert path.stem in PYTHON, f"{path.name} has no place in the order"
        for imported in imports(path):
            assert PYTHON.index(imported) < PYTHON.index(path.stem), f"{path.stem} -> {imported}"


def imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "jax_fp8gemm":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jax_fp8gemm."):
            found.add(node.module.split(".")[1])
    return found - {"_ext"}


def test_only_native_imports_the_extension():
    for path in (ROOT / "jax_fp8gemm").glob("*.py"):
        assert "_ext" not in path.read_text() or path.stem == "_native", path.name


def test_only_public_jax_is_used():
    for path in (ROOT / "jax_fp8gemm").glob("*.py"):
        assert "jax._src" not in path.read_text(), path.name


def includes(path: pathlib.Path) -> list[str]:
    return [pathlib.Path(name).name for name in re.findall(r'#include "(.+)"', path.read_text())]


def check_includes(layers: list[list[str]], files) -> None:
    level = {name: i for i, names in enumerate(layers) for name in names}
    for path in files:
        for name in includes(path):
            if name in level and path.name in level:
                assert level[name] < level[path.name], f"{path.name} -> {name}"


def test_cpp_includes_go_one_way():
    check_includes(HOST, (ROOT / "csrc").glob("*.h"))
    kernels = list((ROOT / "csrc/kernels").glob("*.cuh"))
    check_includes(DEVICE, kernels)
    assert {path.name for path in kernels} == {name for names in DEVICE for name in names}


def test_device_asm_is_in_two_files():
    for path in (ROOT / "csrc/kernels").glob("*.cuh"):
        if path.name not in ("ptx.cuh", "ptx_arithmetic.cuh"):
            assert not re.search(r"\basm\b.*\(", path.read_text()), path.name


def test_the_table_of_variants_is_one():
    enum = re.search(
        r"enum class Variant : int \{ (.+) \};", (ROOT / "csrc/kernels/params.cuh").read_text()
    )
    names = [re.sub(r"(?<!^)([A-Z])", r"_\1", name[1:]).lower() for name in enum[1].split(", ")]
    assert names == list(VARIANTS) == list(_native.variant_names())


def test_flax_is_needed_by_its_layers_alone():
    importing = r"(?m)^\s*(from|import) flax"
    files = (ROOT / "jax_fp8gemm").glob("*.py")
    found = {path.stem for path in files if re.search(importing, path.read_text())}
    assert found == {"linen", "nnx"}
