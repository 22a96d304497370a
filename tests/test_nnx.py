"""Flax NNX: what `nnx.value_and_grad` differentiates, with the same results, and one more gradient."""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import table
import tiers
from flax import nnx

import optax_sam

# A door, or a fault of the mechanism, cannot tell two rows with the same capabilities apart.
pytestmark = pytest.mark.by_capability

every_variant = pytest.mark.parametrize("row", table.VARIANTS, ids=lambda row: row.name)

RHO = 0.1
SAM = optax_sam.sam(RHO)
X = jax.random.normal(jax.random.key(0), (16, 3))
Y = jnp.sin(X @ jnp.array([1.0, -2.0, 0.5]))
P = jax.sharding.PartitionSpec
as_pure = nnx.as_pure if hasattr(nnx, "as_pure") else nnx.pure  # As older versions of Flax call it.


# One gradient after another: against `nnx.value_and_grad`, and against two passes by hand.


class Block(nnx.Module):
    """A layer with statistics and dropout."""

    def __init__(self, size: int, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(size, size, rngs=rngs)
        self.norm = nnx.BatchNorm(size, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.dropout(nnx.tanh(self.norm(self.linear(x))))


class Opaque(nnx.Module, pytree=False):
    """A module that JAX takes for a leaf, with a plain array, a plain attribute and an ordinary module."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.block = Block(3, rngs)
        self.calls = 0
        self.total = jnp.zeros(())

    def __call__(self, x: Any) -> Any:
        self.calls += 1
        y = self.block(x)
        self.total = self.total + jnp.sum(y)
        return y


class Counter(nnx.Module, pytree=False):
    """A second argument that JAX takes for a leaf."""

    def __init__(self) -> None:
        self.count = nnx.Variable(jnp.int32(0))

    def __call__(self) -> None:
        self.count[...] += 1


class Arrays(nnx.Module):
    """Params that are plain arrays."""

    def __init__(self) -> None:
        self.w = jnp.array([[0.5], [-1.0], [2.0]])
        self.b = jnp.array([0.1])
        self.steps = jnp.int32(0)

    def __call__(self, x: Any) -> Any:
        self.steps += 1
        return x @ self.w + self.b


class Stack(nnx.Module):
    """Layers that were made by `nnx.vmap` and run by `nnx.scan`."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=2)
        @nnx.vmap(axis_size=2)
        def make(rngs: nnx.Rngs) -> Block:
            return Block(3, rngs)

        self.blocks = make(rngs)

    def __call__(self, x: Any) -> Any:
        @nnx.scan
        def run(x: Any, block: Block) -> tuple[Any, None]:
            return block(x), None

        return run(x, self.blocks)[0]


class Tied(nnx.Module):
    """An autoencoder whose decoder is its encoder, transposed, and which knows itself."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.encoder = nnx.Linear(3, 2, rngs=rngs)
        self.decoder = nnx.List([self.encoder])
        self.me = self

    def __call__(self, x: Any) -> Any:
        return self.me.encoder(x) @ self.decoder[0].kernel.T


class Growing(nnx.Module):
    """The loss makes a module, a variable and an attribute of it, and deletes another."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(3, 3, rngs=rngs)
        self.old = nnx.Variable(jnp.ones(2))

    def __call__(self, x: Any) -> Any:
        y = self.linear(x)
        self.outputs = nnx.Intermediate(y)
        self.mean = nnx.BatchStat(jnp.mean(y))
        self.child = nnx.Linear(3, 1, rngs=nnx.Rngs(5))
        self.label = "seen"
        del self.old
        return y


class Rematerialised(nnx.Module):
    """A layer with statistics whose activations are computed anew in the backward pass."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.block = Block(3, rngs)

    def __call__(self, x: Any) -> Any:
        return nnx.remat(lambda block, x: block(x))(self.block, x)


class OfLinen(nnx.Module):
    """A layer of Linen with statistics, behind Flax's bridge."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        layer = nn.BatchNorm(use_running_average=False)
        self.layer: Any = nnx.bridge.ToNNX(layer, rngs=rngs).lazy_init(X)

    def __call__(self, x: Any) -> Any:
        return self.layer(x, mutable=["batch_stats"])


class Clipped(nnx.Module):
    """Changes its own param in the loss."""

    def __init__(self) -> None:
        self.w = nnx.Param(jnp.array([[3.0], [-4.0], [1.0]]))

    def __call__(self, x: Any) -> Any:
        y = x @ self.w
        self.w[...] = jnp.clip(self.w[...], -2.0, 2.0)
        return y


def block() -> Block:
    return Block(3, nnx.Rngs(0))


def adapted() -> Any:
    """A model in which an adapter is put around a layer."""
    model: Any = block()
    model.linear = nnx.LoRA(
        3, 2, 3, base_module=model.linear, b_initializer=nnx.initializers.ones, rngs=nnx.Rngs(1)
    )
    return (model,)


def loss(model: Any, *rest: Any) -> Any:
    for x in rest:
        x()
    return jnp.mean((model(X) - Y[:, None]) ** 2)


def loss_of_state(state: Any) -> Any:
    return jnp.mean((X @ state["kernel"] + state["bias"] - Y[:, None]) ** 2)


def loss_of_several(one: Any, rngs: Any, two: Any) -> Any:
    hidden = one["model"](X) * one["scale"]
    keep = jax.random.bernoulli(rngs(), 0.8, hidden.shape)
    aux = {"keep": keep.mean(), "model": two[0], "text": "text"}
    return jnp.mean((two[1](two[0](hidden * keep))[:, 0] - Y) ** 2), aux


SIZES = ("kernel", (3, 1)), ("bias", (1,))


def several() -> Any:
    """Objects in containers, an array among them, and a second argument with state."""
    rngs = nnx.Rngs(3)
    layers = [nnx.Linear(3, 2, rngs=rngs), nnx.Linear(2, 1, rngs=rngs)]
    return {"model": Block(3, rngs), "scale": jnp.float32(0.7)}, nnx.Rngs(4), layers


def one(make: Callable[[], Any]) -> Callable[[], tuple[Any]]:
    return lambda: (make(),)


MODELS: dict[str, tuple[Callable[[], Any], Any, Any, bool]] = {
    "block": (one(block), loss, 0, False),
    "no_pytree": (lambda: (Opaque(nnx.Rngs(0)), Counter()), loss, 0, False),
    "counter": (lambda: (block(), Counter()), loss, 0, False),
    "arrays": (one(Arrays), loss, nnx.DiffState(0, lambda path, _: path[-1] in ("w", "b")), False),
    "lifted": (lambda: (Stack(nnx.Rngs(0)),), loss, 0, False),
    "rematerialised": (lambda: (Rematerialised(nnx.Rngs(0)),), loss, 0, False),
    "of_linen": (lambda: (OfLinen(nnx.Rngs(0)),), loss, 0, False),
    "tied": (lambda: (Tied(nnx.Rngs(0)),), loss, 0, False),
    "growing": (lambda: (Growing(nnx.Rngs(0)),), loss, 0, False),
    "clipped": (one(Clipped), loss, 0, False),
    "a_part": (one(block), loss, nnx.DiffState(0, nnx.PathContains("linear")), False),
    "adapter": (adapted, loss, nnx.DiffState(0, nnx.LoRAParam), False),
    "last": (one(lambda: nnx.Linear(3, 1, rngs=nnx.Rngs(0))), loss, -1, False),
    "state": (one(lambda: nnx.state(nnx.Linear(3, 1, rngs=nnx.Rngs(0)))), loss_of_state, 0, False),
    "variables": (one(lambda: {k: nnx.Variable(jnp.ones(n)) for k, n in SIZES}), loss_of_state, 0, False),
    "several": (several, loss_of_several, (0, 2), True),
    "array": (one(lambda: jnp.array([0.5, -1.0, 2.0])), lambda w: jnp.mean((X @ w - Y) ** 2), 0, False),
}


def split(objects: Any) -> Any:
    graph, state = nnx.split(objects)
    return graph, nnx.to_pure_dict(state)


def displaced(arg: Any, gradient: Any, scale: Any) -> Any:
    """An argument that went along its gradient; objects go themselves."""
    if isinstance(arg, dict):
        return {key: displaced(x, gradient[key], scale) for key, x in arg.items()}
    if isinstance(arg, list):
        return [displaced(*pair, scale) for pair in zip(arg, gradient, strict=True)]
    if isinstance(arg, jax.Array | nnx.State | nnx.Variable):
        return jax.tree.map(lambda w, g: w + scale * g, arg, gradient)
    old = dict(nnx.to_flat_state(nnx.state(arg)))
    moved = [
        (at, jax.tree.map(lambda w, g: w + scale * g, old[at], g)) for at, g in nnx.to_flat_state(gradient)
    ]
    nnx.update(arg, nnx.from_flat_state(moved))
    return arg


def length(gradient: Any) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))


