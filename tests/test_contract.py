"""What every variant must be: a good citizen of Optax and of JAX's transformations."""

import collections
import copy
import dataclasses
import functools
import inspect
import pickle
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import table
from jax.flatten_util import ravel_pytree
from table import ROWS, Row

import optax_sam
from optax_sam._loss import Loss, Pass, Peers

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


@functools.cache
def walk(row: Row) -> Any:
    """Six steps of a row in the one program that a user compiles, and how often it was traced for them."""
    traces: collections.Counter[str] = collections.Counter()

    def loss(params: Any, batch: Any) -> Any:
        traces["loss"] += 1
        return table.loss(params, batch)

    step, tx = row.train_step(loss)

    @jax.jit
    def counted(params: Any, state: Any, batch: Any) -> Any:
        traces["step"] += 1
        return step(params, state, batch)

    params, state, taken = table.params(), tx.init(table.params()), []
    for i in range(6):
        params, state, value = counted(params, state, table.batch(seed=i))
        taken.append((params, state, value))
    return counted, taken, dict(traces)


def after_three_steps(row: Row) -> Any:
    """The params in which every way to write the step of a row must end."""
    _, taken, _ = walk(row)
    return taken[2][0]


@every_row
def test_traces_once(row: Row) -> None:
    """One trace of the step in six calls, and one trace of the loss in it, however often it is evaluated."""
    _, _, traces = walk(row)
    assert traces == {"step": 1, "loss": 1}


