"""Optax around a variant: what works gives the numbers of a computation by hand, what cannot says so."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import table
import tiers
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec

import optax_sam

RHO, ALPHA = 0.1, 0.5
VARIANT = optax_sam.wsam(RHO, alpha=ALPHA)  # Uses both gradients: to lose one of them shows.
BASE = optax.adamw(0.01)
CHAIN = optax.chain(VARIANT, BASE)
PARAMS = table.params()
STEPS = 3
VALUE_AND_GRAD = optax_sam.sam_value_and_grad(table.loss, VARIANT)

ALL = jax.tree.map(lambda _: True, PARAMS)
ALL_LABELS = jax.tree.map(lambda _: "all", PARAMS)


def direction(params: Any, batch: Any) -> Any:
    """WSAM by hand."""
    clean = jax.grad(table.loss)(params, batch)
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(clean)))
    point = jax.tree.map(lambda w, g: w + RHO * g / norm, params, clean)
    perturbed = jax.grad(table.loss)(point, batch)
    return jax.tree.map(lambda g, p: g + ALPHA * (p - g), clean, perturbed)


def by_hand(base: Any = BASE, steps: int = STEPS) -> Any:
    params = PARAMS
    state = base.init(params)
    for i in range(steps):
        updates, state = base.update(direction(params, table.batch(seed=i)), state, params)
        params = optax.apply_updates(params, updates)
    return params


def pair(tx: Any, grads: Any, state: Any, params: Any) -> Any:
    return tx.update(grads, state, params)


def extra(tx: Any, grads: Any, state: Any, params: Any) -> Any:
    return tx.update(grads.perturbed, state, params, clean_updates=grads.clean)


DOORS = {"pair": pair, "clean_updates": extra}


def train(tx: Any, door: Callable[..., Any], steps: int = STEPS) -> Any:
    params = PARAMS
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        _, grads = VALUE_AND_GRAD(params, batch, state=state)
        updates, state = door(tx, grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(steps):
        params, state = step(params, state, table.batch(seed=i))
    return params


def close(a: Any, b: Any) -> None:
    chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-6)


def always(*args: Any, **kwargs: Any) -> Any:
    del args, kwargs
    return True


BOTH = ("pair", "clean_updates")
SECOND = ("clean_updates",)

# Wrappers that change nothing, and the doors through which they let both gradients pass.
WORKS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "chain": (CHAIN, BOTH),
    "nested chains": (optax.chain(optax.chain(VARIANT, optax.identity()), BASE), BOTH),
    "named_chain": (optax.named_chain(("variant", VARIANT), ("base", BASE)), BOTH),
    "inject_hyperparams of the variant": (
        optax.chain(optax.inject_hyperparams(optax_sam.wsam)(rho=RHO, alpha=ALPHA), BASE),
        BOTH,
    ),
    "inject_hyperparams of the chain": (
        optax.inject_hyperparams(
            lambda rho: optax.chain(optax_sam.wsam(rho, alpha=ALPHA), optax.adamw(0.01))
        )(rho=RHO),
        BOTH,
    ),
    "apply_if_finite": (optax.apply_if_finite(CHAIN, 3), SECOND),
    "apply_if_finite after the variant": (optax.chain(VARIANT, optax.apply_if_finite(BASE, 3)), BOTH),
    "conditionally_transform": (optax.chain(optax.conditionally_transform(VARIANT, always), BASE), SECOND),
    "masked": (optax.masked(CHAIN, ALL, mask_compatible_extra_args=True), SECOND),
    "masked by a function": (
        optax.masked(CHAIN, functools.partial(jax.tree.map, always), mask_compatible_extra_args=True),
        SECOND,
    ),
    "masked, the variant alone": (
        optax.chain(optax.masked(VARIANT, ALL, mask_compatible_extra_args=True), BASE),
        SECOND,
    ),
    "partition": (optax.partition({"all": CHAIN}, ALL_LABELS, mask_compatible_extra_args=True), SECOND),
    "partition after the variant": (optax.chain(VARIANT, optax.partition({"all": BASE}, ALL_LABELS)), BOTH),
    "with_extra_args_support": (optax.with_extra_args_support(CHAIN), BOTH),
}
CELLS = [(name, door) for name, (_, doors) in WORKS.items() for door in DOORS]


@pytest.mark.parametrize(("name", "door"), CELLS)
def test_wrappers(name: str, door: str) -> None:
    tx, doors = WORKS[name]
    if door in doors:
        close(train(tx, DOORS[door]), by_hand())
    else:
        with pytest.raises(
            (TypeError, ValueError), match=table.words_of_a_pair(r"`clean_updates=grads.clean`")
        ):
            train(tx, DOORS[door])


REFUSED: dict[str, tuple[Any, str]] = {
    "MultiSteps": (
        optax.MultiSteps(CHAIN, 2).gradient_transformation(),
        r"`optax.MultiSteps` around .*Put it after",
    ),
    "MultiSteps, deep inside": (
        optax.apply_if_finite(optax.MultiSteps(CHAIN, 2).gradient_transformation(), 3),
        "`optax.MultiSteps` around",
    ),
    "flatten": (optax.flatten(CHAIN), r"`optax.flatten` does, comes after"),
    "clip": (optax.chain(optax.clip(1.0), CHAIN), "In a chain the variant comes first.*EmptyState"),
    "clip_by_global_norm": (optax.chain(optax.clip_by_global_norm(1.0), CHAIN), "the variant comes first"),
    "zero_nans": (optax.chain(optax.zero_nans(), VARIANT, BASE), "the variant comes first.*ZeroNansState"),
    "add_noise": (
        optax.chain(optax.add_noise(0.1, 0.5, key=0), CHAIN),
        "the variant comes first.*AddNoiseState",
    ),
    "freeze": (optax.chain(optax.freeze({**ALL, "layer": False}), CHAIN), "variant comes first.*MaskedState"),
    "named_chain": (
        optax.named_chain(("clip", optax.clip(1.0)), ("variant", VARIANT), ("base", BASE)),
        "In a chain the variant comes first",
    ),
    "clip, deep inside": (
        optax.apply_if_finite(optax.chain(optax.clip(1.0), VARIANT, BASE), 3),
        "In a chain the variant comes first",
    ),
    "adam": (optax.chain(optax.scale_by_adam(), VARIANT), "the variant comes first.*ScaleByAdamState"),
    "a whole optimizer": (optax.chain(optax.adamw(0.1), VARIANT), "first.*ScaleByAdamState"),
    "a chain": (optax.chain(optax.chain(optax.clip(1.0)), VARIANT, BASE), "variant comes first.*EmptyState"),
    "a chain before an injected variant": (
        optax.chain(optax.chain(optax.clip(1.0)), optax.inject_hyperparams(optax_sam.wsam)(RHO), BASE),
        "variant comes first.*EmptyState",
    ),
    "a schedule in inject_hyperparams": (
        optax.chain(optax.inject_hyperparams(optax_sam.wsam)(rho=lambda step: RHO + 0 * step), BASE),
        r"`rho` is a schedule of `optax.inject_hyperparams`.*static_args=\(\"rho\",\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("door", DOORS)
def test_refused(name: str, door: str) -> None:
    tx, words = REFUSED[name]
    if (name, door) == ("flatten", "pair"):
        words = "needs two gradients and got a single one"
    with pytest.raises((TypeError, ValueError), match=rf"(?s){words}"):
        train(tx, DOORS[door])


def test_a_state_beside_others_is_found() -> None:
    """A user's own containers are no chains: a tuple of states, a dict, params in front."""
    other = optax.adam(0.1).init(PARAMS)
    for state in (
        (other, CHAIN.init(PARAMS)),
        {"a": other, "b": CHAIN.init(PARAMS)},
        (PARAMS, CHAIN.init(PARAMS)),
    ):
        VALUE_AND_GRAD(PARAMS, table.batch(), state=state)


