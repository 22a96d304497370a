"""IRE: the toy on which it is known what it does, when it looks at the curvature, and at which gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import optax_sam

pytestmark = pytest.mark.usefixtures("in_float64")


def valley(w):
    """Minima along v = 0, of which the flattest is at u = 0."""
    return (1 + w["u"] ** 2) * w["v"] ** 2 / 2


def drift(variant, kappa, rate):
    """The params after 400 steps from (1, 0.3), with one of the two coordinates called flat."""
    tx = optax_sam.ire(optax.chain(variant, optax.sgd(rate)), kappa, flat_fraction=0.5)
    value_and_grad = optax_sam.sam_value_and_grad(valley, variant)

    def step(carry, _):
        params, state = carry
        _, grads = value_and_grad(params, state=state)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = {"u": jnp.array(1.0), "v": jnp.array(0.3)}
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), None, 400)
    return params


def test_the_drift_to_flat_minima_is_as_published_and_grows_with_kappa():
    cases = {
        "gd": (optax_sam.sam(0.0), 0.0, 1.0),
        "gd, 3": (optax_sam.sam(0.0), 3.0, 1.0),
        **{f"sam, {kappa}": (optax_sam.sam(0.1), float(kappa), 0.5) for kappa in (0, 1, 3, 10)},
    }
    ends = jax.jit(lambda: {name: drift(*case) for name, case in cases.items()})()
    u = {name: float(w["u"]) for name, w in ends.items()}
    np.testing.assert_allclose(u["gd"], 0.743, atol=5e-4)
    np.testing.assert_allclose(u["gd, 3"], 0.384, atol=5e-4)
    np.testing.assert_allclose(u["sam, 0"], 0.0196, atol=5e-5)
    np.testing.assert_allclose(u["sam, 3"], 2.8e-7, atol=5e-9)
    np.testing.assert_allclose(u["sam, 10"], 1e-19, rtol=0.5)
    assert u["sam, 0"] > u["sam, 1"] > u["sam, 3"] > u["sam, 10"] > 0.0
    # The flat direction alone is sped up: SAM bounces across the valley as ever.
    np.testing.assert_allclose(abs(float(ends["sam, 3"]["v"])), 0.5 * 0.1 / (2 - 0.5), rtol=1e-6)


PARAMS = {"a": jnp.array([0.0, 0.0, 0.0], jnp.float32), "b": jnp.array([[0.0], [0.0]], jnp.float32)}


def tree(*entries):
    return {"a": jnp.array(entries[:3], jnp.float32), "b": jnp.array(entries[3:], jnp.float32).reshape(2, 1)}


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


ONES = tree(1, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        (0.0, [0, 0, 0, 0, 0]),
        (0.2, [0, 1, 0, 0, 0]),
        (0.6, [1, 1, 0, 1, 0]),
        (0.8, [1, 1, 1, 1, 0]),
        (1.0, [1, 1, 1, 1, 1]),
    ],
)
def test_flat_is_the_fraction_with_the_smallest_gradients_of_all_leaves(fraction, expected):
    """The order of the sizes is global: a fraction of each leaf would choose otherwise."""
    tx = optax_sam.ire(optax.sgd(1.0), 3.0, flat_fraction=fraction)
    gradient = tree(-0.2, 0.1, 0.5, 0.3, -0.9)
    updates, state = tx.update(gradient, tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(flat(state.flat), np.array(expected, bool))
    np.testing.assert_allclose(flat(updates), -flat(gradient) * (1 + 3 * np.array(expected)), rtol=1e-6)


def flats(tx, gradients, **extra):
    """Which coordinates are flat after each of a few updates, and the updates."""
    state, out = tx.init(PARAMS), []
    for t, gradient in enumerate(gradients):
        given = {name: values[t] for name, values in extra.items()}
        updates, state = tx.update(gradient, state, PARAMS, **given)
        out.append((flat(state.flat).astype(int).tolist(), flat(updates)))
    return out


# The one flat coordinate of gradient number t is coordinate t.
MOVING = [tree(*np.where(np.arange(5) == t % 5, 0.1, 1.0)) for t in range(8)]


def chosen(t):
    return (np.arange(5) == t % 5).astype(int).tolist()


@pytest.mark.parametrize(("interval", "looks"), [(1, range(8)), (3, [0, 0, 0, 3, 3, 3, 6, 6]), (10, [0] * 8)])
def test_the_choice_changes_every_interval_steps_and_never_between(interval, looks):
    tx = optax_sam.ire(optax.sgd(1.0), 1.0, flat_fraction=0.2, interval=interval)
    got = flats(tx, MOVING)
    assert [choice for choice, _ in got] == [chosen(t) for t in looks]
    for (choice, updates), gradient in zip(got, MOVING, strict=True):
        np.testing.assert_allclose(updates, -flat(gradient) * (1 + np.array(choice)), rtol=1e-6)


def test_nothing_is_boosted_before_start_step():
    tx = optax_sam.ire(optax.sgd(1.0), 1.0, flat_fraction=0.2, interval=3, start_step=2)
    got = flats(tx, MOVING)
    assert [choice for choice, _ in got] == [[0] * 5] * 2 + [chosen(t) for t in (2, 2, 2, 5, 5, 5)]
    np.testing.assert_array_equal(got[1][1], -flat(MOVING[1]))


def test_kappa_zero_is_the_base_optimizer_and_a_schedule_counts_from_its_first_step():
    base = optax.adamw(0.1)
    state, expected = base.init(PARAMS), []
    for gradient in MOVING:
        updates, state = base.update(gradient, state, PARAMS)
        expected.append(flat(updates))
    got = flats(optax_sam.ire(base, 0.0, flat_fraction=0.4), MOVING)
    np.testing.assert_array_equal([updates for _, updates in got], expected)
    got = flats(optax_sam.ire(base, lambda step: 2.0 * step, flat_fraction=0.4), MOVING)
    for t, (choice, updates) in enumerate(got):
        np.testing.assert_allclose(updates, expected[t] * (1 + 2.0 * t * np.array(choice)), rtol=1e-6)


def test_what_is_boosted_is_the_realized_update():
    """Momentum and decoupled weight decay included; the momentum itself is not boosted."""
    base = optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.5), optax.scale(-0.1))
    tx = optax_sam.ire(base, 1.0, flat_fraction=1.0)
    state = tx.init(ONES)
    for factor in (1.0, 1.9):
        updates, state = tx.update(ONES, state, ONES)
        np.testing.assert_allclose(flat(updates), 2 * -0.1 * (factor + 0.5), rtol=1e-6)


SHARP_FIRST = tree(9, 1, 1, 1, 1)
SHARP_LAST = tree(1, 1, 1, 1, 9)


@pytest.mark.parametrize("door", ["pair", "mapping", "clean_updates"])
def test_around_a_variant_the_clean_gradient_decides(door):
    """Whichever way the two gradients come in; the direction is the variant's."""
    tx = optax_sam.ire(optax.chain(optax_sam.wsam(0.1, alpha=2.0), optax.sgd(1.0)), 1.0, flat_fraction=0.8)
    state = tx.init(PARAMS)
    if door == "clean_updates":
        updates, state = tx.update(SHARP_LAST, state, PARAMS, clean_updates=SHARP_FIRST)
    else:
        pair = optax_sam.SAMGradients(SHARP_FIRST, SHARP_LAST)
        pair = pair if door == "pair" else {"clean": pair.clean, "perturbed": pair.perturbed}
        updates, state = tx.update(pair, state, PARAMS)
    assert flat(state.flat).astype(int).tolist() == [0, 1, 1, 1, 1]
    direction = -flat(SHARP_FIRST) - 2 * -flat(SHARP_FIRST) + 2 * -flat(SHARP_LAST)
    np.testing.assert_allclose(flat(updates), direction * [1, 2, 2, 2, 2], rtol=1e-6)


