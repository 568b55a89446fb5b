"""Published models by their tables of names: to parameters and back to an FP8 checkpoint."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import block_weight, read_by_hand, write_by_hand
from dense_moe import FORWARD
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from numerics import calc_diff, dequantized64

import jax_fp8gemm as fp8
from jax_fp8gemm import checkpoint
from jax_fp8gemm._checkpoint.sources import Stored
from jax_fp8gemm.checkpoint import DEEPSEEK_V3, GLM_4_5, GPT_OSS, QWEN3_MOE, Row

pytest.importorskip("safetensors", reason="safetensors is not installed")

BF16 = ml_dtypes.bfloat16
H, F, E, VOCAB = 64, 128, 3, 16
RNG = np.random.default_rng(0)


STATE = RNG.bit_generator.state


@pytest.fixture(autouse=True)
def same_numbers():
    """A test draws the same numbers, whichever ran before it."""
    RNG.bit_generator.state = STATE


def floats(*shape):
    return RNG.standard_normal(shape, np.float32).astype(BF16)


def in_fp8(name, n, k):
    weight = block_weight(n, k, seed=len(name))
    return {f"{name}.weight{end}": weight[f"a.weight{end}"] for end in ("", "_scale_inv")}


def ffn(name, f=F):
    return in_fp8(f"{name}.gate_proj", f, H) | in_fp8(f"{name}.up_proj", f, H) | in_fp8(
        f"{name}.down_proj", H, f
    )  # fmt: skip


def ends():
    names = {"model.embed_tokens.weight": (VOCAB, H), "lm_head.weight": (VOCAB, H)}
    names["model.norm.weight"] = (H,)
    return {name: floats(*shape) for name, shape in names.items()}


def norms(layer):
    names = "input_layernorm", "post_attention_layernorm"
    return {f"{layer}.{name}.weight": floats(H) for name in names}


def experts(layer):
    found = {f"{layer}.mlp.gate.weight": floats(E, H)}
    for i in range(E):
        found |= ffn(f"{layer}.mlp.experts.{i}")
    return found


def deepseek():
    """A dense layer, one of experts, and one that says the token after the next."""
    found = ends()
    for i in range(3):
        layer = f"model.layers.{i}"
        found |= norms(layer)
        attention = {"q_a_proj": (32, H), "q_b_proj": (48, 32), "kv_a_proj_with_mqa": (40, H)}
        attention |= {"kv_b_proj": (64, 32), "o_proj": (H, 32)}
        for name, shape in attention.items():
            found |= in_fp8(f"{layer}.self_attn.{name}", *shape)
        for name in ("q_a_layernorm", "kv_a_layernorm"):
            found[f"{layer}.self_attn.{name}.weight"] = floats(32)
        if i == 0:
            found |= ffn(f"{layer}.mlp")
            continue
        found |= experts(layer) | ffn(f"{layer}.mlp.shared_experts")
        found[f"{layer}.mlp.gate.e_score_correction_bias"] = np.float32([1, 2, 3])
    last = "model.layers.2"
    for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight"):
        found[f"{last}.{name}"] = floats(H)
    found[f"{last}.eh_proj.weight"] = floats(H, 2 * H)
    for name in ("embed_tokens.weight", "shared_head.head.weight"):
        found[f"{last}.{name}"] = floats(VOCAB, H)
    return found


def grouped_query(bias):
    layer = "model.layers.0"
    found = ends() | norms(layer) | experts(layer)
    for name, n in (("q", 64), ("k", 32), ("v", 32)):
        found |= in_fp8(f"{layer}.self_attn.{name}_proj", n, H)
        if bias:
            found[f"{layer}.self_attn.{name}_proj.bias"] = floats(n)
    found |= in_fp8(f"{layer}.self_attn.o_proj", H, 64)
    for name in "qk":
        found[f"{layer}.self_attn.{name}_norm.weight"] = floats(16)
    if bias:
        found |= ffn(f"{layer}.mlp.shared_experts")
        found[f"{layer}.mlp.gate.e_score_correction_bias"] = np.float32([1, 2, 3])
    return found


MODELS = {
    "DeepSeek-V3": (DEEPSEEK_V3, deepseek),
    "Qwen3-MoE": (QWEN3_MOE, lambda: grouped_query(False)),
    "GLM-4.5": (GLM_4_5, lambda: grouped_query(True)),
}


@pytest.mark.parametrize("model", MODELS)
def test_a_model_is_read_and_written_as_it_was(tmp_path, model):
    table, make = MODELS[model]
    tensors = make()
    write_by_hand(tmp_path / "model.safetensors", tensors)
    tree = checkpoint.load_parameters(tmp_path, table)
    layer = tree["layers"]["1" if model == "DeepSeek-V3" else "0"]
    number = "1" if model == "DeepSeek-V3" else "0"
    shapes = {name: q.shape for name, q in layer["experts"].items()}
    assert shapes == {"wi_0": (E, F, H), "wi_1": (E, F, H), "wo": (E, H, F)}
    for i in range(E):
        stored = tensors[f"model.layers.{number}.mlp.experts.{i}.down_proj.weight"]
        assert np.asarray(layer["experts"]["wo"].qvalue[i]).tobytes() == stored.tobytes()
    gate = tensors[f"model.layers.{number}.mlp.gate.weight"]
    np.testing.assert_array_equal(layer["gate_kernel"], gate.T)

    out = tmp_path / "out"
    out.mkdir()
    checkpoint.save_parameters(out, tree, table, config={"model_type": "x"}, file_bytes=40_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    written = {}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    for file in files:
        found = read_by_hand(file)
        assert {name: file.name for name in found}.items() <= index["weight_map"].items()
        assert sum(len(data) for _, _, data in found.values()) <= 40_000
        written |= found
    assert written == read_by_hand(tmp_path / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(len(data) for *_, data in written.values())
    config = json.loads((out / "config.json").read_text())
    section = config["quantization_config"]
    assert config["model_type"] == "x" and section["weight_block_size"] == [128, 128]
    names = section["modules_to_not_convert"]
    assert {"lm_head", f"model.layers.{number}.mlp.gate"} <= set(names)
    assert not [n for n in names if "proj" in n and "eh_proj" not in n]
    assert checkpoint.open(out).quantization.method == "fp8"


def test_trained_kernels_become_an_fp8_checkpoint(tmp_path):
    """ExpertKernels in floats, transposed and quantized, and read again as QArrays."""
    shapes = (E, H, F), (E, H, F), (E, F, H)
    wi_0, wi_1, wo = (jnp.asarray(RNG.standard_normal(s, np.float32)) for s in shapes)
    kernels = fp8.ExpertKernels(wi_0=wi_0, wi_1=wi_1, wo=wo)
    gate = jnp.asarray(RNG.standard_normal((H, E), np.float32))
    parameters = {"layers": [{"experts": kernels, "gate_kernel": gate}]}
    checkpoint.save_parameters(tmp_path, parameters, QWEN3_MOE)
    assert {file.name for file in tmp_path.iterdir()} == {"model.safetensors", "config.json"}
    found = read_by_hand(tmp_path / "model.safetensors")
    one = fp8.quantize(wi_1[2].T, (128, 128))
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    assert found[name] == ("F8_E4M3", [F, H], np.asarray(one.qvalue).tobytes())
    assert found[name + "_scale_inv"] == ("F32", [1, 1], np.asarray(one.scale).tobytes())
    assert found["model.layers.0.mlp.gate.weight"][:2] == ("F32", [E, H])
    layer = checkpoint.load_parameters(tmp_path, QWEN3_MOE)["layers"]["0"]
    expected = fp8.quantize(wo[0].T, (128, 128))
    wo_0 = np.asarray(layer["experts"]["wo"].qvalue[0])
    assert wo_0.tobytes() == np.asarray(expected.qvalue).tobytes()
    np.testing.assert_array_equal(layer["gate_kernel"], gate)
    with pytest.raises(ValueError, match=r"the folder has a checkpoint(?s:.*)  fix  "):
        checkpoint.save_parameters(tmp_path, parameters, QWEN3_MOE)


def test_gate_and_up_in_one_array(tmp_path):
    q = [block_weight(2 * F, H, seed=i) for i in range(E)]
    both = np.stack([w["a.weight"] for w in q])
    scale = np.stack([w["a.weight_scale_inv"] for w in q])
    name = "model.layers.0.mlp.experts.gate_up_proj"
    write_by_hand(tmp_path / "x", {name: both, f"{name}_scale_inv": scale})
    layer = checkpoint.load_parameters(tmp_path / "x", QWEN3_MOE)["layers"]["0"]["experts"]
    for part, rows in (("wi_0", slice(0, F)), ("wi_1", slice(F, 2 * F))):
        assert np.asarray(layer[part].qvalue).tobytes() == both[:, rows].tobytes()
        assert layer[part].scale.shape == (E, 1, 1)
    table = tuple(row for row in QWEN3_MOE if "{expert}" not in row.stored)
    checkpoint.save_parameters(tmp_path, {"layers": {"0": {"experts": layer}}}, table)
    assert read_by_hand(tmp_path / "model.safetensors") == read_by_hand(tmp_path / "x")
    odd = {name: both[:, :200], f"{name}_scale_inv": scale}
    write_by_hand(tmp_path / "x", odd)
    with pytest.raises(ValueError, match=r"cannot be split within its scales(?s:.*)rows 0:100"):
        checkpoint.load_parameters(tmp_path / "x", QWEN3_MOE)
    write_by_hand(tmp_path / "x", {name: both.astype(BF16)})
    layer = checkpoint.load_parameters(tmp_path / "x", QWEN3_MOE)["layers"]["0"]["experts"]
    np.testing.assert_array_equal(layer["wi_1"], both[:, F:].astype(BF16).swapaxes(1, 2))


# ---- gpt-oss ------------------------------------------------------------------------------------

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def mxfp4(name, *shape):
    codes = RNG.integers(0, 16, shape).astype(np.uint8)
    scales = RNG.integers(118, 130, (*shape[:-1], shape[-1] // 32)).astype(np.uint8)
    values = E2M1[codes] * 2.0 ** (np.repeat(scales.astype(int), 32, -1) - 127)
    packed = (codes[..., ::2] | codes[..., 1::2] << 4).reshape(*scales.shape, 16)
    return {f"{name}_blocks": packed, f"{name}_scales": scales}, values


def gpt_oss():
    layer = "model.layers.0"
    found = ends() | norms(layer)
    for name, n, k in (("q", 64, H), ("k", 32, H), ("v", 32, H), ("o", H, 64)):
        found[f"{layer}.self_attn.{name}_proj.weight"] = floats(n, k)
        found[f"{layer}.self_attn.{name}_proj.bias"] = floats(n)
    found[f"{layer}.self_attn.sinks"] = floats(4)
    found[f"{layer}.mlp.router.weight"], found[f"{layer}.mlp.router.bias"] = floats(E, H), floats(E)
    up, up_values = mxfp4(f"{layer}.mlp.experts.gate_up_proj", E, 2 * 160, H)
    down, down_values = mxfp4(f"{layer}.mlp.experts.down_proj", E, H, 160)
    found[f"{layer}.mlp.experts.gate_up_proj_bias"] = floats(E, 2 * 160)
    found[f"{layer}.mlp.experts.down_proj_bias"] = floats(E, H)
    return found | up | down, up_values, down_values


def test_gpt_oss_is_taken_apart_exactly(tmp_path):
    tensors, up, down = gpt_oss()
    write_by_hand(tmp_path / "x", tensors)
    tree = checkpoint.load_parameters(tmp_path / "x", GPT_OSS)
    layer = tree["layers"]["0"]
    experts = layer["experts"]
    np.testing.assert_array_equal(dequantized64(experts["wi_0"]), up[:, ::2])
    np.testing.assert_array_equal(dequantized64(experts["wi_1"]), up[:, 1::2])
    np.testing.assert_array_equal(dequantized64(experts["wo"]), down)
    bias = tensors["model.layers.0.mlp.experts.gate_up_proj_bias"]
    np.testing.assert_array_equal(experts["wi_1_bias"], bias[:, 1::2])
    q = tensors["model.layers.0.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(layer["attention"]["q"], q.T)

    checkpoint.save_parameters(tmp_path, tree, GPT_OSS)
    both = checkpoint.load(tmp_path)[GATE_UP]
    np.testing.assert_array_equal(dequantized64(both), up)
    assert both.has_tile((128, 128)) and both.scale.shape == (E, 3, 1)
    again = checkpoint.load_parameters(tmp_path, GPT_OSS)
    same_bytes(again, tree)
    (tmp_path / "out").mkdir()
    checkpoint.save_parameters(tmp_path / "out", again, GPT_OSS)
    files = [folder / "model.safetensors" for folder in (tmp_path, tmp_path / "out")]
    assert files[0].read_bytes() == files[1].read_bytes()


def same_bytes(tree, other):
    leaves, structure = jax.tree.flatten(tree)
    others, same = jax.tree.flatten(other)
    assert structure == same
    for leaf, expected in zip(leaves, others, strict=True):
        assert np.asarray(leaf).tobytes() == np.asarray(expected).tobytes()


def test_experts_of_gpt_oss_in_layers(tmp_path):
    """Straight from the table into both layers, against float32 of the file's own numbers."""
    linen, nnx = (pytest.importorskip(f"jax_fp8gemm.{door}") for door in ("linen", "nnx"))
    tensors, up, down = gpt_oss()
    write_by_hand(tmp_path / "x", tensors)
    layer = checkpoint.load_parameters(tmp_path / "x", GPT_OSS)["layers"]["0"]
    experts, gate_kernel, gate_bias = (layer[n] for n in ("experts", "gate_kernel", "gate_bias"))
    activation = fp8.ClampedSwiglu(limit=7.0, alpha=1.702, up_offset=1.0)
    options = {"top_k": 2, "normalize": True, "activation": activation}
    kernels = fp8.ExpertKernels(**experts)
    model = nnx.Fp8MoE.from_quantized(gate_kernel, kernels, gate_bias=gate_bias, **options)
    x = jnp.asarray(floats(8, H)) * 0.05  # so that few are clamped
    y, routing = model(x)

    names = ("wi_0", "wi_1", "wo")
    biases = {f"{name}_bias": experts[f"{name}_bias"] for name in names}
    parts = [(f"{name}_{part}", name, part) for name in names for part in ("qvalue", "scale")]
    held = {key: getattr(experts[name], part) for key, name, part in parts}
    gate = {"gate_kernel": gate_kernel, "gate_bias": gate_bias}
    variables = {"params": gate | biases, "quantized": held}
    sizes = {"num_experts": E, "hidden_features": 160, "quantized": True, "use_bias": True}
    sizes["use_gate_bias"] = True
    np.testing.assert_array_equal(linen.Fp8MoE(**sizes, **options).apply(variables, x)[0], y)

    router = "model.layers.0.mlp.router"
    logits = np.asarray(x, float) @ tensors[f"{router}.weight"].astype(float).T
    logits += tensors[f"{router}.bias"].astype(float)
    index = np.argsort(-logits)[:, :2]  # the best two, and a softmax of these
    weights = np.exp(np.take_along_axis(logits, index, 1))
    weights /= weights.sum(1, keepdims=True)
    np.testing.assert_array_equal(routing.expert_index, index)
    stem = "model.layers.0.mlp.experts"
    both, last = (
        tensors[f"{stem}.{name}_bias"].astype(float) for name in ("gate_up_proj", "down_proj")
    )
    expected = np.zeros((8, H))
    for t, row in enumerate(np.asarray(x, float)):
        for expert, weight in zip(index[t], weights[t], strict=True):
            h = up[expert] @ row + both[expert]
            gate, value = np.minimum(h[::2], 7), np.clip(h[1::2], -7, 7)
            a = gate / (1 + np.exp(-1.702 * gate)) * (value + 1)
            expected[t] += weight * (down[expert] @ a + last[expert])
    assert calc_diff(y, expected) < FORWARD


