"""Faults that users and hostile tests found, each with the program in which it showed."""

import copy
import functools
import importlib
import inspect
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import flax.serialization
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import table
import tiers
from table import ROWS, Row

import optax_sam

# A door, or a fault of the mechanism, cannot tell two rows with the same capabilities apart.
pytestmark = pytest.mark.by_capability

PARAMS = table.params()
EXAMPLES = table.batch()
SAM = optax_sam.sam(0.1)
CHAIN = optax.chain(SAM, optax.sgd(0.1))


def all_rows(*rows: Row) -> Any:
    return pytest.mark.parametrize("row", rows or ROWS, ids=lambda row: row.name)


def by_pair(tx: Any, grads: Any, state: Any, params: Any) -> Any:
    return tx.update(grads, state, params)


def by_clean_updates(tx: Any, grads: Any, state: Any, params: Any) -> Any:
    return tx.update(grads.perturbed, state, params, clean_updates=grads.clean, statistics=grads.statistics)


# Wrappers around the chain.

TRUE = jax.tree.map(lambda _: True, PARAMS)
SOME = {**TRUE, "scale": False}


def always(*args: Any, **kwargs: Any) -> Any:
    del args, kwargs
    return True


ONE_TREE: dict[str, Any] = {
    "apply_if_finite": optax.apply_if_finite(CHAIN, 3),
    "conditionally_transform": optax.chain(optax.conditionally_transform(SAM, always), optax.sgd(0.1)),
    "conditionally_mask": optax.chain(optax.conditionally_mask(SAM, always), optax.sgd(0.1)),
    "masked": optax.masked(CHAIN, SOME),
    "masked by a function": optax.masked(CHAIN, lambda tree: jax.tree.map(always, tree)),
    "partition": optax.partition({True: CHAIN, False: optax.set_to_zero()}, SOME),
    "selective_transform": optax.selective_transform(CHAIN, freeze_mask=SOME),
    "mechanize": optax.contrib.mechanize(CHAIN),
}


@pytest.mark.parametrize("name", ONE_TREE)
def test_wrappers_that_want_one_tree_name_the_door(name: str) -> None:
    """JAX's error about the structure prints the type of the pair, and with it the door that works."""
    tx = ONE_TREE[name]
    state = tx.init(PARAMS)
    _, grads = optax_sam.sam_value_and_grad(table.loss, SAM)(PARAMS, EXAMPLES, state=state)
    with pytest.raises(
        (TypeError, ValueError),
        match=table.words_of_a_pair(r"after the variant, or pass it `grads.perturbed` and"),
    ):
        by_pair(tx, grads, state, PARAMS)
    by_clean_updates(tx, grads, state, PARAMS)


@pytest.mark.parametrize("params", [PARAMS, PARAMS["layer"]["bias"]], ids=["tree", "array"])
def test_multi_steps_is_named(params: Any) -> None:
    """Around the variant it is refused by the evaluation; who evaluates with another state is told here."""
    tx = optax.MultiSteps(CHAIN, 2)
    grads = optax_sam.SAMGradients(params, params)
    with pytest.raises(
        (TypeError, ValueError),
        match=table.words_of_a_pair(r"after the variant|MultiSteps` goes around what follows"),
    ):
        tx.update(grads, tx.init(params), params)


def grad_fn_door(variant: Any, tx: Any, loss: Any, state: Any, params: Any, batch: Any) -> Any:
    del variant
    grad_fn = jax.grad(lambda params: loss(params, batch))
    return tx.update(grad_fn(params), state, params, grad_fn=grad_fn, all_params=params)


def clean_updates_door(variant: Any, tx: Any, loss: Any, state: Any, params: Any, batch: Any) -> Any:
    _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, batch, state=state)
    return by_clean_updates(tx, grads, state, params)


def trained(door: Callable[..., Any], variant: Any, tx: Any, loss: Any, params: Any) -> Any:
    state = tx.init(params)
    for i in range(3):
        updates, state = door(variant, tx, loss, state, params, table.batch(seed=i))
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("door", [grad_fn_door, clean_updates_door])
@pytest.mark.parametrize("visible", ["layer", "scale"])
@all_rows(*[row for row in ROWS if row.memory_copies or row.memory_scalars])
def test_masks_around_a_variant_with_memory(row: Row, visible: str, door: Any) -> None:
    """What the mask hides is constant in the loss: the others train as if it were no param at all."""
    # So much data that the noise, which is drawn leaf by leaf, is below rounding.
    variant, tx = row.optimizer(**({"num_data": 2**62} if "num_data" in row.kwargs else {}))
    mask = {name: name == visible for name in PARAMS}

    def loss(params: Any, batch: Any) -> Any:
        return table.loss({**jax.lax.stop_gradient(PARAMS), visible: params[visible]}, batch)

    alone = trained(door, variant, tx, loss, {visible: PARAMS[visible]})
    masked = optax.masked(tx, jax.tree.map(lambda m, tree: jax.tree.map(lambda _: m, tree), mask, PARAMS))
    for wrapper in (
        optax.chain(masked, optax.freeze({name: not m for name, m in mask.items()})),
        optax.partition({True: tx, False: optax.set_to_zero()}, mask),
    ):
        together = trained(door, variant, wrapper, loss, PARAMS)
        chex.assert_trees_all_close(together, {**PARAMS, **alone}, rtol=1e-5, atol=1e-6)


