"""The one table of named shapes, for tests, benchmarks and documentation."""

import dataclasses

import numpy as np

from jax_fp8gemm._core.types import OutName, ScalesName, VariantName
from jax_fp8gemm._select.problem import Problem
from jax_fp8gemm._tools import operands

CARDS = ("NVIDIA H200", "NVIDIA H100 80GB HBM3")  # that have tuned rows of their own

# Weights [n, k] of DeepSeek-V3's linear layers (arXiv 2412.19437, section 4.2: hidden 7168).
WEIGHTS = {
    "q_down": (2112, 7168),  # with the kv down-projection beside it
    "kv_down": (576, 7168),
    "q_up": (24576, 1536),
    "kv_up": (32768, 512),
    "attention_out": (7168, 16384),
    "ffn_up": (4096, 7168),
    "ffn_down": (7168, 2048),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One product; `name` is what tests print."""

    name: str
    m: int
    n: int
    k: int
    scales: ScalesName = "1x128_128x128"
    out: OutName = "bf16"


DENSE = [
    Shape(f"{name}_m{m}", m, n, k)
    for m in (1, 64, 128, 256, 1024, 4096)
    for name, (n, k) in WEIGHTS.items()
] + [Shape("square", 8192, 8192, 8192)]

# m and n of a weight gradient are the weight's dims, k is 4096 tokens.
WEIGHT_GRADIENT = [
    Shape(f"{name}_gradient", n, k, 4096, "1x128_1x128", "f32") for name, (n, k) in WEIGHTS.items()
]

# Odd sizes: tails of every kind, less than one block, an odd number of columns.
ODD = [
    Shape("one_row", 1, 128, 128),
    Shape("one_element", 1, 1, 16),
    Shape("tail_m", 129, 256, 256),
    Shape("tail_n", 128, 257, 256),
    Shape("tail_k", 64, 128, 272),
    Shape("short_k", 63, 72, 112),
    Shape("odd_all", 67, 131, 144),
    Shape("known_failure", 7, 576, 576),  # broke DeepGEMM once
    Shape("five_rows", 5, 7, 384),
    Shape("two_blocks", 255, 384, 640),
    Shape("wide", 3, 4100, 512),
    Shape("tall", 1000, 24, 128),
    Shape("many_blocks", 520, 1544, 896),
]


@dataclasses.dataclass(frozen=True)
class Groups:
    """Sizes of groups of rows, and how many rows there are."""

    name: str
    sizes: tuple[int, ...]
    m: int


GROUPS = [
    Groups("one_group", (70,), 70),
    Groups("even_groups", (128, 128, 128), 384),
    Groups("edges_of_a_block", (1, 127, 128, 129, 255, 257), 897),
    Groups("empty_groups", (0, 130, 0, 0, 57, 0), 187),
    Groups("all_empty", (0, 0, 0), 200),
    Groups("no_rows", (0, 0), 0),
    Groups("all_to_one_expert", (0, 300, 0), 300),
    Groups("sum_below_m", (100, 0, 20), 400),
    Groups("sum_above_m", (200, 300, 5), 300),
    Groups("negative_sizes", (-5, 100, -1, 30), 130),
    Groups("huge_sizes", (2**31 - 1, 2**31 - 1, 7), 150),
    Groups("many_groups", tuple(i * 7 % 5 for i in range(512)), 1100),
    Groups("around_a_warp", tuple(3 if i in (0, 31, 32, 63, 64) else 0 for i in range(70)), 15),
]


@dataclasses.dataclass(frozen=True)
class GroupedShape:
    """A grouped product of a mixture-of-experts layer.

    Attributes:
      rows: of one group on average (along k: its depth), in round numbers; names the shape.
      total: of all groups together.
      spread: sizes are drawn from this range of multiples of the mean.
    """

    variant: VariantName
    g: int
    rows: int
    total: int
    n: int
    k: int
    spread: tuple[float, float] = (0.7, 1.3)

    @property
    def name(self) -> str:
        return f"{self.variant}_{self.g}x{self.rows}_{self.n}x{self.k}"

    def problem(self) -> Problem:
        if self.variant == "ragged_contracting":  # a weight gradient: [n, k] is the weight
            return Problem(self.variant, self.n, self.k, self.total, self.g, "1x128_1x128", "f32")
        m = self.rows if self.variant == "masked" else self.total
        return Problem(self.variant, m, self.n, self.k, self.g)

    def sizes(self) -> np.ndarray:
        """Returns the sizes of the groups."""
        return operands.group_sizes(self.problem(), self.total, spread=self.spread)

    def operands(self) -> tuple:
        return operands.random_operands(self.problem(), self.sizes())


_EXPERTS = ((4096, 7168), (7168, 2048), (6144, 7168), (7168, 3072))
_MASKED = (
    (1, 1024, 1206),
    (2, 512, 1109),
    (4, 256, 1099),
    (32, 192, 5867),
    (6, 1024, 5941),
    (32, 20, 602),
    (6, 20, 128),
)
GROUPED = [
    *[
        GroupedShape(variant, g, rows, total, n, k)
        for variant in ("contiguous", "ragged")
        for g, rows, total in ((4, 8192, 34272), (8, 4096, 34507))
        for n, k in _EXPERTS
    ],
    *[
        GroupedShape("masked", g, rows, total, n, k)
        for g, rows, total in _MASKED
        for n, k in _EXPERTS[:2]
    ],
    *[
        GroupedShape("ragged_contracting", g, 32768 // g, total, *_EXPERTS[i])
        for g, total in ((4, 34688), (8, 35072))
        for i in (0, 1)
    ],
    GroupedShape("ragged_contracting", 16, 2048, 33152, *_EXPERTS[0]),
    GroupedShape("ragged", 256, 32, 8192, *_EXPERTS[0], spread=(0, 2)),
]


# ---- Shapes that no table was tuned for ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layer:
    """The weight [n, k] of a linear layer of a public model, by its config.json."""

    model: str
    name: str
    n: int
    k: int


def _layers(model: str, **weights: tuple[int, int]) -> list[Layer]:
    return [Layer(model, name, n, k) for name, (n, k) in weights.items()]


# qkv: the three projections side by side; gate_up: both halves of a gated layer; expert: of one.
# k is a multiple of 16 and n of 8, because the copy engine reads and writes rows that start at
# multiples of 16 bytes. Several are no multiple of 128, so that their last block is not full.
LAYERS = [
    *_layers(
        "Llama-3-8B",
        qkv=(6144, 4096), out=(4096, 4096), gate_up=(28672, 4096), down=(4096, 14336),
    ),
    *_layers(
        "Llama-3-70B",
        qkv=(10240, 8192), gate_up=(57344, 8192), down=(8192, 28672),
    ),
    *_layers("Llama-3.1-405B", qkv=(18432, 16384), out=(16384, 16384), up=(53248, 16384)),
    *_layers("Qwen3-0.6B", qkv=(4096, 1024), out=(1024, 2048), down=(1024, 3072)),
    *_layers(
        "Qwen3-32B",
        qkv=(10240, 5120), out=(5120, 8192), gate_up=(51200, 5120), down=(5120, 25600),
    ),
    *_layers(
        "Qwen3-30B-A3B",
        qkv=(5120, 2048), expert_up=(1536, 2048), expert_down=(2048, 768),
        router=(128, 2048),
    ),
    *_layers(
        "Qwen3-235B-A22B",
        qkv=(9216, 4096), out=(4096, 8192), expert_up=(3072, 4096), expert_down=(4096, 1536),
    ),
    *_layers(
        "GLM-4.5",
        qkv=(14336, 5120), out=(5120, 12288), expert_up=(3072, 5120), expert_down=(5120, 1536),
    ),
    # Its experts are 1408 wide; one of eight GPUs has 176 columns of gate and of up.
    *_layers("GLM-4.5-Air", expert_up_of_8=(352, 4096), expert_down_of_8=(4096, 176)),
    *_layers(
        "Kimi-K2",
        q_up=(12288, 1536), kv_up=(16384, 512), out=(7168, 8192), dense_up=(36864, 7168),
    ),
    *_layers(
        "gpt-oss-120b",
        qkv=(5120, 2880), out=(2880, 4096), expert_up=(5760, 2880), expert_down=(2880, 2880),
    ),
    *_layers("Mixtral-8x22B", qkv=(8192, 6144), expert_up=(32768, 6144), expert_down=(6144, 16384)),
    *_layers("Gemma-2-9B", qkv=(8192, 3584), out=(3584, 4096), gate_up=(28672, 3584)),
    *_layers("Gemma-3-1B", qkv=(1536, 1152), gate_up=(13824, 1152), down=(1152, 6912)),
    *_layers("Gemma-3-27B", out=(5376, 4096), gate_up=(43008, 5376), down=(5376, 21504)),
    *_layers("DeepSeek-V3", dense_down=(7168, 18432), q_up_of_8=(3072, 1536), router=(256, 7168)),
    *_layers("GPT-2-XL", qkv=(4800, 1600), up=(6400, 1600), down=(1600, 6400)),
    *_layers("SmolLM-135M", qkv=(960, 576), gate_up=(3072, 576), down=(576, 1536)),
]  # fmt: skip

MOST_ROWS = 16384
MOST_WORK = 3e12  # multiplications and additions of one launch: about 2 ms on an H200


def drawn(seed: int = 2026, count: int = 64) -> list[Shape]:
    """Returns dense shapes of LAYERS whose m is log-uniform between 1 and 16384.

    The largest weights get fewer rows, so that no launch takes more than MOST_WORK. Every layer
    comes once before any comes twice. No (n, k) of LAYERS is in a tuned table, so these rows tell
    how well a config is chosen where nobody measured.
    """
    draw = np.random.default_rng(seed)
    found: dict[str, Shape] = {}
    while len(found) < count:
        for layer in (LAYERS[i] for i in draw.permutation(len(LAYERS))):
            most = min(MOST_ROWS, MOST_WORK / (2 * layer.n * layer.k))
            m = round(most ** draw.uniform())
            name = f"{layer.model}_{layer.name}_m{m}"
            if len(found) < count:
                found[name] = Shape(name, m, layer.n, layer.k)
    return list(found.values())
