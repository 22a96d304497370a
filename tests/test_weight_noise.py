"""Random weight perturbation: the size and the independence of the noise, and the numbers of its papers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam


def toy(w: Any) -> Any:
    return (10 * w[0] ** 2 + w[1] ** 2) / 2


def noise(variant: Any, params: Any, step: int = 0) -> Any:
    """The noise of a step: the gradient of the sum of squares / 2 is the point itself."""
    state = variant.init(params)._replace(step=jnp.asarray(step))

    def squares(w: Any) -> Any:
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(w)) / 2

    _, grads = optax_sam.sam_value_and_grad(squares, variant)(params, state=state)
    return jax.tree.map(lambda g, w: np.asarray(g - w), grads.perturbed, params)


def test_the_mixed_gradient_by_hand() -> None:
    """RWP's draw n at w = (1, 1), with deviation 0.1 sqrt(2): u = a grad L(w + n) + (1 - a) grad L(w)."""
    params = jnp.array([1.0, 1.0])
    variant = optax_sam.weight_noise(0.1, mix=0.5, key=2)
    state = variant.init(params)
    _, grads = optax_sam.sam_value_and_grad(toy, variant)(params, state=state)
    direction, _ = variant.update(grads, state, params)
    n = noise(variant, params)
    np.testing.assert_allclose(direction, [10 + 5 * n[0], 1 + n[1] / 2], rtol=1e-6)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(2), 0), 0)
    by_rule = 0.1 * np.sqrt(2) * optax.tree.random_like(key, params, jax.random.normal)
    np.testing.assert_allclose(n, by_rule, rtol=1e-5, atol=1e-7)
    # The published toy: n = (0.5, -1) times the deviation gives (10.3535533906, 0.929289321881).
    n = 0.1 * np.sqrt(2) * np.array([0.5, -1.0])
    np.testing.assert_allclose([10 + 5 * n[0], 1 + n[1] / 2], [10.3535533906, 0.929289321881], rtol=1e-10)


PARAMS = {
    "conv": jnp.full((3, 3, 20, 40), 0.1).at[..., 7].set(1.0),
    "bias": jnp.full((5000,), 0.2),
    "scale": jnp.asarray(0.5),
}
SIZES = {
    # Norms of the filters of the kernel, first the seventh and then the others; of the bias; of the scale.
    "filter": (np.sqrt(180), 0.1 * np.sqrt(180), 0.2 * np.sqrt(5000), 0.5),
    "leaf": (*(np.sqrt(180 + 0.01 * 180 * 39),) * 2, 0.2 * np.sqrt(5000), 0.5),
    "weight": (1.0, 0.1, 0.2, 0.5),
}


@pytest.mark.parametrize("per", SIZES)
def test_deviations(per: str) -> None:
    found = noise(optax_sam.weight_noise(0.01, per=per), PARAMS)
    seventh, others, bias, _ = SIZES[per]
    rest = np.delete(found["conv"], 7, axis=-1)
    parts = ((found["conv"][..., 7], seventh), (rest, others), (found["bias"], bias))
    for part, size in parts:
        # The deviation of n draws is known to 1 / sqrt(2 n).
        margin = 4 / np.sqrt(2 * part.size)
        np.testing.assert_allclose(np.std(part), 0.01 * size, rtol=margin)
        assert abs(np.mean(part)) < 4 * 0.01 * size / np.sqrt(part.size)


def test_filters_on_another_axis() -> None:
    turned = {"conv": jnp.moveaxis(PARAMS["conv"], -1, 0)}
    found = noise(optax_sam.weight_noise(0.01, output_axis=0), turned)["conv"]
    np.testing.assert_allclose(np.std(found[7]), 0.01 * np.sqrt(180), rtol=0.25)
    with pytest.raises(ValueError, match="`output_axis` is 2, but a leaf has shape"):
        noise(optax_sam.weight_noise(0.01, output_axis=2), {"kernel": jnp.ones((2, 2))})


def test_every_step_shard_and_key_has_its_own() -> None:
    params = jnp.ones(8)
    draws = [noise(optax_sam.weight_noise(0.1, key=key), params, step) for key in (0, 1) for step in (0, 1)]
    assert len({tuple(x.tolist()) for x in draws}) == 4
    np.testing.assert_array_equal(draws[1], noise(optax_sam.weight_noise(0.1, key=0), params, 1))
    variant = optax_sam.weight_noise(0.1)

    def loss(w: Any, x: Any) -> Any:
        return jnp.mean(x) * jnp.sum(w**2) / 2

    _, grads = optax_sam.sam_value_and_grad(loss, variant, num_shards=4, batch_argnums=1)(
        params, jnp.ones(8), state=variant.init(params)
    )
    keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), i) for i in range(4)]
    normal = [optax.tree.random_like(key, params, jax.random.normal) for key in keys]
    expected = 1.0 + 0.1 * np.sqrt(8) * np.mean(normal, axis=0)
    np.testing.assert_allclose(grads.perturbed, expected, rtol=1e-5)


def test_a_schedule_of_the_scale() -> None:
    """Flat-LoRA's noise grows from nothing."""
    growing = optax.linear_schedule(0.0, 1.0, 10)
    variant = optax_sam.weight_noise(growing)
    params = jnp.ones(4)
    state = variant.init(params)
    for step in range(3):
        assert float(state.rho) == pytest.approx(step / 10)
        _, grads = optax_sam.sam_value_and_grad(lambda w: jnp.sum(w**2), variant)(params, state=state)
        _, state = variant.update(grads, state, params)
    assert not np.any(noise(variant, params))  # In the first step.


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"scale": -0.1}, ValueError, "`scale` must be a number in the range"),
        ({"mix": 0.0}, ValueError, "`mix` must be a number in the range"),
        ({"mix": 1.1}, ValueError, "`mix` must be a number in the range"),
        ({"mix": jnp.asarray(0.5)[None]}, TypeError, "`mix` decides what is evaluated"),
        ({"per": "layer"}, ValueError, "`per` must be one of 'filter', 'leaf', 'weight'"),
        ({"key": 0.5}, TypeError, "`key` must be a random key"),
    ],
)
def test_bad_arguments(arguments: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        optax_sam.weight_noise(**arguments)