@every_row
def test_scan_equals_the_loop(row: Row) -> None:
    step, taken, _ = walk(row)
    tx = row.optimizer()[1]

    @jax.jit
    def scanned(params: Any, state: Any, batches: Any) -> Any:
        def body(carry: Any, batch: Any) -> Any:
            *carry, value = step(*carry, batch)
            return tuple(carry), value

        return jax.lax.scan(body, (params, state), batches)

    batches = jnp.stack([table.batch(seed=i) for i in range(6)])
    (params, _), values = scanned(table.params(), tx.init(table.params()), batches)
    chex.assert_trees_all_close(params, taken[-1][0], rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(values[-1], taken[-1][2], rtol=2e-4)


@every_row
@pytest.mark.usefixtures("in_float64")
def test_eager_and_compiled_agree(row: Row) -> None:
    """With arrays of JAX and of NumPy; in float64, as programs that are fused differently round differently,
    and a finite difference shows it a hundredfold."""
    step, tx = row.train_step()
    params, batch = table.params(jnp.float64), table.batch(dtype=jnp.float64)
    given = params, tx.init(params), batch
    expected = step(*given)
    for found in (jax.jit(step)(*given), step(*jax.tree.map(np.asarray, given))):
        chex.assert_trees_all_close(found, expected, rtol=1e-9, atol=1e-11)


@every_row
def test_evaluations(row: Row) -> None:
    """Gradients that were really evaluated, counted while the compiled program runs."""
    count = []

    @jax.custom_jvp
    def counted(x: jax.Array) -> jax.Array:
        return x

    @counted.defjvp
    def counted_jvp(primals: Any, tangents: Any) -> Any:
        jax.debug.callback(lambda: count.append(1))
        return primals[0], tangents[0]

    def loss(params: Any, batch: Any) -> Any:
        return counted(table.loss(params, batch))

    step, tx = row.train_step(loss)
    jitted = jax.jit(step)
    params = table.params()
    state = tx.init(params)
    seen = []
    for i in range(8 if row.evaluates_by_data else 2 * len(row.evaluations)):
        params, state, _ = jitted(params, state, table.batch(seed=i))
        jax.effects_barrier()
        seen.append(len(count))
        count.clear()
    if row.evaluates_by_data:
        assert set(seen) == set(row.evaluations)
    else:
        assert tuple(seen) == 2 * row.evaluations


@every_row
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_structure_shape_and_dtype(row: Row, dtype: Any) -> None:
    variant, _ = row.optimizer()
    params = table.params(dtype)
    before = jax.tree.map(jnp.copy, params)
    state = variant.init(params)
    batch = table.batch(dtype=dtype)
    value_and_grad = optax_sam.sam_value_and_grad(table.loss, variant, return_metrics=True)
    value, grads, metrics = value_and_grad(params, batch, state=state)
    direction, new_state = variant.update(grads, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads.clean, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads.perturbed, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(direction, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    chex.assert_trees_all_equal(params, before)
    chex.assert_tree_all_finite((direction, new_state))
    assert value.dtype == dtype
    assert all(x.dtype == jnp.float32 and x.shape == () for x in metrics)
    if not row.whole_optimizer:  # Whose base optimizer keeps the dtypes that it likes.
        memory = [x for x in jax.tree.leaves(new_state.memory) if jnp.issubdtype(x.dtype, jnp.floating)]
        assert all(x.dtype == jnp.float32 for x in memory)


DISPLACED = [row for row in ROWS if row.clean_at_params and not row.product]


@pytest.mark.parametrize("row", DISPLACED, ids=lambda row: row.name)
def test_points_in_half_precision_are_rounded_once(row: Row) -> None:
    """The first perturbed point of params in bfloat16 is that of the same params in float32, rounded: had the
    perturbation been rounded before it was added, some of its 4,096 entries would differ."""
    # An optimizer whose first update is exact in both.
    base = {"base_optimizer": optax.sgd(0.5, momentum=0.5)} if "base_optimizer" in row.kwargs else {}
    variant = row.make(**{row.radius: 5.0}, **base)
    params, gradient = (jax.random.normal(jax.random.key(i), (4096,), jnp.bfloat16) for i in range(2))

    def first_displaced(dtype: Any) -> Any:
        start = params.astype(dtype)
        points: list[Any] = []

        def pass_at(w: Any, _: Any) -> Pass:
            points.append(w)
            return Pass(jnp.zeros(()), gradient.astype(dtype))  # Exact in both.

        state = variant.init(start)
        for _ in range(2):  # Some climb along what they remember.
            gradients = variant.evaluate(Loss(start, pass_at, pass_at, Peers()), state).gradients
            _, state = variant.update(gradients, state, start)
        return next((point for point in points if np.any(point != start)), start)

    rounded, exact = first_displaced(jnp.bfloat16), first_displaced(jnp.float32)
    assert rounded.dtype == jnp.bfloat16
    expected = np.asarray(exact).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(rounded), expected)
    if row is table.first():
        start = np.asarray(params, np.float32)
        twice = start + (np.asarray(exact) - start).astype(jnp.bfloat16).astype(np.float32)
        assert np.sum(twice.astype(jnp.bfloat16) != expected) > 20


@every_row
def test_memory(row: Row) -> None:
    """As many copies of the params as the row says, and no hidden ones."""
    params = table.params()
    state = row.make().init(params)
    size = sum(x.size for x in jax.tree.leaves(params))
    held = sum(x.size for x in jax.tree.leaves(state.memory))
    assert held == row.memory_copies * size + row.memory_scalars
    assert state.step.dtype == jnp.int32
    assert state.rho.dtype == jnp.float32


@every_row
def test_zero_gradient(row: Row) -> None:
    """No NaN at a point where nothing moves."""
    step, tx = row.train_step(lambda params, batch: 0.0 * table.loss(params, batch))
    params, state, _ = table.train(step, tx, 3)
    chex.assert_tree_all_finite((params, state))


@every_row
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_bad_gradient_spoils_one_step_only(row: Row, bad: float) -> None:
    """The memory outlives a step whose gradient is not finite: those entries keep what they were."""
    variant = row.make()
    value_and_grad = optax_sam.sam_value_and_grad(table.loss, variant)
    params = table.params()
    _, state = variant.update(
        value_and_grad(params, table.batch(), state=variant.init(params))[1], variant.init(params), params
    )
    spoiled = table.batch(seed=2).at[0, 0].set(bad)
    _, grads = value_and_grad(params, spoiled, state=state)
    assert not all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(grads))
    _, after = variant.update(grads, state, params)
    chex.assert_tree_all_finite(after)
    bad_entries = ~jnp.isfinite(ravel_pytree(grads.perturbed)[0])
    old, new = (
        ravel_pytree(s.memory)[0][: row.memory_copies * bad_entries.size].reshape(
            row.memory_copies, bad_entries.size
        )
        for s in (state, after)
    )
    np.testing.assert_array_equal(old[:, bad_entries], new[:, bad_entries])
    _, grads = value_and_grad(params, table.batch(seed=3), state=after)
    direction, last = variant.update(grads, after, params)
    chex.assert_tree_all_finite((grads, direction, last))


@every_row
def test_doors(row: Row) -> None:
    """The pair, updates like params with `clean_updates=`, a mapping: bit for bit (`grad_fn=`: test_core)."""
    variant, tx = row.optimizer()
    params = table.params()
    state = tx.init(params)
    _, grads = optax_sam.sam_value_and_grad(table.loss, variant)(params, table.batch(), state=state)
    first = tx.update(grads, state, params)
    second = tx.update(grads.perturbed, state, params, clean_updates=grads.clean, statistics=grads.statistics)
    chex.assert_trees_all_equal(first, second)
    mapping = {"clean": grads.clean, "perturbed": grads.perturbed, "statistics": grads.statistics}
    chex.assert_trees_all_equal(first, tx.update(mapping, state, params))
    extra = tx.update(grads, state, params, value=1.0, something_else="ignored")
    chex.assert_trees_all_equal(first, extra)


@every_row
def test_inject_hyperparams(row: Row) -> None:
    """The same numbers with all hyperparameters in the state, and a radius that a user can change there."""
    variant = row.make()
    injected = optax.inject_hyperparams(row.constructor, static_args=row.static_args)(**row.kwargs)
    tx = injected if row.whole_optimizer else optax.chain(injected, optax.sgd(0.01, momentum=0.9))
    value_and_grad = optax_sam.sam_value_and_grad(table.loss, variant, return_metrics=True)

    @jax.jit
    def injected_step(params: Any, state: Any, batch: Any) -> Any:
        _, grads, metrics = value_and_grad(params, batch, state=state)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, metrics

    params, state, metrics = table.train(injected_step, tx, 3)
    chex.assert_trees_all_close(params, after_three_steps(row), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics.rho, row.kwargs[row.radius], rtol=1e-6)
    state = optax.tree.set(state, **{row.radius: jnp.asarray(0.02)})
    _, state, metrics = injected_step(params, state, table.batch())
    _, _, later = injected_step(params, state, table.batch())
    np.testing.assert_allclose(later.rho, 0.02, rtol=1e-6)
    # At once, and not only after an update.
    np.testing.assert_allclose(metrics.rho, 0.02, rtol=1e-6)


@every_row
def test_multi_steps_after_the_variant(row: Row) -> None:
    """`chain(variant, MultiSteps(base, 2))` applies the mean direction of two steps at the same params."""
    if row.whole_optimizer:
        tx = optax.MultiSteps(row.make(), 2).gradient_transformation()
        state = tx.init(table.params())
        with pytest.raises(ValueError, match=r"`optax.MultiSteps` around a sharpness-aware variant"):
            optax_sam.sam_value_and_grad(table.loss, row.make())(table.params(), table.batch(), state=state)
        return
    step, tx = row.train_step(base=optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation())
    params = table.params()
    once, state, _ = step(params, tx.init(params), table.batch(seed=0))
    chex.assert_trees_all_equal(once, params)
    twice, _, _ = step(once, state, table.batch(seed=1))
    variant = row.make()
    state, directions = variant.init(params), []
    for i in range(2):
        _, grads = optax_sam.sam_value_and_grad(table.loss, variant)(params, table.batch(seed=i), state=state)
        direction, state = variant.update(grads, state, params)
        directions.append(direction)
    expected = jax.tree.map(lambda w, a, b: w - 0.1 * (a + b) / 2, params, *directions)
    chex.assert_trees_all_close(twice, expected, rtol=1e-5, atol=1e-6)


@every_row
def test_map_params(row: Row) -> None:
    """`optax.tree.map_params` reaches what is shaped like params, and nothing else."""
    tx = row.optimizer()[1]
    state = tx.init(table.params())
    marked = optax.tree.map_params(tx, lambda x: jnp.full_like(x, 7.0), state)
    found = optax.tree.get(marked, "SAMState")
    assert found.step == 0
    chex.assert_trees_all_equal(found.rho, optax.tree.get(state, "SAMState").rho)
    reached = [bool(jnp.all(x == jnp.full_like(x, 7.0))) for x in jax.tree.leaves(found.memory)]
    assert sum(reached) >= row.memory_copies * len(jax.tree.leaves(table.params()))
    assert all(reached) or row.memory_scalars


@every_row
def test_state_is_found_in_wrappers(row: Row) -> None:
    """However deep the state lies, the numbers are those of the bare state."""
    variant, tx = row.optimizer()
    params = table.params()
    value_and_grad = optax_sam.sam_value_and_grad(table.loss, variant)
    expected = value_and_grad(params, table.batch(), state=variant.init(params))
    wrappers = [
        optax.chain(optax.chain(optax.chain(tx, optax.clip_by_global_norm(1e9)))),
        optax.named_chain(("variant", variant), ("rest", optax.scale(0.5))),
        optax.apply_if_finite(tx, 3),
        optax.masked(tx, jax.tree.map(lambda _: True, params)),
        optax.partition({"all": tx}, jax.tree.map(lambda _: "all", params)),
    ]
    for wrapper in wrappers:
        chex.assert_trees_all_equal(
            value_and_grad(params, table.batch(), state=wrapper.init(params)), expected
        )


@every_row
def test_vmap_over_seeds_and_over_rho(row: Row) -> None:
    """An ensemble in one program."""
    many = jax.vmap(lambda seed: table.params(seed=seed))(jnp.arange(3))
    radii = jnp.array([0.01, 0.05, 0.2])

    def one(params: Any, rho: Any) -> Any:
        variant, tx = row.optimizer(**{row.radius: rho})
        _, grads = optax_sam.sam_value_and_grad(table.loss, variant)(
            params, table.batch(), state=tx.init(params)
        )
        return tx.update(grads, tx.init(params), params)[0]

    together = jax.vmap(one)(many, radii)
    for i in range(3):
        alone = one(jax.tree.map(lambda x, i=i: x[i], many), radii[i])
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], together), alone, rtol=1e-4, atol=1e-5)


