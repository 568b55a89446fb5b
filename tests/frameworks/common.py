"""What the cases of this folder share: how near FP8 is, and files of tests that others wrote."""

import functools
import importlib.util
import os
import pathlib
import types
import unittest
from collections.abc import Callable

import jax
import numpy as np
import pytest

FP8_DIFF = 3e-3  # of products and gradients of normal numbers, each operand rounded to E4M3


def close(actual, expected, *_, **__) -> None:
    """Stands in for others' checks of nearness, whose bounds are float32's: calc_diff for FP8."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        total = np.sum(a * a + b * b)
        assert total == 0 or np.sum((a - b) ** 2) / total < FP8_DIFF


def imported(variable: str, path: str) -> types.ModuleType:
    """Imports a file of another project's tests, from the folder that a variable names."""
    if not os.environ.get(variable):
        pytest.skip(f"left out: {variable} does not name a folder", allow_module_level=True)
    file = pathlib.Path(os.environ[variable], path)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader, file
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refused(error: Exception, *operands: jax.Array) -> unittest.SkipTest:
    """What skips a test that asks for something that FP8 does not take."""
    dtypes = ", ".join(sorted({str(x.dtype) for x in operands}))
    return unittest.SkipTest(f"refused: {str(error).splitlines()[0]} ({dtypes})")


def changed(module: types.ModuleType, **others) -> types.SimpleNamespace:
    """A module with some functions replaced, for one file to see."""
    return types.SimpleNamespace(**(vars(module) | others))


def chosen(cases: type, wanted: Callable[[str], bool], why_not: str, products: list) -> type:
    """Leaves out tests that are not wanted. What passes of the others has added to `products`,
    unless its name says that it looks for an error."""

    def checked(test):
        @functools.wraps(test)
        def run(*args, **kw):
            products.clear()
            test(*args, **kw)
            assert products or "raises" in test.__name__ or "error" in test.__name__

        return run

    for name in filter(lambda name: name.startswith("test"), dir(cases)):
        test = getattr(cases, name)
        left_out = pytest.mark.skip(f"left out: {why_not}")
        setattr(cases, name, checked(test) if wanted(name) else left_out(test))
    return cases
