"""Flax Linen: two passes leave a model as one pass does, and training code changes by two lines."""

import functools
import itertools
from typing import Any

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import table
from flax.training import train_state
from flax.training.dynamic_scale import DynamicScale
from quick import QUICK

import optax_sam

# A door, or a fault of the mechanism, cannot tell two rows with the same capabilities apart.
pytestmark = pytest.mark.by_capability

every_variant = pytest.mark.parametrize("row", table.VARIANTS, ids=lambda row: row.name)

X = jax.random.normal(jax.random.key(0), (16, 3))
Y = jnp.sin(X @ jnp.array([1.0, -2.0, 0.5]))


class Network(nn.Module):
    """BatchNorm and dropout."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool = True) -> Any:
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(8)(x))
        x = nn.Dropout(0.5, deterministic=not train)(nn.tanh(x))
        return nn.Dense(1)(x)[..., 0]


NETWORK = Network()
VARIABLES = NETWORK.init(jax.random.key(0), X, train=False)


class State(train_state.TrainState):
    batch_stats: Any


def linen_loss(params: Any, batch_stats: Any, x: Any, y: Any, key: Any) -> Any:
    output, new = NETWORK.apply(
        {"params": params, "batch_stats": batch_stats}, x, rngs={"dropout": key}, mutable=["batch_stats"]
    )
    return jnp.mean((output - y) ** 2), new["batch_stats"]


@every_variant
def test_linen_statistics_are_those_of_one_pass(row: table.Row) -> None:
    """Bit for bit: the value and the statistics of BatchNorm after a step in a stock `TrainState`."""
    variant, tx = row.optimizer()
    state = State.create(
        apply_fn=NETWORK.apply, params=VARIABLES["params"], tx=tx, batch_stats=VARIABLES["batch_stats"]
    )
    value_and_grad = optax_sam.sam_value_and_grad(linen_loss, variant, has_aux=True)
    key = jax.random.key(1)
    (value, stats), grads = value_and_grad(state.params, state.batch_stats, X, Y, key, state=state.opt_state)
    after = state.apply_gradients(grads=grads, batch_stats=stats)
    ordinary = jax.value_and_grad(linen_loss, has_aux=True)
    (expected, expected_stats), clean = ordinary(state.params, state.batch_stats, X, Y, key)
    assert after.step == 1
    if not row.clean_at_params:
        moved = jax.tree.map(lambda a, b: np.any(a != b), after.batch_stats, state.batch_stats)
        assert all(jax.tree.leaves(moved))
        return
    chex.assert_trees_all_equal((value, after.batch_stats), (expected, expected_stats))
    chex.assert_trees_all_equal(grads.clean, clean)


def test_linen_statistics_under_jit() -> None:
    """Bit for bit too between compiled programs."""
    sam = optax_sam.sam(0.1)
    value_and_grad = optax_sam.sam_value_and_grad(linen_loss, sam, has_aux=True)
    key = jax.random.key(1)

    @jax.jit
    def sharp(params: Any, stats: Any) -> Any:
        (value, stats), _ = value_and_grad(params, stats, X, Y, key, state=sam.init(params))
        return value, stats

    @jax.jit
    def ordinary(params: Any, stats: Any) -> Any:
        (value, stats), _ = jax.value_and_grad(linen_loss, has_aux=True)(params, stats, X, Y, key)
        return value, stats

    args = VARIABLES["params"], VARIABLES["batch_stats"]
    chex.assert_trees_all_equal(sharp(*args), ordinary(*args))


def test_both_passes_see_one_dropout_mask() -> None:
    """The perturbed gradient is the gradient at the perturbed point with the same key."""
    sam = optax_sam.sam(0.1)
    params, stats = VARIABLES["params"], VARIABLES["batch_stats"]
    key = jax.random.key(1)
    value_and_grad = optax_sam.sam_value_and_grad(linen_loss, sam, has_aux=True)
    _, grads = value_and_grad(params, stats, X, Y, key, state=sam.init(params))
    gradient = jax.grad(linen_loss, has_aux=True)
    clean, _ = gradient(params, stats, X, Y, key)
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(clean)))
    point = jax.tree.map(lambda w, g: w + 0.1 * g / norm, params, clean)
    same, other = (gradient(point, stats, X, Y, k)[0] for k in (key, jax.random.key(2)))
    chex.assert_trees_all_close(grads.perturbed, same, rtol=1e-4, atol=1e-6)
    differences = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), grads.perturbed, other)
    assert max(jax.tree.leaves(differences)) > 1e-2


class Deep(nn.Module):
    """Layers under `nn.scan` and `nn.remat`, with params that say how they are to be sharded."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))

        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x: Any, _: Any) -> Any:
                return nn.tanh(nn.Dense(3, kernel_init=kernel_init)(x)), None

        axes = {"params": 0}
        metadata = {nn.PARTITION_NAME: "layers"}
        layers = nn.scan(
            nn.remat(Layer), axes, split_rngs={"params": True}, length=2, metadata_params=metadata
        )
        x, _ = layers()(x, None)
        return nn.Dense(1)(x)[..., 0]


