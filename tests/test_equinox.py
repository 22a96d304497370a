"""Equinox: what `eqx.filter_value_and_grad` differentiates, with the same results, and one more gradient."""

import functools
from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import table
import tiers

import optax_sam

# A door, or a fault of the mechanism, cannot tell two rows with the same capabilities apart.
pytestmark = pytest.mark.by_capability

RHO = 0.1
SAM = optax_sam.sam(RHO)
X = jax.random.normal(jax.random.key(0), (8, 3))
Y = jnp.sin(X @ jnp.array([1.0, -2.0, 0.5]))


def params_of(model: Any) -> Any:
    return eqx.filter(model, eqx.is_inexact_array)


def length(gradient: Any) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))


def displaced(model: Any, gradient: Any, scale: Any) -> Any:
    return eqx.apply_updates(model, jax.tree.map(lambda g: scale * g, gradient))


def fresh(tree: Any) -> Any:
    """A copy: an `eqx.nn.State` can be used once only."""
    return jax.tree.map(lambda x: x, tree)


# One gradient after another: against `eqx.filter_value_and_grad`, and against two passes by hand.


class Block(eqx.Module):
    """Arrays, a function, None, an integer array, statistics and dropout."""

    linear: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    order: jax.Array
    activation: Any
    nothing: Any

    def __init__(self, key: Any, mode: Any = "batch") -> None:
        self.linear = eqx.nn.Linear(3, 3, key=key)
        self.norm = eqx.nn.BatchNorm(3, axis_name="batch", mode=mode)
        self.dropout = eqx.nn.Dropout(0.3)
        self.order = jnp.array([2, 0, 1])
        self.activation, self.nothing = jax.nn.tanh, None

    def __call__(self, x: Any, state: Any, key: Any) -> Any:
        x, state = self.norm(self.activation(self.linear(x[self.order])), state)
        return jnp.sum(self.dropout(x, key=key)), state


class Recurrent(eqx.Module):
    """As in Equinox's example: a cell in a `scan`."""

    cell: eqx.nn.GRUCell
    last: eqx.nn.Linear

    def __init__(self, key: Any) -> None:
        self.cell = eqx.nn.GRUCell(1, 4, key=key)
        self.last = eqx.nn.Linear(4, 1, key=key)

    def __call__(self, x: Any) -> Any:
        hidden, _ = jax.lax.scan(lambda h, x: (self.cell(x[None], h), None), jnp.zeros(4), x)
        return self.last(hidden)[0]


def block(mode: Any) -> Any:
    return eqx.nn.make_with_state(Block)(jax.random.key(1), mode)


def block_loss(model: Any, state: Any, x: Any, y: Any, key: Any) -> Any:
    apply = jax.vmap(model, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))
    output, state = apply(x, state, jax.random.split(key, len(x)))
    return jnp.mean((output - y) ** 2), state


def plain_loss(model: Any, x: Any, y: Any) -> Any:
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


def loss_of_several(models: Any, *, power: int) -> Any:
    first, scales = models
    output = jax.vmap(first)(X)[:, 0] * scales["one"] + scales["label"].count("a")
    return jnp.mean((output - Y) ** power), {"outputs": output, "label": "text", "model": first}


def mlp(out: Any = "scalar") -> Any:
    return eqx.nn.MLP(3, out, width_size=4, depth=1, key=jax.random.key(2))


KEY = jax.random.key(3)
MODELS: dict[str, Any] = {
    "mlp": lambda: ((mlp(), X, Y), {}, plain_loss, False),
    "batch": lambda: ((*block("batch"), X, Y, KEY), {}, block_loss, True),
    "ema": lambda: ((*block("ema"), X, Y, KEY), {}, block_loss, True),
    "rnn": lambda: ((Recurrent(KEY), X, Y), {}, plain_loss, False),
    "several": lambda: (
        ((mlp(1), {"one": np.float32(0.7), "label": "abba"}),), {"power": 2}, loss_of_several, True,
    ),
    "array": lambda: ((jnp.ones(3), X, Y), {}, lambda w, x, y: jnp.mean((x @ w - y) ** 2), False),
}  # fmt: skip


