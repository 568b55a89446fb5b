"""Runs quantizing kernels, and the cast in GEMMs, on the CPU: what they compute and touch.

The text that NVRTC gets is compiled by g++ instead, with ptx.cuh of this folder in the place of the
kernels' own: every instruction of a GPU is there, as plain C++. fibers.h runs the threads of a
CTA. So indices, layouts, rounding and synchronisation are those of the kernel; its speed, its
memory's ordering and the instructions themselves are not looked at.

Every buffer lies between guards and every result starts as poison: bytes 0xff, which is a NaN that
no kernel writes. `run` checks the guards; callers compare what a kernel leaves poisoned.
"""

import ctypes
import pathlib
import re
import shutil
import subprocess

import numpy as np

from jax_fp8gemm._bind import native
from jax_fp8gemm._bind.quantize_op import QUANTIZE, CastSpec, attributes

HERE = pathlib.Path(__file__).parent
KERNELS = HERE.parent.parent / "csrc" / "kernels"
FLAGS = (
    "-O1 -std=c++20 -ffp-contract=off -fPIC -shared -fvisibility=hidden -fno-gnu-unique -Wall "
    "-Werror -Wno-unknown-pragmas -fsanitize=alignment,bounds,signed-integer-overflow"
).split()
GUARD = 4096  # bytes on either side
POISON = 0xFF
GRID_Y = 3  # few, so that tiles go on along z

# Fields of QuantizeParams that are not named as the operand is.
FIELDS = {"group_sizes": "group_data"}


def params_type() -> type[ctypes.Structure]:
    """Returns the C++ struct, read from its header."""
    text = (KERNELS / "params.cuh").read_text()
    (body,) = re.findall(r"struct QuantizeParams \{(.*?)\n\};", text, re.S)
    fields = re.findall(r"^ *(?:const )?(\w+)(\*?) (\w+);", body, re.M)
    types = {"*": ctypes.c_void_p, "": ctypes.c_int32}
    return type("Params", (ctypes.Structure,), {"_fields_": [(n, types[p]) for _, p, n in fields]})


Params = params_type()


def specification(spec: CastSpec, dtype, m: int, k: int) -> dict[str, int | str]:
    """Returns the attributes as `native.compile` takes them."""
    found = attributes(spec, dtype, m, k)
    return {k: v if isinstance(v, str) else int(v) for k, v in found.items()}


def build(spec: CastSpec, operands, folder: pathlib.Path) -> ctypes.CDLL:
    """Compiles the kernel for these operands for the CPU, or finds it in `folder`."""
    _, m, k, _ = spec.sizes(operands)
    wanted = specification(spec, operands[0].dtype, m, k)
    own = folder / "_".join(map(str, wanted.values()))
    if not own.exists():
        text = native.compile(wanted)["source"]
        compile_program(f'#include "ptx.cuh"\n{text}\n#include "launch.h"\n', own)
    return load(own)


def compile_program(program: str, own: pathlib.Path) -> None:
    """Compiles a text that includes kernels' headers for the CPU, in a folder of its own."""
    own.mkdir()
    for header in [*KERNELS.glob("*.cuh"), *HERE.glob("*.*h")]:  # ptx.cuh: this folder's
        shutil.copy(header, own)
    (own / "kernel.cpp").write_text(program)
    command = ["g++", *FLAGS, "-o", "kernel.so", "kernel.cpp"]
    done = subprocess.run(command, cwd=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def load(own: pathlib.Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(own / "kernel.so"))
    library.launch.restype = ctypes.c_char_p
    return library


class Buffer:
    """An array between guards, aligned as XLA aligns."""

    def __init__(self, shape, dtype, like=None):
        self.bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        # Sizes and indices beyond a buffer's end would do harm if they were read; so would NaNs.
        self.guard = 0x5A if np.dtype(dtype) == np.int32 else POISON
        self.memory = np.full(self.bytes + 2 * GUARD + 256, self.guard, np.uint8)
        self.start = GUARD + -(self.memory.ctypes.data + GUARD) % 256
        inside = self.memory[self.start : self.start + self.bytes]
        inside[:] = POISON
        self.array = inside.view(dtype).reshape(shape)
        if like is not None:
            self.array[...] = like
        self.address = self.memory.ctypes.data + self.start

    def intact(self) -> bool:
        around = self.memory[: self.start], self.memory[self.start + self.bytes :]
        return all(np.all(part == self.guard) for part in around)


def result_names(spec: CastSpec) -> list[str]:
    """Returns the fields of QuantizeParams that take the results, in order."""
    copies = [name for name in ("rows", "transposed") if getattr(spec, name)]
    last = []
    if spec.source == "swiglu_backward":
        copies += ["up_transposed", "activation"]
        last = ["row_weight_gradient"]
    return [name + part for name in copies for part in ("", "_scale")] + last


def run(
    library: ctypes.CDLL,
    spec: CastSpec,
    operands: list[np.ndarray],
    *,
    reverse: bool,
    harm: dict[str, int] | None = None,
) -> dict[str, np.ndarray]:
    """Runs the kernel on the grid of ffi_quantize.cpp and returns its results by name.

    Args:
      operands: as the kernel takes them, scales in its layout.
      reverse: the last thread first.
      harm: added to fields of QuantizeParams, to see whether errors show.
    """
    named = spec.named(operands)
    inputs = {name: Buffer(x.shape, x.dtype, x) for name, x in named.items()}
    shapes = QUANTIZE.results(spec, operands)
    names = result_names(spec)
    results = {n: Buffer(*result) for n, result in zip(names, shapes, strict=True)}

    batch, m, k, tokens = spec.sizes(operands)
    groups = len(named["group_sizes"]) if spec.grouped else 0
    pitch = tokens if spec.transposed else m
    k = k // 2 if spec.source == "swiglu_backward" else k
    params = Params(m=m, k=k, x_rows=named["x"].shape[1], pitch=pitch, groups=groups, batch=batch)
    params.grid_y = GRID_Y
    for name, buffer in {**inputs, **results}.items():
        setattr(params, FIELDS.get(name, name), buffer.address)
    for name, change in (harm or {}).items():
        setattr(params, name, getattr(params, name) + change)
    message = library.launch(ctypes.byref(params), int(reverse))
    assert not message, message.decode()
    for name, buffer in {**inputs, **results}.items():
        assert buffer.intact(), f"the kernel wrote beyond {name}"
    for name, x in named.items():
        assert inputs[name].array.tobytes() == x.tobytes(), f"the kernel wrote into {name}"
    return {name: buffer.array for name, buffer in results.items()}