@pytest.mark.parametrize("name", tiers.later(MODELS, ("block", "no_pytree", "a_part", "several", "array")))
def test_models(name: str) -> None:
    """Value, clean gradient, aux and all that the loss changed, bit for bit; the perturbed gradient."""
    make, fun, argnums, has_aux = MODELS[name]
    sharp, plain, moved = make(), make(), list(make())
    ordinary = nnx.value_and_grad(fun, argnums=argnums, has_aux=has_aux)
    expected, clean = ordinary(*plain)
    value_and_grad = optax_sam.nnx.sam_value_and_grad(fun, SAM, argnums, has_aux)
    value, grads = value_and_grad(*sharp, state=SAM.init(clean))
    if has_aux:
        (value, aux), (expected, expected_aux) = value, expected
        sharp, plain = (*sharp, aux), (*plain, expected_aux)  # Which hold objects of the arguments.
    chex.assert_trees_all_equal(value, expected)
    chex.assert_trees_all_equal(grads.clean, clean)
    (graph, after), (expected_graph, expected_after) = split(sharp), split(plain)
    assert graph == expected_graph
    chex.assert_trees_all_equal(after, expected_after)

    gradients = zip(argnums, clean, strict=True) if has_aux else ((0, clean),)
    for i, gradient in gradients:
        moved[i] = displaced(moved[i], gradient, RHO / length(clean))
    _, perturbed = ordinary(*moved)
    chex.assert_trees_all_close(grads.perturbed, perturbed, rtol=1e-5, atol=1e-6)
    assert length(jax.tree.map(jnp.subtract, clean, perturbed)) > 1e-3