@every_row
def test_radius_of_a_schedule(row: Row) -> None:
    """The schedule is evaluated at the variant's own step, without a lag."""
    row_kwargs = {row.radius: lambda step: 0.01 * (step + 1)}
    variant, tx = row.optimizer(**row_kwargs)
    value_and_grad = optax_sam.sam_value_and_grad(table.loss, variant, return_metrics=True)
    params = table.params()
    state = tx.init(params)
    for i in range(3):
        _, grads, metrics = value_and_grad(params, table.batch(), state=state)
        np.testing.assert_allclose(metrics.rho, 0.01 * (i + 1), rtol=1e-6)
        _, state = tx.update(grads, state, params)


@pytest.mark.by_capability  # Three programs for each row, and one mechanism.
@every_row
def test_radius_changed_at_run_time(row: Row) -> None:
    """`optax.tree.set` changes a constant radius for good, whatever it is set to."""
    variant, tx = row.optimizer()
    value_and_grad = optax_sam.sam_value_and_grad(table.loss, variant, return_metrics=True)

    @jax.jit
    @chex.assert_max_traces(3)  # For an array, for a float and for an integer.
    def step(params: Any, state: Any) -> Any:
        _, grads, metrics = value_and_grad(params, table.batch(), state=state)
        return *tx.update(grads, state, params), metrics

    params = table.params()
    _, state, first = step(params, tx.init(params))
    np.testing.assert_allclose(first.rho, row.kwargs[row.radius], rtol=1e-6)
    for rho in (0.03, 1, np.float64(0.04), np.float32(0.02), jnp.asarray(0.05), jnp.array(0.06)):
        state = optax.tree.set(state, rho=rho)
        for _ in range(2):
            _, state, metrics = step(params, state)
            np.testing.assert_allclose(metrics.rho, rho, rtol=1e-6)
            assert optax.tree.get(state, "SAMState").rho.dtype == jnp.float32
            assert not optax.tree.get(state, "SAMState").rho.weak_type


