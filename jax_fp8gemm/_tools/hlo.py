"""What a compiled program's text says of each operation: its bytes, and its additions and products.

The text is that of `compiled.as_text()` for a GPU.
"""

import dataclasses
import math
import re

from jax_fp8gemm._bind.native import QUANTIZE_TARGET, TARGET

INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%(\S+) = (.+?) ([\w-]+)\(([^)]*)\)(.*)$")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
CONTRACTED = re.compile(r'lhs_contracting_(?:dims=\{|dimensions":\[)([\d,"]+)')
OUR_SCOPE = re.compile(r"fp8_(?:gemm|quantize)_\w+")  # named scopes of _bind


@dataclasses.dataclass(frozen=True)
class Operation:
    """An instruction of a program.

    Attributes:
      name: of the instruction, which the profiler gives as a kernel's hlo_op.
      opcode: as "fusion"; the target of a custom call.
      label: our named scope, or the name.
      nbytes: of all operands and results, each once.
      flops: of its products of matrices; 0 if it has none.
      dtype: of what these multiply, in XLA's words.
      moves_rows: whether it gathers or scatters.
    """

    name: str
    opcode: str
    label: str
    nbytes: int
    flops: int = 0
    dtype: str = ""
    moves_rows: bool = False


@dataclasses.dataclass(frozen=True)
class _Line:
    """An instruction as its line says it."""

    name: str
    type: str
    opcode: str
    operands: list[str]
    rest: str


def operations(text: str) -> dict[str, Operation]:
    """Returns the operations of a program by name, those inside fusions left out."""
    computations: dict[str, list[_Line]] = {}
    lines: list[_Line] = []
    for line in text.splitlines():
        if line.endswith("{") and line[:1] not in (" ", "}"):
            lines = computations.setdefault(_first_name(line), [])
        elif found := INSTRUCTION.match(line):
            name, type_, opcode, operands, rest = found.groups()
            lines.append(_Line(name, type_, opcode, re.findall(r"%([\w.-]+)", operands), rest))
    types = {line.name: line.type for lines in computations.values() for line in lines}
    called = {name for lines in computations.values() for line in lines for name in _fused(line)}
    return {
        line.name: _operation(line, types, computations)
        for name, lines in computations.items()
        if name not in called
        for line in lines
    }


def _first_name(line: str) -> str:
    """Returns the name of the computation that a line opens; ENTRY's too."""
    return line.removeprefix("ENTRY ").lstrip("%").split(" ")[0]


def _fused(line: _Line) -> list[str]:
    """Returns the computation that a fusion calls; loops and conditionals run theirs as kernels."""
    return re.findall(r"calls=%([\w.-]+)", line.rest) if line.opcode == "fusion" else []


def _operation(line: _Line, types: dict[str, str], computations) -> Operation:
    target = re.search(r'custom_call_target="([^"]+)"', line.rest)
    opcode = target[1] if target else line.opcode
    scope = OUR_SCOPE.findall(line.rest.split("op_name=")[-1].split('" ')[0])
    inside = [one for name in _fused(line) for one in computations.get(name, [])]
    flops, dtype = _products(line, types, inside)
    return Operation(
        name=line.name,
        opcode=opcode,
        label=scope[-1] if scope and opcode in (TARGET, QUANTIZE_TARGET) else line.name,
        nbytes=nbytes(line.type) + sum(nbytes(types.get(name, "")) for name in line.operands),
        flops=flops,
        dtype=dtype,
        moves_rows=any(one.opcode in ("gather", "scatter") for one in (line, *inside)),
    )


def _products(line: _Line, types: dict[str, str], inside: list[_Line]) -> tuple[int, str]:
    """Returns additions and multiplications, and the dtype of what is multiplied."""
    flops, dtype = 0, ""
    for one in (line, *inside):
        ours = f'custom_call_target="{TARGET}"' in one.rest
        contracted = CONTRACTED.search(one.rest)
        if not ours and not contracted:
            continue
        found = arrays(types.get(one.operands[0], "")) if one.operands else []
        if not found:
            continue
        dtype, lhs = found[0]
        out = arrays(one.type)[0][1]
        dims = [-1] if ours or contracted is None else map(int, re.findall(r"\d+", contracted[1]))
        depth = math.prod(lhs[dim] for dim in dims)
        # Each group of a ragged_contracting has its own part of k.
        groups = out[0] if ours and 'variant = "ragged_contracting"' in one.rest else 1
        flops += 2 * math.prod(out) * depth // groups
    return flops, dtype


def arrays(type_: str) -> list[tuple[str, tuple[int, ...]]]:
    """Returns dtype and shape of each array in a type, such as `(f32[2,3]{1,0}, s32[])`."""
    return [
        (dtype, tuple(map(int, dims.split(","))) if dims else ())
        for dtype, dims in ARRAY.findall(type_)
    ]


def nbytes(type_: str) -> int:
    """Returns the bytes of all arrays in a type."""
    total = 0
    for dtype, dims in arrays(type_):
        bits = re.search(r"\d+", dtype)
        total += math.prod(dims) * (int(bits[0]) if bits else 8) // 8  # pred has a byte
    return total
