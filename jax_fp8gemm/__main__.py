"""`python -m jax_fp8gemm`: what is here, what is missing, and whether the kernels work.

`python -m jax_fp8gemm profile MODULE:FUNCTION`: where a program's time goes on the GPU.
`python -m jax_fp8gemm tune MODULE:FUNCTION`: the fastest configs for its GEMMs, kept in a file.
`python -m jax_fp8gemm compile MODULE:FUNCTION`: fills the kernel cache; no GPU is needed.
"""

import argparse
import contextlib
import importlib
import platform
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jax_fp8gemm._bind.gemm_op import device_kind
from jax_fp8gemm._bind.native import cache_folder, compile, device_facts, nvrtc_facts
from jax_fp8gemm._core.errors import fail
from jax_fp8gemm._core.version import __version__
from jax_fp8gemm._ops.gemm import gemm
from jax_fp8gemm._ops.quantize import quantize
from jax_fp8gemm._select.choice import select
from jax_fp8gemm._select.problem import Problem, attributes
from jax_fp8gemm._tools.problems import EXPECTED, is_problem, parse_problem
from jax_fp8gemm._tools.profile import profile
from jax_fp8gemm._tools.programs import calls_of, problems_of
from jax_fp8gemm._tools.tune import hopper, tune_problems
from jax_fp8gemm._tools.warm import warm

# What the program to profile is.
PROGRAM = "a function without arguments that returns a jitted function and its arguments"


def line(name: str, value: object) -> None:
    print(f"{name:12} {value}")


def fix_of(error: str) -> str:
    """Returns the last part of a four-part message, what to do, after what was found."""
    got, fix = (error.split(f"\n  {part} ")[1].split("\n")[0].strip() for part in ("got", "fix"))
    return f"{got}; {fix}"


def devices() -> bool:
    """Prints the GPUs and the driver; returns whether a Hopper GPU is there."""
    facts = device_facts()
    if "error" in facts:
        line("device", f"no GPU: {fix_of(facts['error'])}")
        return False
    line("driver", f"CUDA {facts['driver']}")
    for device in facts["devices"]:
        hopper = device["compute_capability"] == "9.0"
        note = "" if hopper else ": the kernels need compute capability 9.0 (H100, H200)"
        line("device", f"{device['name']}, {device['compute_capability']}{note}")
    return any(device["compute_capability"] == "9.0" for device in facts["devices"])


def toolchain() -> bool:
    """Prints the run-time compiler and the cache; returns whether kernels can be compiled."""
    facts = nvrtc_facts()
    if "error" in facts:
        line("compiler", f"missing: {fix_of(facts['error'])}")
    else:
        line("compiler", f"NVRTC {facts['version']} from {facts['path']}")
    cache = cache_folder()
    line("cache", (cache.path or "none") + (f": {fix_of(cache.warning)}" if cache.warning else ""))
    return "error" not in facts


def compile_check() -> None:
    """Compiles, or loads, one kernel."""
    problem = Problem("dense", 4096, 4096, 7168)
    made = compile(attributes(problem, select(problem)))
    line("kernel", f"from {made['origin']} in {1e3 * made['seconds']:.1f} ms")


def product_check() -> bool:
    """Multiplies once, and compares with float64; returns whether the product is right."""
    keys = jax.random.split(jax.random.key(0))
    lhs = quantize(jax.random.normal(keys[0], (200, 512)))
    rhs = quantize(jax.random.normal(keys[1], (136, 512)), (128, 128))
    out = gemm(lhs, rhs, out_dtype=jnp.float32)
    exact = np.asarray(jax.device_get(lhs.qvalue), np.float64).reshape(200, 4, 128)
    exact = exact * np.asarray(lhs.scale, np.float64)[:, :, None]
    other = np.asarray(jax.device_get(rhs.qvalue), np.float64).reshape(136, 4, 128)
    scale = np.repeat(np.asarray(rhs.scale, np.float64), 128, 0)[:136]
    expected = np.einsum("mbk,nbk->mn", exact, other * scale[:, :, None])
    error = np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected)
    where = next(iter(out.devices())).device_kind
    line("product", f"on {where}, relative error {error:.1e}")
    return bool(error < 1e-3)


