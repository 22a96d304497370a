"""Flax: two passes leave a model as one pass does, and existing training code changes by two lines."""

import functools
import itertools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import table
from flax import nnx
from flax.training import train_state
from flax.training.dynamic_scale import DynamicScale
from quick import QUICK

import optax_sam

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


# The training code of Flax's two best known examples, in short; what a user changes stands below each.

NNX_EXAMPLE = """
class CNN(nnx.Module):
    def __init__(self, *, rngs):
        self.conv = nnx.Conv(1, 4, kernel_size=(3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop1 = nnx.Dropout(rate=0.25)
        self.linear = nnx.Linear(64, 3, rngs=rngs)

    def __call__(self, x, rngs):
        x = nnx.relu(self.drop1(self.norm(self.conv(x)), rngs=rngs))
        return self.linear(nnx.avg_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1))


model = CNN(rngs=nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adamw(0.01, 0.9), wrt=nnx.Param)
metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))


def loss_fn(model, rngs, batch):
    logits = model(batch["image"], rngs)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits=logits, labels=batch["label"]).mean()
    return loss, logits


@nnx.jit
def train_step(model, optimizer, metrics, rngs, batch):
    grad_fn = nnx.value_and_grad(loss_fn, has_aux=True)
    (loss, logits), grads = grad_fn(model, rngs, batch)
    metrics.update(loss=loss, logits=logits, labels=batch["label"])
    optimizer.update(model, grads)


model.train()
rngs = nnx.Rngs(1)
for i in range(3):
    train_step(model, optimizer, metrics, rngs, batch)
    history.append((metrics.compute(), jax.tree.map(jnp.copy, nnx.state((model, rngs)))))
"""

NNX_LINES = {
    "optimizer = nnx.Optimizer(model, optax.adamw(0.01, 0.9), wrt=nnx.Param)": (
        "optimizer = nnx.Optimizer(model, optax.chain(variant, optax.adamw(0.01, 0.9)), wrt=nnx.Param)"
    ),
    "grad_fn = nnx.value_and_grad(loss_fn, has_aux=True)": (
        "grad_fn = functools.partial(optax_sam.nnx.sam_value_and_grad(loss_fn, variant, has_aux=True),"
        " state=optimizer)"
    ),
}

IMAGENET_EXAMPLE = """
class TrainState(train_state.TrainState):
    batch_stats: Any
    dynamic_scale: DynamicScale


def train_step(state, batch):
    def loss_fn(params):
        logits, new_model_state = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats}, batch["image"], mutable=["batch_stats"]
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        weight_l2 = sum(jnp.sum(x**2) for x in jax.tree_util.tree_leaves(params) if x.ndim > 1)
        return loss + 0.0001 * 0.5 * weight_l2, (new_model_state, logits)

    dynamic_scale = state.dynamic_scale
    if dynamic_scale:
        grad_fn = dynamic_scale.value_and_grad(loss_fn, has_aux=True, axis_name="batch")
        dynamic_scale, is_fin, aux, grads = grad_fn(state.params)
    else:
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        aux, grads = grad_fn(state.params)
        grads = lax.pmean(grads, axis_name="batch")
    new_model_state, logits = aux[1]
    new_state = state.apply_gradients(grads=grads, batch_stats=new_model_state["batch_stats"])
    if dynamic_scale:
        select = functools.partial(jnp.where, is_fin)
        new_state = new_state.replace(
            opt_state=jax.tree_util.tree_map(select, new_state.opt_state, state.opt_state),
            params=jax.tree_util.tree_map(select, new_state.params, state.params),
            dynamic_scale=dynamic_scale,
        )
    return new_state, aux[0]


tx = optax.sgd(0.1, momentum=0.9, nesterov=True)
variables = network.init(jax.random.key(0), images[0])
state = TrainState.create(
    apply_fn=network.apply, tx=tx, params=variables["params"], batch_stats=variables["batch_stats"],
    dynamic_scale=dynamic_scale,
)
state = jax.tree.map(lambda x: jnp.broadcast_to(x, (8, *jnp.shape(x))), state)
p_train_step = jax.pmap(train_step, axis_name="batch")
for i in range(3):
    state, loss = p_train_step(state, {"image": images, "label": labels})
"""