# A whole optimizer, and what stands around it.

WHOLE = [row for row in ROWS if row.whole_optimizer]
OTHERS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: optax.sgd(0.1),
    "adam": lambda: optax.adam(0.1),
    "scale_by_adam": lambda: optax.scale_by_adam(),
    "trace": lambda: optax.trace(0.9),
    "injected": lambda: optax.inject_hyperparams(optax.sgd)(learning_rate=0.1),
    "wrapped": lambda: optax.apply_if_finite(optax.sgd(0.1), 3),
    "MultiSteps": lambda: optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
}
HARMLESS: dict[str, Callable[[], Any]] = {
    "clip": lambda: optax.clip(0.1),
    "freeze": lambda: optax.freeze({"layer": False, "scale": True}),
    "schedule": lambda: optax.scale_by_schedule(optax.constant_schedule(0.5)),
    "plateau": lambda: optax.contrib.reduce_on_plateau(),
    "ema": lambda: optax.ema(0.9),
    "snapshot": lambda: optax.snapshot("norm", optax.tree.norm),
}


def evaluate(variant: Any, state: Any, params: Any = None, **options: Any) -> Any:
    params = PARAMS if params is None else params
    return optax_sam.sam_value_and_grad(table.loss, variant, **options)(params, EXAMPLES, state=state)


@all_rows(*ROWS)
def test_whole_optimizers_say_so(row: Row) -> None:
    assert row.make().is_optimizer == row.whole_optimizer


@all_rows(*WHOLE)
@pytest.mark.parametrize("name", OTHERS)
def test_an_optimizer_after_a_whole_one(row: Row, name: str) -> None:
    variant, other = row.make(), OTHERS[name]()
    for tx in (
        optax.chain(variant, other),
        optax.chain(optax.chain(variant, optax.clip(1.0)), other),
        optax.named_chain(("variant", variant), ("clip", optax.clip(1.0)), ("other", other)),
        optax.apply_if_finite(optax.chain(variant, other), 3),
    ):
        with pytest.raises(ValueError, match=rf"`{variant.made_by.name}` is a whole optimizer: .* Another"):
            evaluate(variant, tx.init(PARAMS))


@all_rows(*WHOLE)
@pytest.mark.parametrize("name", HARMLESS)
def test_links_after_a_whole_optimizer(row: Row, name: str) -> None:
    variant = row.make()
    evaluate(variant, optax.chain(variant, HARMLESS[name]()).init(PARAMS))
    evaluate(SAM, optax.chain(SAM, HARMLESS[name](), optax.adam(0.1)).init(PARAMS))


@all_rows(*WHOLE)
def test_multi_steps_around_a_whole_optimizer(row: Row) -> None:
    """It cannot come after; so that is not the advice."""
    tx = optax.MultiSteps(row.make(), 2)
    with pytest.raises(
        ValueError, match=r"it has no place: take the step of the whole batch, .*microbatch_size"
    ):
        evaluate(row.make(), tx.init(PARAMS))


def test_multi_steps_inside_msam() -> None:
    """The momentum, and so the perturbed point, stays until all batches were seen."""
    whole = optax_sam.msam(optax.sgd(0.1, momentum=0.9), 0.2)
    parts = optax_sam.msam(optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 2).gradient_transformation(), 0.2)

    def train(variant: Any, batches: Any) -> Any:
        params, state = PARAMS, variant.init(PARAMS)
        for batch in batches:
            _, grads = optax_sam.sam_value_and_grad(table.loss, variant)(params, batch, state=state)
            updates, state = variant.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    halves = [half for i in range(3) for half in jnp.split(table.batch(seed=i), 2)]
    chex.assert_trees_all_close(
        train(parts, halves), train(whole, [table.batch(seed=i) for i in range(3)]), rtol=1e-5
    )


def test_identity_before_the_variant() -> None:
    """Its state is that of a clip, which would be wrong there."""
    tx = optax.chain(optax.identity(), SAM, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"`optax.identity\(\)` cannot be told from a clip: leave it out"):
        evaluate(SAM, tx.init(PARAMS))


