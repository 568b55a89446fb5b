"""tokamax's own RaggedDotTestBase, from its wheel, over the adapter.

Three things differ from how tokamax runs it. Results are judged as FP8's, by calc_diff. Precisions
above FP8's are asked for as the default. The cases of quantized operands get a small one. The
cases named bench are left out, because their sizes are those of a GPU.
"""

import functools
import importlib.util
import pathlib
import unittest
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import qwix
import tokamax
from tokamax._src.ops.ragged_dot import test_base

ADAPTER = pathlib.Path(__file__).parents[2] / "examples/adapters/tokamax_ragged_dot.py"
spec = importlib.util.spec_from_file_location("tokamax_ragged_dot", ADAPTER)
adapter = importlib.util.module_from_spec(spec)
spec.loader.exec_module(adapter)

FP8_DIFF = 3e-3  # of products and gradients of normal numbers, each operand rounded to E4M3


def close(actual, expected, **_) -> None:
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        total = np.sum(a * a + b * b)
        assert total == 0 or np.sum((a - b) ** 2) / total < FP8_DIFF


@functools.partial(jax.jit, static_argnames=("preferred_element_type", "activation"))
def run(lhs, rhs, group_sizes, *, preferred_element_type=None, activation=None):
    how = {"activation": activation, "implementation": [adapter.fp8_implementation]}
    return tokamax.ragged_dot(lhs, rhs, group_sizes, None, preferred_element_type, **how)


def dot_fn(lhs, rhs, *, group_sizes, precision=None, **kw):
    del precision
    try:
        return run(lhs, rhs, getattr(group_sizes, "value", group_sizes), **kw)
    except NotImplementedError as error:
        raise unittest.SkipTest(f"refused: {error}") from error


class Fp8RaggedDotTest(test_base.RaggedDotTestBase):
    def __init__(self, *args):
        super().__init__(*args, dot_fn=dot_fn)

    def setUp(self):
        super().setUp()
        if "test_bench" in self._testMethodName:
            self.skipTest("left out: the sizes of a GPU")
        patch = mock.patch.object(chex, "assert_trees_all_close", close)
        patch.start()
        self.addCleanup(patch.stop)

    def _test_quantized(self, a_dtype, b_dtype, a_tile_shape, *args, **kw):
        w = qwix.quantize(jnp.ones((2, 8, 8)), b_dtype, channelwise_axes=(0, 2))
        x = jnp.ones((8, 8))
        dot_fn(x, w, group_sizes=jnp.array([4, 4]))
        self.fail("a quantized operand was taken")
