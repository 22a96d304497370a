"""ESAM's selection of examples, `losses.SharpestExamples`: what it selects, where, and at what cost."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import tiers
from flax import nnx
from flax.training.dynamic_scale import DynamicScale
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from timing import flops

import optax_sam

SharpestExamples = optax_sam.losses.SharpestExamples


def tree(flat):
    parts = zip(oracles.SHAPES.items(), oracles.LEAVES, strict=True)
    return {name: jnp.asarray(flat[part]).reshape(shape) for (name, shape), part in parts}


def flat(params):
    return np.concatenate([np.ravel(params[name]) for name in oracles.SHAPES])


def example_losses(params, x):
    """Those whose mean is `oracles.loss`."""
    hidden = jnp.tanh(x @ params["kernel"] + params["bias"])
    residual = params["scale"] * jnp.sum(hidden, axis=1) - jnp.sin(jnp.sum(x, axis=1))
    return residual**2 / 2 + residual**3 / 20


def esam(w, x, *, rho, count):
    """Du et al., algorithm 1 with all weights: descend on the examples whose loss rose most."""
    up = w + rho * oracles.unit(oracles.gradient(w, x))
    rise = [oracles.loss(up, one[None]) - oracles.loss(w, one[None]) for one in x]
    return oracles.gradient(up, x[np.argsort(rise)[-count:]])


def step_of(fraction, **options):
    loss = SharpestExamples(example_losses, fraction)
    sam = optax_sam.sam(0.5)
    return jax.jit(
        functools.partial(optax_sam.sam_value_and_grad(loss, sam, ascent_loss=loss.mean, **options))
    ), sam


COUNTS = {0.01: 1, 0.5: 4, 0.7: 6, 1.0: 8}  # Of eight examples.


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("fraction", tiers.later(COUNTS, [0.5]))
def test_selects_what_rose_most(fraction):
    value_and_grad, sam = step_of(fraction)
    w = oracles.first_params()
    params = tree(w)
    for x in oracles.batches()[:3]:
        value, grads = value_and_grad(params, x, clean_params=params, state=sam.init(params))
        np.testing.assert_allclose(value, oracles.loss(w, x), rtol=1e-12)
        np.testing.assert_allclose(flat(grads.clean), oracles.gradient(w, x), rtol=1e-10)
        np.testing.assert_allclose(
            flat(grads.perturbed), esam(w, x, rho=0.5, count=COUNTS[fraction]), rtol=1e-10
        )


@pytest.mark.full
@pytest.mark.usefixtures("in_float64")
def test_every_shard_selects_its_own():
    w, (x, *_) = oracles.first_params(), oracles.batches()
    params = tree(w)
    expected = np.mean([esam(w, part, rho=0.5, count=2) for part in np.split(x, 2)], axis=0)
    for mode in ("vmap", "loop"):
        value_and_grad, sam = step_of(0.5, num_shards=2, shard_mode=mode, batch_argnums=1)
        _, grads = value_and_grad(params, x, clean_params=params, state=sam.init(params))
        np.testing.assert_allclose(flat(grads.perturbed), expected, rtol=1e-10)


@pytest.mark.full
@pytest.mark.usefixtures("in_float64")
def test_every_device_selects_its_own():
    """Around one perturbation for all, and in microbatches of it."""
    w, (x, *_) = oracles.first_params(), oracles.batches()
    params, up = tree(w), w + 0.5 * oracles.unit(oracles.gradient(w, x))

    def selected(part, count):
        rise = [oracles.loss(up, one[None]) - oracles.loss(w, one[None]) for one in part]
        return oracles.gradient(up, part[np.argsort(rise)[-count:]])

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    value_and_grad, sam = step_of(0.5, axis_name="data")
    state = sam.init(params)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    def on_devices(params, x):
        return value_and_grad(params, x, clean_params=params, state=state)[1].perturbed

    expected = np.mean([selected(part, 2) for part in np.split(x, 2)], axis=0)
    np.testing.assert_allclose(flat(jax.jit(on_devices)(params, x)), expected, rtol=1e-10)
    value_and_grad, _ = step_of(0.5, microbatch_size=2, batch_argnums=1)
    _, grads = value_and_grad(params, x, clean_params=params, state=state)
    # A microbatch takes every fourth example.
    expected = np.mean([selected(x[i::4], 1) for i in range(4)], axis=0)
    np.testing.assert_allclose(flat(grads.perturbed), expected, rtol=1e-10)


def test_e13_the_selection():
    before, after = jnp.array([0.2, 0.9, 0.4, 1.5]), jnp.array([0.5, 1.0, 1.1, 1.6])
    loss = SharpestExamples(lambda t, a, b: a + t * (b - a), 0.5, batch_argnums=(1, 2))
    value, slope = jax.value_and_grad(loss)(1.0, before, after, clean_params=0.0)
    np.testing.assert_allclose((value, slope), ((0.5 + 1.1) / 2, (0.3 + 0.7) / 2), rtol=1e-6)


def linear_losses(model, x):
    return jnp.sum(jax.vmap(model)(x) ** 2, axis=1)


@pytest.mark.parametrize("library", ["equinox", "nnx"])
def test_models(library):
    """Those of Equinox hold functions beside their params; those of NNX must not be given twice."""
    loss, sam, x = SharpestExamples(linear_losses, 0.5), optax_sam.sam(0.1), jnp.asarray(oracles.batches()[0])
    if library == "equinox":
        model = clean = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
        params = eqx.filter(model, eqx.is_inexact_array)
    else:
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        clean, params = nnx.clone(model), nnx.state(model)
    door = getattr(optax_sam, library).sam_value_and_grad(loss, sam, ascent_loss=loss.mean)
    value, grads = door(model, x, clean_params=clean, state=sam.init(params))
    np.testing.assert_allclose(value, jnp.mean(linear_losses(model, x)), rtol=1e-6)

    def at(perturbation):
        moved = jax.tree.map(jnp.add, params, perturbation)
        return eqx.combine(moved, model) if library == "equinox" else nnx.merge(nnx.graphdef(model), moved)

    length = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads.clean)))
    perturbation = jax.tree.map(lambda g: 0.1 * g / length, grads.clean)
    rise = linear_losses(at(perturbation), x) - linear_losses(model, x)
    chosen = x[np.argsort(rise)[-4:]]
    expected = jax.grad(lambda e: jnp.mean(linear_losses(at(e), chosen)))(perturbation)
    for found, own in zip(jax.tree.leaves(grads.perturbed), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, own, rtol=1e-4, atol=1e-6)


def test_random_numbers_are_those_of_one_pass():
    """An `nnx.Rngs` draws the same mask in all passes, and moves once."""
    seen = []

    def losses(model, x, rngs):
        seen.append(jax.random.key_data(rngs.dropout()).tolist())
        return jnp.sum(model(x) ** 2, axis=1)

    loss, sam, x = SharpestExamples(losses, 0.5), optax_sam.sam(0.1), jnp.asarray(oracles.batches()[0])
    model, rngs = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Rngs(0)
    value_and_grad = optax_sam.nnx.sam_value_and_grad(loss, sam, ascent_loss=loss.mean)
    value_and_grad(model, x, rngs, clean_params=nnx.clone(model), state=sam.init(nnx.state(model)))
    assert len(seen) == 4
    assert all(key == seen[0] for key in seen)
    assert rngs.dropout.count[...] == 1


class Counting(eqx.Module):
    linear: eqx.nn.Linear
    index: eqx.nn.StateIndex

    def __init__(self):
        self.linear = eqx.nn.Linear(3, 1, key=jax.random.key(0))
        self.index = eqx.nn.StateIndex(jnp.array(0))

    def __call__(self, x, state):
        return jax.vmap(self.linear)(x)[:, 0], state.set(self.index, state.get(self.index) + 1)


def test_a_state_of_equinox():
    """Which may be used once: each pass has its own."""
    model, before = eqx.nn.make_with_state(Counting)()

    def losses(model, before, x):
        outputs, after = model(x, before)
        return outputs**2, after

    loss, sam = SharpestExamples(losses, 0.5, batch_argnums=2, has_aux=True), optax_sam.sam(0.1)
    door = optax_sam.equinox.sam_value_and_grad(loss, sam, has_aux=True, ascent_loss=loss.mean)
    x, state = jnp.asarray(oracles.batches()[0]), sam.init(eqx.filter(model, eqx.is_inexact_array))
    (_, after), _ = door(model, before, x, clean_params=model, state=state)
    assert after.get(model.index) == 1


@pytest.mark.full
def test_aux_and_keywords():
    """Aux of the clean pass, of all examples; keywords reach the losses."""

    def with_aux(params, x, *, scale):
        losses = scale * example_losses(params, x)
        return losses, {"examples": len(x), "losses": losses}

    loss, sam = SharpestExamples(with_aux, 0.5, has_aux=True), optax_sam.sam(0.1)
    params, x = tree(oracles.first_params()), jnp.asarray(oracles.batches()[0])
    value_and_grad = jax.jit(optax_sam.sam_value_and_grad(loss, sam, ascent_loss=loss.mean, has_aux=True))
    (value, aux), _ = value_and_grad(params, x, clean_params=params, scale=3.0, state=sam.init(params))
    assert aux["examples"] == 8
    np.testing.assert_allclose(aux["losses"], 3 * example_losses(params, x), rtol=1e-5)
    np.testing.assert_allclose(value, jnp.mean(aux["losses"]), rtol=1e-5)


def test_cost():
    """A gradient, a forward pass and a part of a gradient: the losses at params are known already."""
    params = [jnp.ones((64, 256)), jnp.ones((256, 256)), jnp.ones((256, 10))]
    x, y = jnp.ones((512, 64)), jnp.arange(512) % 10

    def losses(params, x, y):
        for w in params[:-1]:
            x = jax.nn.relu(x @ w)
        return optax.losses.softmax_cross_entropy_with_integer_labels(x @ params[-1], y)

    def mean(params, x, y):
        return jnp.mean(losses(params, x, y))

    sam = optax_sam.sam(0.1)
    state = sam.init(params)

    def count(function, *args, **kwargs):
        return flops(jax.jit(function).lower(*args, **kwargs).compile())

    forward, gradient = count(mean, params, x, y), count(jax.grad(mean), params, x, y)
    loss = SharpestExamples(losses, 0.25, batch_argnums=(1, 2))
    value_and_grad = optax_sam.sam_value_and_grad(loss, sam, ascent_loss=loss.mean)

    def step(params, x, y, state):
        return value_and_grad(params, x, y, clean_params=params, state=state)

    total = count(step, params, x, y, state)
    assert 1.25 * gradient + forward <= total <= 1.02 * (1.25 * gradient + forward)


def test_mistakes():
    def scalar(params, x):
        return jnp.mean(example_losses(params, x))

    params, x = tree(oracles.first_params()), jnp.asarray(oracles.batches()[0])
    with pytest.raises(ValueError, match=r"one value for each example, .* shape \(8,\), got \(\)"):
        SharpestExamples(scalar, 0.5)(params, x, clean_params=params)
    for fraction in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"`fraction` must be a number in the range \(0.0, 1.0\]"):
            SharpestExamples(example_losses, fraction)
    with pytest.raises(ValueError, match="`batch_argnums` must be"):
        SharpestExamples(example_losses, 0.5, batch_argnums=0)
    loss, words = (
        SharpestExamples(example_losses, 0.5),
        r"`sam_value_and_grad\(loss, variant, ascent_loss=loss.mean\)`",
    )
    doors = (
        optax_sam.sam_value_and_grad,
        optax_sam.nnx.sam_value_and_grad,
        optax_sam.equinox.sam_value_and_grad,
        functools.partial(optax_sam.linen.dynamic_scale_value_and_grad, DynamicScale()),
    )
    for door in doors:
        for other in (None, loss):
            with pytest.raises(ValueError, match=words):
                door(loss, optax_sam.sam(0.1), ascent_loss=other)
    gated = optax_sam.gated(optax_sam.sam(0.1), optax_sam.gates.every(2))
    with pytest.raises(ValueError, match="a gated variant has steps without one"):
        optax_sam.sam_value_and_grad(loss, gated, ascent_loss=loss.mean)
    with pytest.raises(ValueError, match="`gsam` also descends along it"):
        optax_sam.sam_value_and_grad(loss, optax_sam.gsam(0.1), ascent_loss=loss.mean)
    with pytest.raises(TypeError, match="clean_params"):
        SharpestExamples(example_losses, 0.5)(params, x)