@pytest.mark.parametrize(
    "base",
    [
        optax.contrib.muon(0.1),
        optax.partition({0: optax.adam(0.1), 1: optax.sgd(0.1, momentum=0.9)}, {"layer": 0, "scale": 1}),
    ],
    ids=["muon", "partition"],
)
def test_msam_on_a_momentum_in_parts(base: Any) -> None:
    """Each group of params has its own optimizer; the perturbation is along all of the parts together."""

    def loss(params: Any) -> Any:
        return optax.tree.norm(params, squared=True) / 2  # Its gradient is the point where it is taken.

    variant = optax_sam.msam(base, 0.1)
    state = variant.init(PARAMS)
    _, state = variant.update(optax_sam.SAMGradients(PARAMS, PARAMS), state, PARAMS)
    _, grads = optax_sam.sam_value_and_grad(loss, variant)(PARAMS, state=state)
    parts = [x for name in ("mu", "trace") for _, x in optax.tree.get_all_with_path(state, name)]
    assert len(parts) == 2
    momentum = {x.shape: x for x in jax.tree.leaves(parts)}  # All params differ in shape.
    length = np.linalg.norm([np.linalg.norm(x) for x in momentum.values()])
    expected = jax.tree.map(lambda w: w - 0.1 * momentum[w.shape] / length, PARAMS)
    chex.assert_trees_all_close(grads.perturbed, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("constructor", [optax_sam.msam, optax_sam.shifted_msam])
@pytest.mark.parametrize("base", [optax.contrib.schedule_free_adamw(0.1), optax.contrib.prodigy()])
def test_msam_without_a_momentum_names_what_to_use(constructor: Any, base: Any) -> None:
    instead = r"keeps 0\. `optax_sam.msam\(base_optimizer, rho, along='update'\)` goes along the last update"
    with pytest.raises(ValueError, match=instead):
        constructor(base).init(PARAMS)
    tx = optax_sam.msam(base, 0.1, along="update")
    state = tx.init(PARAMS)
    _, grads = evaluate(tx, state)
    tx.update(grads, state, PARAMS)


# `shifted_msam` keeps apart the radius that is in the params.


SHIFTED = optax_sam.shifted_msam(optax.sgd(0.0, momentum=0.9), 0.1)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("tx", "every"),
    [
        (SHIFTED, 1),
        (optax.apply_if_finite(SHIFTED, 3), 1),
        (optax.MultiSteps(SHIFTED, 2).gradient_transformation(), 2),
        (
            optax.inject_hyperparams(lambda rho: optax_sam.shifted_msam(optax.sgd(0.0, momentum=0.9), rho))(
                rho=0.1
            ),
            1,
        ),
    ],
    ids=["alone", "apply_if_finite", "MultiSteps", "injected"],
)
def test_a_radius_set_in_shifted_msam(tx: Any, every: int, jit: bool) -> None:
    """Without a learning rate the params to evaluate stay, and those of the loop move by the new radius."""
    update = jax.jit(tx.update) if jit else tx.update
    start = params = jnp.array([1.0, 1.0])
    state = tx.init(params)
    radii = []
    for i in range(6 * every):
        if i == 3 * every:
            state = optax.tree.set(state, rho=1.0)
        updates, state = update(jnp.array([3.0, 4.0 + i]), state, params)
        params = optax.apply_updates(params, updates)
        chex.assert_trees_all_close(optax_sam.msam_eval_params(state, params), start, atol=1e-6)
        radii.append(float(jnp.linalg.norm(params - start)))
    np.testing.assert_allclose(radii[every - 1 :: every], [0.1] * 3 + [1.0] * 3, rtol=1e-5)
    np.testing.assert_allclose(optax.tree.get(state, "ShiftedMSAMState").rho, 1.0)


# Numbers of any size.


@pytest.mark.parametrize("num_data", [2**31, 10**12, 2**62])
def test_bsam_of_many_examples(num_data: int) -> None:
    variant = optax_sam.bsam(0.1, num_data, rho=0.0, key=0)
    step = jax.jit(optax_sam.sam_value_and_grad(table.loss, variant, return_metrics=True))
    state = variant.init(PARAMS)
    *_, metrics = step(PARAMS, EXAMPLES, state=state)
    np.testing.assert_allclose(metrics.loss, table.loss(PARAMS, EXAMPLES), rtol=1e-3)
    deviations = jax.jit(
        lambda: optax_sam.bsam_sample(
            jax.random.key(0), jnp.zeros(1000), variant.init(jnp.zeros(1000)), num_data
        )
    )()
    np.testing.assert_allclose(jnp.std(deviations), num_data**-0.5, rtol=0.1)


# Keywords and forms that are taken for others.


def test_keywords_of_the_loss_that_are_taken() -> None:
    """The loss's own `state` and `loss_scale` by position or bound; by keyword they are refused in words."""
    state = CHAIN.init(PARAMS)

    def loss(params: Any, batch: Any, state: Any) -> Any:
        return state * table.loss(params, batch)

    def scaled(params: Any, batch: Any, loss_scale: float = 1.0) -> Any:
        return loss_scale * table.loss(params, batch)

    def optional(params: Any, batch: Any, state: float = 1.0) -> Any:
        return loss(params, batch, state)

    def run(fun: Any, *args: Any, **kwargs: Any) -> Any:
        return optax_sam.sam_value_and_grad(fun, SAM)(PARAMS, EXAMPLES, *args, **kwargs)[0]

    own = r"argument `{0}` of its own, .* by position, or bind it: `functools.partial\(loss, {0}=\.\.\.\)`"
    for fun, wrong in (
        (loss, {"state": 2.0}),
        (loss, {"state": state}),
        (optional, {"state": 2.0}),
        (scaled, {"state": state, "loss_scale": 2.0}),
    ):
        name = "loss_scale" if fun is scaled else "state"
        with pytest.raises(TypeError, match=own.format(name)):
            run(fun, **wrong)
    once = run(table.loss, state=state)
    assert (
        run(loss, 2.0, state=state)
        == run(optional, 2.0, state=state)
        == run(scaled, 2.0, state=state)
        == 2 * once
    )
    assert run(functools.partial(loss, state=2.0), state=state) == 2 * once
    assert run(functools.partial(scaled, loss_scale=2.0), state=state, loss_scale=4.0) == 2 * once
    assert run(optional, state=state) == run(scaled, state=state) == once
    assert run(scaled, 2.0, state=state, loss_scale=4.0) == 2 * once


