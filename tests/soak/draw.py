"""Which programs the soak runs: drawn from a seed, mostly small and awkward, some large."""

import math

import numpy as np
from soak.casts import KINDS, Cast, Swiglu
from soak.gemms import DIMS, Gemm
from soak.gradients import Gradients
from soak.sharded import STRATEGIES, Sharded

from jax_fp8gemm._select.candidates import candidates
from jax_fp8gemm._select.problem import Problem

EDGES = (1, 2, 3, 7, 8, 9, 31, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 385, 511, 513, 640)
MOST_WORK, MOST_LARGE_WORK = 2**30, 2**35  # multiplications, those with other groups' zeros counted
MOST_NUMBERS = 2**27  # of an operand, likewise
LARGE_SHARE = 0.04

Check = Gemm | Gradients | Cast | Swiglu | Sharded


class Draw:
    """Draws programs: tuples of checks that run one after the other in one compiled step.

    tiny: for a CPU.
    """

    def __init__(self, seed: int, tiny: bool = False):
        self.rng, self.tiny = np.random.default_rng(seed), tiny

    def program(self) -> tuple[Check, ...]:
        kind = self.rng.choice(6, p=[0.55, 0.1, 0.1, 0.1, 0.1, 0.05])
        if kind == 0:
            return (self.gemm(),)
        if kind == 1:  # a small one captured before a large one
            return tuple(sorted((self.gemm(), self.gemm()), key=lambda check: check.work))
        if kind == 2:  # a step of several, one of them twice
            checks = [self.gemm() for _ in range(self.rng.integers(1, 3 if self.tiny else 5))]
            return (*checks, checks[0])
        if kind == 3:
            return (self.gradients(),)
        return (self.cast() if kind == 4 else self.swiglu(),)

    # ---- sizes ----

    def some(self, *choices):
        return choices[self.rng.integers(len(choices))]

    def rows(self, most: int = 700) -> int:
        most = min(most, 40) if self.tiny else most
        if self.rng.random() < 0.4:
            return int(self.rng.choice([edge for edge in EDGES if edge <= most]))
        return round(math.exp(self.rng.uniform(0, math.log(most))))

    def columns(self) -> int:
        n, multiple = self.rows(1400), self.some(1, 2, 8, 16, 64)
        return n if self.tiny else -(-n // multiple) * multiple

    def depth(self) -> int:
        most = 12 if self.tiny else self.some(8, 24, 64)
        return 16 * int(self.rng.integers(1, most + 1))

    def shape(self, groups: int) -> dict[str, int]:
        """Returns m, n, k of limited work."""
        large = not self.tiny and self.rng.random() < LARGE_SHARE
        while True:
            m, n, k = self.rows(), self.columns(), self.depth()
            if large:
                m, n, k = (int(x * self.rng.integers(1, 12)) for x in (m, n, k))
            fits = (m + n) * k * groups <= MOST_NUMBERS
            if fits and m * n * k * groups <= (MOST_LARGE_WORK if large else MOST_WORK):
                return {"m": m, "n": n, "k": k}

    # ---- checks ----

    def gemm(self) -> Gemm:
        variant = self.some(*DIMS, "dense", "ragged", "ragged")
        g = 1 if variant == "dense" else self.some(1, 2, 3, 5, 8, *(() if self.tiny else (33, 70)))
        shape = self.shape(g)
        if variant in ("ragged", "masked") and self.rng.random() < 0.25:
            return self._casting(variant, g, shape)
        scales = self.some(
            "1x128_128x128", "1x128_128x128", "1x128_1x128", "row_row", "tensor_tensor"
        )
        if variant == "ragged_contracting" and scales == "1x128_128x128":
            scales = "1x128_1x128"
        out = self.some("bf16", "f32")
        gemm = {"variant": variant, "g": g, "scales": scales, "out": out, **shape}
        init = out == "f32" and self.rng.random() < 0.4
        cast = self.rng.random() < 0.3
        rest = {"init": init, "cast": cast, "extremes": not cast and self.rng.random() < 0.3}
        if variant == "ragged" and not init and self.rng.random() < 0.3:
            return Gemm(**gemm, **rest, leave_rest=True)
        return Gemm(**gemm, **rest, config=self._config(gemm, init))

    def _config(self, gemm: dict, init: bool):
        if self.tiny or self.rng.random() < 0.5:
            return None
        found = candidates(Problem(**gemm, accumulate=init))
        return found[self.rng.integers(len(found))]

    def _casting(self, variant: str, g: int, shape: dict[str, int]) -> Gemm:
        """Returns a GEMM that casts its rhs: dims are multiples of 16, halves of 128."""
        shape["n"] = -(-shape["n"] // 16) * 16
        rhs, pair = self.some("bf16", "bf16_transposed"), self.rng.random() < 0.4
        if pair:
            last = "n" if rhs == "bf16_transposed" else "k"
            shape[last] = -(-shape[last] // 256) * 256
        cast = self.rng.random() < 0.5
        extremes = not cast and self.rng.random() < 0.4
        leave = variant == "ragged" and self.rng.random() < 0.5
        rest = {"cast": cast, "pair": pair, "extremes": extremes, "leave_rest": leave}
        return Gemm(variant, **shape, g=g, rhs=rhs, **rest)

    def gradients(self) -> Gradients:
        g = self.some(0, 0, 1, 3, 8)
        shape = self.shape(max(g, 1))
        casting = bool(g) and self.rng.random() < 0.5
        if casting:
            shape = {name: size if name == "m" else -(-size // 16) * 16
                     for name, size in shape.items()}  # fmt: skip
        elif self.rng.random() < 0.5:
            shape["k"] = self.rows()
        dtype = "bf16" if casting else self.some("bf16", "f32")
        residuals = self.some("fp8_t", "fp8", "input")
        return Gradients(**shape, g=g, dtype=dtype, residuals=residuals, cast_in_gemm=casting)

    def sharded(self, devices: int) -> tuple[Sharded]:
        """Returns a program over so many devices, which split any dim of it evenly."""
        most = 3 if self.tiny else 12
        m, n, k = (devices * self.some(16, 128) * int(self.rng.integers(1, most)) for _ in range(3))
        split, dtype = self.some(*STRATEGIES), self.some("bf16", "f32")
        return (Sharded(m, n, k, dtype=dtype, residuals=self.some("fp8_t", "fp8"), split=split),)

    def cast(self) -> Cast:
        kind = self.some(*KINDS)
        grouped = kind != "quantize" and self.rng.random() < 0.6
        tile = "1x128"
        if kind == "quantize":
            tile = self.some("1x128", "128x128", "row", "tensor")
        elif kind in ("transposed", "both") and not grouped:
            tile = self.some("1x128", "128x128")
        gathers = kind in ("rows", "both", "requantize") and tile == "1x128"
        rounding = self.some("pow2", "pow2", "none")
        turns = kind in ("transposed", "both", "requantize") and tile == "1x128"
        return Cast(
            kind, self.rows(), self.some(self.rows(), self.depth()),
            dtype=self.some("bf16", "f16", "f32"), tile=tile,
            rounding=rounding, g=self.some(1, 3, 8, 40) if grouped else 0,
            share=turns and rounding == "pow2" and self.rng.random() < 0.5,
            index=gathers and self.rng.random() < 0.4, extremes=self.rng.random() < 0.4,
        )  # fmt: skip

    def swiglu(self) -> Swiglu:
        backward = self.rng.random() < 0.6
        f = 128 * int(self.rng.integers(1, 2 if self.tiny else 9))
        f = f if backward else self.some(f, self.rows())
        return Swiglu(self.rows(), f, backward=backward, rounding=self.some("pow2", "none"),
                      g=self.some(0, 1, 3, 8, 40))  # fmt: skip