IMAGENET_LINES = {
    "tx = optax.sgd(0.1, momentum=0.9, nesterov=True)": (
        "tx = optax.chain(variant, optax.sgd(0.1, momentum=0.9, nesterov=True))"
    ),
    'grad_fn = dynamic_scale.value_and_grad(loss_fn, has_aux=True, axis_name="batch")': (
        "grad_fn = functools.partial(optax_sam.linen.dynamic_scale_value_and_grad("
        'dynamic_scale, loss_fn, variant, has_aux=True, axis_name="batch"), state=state.opt_state)'
    ),
    "grad_fn = jax.value_and_grad(loss_fn, has_aux=True)": (
        "grad_fn = functools.partial(optax_sam.sam_value_and_grad("
        'loss_fn, variant, has_aux=True, axis_name="batch"), state=state.opt_state)'
    ),
}


def changed(example: str, lines: dict[str, str]) -> str:
    for old, new in lines.items():
        assert example.count(old) == 1
        example = example.replace(old, new)
    return example


def nnx_history(source: str, variant: Any) -> Any:
    images = jax.random.normal(jax.random.key(0), (12, 8, 8, 1))
    names = {
        "nnx": nnx, "optax": optax, "jax": jax, "jnp": jnp, "functools": functools, "optax_sam": optax_sam,
        "variant": variant, "history": [], "batch": {"image": images, "label": jnp.arange(12) % 3},
    }  # fmt: skip
    exec(source, names)
    return names["history"]


def test_nnx_example_changes_by_two_lines() -> None:
    def weights_of(record: Any) -> Any:
        metrics, state = record
        return metrics, nnx.filter_state(state, nnx.Not(nnx.RngKey))

    plain = nnx_history(NNX_EXAMPLE, None)
    sharp = nnx_history(changed(NNX_EXAMPLE, NNX_LINES), optax_sam.sam(0.2))
    zero = nnx_history(changed(NNX_EXAMPLE, NNX_LINES), optax_sam.sam(0.0))
    for i in range(3):
        # A radius of zero is the example as it was, and counters move as in one pass in any case.
        chex.assert_trees_all_close(weights_of(zero[i]), weights_of(plain[i]), rtol=1e-4, atol=1e-5)
        counts = [nnx.filter_state(history[i][1], nnx.RngCount) for history in (plain, sharp)]
        chex.assert_trees_all_equal(*counts)
        assert jax.tree.leaves(counts[0])[-1] == i + 1
    # The first step has the same model: the same loss, and the same statistics, to the last bit.
    chex.assert_trees_all_equal(sharp[0][0], plain[0][0])
    chex.assert_trees_all_equal(
        *(nnx.filter_state(history[0][1], nnx.BatchStat) for history in (plain, sharp))
    )
    weights = [nnx.filter_state(history[2][1], nnx.Param) for history in (plain, sharp)]
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), *weights))) > 1e-3


