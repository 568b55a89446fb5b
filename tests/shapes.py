"""The named shapes of tests, tuning and benchmarks."""

import dataclasses

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
    scales: str = "1x128_128x128"
    out: str = "bf16"


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
      total: of all groups together; those of the stored DeepGEMM timings.
      spread: sizes are drawn from this range of multiples of the mean.
    """

    variant: str
    g: int
    rows: int
    total: int
    n: int
    k: int
    spread: tuple[float, float] = (0.7, 1.3)

    @property
    def name(self) -> str:
        return f"{self.variant}_{self.g}x{self.rows}_{self.n}x{self.k}"

    def problem(self):
        from jax_fp8gemm._select.problem import Problem

        if self.variant == "ragged_contracting":  # a weight gradient: [n, k] is the weight
            return Problem(self.variant, self.n, self.k, self.total, self.g, "1x128_1x128", "f32")
        m = self.rows if self.variant == "masked" else self.total
        return Problem(self.variant, m, self.n, self.k, self.g)

    def operands(self) -> tuple:
        from jax_fp8gemm import tuning

        problem = self.problem()
        sizes = tuning.group_sizes(problem, self.total, spread=self.spread)
        return tuning.random_operands(problem, sizes)


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