def test_its_state_serves_sam_value_and_grad():
    variant = optax_sam.sam(0.1)
    tx = optax_sam.ire(optax.chain(variant, optax.sgd(0.5)), 0.0)
    params = {"u": jnp.array(1.0), "v": jnp.array(0.3)}
    value, grads = optax_sam.sam_value_and_grad(valley, variant)(params, state=tx.init(params))
    assert float(value) == pytest.approx(0.09)
    updates, state = tx.update(grads, tx.init(params), params)
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, -0.5 * g, rtol=1e-12), updates, grads.perturbed)
    assert int(optax.tree.get(state, "SAMState").step) == 1


def test_curvature_updates_decide_where_they_are_given():
    bare = optax_sam.ire(optax.sgd(1.0), 1.0, flat_fraction=0.8)
    wrapped = optax_sam.ire(optax.chain(optax_sam.sam(0.1), optax.sgd(1.0)), 1.0, flat_fraction=0.8)
    pair = optax_sam.SAMGradients(SHARP_FIRST, SHARP_FIRST)
    for tx, gradient in ((bare, SHARP_FIRST), (wrapped, pair)):
        updates, state = tx.update(gradient, tx.init(PARAMS), PARAMS, curvature_updates=SHARP_LAST)
        assert flat(state.flat).astype(int).tolist() == [1, 1, 1, 1, 0]
        np.testing.assert_allclose(flat(updates), -flat(SHARP_FIRST) * [2, 2, 2, 2, 1], rtol=1e-6)
    # Between the looks they are passed on to nobody and change nothing.
    updates, state = bare.update(SHARP_LAST, bare.init(PARAMS), PARAMS)
    _, after = bare.update(SHARP_LAST, state, PARAMS, curvature_updates=SHARP_FIRST)
    np.testing.assert_array_equal(flat(after.flat), flat(state.flat))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_leaves_the_choice(bad):
    tx = optax_sam.ire(optax.sgd(1.0), 1.0, flat_fraction=0.2, interval=1)
    broken = [MOVING[0], tree(1, 1, bad, 1, 1), MOVING[2]]
    assert [choice for choice, _ in flats(tx, broken)] == [chosen(t) for t in (0, 0, 2)]
    got = flats(tx, MOVING[:3], curvature_updates=broken)
    assert [choice for choice, _ in got] == [chosen(t) for t in (0, 0, 2)]
    np.testing.assert_allclose(got[1][1], -flat(MOVING[1]) * (1 + np.array(chosen(0))), rtol=1e-6)


