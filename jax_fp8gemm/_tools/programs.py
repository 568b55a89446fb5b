"""The custom calls of a jitted program, found by lowering it."""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from jax_fp8gemm._bind.gemm_op import GEMM, problem_of
from jax_fp8gemm._bind.op import Call, recording
from jax_fp8gemm._select.problem import Problem

# In a lowered program, what is cut up over devices only when it is compiled.
LATER = "CustomSPMDPartitioning"


def calls_of(function: Callable, *args: Any) -> list[Call]:
    """Returns the calls of GEMMs and casts that one device runs, each kind once.

    Lowering meets every one, in loops, derivatives and shard_map too. Where JAX cuts a program up
    over several devices, their shapes are known once it is compiled.

    Args:
      function: jitted, or to be jitted.
      args: its arguments: pytrees of arrays or of jax.ShapeDtypeStruct.
    """

    def fresh(*args):  # JAX would not lower a function again that it knows
        return function(*args)

    with recording() as calls:
        lowered = jax.jit(fresh).lower(*args)
        if LATER in lowered.as_text():
            lowered.compile()
    return list(dict.fromkeys(calls))


def problems_of(calls: Iterable[Call], device: str) -> list[Problem]:
    """Returns the GEMMs among the calls whose config is the library's choice, each once."""
    found = (
        problem_of(call.spec, call.operands, device)
        for call in calls
        if call.op is GEMM and call.spec.config is None
    )
    return list(dict.fromkeys(found))
