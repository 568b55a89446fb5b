"""Who may import whom: left to right only, in Python and in C++."""

import ast
import importlib
import inspect
import pathlib
import re

from jax_fp8gemm._bind import native
from jax_fp8gemm._core.variants import VARIANTS

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "jax_fp8gemm"

# The wings in order, and in each wing its files in order: a file imports files of earlier wings and
# earlier files of its own. docs/architecture.md shows this table.
WINGS = {
    "_core": "version errors folders progress extension types layout qarray bits checks groups "
    "variants reference",
    "_select": "problem candidates cost saved choice",
    "_bind": "native gathered shared_blocks partition meshes op merge gemm_op quantize_op",
    "_ops": "casts quantize statistics swiglu gemm weights recipe bf16 matmul ragged_dot "
    "dot_general deep_gemm_utils deep_gemm_operands deep_gemm_dense deep_gemm_grouped",
    "_moe": "ordered gate order routing balance exchange activations kernels weights placement "
    "router block unfused experts_bf16 experts ffn layer",
    "_flax": "linen_moe nnx_moe",
    "_checkpoint": "header folder sources placing microscaled pairs arrays quantization "
    "reader writer joined tables parameters export",
    "_tools": "timing operands shapes hlo profile problems programs warm measure tune",
}
WINGS = {wing: files.split() for wing, files in WINGS.items()}
DOORS = ["__init__", "linen", "nnx", "checkpoint", "deep_gemm", "tuning", "__main__"]

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
    ["producer.cuh", "inspector.cuh", "epilogue.cuh", "rhs_cast.cuh"],
    ["quantize_whole_rows.cuh", "swiglu_backward.cuh", "exchange.cuh"],
    ["quantize.cuh"],
    ["gemm.cuh", "gemm_few_rows.cuh"],
]


def place(path: pathlib.Path) -> tuple[str, str]:
    """Returns the wing and the file of a module; a door has no wing."""
    parent = path.parent.name
    return ("" if parent == PACKAGE.name else parent), path.stem


def imports(path: pathlib.Path) -> set[tuple[str, str]]:
    """Returns (wing, file) of every module of the package that `path` imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(PACKAGE.name):
            continue
        wing, *file = node.module.split(".")[1:] or [""]
        names = file or [alias.name for alias in node.names]
        found |= {(wing, name) for name in names}
    return found


def test_every_file_has_a_place():
    for path in PACKAGE.rglob("*.py"):
        wing, file = place(path)
        assert file in (WINGS[wing] + ["__init__"] if wing else DOORS), path


def test_python_imports_go_one_way():
    order = list(WINGS)
    for path in PACKAGE.rglob("*.py"):
        wing, file = place(path)
        if not wing or file == "__init__":
            continue
        for other, name in imports(path) - {("", "_ext")}:
            assert other in order, f"{wing}/{file} imports a door: {other}/{name}"
            if other == wing:
                assert WINGS[wing].index(name) < WINGS[wing].index(file), f"{file} -> {name}"
            else:
                assert order.index(other) < order.index(wing), f"{wing}/{file} -> {other}/{name}"


def test_doors_do_not_import_doors():
    for path in PACKAGE.glob("*.py"):
        assert not {name for wing, name in imports(path) if not wing} & set(DOORS), path


def test_one_file_imports_the_extension():
    found = [
        path.stem
        for path in PACKAGE.rglob("*.py")
        if re.search(r"import.*\b_ext\b", path.read_text())
    ]
    assert found == ["extension"]


def test_only_public_jax_is_used():
    for path in PACKAGE.rglob("*.py"):
        assert "jax._src" not in path.read_text(), path


def test_no_module_is_hidden_by_a_name_of_its_package():
    for wing in ("", *WINGS):
        package = importlib.import_module(".".join(filter(None, (PACKAGE.name, wing))))
        for path in (PACKAGE / wing).glob("*.py"):
            named = getattr(package, path.stem, None)
            assert path.stem == "__init__" or named is None or inspect.ismodule(named), path


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
    assert names == list(VARIANTS) == list(native.variant_names())


def test_flax_is_needed_by_its_layers_alone():
    importing = r"(?m)^\s*(from|import) flax"
    found = {
        place(path) for path in PACKAGE.rglob("*.py") if re.search(importing, path.read_text())
    }
    assert found == {("", "linen"), ("", "nnx"), ("_flax", "linen_moe"), ("_flax", "nnx_moe")}