# Steps.


def mean_loss(model: Any, x: Any, y: Any) -> Any:
    return jnp.mean((model(x)[:, 0] - y) ** 2)


def step(model: Any, optimizer: Any, x: Any, y: Any, **options: Any) -> Any:
    value, grads = optax_sam.nnx.sam_value_and_grad(mean_loss, SAM, **options)(model, x, y, state=optimizer)
    optimizer.update(model, grads)
    return value


def step_by_hand(model: Any, x: Any, y: Any) -> Any:
    twin = nnx.clone(model)  # Before the first pass, for the same dropout masks.
    value, clean = nnx.value_and_grad(mean_loss)(model, x, y)
    perturbed = nnx.grad(mean_loss)(displaced(twin, clean, RHO / length(clean)), x, y)
    displaced(model, perturbed, -0.1)
    return value


def make(seed: Any = 0) -> Any:
    model = Block(3, nnx.Rngs(seed))
    return model, nnx.Optimizer(model, optax.chain(SAM, optax.sgd(0.1)), wrt=nnx.Param)


def all_of(model: Any) -> Any:
    return nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey)))


def assert_same(model: Any, other: Any) -> None:
    chex.assert_trees_all_close(all_of(model), all_of(other), rtol=1e-5, atol=1e-6)


LATER = (
    ["tree", "no_graph_updates"] if hasattr(nnx, "set_graph_updates") else []
)  # In later versions of Flax.


@pytest.mark.parametrize("mode", ["eager", "jit", *LATER])
def test_steps(mode: str) -> None:
    """Two whole steps, in all modes of Flax, are those of two passes by hand."""
    expected, _ = make()
    values = [step_by_hand(expected, X, Y) for _ in range(2)]
    settings = {
        "tree": lambda: nnx.set_graph_mode(False),
        "no_graph_updates": lambda: nnx.set_graph_updates(False),
    }
    with settings.get(mode, contextlib.nullcontext)():
        model, optimizer = make()
        run = step if mode == "eager" else nnx.jit(step)
        np.testing.assert_allclose([run(model, optimizer, X, Y) for _ in range(2)], values, rtol=1e-5)
    assert_same(model, expected)
    assert model.dropout.rngs.count[...] == 2


def test_scan_over_steps() -> None:
    expected, optimizer = make()
    batches = X.reshape(4, 4, 3), Y.reshape(4, 4)
    values = [step(expected, optimizer, *batch) for batch in zip(*batches, strict=True)]

    @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=(nnx.Carry, 0))
    def run(both: Any, x: Any, y: Any) -> Any:
        return both, step(*both, x, y)

    both = make()
    np.testing.assert_allclose(run(both, *batches)[1], values, rtol=1e-5)
    assert_same(both[0], expected)


def test_vmap_over_steps() -> None:
    """Two models at once, each with an optimizer of its own."""
    keys = jax.random.split(jax.random.key(2), 2)
    models, optimizers = nnx.vmap(make)(keys)
    run: Any = nnx.vmap(step, in_axes=(0, 0, None, None))
    values = run(models, optimizers, X, Y)
    for i, key in enumerate(keys):
        model, optimizer = make(key)
        np.testing.assert_allclose(values[i], step(model, optimizer, X, Y), rtol=1e-5)
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], all_of(models)), all_of(model), rtol=1e-5, atol=1e-6
        )


