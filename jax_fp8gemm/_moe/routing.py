"""Which expert sees which token: scores, choice and losses."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jax_fp8gemm._core.checks import as_float, check_bool, check_option, is_integer, renamed
from jax_fp8gemm._core.errors import describe, fail
from jax_fp8gemm._core.qarray import exportable
from jax_fp8gemm._core.types import ScoreFunction
from jax_fp8gemm._moe.order import count_choices
from jax_fp8gemm._moe.ordered import softmax_by_halves, sum_of_few

SMALLEST_SUM = 1e-20  # DeepSeek-V3's gate adds it to the sum of the chosen scores
# From so many scores on, and for so few choices, one maximum after the other should take less time
# than XLA's sort of every token's scores. Below, launches count, and a sort is a single one. An
# estimate: benchmarks/router.py times both on large batches.
MANY_SCORES, FEW_CHOICES = 1 << 18, 16


@exportable()
@dataclasses.dataclass(frozen=True, eq=False)
class Routing:
    """What a router decided for t tokens.

    Attributes:
      expert_index: int32 [t, top_k], the chosen experts of each token, best first.
      gate_weights: f32 [t, top_k], the factors of their results.
      scores: f32 [t, e], of all experts, before the choice.
      aux_loss: f32 [], the load-balance loss; 1 for a perfect balance, more for a worse one.
      z_loss: f32 [], the mean square of the logsumexp of the logits.
      dropped: int32 [], how many of all choices found no room on their devices or with their
        experts; None unless `moe` has a device_capacity_factor.
    """

    expert_index: jax.Array
    gate_weights: jax.Array
    scores: jax.Array
    aux_loss: jax.Array
    z_loss: jax.Array
    dropped: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouteSpec:
    """Static description of one router; as the arguments of route."""

    top_k: int
    score_function: ScoreFunction = "softmax"
    normalize: bool = True
    routed_scaling_factor: float = 1.0
    n_group: int | None = None
    topk_group: int | None = None
    batch_invariant: bool = False

    def check(self, op: str, got: str, e: int, bias: Any) -> None:
        """Raises a ValueError or a TypeError where bias and options do not fit e experts.

        Args:
          got: describes the array that says how many experts there are.
        """
        check_option(op, "score_function", self.score_function, ScoreFunction)
        check_bool(op, "normalize", self.normalize)
        top_k = self.top_k
        if not is_integer(top_k) or not 1 <= top_k <= e:
            many = is_integer(top_k) and top_k > e
            fix = "choose fewer experts per token" if many else "choose 1 to e"
            expected = f"an integer in 1..{e}"
            what = f"top_k is {top_k!r}, with {e} experts."
            fail(op, what, f"top_k={top_k!r}, {got}", expected, fix)
        if bias is not None and bias.shape != (e,):
            got = f"{describe('bias', bias)}, {got}"
            fail(op, "bias does not fit the experts.", got, f"bias [{e}]", "pass one per expert")
        if (self.n_group, self.topk_group) != (None, None):
            _check_groups(op, self, got, e)


def _check_groups(op: str, spec: RouteSpec, got: str, e: int) -> None:
    n, most = spec.n_group, spec.topk_group
    got = f"n_group={n!r}, topk_group={most!r}, top_k={spec.top_k}, {got}"
    if n is None or most is None:
        fix = "pass the model's n_group and topk_group, or neither"
        fail(op, "n_group and topk_group go together.", got, "both or neither", fix)
    if not is_integer(n) or n < 1 or e % n:
        fix = "choose a divisor of the number of experts"
        what = f"{e} experts do not form {n!r} groups of equal size."
        fail(op, what, got, f"{e} % n_group == 0", fix)
    if not is_integer(most) or not 1 <= most <= n:
        what = f"topk_group is {most!r}, with {n} groups."
        fail(op, what, got, f"an integer in 1..{n}", "choose 1 to n_group")
    if spec.top_k > e // n * most:
        what = f"top_k is {spec.top_k}, with {e // n * most} experts in the groups of a token."
        fix = "choose more groups, or fewer experts per token"
        fail(op, what, got, f"top_k in 1..{e // n * most}", fix)


@renamed(score="score_function", scale="routed_scaling_factor")
def route(
    logits: jax.Array,
    top_k: int,
    *,
    score_function: ScoreFunction = "softmax",
    bias: jax.Array | None = None,
    normalize: bool = True,
    routed_scaling_factor: float = 1.0,
    n_group: int | None = None,
    topk_group: int | None = None,
    axis: str | tuple[str, ...] | None = None,
    batch_invariant: bool = False,
) -> Routing:
    """Chooses top_k experts for each token: the largest score + bias, weighted by the score alone.

    gate_weights[t, j] = routed_scaling_factor · s[t, j] / Σ_j s[t, j], with
    s[t, j] = scores[t, expert_index[t, j]]
    aux_loss = e · Σ_i f_i · P_i, with f_i the share of the t · top_k choices that fell on expert i,
    and P_i the mean over tokens of its score, scores of a token normalized to the sum 1.

    With groups, the choice is among the experts of topk_group groups of the token. A group counts
    as much as its two best experts together, by score + bias. Of equals the first is chosen.

    Args:
      logits: bf16, f16 or f32 [t, e]; computed in float32.
      top_k: experts per token, 1 to e.
      score_function: "softmax" over the experts, or "sigmoid" of each.
      bias: f32 [e], steers the choice only: it has no gradient and is in no weight.
      normalize: whether the weights of a token sum to routed_scaling_factor.
      routed_scaling_factor: factor of the weights.
      n_group: in how many groups of equal size the experts stand, in order; a divisor of e. None:
        every token has the choice among all.
      topk_group: how many groups a token chooses from, 1 to n_group.
      axis: inside shard_map, the mesh axis, or axes, over which tokens are split evenly. Then
        aux_loss and z_loss are those of all tokens.
      batch_invariant: whether a token's experts and weights have the same bits however many tokens
        there are.

    Returns:
      Routing.

    Raises:
      ValueError: ranks or the length of bias do not fit, top_k is not in 1..e, or more than the
        experts of topk_group groups, groups are not equal, or score_function is unknown.

    Source: Shazeer et al. (arXiv 1701.06538) for the choice; bias and sigmoid: DeepSeek-V3 (arXiv
    2412.19437), section 2.1.2; groups: the gate of its published model, with two experts for every
    top_k; aux_loss: Switch Transformer (arXiv 2101.03961), equation 4, over top_k as in
    DeepSeek-V3, equations 17 to 20; z_loss: ST-MoE (arXiv 2202.08906), equation 5.

    Example:
      routing = route(x @ gate_kernel, top_k=8, score_function="sigmoid", bias=bias)
    """
    check_bool("route", "batch_invariant", batch_invariant)
    logits = as_float("route", "logits", logits)
    if logits.ndim != 2:
        got, fix = describe("logits", logits), "reshape them"
        fail("route", "logits have the wrong rank.", got, "logits [t, e]", fix)
    spec = RouteSpec(
        top_k=top_k,
        score_function=score_function,
        normalize=normalize,
        routed_scaling_factor=routed_scaling_factor,
        n_group=n_group,
        topk_group=topk_group,
        batch_invariant=batch_invariant,
    )
    spec.check("route", describe("logits", logits), logits.shape[1], bias)
    return route_by(spec, logits, bias, axis)


def route_by(
    spec: RouteSpec,
    logits: jax.Array,
    bias: jax.Array | None,
    axis: str | tuple[str, ...] | None,
) -> Routing:
    """As route, checked."""
    logits = logits.astype(jnp.float32)
    softmax = spec.score_function == "softmax"
    soft = softmax_by_halves if spec.batch_invariant else jax.nn.softmax
    scores = soft(logits) if softmax else jax.nn.sigmoid(logits)
    steered = scores if bias is None else scores + bias.astype(jnp.float32)[None]
    expert_index = _choose_in_groups(jax.lax.stop_gradient(steered), spec)
    weights = jnp.take_along_axis(scores, expert_index, axis=1)
    if spec.normalize:
        weights = weights / (sum_of_few(weights, spec.batch_invariant)[:, None] + SMALLEST_SUM)
    aux_loss = _aux_loss(scores, expert_index, softmax, axis)
    z_loss = _mean(jax.nn.logsumexp(logits, axis=1) ** 2, axis)
    weights = spec.routed_scaling_factor * weights
    return Routing(expert_index, weights, scores, aux_loss, z_loss)


def _mean(x: jax.Array, axis: str | tuple[str, ...] | None) -> jax.Array:
    """The mean over tokens, dim 0; zero without any."""
    mean = x.sum(0) / max(x.shape[0], 1)
    return mean if axis is None else jax.lax.pmean(mean, axis)


def _aux_loss(
    scores: jax.Array,
    expert_index: jax.Array,
    softmax: bool,
    axis: str | tuple[str, ...] | None,
) -> jax.Array:
    e = scores.shape[1]
    chosen = count_choices(expert_index, e).astype(jnp.float32) / max(expert_index.size, 1)
    if axis is not None:
        chosen = jax.lax.pmean(chosen, axis)
    sums = scores.sum(1, keepdims=True) + SMALLEST_SUM
    shares = scores if softmax else scores / sums
    return e * jnp.sum(chosen * _mean(shares, axis))


# ---- the choice ---------------------------------------------------------------------------------


def _choose_in_groups(scores: jax.Array, spec: RouteSpec) -> jax.Array:
    """Returns the best experts of each token among its best groups, int32 [t, top_k]."""
    n, most = spec.n_group, spec.topk_group
    if n is None or most is None or most == n:
        return _choose(scores, spec.top_k)
    t, e = scores.shape
    size = e // n
    grouped = scores.reshape(t, n, size)
    two = jnp.take_along_axis(grouped, _choose(grouped, min(2, size)), axis=2)
    # Groups in order, so that of equal scores the first expert is chosen.
    kept = jnp.sort(_choose(two.sum(2), most), axis=1)
    left = jnp.take_along_axis(grouped, kept[:, :, None], axis=1).reshape(t, most * size)
    chosen = _choose(left, spec.top_k)
    return jnp.take_along_axis(kept, chosen // size, axis=1) * size + chosen % size


def _choose(scores: jax.Array, top_k: int) -> jax.Array:
    """Returns the same as jax.lax.top_k: int32 [..., top_k], of equal scores the first."""
    unknown = jax.export.is_symbolic_dim(scores.shape[0])
    if unknown or scores.size < MANY_SCORES or top_k > FEW_CHOICES:
        return jax.lax.top_k(scores, top_k)[1]
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    keys = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the floats
    gone = jnp.iinfo(jnp.int32).min
    keys = jnp.maximum(keys, gone + 1)
    last = scores.ndim - 1
    expert = jax.lax.broadcasted_iota(jnp.int32, scores.shape, last)
    chosen = []
    for _ in range(top_k):
        chosen.append(jax.lax.argmax(keys, last, jnp.int32))
        keys = jnp.where(expert == chosen[-1][..., None], gone, keys)
    return jnp.stack(chosen, last)
