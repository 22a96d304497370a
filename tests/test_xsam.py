"""XSAM's search, `xsam_alpha`: where it ends, and that the step goes there."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax.flatten_util import ravel_pytree

import optax_sam

RHO, RADIUS = 0.5, 1.5


def tree(flat):
    parts = zip(oracles.SHAPES.items(), oracles.LEAVES, strict=True)
    return {name: jnp.asarray(flat[part]).reshape(shape) for (name, shape), part in parts}


def loss(params, x):
    hidden = jnp.tanh(x @ params["kernel"] + params["bias"])
    residual = params["scale"] * jnp.sum(hidden, axis=1) - jnp.sin(jnp.sum(x, axis=1))
    return jnp.mean(residual**2 / 2 + residual**3 / 20)


def searched(w, x):
    """Chen and Zhou: the best of 21 directions on the arc, and the step's."""
    g = oracles.gradient(w, x)
    g_p = oracles.gradient(w + RHO * oracles.unit(g), x)
    v0, v1 = oracles.unit(g), oracles.unit(g_p)
    angle = np.arccos(v0 @ v1)
    arcs = [
        (np.sin((1 - a) * angle) * v0 + np.sin(a * angle) * v1) / np.sin(angle) for a in np.arange(21) / 10
    ]
    best = int(np.argmax([oracles.loss(w + RADIUS * arc, x) for arc in arcs]))
    return best / 10, np.linalg.norm(g_p) * arcs[best]


@pytest.mark.usefixtures("in_float64")
def test_the_step_goes_where_the_search_ends():
    variant = optax_sam.xsam(RHO)
    tx = optax.chain(optax.inject_hyperparams(optax_sam.xsam)(rho=RHO, alpha=1.5), optax.sgd(0.1))
    value_and_grad = optax_sam.sam_value_and_grad(loss, variant)

    @jax.jit
    def step(params, state, x):
        _, grads = value_and_grad(params, x, state=state)
        alpha = optax_sam.xsam_alpha(lambda params: loss(params, x), grads, params, RADIUS)
        state = optax.tree.set(state, alpha=alpha)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, alpha

    w = oracles.first_params()
    params, found = tree(w), []
    state = tx.init(params)
    for x in oracles.batches():
        params, state, alpha = step(params, state, x)
        expected, direction = searched(w, x)
        w = w - 0.1 * direction
        np.testing.assert_allclose(alpha, expected, atol=1e-12)
        np.testing.assert_allclose(ravel_pytree(params)[0], w, rtol=1e-10, atol=1e-11)
        found.append(float(alpha))
    assert len({0.0, 2.0} | set(found)) > 3  # Not only the ends.


@pytest.mark.full
def test_what_has_no_value_is_not_the_largest():
    params = jnp.array([1.0, 1.0])
    grads = optax_sam.SAMGradients(jnp.array([10.0, 1.0]), jnp.array([1.0, 10.0]))

    def broken_beyond(params):
        return jnp.where(params[1] > 1.25, jnp.nan, params[1])

    # The second coordinate of the arc that begins near the first axis grows with alpha.
    alpha = optax_sam.xsam_alpha(broken_beyond, grads, params, 0.3, alpha_max=1.0, count=11)
    assert 0.1 < alpha < 0.9


def test_mistakes():
    params = jnp.ones(2)
    grads = optax_sam.SAMGradients(params, params)
    with pytest.raises(ValueError, match=r"`radius` must be .* \(0.0, inf\), got 0.0"):
        optax_sam.xsam_alpha(jnp.sum, grads, params, 0.0)
    with pytest.raises(ValueError, match="`count` must be an integer"):
        optax_sam.xsam_alpha(jnp.sum, grads, params, 0.1, count=1)
    with pytest.raises(ValueError, match="`alpha_max` must be"):
        optax_sam.xsam_alpha(jnp.sum, grads, params, 0.1, alpha_max=0.0)
    with pytest.raises(TypeError, match="needs two gradients and got a single one"):
        optax_sam.xsam_alpha(jnp.sum, params, params, 0.1)