def test_a_radius_set_as_a_number_outside_of_jit() -> None:
    """Of a schedule it lasts one step; of a constant, an array too, for good."""
    for rho, expected in ((optax.constant_schedule(0.05), 0.05), (jnp.asarray(0.05), 1.0), (0.05, 1.0)):
        variant, params = optax_sam.sam(rho), table.params()
        state = optax.tree.set(variant.init(params), rho=1)
        _, state = variant.update(optax_sam.SAMGradients(params, params), state, params)
        np.testing.assert_allclose(state.rho, expected)
        assert state.rho.dtype == jnp.float32


def test_the_rho_of_another_optimizer_is_not_the_radius() -> None:
    sam = optax_sam.sam(0.05)
    others = optax.inject_hyperparams(optax.adadelta)(learning_rate=0.1, rho=0.9)
    radii = [
        (optax.chain(sam, others), 0.05),
        (optax.chain(optax.inject_hyperparams(optax_sam.sam)(rho=0.2), others), 0.2),
    ]
    for tx, rho in radii:
        value_and_grad = optax_sam.sam_value_and_grad(table.loss, sam, return_metrics=True)
        state = tx.init(table.params())
        *_, metrics = value_and_grad(table.params(), table.batch(), state=state)
        np.testing.assert_allclose(metrics.rho, rho, rtol=1e-6)