def test_shard_map_over_steps() -> None:
    """A batch over two devices: the step of the whole batch; counters move once."""

    def make() -> Any:
        rngs = nnx.Rngs(0)
        model: Any = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), jnp.tanh, nnx.Linear(4, 1, rngs=rngs))
        model.count = nnx.Variable(jnp.int32(0))
        return model, nnx.Optimizer(model, optax.chain(SAM, optax.sgd(0.1)), wrt=nnx.Param)

    def counted(model: Any, x: Any, y: Any) -> Any:
        model.count[...] += 1
        return mean_loss(model, x, y)

    def step(model: Any, optimizer: Any, x: Any, y: Any, axis_name: Any = None) -> Any:
        value_and_grad = optax_sam.nnx.sam_value_and_grad(counted, SAM, axis_name=axis_name)
        value, grads = value_and_grad(model, x, y, state=optimizer)
        optimizer.update(model, grads)
        return value

    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    specs = P(), P(), P("data"), P("data")
    over_devices = functools.partial(step, axis_name="data")
    (model, optimizer), expected = make(), make()
    value = nnx.jit(nnx.shard_map(over_devices, mesh=mesh, in_specs=specs, out_specs=P()))(
        model, optimizer, X, Y
    )
    np.testing.assert_allclose(value, step(*expected, X, Y), rtol=1e-5)
    assert_same(model, expected[0])


def test_traces_once() -> None:
    traces = []

    def loss(model: Any, x: Any, y: Any, rngs: Any) -> Any:
        traces.append(1)
        return nnx_loss(model, x, y, rngs=rngs)

    sam = optax_sam.sam(0.1, steps=3)
    model, rngs = Model(nnx.Rngs(0)), nnx.Rngs(1)
    optimizer = nnx.Optimizer(model, optax.chain(sam, optax.sgd(0.1)), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, rngs: Any) -> Any:
        value, grads = optax_sam.nnx.sam_value_and_grad(loss, sam)(model, X, Y, rngs, state=optimizer)
        optimizer.update(model, grads)
        return value

    for _ in range(3):
        step(model, optimizer, rngs)
    assert len(traces) == 1


# Models with state that the loss is given.


class Model(nnx.Module):
    """A network with all kinds of state."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)
        self.head = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x: Any, rngs: nnx.Rngs) -> Any:
        return self.head(self.dropout(nnx.tanh(self.norm(self.linear(x))), rngs=rngs))[:, 0]


def nnx_loss(model: Any, x: Any, y: Any, *, rngs: Any, scale: str = "") -> Any:
    assert scale in ("", "static")
    return jnp.mean((model(x, rngs) - y) ** 2)


@every_variant
def test_variants(row: table.Row) -> None:
    """Every variant, eagerly, by both forms of the update, against the plain-pytree door."""
    variant, tx = row.optimizer()
    models = [Model(nnx.Rngs(0)) for _ in range(2)]
    optimizers = [nnx.Optimizer(model, tx, wrt=nnx.Param) for model in models]
    rngs = [nnx.Rngs(dropout=7) for _ in range(3)]
    value_and_grad = optax_sam.nnx.sam_value_and_grad(nnx_loss, variant)

    reference = Model(nnx.Rngs(0))
    graph, params, rest = nnx.split(reference, nnx.Param, ...)
    state = tx.init(params)

    def pure(params: Any, rest: Any, rngs: Any) -> Any:
        model = nnx.merge(graph, params, rest, copy=True)
        return nnx_loss(model, X, Y, rngs=rngs), nnx.state(model, nnx.Not(nnx.Param))

    for _ in range(2):
        before = nnx.clone(rngs[2])
        (expected, rest), pair = optax_sam.sam_value_and_grad(
            lambda p, r, before=before: pure(p, r, nnx.clone(before)), variant, has_aux=True
        )(params, rest, state=state)
        updates, state = tx.update(pair, state, params)
        params = optax.apply_updates(params, updates)
        rngs[2].dropout()  # One pass draws one key.
        for i in (0, 1):
            value, grads = value_and_grad(models[i], X, Y, rngs=rngs[i], scale="static", state=optimizers[i])
            chex.assert_trees_all_equal(value, expected)
            if i == 0:
                optimizers[i].update(models[i], grads)
            else:
                optimizers[i].update(
                    models[i], grads.perturbed, clean_updates=grads.clean, statistics=grads.statistics
                )
            chex.assert_trees_all_equal(nnx.state(models[i], nnx.Not(nnx.Param)), rest)
            chex.assert_trees_all_equal(nnx.state(rngs[i]), nnx.state(rngs[2]))
            chex.assert_trees_all_close(nnx.state(models[i], nnx.Param), params, rtol=1e-5, atol=1e-6)


def test_a_gate_decides_once_with_shards() -> None:
    """By the mean of the shards' squared norms, and not again by that of the mean gradient."""
    variant = optax_sam.ae_sam(0.1)
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(variant, optax.sgd(0.1)), wrt=nnx.Param)
    squares = []
    for half in (X[:8], X[8:]):
        gradient = nnx.grad(lambda model, x: jnp.mean(model(x) ** 2))(model, half)
        squares.append(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradient)))
    value_and_grad = optax_sam.nnx.sam_value_and_grad(
        lambda model, x: jnp.mean(model(x) ** 2), variant, num_shards=2, batch_argnums=1
    )
    _, grads = value_and_grad(model, X, state=optimizer)
    optimizer.update(model, grads)
    memory = optimizer.opt_state[0].memory
    np.testing.assert_allclose(memory.gate.mean[...], 0.1 * np.mean(squares), rtol=1e-5)
    assert memory.open_steps[...] == 1


