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