E4M3 = ml_dtypes.float8_e4m3fn
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"


def gate_and_up(path, numbers, scale, end="_scale_inv"):
    """Returns gate and up of a file whose rows take turns, in FP8."""
    write_by_hand(path, {GATE_UP: numbers.astype(E4M3), f"{GATE_UP}{end}": np.float32(scale)})
    experts = checkpoint.load_parameters(path, GPT_OSS)["layers"]["0"]["experts"]
    return experts["wi_0"], experts["wi_1"]


def test_gate_and_up_in_turns_with_a_scale_per_row(tmp_path):
    numbers, scale = floats(E, 2 * 200, 72).astype(E4M3), RNG.random((E, 2 * 200, 1), np.float32)
    for i, q in enumerate(gate_and_up(tmp_path / "x", numbers, scale, "_scale")):
        assert np.asarray(q.qvalue).tobytes() == numbers[:, i::2].tobytes()
        np.testing.assert_array_equal(q.scale, scale[:, i::2])


def test_gate_and_up_in_turns_with_blocks_are_taken_apart_exactly(tmp_path):
    """128 rows of gate lie in two blocks, whose scales are powers of two; the last ones are odd."""
    rows, k = 2 * 200, 160
    numbers = RNG.integers(-7, 8, (E, rows, k)) * 2.0 ** RNG.integers(0, 5, (E, rows, k))
    scale = 2.0 ** RNG.integers(-9, -6, (E, 4, 2))
    values = numbers * scale.repeat(128, 1)[:, :rows].repeat(128, 2)[:, :, :k]
    for i, q in enumerate(gate_and_up(tmp_path / "x", numbers, scale)):
        assert q.shape == (E, 200, k) and q.scale.shape == (E, 2, 2)
        np.testing.assert_array_equal(dequantized64(q), values[:, i::2])
    sharding = NamedSharding(jax.make_mesh((E, 2), ("e", "k")), P("e", None, "k"))
    tree = checkpoint.load_parameters(tmp_path / "x", GPT_OSS, sharding=sharding)
    q = jax.tree.map(jnp.asarray, jax.device_get(tree["layers"]["0"]["experts"]["wi_1"]))
    np.testing.assert_array_equal(dequantized64(q), values[:, 1::2])


