"""Block-FP8 checkpoints: the same bytes in and out, and products with what was read."""

import json
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import block_weight, read_by_hand, write_by_hand
from numerics import calc_diff, dequantized64, product64

import jax_fp8gemm as fp8
from jax_fp8gemm.checkpoint import load, save

pytest.importorskip("safetensors", reason="safetensors is not installed")


def mixed() -> dict[str, np.ndarray]:
    """Every FP8 number and NaN, every bf16 bit pattern, ragged edges, a scalar, no elements."""
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    return block_weight(300, 200) | {
        "every.weight": np.tile(every, (2, 1)),
        "every.weight_scale_inv": np.array([[0.3, 1e-39]], np.float32),
        "norm": np.arange(65536, dtype=np.uint16).view(ml_dtypes.bfloat16),
        "bias": np.float32([1.5, -0.0, np.nan]),
        "step": np.array(7, np.int32),
        "empty": np.zeros((0, 4), np.float32),
    }


def test_bytes_are_the_same_in_and_out(tmp_path):
    tensors = mixed()
    write_by_hand(tmp_path / "in.safetensors", tensors)
    loaded = load(tmp_path / "in.safetensors")
    assert set(loaded) == {"a.weight", "every.weight", "norm", "bias", "step", "empty"}
    for name in ("a.weight", "every.weight"):
        assert isinstance(loaded[name], fp8.QArray)
        assert np.asarray(loaded[name].qvalue).tobytes() == tensors[name].tobytes()
        assert np.asarray(loaded[name].scale).tobytes() == tensors[f"{name}_scale_inv"].tobytes()
    assert loaded["norm"].dtype == jnp.bfloat16 and loaded["step"].shape == ()
    save(tmp_path / "out.safetensors", loaded)
    assert read_by_hand(tmp_path / "out.safetensors") == read_by_hand(tmp_path / "in.safetensors")
    assert [file.name for file in tmp_path.glob("*out*")] == ["out.safetensors"]