@pytest.mark.parametrize("name", tiers.later(MODELS, ("batch", "several")))
def test_models(name: str) -> None:
    """Value, clean gradient and aux, bit for bit; the perturbed gradient."""
    args, kwargs, fun, has_aux = MODELS[name]()
    ordinary = eqx.filter_value_and_grad(fun, has_aux=has_aux)
    expected, clean = ordinary(*fresh(args), **kwargs)
    value_and_grad = optax_sam.equinox.sam_value_and_grad(fun, SAM, has_aux=has_aux)
    value, grads = value_and_grad(*args, **kwargs, state=SAM.init(params_of(args[0])))
    assert eqx.tree_equal(value, expected)
    assert eqx.tree_equal(grads.clean, clean)
    assert eqx.tree_equal(args, fresh(args))  # Nothing that was passed is used up.
    moved = displaced(args[0], clean, RHO / length(clean))
    _, perturbed = ordinary(moved, *fresh(args[1:]), **kwargs)
    chex.assert_trees_all_close(grads.perturbed, perturbed, rtol=1e-5, atol=1e-6)
    assert length(jax.tree.map(jnp.subtract, clean, perturbed)) > 1e-3


# Steps.


def make(variant: Any = SAM, key: Any = KEY) -> Any:
    model, state = eqx.nn.make_with_state(Block)(key)
    tx = optax.chain(variant, optax.sgd(0.1, momentum=0.9))
    return tx, model, state, tx.init(params_of(model))


def step(tx: Any, variant: Any, model: Any, state: Any, opt_state: Any, key: Any, **options: Any) -> Any:
    value_and_grad = optax_sam.equinox.sam_value_and_grad(block_loss, variant, has_aux=True, **options)
    (value, state), grads = value_and_grad(model, state, X, Y, key, state=opt_state)
    updates, opt_state = tx.update(grads, opt_state, params_of(model))
    return eqx.apply_updates(model, updates), state, opt_state, value


@pytest.mark.full
@pytest.mark.parametrize("row", table.VARIANTS, ids=lambda row: row.name)
def test_variants(row: table.Row) -> None:
    """Every variant, against the plain door with a model that was taken apart by hand."""
    variant, tx = row.optimizer()
    model, state = eqx.nn.make_with_state(Block)(KEY)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params: Any, state: Any) -> Any:
        return block_loss(eqx.combine(params, static), fresh(state), X, Y, KEY)

    opt_state = tx.init(params)
    ordinary = optax_sam.sam_value_and_grad(loss, variant, has_aux=True)
    value_and_grad = optax_sam.equinox.sam_value_and_grad(block_loss, variant, has_aux=True)
    found = value_and_grad(model, state, X, Y, KEY, state=opt_state)
    expected = ordinary(params, state, state=opt_state)
    chex.assert_trees_all_equal(jax.tree.leaves(found), jax.tree.leaves(expected))
    updates, _ = tx.update(found[1], opt_state, params_of(model))
    moved = jax.tree.map(lambda a, b: np.any(a != b), params_of(eqx.apply_updates(model, updates)), params)
    assert any(jax.tree.leaves(moved))


