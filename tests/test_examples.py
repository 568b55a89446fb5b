"""The examples run, at a tiny size, and do what they say."""

import importlib.util
import pathlib

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch):
    """Some examples share a file."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_matmul():
    assert load("01_matmul").main(m=32, n=64, k=256) < 0.05


def test_train_step_learns():
    losses = load("02_train_step").main(steps=20, width=64, hidden=128)
    assert losses[-1] < 0.7 * losses[0]


def test_examples_are_short():
    for path in EXAMPLES.glob("[0-9]*.py"):
        assert len(path.read_text().splitlines()) < 60, path.name


def test_ragged():
    assert load("03_ragged").main(rows=64, k=128, n=32, g=4) < 0.05


def test_train_moe_learns():
    losses = load("07_train_moe").main(steps=6)
    assert losses[-1] < 0.9 * losses[0]


def test_the_demo_learns_as_its_twin_does():
    losses = load("demo").train(steps=8)
    assert losses["fp8"][-1] < 0.95 * losses["fp8"][0]
    assert abs(losses["fp8"][-1] / losses["bf16"][-1] - 1) < 0.02


def test_flax_dense_learns_from_a_float_checkpoint():
    losses, error = load("04_flax_dense").main(steps=12, width=64, hidden=128)
    assert losses[-1] < 0.7 * losses[0] and error < 0.08  # two products of 0.04 each


def test_flax_moe_learns():
    losses = load("05_flax_moe").main(steps=12, tokens=128, width=64)
    assert losses[-1] < 0.8 * losses[0]


def test_an_exported_program_gives_the_same_bits():
    assert load("08_export").main(rows=16, width=128, hidden=128)
