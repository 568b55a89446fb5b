"""Flax's own tests of its linear layers, from its source package, with FP8 products in the layers.

What FP8 does not take is refused, and counted as such. Results are judged as FP8's, by calc_diff.
"""

import contextlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import changed, chosen, close, imported, refused
from flax import nnx
from flax.linen import linear
from jax import lax

from jax_fp8gemm import fp8_dot_general

theirs = imported("FLAX_TESTS", "linen/linen_linear_test.py")
theirs_nnx = imported("FLAX_TESTS", "nnx/nn/linear_test.py")
products = []


def dot_general(lhs, rhs, numbers, *args, **kw):
    """Skips the test that asks for what FP8 refuses."""
    products.append("dot_general")
    try:
        return fp8_dot_general(lhs, rhs, numbers, *args, **kw)
    except (TypeError, NotImplementedError) as error:
        raise refused(error, lhs, rhs) from error
    except ValueError as error:
        if "nothing to contract over" not in str(error):
            raise
        raise refused(error, lhs, rhs) from error


def einsum(*args, **kw):
    products.append("einsum")  # JAX may have traced it before
    return jnp.einsum(*args, _dot_general=dot_general, **kw)


def replaced(layer, **defaults):
    """Patches the defaults of a layer of nnx."""
    make = layer.__init__
    return mock.patch.object(make, "__kwdefaults__", make.__kwdefaults__ | defaults)


PATCHES = (
    lambda: mock.patch.object(linear, "lax", changed(lax, dot_general=dot_general)),
    lambda: mock.patch.object(linear, "jnp", changed(jnp, einsum=einsum)),
    lambda: replaced(nnx.Linear, dot_general=dot_general),
    lambda: replaced(nnx.LinearGeneral, dot_general=dot_general),
    lambda: replaced(nnx.Einsum, einsum_op=einsum),
    lambda: mock.patch.object(
        theirs_nnx, "jax", changed(jax, lax=changed(lax, dot_general=dot_general))
    ),
    lambda: mock.patch.object(np.testing, "assert_allclose", close),
)


@pytest.fixture(autouse=True)
def fp8_products():
    """Layers get FP8 products where a test asks for none."""
    with contextlib.ExitStack() as stack:
        for patch in PATCHES:
            stack.enter_context(patch())
        yield


def has_product(name: str) -> bool:
    linear = name.startswith(("test_dense", "test_einsum", "test_complex", "test_basic"))
    return (linear or "equivalence" in name) and name != "test_einsum_op"


LinearTest, TestLinearGeneral, TestLinenConsistency = (
    chosen(cases, has_product, "no linear layer of Flax", products)
    for cases in (
        theirs.LinearTest,
        theirs_nnx.TestLinearGeneral,
        theirs_nnx.TestLinenConsistency,
    )
)