def begins_with_rho(row: Row) -> bool:
    """Whether the radius is the first argument of its constructor."""
    return next(iter(inspect.signature(row.constructor).parameters)) == "rho"


@all_rows(*[row for row in table.VARIANTS if not row.whole_optimizer and begins_with_rho(row)])
def test_the_form_of_contrib_sam(row: Row) -> None:
    base = optax.sgd(0.1)
    ours = rf"after the variant in a chain: `optax.chain\({row.constructor.__name__}\(rho=0.05\),"
    for args, kwargs in (
        ((base,), {}),
        ((base, base), {"sync_period": 2}),
        ((), {"optimizer": base, "adv_optimizer": base}),
    ):
        with pytest.raises(TypeError, match=rf"the form of `optax.contrib.sam\(optimizer, .*{ours}"):
            row.constructor(*args, **kwargs)


# Outside of `jit`.


COMPILED: list[str] = []  # What was compiled since the last `clear`.


def listen(event: str, duration: float, **kwargs: Any) -> None:
    del duration
    if "backend_compile" in event:
        COMPILED.append(str(kwargs))


jax.monitoring.register_event_duration_secs_listener(listen)

IN_PARTS: dict[str, dict[str, Any]] = {
    "microbatches": {"microbatch_size": 2},
    "loop": {"num_shards": 2, "shard_mode": "loop"},
    "rounds of microbatches": {"num_shards": 4, "shard_mode": 2, "microbatch_size": 1},
}
VECTOR, FOUR = jnp.array([1.0, 2.0]), jnp.arange(4.0)


def quartic(w: Any, batch: Any) -> Any:
    return jnp.mean(batch) * jnp.sum(w**4)


@all_rows(*table.VARIANTS)
def test_nothing_is_compiled_after_the_first_calls(row: Row) -> None:
    """Operation by operation, whatever the loss and the parts of the batch."""
    variant, tx = row.optimizer()
    state, period = tx.init(VECTOR), max(2, len(row.evaluations))
    is_first = row is tiers.cover(table.VARIANTS, "kinds")[0]
    how = IN_PARTS if is_first else {"": IN_PARTS["rounds of microbatches"]}
    if row.evaluates_by_data:
        how = {"": {"num_shards": 2}}
    for options in ({}, *how.values()):
        value_and_grad = optax_sam.sam_value_and_grad(
            quartic, variant, batch_argnums=1, return_metrics=True, **options
        )
        for i in range(2 * period):
            if i == period:
                COMPILED.clear()
            _, grads, _ = value_and_grad(VECTOR, FOUR, state=state)
            _, state = tx.update(grads, state, VECTOR)
        assert COMPILED == []


def test_nothing_is_compiled_by_ire_after_the_first_calls() -> None:
    tx = optax_sam.ire(optax.sgd(0.1), interval=2)
    state = tx.init(PARAMS)
    for i in range(6):
        if i == 2:
            COMPILED.clear()
        _, state = tx.update(PARAMS, state, PARAMS)
    assert COMPILED == []


@pytest.mark.parametrize("how", tiers.later(IN_PARTS, ["rounds of microbatches"]))
def test_loops_outside_of_jit_leave_the_functions_of_a_user_compiled(how: str) -> None:
    """And where a user switched `jit` off, it stays off."""
    traced = []

    @jax.jit
    def network(w: Any, batch: Any) -> Any:
        traced.append(isinstance(batch, jax.core.Tracer))
        return quartic(w, batch)

    value_and_grad = optax_sam.sam_value_and_grad(network, SAM, batch_argnums=1, **IN_PARTS[how])
    state = CHAIN.init(VECTOR)
    found = value_and_grad(VECTOR, FOUR, state=state)
    assert len(traced) <= 2  # Once, and once to find the shapes.
    compiled = jax.jit(lambda w, state: value_and_grad(w, FOUR, state=state))(VECTOR, state)
    chex.assert_trees_all_close(found, compiled, rtol=1e-5, atol=1e-6)
    traced.clear()
    with jax.disable_jit():
        value_and_grad(VECTOR, FOUR, state=state)
    assert len(traced) >= 4


# Masks.


def of_bias(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: "bias" in str(path), params)