def test_a_schedule_beside_injected_hyperparameters() -> None:
    """Named in the static arguments: in every step its own radius."""
    schedule, params = optax.linear_schedule(0.1, 0.5, 4), table.params()
    variant = optax_sam.gsam(schedule, 0.4)
    inject = optax.inject_hyperparams(optax_sam.gsam, static_args=("rho",))
    tx = optax.chain(inject(rho=schedule, alpha=0.4), optax.sgd(0.01))
    value_and_grad = optax_sam.sam_value_and_grad(table.loss, variant, return_metrics=True)
    state, radii = tx.init(params), []
    for _ in range(4):
        _, grads, metrics = value_and_grad(params, table.batch(), state=state)
        radii.append(metrics.perturbation_norm)
        _, state = tx.update(grads, state, params)
    np.testing.assert_allclose(radii, [0.1, 0.2, 0.3, 0.4], rtol=1e-5)


def test_every_radius_has_a_buffer_of_its_own() -> None:
    """A state can be donated in which a wrapper keeps the radius too, and the array of a user lives on."""
    params, rho = table.params(), jnp.asarray(0.05)
    chain = optax.chain(optax.inject_hyperparams(optax_sam.sam)(rho=0.05), optax.sgd(0.1))
    for tx in (optax.apply_if_finite(chain, 3), optax.chain(optax_sam.sam(rho), optax.sgd(0.1))):
        state = jax.jit(lambda s: jax.tree.map(jnp.copy, s), donate_argnums=0)(tx.init(params))
        _, grads = optax_sam.sam_value_and_grad(table.loss, optax_sam.sam(0.05))(
            params, table.batch(), state=state
        )
        _, state = tx.update(grads.perturbed, state, params, clean_updates=grads.clean)
        jax.jit(lambda s: jax.tree.map(jnp.copy, s), donate_argnums=0)(state)
        assert not rho.is_deleted()


