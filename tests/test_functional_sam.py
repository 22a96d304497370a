"""Functional SAM, no row of the table, as its loss has two parts: the paper's rule, and a good citizen.

Shards, microbatches and devices: `test_core.py`, with the other questions about composite losses.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import table
import tiers
from flax import nnx
from jax.flatten_util import ravel_pytree

import optax_sam

BASE = optax.sgd(0.1, momentum=0.9)


def model_fn(params: Any, x: Any) -> Any:
    return params["scale"] * jnp.tanh(x @ params["kernel"] + params["bias"])


def output_loss(z: Any, y: Any) -> Any:
    return jnp.mean(jnp.sum(jnp.exp(z - y), axis=-1))


LOSS = optax_sam.CompositeLoss(model_fn, output_loss)


def params_of(flat: np.ndarray, dtype: Any = None) -> Any:
    parts = zip(oracles.SHAPES.items(), oracles.LEAVES, strict=True)
    return {name: jnp.asarray(flat[part], dtype).reshape(shape) for (name, shape), part in parts}


def targets(x: Any) -> np.ndarray:
    return np.cos(np.asarray(x) @ np.ones((3, 4)) + np.arange(4))


def pulled_back(w: np.ndarray, x: np.ndarray, cotangent: np.ndarray | None, y: np.ndarray) -> Any:
    """The cotangent times the Jacobian of the network at w, in numpy; None: that of the loss at w."""
    bias, kernel, scale = w[:4], w[4:16].reshape(3, 4), w[16]
    hidden = np.tanh(x @ kernel + bias)
    own = np.exp(scale * hidden - y) / len(x)
    c = own if cotangent is None else cotangent
    inner = c * scale * (1 - hidden**2)
    return own, np.concatenate([inner.sum(axis=0), (x.T @ inner).ravel(), [np.sum(c * hidden)]])


def walk(variant: Any, steps: int = 6) -> Any:
    tx = optax.chain(variant, BASE)
    value_and_grad = optax_sam.sam_value_and_grad(LOSS, variant)

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        value, grads = value_and_grad(params, *batch, state=state)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), (ravel_pytree(params)[0], value)

    params = params_of(oracles.first_params())
    batches = [(jnp.asarray(x), jnp.asarray(targets(x))) for x in oracles.batches()[:steps]]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *batches)
    return jax.jit(lambda *args: jax.lax.scan(step, args[0], args[1])[1])((params, tx.init(params)), stacked)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("rule", tiers.later(["normalized", "unnormalized"], ["normalized"]))
def test_the_trajectory_is_the_papers(rule: str) -> None:
    rho = 0.1 if rule == "normalized" else 0.02
    points, values = walk(optax_sam.functional_sam(rho, ascent=getattr(optax_sam.ascent, rule)()))
    w, velocity = oracles.first_params(), np.zeros(oracles.SIZE)
    for x, point, value in zip(oracles.batches(), points, values, strict=True):
        np.testing.assert_allclose(point, w, rtol=1e-10)
        y = targets(x)
        c, g = pulled_back(w, x, None, y)
        np.testing.assert_allclose(value, np.sum(c), rtol=1e-10)
        e = rho * (oracles.unit(g) if rule == "normalized" else g)
        own, u = pulled_back(w + e, x, c, y)
        assert np.max(np.abs(own - c)) > 1e-4  # The loss there has another derivative.
        velocity = 0.9 * velocity + u
        w = w - 0.1 * velocity


@pytest.mark.usefixtures("in_float64")
def test_behind_a_gate() -> None:
    """Every other step is plain."""
    points, _ = walk(optax_sam.gated(optax_sam.functional_sam(0.1), optax_sam.gates.every(2)))
    w, velocity = oracles.first_params(), np.zeros(oracles.SIZE)
    for i, (x, point) in enumerate(zip(oracles.batches(), points, strict=True)):
        np.testing.assert_allclose(point, w, rtol=1e-10)
        y = targets(x)
        c, g = pulled_back(w, x, None, y)
        velocity = 0.9 * velocity + (g if i % 2 else pulled_back(w + 0.1 * oracles.unit(g), x, c, y)[1])
        w = w - 0.1 * velocity


def test_with_flax_nnx() -> None:
    """What `nnx.split` gives is a tree of params, as any other."""
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    loss = optax_sam.CompositeLoss(lambda params, x: nnx.merge(graph, params)(x), output_loss)
    plain = optax_sam.CompositeLoss(lambda p, x: x @ p["kernel"] + p["bias"], output_loss)
    variant, x = optax_sam.functional_sam(0.1), jnp.asarray(oracles.batches()[0])
    y = targets(x)
    own = {"kernel": model.kernel[...], "bias": model.bias[...]}
    (_, found), (_, expected) = (
        optax_sam.sam_value_and_grad(f, variant)(p, x, y, state=variant.init(p))
        for f, p in ((loss, params), (plain, own))
    )
    for name in own:
        np.testing.assert_allclose(found.perturbed[name][...], expected.perturbed[name], rtol=1e-6)
    with pytest.raises(TypeError, match="Neither `grad_fn=` nor"):
        optax_sam.nnx.sam_value_and_grad(
            optax_sam.CompositeLoss(lambda model, x: model(x), output_loss), variant
        )(model, x, y, state=variant.init(params))


def test_how_it_is_called() -> None:
    """A tuple of one param is taken apart; what is no input or target is refused."""
    variant, params, x = (
        optax_sam.functional_sam(0.1),
        params_of(oracles.first_params()),
        oracles.batches()[0],
    )
    y = targets(x)
    _, expected = optax_sam.sam_value_and_grad(LOSS, variant)(params, x, y, state=variant.init(params))
    of_tuple = optax_sam.sam_value_and_grad(LOSS, variant, argnums=(0,))
    _, found = of_tuple(params, x, y, state=variant.init((params,)))
    chex.assert_trees_all_close(found.perturbed, (expected.perturbed,), rtol=1e-6)
    with pytest.raises(
        TypeError, match=r"takes three positional arguments.*got 2 and the keywords \['targets'\]"
    ):
        optax_sam.sam_value_and_grad(LOSS, variant)(params, x, targets=y, state=variant.init(params))


@pytest.mark.usefixtures("in_float64")
def test_a_radius_of_zero_is_the_base_optimizer() -> None:
    points, _ = walk(optax_sam.functional_sam(0.0), steps=3)
    params = params_of(oracles.first_params())
    state = BASE.init(params)
    for x, point in zip(oracles.batches(), points, strict=False):
        np.testing.assert_allclose(point, ravel_pytree(params)[0], rtol=1e-13)
        updates, state = BASE.update(jax.grad(LOSS)(params, x, targets(x)), state)
        params = optax.apply_updates(params, updates)


def test_a_linear_loss_of_the_outputs_makes_it_sam() -> None:
    """Whose derivative is the same everywhere."""
    loss = optax_sam.CompositeLoss(model_fn, lambda z, y: jnp.mean(z * y))
    params, x = params_of(oracles.first_params()), oracles.batches()[0]
    functional, sam = (
        optax_sam.sam_value_and_grad(loss, v)(params, x, targets(x), state=v.init(params))
        for v in (optax_sam.functional_sam(0.1), optax_sam.sam(0.1))
    )
    chex.assert_trees_all_close(functional[1][:2], sam[1][:2], rtol=1e-6)


@pytest.mark.parametrize("dtype", tiers.later([jnp.float32, jnp.bfloat16, jnp.float16], [jnp.bfloat16]))
def test_dtypes_doors_and_hyperparameters(dtype: Any) -> None:
    variant, params = optax_sam.functional_sam(0.1), params_of(oracles.first_params(), dtype)
    x = jnp.asarray(oracles.batches()[0], dtype)
    y = jnp.asarray(targets(x), dtype)
    injected = optax.inject_hyperparams(optax_sam.functional_sam)(rho=0.1)
    value_and_grad = optax_sam.sam_value_and_grad(LOSS, variant)
    state = variant.init(params)
    value, grads = value_and_grad(params, x, y, state=state)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads.clean, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads.perturbed, params)
    assert value.dtype == dtype
    direction, _ = variant.update(grads, state, params)
    door, _ = variant.update(grads.perturbed, state, params, clean_updates=grads.clean)
    chex.assert_trees_all_equal(direction, grads.perturbed, door)
    chex.assert_trees_all_close(value_and_grad(params, x, y, state=injected.init(params))[1], grads)


def test_what_does_not_show_the_outputs_is_refused() -> None:
    variant, params = optax_sam.functional_sam(0.1), table.params()
    state = variant.init(params)
    with pytest.raises(TypeError, match=r"outputs of the network.*CompositeLoss.*`nnx.split\(model\)`"):
        optax_sam.sam_value_and_grad(table.loss, variant)(params, table.batch(), state=state)
    with pytest.raises(TypeError, match="Neither `grad_fn=` nor"):
        variant.update(params, state, params, grad_fn=lambda params: params)
    with pytest.raises(ValueError, match="ascent_examples"):
        optax_sam.sam_value_and_grad(LOSS, variant, ascent_examples=0.5, batch_argnums=(1, 2))