def test_train_state_takes_the_pair_only() -> None:
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=CHAIN)
    for i in range(STEPS):
        _, grads = VALUE_AND_GRAD(state.params, table.batch(seed=i), state=state.opt_state)
        state = state.apply_gradients(grads=grads)
    close(state.params, by_hand())
    with pytest.raises(TypeError, match="clean_updates"):
        state.apply_gradients(grads=grads.perturbed, clean_updates=grads.clean)


def test_the_pair_crosses_a_jit_boundary() -> None:
    evaluate = jax.jit(lambda params, state, batch: VALUE_AND_GRAD(params, batch, state=state)[1])
    update = jax.jit(CHAIN.update)
    params, state = PARAMS, CHAIN.init(PARAMS)
    for i in range(STEPS):
        grads = evaluate(params, state, table.batch(seed=i))
        assert type(grads) is optax_sam.SAMGradients
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    close(params, by_hand())


def test_map_params_makes_shardings() -> None:
    looksam = optax.chain(optax_sam.looksam(), BASE)
    specs = optax.tree.map_params(
        looksam,
        lambda _: PartitionSpec("data"),
        looksam.init(PARAMS),
        transform_non_params=lambda _: PartitionSpec(),
    )
    found = optax.tree.get(specs, "SAMState")
    assert set(jax.tree.leaves(found.memory.orthogonal)) == {PartitionSpec("data")}
    assert found.memory.length == found.step == found.rho == PartitionSpec()