def test_trains_a_part() -> None:
    """What the optimizer trains is what is perturbed: here the head; the rest is not differentiated."""
    sam = optax_sam.looksam(0.1, k=2)  # Has a memory, which must fit.
    head = nnx.All(nnx.Param, nnx.PathContains("head"))
    results = []
    for argnums in (0, nnx.DiffState(0, head)):
        model, rngs = Model(nnx.Rngs(0)), nnx.Rngs(1)
        optimizer = nnx.Optimizer(model, optax.chain(sam, optax.sgd(0.1)), wrt=head)
        frozen = jax.tree.map(jnp.copy, nnx.state(model.linear))
        state = optimizer if argnums == 0 else optimizer.opt_state
        value_and_grad = optax_sam.nnx.sam_value_and_grad(nnx_loss, sam, argnums)
        for _ in range(2):
            _, grads = value_and_grad(model, X, Y, rngs=rngs, state=state)
            optimizer.update(model, grads)
        assert list(grads.clean) == ["head"]
        chex.assert_trees_all_equal(nnx.state(model.linear), frozen)
        results.append(nnx.state(model))
    chex.assert_trees_all_equal(*results)


def test_trains_a_part_of_several_models() -> None:
    """The filter of the optimizer sees the path from the root, as in `nnx.state(models, filter)`."""
    models = {"one": nnx.Linear(3, 2, rngs=nnx.Rngs(0)), "two": nnx.Linear(2, 1, rngs=nnx.Rngs(1))}
    optimizer = nnx.Optimizer(models, SAM, wrt=lambda path, _: path[0] == "two")

    def loss(models: Any) -> Any:
        return mean_loss(lambda x: models["two"](nnx.tanh(models["one"](x))), X, Y)

    _, grads = optax_sam.nnx.sam_value_and_grad(loss, SAM)(models, state=optimizer)
    clean = nnx.grad(loss)(models)
    assert not jax.tree.leaves(grads.clean["one"])
    chex.assert_trees_all_close(grads.clean["two"], clean["two"], rtol=1e-6)
    displaced(models["two"], clean["two"], RHO / length(clean["two"]))
    chex.assert_trees_all_close(grads.perturbed["two"], nnx.grad(loss)(models)["two"], rtol=1e-5)


def test_optimizer_of_plain_arrays() -> None:
    """Its filter chooses them by their names, and its update moves them."""
    model, twin = Arrays(), Arrays()

    def wrt(path: Any, _: Any) -> bool:
        return path[-1] in ("w", "b")

    optimizer = nnx.Optimizer(model, optax.chain(SAM, optax.sgd(0.1)), wrt=wrt)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> None:
        optimizer.update(model, optax_sam.nnx.sam_value_and_grad(loss, SAM)(model, state=optimizer)[1])

    step(model, optimizer)
    gradient = nnx.grad(loss, argnums=nnx.DiffState(0, wrt))
    clean = gradient(twin)
    perturbed = gradient(displaced(Arrays(), clean, RHO / length(clean)))
    displaced(twin, perturbed, -0.1)
    chex.assert_trees_all_close((model.w, model.b, model.steps), (twin.w, twin.b, twin.steps), rtol=1e-6)


