"""A whole training step under JAX's transformations, and in Equinox's and Haiku's ways of writing it."""

import functools
from typing import Any

import chex
import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import table
from jax import export

import optax_sam

every_variant = pytest.mark.parametrize("row", table.VARIANTS, ids=lambda row: row.name)


@functools.cache
def expected(row: table.Row) -> Any:
    """What a step of a row gives as users write it."""
    step, tx = row.train_step()
    return jax.jit(step)(table.params(), tx.init(table.params()), table.batch())


def at(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda x: x[i], tree)


def test_ensemble_over_seeds_and_radii() -> None:
    """Nine networks in one program, state and all, each as if it were alone."""
    batches = jnp.stack([table.batch(seed=i) for i in range(3)])

    def train(seed: Any, rho: Any) -> Any:
        variant = optax_sam.gsam(rho)
        tx = optax.chain(variant, optax.sgd(0.05, momentum=0.9))
        value_and_grad = optax_sam.sam_value_and_grad(table.loss, variant)

        def body(carry: Any, batch: Any) -> Any:
            params, state = carry
            value, grads = value_and_grad(params, batch, state=state)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        params = table.params(seed=seed)
        return jax.lax.scan(body, (params, tx.init(params)), batches)

    radii = jnp.array([0.0, 0.05, 0.5])
    seeds = jnp.arange(3)
    over_radii = jax.vmap(train, in_axes=(None, 0))
    (params, state), values = jax.jit(jax.vmap(over_radii, in_axes=(0, None)))(seeds, radii)
    assert values.shape == (3, 3, 3)
    np.testing.assert_allclose(optax.tree.get(state, "SAMState").rho, np.tile(radii, (3, 1)))
    alone = jax.jit(train)
    for i in range(3):
        for j in range(3):
            (expected, _), expected_values = alone(seeds[i], radii[j])
            chex.assert_trees_all_close(at(at(params, i), j), expected, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(values[i, j], expected_values, rtol=1e-4)


def test_derivatives_of_rules_at_zero_are_finite() -> None:
    """Where a root is taken of a zero: of the entries of a gradient, and of a filter, such as a zero bias."""
    g, w = jnp.array([0.0, 1.0]), jnp.array([0.0, 2.0])
    for rule in (optax_sam.ascent.normalized(3.0), optax_sam.ascent.adaptive(granularity="filter")):
        slope = jax.grad(lambda g, w, rule=rule: jnp.sum(rule(g, 0.1, w) ** 2), argnums=(0, 1))(g, w)
        assert np.isfinite(np.array(slope)).all()


def test_learning_the_radius() -> None:
    """Differentiation through a step with respect to rho, against a finite difference."""
    with jax.enable_x64(True):
        params, batch = table.params(jnp.float64), table.batch(dtype=jnp.float64)

        def outcome(rho: Any) -> Any:
            variant = optax_sam.sam(rho)
            value_and_grad = optax_sam.sam_value_and_grad(table.loss, variant)
            _, grads = value_and_grad(params, batch, state=variant.init(params))
            after = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads.perturbed)
            return table.loss(after, table.batch(seed=5, dtype=jnp.float64))

        slope = jax.jit(jax.grad(outcome))(0.1)
        difference = (outcome(0.1 + 1e-5) - outcome(0.1 - 1e-5)) / 2e-5
        np.testing.assert_allclose(slope, difference, rtol=1e-6)


@every_variant
def test_donation_and_ahead_of_time(row: table.Row) -> None:
    """Params and state are given away and reused in place; a step compiled ahead of time is that step."""
    step, tx = row.train_step()
    params, state, batch = table.params(), tx.init(table.params()), table.batch()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch).compile()
    given = jax.tree.map(jnp.copy, (params, state))
    outputs = compiled(*given, batch)
    assert all(x.is_deleted() for x in jax.tree.leaves(given[0]))
    memory = [x for x in jax.tree.leaves(given[1]) if x.ndim]
    assert all(x.is_deleted() for x in memory)
    chex.assert_trees_all_close(outputs, expected(row), rtol=1e-6)
    compiled(*outputs[:2], batch)  # The new state fits the same program.


@every_variant
def test_rematerialisation(row: table.Row) -> None:
    """`jax.checkpoint` in the model changes no number."""
    params = table.params()
    step, tx = row.train_step(jax.checkpoint(table.loss))
    found = jax.jit(step)(params, tx.init(params), table.batch())
    chex.assert_trees_all_close(found, expected(row), rtol=1e-5, atol=1e-6)


# Optax's own types are for the user to name, if an exported function takes them.
for _kind in (optax.EmptyState, optax.TraceState):
    export.register_namedtuple_serialization(_kind, serialized_name=f"optax.{_kind.__name__}")


@every_variant
def test_export(row: table.Row) -> None:
    """A step written to bytes and read again is the step, with its state as it was."""
    step, tx = row.train_step()
    params, state, batch = table.params(), tx.init(table.params()), table.batch()
    written = export.export(jax.jit(step))(params, state, batch).serialize()
    read = export.deserialize(written)
    outputs = read.call(params, state, batch)
    assert jax.tree.structure(outputs) == jax.tree.structure(expected(row))
    chex.assert_trees_all_close(outputs, expected(row), rtol=1e-5, atol=1e-6)


