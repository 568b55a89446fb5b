"""Where a layer's choices come from: a kernel of its own, or logits or a Routing of the user."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jax_fp8gemm._core.checks import as_float, as_int32
from jax_fp8gemm._core.errors import describe, fail
from jax_fp8gemm._moe.gate import gate_logits
from jax_fp8gemm._moe.placement import Placement
from jax_fp8gemm._moe.routing import RouteSpec, Routing, route_by

TOKEN_FIELDS = ("expert_index", "gate_weights", "scores")  # of a Routing: one row for each token


class Router(NamedTuple):
    """One of three, of tokens x [..., h].

    Attributes:
      gate_kernel: float [h, e], and gate_bias: float [e] or None.
      logits: float [..., e].
      routing: the Routing of the tokens, flattened to one dim.
    """

    gate_kernel: jax.Array | None
    logits: jax.Array | None
    routing: Routing | None
    gate_bias: jax.Array | None = None

    @property
    def of_experts(self) -> tuple[str, jax.Array]:
        """The name and the array whose last dim is the number of all experts."""
        if self.gate_kernel is not None:
            return "gate_kernel", self.gate_kernel
        if self.logits is not None:
            return "logits", self.logits
        assert self.routing is not None  # as_router checked it
        return "routing.scores", self.routing.scores

    def decide(
        self,
        spec: RouteSpec,
        tokens: jax.Array,
        bias: jax.Array | None,
        axis: tuple[str, ...] | None,
    ) -> Routing:
        """Returns the Routing of tokens [t, h]; `axis`: see route."""
        if self.routing is not None:
            return self.routing
        if self.gate_kernel is not None:
            logits = gate_logits(tokens, self.gate_kernel, spec.batch_invariant)
            if self.gate_bias is not None:
                logits = logits + self.gate_bias.astype(logits.dtype)[None]
            return route_by(spec, logits, bias, axis)
        assert self.logits is not None  # as_router checked it
        logits = self.logits.reshape(-1, self.logits.shape[-1])
        return route_by(spec, logits, bias, axis)

    def specs(self, where: Placement) -> "Router":
        """Returns how a shard_map splits a folded router."""
        tokens, whole = where.tokens, PartitionSpec()
        routing: Any = None
        if self.routing is not None:
            routing = Routing(tokens, tokens, tokens, whole, whole)  # type: ignore[arg-type]
        return Router(whole, tokens, routing, whole)  # type: ignore[arg-type]

    def each_token(self, change: Callable[[jax.Array], jax.Array]) -> "Router":
        """Returns the router with the arrays of its Routing changed, [t, n] to [..., n] or back."""
        old = self.routing
        if old is None:
            return self
        named = {name: change(getattr(old, name)) for name in TOKEN_FIELDS}
        return self._replace(routing=dataclasses.replace(old, **named))


def as_router(x: jax.Array, gate_kernel: Any, gate_bias: Any, logits: Any, routing: Any) -> Router:
    """Returns the one that moe was given, checked.

    Raises:
      ValueError: none or several were given, a bias without its kernel, or shapes do not fit x
        [..., h].
      TypeError: dtypes, or routing is not a Routing.
    """
    named = {"gate_kernel": gate_kernel, "logits": logits, "routing": routing}
    given = [name for name, value in named.items() if value is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none of them"
        fix = "pass None as the other two"
        what = "gate_kernel, logits and routing exclude each other."
        fail("moe", what, got, "one of the three", fix)
    if gate_bias is not None and gate_kernel is None:
        got, fix = f"gate_bias with {given[0]}", "add it to logits yourself"
        fail("moe", "gate_bias has no gate_kernel.", got, "gate_bias with gate_kernel", fix)
    if routing is not None:
        return Router(None, None, _as_routing(x, routing))
    if logits is not None:
        logits = as_float("moe", "logits", logits)
        if x.ndim < 1 or logits.ndim != x.ndim or logits.shape[:-1] != x.shape[:-1]:
            got = f"{describe('x', x)}, {describe('logits', logits)}"
            fix = "give logits the leading dims of x"
            fail("moe", "x and logits do not fit.", got, "x [..., h], logits [..., e]", fix)
        return Router(None, logits, None)
    gate_kernel = as_float("moe", "gate_kernel", gate_kernel)
    if x.ndim < 1 or gate_kernel.ndim != 2 or x.shape[-1] != gate_kernel.shape[0]:
        got = f"{describe('x', x)}, {describe('gate_kernel', gate_kernel)}"
        expected, fix = "x [..., h], gate_kernel [h, e]", "if it is [e, h], pass gate_kernel.T"
        fail("moe", "x and gate_kernel do not fit.", got, expected, fix)
    if gate_bias is not None:
        gate_bias = _as_gate_bias(gate_kernel, gate_bias)
    return Router(gate_kernel, None, None, gate_bias)


def _as_gate_bias(gate_kernel: jax.Array, gate_bias: Any) -> jax.Array:
    gate_bias = as_float("moe", "gate_bias", gate_bias)
    if gate_bias.shape != gate_kernel.shape[1:]:
        got = f"{describe('gate_kernel', gate_kernel)}, {describe('gate_bias', gate_bias)}"
        expected, fix = f"gate_bias [{gate_kernel.shape[1]}]", "pass a number for each expert"
        fail("moe", "gate_kernel and gate_bias do not fit.", got, expected, fix)
    return gate_bias


def _as_routing(x: jax.Array, routing: Any) -> Routing:
    if not isinstance(routing, Routing):
        got, fix = type(routing).__name__, "pass what route returned, or make a Routing"
        fail("moe", "routing is not a Routing.", got, "a Routing", fix, TypeError)
    index = as_int32("moe", "routing.expert_index", routing.expert_index)
    weights = as_float("moe", "routing.gate_weights", routing.gate_weights)
    scores = as_float("moe", "routing.scores", routing.scores)
    t = math.prod(x.shape[:-1])
    fits = index.ndim == scores.ndim == 2 and index.shape == weights.shape
    if not fits or (index.shape[0], scores.shape[0]) != (t, t):
        arrays = {"x": x, "expert_index": index, "gate_weights": weights, "scores": scores}
        got = ", ".join(describe(name, array) for name, array in arrays.items())
        expected = f"expert_index and gate_weights [{t}, top_k], scores [{t}, e]"
        fix = "flatten the tokens of x to one dim"
        fail("moe", "x and routing do not fit.", got, expected, fix)
    return dataclasses.replace(
        routing, expert_index=index, gate_weights=weights, scores=scores, dropped=None
    )


def route_spec(
    router: Router, bias: jax.Array | None, top_k: int | None, **options: Any
) -> RouteSpec:
    """Returns how moe routes; of a Routing, what it says itself.

    Raises:
      ValueError: options do not fit, or would change nothing.
      TypeError: an option has the wrong type.
    """
    name, array = router.of_experts
    if router.routing is None:
        spec = RouteSpec(top_k=top_k, **options)  # type: ignore[arg-type]
        spec.check("moe", describe(name, array), array.shape[-1], bias)
        return spec
    defaults = {field.name: field.default for field in dataclasses.fields(RouteSpec)}
    mine = {name: value for name, value in options.items() if name != "batch_invariant"}
    idle = [name for name, value in mine.items() if value != defaults[name]]
    idle += ["top_k"] * (top_k is not None) + ["bias"] * (bias is not None)
    if idle:
        got, fix = f"routing with {', '.join(idle)}", "pass them to route"
        fail("moe", "routing is made already.", got, "routing without these options", fix)
    return RouteSpec(top_k=router.routing.expert_index.shape[1])


def options_beside(op: str, options: Mapping[str, Any], routing: Any) -> dict[str, Any]:
    """Returns the options of a layer that moe takes with a Routing made elsewhere, if any.

    Raises:
      ValueError: the Routing chose another number of experts than the layer's top_k.
    """
    if routing is None:
        return dict(options)
    top_k, chosen = options["top_k"], getattr(routing, "expert_index", None)
    if chosen is not None and jnp.shape(chosen)[-1:] != (top_k,):  # moe says what is no Routing
        got = f"{describe('expert_index', chosen)}, top_k={top_k}"
        expected, fix = f"expert_index [tokens, {top_k}]", "give both the same top_k"
        fail(op, "routing has another top_k than the layer.", got, expected, fix)
    own = {field.name for field in dataclasses.fields(RouteSpec)} - {"batch_invariant"}
    return {name: value for name, value in options.items() if name not in own}
