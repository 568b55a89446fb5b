"""route against its formulas in numpy; permute and unpermute against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_moe import balance_in_sequences, grouped_route
from jax.sharding import AxisType, Mesh, PartitionSpec

from jax_fp8gemm import Routing, permute, route, sequence_loss, unpermute, update_bias
from jax_fp8gemm._moe import routing as routing_file

P = PartitionSpec


def softmax64(logits) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def sigmoid64(logits) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(logits, np.float64)))


def make_logits(key, t=37, e=8):
    return 2 * jax.random.normal(key, (t, e))


@pytest.mark.parametrize(
    "score_function, scores64", [("softmax", softmax64), ("sigmoid", sigmoid64)]
)
@pytest.mark.parametrize("normalize", [True, False])
def test_scores_choice_and_weights(key, score_function, scores64, normalize):
    logits = make_logits(key)
    routing = route(
        logits, 3, score_function=score_function, normalize=normalize, routed_scaling_factor=2.5
    )
    scores = scores64(logits)
    np.testing.assert_allclose(routing.scores, scores, rtol=1e-5)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :3]
    np.testing.assert_array_equal(routing.expert_index, best)
    chosen = np.take_along_axis(scores, best, 1)
    weights = 2.5 * (chosen / chosen.sum(1, keepdims=True) if normalize else chosen)
    np.testing.assert_allclose(routing.gate_weights, weights, rtol=1e-5)
    assert routing.expert_index.dtype == jnp.int32 and routing.gate_weights.dtype == jnp.float32


def test_bias_steers_the_choice_and_nothing_else(key):
    logits = make_logits(key)
    bias = jnp.zeros(8).at[5].set(10.0).at[2].set(-10.0)
    steered = route(logits, 2, score_function="sigmoid", bias=bias)
    assert (steered.expert_index[:, 0] == 5).all() and not (steered.expert_index == 2).any()
    chosen = np.take_along_axis(sigmoid64(logits), np.asarray(steered.expert_index), 1)
    np.testing.assert_allclose(
        steered.gate_weights, chosen / chosen.sum(1, keepdims=True), rtol=1e-5
    )
    np.testing.assert_array_equal(steered.scores, route(logits, 2, score_function="sigmoid").scores)
    grad = jax.grad(lambda bias: route(logits, 2, bias=bias).gate_weights[:, 0].sum())(bias)
    assert not np.asarray(grad).any()


def test_gradient_of_the_weights(key):
    logits = make_logits(key, t=5)
    experts = route(logits, 2).expert_index
    towards = jax.random.normal(key, (5, 2))

    def by_hand(logits):
        powers = jnp.exp(jnp.take_along_axis(logits, experts, 1))
        return (powers / powers.sum(1, keepdims=True) * towards).sum()

    grad = jax.grad(lambda logits: (route(logits, 2).gate_weights * towards).sum())(logits)
    np.testing.assert_allclose(grad, jax.grad(by_hand)(logits), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "score_function, scores64", [("softmax", softmax64), ("sigmoid", sigmoid64)]
)
def test_losses_follow_their_formulas(key, score_function, scores64):
    logits = make_logits(key)
    routing = route(logits, 3, score_function=score_function)
    shares = scores64(logits)
    shares = shares / shares.sum(1, keepdims=True)
    chosen = np.bincount(np.asarray(routing.expert_index).ravel(), minlength=8) / (37 * 3)
    np.testing.assert_allclose(routing.aux_loss, 8 * (chosen * shares.mean(0)).sum(), rtol=1e-5)
    lse = np.log(np.exp(np.asarray(logits, np.float64)).sum(1))
    np.testing.assert_allclose(routing.z_loss, (lse**2).mean(), rtol=1e-5)


def test_aux_loss_is_one_in_balance_and_its_gradient_pushes_there():
    balanced = route(jnp.tile(jnp.eye(4), (3, 1)), 1)
    np.testing.assert_allclose(balanced.aux_loss, 1.0, rtol=1e-6)
    logits = jnp.tile(jnp.array([[2.0, 0, 0, 0]]), (8, 1))
    grad = jax.grad(lambda logits: route(logits, 1).aux_loss)(logits)
    assert (grad[:, 0] > 0).all() and (grad[:, 1:] < 0).all()


def test_losses_over_an_axis_are_those_of_all_tokens(key):
    logits = make_logits(key, t=32)
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))

    def losses(logits):
        routing = route(logits, 2, axis="x")
        return routing.aux_loss + 0.1 * routing.z_loss

    def whole(logits):
        routing = route(logits, 2)
        return routing.aux_loss + 0.1 * routing.z_loss

    for check_vma in (True, False):
        split = jax.shard_map(
            losses, mesh=mesh, in_specs=P("x"), out_specs=P(), check_vma=check_vma
        )
        got, grad = jax.jit(jax.value_and_grad(split))(logits)
        expected, expected_grad = jax.value_and_grad(whole)(logits)
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-6)


def test_no_tokens():
    routing = route(jnp.zeros((0, 4)), 2)
    assert routing.expert_index.shape == (0, 2)
    assert routing.aux_loss == 0 and routing.z_loss == 0


# ---- groups -------------------------------------------------------------------------------------

DEEPSEEK = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}


def bias_of(key, e=12):
    return jax.random.normal(jax.random.fold_in(key, 1), (e,)) / 4


@pytest.mark.parametrize("many_scores", [routing_file.MANY_SCORES, 0])
def test_groups_against_a_plain_model(key, monkeypatch, many_scores):
    """Values and gradients, ties and negative sums included."""
    monkeypatch.setattr(routing_file, "MANY_SCORES", many_scores)
    logits = jnp.round(2 * make_logits(key, t=200, e=12)) / 2
    bias = jnp.round(8 * bias_of(key)) / 8 - 0.5
    towards = jax.random.normal(key, (200, 3))

    def loss(weights_of, logits):
        index, weights = weights_of(logits)
        return (weights * towards).sum(), (index, weights)

    def ours(logits):
        routing = route(logits, 3, score_function="sigmoid", bias=bias, **DEEPSEEK)
        return routing.expert_index, routing.gate_weights

    plain = lambda logits: grouped_route(logits, 3, bias=bias, **DEEPSEEK)[:2]  # noqa: E731
    (_, got), grad = jax.value_and_grad(lambda x: loss(ours, x), has_aux=True)(logits)
    (_, expected), right = jax.value_and_grad(lambda x: loss(plain, x), has_aux=True)(logits)
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-5)
    np.testing.assert_allclose(grad, right, rtol=1e-4, atol=1e-6)
    free = route(logits, 3, score_function="sigmoid", bias=bias)
    assert (got[0] != free.expert_index).any()


def test_groups_of_one_expert_and_all_groups_limit_nothing(key):
    logits = make_logits(key)
    free = route(logits, 3).expert_index
    for n_group, topk_group in ((8, 3), (2, 2), (1, 1)):
        got = route(logits, 3, n_group=n_group, topk_group=topk_group)
        np.testing.assert_array_equal(got.expert_index, free)


def test_the_choice_never_leaves_the_groups():
    """Even where an expert of theirs is turned off as firmly as those of the others."""
    bias = jnp.array([-jnp.inf] * 3 + [0.0, 0.0, -jnp.inf])
    routing = route(jnp.zeros((1, 6)), 3, bias=bias, n_group=2, topk_group=1)
    np.testing.assert_array_equal(routing.expert_index, [[3, 4, 5]])


def test_nan_is_the_largest_in_groups_too():
    bias = jnp.zeros(8).at[5].set(jnp.nan)
    np.testing.assert_array_equal(route(jnp.zeros((1, 8)), 2, bias=bias).expert_index, [[5, 0]])
    grouped = route(jnp.zeros((1, 8)), 2, bias=bias, n_group=4, topk_group=1)
    np.testing.assert_array_equal(grouped.expert_index, [[5, 4]])


def test_groups_are_exported_for_any_number_of_tokens(key):
    tokens = jax.ShapeDtypeStruct(jax.export.symbolic_shape("t, 8"), jnp.float32)
    run = jax.jit(lambda logits: route(logits, 3, n_group=4, topk_group=2))
    logits = make_logits(key, t=5)
    got = jax.export.export(run)(tokens).call(logits)
    np.testing.assert_array_equal(got.expert_index, run(logits).expert_index)


# ---- balance ------------------------------------------------------------------------------------


def chosen_as(expert_index, e=4) -> Routing:
    """A Routing that says which experts were chosen, and nothing else."""
    index = jnp.array(expert_index)
    none = jnp.zeros((*index.shape[:-1], e))
    return Routing(index, jnp.zeros(index.shape), none, jnp.zeros(()), jnp.zeros(()))


def test_bias_moves_towards_the_mean_load():
    bias = jnp.array([0.5, 0.0, -0.5, 1.0])
    # Loads 3, 1, 0, 0 of a mean of 1; 4 and -1 are no experts.
    routing = chosen_as([[0, 1], [0, 4], [0, -1]])
    got = update_bias(bias, routing, rate=0.25)
    np.testing.assert_array_equal(got, bias + jnp.array([-0.25, 0, 0.25, 0.25]))
    np.testing.assert_array_equal(update_bias(bias, routing) < bias, [True, False, False, False])


def test_bias_counts_all_microbatches_of_a_scan(key):
    index = jax.random.randint(key, (3, 10, 2), -1, 5)
    together = chosen_as(index.reshape(30, 2))
    bias = jnp.zeros(4)
    expected = update_bias(bias, together)
    np.testing.assert_array_equal(update_bias(bias, chosen_as(index)), expected)


@pytest.mark.parametrize("check_vma", [True, False])
def test_bias_over_an_axis_sees_the_load_of_all(key, check_vma):
    logits = make_logits(key, t=32)
    mesh = Mesh(np.array(jax.devices()), ("x",))
    update = lambda logits, axis: update_bias(  # noqa: E731
        jnp.zeros(8), route(logits, 2), rate=1.0, axis=axis
    )
    split = jax.shard_map(
        lambda logits: update(logits, "x"),
        mesh=mesh,
        in_specs=P("x"),
        out_specs=P(),
        check_vma=check_vma,
    )
    expected = update(logits, None)
    np.testing.assert_array_equal(jax.jit(split)(logits), expected)
    assert (expected != update(logits[:4], None)).any()


def test_bias_brings_balance(key):
    """Experts that every token likes best lose what they have over the mean."""
    logits = make_logits(key, t=256) + jnp.linspace(-2, 2, 8)[None]

    def step(bias, _):
        routing = route(logits, 2, score_function="sigmoid", bias=bias)
        load = jax.nn.one_hot(routing.expert_index, 8).sum((0, 1))
        return update_bias(bias, routing, rate=0.01), load.max() / load.mean()

    _, worst = jax.lax.scan(step, jnp.zeros(8), length=150)
    assert worst[0] > 2 and worst[-1] < 1.15


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_sequence_loss_and_its_gradient(key, score_function):
    logits = make_logits(key, t=30)

    def loss(logits, of):
        routing = route(logits, 3, score_function=score_function)
        return of(routing)

    def plain(routing):
        return balance_in_sequences(routing.expert_index, routing.scores, 10)

    got = jax.value_and_grad(loss)(logits, lambda routing: sequence_loss(routing, 10))
    expected = jax.value_and_grad(loss)(logits, plain)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-4, atol=1e-6)
    assert abs(got[0] - route(logits, 3, score_function=score_function).aux_loss) > 1e-2


def test_sequence_loss_is_one_in_balance():
    """Balanced within each sequence; and over all tokens alone, which does not count."""
    within = route(10 * jnp.tile(jnp.eye(4), (2, 1)), 1)
    np.testing.assert_allclose(sequence_loss(within, 4), 1.0, rtol=1e-6)
    over_all = route(10 * jnp.repeat(jnp.eye(4), 2, 0), 1)
    np.testing.assert_allclose(over_all.aux_loss, 1.0, rtol=1e-6)
    assert sequence_loss(over_all, 2) > 3.9


@pytest.mark.parametrize("check_vma", [True, False])
def test_sequence_loss_over_an_axis_is_the_mean_of_all(key, check_vma):
    logits = make_logits(key, t=32)
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    loss = lambda axis: lambda logits: sequence_loss(route(logits, 2), 4, axis=axis)  # noqa: E731
    split = jax.shard_map(loss("x"), mesh=mesh, in_specs=P("x"), out_specs=P(), check_vma=check_vma)
    got, grad = jax.jit(jax.value_and_grad(split))(logits)
    expected, right = jax.value_and_grad(loss(None))(logits)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    np.testing.assert_allclose(grad, right, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_balance_of_tokens_that_types_or_arrays_split(key, kind):
    """Four sequences over eight devices: every device has half a one."""
    logits = make_logits(key, t=32)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))

    def both(logits):
        routing = route(logits, 2)
        return sequence_loss(routing, 8), update_bias(jnp.zeros(8), routing)

    placed = jax.device_put(logits, jax.NamedSharding(mesh, P("x")))
    got, expected = jax.jit(both)(placed), both(logits)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    np.testing.assert_array_equal(got[1], expected[1])


# ---- permute and unpermute ----------------------------------------------------------------------

CHOICES = {
    "mixed": [[0, 2], [2, 1], [1, 0], [3, 0], [2, 1]],
    "one_token": [[3, 1]],
    "all_to_one": [[1], [1], [1]],
    "twice_the_same": [[2, 2], [0, 2], [2, 2]],
    "to_nobody": [[0, 4], [-1, 2], [9, 9]],
    "no_tokens": np.zeros((0, 2), int),
}


def by_loop(experts, num_experts: int) -> list[tuple[int, int]]:
    """The (token, choice) pairs in the order of the rows."""
    return [
        (token, choice)
        for expert in range(num_experts)
        for token, row in enumerate(np.asarray(experts).tolist())
        for choice, chosen in enumerate(row)
        if chosen == expert
    ]


@pytest.mark.parametrize("name", CHOICES)
def test_rows_are_sorted_by_expert_and_come_back(key, name):
    experts = jnp.array(CHOICES[name])
    t, top_k = experts.shape
    x = jax.random.normal(key, (t, 8))
    rows, permutation = jax.jit(permute, static_argnums=2)(x, experts, 4)
    pairs = by_loop(experts, 4)
    expected = np.zeros((t * top_k, 8), np.float32)
    for i, (token, _) in enumerate(pairs):
        expected[i] = x[token]
    np.testing.assert_array_equal(rows, expected)
    sizes = [int((np.asarray(experts) == expert).sum()) for expert in range(4)]
    np.testing.assert_array_equal(permutation.group_sizes, sizes)
    kept = np.zeros(t)
    for token, _ in pairs:
        kept[token] += 1
    garbage = rows.at[len(pairs) :].set(jnp.nan)
    back = unpermute(garbage, permutation, top_k)
    np.testing.assert_allclose(back, np.asarray(x) * kept[:, None], rtol=1e-6)


@pytest.mark.parametrize("name", CHOICES)
def test_gradients_are_the_transposes(key, name):
    experts = jnp.array(CHOICES[name])
    t, top_k = experts.shape
    x, dy = jax.random.normal(key, (2, t, 8))
    rows, pull = jax.vjp(lambda x: permute(x, experts, 4)[0], x)
    drows = jax.random.normal(key, rows.shape)
    permutation = permute(x, experts, 4)[1]
    np.testing.assert_array_equal(pull(drows)[0], unpermute(drows, permutation, top_k))
    _, pull = jax.vjp(lambda rows: unpermute(rows, permutation, top_k), rows)
    np.testing.assert_array_equal(pull(dy)[0], permute(dy, experts, 4)[0])


def test_sums_are_made_in_float32():
    """1 and seven times 1/256, half a step of bfloat16 at 1: added up in bfloat16 they are lost."""
    x = jnp.full((1, 4), 1 + 1 / 128, jnp.bfloat16)
    rows, permutation = permute(x, jnp.arange(8)[None], 8)
    out = unpermute(rows.at[1:].multiply(1 / 256), permutation, 8)
    exact = np.float32(1 + 1 / 128) * (1 + 7 / 256)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out[0], jnp.bfloat16(exact))


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: route(jnp.ones((3, 4)), 5), "top_k is 5, with 4 experts."),
        (lambda: route(jnp.ones((3, 4)), 0), "top_k is 0, with 4 experts."),
        (lambda: route(jnp.ones((2, 3, 4)), 1), "logits have the wrong rank."),
        (lambda: route(jnp.ones((3, 4)), 1, score_function="tanh"), "score_function is unknown."),
        (lambda: route(jnp.ones((3, 4)), 1, bias=jnp.ones(3)), "bias does not fit the experts."),
        (
            lambda: route(jnp.ones((3, 6)), 1, n_group=2),
            "n_group and topk_group go together.",
        ),
        (
            lambda: route(jnp.ones((3, 6)), 1, n_group=4, topk_group=1),
            "6 experts do not form 4 groups of equal size.",
        ),
        (
            lambda: route(jnp.ones((3, 6)), 1, n_group=2, topk_group=3),
            "topk_group is 3, with 2 groups.",
        ),
        (
            lambda: route(jnp.ones((3, 6)), 4, n_group=2, topk_group=1),
            "top_k is 4, with 3 experts in the groups of a token.",
        ),
        (
            lambda: update_bias(jnp.zeros(3), chosen_as([[0]])),
            "bias does not fit the experts.",
        ),
        (
            lambda: sequence_loss(chosen_as([[0]] * 6), 4),
            "the tokens are not whole sequences.",
        ),
        (
            lambda: permute(jnp.ones((3, 4)), jnp.ones((2, 1), int), 4),
            "x and expert_index do not fit.",
        ),
        (
            lambda: unpermute(
                jnp.ones((4, 2)), permute(jnp.ones((3, 2)), jnp.ones((3, 1), int), 2)[1], 1
            ),
            "rows do not fit the permutation.",
        ),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text) as info:
        call()
    assert all(part in str(info.value) for part in ("\n  got ", "\n  expected ", "\n  fix "))


def test_golden_text_of_top_k():
    with pytest.raises(ValueError) as info:
        route(jnp.ones((16, 4)), 5)
    assert str(info.value) == (
        "route: top_k is 5, with 4 experts.\n"
        "  got       top_k=5, logits f32[16, 4]\n"
        "  expected  an integer in 1..4\n"
        "  fix       choose fewer experts per token"
    )