def test_params_may_have_an_attribute_called_hyperparams() -> None:
    """Adam's state holds copies of them, in which `optax.inject_hyperparams` is looked for."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Model:
        w: jax.Array
        hyperparams: Any = dataclasses.field(metadata={"static": True}, default=None)

    def loss(model: Model, batch: jax.Array) -> jax.Array:
        return jnp.mean((batch @ model.w) ** 2)

    sam, batch = optax_sam.sam(0.1), jnp.ones((3, 2))
    tx = optax.chain(sam, optax.adam(0.1))
    for hyperparams in (None, ("rho",)):
        model = Model(jnp.array([1.0, 2.0]), hyperparams)
        _, grads = optax_sam.sam_value_and_grad(loss, sam)(model, batch, state=tx.init(model))
        np.testing.assert_allclose(grads.clean.w, [6.0, 6.0])


def test_memory_keeps_its_dtype() -> None:
    """Of a user's variant too, and of params of two dtypes: else a `scan` over steps is refused."""

    def descent(gradients: Any, state: Any, params: Any) -> Any:
        del params
        mean = jax.tree.map(lambda m, p: 0.9 * m + 0.1 * p, state.memory, gradients.perturbed)
        return mean, mean

    own = optax_sam.sharpness_aware(0.1, None, descent, optax.tree.zeros_like)
    with jax.enable_x64(True):
        half = {"a": jnp.ones(3, jnp.bfloat16)}
        mixed = {"a": jnp.ones(3, jnp.float32), "b": jnp.ones(2, jnp.float64)}
        for variant, params in ((own, half), (own, mixed), (optax_sam.looksam(0.1, k=2), mixed)):
            state = variant.init(params)
            for _ in range(2):
                _, new = jax.jit(variant.update)(optax_sam.SAMGradients(params, params), state, params)
                same = jax.tree.map(lambda x, y: x.dtype == y.dtype, new.memory, state.memory)
                assert all(jax.tree.leaves(same))
                state = new


@every_row
def test_copies_keep_the_rule_and_pickles_the_state(row: Row) -> None:
    variant = row.make()
    assert len(variant) == 2
    for other in (copy.copy(variant), copy.deepcopy(variant)):
        assert other.evaluate is variant.evaluate
    state = row.optimizer()[1].init(table.params())
    chex.assert_trees_all_equal(pickle.loads(pickle.dumps(state)), state)


@every_row
def test_loss_scale(row: Row) -> None:
    """Scaling the loss for the derivative, and unscaling, changes nothing, for no variant."""
    variant = row.make()
    params = table.params()
    value_and_grad = optax_sam.sam_value_and_grad(table.loss, variant)
    plain = value_and_grad(params, table.batch(), state=variant.init(params))
    scaled = value_and_grad(params, table.batch(), state=variant.init(params), loss_scale=1024.0)
    chex.assert_trees_all_close(scaled, plain, rtol=1e-5, atol=1e-6)


@every_row
def test_scale_of_the_loss(row: Row) -> None:
    """Whether the perturbation is invariant to the scale of the loss is as the row says."""
    variant = row.make()
    params = table.params()

    def perturbed(scale: float) -> Any:
        value_and_grad = optax_sam.sam_value_and_grad(lambda p, b: scale * table.loss(p, b), variant)
        _, grads = value_and_grad(params, table.batch(), state=variant.init(params))
        return jax.tree.map(lambda g: g / scale, grads.perturbed)

    a, b = jax.tree.leaves(perturbed(1.0)), jax.tree.leaves(perturbed(50.0))
    same = all(np.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(a, b, strict=True))
    assert same == row.scale_invariant


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Weights:
    kernel: Any
    bias: Any
    name: str = dataclasses.field(default="dense", metadata={"static": True})


PARAMS_OF_ANY_KIND: tuple[Any, ...] = (
    jnp.array([1.0, 2.0, 3.0]),
    [jnp.ones((0, 3)), jnp.ones((1,))],
    Weights(jnp.ones((2, 3)), (None, {"a": {}, "b": jnp.asarray(2.0)}, [1.5])),
)


