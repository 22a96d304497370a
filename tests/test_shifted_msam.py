"""`shifted_msam` is `msam` on perturbed params, for loops that know nothing of SAM."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import table
from jax.flatten_util import ravel_pytree

import optax_sam

BASES = {
    "sgd": optax.sgd(0.05, momentum=0.9),
    "nesterov": optax.sgd(0.05, momentum=0.9, nesterov=True),
    "adamw": optax.adamw(0.05, weight_decay=0.1),
}
BATCHES = [table.batch(seed=seed) for seed in range(6)]
RADIUS = optax.linear_schedule(0.0, 0.25, 4)  # Exact in float32.


def in_double(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


def plain_loop(tx, params, batches):
    """The params of the loop and the unperturbed ones after each step, and the last state."""

    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state, batch):
        updates, state = tx.update(jax.grad(table.loss)(params, batch), state, params)
        params = optax.apply_updates(params, updates)
        return params, state, optax_sam.msam_eval_params(state, params)

    state, points, kept = tx.init(params), [], []
    for batch in batches:
        params, state, unperturbed = step(params, state, batch)
        points.append(params)
        kept.append(unperturbed)
    return points, kept, state


def msam_loop(tx, params, batches):
    """The params after each step of `msam`, and where each gradient was taken."""
    value_and_grad = jax.jit(optax_sam.sam_value_and_grad(table.loss, tx))
    state, kept = tx.init(params), []
    for batch in batches:
        _, grads = value_and_grad(params, batch, state=state)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        kept.append(params)
    return kept


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("rho", [0.1, RADIUS], ids=["number", "schedule"])
@pytest.mark.parametrize("base", BASES)
def test_the_trajectory_is_that_of_msam(base, rho):
    params, batches = in_double(table.params()), in_double(BATCHES)
    points, kept, state = plain_loop(optax_sam.shifted_msam(BASES[base], rho), params, batches)
    expected = msam_loop(optax_sam.msam(BASES[base], rho), params, batches)
    chex.assert_trees_all_close(kept, expected, rtol=1e-11, atol=1e-12)
    # And the loop's own params are as far from those as the radius says.
    distances = [
        jnp.linalg.norm(ravel_pytree(p)[0] - ravel_pytree(k)[0]) for p, k in zip(points, kept, strict=True)
    ]
    radii = [rho if rho == 0.1 else rho(t + 1) for t in range(len(batches))]
    np.testing.assert_allclose(distances, radii, rtol=1e-7)
    np.testing.assert_allclose(state.rho, radii[-1], rtol=1e-6)


@pytest.mark.parametrize("base", BASES)
def test_without_radius_it_is_the_base_optimizer(base):
    tx, params, state = BASES[base], table.params(), BASES[base].init(table.params())
    for batch in BATCHES:
        updates, state = tx.update(jax.grad(table.loss)(params, batch), state, params)
        params = optax.apply_updates(params, updates)
    points, kept, _ = plain_loop(optax_sam.shifted_msam(tx, 0.0), table.params(), BATCHES)
    chex.assert_trees_all_close(points[-1], params, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(points, kept)


def test_what_is_kept_does_not_drift_in_float32():
    """The perturbation is subtracted as it was added, so that after many steps rounding is all there is."""
    tx = optax_sam.shifted_msam(optax.sgd(0.0, momentum=0.9), 0.1)  # Params should stay where they are.
    _, kept, _ = plain_loop(tx, table.params(), BATCHES * 50)
    chex.assert_trees_all_close(kept[-1], table.params(), atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes_are_those_of_params(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), table.params())
    points, kept, state = plain_loop(optax_sam.shifted_msam(BASES["sgd"], 0.1), params, BATCHES[:2])
    chex.assert_trees_all_equal_shapes_and_dtypes(points[-1], params)
    chex.assert_trees_all_equal_shapes_and_dtypes(kept[-1], params)
    chex.assert_tree_all_finite((points, kept, state))


def test_a_bad_gradient_spoils_no_later_step():
    tx = optax_sam.shifted_msam(BASES["adamw"], 0.1)
    params = table.params()
    state = tx.init(params)
    for bad in (jnp.nan, jnp.inf):
        _, state = tx.update(jax.tree.map(lambda w, bad=bad: jnp.full_like(w, bad), params), state, params)
        chex.assert_tree_all_finite(state)
    updates, _ = tx.update(jax.grad(table.loss)(params, BATCHES[0]), state, params)
    chex.assert_tree_all_finite(updates)


def test_inside_other_optimizers():
    """Bad steps are left out, several gradients make one step, and the radius may be injected."""
    params = table.params()
    whole = optax_sam.shifted_msam(BASES["sgd"], 0.1)
    _, expected, _ = plain_loop(whole, params, BATCHES)
    _, kept, _ = plain_loop(optax.apply_if_finite(whole, 3), params, BATCHES)
    chex.assert_trees_all_close(kept, expected, rtol=1e-5, atol=1e-6)
    twice = [batch for batch in BATCHES for _ in range(2)]
    _, kept, _ = plain_loop(optax.MultiSteps(whole, 2).gradient_transformation(), params, twice)
    chex.assert_trees_all_close(kept[1::2], expected, rtol=1e-5, atol=1e-6)

    @optax.inject_hyperparams
    def injected(rho):
        return optax_sam.shifted_msam(BASES["sgd"], rho)

    _, kept, state = plain_loop(injected(rho=0.1), params, BATCHES)
    chex.assert_trees_all_close(kept, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(optax.tree.get(state, "ShiftedMSAMState").rho, 0.1)


def test_errors():
    params = table.params()
    tx = optax_sam.shifted_msam(BASES["sgd"], 0.1)
    gradient = jax.grad(table.loss)(params, BATCHES[0])
    with pytest.raises(ValueError, match="`shifted_msam` needs the params"):
        tx.update(gradient, tx.init(params))
    with pytest.raises(TypeError, match=r"takes one gradient.*optax_sam\.msam"):
        tx.update(optax_sam.SAMGradients(gradient, gradient), tx.init(params), params)
    with pytest.raises(ValueError, match="`base_optimizer` must keep one momentum"):
        optax_sam.shifted_msam(optax.sgd(0.1)).init(params)
    with pytest.raises(TypeError, match="`base_optimizer` must be an Optax optimizer"):
        optax_sam.shifted_msam(0.1)
    with pytest.raises(ValueError, match="`rho` must be"):
        optax_sam.shifted_msam(BASES["sgd"], -0.1)
    with pytest.raises(ValueError, match="one with 0"):
        optax_sam.msam_eval_params(BASES["sgd"].init(params), params)


ANY_BASE = {
    "muon": lambda: optax.contrib.muon(0.05),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(0.05),
    "adamw": lambda: optax.adamw(0.05, weight_decay=0.1),
    "lion": lambda: optax.lion(0.01),
    "without momentum": lambda: optax.sgd(0.1),
    "partition": lambda: optax.partition(
        {"a": optax.adam(0.05), "b": optax.sgd(0.1)}, {"layer": "a", "scale": "b"}
    ),
}


@pytest.mark.parametrize("name", ANY_BASE)
def test_along_the_update_of_any_optimizer(name):
    """The point of a step lies rho further along the update before: against a walk that is written out."""
    base = ANY_BASE[name]()
    tx = optax_sam.msam(base, 0.3, along="update")
    value_and_grad = optax_sam.sam_value_and_grad(table.loss, tx)
    params = expected = table.params()
    state, base_state, last = tx.init(params), base.init(params), None
    for seed in range(4):
        batch = table.batch(seed=seed)
        value, grads = value_and_grad(params, batch, state=state)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        point = expected
        if last is not None:
            length = np.sqrt(sum(np.sum(np.square(u)) for u in jax.tree.leaves(last)))
            point = jax.tree.map(lambda w, u, size=length: w + 0.3 * u / size, expected, last)
        want, gradient = jax.value_and_grad(table.loss)(point, batch)
        last, base_state = base.update(gradient, base_state, expected)
        expected = optax.apply_updates(expected, last)
        np.testing.assert_allclose(value, want, rtol=1e-5)
        chex.assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-6)


def test_along_the_last_update_that_was_none_of_zeros():
    """`optax.MultiSteps` updates by zero while it accumulates."""
    base = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    tx = optax_sam.msam(base, 0.3, along="update")
    params = table.params()
    state, last = tx.init(params), None
    for seed in range(5):
        _, grads = optax_sam.sam_value_and_grad(table.loss, tx)(params, table.batch(seed=seed), state=state)
        updates, state = tx.update(grads, state, params)
        last = updates if any(bool(jnp.any(u != 0)) for u in jax.tree.leaves(updates)) else last
        if last is not None:
            chex.assert_trees_all_close(state.memory.update, last)
    assert last is not None
    with pytest.raises(ValueError, match="`along` must be one of 'momentum', 'update'"):
        optax_sam.msam(optax.sgd(0.1, momentum=0.9), along="gradient")