def test_gate_and_up_in_turns_as_this_package_writes_them(tmp_path):
    """Normal numbers, whose blocks have the same scale: bits of gate and up quantized apart."""
    numbers = np.random.default_rng(0).standard_normal((2, E, H, 2 * F), np.float32).clip(-4, 4)
    numbers[:, :, 0, ::64] = 5  # the largest of each block, also where gate and up meet
    kernels = [jnp.asarray(w) for w in numbers]
    experts = dict(zip(("wi_0", "wi_1"), kernels, strict=True))
    checkpoint.save_parameters(tmp_path, {"layers": {"0": {"experts": experts}}}, GPT_OSS)
    again = checkpoint.load_parameters(tmp_path, GPT_OSS)["layers"]["0"]["experts"]
    for name, w in experts.items():
        q = fp8.quantize(jnp.swapaxes(w, 1, 2), (128, 128))
        np.testing.assert_array_equal(dequantized64(again[name]), dequantized64(q))


def test_gate_and_up_in_turns_that_no_scale_fits(tmp_path):
    path, numbers = tmp_path / "x", np.full((256, 64), 448.0)
    numbers[129] = 2.0**-9
    with pytest.raises(
        ValueError, match=r"gate_up_proj is not exact(?s:.*)the same scale(?s:.*)fix"
    ):
        gate_and_up(path, numbers, [[0.25], [0.125]])
    words = r"cannot be split within its scales(?s:.*)rows 0:256:2, (?s:.*)powers of two(?s:.*)fix"
    with pytest.raises(ValueError, match=words.replace(", ", ", with a scale of 0.375")):
        gate_and_up(path, numbers, [[0.25], [0.375]])
    with pytest.raises(ValueError, match=words.replace(", ", ", whose width")):
        gate_and_up(path, numbers[:, :50], [[0.25], [0.25]])


