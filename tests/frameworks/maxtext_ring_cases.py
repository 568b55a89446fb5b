"""MaxText's ring of experts on eight devices, with the adapter: each has one of four experts."""

import json
import types

import jax
import maxtext_cases as cases
import numpy as np
import pytest

RING = {
    "megablox": True, "use_ring_of_experts": True,
    "ici_expert_parallelism": 4, "ici_fsdp_parallelism": 2,
}  # fmt: skip

# How a device picks the rows of its experts: before the product, or in it by group_offset. The
# kernels that sort for the latter are a TPU's, so their fallbacks run.
SORTS = {
    "rows picked before": {},
    "rows picked by group_offset": {
        "use_ragged_sort": True,
        "ragged_gather_fallback": True,
        "ragged_gather_reduce_fallback": True,
    },
}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Two steps of 32 tokens for each device."""
    for name, value in {"STEPS": 2, "BATCH": 8, "LENGTH": 32}.items():
        monkeypatch.setattr(cases, name, value)
    monkeypatch.setitem(cases.SMALL, "max_target_length", 32)
    monkeypatch.setitem(cases.SMALL, "per_device_batch_size", 1)


@pytest.mark.parametrize("sort", SORTS)
def test_ring_of_experts(sort, monkeypatch, tmp_path, record_property):
    assert jax.device_count() == 8
    name = "mixtral-8x7b"
    weights, own = cases.train(name, None, tmp_path, megablox=False)  # no ring, and no FP8
    experts, offsets = set(), []

    def gmm(lhs, rhs, group_sizes, *, group_offset, **kw):
        experts.add(rhs.shape[0])
        offsets.append(group_offset)
        return cases.maxtext_fp8.gmm(lhs, rhs, group_sizes, group_offset=group_offset, **kw)

    monkeypatch.setattr(cases.moe, "mblx", types.SimpleNamespace(gmm=gmm))
    quant = cases.maxtext_fp8.Fp8BlockQuantization()
    _, ours = cases.train(name, quant, tmp_path, weights, **RING, **SORTS[sort])
    assert experts == {1}
    traced = [isinstance(offset, jax.core.Tracer) for offset in offsets]
    assert all(traced) if SORTS[sort] else not any(traced)
    both = {"own": own.tolist(), "adapter": ours.tolist()}
    record_property(f"{name} as a ring with {sort}, FP8 products", json.dumps(both))
    assert (ours != own).all()
    assert abs(ours[0] / own[0] - 1) < 3e-3  # before the first step
    np.testing.assert_allclose(ours, own, rtol=0, atol=0.02 * own[0])
