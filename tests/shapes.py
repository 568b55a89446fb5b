"""The named shapes of tests, tuning and benchmarks."""

import dataclasses

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
    """A grouped product of a mixture-of-experts layer; rows (or, along k, depth) of one group."""

    variant: str
    g: int
    rows: int
    n: int
    k: int

    @property
    def name(self) -> str:
        return f"{self.variant}_{self.g}x{self.rows}_{self.n}x{self.k}"

    def problem(self):
        from jax_fp8gemm.config import Problem

        if self.variant == "ragged_contracting":  # a weight gradient: [n, k] is the weight
            total = self.g * self.rows
            return Problem(self.variant, self.n, self.k, total, self.g, "1x128_1x128", "f32")
        m = self.rows if self.variant == "masked" else self.g * self.rows
        return Problem(self.variant, m, self.n, self.k, self.g)


_EXPERTS = ((4096, 7168), (7168, 2048), (6144, 7168), (7168, 3072))
GROUPED = [
    *[
        GroupedShape(variant, g, rows, n, k)
        for variant in ("contiguous", "ragged")
        for g, rows in ((4, 8192), (8, 4096))
        for n, k in _EXPERTS
    ],
    *[
        GroupedShape("masked", g, rows, n, k)
        for g, rows in ((1, 1024), (2, 512), (4, 256), (32, 192), (6, 1024), (32, 20), (6, 20))
        for n, k in _EXPERTS[:2]
    ],
    *[
        GroupedShape("ragged_contracting", g, 32768 // g, *_EXPERTS[i])
        for g in (4, 8)
        for i in (0, 1)
    ],
    GroupedShape("ragged_contracting", 16, 2048, *_EXPERTS[0]),
    GroupedShape("ragged", 256, 32, *_EXPERTS[0]),
]
