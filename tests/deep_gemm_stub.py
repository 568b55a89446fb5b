"""DeepGEMM and the little of torch that its adapter uses, on a CPU: layouts are checked."""

import types

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jax_fp8gemm._core import reference
from jax_fp8gemm._core.layout import BLOCKS, ROW_BLOCKS


class Tensor:
    """An array that is written in place."""

    def __init__(self, array, aligned: bool = False):
        self.array, self.aligned = np.array(array), aligned

    def view(self, dtype) -> "Tensor":
        return Tensor(self.array.view(dtype))

    def flatten(self) -> "Tensor":
        return Tensor(self.array.reshape(-1))

    def contiguous(self) -> "Tensor":
        return self

    def zero_(self) -> None:
        self.array[...] = 0

    def __dlpack__(self, **how):
        return jnp.asarray(self.array).__dlpack__(**how)

    def __dlpack_device__(self):
        return jnp.asarray(self.array).__dlpack_device__()


def torch() -> types.ModuleType:
    made = types.ModuleType("torch")
    made.float32, made.int32, made.uint8 = np.float32, np.int32, np.uint8
    made.bfloat16, made.float8_e4m3fn = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
    made.zeros = lambda shape, dtype, device: Tensor(np.zeros(shape, dtype))
    made.tensor = lambda values, dtype, device: Tensor(np.array(values, dtype))
    made.from_dlpack = Tensor
    made.cuda = types.SimpleNamespace(synchronize=lambda: None, empty_cache=lambda: None)
    return made


def real(pair, rows: slice | int, tile=ROW_BLOCKS) -> np.ndarray:
    q, scale = (x.array[rows] for x in pair)
    return np.asarray(reference.dequantize(jnp.asarray(q), jnp.asarray(scale), tile), np.float64)


def deep_gemm() -> types.ModuleType:
    made = types.ModuleType("deep_gemm")
    made.__version__ = "0.stub"
    made.get_mn_major_tma_aligned_tensor = lambda scale: Tensor(scale.array, aligned=True)
    made.fp8_gemm_nt = fp8_gemm_nt
    made.m_grouped_fp8_gemm_nt_contiguous = contiguous
    made.m_grouped_fp8_gemm_nt_masked = masked
    made.k_grouped_fp8_gemm_nt_contiguous = k_grouped
    return made


def fp8_gemm_nt(lhs, rhs, out, c=None, recipe=None) -> None:
    assert lhs[1].aligned and rhs[1].aligned == (recipe == (1, 1, 128))
    tile = ROW_BLOCKS if recipe == (1, 1, 128) else BLOCKS
    product = real(lhs, slice(None)) @ real(rhs, slice(None), tile).T
    assert c is None or (c is out and out.array.dtype == np.float32)
    out.array[...] = product + (0 if c is None else c.array)


def contiguous(lhs, rhs, out, groups) -> None:
    assert lhs[1].aligned and len(groups.array) == len(lhs[0].array) == len(out.array)
    for block in range(0, len(groups.array), 128):  # of one group; what is behind it is padding
        group = groups.array[block]
        assert set(groups.array[block : block + 128]) <= {group, -1}
        rows = slice(block, block + 128)
        out.array[rows] = real(lhs, rows) @ real(rhs, group, BLOCKS).T


def masked(lhs, rhs, out, sizes, expected) -> None:
    assert lhs[1].aligned and expected > 0
    for group, size in enumerate(sizes.array):
        out.array[group, :size] = (real(lhs, group) @ real(rhs, group, BLOCKS).T)[:size]


def k_grouped(lhs, rhs, out, sizes, sizes_tensor, c) -> None:
    assert c is out and list(sizes_tensor.array) == sizes
    assert all(type(size) is int and size % 128 == 0 for size in sizes)
    start = 0
    for group, size in enumerate(sizes):
        sides = []
        for (q, scale), rows in ((lhs, out.array.shape[1]), (rhs, out.array.shape[2])):
            assert scale.aligned
            part = q.array[start * rows : (start + size) * rows].reshape(rows, size)
            scales = scale.array[:, start // 128 : (start + size) // 128]
            sides.append(real((Tensor(part), Tensor(scales)), slice(None)))
        out.array[group] += sides[0] @ sides[1].T
        start += size