def test_masks_under_inject_hyperparams() -> None:
    """Optax takes a function for a schedule: refused in words. Named as static it is the mask."""
    masked = optax_sam.ascent.masked(of_bias)
    mine = {"asam": optax_sam.asam(0.1, adaptive_mask=of_bias), "sam": optax_sam.sam(0.1, ascent=masked)}

    def inject(constructor: Any, *static_args: str, **kwargs: Any) -> Any:
        return optax.inject_hyperparams(constructor, static_args=static_args)(rho=0.1, **kwargs)

    def factory(rho: Any, mask: Any) -> Any:
        return optax_sam.sam(rho, ascent=optax_sam.ascent.masked(mask))

    with pytest.raises(TypeError, match=r'for a schedule, name it in .* `static_args=\("ascent",\)`'):
        inject(optax_sam.sam, ascent=masked).init(PARAMS)
    for tx, name in (
        (inject(optax_sam.asam, adaptive_mask=of_bias), "adaptive_mask"),
        (inject(factory, mask=of_bias), "mask"),
    ):
        words = rf'`{name}` gives a boolean: it is a mask, .* `static_args=\("{name}",\)`'
        with pytest.raises(ValueError, match=words):
            evaluate(mine["asam"], tx.init(PARAMS))
    for tx, name in (
        (inject(optax_sam.asam, "adaptive_mask", adaptive_mask=of_bias), "asam"),
        (inject(optax_sam.asam, adaptive_mask=of_bias(PARAMS)), "asam"),
        (inject(optax_sam.sam, "ascent", ascent=masked), "sam"),
        (inject(factory, "mask", mask=of_bias), "sam"),
    ):
        actual = evaluate(mine[name], tx.init(PARAMS))
        chex.assert_trees_all_close(actual, evaluate(mine[name], mine[name].init(PARAMS)), rtol=1e-6)


@pytest.mark.parametrize("rule", [optax_sam.ascent.masked, lambda mask: optax_sam.asam(adaptive_mask=mask)])
def test_what_is_no_mask(rule: Any) -> None:
    for junk in ("bias", {"layer": "bias", "scale": False}, 0.5):
        with pytest.raises(
            TypeError, match=r"mask` must be a pytree of booleans .* got .* of type (str|float) at"
        ):
            rule(junk)


def test_a_mask_that_selects_nothing() -> None:
    """A wrong name in a predicate: the step would be a plain one for two gradients."""
    nothing = jax.tree.map(lambda _: False, PARAMS)
    for mask in (
        nothing,
        lambda params: jax.tree.map(lambda _: False, params),
        {"layer": False, "scale": False},
    ):
        for rule in (optax_sam.ascent.masked(mask), optax_sam.ascent.adaptive(mask=mask)):
            variant = optax_sam.sam(0.1, ascent=rule)
            with pytest.raises(ValueError, match=r"selects nothing: .* paths are like \['layer'\]\['bias'\]"):
                evaluate(variant, variant.init(PARAMS))
    some = optax_sam.sam(0.1, ascent=optax_sam.ascent.masked(jax.tree.map(jnp.zeros_like, PARAMS)))
    evaluate(some, some.init(PARAMS))  # Of arrays the values are not looked at: they may be traced.


# Checkpoints.


def test_a_checkpoint_restored_without_a_target(tmp_path: Path) -> None:
    """Orbax returns dicts and lists then: the message names the target."""
    kinds = {(row.whole_optimizer, bool(row.memory_copies)): row for row in table.VARIANTS}
    for row in kinds.values():
        variant, tx = row.optimizer()
        state = tx.init(PARAMS)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / row.name, state)
            checkpointer.wait_until_finished()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Orbax warns that no target is given.
                raw = checkpointer.restore(tmp_path / row.name)
            restored = checkpointer.restore(tmp_path / row.name, tx.init(PARAMS))
        for lost in (raw, flax.serialization.to_state_dict(state)):
            with pytest.raises(
                ValueError, match=r"Restore it with a target, .*restore\(path, tx.init\(params\)\)`"
            ):
                evaluate(variant, lost)
        chex.assert_trees_all_equal(evaluate(variant, restored), evaluate(variant, state))


@all_rows(*table.VARIANTS)
def test_a_plain_run_goes_on_with_the_variant(row: Row, tmp_path: Path) -> None:
    """The recipe: the plain state from its checkpoint, beside a fresh one of the variant."""
    base = optax.chain(optax.clip(1.0), optax.adam(0.1))
    _, plain = base.update(PARAMS, base.init(PARAMS), PARAMS)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "plain", plain)
        checkpointer.wait_until_finished()
        opt_state = checkpointer.restore(tmp_path / "plain", base.init(PARAMS))
    if "base_optimizer" in row.kwargs:
        variant = tx = row.make(base_optimizer=base)
        opt_state = tx.init(PARAMS)._replace(memory=opt_state)
    elif row.whole_optimizer:
        return  # It keeps another memory than any other optimizer.
    else:
        variant = row.make()
        with pytest.raises(ValueError, match=r"is `\(variant.init\(params\), opt_state\)`"):
            evaluate(variant, opt_state)
        tx = optax.chain(variant, base)
        opt_state = (variant.init(PARAMS), opt_state)
    assert jax.tree.structure(opt_state) == jax.tree.structure(tx.init(PARAMS))
    _, grads = evaluate(variant, opt_state)
    _, opt_state = tx.update(grads, opt_state, PARAMS)
    assert optax.tree.get(opt_state, "ScaleByAdamState").count == 2