def test_the_state_keeps_its_structure_and_types_under_jit():
    tx = optax_sam.ire(optax.sgd(1.0, momentum=0.9), 1.0, flat_fraction=0.4, interval=2)
    state = eager_state = tx.init(PARAMS)
    update = jax.jit(tx.update)
    for gradient in MOVING[:3]:
        updates, new = update(gradient, state, PARAMS)
        eager, eager_state = tx.update(gradient, eager_state, PARAMS)
        np.testing.assert_allclose(flat(updates), flat(eager), rtol=1e-6)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )
        assert all(x.dtype == bool for x in jax.tree.leaves(new.flat))
        state = new
    assert int(state.step) == 3


def logits(params, x):
    return jnp.tanh(x @ params["inner"]) @ params["outer"]


def test_the_gradient_with_sampled_labels_estimates_the_diagonal_of_the_fisher_information():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "inner": jax.random.normal(keys[0], (2, 3), jnp.float64),
        "outer": 2 * jax.random.normal(keys[1], (3, 4), jnp.float64),
    }
    x = jax.random.normal(keys[2], (5, 2), jnp.float64)

    def log_probabilities(params):
        return jax.nn.log_softmax(logits(params, x))

    # Exactly: the mean over examples of E (d log p / dw)^2, over labels as the model believes in them.
    scores = jax.jit(jax.jacobian(log_probabilities))(params)
    p = np.exp(np.asarray(log_probabilities(params)))
    exact = jax.tree.map(lambda s: np.einsum("nk,nk...->...", p, np.asarray(s) ** 2) / len(x), scores)

    draw = functools.partial(optax_sam.sampled_label_gradient, logits)
    draws = jax.jit(jax.vmap(lambda key: draw(key, params, x)))(jax.random.split(jax.random.key(1), 20_000))
    for name in params:
        squares = len(x) * np.asarray(draws[name]) ** 2
        error = squares.std(axis=0) / np.sqrt(len(squares))
        assert np.all(np.abs(squares.mean(axis=0) - exact[name]) < 4 * error)
        assert np.all(error < 0.05 * exact[name])  # Small enough to tell a wrong factor.
        mean_error = np.asarray(draws[name]).std(axis=0) / np.sqrt(len(squares))
        assert np.all(np.abs(np.asarray(draws[name]).mean(axis=0)) < 4 * mean_error)


def test_the_gradient_with_sampled_labels_takes_any_key():
    params, x = {"w": jnp.zeros((3, 2))}, jnp.eye(3)

    def linear(params, x):
        return x @ params["w"]

    same = [
        optax_sam.sampled_label_gradient(linear, key, params, x)["w"]
        for key in (4, jax.random.key(4), jax.random.key_data(jax.random.key(4)))
    ]
    np.testing.assert_array_equal(same[0], same[1])
    np.testing.assert_array_equal(same[0], same[2])
    with pytest.raises(TypeError, match="`key` must be a random key"):
        optax_sam.sampled_label_gradient(linear, 0.5, params, x)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"kappa": -1.0}, ValueError, r"`kappa` must be a number in the range \[0.0, inf\), got -1.0"),
        ({"kappa": "big"}, TypeError, "`kappa` must be a number or a schedule"),
        ({"flat_fraction": 1.5}, ValueError, r"`flat_fraction` .* range \[0.0, 1.0\], got 1.5"),
        ({"flat_fraction": -0.1}, ValueError, "`flat_fraction` .* got -0.1"),
        ({"interval": 0}, ValueError, r"`interval` must be an integer in the range \[1, inf\), got 0"),
        ({"interval": 2.5}, ValueError, "`interval` must be an integer .* got 2.5"),
        ({"start_step": -1}, ValueError, "`start_step` must be an integer .* got -1"),
        ({"base_optimizer": 0.1}, TypeError, "`base_optimizer` must be an Optax optimizer"),
    ],
)
def test_bad_arguments(kwargs, error, match):
    with pytest.raises(error, match=match):
        optax_sam.ire(**{"base_optimizer": optax.sgd(0.1), **kwargs})


def test_a_bare_gradient_around_a_variant_says_what_to_do():
    tx = optax_sam.ire(optax.chain(optax_sam.sam(0.1), optax.sgd(0.1)))
    with pytest.raises(TypeError, match="sam_value_and_grad"):
        tx.update(ONES, tx.init(PARAMS), PARAMS)


@pytest.mark.full
def test_a_fraction_is_exact_beyond_the_whole_numbers_of_float32():
    """All of 2^24 + 1 coordinates are flat, also the last of them."""
    with jax.enable_x64(False):
        gradient = jnp.zeros(2**24 + 1).at[-1].set(1.0)
        tx = optax_sam.ire(optax.sgd(1.0), 1.0, flat_fraction=1.0)
        _, state = jax.jit(tx.update)(gradient, tx.init(gradient), gradient)
        assert bool(state.flat.all())
