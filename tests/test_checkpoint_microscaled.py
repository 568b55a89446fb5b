"""MXFP4 and MXFP8 weights become E4M3 with scales of 128x128: the same numbers, or an error."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import write_by_hand
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from numerics import dequantized64

import jax_fp8gemm as fp8
from jax_fp8gemm import checkpoint

pytest.importorskip("safetensors", reason="safetensors is not installed")

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def drawn(shape, low=120, span=14, seed=0):
    """Returns codes of E2M1, one a byte, E8M0 exponents of 32 each, and the numbers they mean."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, shape).astype(np.uint8)
    exponents = rng.integers(low, low + span + 1, (*shape[:-1], shape[-1] // 32)).astype(np.uint8)
    values = E2M1[codes] * 2.0 ** (np.repeat(exponents.astype(int), 32, -1) - 127)
    return codes, exponents, values


def packed(codes):
    return codes[..., ::2] | codes[..., 1::2] << 4


def layouts(codes, exponents):
    """The same weight as gpt-oss and as DeepSeek-V4 store it, and by safetensors' own F4."""
    e8m0 = exponents.view(ml_dtypes.float8_e8m0fnu)
    grouped = packed(codes).reshape(*exponents.shape, 16)
    return {
        "gpt-oss": ({"w_blocks": grouped, "w_scales": exponents}, None),
        "deepseek": ({"w.weight": packed(codes).view(np.int8), "w.scale": e8m0}, None),
        "F4": ({"w.weight": packed(codes), "w.weight_scale": exponents}, "F4"),
    }


def write(path, tensors, code):
    if code is None:
        write_by_hand(path, tensors)
        return
    flat = {name: x.reshape(-1) if name == "w.weight" else x for name, x in tensors.items()}
    write_by_hand(path, flat, codes={"w.weight": "I8"})
    text = path.read_bytes()
    old = f'"I8", "shape": [{flat["w.weight"].size}]'.encode()
    shape = [*tensors["w.weight"].shape[:-1], 2 * tensors["w.weight"].shape[-1]]
    new = f'"F4", "shape": {shape}'.encode()
    length = int.from_bytes(text[:8], "little") + len(new) - len(old)
    path.write_bytes(length.to_bytes(8, "little") + text[8:].replace(old, new, 1))


@pytest.mark.parametrize("layout", ["gpt-oss", "deepseek", "F4"])
@pytest.mark.parametrize("shape", [(200, 160), (2, 130, 288)])
def test_every_number_is_the_same(tmp_path, layout, shape):
    codes, exponents, values = drawn(shape)
    write(tmp_path / "x", *layouts(codes, exponents)[layout])
    loaded = checkpoint.load(tmp_path / "x")
    ((name, q),) = loaded.items()
    assert name == ("w" if layout == "gpt-oss" else "w.weight")
    assert isinstance(q, fp8.QArray) and q.tile == (128, 128) and q.shape == shape
    np.testing.assert_array_equal(dequantized64(q), values)
    assert (np.frexp(np.asarray(q.scale))[0] == 0.5).all()
    *lead, n, k = shape
    padded = np.pad(
        np.abs(np.asarray(q.qvalue, np.float32)),
        [(0, 0)] * len(lead) + [(0, -n % 128), (0, -k % 128)],
    )
    largest = padded.reshape(*lead, -(-n // 128), 128, -(-k // 128), 128).max((-3, -1))
    assert (largest > 224).all()  # so no smaller scale fits
    checkpoint.save(tmp_path / "out", loaded)  # as an FP8 weight like any other
    again = checkpoint.load(tmp_path / "out")[name]
    assert np.asarray(again.qvalue).tobytes() == np.asarray(q.qvalue).tobytes()


def test_the_ends_of_the_range(tmp_path):
    """Exponents 14 apart, at both ends of E8M0; blocks of zeros count for nothing."""
    for low in (1, 60, 240):
        codes = np.tile(np.arange(16, dtype=np.uint8), (128, 16))
        exponents = np.full((128, 8), low, np.uint8)
        exponents[5, 2] += 14
        codes[:, 128:160] = 8  # −0
        exponents[:, 4] = 254
        write(tmp_path / "x", *layouts(codes, exponents)["gpt-oss"])
        q = checkpoint.load(tmp_path / "x")["w"]
        values = E2M1[codes] * 2.0 ** (np.repeat(exponents.astype(int), 32, -1) - 127)
        np.testing.assert_array_equal(dequantized64(q), values)
        assert np.asarray(q.scale).min() >= np.finfo(np.float32).tiny
    write(tmp_path / "x", *layouts(codes & 8, exponents)["gpt-oss"])
    q = checkpoint.load(tmp_path / "x")["w"]
    np.testing.assert_array_equal(q.scale, 1)
    assert set(np.asarray(q.qvalue).view(np.uint8).flat) == {0, 128}


def test_what_would_be_rounded_is_named(tmp_path):
    codes, exponents, _ = drawn((3, 256, 320))
    codes[1, 200, 256:] = 1  # ½, beside 6
    codes[1, 201, 256:] = 7
    exponents[1, 128:, 8:] = 120
    exponents[1, 201, 9] = 135
    write(tmp_path / "x", *layouts(codes, exponents)["gpt-oss"])
    text = r"w is not exact in E4M3(?s:.*)block \[1, 1, 2\] with exponents from -7 to 8(?s:.*)  fix"
    with pytest.raises(ValueError, match=text):
        checkpoint.load(tmp_path / "x")
    assert not checkpoint.load(tmp_path / "x", keep=lambda name: name != "w")
    exponents[1, 201, 9] = 255
    write(tmp_path / "x", *layouts(codes, exponents)["gpt-oss"])
    with pytest.raises(ValueError, match=r"a scale that is no number(?s:.*)block \[1, 1, 2\]"):
        checkpoint.load(tmp_path / "x")


def test_all_pairs_of_bytes_and_shifts(tmp_path):
    """Each of 256 bytes beside other exponents: exact, or an error, and never another number."""
    codes = np.stack([np.arange(256) % 16, np.arange(256) // 16], -1).astype(np.uint8)
    low = 100
    for high in range(low, low + 18):
        both = np.zeros((2, 512), np.uint8)
        both[0] = codes.reshape(-1)
        both[1, ::128] = 7  # 6, the largest, in each block
        exponents = np.full((2, 16), low, np.uint8)
        exponents[1] = high
        write(tmp_path / "x", *layouts(both, exponents)["gpt-oss"])
        if high - low > 14:
            with pytest.raises(ValueError, match="not exact"):
                checkpoint.load(tmp_path / "x")
            continue
        values = E2M1[both] * 2.0 ** (np.repeat(exponents.astype(int), 32, -1) - 127)
        got = checkpoint.load(tmp_path / "x")["w"]
        np.testing.assert_array_equal(dequantized64(got), values)
        np.testing.assert_array_equal(np.signbit(dequantized64(got)), np.signbit(values))


def test_mxfp8_weights(tmp_path):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((140, 192)).astype(ml_dtypes.float8_e4m3fn)
    exponents = rng.integers(126, 128, (140, 6)).astype(np.uint8)
    q[np.abs(q.astype(np.float32)) < 0.1] = 0  # leaves room for one step
    tensors = {"a.weight": q, "a.weight_scale": exponents}
    write_by_hand(tmp_path / "x", tensors)
    got = checkpoint.load(tmp_path / "x")["a.weight"]
    values = q.astype(np.float64) * 2.0 ** (np.repeat(exponents.astype(int), 32, -1) - 127)
    np.testing.assert_array_equal(dequantized64(got), values)
    q[3, 40] = 2**-9
    q[3, 90] = 448
    exponents[3] = [127, 126, 127, 127, 127, 127]
    write_by_hand(tmp_path / "x", tensors)
    with pytest.raises(ValueError, match=r"a.weight is not exact(?s:.*)block \[0, 0\]"):
        checkpoint.load(tmp_path / "x")


@pytest.mark.parametrize("shape", [(1, 32), (3, 32), (1, 64), (0, 64), (4, 0), (2, 0, 32)])
def test_the_smallest_weights(tmp_path, shape):
    """Of one group a row the scales have the shape of those of blocks or rows."""
    codes, exponents, values = drawn(shape)
    write(tmp_path / "x", *layouts(codes, exponents)["gpt-oss"])
    np.testing.assert_array_equal(dequantized64(checkpoint.load(tmp_path / "x")["w"]), values)
    q = E2M1[codes].astype(ml_dtypes.float8_e4m3fn)
    for scales in (exponents, exponents.view(ml_dtypes.float8_e8m0fnu)):
        write_by_hand(tmp_path / "x", {"a.weight": q, "a.weight_scale": scales})
        got = checkpoint.load(tmp_path / "x")["a.weight"]
        assert got.shape == shape
        wide = got.scale.repeat(128, -2)[..., : shape[-2], :].repeat(128, -1)[..., : shape[-1]]
        if got.has_tile((1, None)) and not got.has_tile((128, 128)):
            wide = np.broadcast_to(got.scale, shape)
        np.testing.assert_array_equal(np.asarray(got.qvalue, float) * wide, values)


def test_parts_on_devices_are_parts_of_the_whole(tmp_path):
    codes, exponents, values = drawn((4, 384, 320))
    write(tmp_path / "x", *layouts(codes, exponents)["gpt-oss"])
    whole = checkpoint.load(tmp_path / "x")["w"]
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    for spec in (P("x"), P("x", "y"), P(None, "x", "y"), P("y", None, "x")):
        q = checkpoint.load(tmp_path / "x", sharding=NamedSharding(mesh, spec))["w"]
        q = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), q)
        np.testing.assert_array_equal(dequantized64(q), values)
        assert np.asarray(q.scale).tobytes() == np.asarray(whole.scale).tobytes()


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(w_blocks=t["w_blocks"][..., :15]),
        lambda t: t.update(w_scales=t["w_scales"][:, :4]),
        lambda t: t.update(w_scales=t["w_scales"].astype(np.float32)),
        lambda t: t.update(w_blocks=t["w_blocks"][0], w_scales=t["w_scales"][0]),
    ],
)
def test_blocks_and_scales_that_do_not_fit_are_named(tmp_path, change):
    codes, exponents, _ = drawn((128, 160))
    tensors, _ = layouts(codes, exponents)["gpt-oss"]
    change(tensors)
    write_by_hand(tmp_path / "x", {name: np.ascontiguousarray(x) for name, x in tensors.items()})
    with pytest.raises(ValueError, match=r"w is no MXFP4 weight(?s:.*)w_blocks U8(?s:.*)  fix  "):
        checkpoint.load(tmp_path / "x")