def load_program(op: str, place: str) -> tuple:
    """Calls FUNCTION of MODULE; returns a function and its arguments.

    Raises:
      ValueError: there is no such function, or it returns something else.
      TypeError: there is no such function, or it returns something else.
    """
    module, _, name = place.partition(":")
    if not module or not name:
        fix = "write the module, a colon and the function, such as models.step:program"
        fail(op, "there is no function to call.", place, "MODULE:FUNCTION", fix)
    try:
        make = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        fix = "run it from the folder that has the module, or set PYTHONPATH"
        fail(op, f"module {module!r} cannot be imported.", str(error), "a module", fix)
    if not callable(make):
        fix = f"define {name} in {module}"
        fail(op, f"{module} has no function {name!r}.", place, "MODULE:FUNCTION", fix)
    made = make()
    if not isinstance(made, tuple) or not made or not callable(made[0]):
        got = f"{name}() returned {type(made).__name__}"
        expected, fix = "a tuple: a function, then its arguments", "return jax.jit(step), x, w"
        fail(op, f"{place} makes no program.", got, expected, fix, TypeError)
    return made


def tune_all(places: list[str], configs: int) -> None:
    """Tunes GEMMs given by their shapes, and those of programs."""
    device = hopper()
    problems: list[Problem] = []
    for place in places:
        if is_problem(place):
            problems.append(parse_problem("tune", place, device))
        else:
            problems += problems_of(calls_of(*load_program("tune", place)), device)
    tune_problems(list(dict.fromkeys(problems)), configs)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m jax_fp8gemm", description=__doc__)
    commands = made.add_subparsers(dest="command")
    command = commands.add_parser("profile", help="kernels of a program by kind, on the GPU")
    command.add_argument("place", metavar="MODULE:FUNCTION", help=PROGRAM)
    command.add_argument("--reps", type=int, default=5, help="runs to take the mean of")
    command.set_defaults(
        run=lambda given: profile(*load_program("profile", given.place), reps=given.reps)
    )
    command = commands.add_parser("tune", help="the fastest configs of a program's GEMMs")
    shape = f"{PROGRAM}; or the shape of a GEMM: {EXPECTED}"
    command.add_argument("places", metavar="MODULE:FUNCTION", nargs="+", help=shape)
    command.add_argument("--configs", type=int, default=12, help="to time for each GEMM")
    command.set_defaults(run=lambda given: tune_all(given.places, given.configs))
    command = commands.add_parser("compile", help="fill the kernel cache for a program")
    command.add_argument("place", metavar="MODULE:FUNCTION", help=PROGRAM)
    command.add_argument("--device", help="the card that it is for, as JAX names it")
    command.set_defaults(
        run=lambda given: warm(
            *load_program("compile", given.place), device=given.device or device_kind()
        )
    )
    return made


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    if given.command is None:
        return report()
    try:
        given.run(given)
    except (RuntimeError, TypeError, ValueError) as error:
        if "\n  fix " not in str(error):
            raise  # an error of the program, with the place where it happened
        print(error, file=sys.stderr)
        return 1
    return 0


def report() -> int:
    """Prints what `python -m jax_fp8gemm` says; returns its exit status."""
    line("jax_fp8gemm", __version__)
    line("versions", f"jax {jax.__version__}, Python {platform.python_version()}")
    hopper, compiler = devices(), toolchain()
    if compiler:
        compile_check()
    kernels = hopper and compiler and jax.default_backend() == "gpu"
    on_cpu = jax.default_device(jax.devices("cpu")[0])
    with contextlib.nullcontext() if kernels else on_cpu:
        good = product_check()
    if not good:
        line("result", "WRONG PRODUCT: please report this")
    elif kernels:
        line("result", "kernels run on this GPU")
    else:
        needed = "a Hopper GPU, NVRTC, and jax[cuda12] or jax[cuda13]"
        line("result", f"the reference runs on the CPU; kernels need {needed}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