@pytest.mark.parametrize(
    "options", [{"num_shards": 4}, {"microbatch_size": 4}, {"num_shards": 2, "microbatch_size": 4}]
)
def test_in_parts(options: Any) -> None:
    """Shards and microbatches: statistics are averaged over the parts, counters move once."""
    sam = optax_sam.sam(0.1)
    model: Any = Model(nnx.Rngs(0))
    rngs = nnx.Rngs(dropout=7, unused=8)
    rngs.dropout.count[...] = rngs.unused.count[...] = start = jnp.uint32(2**31)  # Four times that is zero.
    model.untouched = nnx.Variable(jnp.int32(3))
    params = nnx.state(model, nnx.Param)
    parts = [nnx.clone(model) for _ in range(4)]
    step = 16 // (options.get("num_shards", 1)) if "microbatch_size" not in options else 4
    value_and_grad = optax_sam.nnx.sam_value_and_grad(nnx_loss, sam, batch_argnums=(1, 2), **options)
    # As in NNX, arguments by keyword are at their positions.
    nnx.jit(value_and_grad)(rngs=rngs, y=Y, x=X, model=model, state=sam.init(params))
    assert rngs.dropout.count[...] == start + 1
    assert rngs.unused.count[...] == start
    assert model.untouched[...] == 3
    chex.assert_trees_all_equal(nnx.state(model, nnx.Param), nnx.state(parts[0], nnx.Param))
    # The mean over disjoint parts does not depend on which examples a part has: the running mean is linear.
    for i, part in enumerate(parts):
        own = nnx.Rngs(dropout=7)
        own.dropout.count[...] = start
        nnx_loss(part, X[i * step : (i + 1) * step], Y[i * step : (i + 1) * step], rngs=own)
    expected = jnp.mean(jnp.stack([part.norm.mean[...] for part in parts]), axis=0)
    np.testing.assert_allclose(model.norm.mean[...], expected, rtol=1e-5, atol=1e-7)


def test_metrics_in_the_loss() -> None:
    """Metrics that the loss updates count one pass; over parts of a batch they are refused."""
    sam = optax_sam.sam(0.1)
    model, metric = nnx.Linear(3, 1, rngs=nnx.Rngs(0)), nnx.metrics.Average("loss")

    def loss(model: Any, metric: Any, x: Any) -> Any:
        value = jnp.mean(model(x) ** 2)
        metric.update(loss=value)
        return value

    state = sam.init(nnx.state(model))
    value, _ = optax_sam.nnx.sam_value_and_grad(loss, sam)(model, metric, X, state=state)
    np.testing.assert_allclose(metric.compute(), value)
    with pytest.raises(TypeError, match="update the metric outside of the loss"):
        optax_sam.nnx.sam_value_and_grad(loss, sam, num_shards=2, batch_argnums=2)(
            model, metric, X, state=state
        )


def test_cheaper_ascent() -> None:
    """Its dtype rounds no param; its loss takes the same objects."""
    model, _ = make()
    twin = nnx.clone(model)
    params = nnx.state(model, nnx.Param)
    state = SAM.init(params)
    in_half = optax_sam.nnx.sam_value_and_grad(mean_loss, SAM, ascent_dtype=jnp.bfloat16)
    value, grads = in_half(model, X, Y, state=state)
    half = nnx.clone(twin)
    nnx.update(half, jax.tree.map(lambda w: w.astype(jnp.bfloat16), params))
    np.testing.assert_array_equal(value, mean_loss(half, X, Y))
    chex.assert_trees_all_equal(nnx.state(model, nnx.Param), nnx.state(twin, nnx.Param))

    model, moved = nnx.clone(twin), nnx.clone(twin)

    def other_loss(model: Any, x: Any, y: Any) -> Any:
        return 3.0 * mean_loss(model, x, y + 1.0)

    value_and_grad = optax_sam.nnx.sam_value_and_grad(mean_loss, SAM, ascent_loss=other_loss)
    value, grads = value_and_grad(model, X, Y, state=state)
    expected, clean = nnx.value_and_grad(other_loss)(twin, X, Y)
    chex.assert_trees_all_equal((value, grads.clean), (expected, clean))
    assert_same(model, twin)
    displaced(moved, clean, RHO / length(clean))
    chex.assert_trees_all_close(grads.perturbed, nnx.grad(mean_loss)(moved, X, Y), rtol=1e-4, atol=1e-6)


# The optimizer.


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_a_new_radius(wrap: Any) -> None:
    """One line changes it for good, without another compilation."""
    traces = []

    @wrap
    def step(model: Any, optimizer: Any) -> Any:
        traces.append(1)
        value_and_grad = optax_sam.nnx.sam_value_and_grad(mean_loss, SAM, return_metrics=True)
        _, grads, metrics = value_and_grad(model, X, Y, state=optimizer)
        optimizer.update(model, grads)
        return metrics.rho, metrics.perturbation_norm

    @wrap
    def change(optimizer: Any) -> None:
        optax.tree.get(optimizer.opt_state, "rho")[...] = 0.3

    model, optimizer = make()
    seen = [step(model, optimizer)]
    optax.tree.get(optimizer.opt_state, "rho")[...] = 0.2
    seen += [step(model, optimizer), step(model, optimizer)]
    change(optimizer)
    seen += [step(model, optimizer)]
    np.testing.assert_allclose(seen, np.transpose([[0.1, 0.2, 0.2, 0.3]] * 2), rtol=1e-4)
    assert len(traces) == (1 if wrap is nnx.jit else 4)
    rho = optax.tree.get(optimizer.opt_state, "rho")[...]
    assert rho.dtype == jnp.float32
    assert not rho.weak_type


