"""JAX's own tests of ragged_dot, from a checkout of it, with fp8_ragged_dot in the place of lax's.

Two things differ from how JAX runs them. Results are judged as FP8's, by calc_diff. Precisions
above FP8's are asked for as the default.
"""

from unittest import mock

import jax
import pytest
from common import chosen, close, imported, refused

from jax_fp8gemm import fp8_ragged_dot

lax_test = imported("JAX_TESTS", "lax_test.py")
export_test = imported("JAX_TESTS", "export_test.py")
products = []


def ragged_dot(*args, precision=None, **kw):
    del precision
    products.append(args)
    try:
        return fp8_ragged_dot(*args, **kw)
    except (TypeError, NotImplementedError) as error:
        raise refused(error, *args[:2]) from error


@pytest.fixture(autouse=True)
def fp8_products():
    cases = lax_test.jtu.JaxTestCase
    with (
        mock.patch.object(jax.lax, "ragged_dot", ragged_dot),
        mock.patch.object(cases, "assertAllClose", lambda self, *args, **kw: close(*args)),
        mock.patch.object(cases, "assertArraysAllClose", lambda self, *args, **kw: close(*args)),
    ):
        yield


def has_product(name: str) -> bool:
    return name.startswith("test_ragged_dot") and ("general" not in name or "vmap" in name)


class ExportTest(lax_test.jtu.JaxTestCase):
    """Those of export's tests that are of ragged_dot."""


for name in filter(has_product, dir(export_test.JaxExportTest)):
    setattr(ExportTest, name, getattr(export_test.JaxExportTest, name))

RaggedTest, ExportTest = (
    chosen(cases, has_product, "ragged_dot_general is not replaced", products)
    for cases in (lax_test.RaggedTest, ExportTest)
)
