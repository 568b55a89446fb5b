"""What one expert block is: its options, the checks of its tokens, and the order of its rows."""

import dataclasses

import jax

from jax_fp8gemm._core.errors import describe, fail
from jax_fp8gemm._core.types import ExchangeKind, Precision, ScaleRounding
from jax_fp8gemm._moe.activations import Activation
from jax_fp8gemm._moe.exchange import TokenExchange
from jax_fp8gemm._moe.kernels import ExpertKernels, describe_kernels
from jax_fp8gemm._moe.order import Permutation, cut, first_choices, permutation_of
from jax_fp8gemm._moe.placement import ExpertAxes


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertSpec:
    """Static description of one expert block; as the arguments of expert_ffn.

    Attributes:
      axes: manual axes of the mesh.
      precision: bf16 multiplies by XLA.
      room: tokens that a device sends to another one at most, by all_to_all.
      most_rows: that the experts of a device take at most; None: all.
      expected_rows: that they have if experts are chosen evenly, for the choice of configs; 0: as
        many as there is memory for.
      batch_invariant: of y.
    """

    scale_rounding: ScaleRounding
    shared_columns: bool
    axes: ExpertAxes
    precision: Precision = "fp8"
    activation: Activation = "swiglu"
    capacity: int | None = None
    exchange: TokenExchange | None = None
    room: int = 0
    most_rows: int | None = None
    expected_rows: int = 0
    batch_invariant: bool = False

    def share(self, rows: int) -> float:
        """Returns which part of so many rows is expected to belong to experts of this device."""
        known = self.expected_rows and isinstance(rows, int)
        return min(1.0, self.expected_rows / rows) if known else 1.0


def check_tokens(
    op: str,
    x: jax.Array,
    expert_index: jax.Array,
    gate_weights: jax.Array,
    kernels: ExpertKernels,
) -> None:
    named = {"x": x, "expert_index": expert_index, "gate_weights": gate_weights}
    got = ", ".join(describe(name, value) for name, value in named.items())
    got += f", {describe_kernels(kernels)}"
    if (x.ndim, expert_index.ndim) != (2, 2) or expert_index.shape[0] != x.shape[0]:
        expected, fix = "x [t, h], expert_index [t, top_k]", "reshape them to one row per token"
        fail(op, "x and expert_index do not fit.", got, expected, fix)
    if gate_weights.shape != expert_index.shape:
        expected, fix = (
            f"gate_weights {list(expert_index.shape)}",
            "pass one weight for each choice",
        )
        fail(op, "expert_index and gate_weights differ in shape.", got, expected, fix)
    if x.shape[1] != kernels.sizes[1]:
        expected, fix = f"wi_0 [e, {x.shape[1]}, f]", "if wi_0 is [e, f, h], swap its last dims"
        if kernels.is_fp8:
            expected, fix = f"wo [e, {x.shape[1]}, f]", "FP8 matrices are [e, out, in]"
        fail(op, "dim h differs between x and wi_0.", got, expected, fix)


def check_batch_invariant(
    op: str, axes: ExpertAxes, exchange: ExchangeKind, bounds: dict[str, float | None]
) -> None:
    """Raises where the rows that stand beside a token may change its result.

    Args:
      bounds: by name, what limits the rows that are computed.
    """
    given = [f"{name}={value}" for name, value in bounds.items() if value is not None]
    if given:
        what = "other tokens decide which rows have room, so nothing is batch_invariant."
        fix = "leave it out, so that every row is kept"
        fail(op, what, f"batch_invariant=True, {', '.join(given)}", "no bound on rows", fix)
    if axes.tensor or (axes.experts and exchange == "all_gather"):
        what = "results are summed by a collective, whose order may depend on the number of rows."
        got = f"batch_invariant=True, expert_axis={axes.experts}, tensor_axis={axes.tensor}, "
        got += f"exchange={exchange!r}"
        expected, fix = "sums in a fixed order", 'leave tensor_axis out, and pass "all_to_all"'
        fail(op, what, got, expected, fix, NotImplementedError)


def permutation_here(expert_index: jax.Array, e: int, spec: ExpertSpec) -> Permutation:
    """Returns the order of the rows of this device's e experts."""
    if spec.axes.experts:
        expert_index = expert_index - e * jax.lax.axis_index(spec.axes.experts)
    if spec.most_rows is not None:
        expert_index = first_choices(expert_index, e, spec.most_rows)
    permutation = permutation_of(expert_index, e)
    if spec.capacity is not None:
        permutation = cut(permutation, spec.capacity)
    if spec.most_rows is not None and spec.precision == "fp8":  # the rest lies past the groups
        permutation = dataclasses.replace(permutation, order=permutation.order[: spec.most_rows])
    return permutation


def rows_here(permutation: Permutation, gate_weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the token of each row, and its weight."""
    token = permutation.order // gate_weights.shape[1]
    return token, gate_weights.reshape(-1)[permutation.order]