X = jax.random.normal(jax.random.key(0), (16, 3))
Y = jnp.sin(X @ jnp.array([1.0, -2.0, 0.5]))


class Model(eqx.Module):
    """A module with arrays, functions, None and statistics."""

    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    last: eqx.nn.Linear
    activation: Any
    nothing: Any

    def __init__(self, key: Any) -> None:
        keys = jax.random.split(key)
        self.first = eqx.nn.Linear(3, 8, key=keys[0])
        self.norm = eqx.nn.BatchNorm(8, axis_name="batch", mode="batch")
        self.last = eqx.nn.Linear(8, 1, key=keys[1])
        self.activation, self.nothing = jax.nn.tanh, None

    def __call__(self, x: Any, state: Any) -> Any:
        x, state = self.norm(self.activation(self.first(x)), state)
        return self.last(x)[0], state


def test_equinox() -> None:
    """`eqx.partition` outside, `eqx.combine` in the loss; statistics as of one ordinary pass."""
    model, statistics = eqx.nn.make_with_state(Model)(jax.random.key(0))
    looksam = optax_sam.looksam(0.1, k=2)
    tx = optax.chain(looksam, optax.adam(0.01))

    def model_loss(model: Any, statistics: Any, x: Any, y: Any) -> Any:
        apply = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        output, statistics = apply(x, statistics)
        return jnp.mean((output - y) ** 2), statistics

    def loss(params: Any, static: Any, statistics: Any, x: Any, y: Any) -> Any:
        return model_loss(eqx.combine(params, static), statistics, x, y)

    value_and_grad = optax_sam.sam_value_and_grad(loss, looksam, has_aux=True)

    @eqx.filter_jit
    def step(model: Any, statistics: Any, state: Any, x: Any, y: Any) -> Any:
        params, static = eqx.partition(model, eqx.is_inexact_array)
        (value, statistics), grads = value_and_grad(params, static, statistics, x, y, state=state)
        updates, state = tx.update(grads, state, params)
        return eqx.apply_updates(model, updates), statistics, state, value, grads

    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    ordinary = eqx.filter_jit(eqx.filter_value_and_grad(model_loss, has_aux=True))
    for _ in range(3):
        (expected, expected_statistics), clean = ordinary(model, statistics, X, Y)
        clean = eqx.filter(clean, eqx.is_inexact_array)
        model, statistics, state, value, grads = step(model, statistics, state, X, Y)
        chex.assert_trees_all_close(value, expected, rtol=1e-6)
        chex.assert_trees_all_close(
            jax.tree.leaves(statistics), jax.tree.leaves(expected_statistics), rtol=1e-6
        )
        chex.assert_trees_all_close(grads.clean, clean, rtol=1e-4, atol=1e-6)
    assert model.nothing is None
    assert model.activation is jax.nn.tanh


def test_equinox_whole_model_is_refused() -> None:
    model, statistics = eqx.nn.make_with_state(Model)(jax.random.key(0))
    sam = optax_sam.sam()
    with pytest.raises(TypeError, match=r"params must hold floating-point arrays, got .* at .norm.axis_name"):
        optax_sam.sam_value_and_grad(lambda m: 0.0, sam)(model, state=sam.init(jnp.ones(3)))
    del statistics


def test_haiku() -> None:
    """`hk.transform_with_state`: the state is aux, the random key an argument; as in one ordinary pass."""

    def network(x: Any) -> Any:
        x = hk.BatchNorm(True, True, 0.9)(jnp.tanh(hk.Linear(8)(x)), is_training=True)
        return hk.Linear(1)(hk.dropout(hk.next_rng_key(), 0.5, x))[:, 0]

    transformed = hk.transform_with_state(network)
    params, statistics = transformed.init(jax.random.key(0), X)

    def loss(params: Any, statistics: Any, key: Any, x: Any, y: Any) -> Any:
        output, statistics = transformed.apply(params, statistics, key, x)
        return jnp.mean((output - y) ** 2), statistics

    gsam = optax_sam.gsam(0.1)
    tx = optax.chain(gsam, optax.adam(0.01))
    value_and_grad = optax_sam.sam_value_and_grad(loss, gsam, has_aux=True)
    state = tx.init(params)

    @jax.jit
    def step(params: Any, statistics: Any, state: Any, key: Any) -> Any:
        (value, statistics), grads = value_and_grad(params, statistics, key, X, Y, state=state)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), statistics, state, value, grads

    ordinary = jax.jit(jax.value_and_grad(loss, has_aux=True))
    for i in range(3):
        key = jax.random.key(i)
        (expected, expected_statistics), clean = ordinary(params, statistics, key, X, Y)
        params, statistics, state, value, grads = step(params, statistics, state, key)
        chex.assert_trees_all_close((value, statistics), (expected, expected_statistics), rtol=1e-6)
        chex.assert_trees_all_close(grads.clean, clean, rtol=1e-4, atol=1e-6)