def test_steps_under_filter_jit() -> None:
    """Traced once; statistics and parameters as of two passes by hand; what is no param stays as it is."""
    traces = []

    def counted(*args: Any) -> Any:
        traces.append(1)
        return block_loss(*args)

    tx, model, state, opt_state = make()
    twin, twin_state, momentum = model, fresh(state), None
    value_and_grad = optax_sam.equinox.sam_value_and_grad(counted, SAM, has_aux=True, return_metrics=True)

    @eqx.filter_jit
    def run(model: Any, state: Any, opt_state: Any, key: Any) -> Any:
        (value, state), grads, metrics = value_and_grad(model, state, X, Y, key, state=opt_state)
        updates, opt_state = tx.update(grads, opt_state, params_of(model))
        return eqx.apply_updates(model, updates), state, opt_state, value, metrics

    ordinary = eqx.filter_value_and_grad(block_loss, has_aux=True)
    for i in range(3):
        key = jax.random.key(i)
        model, state, opt_state, value, metrics = run(model, state, opt_state, key)
        (expected, next_state), clean = ordinary(twin, fresh(twin_state), X, Y, key)
        moved = displaced(twin, clean, RHO / length(clean))
        _, perturbed = ordinary(moved, twin_state, X, Y, key)
        momentum = perturbed if i == 0 else jax.tree.map(lambda m, g: 0.9 * m + g, momentum, perturbed)
        twin, twin_state = displaced(twin, momentum, -0.1), next_state
        np.testing.assert_allclose(value, expected, rtol=1e-4)
        np.testing.assert_allclose(metrics.perturbation_norm, RHO, rtol=1e-4)
    assert len(traces) == 1
    chex.assert_trees_all_close(params_of(model), params_of(twin), rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(jax.tree.leaves(state), jax.tree.leaves(twin_state), rtol=1e-4, atol=1e-5)
    assert model.activation is jax.nn.tanh
    assert model.order.tolist() == [2, 0, 1]


def test_inference_mode() -> None:
    """The flags of the model are what the loss sees: no dropout, and statistics that stay."""
    tx, model, state, opt_state = make()
    _, state, *_ = step(tx, SAM, model, state, opt_state, KEY)
    quiet = eqx.nn.inference_mode(model)
    before = fresh(state)
    results = [step(tx, SAM, quiet, fresh(state), opt_state, jax.random.key(i)) for i in range(2)]
    chex.assert_trees_all_equal(params_of(results[0][0]), params_of(results[1][0]))
    assert eqx.tree_equal(results[0][1], before)
    assert results[0][0].dropout.inference


BOTH = {"num_shards": 2, "microbatch_size": 2}


@pytest.mark.parametrize("mode", tiers.later(["batch", "ema"], ["batch"]))
@pytest.mark.parametrize("options", tiers.later([{"num_shards": 2}, {"microbatch_size": 2}, BOTH], [BOTH]))
def test_in_parts(mode: Any, options: Any) -> None:
    """The statistics are averaged over the parts; counters and flags move as in one pass."""
    model, state = block(mode)
    keys = jax.random.split(KEY, 8)

    def loss(model: Any, state: Any, x: Any, y: Any, keys: Any) -> Any:
        apply = jax.vmap(model, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))
        output, state = apply(x, state, keys)
        return jnp.mean((output - y) ** 2), {"state": state, "seen": len(x)}

    value_and_grad = optax_sam.equinox.sam_value_and_grad(
        loss, SAM, has_aux=True, batch_argnums=(2, 3, 4), **options
    )
    opt_state = SAM.init(params_of(model))
    (value, aux), _ = eqx.filter_jit(value_and_grad)(model, fresh(state), X, Y, keys, state=opt_state)
    # A shard holds neighbours; a microbatch takes every so-many-th example of a shard.
    shards, size = (
        options.get("num_shards", 1),
        options.get("microbatch_size", 8 // options.get("num_shards", 1)),
    )
    number = 8 // size
    order = jnp.arange(8).reshape(shards, size, -1).transpose(0, 2, 1).ravel()
    parts = [x[order].reshape(number, size, *x.shape[1:]) for x in (X, Y, keys)]
    alone = [loss(model, fresh(state), *(x[i] for x in parts)) for i in range(number)]
    np.testing.assert_allclose(value, np.mean([v for v, _ in alone]), rtol=1e-5)
    assert aux["seen"] == 8
    for found, *expected in zip(
        *map(jax.tree.leaves, (aux["state"], *(a["state"] for _, a in alone))), strict=True
    ):
        assert found.dtype == expected[0].dtype
        np.testing.assert_allclose(found, np.mean(expected, axis=0), rtol=1e-5, atol=1e-6)


def test_in_parts_refuses_what_it_cannot_count() -> None:
    index = eqx.nn.StateIndex(jnp.zeros(2, jnp.uint32))
    state = eqx.nn.State((index,))

    def loss(w: Any, state: Any, x: Any) -> Any:
        return jnp.mean(x @ w), state.set(index, state.get(index) + 1)

    value_and_grad = optax_sam.equinox.sam_value_and_grad(
        loss, SAM, has_aux=True, num_shards=2, batch_argnums=2
    )
    with pytest.raises(
        TypeError, match=r"signed integers and booleans move as in one pass.*got dtype uint32"
    ):
        value_and_grad(jnp.ones(3), state, X, state=SAM.init(jnp.ones(3)))


class Counting(eqx.Module):
    """A model with a counter of some shape and dtype."""

    w: jax.Array
    index: eqx.nn.StateIndex

    def __init__(self, shape: Any, dtype: Any = jnp.int32) -> None:
        self.w, self.index = jnp.ones(3), eqx.nn.StateIndex(jnp.zeros(shape, dtype))

    def __call__(self, x: Any, state: Any, step: int) -> Any:
        return x @ self.w, state.set(self.index, state.get(self.index) + step)


def test_in_parts_several_models_of_one_class() -> None:
    """Their states have the same keys."""

    def loss(models: Any, states: Any, x: Any) -> Any:
        outputs = [m(x, s, i + 1) for i, (m, s) in enumerate(zip(models, states, strict=True))]
        return jnp.mean(sum(y for y, _ in outputs) ** 2), [s for _, s in outputs]

    value_and_grad = optax_sam.equinox.sam_value_and_grad(
        loss, SAM, has_aux=True, num_shards=2, batch_argnums=2
    )
    made = eqx.nn.make_with_state(Counting)
    models, states = zip(made(()), made(4), made(4), strict=True)
    states = (*states[:2], states[2].set(models[2].index, jnp.arange(4)))
    (_, after), _ = value_and_grad(models, states, X, state=SAM.init(params_of(models)))
    counts = [s.get(m.index).tolist() for m, s in zip(models, after, strict=True)]
    assert counts == [1, [2] * 4, [3, 4, 5, 6]]
    models, states = zip(made(4), made(4, jnp.int16), strict=True)
    with pytest.raises(TypeError, match=r"must have the same dtypes, got .*int32.* and .*int16"):
        value_and_grad(models, states, X, state=SAM.init(params_of(models)))


@pytest.mark.full
def test_an_ensemble_under_filter_vmap() -> None:
    """Several models at once, each with an optimizer of its own, as if it were alone."""
    keys = jax.random.split(KEY, 2)
    looksam = optax_sam.looksam(RHO, k=2)

    def train(key: Any) -> Any:
        tx, model, state, opt_state = make(looksam, key)
        for i in range(2):
            model, state, opt_state, value = step(tx, looksam, model, state, opt_state, jax.random.key(i))
        return params_of(model), value

    together = eqx.filter_jit(eqx.filter_vmap(train))(keys)
    for i, key in enumerate(keys):
        alone = train(key)
        found = jax.tree.map(lambda x, i=i: x[i], together)
        chex.assert_trees_all_close(found, alone, rtol=1e-4, atol=1e-5)


def test_parallel_training_with_filter_shard() -> None:
    """As in Equinox's example of parallelism: the batch over devices, the model on all of them."""
    mesh = jax.make_mesh((4,), ("batch",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    over_batch = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    tx = optax.chain(SAM, optax.sgd(0.1))

    @eqx.filter_jit(donate="all")
    def run(model: Any, opt_state: Any, x: Any, y: Any, place: Any) -> Any:
        if place:
            model, opt_state = eqx.filter_shard((model, opt_state), everywhere)
            x, y = eqx.filter_shard((x, y), over_batch)
        value, grads = optax_sam.equinox.sam_value_and_grad(plain_loss, SAM)(model, x, y, state=opt_state)
        updates, opt_state = tx.update(grads, opt_state, params_of(model))
        model = eqx.apply_updates(model, updates)
        return eqx.filter_shard((model, opt_state), everywhere) if place else (model, opt_state), value

    results = []
    for place in (True, False):
        both = mlp(), tx.init(params_of(mlp()))
        x, y = X + 0.0, Y + 0.0
        if place:
            both, (x, y) = eqx.filter_shard(both, everywhere), eqx.filter_shard((x, y), over_batch)
        both, value = run(*both, x, y, place)
        results.append((value, params_of(both[0])))
    chex.assert_trees_all_close(*jax.device_get(results), rtol=1e-5, atol=1e-6)


def test_options() -> None:
    """Another loss for the ascent, a network that shows its outputs, a scale."""
    model = mlp()
    state = SAM.init(params_of(model))

    def other(model: Any, x: Any, y: Any) -> Any:
        return 3.0 * plain_loss(model, x, y + 1.0)

    value_and_grad = optax_sam.equinox.sam_value_and_grad(plain_loss, SAM, ascent_loss=other)
    value, grads = value_and_grad(model, X, Y, state=state, loss_scale=8.0)
    expected, clean = eqx.filter_value_and_grad(other)(model, X, Y)
    chex.assert_trees_all_close((value, grads.clean), (expected, clean), rtol=1e-6)
    moved = displaced(model, clean, RHO / length(clean))
    perturbed = eqx.filter_grad(plain_loss)(moved, X, Y)
    chex.assert_trees_all_close(grads.perturbed, perturbed, rtol=1e-4, atol=1e-6)

    composite = optax_sam.CompositeLoss(
        lambda model, x: jax.vmap(model)(x), lambda z, y: jnp.mean((z - y) ** 2)
    )
    _, grads = optax_sam.equinox.sam_value_and_grad(composite, SAM)(model, X, Y, state=state)
    chex.assert_trees_all_close(grads.clean, eqx.filter_grad(plain_loss)(model, X, Y), rtol=1e-6)


# What people write by habit.


def test_habits_get_a_message() -> None:
    model, state = block("batch")
    tx = optax.chain(SAM, optax.sgd(0.1))
    opt_state = tx.init(params_of(model))
    value_and_grad = optax_sam.equinox.sam_value_and_grad(block_loss, SAM, has_aux=True)
    _, grads = value_and_grad(model, state, X, Y, KEY, state=opt_state)
    of_model = (
        r"of an Equinox model pass .*`eqx\.filter\(model, eqx\.is_inexact_array\)`, to `init` and `update`"
    )
    whole = r"got 'batch' of type str at \.norm\.axis_name: " + of_model
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: tx.init(model), TypeError, whole),
        (lambda: tx.update(grads, opt_state, model), TypeError, whole),
        (lambda: tx.init(eqx.filter(model, eqx.is_array)), TypeError, r"dtype int32 at \.order: " + of_model),
        (
            lambda: optax_sam.sam_value_and_grad(block_loss, SAM, has_aux=True)(
                model, state, X, Y, KEY, state=opt_state
            ),
            TypeError,
            whole + ".*evaluate it by `optax_sam.equinox.sam_value_and_grad`",
        ),
        (
            lambda: optax_sam.equinox.sam_value_and_grad(eqx.filter_value_and_grad(plain_loss), SAM),
            TypeError,
            r"`fun` must be the loss, got `eqx\.filter_value_and_grad\(loss\)`\. Write",
        ),
        (
            lambda: optax_sam.equinox.sam_value_and_grad(eqx.filter_grad(plain_loss), SAM),
            TypeError,
            r"got `eqx\.filter_grad\(loss\)`\. Write `optax_sam\.equinox",
        ),
        (
            lambda: optax_sam.equinox.sam_value_and_grad(jax.value_and_grad(jnp.sum), SAM)(
                jnp.ones(3), state=opt_state
            ),
            TypeError,
            r"must return a scalar, got a tuple.*`has_aux=True`.*pass `loss` itself",
        ),
        (lambda: value_and_grad(model=model, state=opt_state), TypeError, "pass the model by position"),
        (lambda: value_and_grad(model, state, X, Y, KEY), TypeError, "`state=` is missing"),
        (
            lambda: value_and_grad(jnp.tanh, state=opt_state),
            TypeError,
            "must hold floating-point arrays, got",
        ),
        (
            lambda: optax_sam.equinox.sam_value_and_grad(plain_loss, SAM, argnums=0),  # pyright: ignore
            ValueError,
            "`argnums` has no place here: as in Equinox the first argument is differentiated",
        ),
        (
            lambda: optax_sam.equinox.sam_value_and_grad(plain_loss, tx),  # pyright: ignore
            TypeError,
            "`variant` must be the bare variant",
        ),
        (
            # The loss has an argument `state`, which here is passed by keyword.
            lambda: value_and_grad(model, x=X, y=Y, key=KEY, state=opt_state),
            TypeError,
            "The loss has an argument `state` of its own",
        ),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()


def test_habits_that_work() -> None:
    """`update` without params, `eqx.is_array` where all arrays are floating-point, a decorated loss."""
    model = mlp()
    tx = optax.chain(SAM, optax.sgd(0.1))
    opt_state = tx.init(eqx.filter(model, eqx.is_array))

    @functools.partial(optax_sam.equinox.sam_value_and_grad, variant=SAM)
    def loss(model: Any, x: Any, y: Any) -> Any:
        return plain_loss(model, x, y)

    _, grads = loss(model, X, Y, state=opt_state)
    updates, _ = tx.update(grads, opt_state)
    after = eqx.apply_updates(model, updates)
    expected = jax.tree.map(lambda w, g: w - 0.1 * g, params_of(model), grads.perturbed)
    chex.assert_trees_all_close(params_of(after), expected, rtol=1e-6)


def test_a_loss_with_its_own_scale_bound() -> None:
    def scaled(model: Any, x: Any, y: Any, loss_scale: float = 1.0) -> Any:
        return loss_scale * plain_loss(model, x, y)

    model = mlp()
    opt_state = SAM.init(params_of(model))
    with pytest.raises(TypeError, match=r"argument `loss_scale` of its own.*`functools\.partial\(loss, loss"):
        optax_sam.equinox.sam_value_and_grad(scaled, SAM)(model, X, Y, state=opt_state, loss_scale=4.0)
    bound = functools.partial(scaled, loss_scale=2.0)
    value, _ = optax_sam.equinox.sam_value_and_grad(bound, SAM)(model, X, Y, state=opt_state, loss_scale=4.0)
    np.testing.assert_allclose(value, 2 * plain_loss(model, X, Y), rtol=1e-6)
