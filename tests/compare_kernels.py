"""Tells whether a change of the sources changes any kernel's machine code.

    python tests/compare_kernels.py dump OLD          # before the change
    python tests/compare_kernels.py dump NEW          # after it
    python tests/compare_kernels.py compare OLD NEW   # exits with 1 where a kernel differs

`dump` compiles the kernels that test_compiler.py and test_quantize_kernels.py compile: every GEMM
config that can be reached, and the casts. It writes one file for each, named by what the kernel
computes and how, not by the attributes of the custom call. A file holds what nvdisasm shows of the
cubin, in these sections:

  .text          instructions, with the bytes that encode them
  .nv.info       registers, barriers, stack, size of the parameters
  .nv.shared     static shared memory
  .nv.constant0  the parameters

Left out, since they name the compile-time specification, whose fields may change:
symbols and their sizes; numbers of labels outside the code; the tables of constants
(.nv.global, .nv.constant4), which hold every static constexpr member although no instruction reads
them; and debug information.
"""

import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

KEPT = (".text", ".nv.info", ".nv.shared", ".nv.constant0")
THREADS = 2


def gemm_key(problem, config) -> str:
    """Returns a file name for a GEMM kernel."""
    row_bytes = problem.n * (4 if problem.out == "f32" else 2)
    parts = [
        config.kernel,
        problem.variant,
        problem.scales,
        problem.rhs,
        problem.out,
        "accumulate" if problem.accumulate else "assign",
        f"{config.block_m}x{config.block_n}",
        f"stages{config.stages}",
        f"multicast_{config.multicast}",
        f"split{config.split_k}",
        f"group{config.group_m}",
        "aligned" if row_bytes % 16 == 0 else "unaligned",
    ]
    return "gemm-" + "-".join(parts)


def cast_key(attributes: dict) -> str:
    return "cast-" + "-".join(f"{name}_{attributes[name]}" for name in sorted(attributes))


def all_kernels() -> dict[str, dict]:
    """Returns the attributes of every kernel by its file name."""
    import test_compiler
    import test_quantize_kernels as casts

    found = {
        gemm_key(problem, config): test_compiler.attributes(problem, config)
        for problem, config in test_compiler.reachable()
    }
    for spec, k in casts.SIZES:
        wanted = casts.emulate.specification(*spec, 512, k)
        found[cast_key(wanted)] = wanted
    return found


def normalized(sass: str) -> str:
    """Returns the kept sections of nvdisasm's text, without what names the specification."""
    lines, keeps = [], False
    for line in sass.splitlines():
        section = re.match(r"\s*\.section\s+([\w.]+)", line)
        if section:
            keeps = section[1].startswith(KEPT)
        if line.startswith("//---"):
            keeps = False
        if not keeps or re.match(r"\s*(\.type|\.size|\.other|\.L_\d+:)", line):
            continue
        line = re.sub(r"\b_Z\w+", "SYMBOL", line)
        line = re.sub(r"\.L_\d+", ".L", line)  # of tables; those of code are .L_x_0
        lines.append(line.rstrip())
    return "\n".join(lines) + "\n"


def disassembled(cubin: bytes, tool: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-hex", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def dump(folder: pathlib.Path, kernels: dict[str, dict]) -> None:
    import test_compiler

    from jax_fp8gemm._core.extension import extension

    tool = test_compiler.disassembler()
    if tool is None:
        sys.exit("nvdisasm is not installed: pip install nvidia-cuda-nvdisasm")
    folder.mkdir(parents=True, exist_ok=True)

    def write(name: str) -> None:
        made = extension.compile(kernels[name])
        used = re.findall(r"Used .*|\d+ bytes stack frame.*", made["log"])
        text = "\n".join(used) + "\n" + normalized(disassembled(made["cubin"], tool))
        (folder / f"{name}.sass").write_text(text)

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(write, kernels))
    print(f"{len(kernels)} kernels")


def compare(old: pathlib.Path, new: pathlib.Path) -> bool:
    """Prints the kernels that differ or are missing; returns whether all are the same."""
    before, after = ({file.name for file in folder.glob("*.sass")} for folder in (old, new))
    different = [
        name
        for name in sorted(before & after)
        if (old / name).read_bytes() != (new / name).read_bytes()
    ]
    for what, names in (
        ("differs", different),
        ("only in the old folder", sorted(before - after)),
        ("only in the new folder", sorted(after - before)),
    ):
        for name in names:
            print(f"{what}: {name}")
    print(f"{len(before & after)} compared, {len(different)} differ, {len(before ^ after)} missing")
    return before == after and not different and bool(before)


def main() -> None:
    match sys.argv[1:]:
        case ["dump", folder]:
            dump(pathlib.Path(folder), all_kernels())
        case ["compare", old, new]:
            sys.exit(0 if compare(pathlib.Path(old), pathlib.Path(new)) else 1)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