# Links after the variant: they act on the direction as they would on a gradient.
FROZEN = {"layer": {"kernel": False, "bias": True}, "scale": True}
LINKS: dict[str, Callable[[], Any]] = {
    "clip": lambda: optax.chain(optax.clip(0.05), optax.sgd(0.1)),
    "clip_by_global_norm": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)),
    "adaptive_grad_clip": lambda: optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(0.1)),
    "add_decayed_weights": lambda: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)),
    "add_noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, key=0), optax.sgd(0.1)),
    "ema": lambda: optax.chain(optax.ema(0.9), optax.sgd(0.1)),
    "freeze": lambda: optax.chain(optax.sgd(0.1), optax.freeze(FROZEN)),
    "selective_transform": lambda: optax.selective_transform(optax.adam(0.1), freeze_mask=FROZEN),
    "masked": lambda: optax.chain(optax.masked(optax.add_decayed_weights(0.1), FROZEN), optax.sgd(0.1)),
    "partition": lambda: optax.partition({True: optax.adam(0.1), False: optax.set_to_zero()}, FROZEN),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.1), 3),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=0.01, weight_decay=0.1),
    "schedule": lambda: optax.adam(optax.cosine_decay_schedule(0.1, 5)),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(0.1),
    "muon": lambda: optax.contrib.muon(0.1),
    "prodigy": lambda: optax.contrib.prodigy(),
    "lbfgs": lambda: optax.lbfgs(0.1, linesearch=None),
    "lion": lambda: optax.lion(0.01),
    "adafactor": lambda: optax.adafactor(0.1),
}


# A transformation of the direction, a mask, a wrapper and a schedule.
FEW_LINKS = ("clip_by_global_norm", "partition", "MultiSteps", "apply_if_finite", "schedule")


@pytest.mark.parametrize("name", tiers.later(LINKS, FEW_LINKS))
def test_links(name: str) -> None:
    tx = optax.chain(VARIANT, LINKS[name]())
    actual, expected = train(tx, pair), by_hand(LINKS[name]())
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (actual, PARAMS)), strict=True))


def test_lookahead() -> None:
    """Lookahead's fast params are where the gradients are taken; it takes the pair only."""
    wrapped, bare = optax.lookahead(CHAIN, 2, 0.5), optax.lookahead(BASE, 2, 0.5)
    params = expected = optax.LookaheadParams.init_synced(PARAMS)
    state, expected_state = wrapped.init(params), bare.init(expected)
    for i in range(4):
        _, grads = VALUE_AND_GRAD(params.fast, table.batch(seed=i), state=state)
        updates, state = wrapped.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        updates, expected_state = bare.update(
            direction(expected.fast, table.batch(seed=i)), expected_state, expected
        )
        expected = optax.apply_updates(expected, updates)
    close(params, expected)


def test_schedule_free_around_the_chain() -> None:
    """Around the chain or after the variant: the same, and so are the params for evaluation."""
    ends = []
    for tx in (
        optax.contrib.schedule_free(optax.chain(VARIANT, optax.sgd(0.1)), 0.1),
        optax.chain(VARIANT, optax.contrib.schedule_free(optax.sgd(0.1), 0.1)),
    ):
        params, state = PARAMS, tx.init(PARAMS)
        for i in range(STEPS):
            _, grads = VALUE_AND_GRAD(params, table.batch(seed=i), state=state)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        found = optax.tree.get(state, "ScheduleFreeState")
        ends.append((params, optax.contrib.schedule_free_eval_params(found, params)))
    close(*ends)


def test_lbfgs_with_a_line_search() -> None:
    """The search is along the quasi-Newton direction of the sharpness-aware gradients, on the loss given."""
    base = optax.lbfgs()
    tx = optax.chain(VARIANT, base)
    params = expected = PARAMS
    state, expected_state = tx.init(PARAMS), base.init(PARAMS)
    loss = functools.partial(table.loss, batch=table.batch())

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, grads = VALUE_AND_GRAD(params, table.batch(), state=state)
        updates, state = tx.update(grads, state, params, value=value, grad=grads.clean, value_fn=loss)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def step_by_hand(params: Any, state: Any, u: Any) -> Any:
        value, clean = jax.value_and_grad(loss)(params)
        updates, state = base.update(u, state, params, value=value, grad=clean, value_fn=loss)
        return optax.apply_updates(params, updates), state

    for _ in range(2):
        params, state = step(params, state)
        expected, expected_state = step_by_hand(expected, expected_state, direction(expected, table.batch()))
        chex.assert_trees_all_close(params, expected, rtol=1e-3, atol=1e-4)
    assert loss(params) < loss(PARAMS)


