"""What keeps the experts of a layer equally busy: the bias of the choice, and a loss."""

import jax
import jax.numpy as jnp

from jax_fp8gemm._bind.meshes import enter
from jax_fp8gemm._bind.partition import Dim, Rule
from jax_fp8gemm._core.checks import as_float, is_integer
from jax_fp8gemm._core.errors import describe, fail
from jax_fp8gemm._moe.order import count_choices
from jax_fp8gemm._moe.routing import SMALLEST_SUM, Routing


def update_bias(
    bias: jax.Array,
    routing: Routing,
    *,
    rate: float = 0.001,  # DeepSeek-V3, section 4.2
    axis: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """Returns the bias for the next step: more for experts with few tokens, less for the others.

    bias[i] + rate · sign(mean of load - load[i]), load[i] = number of choices of expert i

    Args:
      bias: f32 [e], what `route` or `moe` was given.
      routing: what it returned. Choices outside 0..e-1 count nothing. Leading dims are fine, as of
        the microbatches of a `jax.lax.scan`: all choices together are one load.
      rate: the step, in units of a score.
      axis: inside shard_map, the mesh axis, or axes, that split the tokens. The load is then that
        of all tokens. Elsewhere routing has all tokens.

    Returns:
      [e], of bias's dtype.

    Raises:
      ValueError: bias is not one number for each expert.
      TypeError: bias is not an array of floats.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2; Wang et al. (arXiv 2408.15664).

    Example:
      y, routing = moe(x, gate_kernel, kernels, top_k=8, score_function="sigmoid", bias=bias)
      bias = update_bias(bias, routing)
    """
    bias = as_float("update_bias", "bias", bias)
    e = routing.scores.shape[-1]
    if bias.shape != (e,):
        got = f"{describe('bias', bias)}, {describe('scores', routing.scores)}"
        fail("update_bias", "bias does not fit the experts.", got, f"bias [{e}]", "pass one each")
    load = count_choices(routing.expert_index, e)
    if axis is not None:
        load = jax.lax.psum(load, axis)
    load = load.astype(jnp.float32)
    step = rate * jnp.sign(load.mean() - load)
    return bias + step.astype(bias.dtype)


def sequence_loss(
    routing: Routing,
    sequence_length: int,
    *,
    axis: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """Returns the load-balance loss within each sequence, as a mean over the sequences.

    Σ_i f_i · P_i, f_i = e / (top_k · T) · (number of choices of expert i by the sequence's tokens),
    P_i = the mean over its tokens of expert i's score, scores of a token normalized to the sum 1

    1 for a perfect balance, more for a worse one. Multiply it by a small factor.

    Args:
      routing: what `route` or `moe` returned for whole sequences, one after the other, as of x
        [sequences, T, h]. Choices outside 0..e-1 count nothing.
      sequence_length: T, in tokens.
      axis: inside shard_map, the mesh axis, or axes, over which whole sequences are split evenly.
        The mean is then over all of them. Elsewhere routing has all tokens.

    Returns:
      f32 []; differentiable in routing.scores.

    Raises:
      ValueError: the tokens are not whole sequences.

    Source: DeepSeek-V3 (arXiv 2412.19437), equations 17 to 20, counting the choices as made.

    Example:
      loss = task_loss(y) + 1e-4 * sequence_loss(routing, x.shape[1])
    """
    t = routing.scores.shape[0]
    if not is_integer(sequence_length) or sequence_length < 1 or t % sequence_length:
        got = f"sequence_length={sequence_length!r}, {describe('scores', routing.scores)}"
        what, fix = "the tokens are not whole sequences.", "pass the number of tokens of a sequence"
        fail("sequence_loss", what, got, f"a divisor of {t}", fix)

    def loss(expert_index: jax.Array, scores: jax.Array) -> jax.Array:
        e, top_k = scores.shape[1], expert_index.shape[1]
        index = expert_index.reshape(-1, sequence_length, top_k)
        counts = jax.vmap(lambda one: count_choices(one, e))(index).astype(jnp.float32)
        shares = scores / (scores.sum(1, keepdims=True) + SMALLEST_SUM)
        means = shares.reshape(-1, sequence_length, e).mean(1)
        each = e / (top_k * sequence_length) * (counts * means).sum(1)
        mean = each.sum() / max(each.shape[0], 1)
        return mean if axis is None else jax.lax.pmean(mean, axis)

    rule = Rule(
        op="sequence_loss",
        operands=((Dim("t"), Dim("k")), (Dim("t"), Dim("e"))),
        results=((),),
        voters=(),
        summed=frozenset("tke"),
    )
    return enter(rule, lambda manual: loss, (routing.expert_index, routing.scores))
