"""Every row of the table walks as its paper says: trajectory and memory, in float64, against plain numpy."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import table
from jax.flatten_util import ravel_pytree

import optax_sam


def loss(params, x):
    """`oracles.loss`, for JAX."""
    hidden = jnp.tanh(x @ params["kernel"] + params["bias"])
    residual = params["scale"] * jnp.sum(hidden, axis=1) - jnp.sin(jnp.sum(x, axis=1))
    return jnp.mean(residual**2 / 2 + residual**3 / 20)


def tree(flat):
    """The flat vector of the oracles as params."""
    parts = zip(oracles.SHAPES.items(), oracles.LEAVES, strict=True)
    return {name: jnp.asarray(flat[part]).reshape(shape) for (name, shape), part in parts}


def walk(row):
    """The function from params and batches to params, memory and loss after every step of a row."""
    variant, tx = row.optimizer(optax.sgd(0.1, momentum=0.9))
    value_and_grad = optax_sam.sam_value_and_grad(loss, variant)

    def step(carry, x):
        params, state = carry
        value, grads = value_and_grad(params, x, state=state)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        memory = optax.tree.get(state, "SAMState").memory
        return (params, state), (ravel_pytree(params)[0], ravel_pytree(memory)[0], value)

    return lambda params, batches: jax.lax.scan(step, (params, tx.init(params)), batches)[1]


@functools.cache
def walks():
    """Those of every row; one program compiles faster than many."""
    functions = {row.name: walk(row) for row in table.ROWS}
    run = jax.jit(lambda *args: {name: function(*args) for name, function in functions.items()})
    out = run(tree(oracles.first_params()), jnp.asarray(oracles.batches()))
    return jax.tree.map(np.asarray, out)


def noise(row):
    """The noise of bSAM by its public rule: the key, folded with the step, then with the shard's number."""
    like = tree(np.zeros(oracles.SIZE))
    key = jax.random.key(row.kwargs["key"])
    draws = []
    for t in range(len(oracles.batches())):
        own = jax.random.fold_in(jax.random.fold_in(key, t), 0)
        draws.append(np.asarray(ravel_pytree(optax.tree.random_like(own, like, jax.random.normal))[0]))
    return np.array(draws)


def draws():
    """The uniform numbers behind the random mask of the table, by its public rule: the key and the step."""
    like, key = tree(np.zeros(oracles.SIZE)), jax.random.key(5)
    steps = [jax.random.fold_in(key, t) for t in range(len(oracles.batches()))]
    return np.array([ravel_pytree(optax.tree.random_like(k, like, jax.random.uniform))[0] for k in steps])


def start():
    """The vector that Eigen-SAM of the table begins with: of its key alone."""
    like = tree(np.zeros(oracles.SIZE))
    return np.asarray(ravel_pytree(optax.tree.random_like(jax.random.key(5), like, jax.random.normal))[0])


@pytest.mark.every_row
@pytest.mark.parametrize("row", table.ROWS, ids=lambda row: row.name)
def test_the_trajectory_is_the_papers(row):
    with jax.enable_x64(True):
        points, memories, values = walks()[row.name]
        rule = oracles.ORACLES[row.name]
        if "noise" in inspect.signature(rule).parameters:
            rule = functools.partial(rule, noise=noise(row))
        if "draws" in inspect.signature(rule).parameters:
            rule = functools.partial(rule, draws=draws())
        if "start" in inspect.signature(rule).parameters:
            rule = functools.partial(rule, start=start())
    expected, expected_memories, expected_values = oracles.trajectory(
        rule, whole_optimizer=row.whole_optimizer
    )
    np.testing.assert_allclose(points, expected, rtol=1e-10, atol=1e-11)
    size = row.memory_copies * oracles.SIZE + row.memory_scalars
    assert memories.shape[1] == size == (0 if expected_memories[0] is None else expected_memories[0].size)
    if size:
        np.testing.assert_allclose(memories, np.array(expected_memories), rtol=1e-10, atol=1e-11)
    # The loss that is reported is that of the first evaluation: the clean one, where there are two.
    np.testing.assert_allclose(values, expected_values, rtol=1e-10)


def test_the_oracles_derivatives_are_right():
    w, x = oracles.first_params(), oracles.batches()[0]
    direction = np.random.default_rng(0).normal(size=oracles.SIZE)
    by_complex_step = [np.imag(oracles.loss(w + 1e-30j * e, x)) / 1e-30 for e in np.eye(oracles.SIZE)]
    np.testing.assert_allclose(oracles.gradient(w, x), by_complex_step, rtol=1e-13, atol=1e-15)
    grad = functools.partial(oracles.gradient, x=x)
    difference = (grad(w + 1e-5 * direction) - grad(w - 1e-5 * direction)) / 2e-5
    np.testing.assert_allclose(oracles.hessian_times(grad, w, direction), difference, rtol=1e-7, atol=1e-8)
    with jax.enable_x64(True):
        np.testing.assert_allclose(loss(tree(w), jnp.asarray(x)), oracles.loss(w, x), rtol=1e-14)


def test_the_walk_meets_every_case_of_the_rules():
    """An oracle that never entered a branch would prove nothing about it."""
    rule = oracles.ORACLES["same"]
    points, *_ = oracles.trajectory(rule, whole_optimizer=False)
    kinds, projected = set(), 0
    for w, x in zip(points, oracles.batches(), strict=True):
        g = oracles.gradient(w, x)
        g_p = oracles.gradient(w + 0.1 * oracles.unit(g), x)
        kinds |= set(oracles.checkpoint(g_p / g))
        second = 0.1 * oracles.unit(g) + 0.1 * oracles.unit(g_p)
        projected += np.linalg.norm(second) > 0.1
    assert kinds == {0, 1, 2, 3}
    assert projected > 0
    distances = [np.linalg.norm(a - b) for a in points for b in points]
    assert max(distances) < 50.0  # Nothing ran away, which would hide differences behind its size.
    assert min(np.linalg.norm(b - a) for a, b in itertools.pairwise(points)) > 1e-3