# Smaller ones.


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float4_e2m1fn])
@all_rows(*table.VARIANTS)
def test_params_of_eight_bits(row: Row, dtype: Any) -> None:
    params = jax.tree.map(lambda w: w.astype(dtype), PARAMS)
    words = r"params must have 16 bits or more, got dtype float\w+ at \['layer'\]\['bias'\]: keep them"
    with pytest.raises(TypeError, match=words):
        row.make().init(params)
    with pytest.raises(TypeError, match=words):
        evaluate(row.make(), row.make().init(PARAMS), params)


@pytest.mark.parametrize("options", [{}, {"return_metrics": True}, {"ascent_dtype": jnp.bfloat16}])
def test_aux_that_no_jit_returns(options: Any) -> None:
    """As `jax.value_and_grad` does inside a `jit` that does not return it."""
    odd = {
        "names": np.array(["a", "b"]),
        "when": np.datetime64("2026-01-01"),
        "what": np.array([None]),
        "text": "c",
    }

    def loss(params: Any, batch: Any) -> Any:
        return table.loss(params, batch), {**odd, "size": np.int32(len(batch)), "mean": batch.mean()}

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        value_and_grad = optax_sam.sam_value_and_grad(loss, SAM, has_aux=True, **options)
        (_, aux), *_ = value_and_grad(params, batch, state=state)
        assert all(aux[name] is odd[name] for name in odd)
        return aux["size"], aux["mean"]

    size, mean = step(PARAMS, CHAIN.init(PARAMS), EXAMPLES)
    assert size == len(EXAMPLES)
    np.testing.assert_allclose(mean, EXAMPLES.mean(), rtol=1e-5)


@all_rows(*table.VARIANTS)
def test_a_schedule_that_returns_no_scalar(row: Row) -> None:
    with pytest.raises(ValueError, match=r"A schedule must return a scalar, got an array of shape \(1,\)"):
        row.make(**{row.radius: lambda step: jnp.full((1,), 0.1) + step}).init(PARAMS)
    variant = optax_sam.gsam(0.1, alpha=lambda step: jnp.full((1,), 0.1) + step)
    state = variant.init(PARAMS)
    with pytest.raises(ValueError, match="A schedule must return a scalar"):
        variant.update(optax_sam.SAMGradients(PARAMS, PARAMS), state, PARAMS)


@pytest.mark.parametrize("jit", [False, True])
@all_rows(*table.VARIANTS)
def test_metrics_under_debug_nans(row: Row, jit: bool) -> None:
    """What was not measured is NaN, for which that switch would stop the program: infinity stands there."""
    variant, tx = row.optimizer()
    value_and_grad = optax_sam.sam_value_and_grad(quartic, variant, return_metrics=True)
    evaluate = jax.jit(lambda *args: value_and_grad(*args[:2], state=args[2])) if jit else None
    with jax.debug_nans(True):
        state = tx.init(VECTOR)
        for _ in range(2):
            _, grads, metrics = (
                evaluate(VECTOR, FOUR, state) if jit else value_and_grad(VECTOR, FOUR, state=state)
            )
            _, state = tx.update(grads, state, VECTOR)
        direct = None
        if not row.needs_values:
            direct, _ = tx.update(grads.clean, state, VECTOR, grad_fn=lambda w: jax.grad(quartic)(w, FOUR))
    assert not any(map(np.isnan, metrics))
    chex.assert_tree_all_finite((direct, metrics._replace(perturbed_loss=0.0, sharpness=0.0)))
    assert bool(jnp.isinf(metrics.sharpness)) == (
        row.evaluations[-1] == 1 or row.constructor is optax_sam.hessian_sam
    )


REMEMBERING = [row for row in table.VARIANTS if row.memory_copies]


@all_rows(*REMEMBERING)
def test_the_state_of_another_variant_with_memory(row: Row) -> None:
    """Also where it holds arrays of the same shapes."""
    for other in REMEMBERING:
        state = other.make().init(VECTOR)
        value_and_grad = optax_sam.sam_value_and_grad(quartic, row.make())
        if type(state.memory) is type(row.make().init(VECTOR).memory):
            value_and_grad(VECTOR, FOUR, state=state)
        else:
            with pytest.raises(ValueError, match="`state` does not fit the variant and the params: it holds"):
                value_and_grad(VECTOR, FOUR, state=state)


def test_a_radius_is_set_beside_params_of_that_name() -> None:
    """The form that `SAMState` documents changes nothing else."""
    params = {"rho": jnp.ones(3)}
    tx = optax.chain(SAM, optax.adam(0.1))
    state = tx.init(params)
    key = optax.tree_utils.NamedTupleKey("SAMState", "rho")
    new = optax.tree.set(state, lambda path, _: path[-1] == key, rho=0.2)
    assert new[0] == state[0]._replace(rho=0.2)
    chex.assert_trees_all_equal(new[1], state[1])
    assert "NamedTupleKey" in optax_sam.SAMState.__doc__