def test_a_new_radius_that_is_injected() -> None:
    model = Block(3, nnx.Rngs(0))
    tx = optax.inject_hyperparams(optax_sam.sam)(rho=0.1)
    optimizer = nnx.Optimizer(model, optax.chain(tx, optax.sgd(0.1)), wrt=nnx.Param)
    optimizer.opt_state[0].hyperparams["rho"][...] = 0.2
    value_and_grad = optax_sam.nnx.sam_value_and_grad(mean_loss, SAM, return_metrics=True)
    for _ in range(2):
        _, grads, metrics = value_and_grad(model, X, Y, state=optimizer)
        np.testing.assert_allclose((metrics.rho, metrics.perturbation_norm), 0.2, rtol=1e-5)
        optimizer.update(model, grads)


def test_a_plain_gradient_and_grad_fn() -> None:
    """The third door: the variant asks for the second gradient in `optimizer.update`."""
    variant = optax_sam.gsam(RHO)
    models = [Block(3, nnx.Rngs(0)) for _ in range(2)]
    sharp, plain = (nnx.Optimizer(m, optax.chain(variant, optax.sgd(0.1)), wrt=nnx.Param) for m in models)
    for _ in range(2):
        _, pair = optax_sam.nnx.sam_value_and_grad(mean_loss, variant)(models[0], X, Y, state=sharp)
        sharp.update(models[0], pair)

        graph, _, rest = nnx.split(nnx.clone(models[1]), nnx.Param, ...)  # Before the pass that changes it.

        def grad_fn(params: Any, graph: Any = graph, rest: Any = rest) -> Any:
            return as_pure(nnx.grad(mean_loss)(nnx.merge(graph, params, rest, copy=True), X, Y))

        plain.update(models[1], nnx.grad(mean_loss)(models[1], X, Y), grad_fn=grad_fn)
    assert_same(models[1], models[0])


def test_the_optimizer_sees_who_made_a_pair() -> None:
    """NNX keeps of a pair the names of its fields: they carry the mark, also where a filter sees paths."""
    model = Block(3, nnx.Rngs(0))
    gsam = optax_sam.gsam(RHO)
    state = gsam.init(nnx.state(model, nnx.Param))
    _, grads = nnx.jit(optax_sam.nnx.sam_value_and_grad(mean_loss, gsam))(model, X, Y, state=state)
    assert isinstance(grads, optax_sam.SAMGradients)
    for pair in (grads, jax.tree.map(lambda g: g, grads), grads._replace(statistics=None)):
        seen = as_pure(nnx.state(pair, nnx.All(nnx.Param, nnx.PathContains("linear"))))
        assert list(seen) == ["clean", "perturbed"]
        assert [(name.made_by.name, name.made_by.arguments) for name in seen] == [
            ("gsam", gsam.made_by.arguments)
        ] * 2
        assert {name.made_by.precision for name in seen} == {"float32"}