HALVES = tuple(
    Row(parameter=f"wi_{i}", stored="wi", layout="kernel", part=part, fp8=True)
    for i, part in enumerate(("first half", "second half"))
)
TURNS = tuple(
    Row(parameter=f"wi_{i}", stored="wi", layout="kernel", part=part, fp8=True)
    for i, part in enumerate(("even", "odd"))
)


@pytest.mark.parametrize("table, in_turns", [(HALVES, False), (TURNS, True)])
@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 127, 128, 129, 200, 300])
def test_gate_and_up_in_fp8_are_joined_exactly(tmp_path, table, in_turns, rows):
    """The tensor has the numbers of both, and is taken apart to the same bytes."""
    rng = np.random.default_rng(rows)
    shape = (2, rows, 96)
    values = [rng.integers(-7, 8, shape) * 2.0 ** rng.integers(-20, -15, shape) for _ in range(2)]
    values[0][1] = 0  # whose scales are 1
    parts = [fp8.quantize(jnp.asarray(v, jnp.float32), (128, 128)) for v in values]
    tree = {f"wi_{i}": part for i, part in enumerate(parts)}
    checkpoint.save_parameters(tmp_path, tree, table)
    both = np.empty((2, 2 * rows, 96))
    for i, value in enumerate(values):
        both[:, slice(i, None, 2) if in_turns else slice(rows * i, rows * (i + 1))] = value
    np.testing.assert_array_equal(dequantized64(checkpoint.load(tmp_path)["wi"]), both)
    same_bytes(checkpoint.load_parameters(tmp_path, table), tree)