# What is documented because nothing can see it.


def test_the_norm_of_a_pair_counts_both() -> None:
    """Said where people look for what to log; and nothing else takes a pair for params."""
    _, grads = evaluate(SAM, CHAIN.init(PARAMS))
    both = [optax.tree.norm(g, squared=True) for g in (grads.clean, grads.perturbed)]
    np.testing.assert_allclose(optax.tree.norm(grads, squared=True), sum(both), rtol=1e-5)
    for text in (optax_sam.SAMGradients.__doc__, optax_sam.SAMMetrics.__doc__):
        assert "optax.tree.norm(grads)" in text
    with pytest.raises(
        (TypeError, ValueError),
        match=table.words_of_a_pair(r"pass it `grads\.perturbed` and `clean_updates="),
    ):
        optax.apply_updates(PARAMS, grads)
    with pytest.raises(
        (TypeError, ValueError),
        match=table.words_of_a_pair(r"pass it `grads\.perturbed` and `clean_updates="),
    ):
        optax.adam(0.1).update(grads, optax.adam(0.1).init(PARAMS), PARAMS)


@all_rows(*table.VARIANTS)
def test_an_average_by_hand_is_a_local_perturbation(row: Row) -> None:
    variant = row.make()
    state, halves = variant.init(VECTOR), FOUR.reshape(2, 2)

    def loss(w: Any, batch: Any) -> Any:
        return jnp.mean(jnp.tanh(batch + w[0]) ** 2 * jnp.exp(w[1] * batch))

    def step(batch: Any, **options: Any) -> Any:
        output = optax_sam.sam_value_and_grad(loss, variant, **options)(VECTOR, batch, state=state)
        return output if options else jax.lax.pmean(output, "device")

    by_hand = jax.vmap(step, axis_name="device")(halves)
    local = jax.vmap(functools.partial(step, axis_name="device", perturbation="local"), axis_name="device")(
        halves
    )
    if row.clean_at_params:  # Else each device has noise of its own, where it is told of the others.
        chex.assert_trees_all_close(by_hand, local, rtol=1e-5, atol=1e-6)
    # Python 3.13 takes the indentation out of docstrings.
    assert 'you get `perturbation="local"`' in " ".join(optax_sam.sam_value_and_grad.__doc__.split())


# What Optax asks of every optimizer, asked of every constructor.


def shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    **{row.name: lambda row=row: row.optimizer()[1] for row in table.VARIANTS},
    "shifted_msam": lambda: optax_sam.shifted_msam(optax.sgd(0.1, momentum=0.9)),
    "ire": lambda: optax_sam.ire(optax.chain(SAM, optax.adam(0.1))),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_init_of_abstract_params(name: str) -> None:
    """State is laid out, and restored, before there are params."""
    tx = OPTIMIZERS[name]()
    for dtype in (jnp.float32, jnp.bfloat16):
        params = jax.tree.map(lambda x, dtype=dtype: jnp.asarray(x, dtype), PARAMS)
        state = tx.init(params)
        assert shapes(jax.eval_shape(tx.init, params)) == shapes(state)
        assert shapes(tx.init(shapes(params))) == shapes(state)


def step_of(row: Row, loss: Any = table.loss) -> tuple[Any, Any]:
    variant, tx = row.optimizer()
    value_and_grad = optax_sam.sam_value_and_grad(loss, variant)

    def step(params: Any, state: Any, batch: Any) -> Any:
        _, grads = value_and_grad(params, batch, state=state)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step, tx


@all_rows(*table.VARIANTS)
def test_params_of_mixed_dtypes(row: Row) -> None:
    """Nothing that a step returns differs in type from what went in, so that it can be a loop's body."""
    step, tx = step_of(row)
    with jax.enable_x64(True):
        dtypes = {"kernel": jnp.bfloat16, "bias": jnp.float32, "scale": jnp.float64}
        params = {
            "layer": {name: x.astype(dtypes[name]) for name, x in PARAMS["layer"].items()},
            "scale": PARAMS["scale"].astype(dtypes["scale"]),
        }
        state = tx.init(params)
        jax.make_jaxpr(lambda p, s: jax.lax.fori_loop(0, 3, lambda _, carry: step(*carry, EXAMPLES), (p, s)))(
            params, state
        )
        after, _ = step(params, state, EXAMPLES)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, params)
        chex.assert_tree_all_finite(after)


@all_rows(*table.VARIANTS)
def test_params_without_a_leaf(row: Row) -> None:
    """A network of which nothing is trained."""
    step, tx = step_of(row, lambda params, batch: jnp.mean(batch) + 0.0 * len(params))
    for params in ({}, {"a": None, "b": {}}):
        after, _ = step(params, tx.init(params), EXAMPLES)
        assert after == params