def test_checkpoints(tmp_path: Path) -> None:
    """A restored run goes on as the one that was saved, with the radius that was set."""
    variant = optax_sam.looksam(RHO, k=2)

    def make(seed: int) -> Any:
        rngs = nnx.Rngs(seed)
        layers = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)
        model = nnx.Sequential(*layers)
        return model, nnx.Optimizer(model, optax.chain(variant, optax.adam(0.01)), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> None:
        _, grads = optax_sam.nnx.sam_value_and_grad(mean_loss, variant)(model, X, Y, state=optimizer)
        optimizer.update(model, grads)

    saved, restored = make(0), make(1)
    optax.tree.get(saved[1].opt_state, "rho")[...] = 0.2
    step(*saved)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", nnx.state(saved))
        checkpointer.wait_until_finished()
        nnx.update(restored, checkpointer.restore(tmp_path / "run", nnx.state(restored)))
    step(*saved)  # Reuses what the first step left in the memory.
    step(*restored)
    chex.assert_trees_all_equal(nnx.state(restored), nnx.state(saved))
    np.testing.assert_allclose(optax.tree.get(restored[1].opt_state, "rho")[...], 0.2)


# What is refused.


def linear() -> nnx.Linear:
    return nnx.Linear(3, 1, rngs=nnx.Rngs(0))


def test_what_is_refused_when_the_function_is_made() -> None:
    make = optax_sam.nnx.sam_value_and_grad
    with pytest.raises(TypeError, match="`variant` must be the bare variant"):
        make(mean_loss, optax.chain(SAM, optax.sgd(0.1)))  # pyright: ignore
    with pytest.raises(TypeError, match="`fun` must be the loss, a function, got int"):
        make(3, SAM)  # pyright: ignore
    with pytest.raises(
        TypeError, match=r"`fun` must take the model .* bound method `__call__`: write `lambda"
    ):
        make(linear().__call__, SAM)
    with pytest.raises(ValueError, match=r"must name each positional argument once, got \(0, 0\)"):
        make(mean_loss, SAM, (0, 0))
    with pytest.raises(ValueError, match="`batch_argnums` must name positional arguments other than params"):
        make(mean_loss, SAM, num_shards=2, batch_argnums=0)
    with pytest.raises(ValueError, match="`num_shards=2` needs `batch_argnums=`"):
        make(mean_loss, SAM, num_shards=2)
    with pytest.raises(TypeError, match="`ascent_loss` must be a loss"):
        make(mean_loss, SAM, ascent_loss=1.0)


def test_what_is_refused_in_a_call() -> None:
    model = linear()
    state = SAM.init(nnx.state(model))
    value_and_grad = optax_sam.nnx.sam_value_and_grad(mean_loss, SAM)
    with pytest.raises(TypeError, match="`argnums` is 0, but only 0 positional arguments were given"):
        value_and_grad(state=state)
    with pytest.raises(TypeError, match="`state=` is missing"):
        value_and_grad(model, X, Y)
    nothing = optax_sam.nnx.sam_value_and_grad(mean_loss, SAM, nnx.DiffState(0, nnx.BatchStat))
    with pytest.raises(TypeError, match=r"argument 0 must hold params, got a Linear .* filter .*BatchStat"):
        nothing(model, X, Y, state=state)
    with pytest.raises(ValueError, match="Inconsistent aliasing"):  # As by `nnx.value_and_grad`.
        optax_sam.nnx.sam_value_and_grad(lambda a, b: jnp.sum(a(X) * b(X)), SAM)(model, model, state=state)
    optimizer = nnx.Optimizer(model, SAM, wrt=nnx.Param)

    def scaled(model: Any, x: Any, y: Any, loss_scale: float = 1.0) -> Any:
        return loss_scale * mean_loss(model, x, y)

    def stateful(model: Any, x: Any, y: Any, state: Any) -> Any:
        return mean_loss(model, x, y) + state

    for own, name in ((scaled, "loss_scale"), (stateful, "state")):
        with pytest.raises(TypeError, match=f"The loss has an argument `{name}` of its own"):
            optax_sam.nnx.sam_value_and_grad(own, SAM)(model, X, y=Y, state=optimizer, loss_scale=4.0)
        bound = functools.partial(own, **{name: 2.0})
        optax_sam.nnx.sam_value_and_grad(bound, SAM)(model, X, y=Y, state=optimizer, loss_scale=4.0)
    optimizer.opt_state = optax.tree.set(optimizer.opt_state, rho=0.2)
    with pytest.raises(TypeError, match=r"got 0\.2 in its place\. Write `optax\.tree\.get\(optimizer"):
        value_and_grad(model, X, Y, state=optimizer)


def test_the_core_refuses_modules() -> None:
    """It would lose what the loss changes in them. States and variables are pytrees of arrays."""
    value_and_grad = optax_sam.sam_value_and_grad(lambda params: loss_of_state(params["one"]), SAM)
    for module in (linear(), Opaque(nnx.Rngs(0))):
        with pytest.raises(
            TypeError, match=r"got a `(Linear|Opaque)` of `flax.nnx`.*`optax_sam.nnx.sam_value"
        ):
            value_and_grad({"one": module}, state=SAM.init(nnx.state(linear())))
    model = linear()
    gradient = nnx.grad(loss)(model)
    for params in (nnx.state(model), dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(model))):
        value, grads = value_and_grad({"one": params}, state=SAM.init({"one": params}))
        np.testing.assert_allclose(value, loss(model), rtol=1e-6)
        chex.assert_trees_all_close(jax.tree.leaves(grads.clean), jax.tree.leaves(gradient), rtol=1e-6)


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_the_optimizer_refuses_a_pair_of_another_variant(wrap: Any) -> None:
    gsam = optax_sam.gsam(RHO)

    @wrap
    def step(model: Any, optimizer: Any) -> None:
        _, grads = optax_sam.nnx.sam_value_and_grad(mean_loss, gsam)(model, X, Y, state=optimizer)
        optimizer.update(model, grads)

    with pytest.raises(ValueError, match="evaluated by `gsam`, and `sam` is in the optimizer"):
        step(*make())
