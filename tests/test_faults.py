"""Faults that users and hostile tests found, each with the program in which it showed."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import optax
import pytest
import table
from table import ROWS, Row

import optax_sam

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
    with pytest.raises((TypeError, ValueError), match=r"after the variant, or pass it `grads.perturbed` and"):
        by_pair(tx, grads, state, PARAMS)
    by_clean_updates(tx, grads, state, PARAMS)


@pytest.mark.parametrize("params", [PARAMS, PARAMS["layer"]["bias"]], ids=["tree", "array"])
def test_multi_steps_is_named(params: Any) -> None:
    """Around the variant it is refused by the evaluation; who evaluates with another state is told here."""
    tx = optax.MultiSteps(CHAIN, 2)
    grads = optax_sam.SAMGradients(params, params)
    with pytest.raises(
        (TypeError, ValueError), match=r"after the variant|MultiSteps` goes around what follows"
    ):
        tx.update(grads, tx.init(params), params)


def of_layer(params: Any, batch: Any) -> Any:
    """`table.loss`, in which the scale is a constant."""
    return table.loss({**params, "scale": jax.lax.stop_gradient(params["scale"])}, batch)


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
@all_rows(*[row for row in ROWS if row.memory_copies or row.memory_scalars])
def test_masks_around_a_variant_with_memory(row: Row, door: Any) -> None:
    """What the mask hides is constant in the loss: the others train as if it were no param at all."""
    # So much data that the noise, which is drawn leaf by leaf, is below rounding.
    variant, tx = row.optimizer(**({"num_data": 2**62} if "num_data" in row.kwargs else {}))
    scale = PARAMS["scale"]
    alone = trained(
        door,
        variant,
        tx,
        lambda params, batch: table.loss({"layer": params, "scale": scale}, batch),
        PARAMS["layer"],
    )
    for wrapper in (
        optax.chain(optax.masked(tx, SOME), optax.freeze({"layer": False, "scale": True})),
        optax.partition({True: tx, False: optax.set_to_zero()}, SOME),
    ):
        together = trained(door, variant, wrapper, of_layer, PARAMS)
        chex.assert_trees_all_close(together, {"layer": alone, "scale": scale}, rtol=1e-5, atol=1e-6)


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
        with pytest.raises(
            ValueError, match=rf"`{row.constructor.__name__}` is a whole optimizer: .* another"
        ):
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


def test_identity_before_the_variant() -> None:
    """Its state is that of a clip, which would be wrong there."""
    tx = optax.chain(optax.identity(), SAM, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"`optax.identity\(\)` cannot be told from a clip: leave it out"):
        evaluate(SAM, tx.init(PARAMS))
