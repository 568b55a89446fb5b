"""Published layouts of FP8 checkpoints: what is read from each, and the same bytes written."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import block_weight, read_by_hand, write_by_hand
from numerics import calc_diff, product64

import jax_fp8gemm as fp8
from jax_fp8gemm import checkpoint

pytest.importorskip("safetensors", reason="safetensors is not installed")

E8M0 = ml_dtypes.float8_e8m0fnu
SCALES = {
    "F32": np.float32([[0.3, 1e-39], [7, 2], [0, 1]]),
    "BF16": np.array([[0.3, 1e-39], [7, 2], [0, 1]], ml_dtypes.bfloat16),
    "F16": np.array([[0.3, 6e-8], [7, 2], [0, 1]], np.float16),
    "F8_E8M0": np.uint8([[0, 1], [120, 127], [254, 255]]).view(E8M0),  # 2**-127 to NaN
}


@pytest.mark.parametrize("code", SCALES)
@pytest.mark.parametrize("end", ["weight_scale_inv", "weight_scale", "scale"])
def test_scales_are_widened_and_written_as_they_were(tmp_path, code, end):
    q = block_weight(300, 200)["a.weight"]
    write_by_hand(tmp_path / "in", {"a.weight": q, f"a.{end}": SCALES[code]})
    loaded = checkpoint.load(tmp_path / "in")
    assert list(loaded) == ["a.weight"] and loaded["a.weight"].scale.dtype == jnp.float32
    expected = SCALES[code].astype(np.float64)
    np.testing.assert_array_equal(np.asarray(loaded["a.weight"].scale, np.float64), expected)
    checkpoint.save(tmp_path / "out", loaded)
    assert read_by_hand(tmp_path / "out") == read_by_hand(tmp_path / "in")


def test_formats_outlive_a_tree_map(tmp_path):
    parts = block_weight(300, 200)
    parts["a.weight_scale_inv"] = SCALES["BF16"]
    write_by_hand(tmp_path / "in", parts | {"step": np.int64([-3])})
    loaded = jax.tree.map(lambda x: x, checkpoint.load(tmp_path / "in"))
    assert loaded["step"].dtype == jnp.int32
    checkpoint.save(tmp_path / "out", loaded)
    assert read_by_hand(tmp_path / "out") == read_by_hand(tmp_path / "in")
    trained = {name: loaded[name] for name in loaded}  # a new dict knows nothing, but can be told
    checkpoint.save(tmp_path / "out", trained, formats=loaded.formats)
    assert read_by_hand(tmp_path / "out") == read_by_hand(tmp_path / "in")


@pytest.mark.parametrize("end", ["weight_scale_inv", "weight_scale", "scale"])
def test_a_weight_that_is_not_kept_leaves_no_scales(tmp_path, end):
    q, scale = block_weight(300, 200).values()
    write_by_hand(tmp_path / "x", {"a.weight": q, f"a.{end}": scale, "norm": np.float32([1])})
    assert list(checkpoint.load(tmp_path / "x", keep=lambda name: name != "a.weight")) == ["norm"]


def test_what_a_format_cannot_hold_is_an_error(tmp_path):
    q = fp8.quantize(jnp.full((8, 16), 0.3), (128, 128), scale_rounding="none")
    for form in ("F8_E8M0", "BF16", "F16"):
        with pytest.raises(ValueError, match=rf"w's scale would change in {form}(?s:.*)  fix  "):
            formats = {"w": checkpoint.Format(scale_code=form)}
            checkpoint.save(tmp_path / "x", {"w": q}, formats=formats)
    with pytest.raises(ValueError, match=r"x would change in I64"):
        checkpoint.save(
            tmp_path / "x", {"x": np.float32([0.5])}, formats={"x": checkpoint.Format(code="I64")}
        )
    assert not list(tmp_path.iterdir())


def test_stacked_experts_are_one_weight(tmp_path):
    each = [block_weight(256, 160, seed=i) for i in range(3)]
    q = np.stack([w["a.weight"] for w in each])
    scale = np.stack([w["a.weight_scale_inv"] for w in each])
    name = "experts.gate_up_proj"
    write_by_hand(tmp_path / "in", {name: q, f"{name}_scale_inv": scale})
    loaded = checkpoint.load(tmp_path / "in")
    assert (loaded[name].shape, loaded[name].scale.shape) == ((3, 256, 160), (3, 2, 2))
    assert loaded[name].tile == (128, 128)
    checkpoint.save(tmp_path / "out", loaded)
    assert read_by_hand(tmp_path / "out") == read_by_hand(tmp_path / "in")


def test_a_scale_for_each_row(tmp_path, key):
    """As compressed-tensors stores them: bf16 [out, 1], named weight_scale."""
    w = np.random.default_rng(0).standard_normal((144, 272), np.float32)
    scale = (np.abs(w).max(1, keepdims=True) / 448).astype(ml_dtypes.bfloat16)
    q = np.clip(w / scale.astype(np.float32), -448, 448).astype(ml_dtypes.float8_e4m3fn)
    write_by_hand(tmp_path / "in", {"a.weight": q, "a.weight_scale": scale})
    loaded = checkpoint.load(tmp_path / "in")
    assert loaded["a.weight"].tile == (1, None)
    x = fp8.quantize(jax.random.normal(key, (5, 272)), (1, None))
    y = fp8.gemm(x, loaded["a.weight"], out_dtype=jnp.float32)
    assert calc_diff(y, product64(x, loaded["a.weight"])) <= 1e-6
    with pytest.raises(ValueError, match=r"w has other scales(?s:.*)gemm\(quantize\(x, \(1, None"):
        fp8.prepare_weight(loaded["a.weight"])
    checkpoint.save(tmp_path / "out", loaded)
    assert read_by_hand(tmp_path / "out") == read_by_hand(tmp_path / "in")


def test_integers_of_64_bits(tmp_path):
    tensors = {
        "signed": np.int64([[-(2**31), 2**31 - 1]]),
        "unsigned": np.uint64([2**32 - 1]),
        "none": np.zeros((0, 2), np.int64),
    }
    write_by_hand(tmp_path / "in", tensors)
    loaded = checkpoint.load(tmp_path / "in")
    assert [x.dtype.name for x in loaded.values()] == ["int32", "uint32", "int32"]
    for name, value in tensors.items():
        np.testing.assert_array_equal(loaded[name], value)
    checkpoint.save(tmp_path / "out", loaded)
    assert read_by_hand(tmp_path / "out") == read_by_hand(tmp_path / "in")


def test_other_tensors_named_scale_are_left_alone(tmp_path):
    tensors = {
        "norm.weight": np.ones(4, np.float32),
        "norm.scale": np.ones(4, np.float32),
        "k_scale": np.float32([2]),
        "exponents": np.uint8([127, 3]).view(E8M0),
    }
    write_by_hand(tmp_path / "in", tensors)
    loaded = checkpoint.load(tmp_path / "in")
    assert set(loaded) == set(tensors) and not loaded.formats
    checkpoint.save(tmp_path / "out", loaded)
    assert read_by_hand(tmp_path / "out") == read_by_hand(tmp_path / "in")


# ---- config.json --------------------------------------------------------------------------------

DEEPSEEK = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
    "weight_block_size": [128, 128],
}  # fmt: skip
GLM = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        "num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}}},
}  # fmt: skip
BY_BLOCK = {
    "num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]
}  # fmt: skip


def folder_with(tmp_path, section):
    write_by_hand(tmp_path / "model.safetensors", block_weight(8, 16))
    text = json.dumps({"model_type": "x", "quantization_config": section})
    (tmp_path / "config.json").write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    "section, expected",
    [
        (DEEPSEEK, {"method": "fp8", "block": (128, 128)}),
        (DEEPSEEK | {"scale_fmt": "ue8m0", "modules_to_not_convert": ["lm_head"]},
         {"method": "fp8", "block": (128, 128), "scale_format": "ue8m0",
          "not_converted": ("lm_head",)}),
        (DEEPSEEK | {"ignored_layers": ["lm_head"], "modules_to_not_convert": None},
         {"method": "fp8", "block": (128, 128), "not_converted": ("lm_head",)}),
        (GLM, {"method": "compressed-tensors", "not_converted": ("lm_head",)}),
        (GLM | {"config_groups": {"group_0": {"weights": BY_BLOCK}}},
         {"method": "compressed-tensors", "block": (128, 128), "not_converted": ("lm_head",)}),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]},
         {"method": "mxfp4", "scale_format": "ue8m0", "not_converted": ("model.embed_tokens",)}),
    ],
)  # fmt: skip
def test_the_quantization_section_is_read(tmp_path, section, expected):
    opened = checkpoint.open(folder_with(tmp_path, section))
    assert opened.quantization == checkpoint.Quantization(**expected)
    assert list(opened) == ["a.weight"]


@pytest.mark.parametrize(
    "section, word",
    [
        ({"quant_method": "awq"}, "'awq'"),
        (DEEPSEEK | {"weight_block_size": [64, 128]}, r"weight_block_size \[64, 128\]"),
        (DEEPSEEK | {"weight_block_size": None}, "weight_block_size None"),
        (DEEPSEEK | {"fmt": "e5m2"}, "'e5m2'"),
        (DEEPSEEK | {"scale_fmt": "int"}, "'int'"),
        (DEEPSEEK | {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert 'lm_head'"),
        (GLM | {"config_groups": {"a": {"weights": {"num_bits": 4, "type": "int"}}}}, "num_bits"),
        (GLM | {"config_groups": {"a": 3}}, "config_groups.a 3"),
        (GLM | {"config_groups": {"a": {"weights": BY_BLOCK | {"strategy": "tensor"}}}}, "tensor"),
        (
            GLM | {"config_groups": {"a": {"weights": BY_BLOCK | {"block_structure": [1, 128]}}}},
            r"block_structure \[1, 128\]",
        ),
        ("fp8", "a section that is a str"),
    ],
)
def test_a_section_that_is_not_supported_is_named(tmp_path, section, word):
    with pytest.raises(NotImplementedError, match=rf"config.json(?s:.*){word}(?s:.*)  fix  "):
        checkpoint.load(folder_with(tmp_path, section))


@pytest.mark.parametrize(
    "config",
    [
        {"compression_config": GLM},
        {"text_config": {"quantization_config": GLM}},
        {"quantization_config": None, "text_config": {"compression_config": GLM}},
    ],
)
def test_the_section_is_found_under_its_other_names(tmp_path, config):
    folder = folder_with(tmp_path, None)
    (folder / "config.json").write_text(json.dumps(config))
    assert checkpoint.open(folder).quantization.method == "compressed-tensors"


def test_without_a_section_there_is_no_quantization(tmp_path):
    folder = folder_with(tmp_path, None)
    assert checkpoint.open(folder).quantization is None
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        checkpoint.open(folder)