def test_gate_and_up_that_cannot_be_joined(tmp_path):
    def part(scale, numbers=1.0, n=100, k=64):
        qvalue = jnp.full((n, k), numbers, jnp.float8_e4m3fn)
        return fp8.QArray(qvalue, jnp.full((-(-n // 128), 1), scale, jnp.float32))

    for table in (HALVES, TURNS):
        for tree, words in [
            ((part(1.5), part(1.5)), "cannot be joined from FP8(?s:.*)a scale of 1.5"),
            ((part(1.0, k=40), part(1.0, k=40)), "cannot be joined from FP8(?s:.*)whose width is"),
            ((part(1.0), part(1.0, n=101)), "the parts of wi differ(?s:.*)100(?s:.*)101"),
            ((part(1.0, 2.0**-9), part(2.0, 448.0)), "wi is not exact in E4M3(?s:.*)float weights"),
        ]:
            with pytest.raises(ValueError, match=rf"save_parameters: .*{words}(?s:.*)"):
                checkpoint.save_parameters(
                    tmp_path, dict(zip(("wi_0", "wi_1"), tree, strict=True)), table
                )
    assert not list(tmp_path.iterdir())


def test_gpt_oss_in_bf16(tmp_path):
    """Its experts then lie [e, in, out]."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    both = floats(E, H, 2 * F)
    write_by_hand(tmp_path / "x", {name: both})
    tree = checkpoint.load_parameters(tmp_path / "x", GPT_OSS)
    experts = tree["layers"]["0"]["experts"]
    np.testing.assert_array_equal(experts["wi_0"], both[..., ::2])
    np.testing.assert_array_equal(experts["wi_1"], both[..., 1::2])
    checkpoint.save_parameters(tmp_path, tree, GPT_OSS)
    again = fp8.quantize(jnp.asarray(both).swapaxes(1, 2), (128, 128))
    found = read_by_hand(tmp_path / "model.safetensors")
    assert found[name] == ("F8_E4M3", [E, 2 * F, H], np.asarray(again.qvalue).tobytes())


# ---- parts of a model ---------------------------------------------------------------------------


def test_a_device_reads_its_own_experts(tmp_path, monkeypatch):
    tensors = {}
    for i in range(4):
        tensors |= in_fp8(f"model.layers.0.mlp.experts.{i}.down_proj", 128, 256)
    write_by_hand(tmp_path / "x", tensors)
    reads, fill = [], Stored.fill

    def counted(self, index, out):
        reads.append((out.size, tuple((s.start, s.stop) for s in index)))
        fill(self, index, out)

    monkeypatch.setattr(Stored, "fill", counted)
    sharding = NamedSharding(jax.make_mesh((4, 2), ("x", "y")), P("x", None, "y"))
    tree = checkpoint.load_parameters(tmp_path / "x", QWEN3_MOE, sharding=lambda name: sharding)
    wo = tree["layers"]["0"]["experts"]["wo"]
    assert wo.qvalue.sharding == sharding and wo.scale.sharding.spec == P("x", None, "y")
    halves = [(128 * 128, ((0, 128), (at, at + 128))) for at in (0, 128)]
    assert sorted(read for read in reads if read[0] > 2) == sorted(4 * halves)
    for i in range(4):
        stored = tensors[f"model.layers.0.mlp.experts.{i}.down_proj.weight"]
        assert np.asarray(wo.qvalue)[i].tobytes() == stored.tobytes()


def test_keep_goes_by_parameters(tmp_path):
    tensors = grouped_query(False) | {"model.rotary_emb.inv_freq": np.ones(4, np.float32)}
    write_by_hand(tmp_path / "x", tensors)
    with pytest.raises(ValueError, match=r"no row for some tensors(?s:.*)inv_freq(?s:.*)  fix  "):
        checkpoint.load_parameters(tmp_path / "x", QWEN3_MOE)
    tree = checkpoint.load_parameters(
        tmp_path / "x", QWEN3_MOE, keep=lambda name: name.endswith(("experts.wi_0", "lm_head"))
    )
    assert list(tree) == ["lm_head", "layers"]
    assert list(tree["layers"]["0"]["experts"]) == ["wi_0"]


def test_what_does_not_fit_is_named(tmp_path):
    path, stem = tmp_path / "x", "model.layers.0.mlp.experts"
    one, other = in_fp8(f"{stem}.0.up_proj", 128, 64), in_fp8(f"{stem}.2.up_proj", 128, 64)
    write_by_hand(path, one | other)
    with pytest.raises(ValueError, match=r"experts.wi_1 has gaps(?s:.*)\[1\] not among them"):
        checkpoint.load_parameters(path, QWEN3_MOE)
    write_by_hand(path, one | in_fp8(f"{stem}.1.up_proj", 128, 32))
    with pytest.raises(ValueError, match=r"wi_1 is of tensors that differ(?s:.*)\[128, 32\]"):
        checkpoint.load_parameters(path, QWEN3_MOE)
    twice = (Row(parameter="a", stored="x"), Row(parameter="a", stored="y"))
    write_by_hand(path, {"x": floats(2), "y": floats(2)})
    with pytest.raises(ValueError, match=r"a is there twice(?s:.*)x, y"):
        checkpoint.load_parameters(path, twice)
    halves = (Row(parameter="a", stored="x", layout="bias", part="even"),)
    write_by_hand(path, {"x": floats(3)})
    with pytest.raises(ValueError, match=r"a is no half"):
        checkpoint.load_parameters(path, halves)
    with pytest.raises(ValueError, match=r"a has the wrong rank"):
        checkpoint.load_parameters(path, (Row(parameter="a", stored="x", layout="kernel"),))
    for stored in ("x", "x.{a}.{b}"):
        row = Row(parameter="a.{layer}", stored=stored)
        with pytest.raises(ValueError, match=r"does not fit itself(?s:.*)  fix  "):
            checkpoint.load_parameters(path, (row,))
    with pytest.raises(TypeError, match=r"table is not a table of names(?s:.*)  fix  "):
        checkpoint.load_parameters(path, {"a": "x"})


def test_what_cannot_be_written_is_named(tmp_path):
    def experts(**kernels):
        return {"layers": {"0": {"experts": kernels}}}

    stacked = tuple(row for row in QWEN3_MOE if "{expert}" not in row.stored)
    w, q = jnp.ones((2, 64, 128)), fp8.quantize(jnp.ones((2, 128, 64)), (128, 128))
    for parameters, table, error, words in [
        ({"other": w}, QWEN3_MOE, ValueError, "no row for other"),
        (experts(wi_0=w), stacked, ValueError, "has not all its parts"),
        (experts(wi_0=w, wi_1=q), stacked, TypeError, "is FP8 in part"),
        (experts(wo=fp8.quantize(w)), QWEN3_MOE, ValueError, "wo has other scales"),
        (experts(wo=w.astype(jnp.int32)), QWEN3_MOE, TypeError, "is no float weight"),
    ]:
        with pytest.raises(error, match=rf"{words}(?s:.*)  fix  "):
            checkpoint.save_parameters(tmp_path, parameters, table)
    with pytest.raises(FileNotFoundError, match=r"no such folder"):
        checkpoint.save_parameters(tmp_path / "missing", {}, QWEN3_MOE)
    assert not list(tmp_path.iterdir())
