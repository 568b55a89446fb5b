"""Shows that the soak finds faults: builds the package with one in a kernel, and soaks that.

python tests/soak/plant.py --seconds 25     # every fault, in a scratch copy of the sources

The package itself is not touched. What came of it is stored in the record, under "planted". It is
an error if a fault is not found.
"""

import argparse
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(1, str(HERE.parent))

from soak import record  # noqa: E402

from jax_fp8gemm._select.choice import file_name  # noqa: E402

BUILT_FROM = ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "cmake", "csrc",
              "jax_fp8gemm")  # fmt: skip

# By name: the file of csrc/kernels, and what is replaced by what. Each place is there once.
FAULTS: dict[str, tuple[str, dict[str, str]]] = {
    # One value of the first block of every persistent kernel.
    "wrong_element": ("gemm.cuh", {
        "  FP8GEMM_DEVICE void store() {\n":
        "  FP8GEMM_DEVICE void store() {\n"
        "    float& one = sums[kSubTile][0];\n"
        "    if (finished.m + finished.n == 0 && threadIdx.x == 5) one = 2 * one + 1;\n",
    }),
    # Row 5 of every matrix is not written, where results go straight from registers.
    "dropped_row": ("epilogue.cuh", {
        "columns(block.m + row < block.m_end ?":
        "columns(block.m + row < block.m_end && block.m + row != 5 ?",
    }),
    # The warpgroups of the kernel for few rows do not wait for each other's sums. One of them has
    # a step less wherever the number of steps is odd, so it does not even come late.
    "missing_barrier": ("gemm_few_rows.cuh", {
        "    if constexpr (spec.split_k == 1) bar_sync(kExchangeFree, kMathThreads);\n": "",
        "      bar_sync(kExchangeFull, kMathThreads);\n": "",
    }),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=25, help="of the soak of each fault")
    parser.add_argument("--plant", choices=FAULTS, help="this fault alone")
    parser.add_argument("--record", help="as of run.py")
    args = parser.parse_args()
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        copy_sources(scratch / "tree")
        for name in [args.plant] if args.plant else FAULTS:
            print(f"{name}: builds", flush=True)
            plant(scratch / "tree", name)
            build(scratch / "tree", scratch / name)
            if not soak(name, scratch / name, args):
                missed.append(name)
    print("every fault was found" if not missed else f"not found: {', '.join(missed)}")
    return bool(missed)


def copy_sources(tree: pathlib.Path) -> None:
    tree.mkdir()
    for name in BUILT_FROM:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tree / name)


def plant(tree: pathlib.Path, name: str) -> None:
    """Puts one fault into the kernels, and takes any other out."""
    shutil.rmtree(tree / "csrc/kernels")
    shutil.copytree(ROOT / "csrc/kernels", tree / "csrc/kernels")
    file, replaced = FAULTS[name]
    path = tree / "csrc/kernels" / file
    text = path.read_text()
    for old, new in replaced.items():
        if text.count(old) != 1:
            raise RuntimeError(f"{name}: {file} has {old!r} {text.count(old)} times, not once")
        text = text.replace(old, new)
    path.write_text(text)


def build(tree: pathlib.Path, target: pathlib.Path) -> None:
    """Installs the package of `tree` into the folder `target`."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    if importlib.util.find_spec("scikit_build_core"):  # else pip fetches it
        command.append("--no-build-isolation")
    command += ["--target", str(target), str(tree)]
    subprocess.run(command, check=True, timeout=300)


def soak(name: str, package: pathlib.Path, args: argparse.Namespace) -> bool:
    """Returns whether the soak of that package finds wrong results, and stores its run."""
    path = package.with_suffix(".json")
    command = [sys.executable, "-S", str(HERE / "run.py"), "--seconds", str(args.seconds)]
    command += ["--planted", name, "--record", str(path)]
    environment = {
        **os.environ,
        # -S and these paths: what an editable install does at the start would hide the package.
        "PYTHONPATH": os.pathsep.join([str(package), *sys.path[1:]]),
        "JAX_FP8GEMM_CACHE_DIR": str(package.with_suffix(".cache")),
    }
    subprocess.run(command, env=environment, timeout=600)
    (row,) = record.read(path)["planted"]
    row["wrong"] = sum(one["what"] != "raises" for one in row["found"])
    stored = stored_path(row, args.record)
    record.write(stored, merged(record.read(stored), row))
    print(f"{name}: {row['faults']} faults, {row['wrong']} of those described are wrong results")
    return row["wrong"] > 0


def stored_path(row: dict, chosen: str | None) -> pathlib.Path:
    """Returns where the run belongs: the record of its card."""
    if chosen:
        return pathlib.Path(chosen)
    return ROOT / f"benchmarks/results/{file_name(row['device'].split(',')[0])}-soak.json"


def merged(stored: dict, row: dict) -> dict:
    """Returns the record with this run in place of one of the same fault."""
    others = [one for one in stored["planted"] if one["planted"] != row["planted"]]
    return {**stored, "planted": [*others, {**row, "found": row["found"][:1]}]}


if __name__ == "__main__":
    sys.exit(main())
