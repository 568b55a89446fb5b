"""The prediction of docs/simulation.md: its parts against counting and against what it was fitted
to."""

import itertools
import pathlib

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def simulate(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import simulate

    return simulate


@pytest.mark.parametrize("devices", [4, 8, 16, 64, 256])
def test_how_many_devices_a_token_reaches(simulate, devices):
    draw, reached = np.random.default_rng(0), []
    size = simulate.EXPERTS // simulate.GROUPS
    for _ in range(4000):
        groups = draw.choice(simulate.GROUPS, simulate.TOP_GROUPS, replace=False)
        left = (groups[:, None] * size + np.arange(size)).ravel()
        experts = draw.choice(left, simulate.TOP_K, replace=False)
        reached.append(len({e // (simulate.EXPERTS // devices) for e in experts.tolist()}))
    share = simulate.share_of_devices(devices)
    assert np.mean(reached) / devices == pytest.approx(share, rel=0.02)


def test_times_it_was_fitted_to(simulate):
    true = simulate.Layer(2.5e-4, 0.06, 0.05)
    rows = [
        {
            "op": "MoE layer, forward + backward: fp8 expert_ffn",
            "m": m, "g": g, "n": 2048, "us": 1e3 * true.ms(m, g),
        }
        for m, g in itertools.product((8192, 32768), (8, 32))
    ]  # fmt: skip
    found = simulate.fitted(rows)
    assert found.ms(32768, 8) == pytest.approx(true.ms(32768, 8))


def test_more_devices_never_take_less(simulate):
    for exchange in ("all_gather", "all_to_all"):
        times = [simulate.predict(n, exchange).wire for n in (2, 4, 8, 16, 64, 256)]
        assert times == sorted(times)
        one = simulate.predict(8, exchange)
        assert one.hidden <= one.exposed