def test_frozen_params_do_not_move() -> None:
    """A mask by path, in one line, for both: what is perturbed and what is trained."""

    def is_bias(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: "bias" in str(path), params)

    sam = optax_sam.sam(0.1, ascent=optax_sam.ascent.masked(is_bias))
    tx = optax.chain(sam, optax.sgd(0.1), optax.freeze(lambda p: jax.tree.map(lambda x: not x, is_bias(p))))
    seen = []

    def loss(params: Any, batch: Any) -> Any:
        jax.debug.callback(lambda p: seen.append(p), params)
        return table.loss(params, batch)

    state = tx.init(PARAMS)
    _, grads = optax_sam.sam_value_and_grad(loss, sam)(PARAMS, table.batch(), state=state)
    updates, _ = tx.update(grads, state, PARAMS)
    jax.effects_barrier()
    moved = jax.tree.map(lambda u: bool(jnp.any(u != 0)), updates)
    assert moved == is_bias(PARAMS)
    perturbed = jax.tree.map(lambda a, b: bool(np.any(a != b)), seen[-1], PARAMS)
    assert perturbed == is_bias(PARAMS)
    norm = np.linalg.norm(np.asarray(seen[-1]["layer"]["bias"]) - PARAMS["layer"]["bias"])
    np.testing.assert_allclose(norm, 0.1, rtol=1e-5)


@pytest.mark.parametrize("frequency", tiers.later([None, 3], [3]))
def test_average_of_params(frequency: int | None) -> None:
    """Keras's `use_ema`, `ema_momentum` and `ema_overwrite_frequency`, from Optax's parts, against numpy."""
    momentum = 0.9

    @jax.jit
    def step(params: Any, state: Any, average: Any, count: Any, batch: Any) -> Any:
        _, grads = VALUE_AND_GRAD(params, batch, state=state)
        updates, state = CHAIN.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        average = optax.incremental_update(params, average, step_size=1 - momentum)
        if frequency is not None:
            params = optax.periodic_update(average, params, count, update_period=frequency)
        return params, state, average

    params = average = PARAMS
    state, expected, by_numpy = CHAIN.init(PARAMS), PARAMS, PARAMS
    base_state = BASE.init(PARAMS)
    for i in range(1, 8):
        params, state, average = step(params, state, average, jnp.int32(i), table.batch(seed=i))
        updates, base_state = BASE.update(direction(expected, table.batch(seed=i)), base_state, expected)
        expected = jax.tree.map(np.add, expected, updates)
        by_numpy = jax.tree.map(lambda m, w: momentum * m + (1 - momentum) * w, by_numpy, expected)
        if frequency is not None and i % frequency == 0:
            expected = by_numpy
        close((params, average), (expected, by_numpy))


@optax_sam.constructor
def half_sam(rho: Any = 0.05) -> Any:
    return optax_sam.sharpness_aware(rho / 2)


@optax_sam.constructor
def gated_half_sam(rho: Any = 0.05) -> Any:
    return optax_sam.gated(half_sam(rho), optax_sam.gates.every(1))


@pytest.mark.parametrize("make", [half_sam, gated_half_sam])
@pytest.mark.parametrize("jit", [False, True])
def test_a_constructor_that_makes_its_radius_of_the_argument(make: Any, jit: bool) -> None:
    params = table.params()
    state = optax.inject_hyperparams(make)(rho=0.2).init(params)
    value_and_grad = optax_sam.sam_value_and_grad(table.loss, make(), return_metrics=True)
    *_, metrics = (jax.jit(value_and_grad) if jit else value_and_grad)(params, table.batch(), state=state)
    np.testing.assert_allclose(metrics.perturbation_norm, 0.1, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda schedule: optax.inject_hyperparams(optax_sam.unified_sam)(0.1, mix=schedule), "mix"),
        (lambda schedule: optax.inject_hyperparams(optax_sam.sampa)(learning_rate=schedule), "learning_rate"),
    ],
)
def test_schedules_of_other_arguments_would_lag_a_step(make: Any, name: str) -> None:
    params, variant = (
        table.params(),
        optax_sam.sampa(0.1) if name == "learning_rate" else optax_sam.unified_sam(),
    )
    state = make(optax.linear_schedule(0.1, 0.9, 10)).init(params)
    with pytest.raises(ValueError, match=f"`{name}` is a schedule of `optax.inject_hyperparams`"):
        optax_sam.sam_value_and_grad(table.loss, variant)(params, table.batch(), state=state)
