"""What the tests of adapters share. Where a library is not installed, its tests are skipped."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ADAPTERS = pathlib.Path(__file__).parent.parent / "examples" / "adapters"
NAMES = {"qwix_provider": "qwix", "tokamax_ragged_dot": "tokamax", "maxtext_fp8": "flax"}


def load(name: str):
    pytest.importorskip(NAMES[name], reason=f"{NAMES[name]} is not installed")
    spec = importlib.util.spec_from_file_location(name, ADAPTERS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def normal(key, *shape, dtype=jnp.float32):
    return jax.random.normal(key, shape).astype(dtype)


def equal(a, b) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