def test_a_folder_of_files_where_scales_lie_elsewhere(tmp_path):
    tensors = mixed()
    parts = [{}, {}]
    for i, name in enumerate(tensors):
        parts[i % 2][name] = tensors[name]
    assert ("a.weight" in parts[0]) != ("a.weight_scale_inv" in parts[0])
    names = ["model-1.safetensors", "model-2.safetensors"]
    for name, part in zip(names, parts, strict=True):
        write_by_hand(tmp_path / name, part)
    index = {"weight_map": {t: names[i] for i, part in enumerate(parts) for t in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = load(tmp_path)
    assert isinstance(loaded["a.weight"], fp8.QArray) and len(loaded) == 6
    assert np.asarray(loaded["a.weight"].qvalue).tobytes() == tensors["a.weight"].tobytes()
    some = load(tmp_path, keep=lambda name: name == "a.weight")
    assert list(some) == ["a.weight"] and isinstance(some["a.weight"], fp8.QArray)

    write_by_hand(tmp_path / names[1], {})
    with pytest.raises(ValueError, match=r"is missing\.(?s:.*)as the index says"):
        load(tmp_path)


def test_a_folder_of_one_file(tmp_path):
    write_by_hand(tmp_path / "model.safetensors", block_weight(8, 16))
    assert load(tmp_path)["a.weight"].shape == (8, 16)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nowhere")


def test_a_product_is_that_of_the_dequantized_weight(tmp_path, key):
    write_by_hand(tmp_path / "w.safetensors", block_weight(300, 208))
    q = load(tmp_path / "w.safetensors")["a.weight"]
    x = jax.random.normal(key, (33, 208))
    y = fp8.fp8_matmul(x, fp8.prepare_weight(q), preferred_element_type=jnp.float32)
    exact = product64(fp8.quantize(x), q)
    assert calc_diff(y, exact) <= 1e-6
    np.testing.assert_array_equal(y, fp8.gemm(fp8.quantize(x), q, out_dtype=jnp.float32))
    # Quantizing x costs 2.6 % of the norm; nothing else may.
    plain = np.asarray(x, np.float64) @ dequantized64(q).T
    assert np.linalg.norm(y - plain) < 0.03 * np.linalg.norm(plain)
    dx = jax.grad(lambda x: fp8.fp8_matmul(x, fp8.prepare_weight(q)).sum())(x)
    assert calc_diff(dx, np.ones((33, 300)) @ dequantized64(q)) < 1e-3


def test_a_k_of_200_is_filled_up(tmp_path, key):
    write_by_hand(tmp_path / "w.safetensors", block_weight(300, 200))
    q = load(tmp_path / "w.safetensors")["a.weight"]
    x = jax.random.normal(key, (5, 200))
    y = fp8.fp8_matmul(x, fp8.prepare_weight(q), preferred_element_type=jnp.float32)
    assert calc_diff(y, product64(fp8.quantize(x), q)) <= 1e-6


def test_experts_stored_one_by_one_stack(tmp_path, key):
    for i in range(3):
        write_by_hand(tmp_path / f"{i}.safetensors", block_weight(144, 160, seed=i))
    each = [load(tmp_path / f"{i}.safetensors")["a.weight"] for i in range(3)]
    experts = jax.tree.map(lambda *x: jnp.stack(x), *each)
    assert (experts.shape, experts.scale.shape) == ((3, 144, 160), (3, 2, 2))
    x, sizes = jax.random.normal(key, (20, 160)), [7, 0, 11]
    y = fp8.fp8_ragged_dot(x, fp8.prepare_weight(experts), jnp.array(sizes))
    np.testing.assert_array_equal(y[:7], fp8.fp8_matmul(x[:7], fp8.prepare_weight(each[0])))
    np.testing.assert_array_equal(y[7:18], fp8.fp8_matmul(x[7:18], fp8.prepare_weight(each[2])))
    assert not np.asarray(y[18:]).any()


def wrong(change) -> dict[str, np.ndarray]:
    tensors = block_weight(300, 200)
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    "change, error, words",
    [
        (lambda t: t.pop("a.weight_scale_inv"), ValueError,
         ["a.weight has no scales", "a.weight F8_E4M3 [300, 200]", "[3, 2]", "each row, [300, 1]"]),
        (lambda t: t.pop("a.weight"), ValueError,
         ["a.weight_scale_inv has no weight", "a.weight_scale_inv F32 [3, 2]", "a.weight beside"]),
        (lambda t: t.update({"a.weight_scale_inv": np.ones((2, 2), np.float32)}), ValueError,
         ["a.weight has scales of the wrong shape", "scale_inv F32 [2, 2]", "[3, 2]"]),
        (lambda t: t.update({"a.weight_scale_inv": np.ones((3, 2), np.int32)}),
         TypeError, ["a.weight has scales of the wrong dtype", "scale_inv I32 [3, 2]", "BF16"]),
        (lambda t: t.update({"a.weight": np.ones((300, 200), np.float32)}), ValueError,
         ["a.weight is no FP8 weight", "a.weight F32 [300, 200]"]),
    ],
)  # fmt: skip
def test_errors_name_the_tensor_and_its_numbers(tmp_path, change, error, words):
    write_by_hand(tmp_path / "bad.safetensors", wrong(change))
    with pytest.raises(error) as info:
        load(tmp_path / "bad.safetensors")
    text = str(info.value)
    assert all(part in text for part in ["  got  ", "  expected  ", "  fix  ", *words]), text


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save(path, {"x": np.ones(1000, np.float32)})
    for content in (path.read_bytes()[:-1], b"", b"version https://git-lfs.github.com/spec/v1\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model.safetensors is damaged(?s:.*)fetch it again"):
            load(path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index.json is no index(?s:.*)weight_map"):
        load(tmp_path)


def test_dtypes_that_would_change_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    write_by_hand(path, {"six": np.uint8([3])}, codes={"six": "F6_E2M3"})
    with pytest.raises(TypeError, match=r"six has an unknown dtype(?s:.*)F6_E2M3 \[1\]"):
        load(path)
    write_by_hand(path, {"double": np.float64([1])})
    with pytest.raises(TypeError, match=r"double has 64 bits(?s:.*)F64 \[1\]"):
        load(path)
    assert not load(path, keep=lambda name: name != "double")
    write_by_hand(path, {"long": np.int64([3, 2**40])})
    with pytest.raises(TypeError, match=r"long needs 64 bits(?s:.*)from 3 to 1099511627776"):
        load(path)


def test_only_what_can_be_read_again_is_written(tmp_path):
    q = fp8.quantize(jnp.ones((300, 200)), (128, 128))
    path = tmp_path / "x.safetensors"
    for tensors, error, words in [
        ({"w": fp8.quantize(jnp.ones((300, 200)))}, ValueError, "w has scales of the wrong shape"),
        ({"w": q.qvalue}, ValueError, "w has no scales"),
        ({"w": q, "w_scale_inv": q.scale}, ValueError, "w_scale_inv is taken"),
        ({"w": fp8.prepare_weight(q)}, TypeError, "w is no array(?s:.*)PreparedWeight"),
        ({"w": jnp.ones(4, jnp.int4)}, TypeError, "w has a dtype that the format lacks"),
    ]:
        with pytest.raises(error, match=words):
            save(path, tensors)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder(?s:.*)missing"):
        save(tmp_path / "missing" / "x.safetensors", {"x": np.ones(1, np.float32)})


def test_a_strided_view_is_written_in_its_order(tmp_path):
    x = np.arange(12, dtype=np.int32).reshape(3, 4).T
    save(tmp_path / "x.safetensors", {"x": x})
    np.testing.assert_array_equal(load(tmp_path / "x.safetensors")["x"], x)


KILLED = """
import os, signal, sys
import numpy as np
from jax_fp8gemm.checkpoint import save
os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)  # written, and not yet renamed
save(sys.argv[1], {"x": np.ones(1000, np.float32)})
"""


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    save(path, {"x": np.zeros(3, np.float32)})
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], timeout=100)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == before
    save(path, {"x": np.ones(3, np.float32)})
    np.testing.assert_array_equal(load(path)["x"], 1)


def test_orbax_keeps_the_bits_of_quantized_trees(tmp_path, key):
    orbax = pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint is not installed")
    w = jax.random.normal(key, (200, 300), jnp.bfloat16)
    q = fp8.quantize(w.T, (128, 128), scale_rounding="none")
    tree = {
        "layer": {"kernel": q, "bias": jnp.arange(3.0)},
        "train": fp8.prepare_weight(w),
        "infer": fp8.prepare_weight(q),
    }
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "tree", tree)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "tree", jax.eval_shape(lambda: tree))
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(back), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
