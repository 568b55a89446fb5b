"""Times configs for the tables of this package: `python -m jax_fp8gemm.tuning`.

For your own file there is `python -m jax_fp8gemm tune`.
"""

import argparse
import pathlib

from jax_fp8gemm._tools.tune import tune_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "shapes",
        type=pathlib.Path,
        help="file with a JSON list of {variant, m, n, k}, also g, scales, out, total (of rows)",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=pathlib.Path,
        help="tuned/*.json: gets the winners and keeps rows of other shapes",
    )
    parser.add_argument("--log", help="where every timing goes")
    parser.add_argument("--count", type=int, default=12, help="configs to time for each shape")
    parser.add_argument("--reps", type=int, default=9)
    options = parser.parse_args()
    tune_file(options.shapes, options.out, options.log, options.count, options.reps)


if __name__ == "__main__":
    main()