@all_rows(*table.VARIANTS)
def test_the_state_lies_where_params_lie(row: Row) -> None:
    """On an explicit mesh every type says where its array lies: from init on, and after a step."""
    step, tx = step_of(row)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        split = {"layer": {"kernel": jax.P(None, "x"), "bias": jax.P("x")}, "scale": jax.P()}
        params = jax.tree.map(jax.device_put, PARAMS, split)
        state = tx.init(params)
        after, new_state = jax.eval_shape(step, params, state, EXAMPLES)
        where = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (params, state))
        assert jax.tree.map(lambda x: x.sharding.spec, (after, new_state)) == where
        kernels = [x for x in jax.tree.leaves(state) if x.shape == (3, 4)]
        assert len(kernels) >= row.memory_copies
        assert all(jax.typeof(x).sharding.spec == jax.P(None, "x") for x in kernels)


@all_rows(*table.VARIANTS)
def test_replace_keeps_the_rule(row: Row) -> None:
    variant = row.make()
    other = variant._replace(init=lambda params: variant.init(params))
    assert type(other) is type(variant)
    assert vars(other) == vars(variant)
    chex.assert_trees_all_equal(
        optax_sam.sam_value_and_grad(quartic, other)(VECTOR, FOUR, state=other.init(VECTOR)),
        optax_sam.sam_value_and_grad(quartic, variant)(VECTOR, FOUR, state=variant.init(VECTOR)),
    )


@all_rows(*table.VARIANTS)
def test_pairs_are_copied_and_pickled(row: Row) -> None:
    variant = row.make()
    _, grads = optax_sam.sam_value_and_grad(quartic, variant)(VECTOR, FOUR, state=variant.init(VECTOR))
    for other in (copy.copy(grads), copy.deepcopy(grads), pickle.loads(pickle.dumps(grads))):
        assert type(other) is optax_sam.SAMGradients
        assert vars(other.made_by) == vars(grads.made_by)
        chex.assert_trees_all_equal(other, grads)
        variant.update(other, variant.init(VECTOR), VECTOR)


@all_rows(*table.VARIANTS)
def test_typed_keys_in_the_state(row: Row) -> None:
    """Of a link that draws: they can be neither multiplied nor compared with NaN."""
    noise = optax.add_noise(0.1, 0.5, key=jax.random.key(0))
    variant, tx = row.optimizer(optax.chain(noise, optax.sgd(0.1)))
    if row.whole_optimizer:
        tx = optax.chain(variant, noise)
    for wrapped in (tx, optax.apply_if_finite(tx, 3)):
        state = wrapped.init(VECTOR)
        _, grads = optax_sam.sam_value_and_grad(quartic, variant)(VECTOR, FOUR, state=state)
        updates, state = by_clean_updates(wrapped, grads, state, VECTOR)
        keys = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
        assert len(keys) == 1
        assert keys[0] != jax.random.key(0)
        chex.assert_tree_all_finite(updates)


@all_rows(*table.VARIANTS)
def test_extra_args_that_a_link_requires(row: Row) -> None:
    """They go to the links after the variant, and to the base optimizer of a whole one."""
    plateau = optax.contrib.reduce_on_plateau(patience=1, factor=0.5)
    seen = []

    def update(updates: Any, state: Any, params: Any = None, *, temperature: float, **extra_args: Any) -> Any:
        del params, extra_args
        seen.append(temperature)
        return updates, state

    needs = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    base = optax.chain(needs, optax.adam(0.1))
    if "base_optimizer" in row.kwargs:
        variant = row.make(base_optimizer=base)
        tx = optax.chain(variant, plateau)
    else:
        variant, tx = row.optimizer(optax.chain(base, plateau))
        tx = optax.chain(variant, needs, plateau) if row.whole_optimizer else tx
    state = tx.init(VECTOR)
    value, grads = optax_sam.sam_value_and_grad(quartic, variant)(VECTOR, FOUR, state=state)
    tx.update(grads, state, VECTOR, value=value, temperature=3.0)
    assert seen == [3.0]
    with pytest.raises(TypeError, match="temperature"):
        tx.update(grads, state, VECTOR, value=value)


def test_a_second_import_of_the_package() -> None:
    """As test runners and notebooks do it: both work side by side, and a step with either can be exported."""
    name = optax_sam.__name__
    first = {key: sys.modules.pop(key) for key in list(sys.modules) if key.split(".")[0] == name}
    try:
        second = importlib.import_module(name)
    finally:
        sys.modules.update(first)
    assert second is not optax_sam
    assert second.SAMState is not optax_sam.SAMState
    for package in (optax_sam, second, importlib.reload(optax_sam)):
        variant = package.looksam(0.1)
        value_and_grad = package.sam_value_and_grad(quartic, variant, return_metrics=True)

        def step(w: Any, state: Any, batch: Any, f: Any = value_and_grad, variant: Any = variant) -> Any:
            _, grads, metrics = f(w, batch, state=state)
            return variant.update(grads, state, w), grads, metrics

        arguments = VECTOR, variant.init(VECTOR), FOUR
        written = jax.export.export(jax.jit(step))(*arguments).serialize()
        chex.assert_trees_all_close(
            jax.export.deserialize(written).call(*arguments), step(*arguments), rtol=1e-5
        )