@pytest.mark.full
def test_linen_params_in_boxes() -> None:
    """`nn.Partitioned` boxes, a `FrozenDict`, `nn.scan` and `nn.remat`: against two passes by hand."""
    network = Deep()
    params = flax.core.freeze(network.init(jax.random.key(0), X)["params"])
    assert any(
        isinstance(x, nn.Partitioned) for x in jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "names"))
    )

    def loss(params: Any, x: Any, y: Any) -> Any:
        return jnp.mean((network.apply({"params": params}, x) - y) ** 2)

    looksam = optax_sam.looksam(0.1, k=1)
    tx = optax.chain(looksam, optax.adamw(0.01))
    state = train_state.TrainState.create(apply_fn=network.apply, params=params, tx=tx)

    @jax.jit
    def step(state: Any) -> Any:
        _, grads = optax_sam.sam_value_and_grad(loss, looksam)(state.params, X, Y, state=state.opt_state)
        return state.apply_gradients(grads=grads), grads

    after, grads = step(state)
    clean = jax.grad(loss)(params, X, Y)
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(clean)))
    point = jax.tree.map(lambda w, g: w + 0.1 * g / norm, params, clean)
    expected = clean, jax.grad(loss)(point, X, Y)
    chex.assert_trees_all_close((grads.clean, grads.perturbed), expected, rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(after.params) == jax.tree.structure(params)


def test_dynamic_scale_takes_all_options() -> None:
    """As Flax's own: several arguments that are differentiated, by position; and metrics beside."""

    def loss(w: Any, x: Any, b: Any, y: Any) -> Any:
        return jnp.mean((x @ w + b - y) ** 2), x.shape[0]

    w, b = jnp.ones(3), jnp.zeros(())
    sam = optax_sam.sam(0.1)
    value_and_grad = optax_sam.linen.dynamic_scale_value_and_grad(
        DynamicScale(scale=jnp.float32(4.0)), loss, sam, (0, 2), True,
        return_metrics=True, num_shards=2, batch_argnums=(1, 3),
    )  # fmt: skip
    with pytest.raises(TypeError, match="`state=` is missing"):
        value_and_grad(w, X, b, Y)
    with pytest.raises(TypeError, match="`loss_scale=` has no place here: the scale is that of `dynamic_sc"):
        value_and_grad(w, X, b, Y, state=sam.init((w, b)), loss_scale=4.0)
    _, finite, (value, seen), grads, metrics = value_and_grad(w, X, b, Y, state=sam.init((w, b)))
    assert finite
    assert seen == len(X)
    np.testing.assert_allclose(value, loss(w, X, b, Y)[0], rtol=1e-6)
    np.testing.assert_allclose(metrics.perturbation_norm, 0.1, rtol=1e-5)
    clean, _ = jax.grad(loss, (0, 2), has_aux=True)(w, X, b, Y)
    chex.assert_trees_all_close(grads.clean, clean, rtol=1e-5)


@every_variant
def test_dynamic_scale(row: table.Row) -> None:
    """Half precision: an overflow changes neither params nor the variant's state, only the scale."""
    variant, tx = row.optimizer()

    def loss(params: Any, x: Any) -> Any:
        return table.loss(jax.tree.map(lambda w: w.astype(jnp.float16), params), x.astype(jnp.float16))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(params: Any, state: Any, scale: Any, x: Any) -> Any:
        grad_fn = optax_sam.linen.dynamic_scale_value_and_grad(scale, loss, variant)
        scale, finite, value, grads = grad_fn(params, x, state=state)
        updates, new_state = tx.update(grads, state, params)
        new = optax.apply_updates(params, updates), new_state
        kept = jax.tree.map(functools.partial(jnp.where, finite), new, (params, state))
        return *kept, scale, finite, value, grads

    params = table.params()
    state = tx.init(params)
    scale = DynamicScale(scale=jnp.float32(2.0**30), fin_steps=jnp.int32(0), growth_interval=3)
    skipped, scales = 0, []
    for i in range(40):
        before, used = (params, state), scale
        params, state, scale, finite, value, grads = step(params, state, scale, table.batch(seed=i))
        scales.append(float(scale.scale))
        if not finite:
            skipped += 1
            chex.assert_trees_all_equal((params, state), before)
            assert scales[-1] == scales[-2] / 2 if skipped > 1 else scales[-1] == 2.0**29
        else:
            assert np.isfinite(float(value))
    chex.assert_tree_all_finite((params, state))
    assert 0 < skipped < 30
    assert int(optax.tree.get(state, "SAMState").step) == 40 - skipped
    assert any(b == 2 * a for a, b in itertools.pairwise(scales))  # Flax's rule: up again.
    if finite:  # The gradients are those of the same scale given by hand.
        value_and_grad = jax.jit(optax_sam.sam_value_and_grad(loss, variant), compiler_options=QUICK)
        _, by_hand = value_and_grad(before[0], table.batch(seed=39), state=before[1], loss_scale=used.scale)
        chex.assert_trees_all_close(grads, by_hand, rtol=1e-3, atol=1e-3)


def test_dynamic_scale_refuses_a_number() -> None:
    with pytest.raises(TypeError, match=r"`dynamic_scale` must be .* got float.*`loss_scale=`"):
        optax_sam.linen.dynamic_scale_value_and_grad(1024.0, table.loss, optax_sam.sam())  # pyright: ignore
