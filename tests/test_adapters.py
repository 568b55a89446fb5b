"""All adapters: their length, and what each does with a sharding that is asked for."""

import jax
import pytest
from adapters import ADAPTERS, NAMES, load, normal


def test_adapters_are_short_and_all_are_tested():
    files = {path.stem: path for path in ADAPTERS.glob("*.py")}
    assert set(files) == set(NAMES)
    for path in files.values():
        assert len(path.read_text().splitlines()) < 120, path.name


@pytest.mark.parametrize("name", ["qwix_provider", "maxtext_fp8"])
def test_a_wish_for_a_sharding_is_not_lost(key, name):
    adapter = load(name)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        wish = jax.NamedSharding(mesh, jax.P("x", None))
        x, w = (jax.device_put(normal(key, 64, 64), jax.P()) for _ in range(2))
        y = adapter.dot_general(x, w, (((1,), (0,)), ((), ())), out_sharding=wish)
        assert jax.typeof(y).sharding.spec == wish.spec