class TinyResNet(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        y = nn.BatchNorm(use_running_average=not train, dtype=self.dtype)(nn.Dense(6, dtype=self.dtype)(x))
        return jnp.asarray(nn.Dense(3, dtype=self.dtype)(x + nn.relu(y)), jnp.float32)


@pytest.mark.parametrize("half_precision", [False, True])
def test_imagenet_example_changes_by_two_lines(half_precision: bool) -> None:
    """Linen, pmap over 8 devices, BatchNorm, dynamic scale, an L2 penalty in the loss."""
    images = jax.random.normal(jax.random.key(0), (8, 4, 6))
    labels = jnp.arange(32).reshape(8, 4) % 3

    def run(source: str, variant: Any) -> Any:
        names = {
            **globals(), "train_state": train_state,
            "lax": jax.lax, "variant": variant, "images": images, "labels": labels,
            "network": TinyResNet(jnp.float16 if half_precision else jnp.float32),
            "dynamic_scale": DynamicScale() if half_precision else None,
        }  # fmt: skip
        exec(source, names)
        state = jax.device_get(names["state"])
        for leaf in jax.tree.leaves(state.params):
            np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
        return state, jax.device_get(names["loss"])

    plain, _ = run(IMAGENET_EXAMPLE, None)
    zero, _ = run(changed(IMAGENET_EXAMPLE, IMAGENET_LINES), optax_sam.sam(0.0))
    sharp, loss = run(changed(IMAGENET_EXAMPLE, IMAGENET_LINES), optax_sam.sam(0.2))
    chex.assert_trees_all_close(
        (zero.params, zero.batch_stats), (plain.params, plain.batch_stats), rtol=0.01, atol=1e-3
    )
    assert np.all(np.isfinite(loss))
    kernels = [state.params["Dense_1"]["kernel"] for state in (plain, sharp)]
    assert np.max(np.abs(kernels[0] - kernels[1])) > 1e-3
    if half_precision:
        np.testing.assert_array_equal(zero.dynamic_scale.scale, plain.dynamic_scale.scale)


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
def test_nnx_variants(row: table.Row) -> None:
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


def test_nnx_traces_once() -> None:
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


def test_nnx_trains_a_part() -> None:
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


def test_nnx_several_models() -> None:
    sam = optax_sam.sam(0.1)
    one, two = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Linear(2, 1, rngs=nnx.Rngs(1))

    def loss(one: Any, x: Any, two: Any) -> Any:
        return jnp.mean((two(nnx.tanh(one(x)))[:, 0] - Y) ** 2)

    both = nnx.state(one), nnx.state(two)
    value, grads, metrics = optax_sam.nnx.sam_value_and_grad(loss, sam, (0, 2), return_metrics=True)(
        one, X, two, state=sam.init(both)
    )
    assert isinstance(grads.perturbed, tuple)
    expected = nnx.grad(loss, argnums=(0, 2))(one, X, two)
    chex.assert_trees_all_close(grads.clean, tuple(nnx.state(x) for x in expected), rtol=1e-6)
    np.testing.assert_allclose(metrics.loss, value)


@pytest.mark.parametrize(
    "options", [{"num_shards": 4}, {"microbatch_size": 4}, {"num_shards": 2, "microbatch_size": 4}]
)
def test_nnx_in_parts(options: Any) -> None:
    """Shards and microbatches: statistics are averaged over the parts, counters move once."""
    sam = optax_sam.sam(0.1)
    model, rngs = Model(nnx.Rngs(0)), nnx.Rngs(dropout=7)
    params = nnx.state(model, nnx.Param)
    parts = [nnx.clone(model) for _ in range(4)]
    step = 16 // (options.get("num_shards", 1)) if "microbatch_size" not in options else 4
    value_and_grad = optax_sam.nnx.sam_value_and_grad(nnx_loss, sam, batch_argnums=(1, 2), **options)
    value_and_grad(model, X, Y, rngs=rngs, state=sam.init(params))
    assert rngs.dropout.count[...] == 1
    # The mean over disjoint parts does not depend on which examples a part has: the running mean is linear.
    for i, part in enumerate(parts):
        nnx_loss(part, X[i * step : (i + 1) * step], Y[i * step : (i + 1) * step], rngs=nnx.Rngs(dropout=7))
    expected = jnp.mean(jnp.stack([part.norm.mean[...] for part in parts]), axis=0)
    np.testing.assert_allclose(model.norm.mean[...], expected, rtol=1e-5, atol=1e-7)


def test_nnx_metrics_in_the_loss() -> None:
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


def test_nnx_bad_input() -> None:
    sam = optax_sam.sam(0.1)
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    state = sam.init(nnx.state(model))
    value_and_grad = optax_sam.nnx.sam_value_and_grad(lambda m, x: jnp.mean(m(x)), sam)
    with pytest.raises(TypeError, match=r"positional argument 0 must be an NNX object .* got dict"):
        value_and_grad({"w": X}, X, state=state)
    with pytest.raises(TypeError, match=r"positional argument 0 must be .* got nothing"):
        value_and_grad(state=state)
    with pytest.raises(TypeError, match="`state=` is missing"):
        value_and_grad(model, X)
    with pytest.raises(ValueError, match="must name different positional arguments"):
        optax_sam.nnx.sam_value_and_grad(nnx_loss, sam, num_shards=2, batch_argnums=0)
    nothing = nnx.DiffState(0, nnx.PathContains("no such layer"))
    with pytest.raises(TypeError, match="with variables to differentiate, got Linear"):
        optax_sam.nnx.sam_value_and_grad(nnx_loss, sam, nothing)(model, X, state=state)