@every_row
def test_works_on_all_kinds_of_pytrees(row: Row) -> None:
    """A bare array, a dataclass, tuples, None, empty trees and arrays, scalars and plain numbers."""
    variant = row.make()

    def loss(params: Any) -> Any:
        return sum(jnp.sum(jnp.sin(x) * x) for x in jax.tree.leaves(params))

    for params in PARAMS_OF_ANY_KIND:
        state, like = variant.init(params), jax.tree.map(jnp.asarray, params)
        for _ in range(2):
            _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, state=state)
            direction, state = variant.update(grads, state, params)
            chex.assert_trees_all_equal_shapes_and_dtypes(direction, like)
            chex.assert_tree_all_finite((direction, state))
            params = optax.apply_updates(params, direction)
            assert jax.tree.structure(params) == jax.tree.structure(like)


@every_row
def test_differentiable(row: Row) -> None:
    """A step can be differentiated, for learning what the step depends on."""
    step, tx = row.train_step()

    def outcome(params: Any) -> Any:
        after, _, _ = step(params, tx.init(params), table.batch())
        return table.loss(after, table.batch(seed=5))

    gradient = jax.grad(outcome)(table.params())
    chex.assert_tree_all_finite(gradient)
    assert any(bool(jnp.any(x != 0)) for x in jax.tree.leaves(gradient))


def test_keys_of_bsam() -> None:
    """An integer, a typed key and a raw key are the same seed; another seed is another noise."""
    params = table.params()

    def perturbed(key: Any) -> Any:
        variant = optax_sam.bsam(0.1, 100, key=key)
        value_and_grad = optax_sam.sam_value_and_grad(table.loss, variant)
        return value_and_grad(params, table.batch(), state=variant.init(params))[1][:3]

    seed = perturbed(3)
    chex.assert_trees_all_equal(seed, perturbed(jax.random.key(3)))
    chex.assert_trees_all_equal(seed, perturbed(jax.random.key_data(jax.random.key(3))))
    assert not np.allclose(seed[1]["scale"], perturbed(4)[1]["scale"])


SCHEDULED = [
    pytest.param(row, name, id=f"{row.name}-{name}")
    for row in ROWS
    for name in row.kwargs.keys() - {row.radius}
    if inspect.signature(row.constructor, eval_str=True).parameters[name].annotation
    in (optax.ScalarOrSchedule, optax.ScalarOrSchedule | None)
]


@pytest.mark.every_row
@pytest.mark.parametrize(("row", "name"), SCHEDULED)
def test_schedules_of_other_arguments(row: Row, name: str) -> None:
    """At every step a schedule gives what its value gives."""

    def schedule(step: Any) -> Any:
        return 0.1 + 0.2 * step

    scheduled = row.make(**{name: schedule})
    params = table.params()
    state = scheduled.init(params)
    for step in range(3):
        constant = row.make(**{name: float(schedule(step))})
        _, grads = optax_sam.sam_value_and_grad(table.loss, scheduled)(params, table.batch(), state=state)
        expected, _ = constant.update(grads, state, params)
        actual, state = scheduled.update(grads, state, params)
        chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_hessian_of_a_loss_without_forward_mode() -> None:
    """Where the exact product cannot be had, the finite difference can."""

    @jax.custom_vjp
    def cube(x: jax.Array) -> jax.Array:
        return x**3

    def backward(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return (cotangent * jax.pure_callback(lambda y: 3 * np.asarray(y) ** 2, shape, x),)

    cube.defvjp(lambda x: (cube(x), x), backward)

    def loss(params: jax.Array) -> jax.Array:
        return jnp.sum(cube(params))

    params = jnp.array([1.0, 2.0])
    exact = optax_sam.hessian_sam(0.1)
    with pytest.raises(TypeError, match="forward-mode") as error:
        optax_sam.sam_value_and_grad(loss, exact)(params, state=exact.init(params))
    assert any("difference=1e-3" in note for note in error.value.__notes__)
    variant = optax_sam.hessian_sam(0.1, difference=1e-3)
    _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, state=variant.init(params))
    gradient = 3 * np.array([1.0, 4.0])
    hessian = 6 * np.array([1.0, 2.0])
    expected = gradient + 0.1 * hessian * gradient / np.linalg.norm(gradient)
    np.testing.assert_allclose(grads.perturbed, expected, rtol=1e-3)
