"""What the core promises to every variant: zero means zero, one state, three doors, a mark on the pair."""

import functools
import inspect
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import table
import tiers
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optax_sam
from optax_sam import ascent
from optax_sam._loss import Loss, Pass, Peers

every_variant = pytest.mark.parametrize("row", table.VARIANTS, ids=lambda row: row.name)
AT_ZERO = [row for row in table.ROWS if row.base_at_zero and not row.whole_optimizer]


def mesh(kind: AxisType = AxisType.Auto) -> Any:
    return jax.make_mesh((4,), ("data",), axis_types=(kind,), devices=jax.devices()[:4])


def on_devices(run: Any, how: Any) -> Any:
    """The function, inside of `shard_map` if its options name an axis."""
    if "axis_name" not in how:
        return run
    return jax.shard_map(run, mesh=mesh(), in_specs=(P(), P("data")), out_specs=P())


# Zero perturbation means zero effect.

FORMS = {
    "whole": {},
    "shards": {"num_shards": 4, "batch_argnums": 1},
    "shards in a loop": {"num_shards": 4, "shard_mode": "loop", "batch_argnums": 1},
    "microbatches": {"microbatch_size": 2, "batch_argnums": 1},
    "devices": {"axis_name": "data"},
    "devices, local": {"axis_name": "data", "perturbation": "local"},
    "devices, local, shards": {
        "axis_name": "data",
        "perturbation": "local",
        "num_shards": 2,
        "batch_argnums": 1,
    },
}


def mixed_loss(params: Any, batch: Any) -> Any:
    """Params in float32, the network in bfloat16, the loss in float32 again."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, batch))
    return table.loss(*half).astype(jnp.float32)


PRECISIONS = {
    "float32": (table.loss, jnp.float32, 1e-5),
    "bfloat16": (table.loss, jnp.bfloat16, 3e-2),
    "mixed": (mixed_loss, jnp.float32, 3e-2),
}


ZERO_AT_ONCE = {
    ("whole", "float32"),
    ("whole", "mixed"),
    ("shards in a loop", "float32"),
    ("microbatches", "bfloat16"),
    ("devices, local, shards", "float32"),
}
ZERO_OF_ALL = {("whole", "float32"), ("devices, local, shards", "float32")}
"""Of all rows with `--full`; the others of the fewest that show every capability."""


def zero_in(form: str, precision: str) -> Any:
    """A case, with its marks."""
    of_all, at_once = (form, precision) in ZERO_OF_ALL, (form, precision) in ZERO_AT_ONCE
    marks = [*[pytest.mark.by_tier] * of_all, *[pytest.mark.full] * (not at_once)]
    return pytest.param(form, precision, marks=marks)


ZERO_IN = [zero_in(form, precision) for form in FORMS for precision in PRECISIONS]


@pytest.mark.parametrize(("form", "precision"), ZERO_IN)
def test_radius_zero_is_the_base_optimizer(form: str, precision: str) -> None:
    """Rows in one program, two steps where they remember: exactly if the rule uses both gradients, else to
    rounding."""
    loss, dtype, accuracy = PRECISIONS[precision]
    how = FORMS[form]
    # Shards in a loop cannot decide alike by their gradients.
    can = [row for row in AT_ZERO if not (row.evaluates_by_data and how.get("shard_mode") == "loop")]
    rows = tiers.some(can) if (form, precision) in ZERO_OF_ALL else tiers.cover(can)

    def run(params: Any, batch: Any) -> Any:
        found = {}
        for row in rows:
            variant = row.make(**{row.radius: 0.0})
            value_and_grad = optax_sam.sam_value_and_grad(loss, variant, **how)
            state, steps = variant.init(params), []
            for _ in range(2 if row.memory_copies else 1):  # LookSAM: one that perturbs, one that reuses it.
                _, grads = value_and_grad(params, batch, state=state)
                direction, state = variant.update(grads, state, params)
                steps.append((grads.clean, direction))
            found[row.name] = steps
        return found

    params, batch = table.params(dtype), table.batch(8, dtype)
    found = jax.jit(on_devices(run, how))(params, batch)
    plain = jax.tree.map(lambda x: np.asarray(x, np.float32), jax.grad(loss)(params, batch))
    scale = max(np.max(np.abs(x)) for x in jax.tree.leaves(plain))
    for row in rows:
        for clean, direction in found[row.name]:
            close = functools.partial(chex.assert_trees_all_close, atol=accuracy * scale)
            close(jax.tree.map(lambda x: np.asarray(x, np.float32), clean), plain)
            if row.make().compares:
                chex.assert_trees_all_equal(direction, clean)
            else:
                close(*jax.tree.map(lambda x: np.asarray(x, np.float32), (direction, clean)))


def test_the_first_step_of_a_warm_up_is_the_base_optimizer() -> None:
    params, batch = table.params(jnp.bfloat16), table.batch(8, jnp.bfloat16)
    for row in tiers.cover(AT_ZERO):
        variant = row.make(**{row.radius: optax.linear_schedule(0.0, 0.1, 10)})
        state = variant.init(params)
        value_and_grad = optax_sam.sam_value_and_grad(table.loss, variant, num_shards=2, batch_argnums=1)
        _, grads = jax.jit(value_and_grad)(params, batch, state=state)
        direction, state = variant.update(grads, state, params)
        if variant.compares:
            chex.assert_trees_all_equal(direction, grads.clean)
        np.testing.assert_allclose(state.rho, 0.01, rtol=1e-6)


def test_differences_within_the_rounding_of_the_loss_are_no_direction() -> None:
    """A loss that computes in bfloat16 leaves its rounding in gradients of float32."""
    params = jnp.linspace(0.5, 1.5, 64)
    noisy = params * (1 + jnp.where(jnp.arange(64) % 2 == 0, 2.0**-8, -(2.0**-8)))
    gradients = optax_sam.SAMGradients(params, noisy)
    by_loss = {}
    for loss in (jnp.sum, lambda w: jnp.sum(w.astype(jnp.bfloat16)).astype(jnp.float32)):
        evaluated = jax.jit(optax_sam.sam_value_and_grad(lambda w, f=loss: f(w**2), optax_sam.sam(0.1)))(
            params, state=optax_sam.sam(0.1).init(params)
        )[1]
        by_loss[evaluated.made_by.precision] = gradients._replace(
            made_by=optax_sam.SAMGradients(0, 0).made_by.__class__(precision=evaluated.made_by.precision)
        )
    assert set(by_loss) == {"float32", "bfloat16"}
    for precision, is_noise in (("float32", False), ("bfloat16", True)):
        looksam = optax_sam.looksam(0.1, k=2)
        _, state = looksam.update(by_loss[precision], looksam.init(params), params)
        assert (state.memory.length == 0.0) == is_noise
        saner = optax_sam.saner(0.1, keep=0.5)
        direction, _ = saner.update(by_loss[precision], saner.init(params), params)
        assert np.array_equal(direction, noisy) == is_noise


# The pair knows who made it.


def evaluated(variant: Any, loss: Any = table.loss, **options: Any) -> Any:
    params = table.params()
    return optax_sam.sam_value_and_grad(loss, variant, **options)(
        params, table.batch(), state=variant.init(params)
    )[1]


MISMATCHES = [
    (optax_sam.gsam(), optax_sam.sam(), r"evaluated by `gsam`, and `sam` is in the optimizer"),
    (optax_sam.saner(), optax_sam.same(), r"evaluated by `saner`, and `same` is"),
    (optax_sam.sam(0.1), optax_sam.sam(0.2), r"`sam\(rho=0.1\)`, and `sam\(rho=0.2\)` is"),
    (optax_sam.looksam(k=4), optax_sam.looksam(k=2), r"`looksam\(k=4\)`, and `looksam\(k=2\)` is"),
    (optax_sam.sam(steps=2), optax_sam.sam(steps=3), r"`sam\(steps=2\)`, and `sam\(steps=3\)` is"),
    (optax_sam.asam(eta=0.0), optax_sam.asam(), r"`asam\(eta=0.0\)`, and `asam\(eta=0.01\)` is"),
    (optax_sam.sam(jnp.asarray(1.0)), optax_sam.sam(2), r"`sam\(rho=1.0\)`, and `sam\(rho=2\)` is"),
    (optax_sam.same(gains=(1, 2, 3, 4)), optax_sam.same(), r"`same\(gains=\(1, 2, 3, 4\)\)`, and"),
]


@pytest.mark.parametrize(("one", "other", "words"), MISMATCHES)
def test_pairs_of_another_variant_are_refused(one: Any, other: Any, words: str) -> None:
    tx, params = optax.chain(other, optax.sgd(0.1)), table.params()
    grads = evaluated(one)
    mapping = dict(zip(grads._fields, grads, strict=True))
    for given in (grads, mapping):
        with pytest.raises(ValueError, match=words):
            tx.update(given, tx.init(params), params)


def test_pairs_that_may_well_fit_are_taken() -> None:
    """Constants that are equal; arrays and schedules, of which nobody knows; and pairs made by hand."""
    params = table.params()
    for one, other in (
        (optax_sam.sam(1), optax_sam.sam(1.0)),
        (optax_sam.sam(0.1), optax_sam.sam(lambda _: 0.2)),
        (optax_sam.wsam(gamma=0.5), optax_sam.wsam(alpha=1.0)),
    ):
        other.update(evaluated(one), other.init(params), params)
    by_hand = optax_sam.SAMGradients(params, params)
    optax_sam.gsam().update(by_hand, optax_sam.gsam().init(params), params)
    # The mark is no obstacle to arithmetic on pairs, whoever made them.
    total = jax.tree.map(jnp.add, by_hand, evaluated(optax_sam.gsam()))
    total = jax.tree.map(jnp.add, total, evaluated(optax_sam.sam()))
    chex.assert_trees_all_equal_shapes(total.clean, params)


def test_injected_arguments_count_in_the_evaluation() -> None:
    """Whatever the bare variant beside the chain says."""
    params, batch = table.params(), table.batch()
    pairs = [
        (optax_sam.looksam, {"rho": 0.1, "k": 3}, {}),
        (optax_sam.asam, {"rho": 0.5, "eta": 1.0}, {}),
        (optax_sam.hessian_sam, {"rho": 0.1, "difference": 0.3}, {"difference": 0.01}),
        (optax_sam.friendly_sam, {"rho": 0.1, "sigma": 0.3}, {}),
    ]
    for make, injected, bare in pairs:
        tx = optax.chain(optax.inject_hyperparams(make)(**injected), optax.sgd(0.01))
        right = optax.chain(make(**injected), optax.sgd(0.01))
        runs = []
        for variant, optimizer in ((make(**bare), tx), (make(**injected), right)):
            step = jax.jit(optax_sam.sam_value_and_grad(table.loss, variant))
            state, w, seen = optimizer.init(params), params, []
            for _ in range(4):
                _, grads = step(w, batch, state=state)
                updates, state = optimizer.update(grads, state, w)
                w = optax.apply_updates(w, updates)
                seen.append(grads[:2])
            runs.append(seen)
        chex.assert_trees_all_close(*runs, rtol=1e-4, atol=1e-5)
        state = optax.tree.set(tx.init(params), **{name: jnp.asarray(x) for name, x in injected.items()})
        assert optax.tree.get(state, "hyperparams").keys() >= injected.keys()


def test_injected_steps_are_refused() -> None:
    """They decide the shape of the program."""
    tx = optax.inject_hyperparams(optax_sam.sam)(rho=0.1, steps=3)
    with pytest.raises(TypeError, match=r'`steps` decides what is evaluated.*static_args=\("steps",\)'):
        tx.init(table.params())
    optax.inject_hyperparams(optax_sam.sam)(rho=0.1).init(table.params())


TAKE_RULES = [
    row
    for row in table.VARIANTS
    if "ascent" in inspect.signature(row.constructor).parameters and not row.evaluates_by_data
]


@pytest.mark.parametrize("row", TAKE_RULES, ids=lambda row: row.name)
def test_a_random_rule_draws_anew_in_every_step(row: table.Row) -> None:
    """Also inside another rule, and always the same in the same step."""
    masks = optax_sam.ascent.masked(True, optax_sam.ascent.absolute(optax_sam.ascent.random_mask(0.5)))
    variant, params = row.make(ascent=masks), jnp.linspace(1.0, 2.0, 50)
    points: list[Any] = []

    def pass_at(w: Any, _: Any) -> Pass:
        points.append(w)
        return Pass(jnp.zeros(()), w)

    loss = Loss(params, pass_at, pass_at, Peers())
    first = variant.init(params)
    _, state = variant.update(variant.evaluate(loss, first).gradients, first, params)
    seen = []
    for step in (0, 4, 4):  # At which LookSAM too takes the second gradient.
        variant.evaluate(loss, state._replace(step=jnp.asarray(step)))
        moved = points[-1] != params
        assert 10 < np.sum(moved) < 40
        seen.append(moved)
    assert np.any(seen[0] != seen[1])
    np.testing.assert_array_equal(seen[1], seen[2])


# The third door: `grad_fn=`.


def grad_fn_of(batch: Any) -> Any:
    return lambda params: jax.grad(table.loss)(params, batch)


def compare_doors(row: table.Row, tx: Any, evaluate_with: Any = None, *, all_params: bool = False) -> None:
    """Three steps through `grad_fn=`, against the pairs of `sam_value_and_grad`."""
    variant = row.make() if evaluate_with is None else evaluate_with
    value_and_grad = optax_sam.sam_value_and_grad(table.loss, variant)
    ends = []
    for door in ("pair", "grad_fn"):

        @jax.jit
        def step(params: Any, state: Any, batch: Any, door: str = door) -> Any:
            if door == "grad_fn":
                extra = {"all_params": params} if all_params else {}
                plain = jax.grad(table.loss)(params, batch)
                updates, state = tx.update(plain, state, params, grad_fn=grad_fn_of(batch), **extra)
            else:
                _, grads = value_and_grad(params, batch, state=state)
                updates, state = tx.update(
                    grads.perturbed, state, params, clean_updates=grads.clean, statistics=grads.statistics
                )
            return optax.apply_updates(params, updates), state

        params = table.params()
        state = tx.init(params)
        for i in range(3):
            params, state = step(params, state, table.batch(seed=i))
        ends.append(params)
    chex.assert_trees_all_close(*ends, rtol=1e-4, atol=1e-5)
    start = table.params()
    assert any(np.any(x != y) for x, y in zip(jax.tree.leaves(ends[1]), jax.tree.leaves(start), strict=True))


@pytest.mark.parametrize("row", [row for row in table.VARIANTS if not row.needs_values], ids=lambda r: r.name)
def test_the_third_door(row: table.Row) -> None:
    compare_doors(row, optax.apply_if_finite(row.optimizer()[1], 3))


SAM_ROW, BASE = table.first(constructor=optax_sam.gsam), optax.sgd(0.01, momentum=0.9)
MASK = {"layer": {"kernel": True, "bias": False}, "scale": True}
LABELS = {"layer": {"kernel": "sam", "bias": "plain"}, "scale": "sam"}
GSAM = SAM_ROW.make()
WRAPPERS = {
    "named_chain": optax.named_chain(("variant", GSAM), ("base", BASE)),
    "nested": optax.chain(optax.chain(GSAM, optax.clip_by_global_norm(1.0)), BASE),
    "MultiSteps after": optax.chain(GSAM, optax.MultiSteps(BASE, 2).gradient_transformation()),
    "inject_hyperparams": optax.chain(optax.inject_hyperparams(optax_sam.gsam)(**SAM_ROW.kwargs), BASE),
    "inject_hyperparams of the chain": optax.inject_hyperparams(
        lambda rho: optax.chain(optax_sam.gsam(rho, 0.4), BASE)
    )(rho=0.1),
    "conditionally_transform": optax.chain(optax.conditionally_transform(GSAM, lambda *_: True), BASE),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_third_door_in_wrappers(name: str) -> None:
    compare_doors(SAM_ROW, WRAPPERS[name], GSAM)


@pytest.mark.parametrize(
    "row", [row for row in table.VARIANTS if not row.whole_optimizer], ids=lambda r: r.name
)
def test_the_third_door_in_masks(row: table.Row) -> None:
    """Only what the mask shows is perturbed, and the gradient is taken of all params."""
    tx, params = optax.masked(optax.chain(row.make(), BASE), MASK), table.params()
    batch = table.batch()
    plain = jax.grad(table.loss)(params, batch)
    updates, _ = tx.update(plain, tx.init(params), params, grad_fn=grad_fn_of(batch), all_params=params)
    chex.assert_trees_all_equal(updates["layer"]["bias"], plain["layer"]["bias"])  # Left alone by the mask.

    def shown(tree: Any) -> Any:
        return {"kernel": tree["layer"]["kernel"], "scale": tree["scale"]}

    def part_loss(part: Any, batch: Any) -> Any:
        whole = {"layer": {"kernel": part["kernel"], "bias": params["layer"]["bias"]}, "scale": part["scale"]}
        return table.loss(whole, batch)

    variant, part_tx = row.optimizer(BASE)
    state = part_tx.init(shown(params))
    _, grads = optax_sam.sam_value_and_grad(part_loss, variant)(shown(params), batch, state=state)
    expected, _ = part_tx.update(grads, state, shown(params))
    chex.assert_trees_all_close(shown(updates), expected, rtol=1e-4, atol=1e-6)


def test_the_third_door_in_a_partition() -> None:
    params, batch = table.params(), table.batch()
    tx = optax.partition({"sam": optax.chain(GSAM, BASE), "plain": optax.sgd(0.5)}, LABELS)
    masked = optax.masked(optax.chain(GSAM, BASE), MASK)
    plain = jax.grad(table.loss)(params, batch)
    how = {"grad_fn": grad_fn_of(batch), "all_params": params}
    updates, _ = tx.update(plain, tx.init(params), params, **how)
    expected, _ = masked.update(plain, masked.init(params), params, **how)
    chex.assert_trees_all_close(updates["scale"], expected["scale"], rtol=1e-6)
    chex.assert_trees_all_close(updates["layer"]["bias"], -0.5 * plain["layer"]["bias"], rtol=1e-6)


def test_the_third_door_says_what_it_needs() -> None:
    params, plain = table.params(), jax.grad(table.loss)(table.params(), table.batch())
    tx, masked = optax.chain(GSAM, BASE), optax.masked(optax.chain(GSAM, BASE), MASK)
    state = tx.init(params)
    with pytest.raises(
        TypeError, match=r"`grad_fn` is called with 1 argument.*`optax.contrib.sam` takes a num"
    ):
        tx.update(plain, state, params, grad_fn=lambda params, step: plain)
    with pytest.raises(TypeError, match=r"`grad_fn` must be a function, got"):
        tx.update(plain, state, params, grad_fn=plain)
    with pytest.raises(ValueError, match=r"needs the params: write `update\(grads, state, params"):
        tx.update(plain, state, grad_fn=grad_fn_of(table.batch()))
    with pytest.raises(ValueError, match=r"What `grad_fn` returns must have the structure of params"):
        tx.update(plain, state, params, grad_fn=lambda params: (plain, params))
    with pytest.raises(ValueError, match=r"all_params=params\)`, and leave out `mask_compat"):
        masked.update(plain, masked.init(params), params, grad_fn=grad_fn_of(table.batch()))


@pytest.mark.parametrize("row", [row for row in table.ROWS if row.needs_values], ids=lambda row: row.name)
def test_a_door_without_values_is_refused(row: table.Row) -> None:
    variant, params = row.make(), table.params()
    state, words = variant.init(params), r"needs the loss .*pass `update` the pair of `sam_value_and_grad`"
    with pytest.raises(TypeError, match=words):
        variant.update(params, state, params, grad_fn=lambda params: params)
    with pytest.raises(TypeError, match=words):
        variant.update(params, state, params, clean_updates=params)


@pytest.mark.parametrize("row", [row for row in table.ROWS if not row.needs_values], ids=lambda row: row.name)
def test_evaluations_of_the_third_door(row: table.Row) -> None:
    """`grad_fn` is called for what the given gradient does not say already."""
    calls = []

    def grad_fn(params: Any) -> Any:
        calls.append(1)
        return jax.grad(table.loss)(params, table.batch())

    variant, params = row.make(), table.params()
    variant.update(grad_fn(params), variant.init(params), params, grad_fn=grad_fn)
    # A first pass elsewhere makes nothing of the gradient at params.
    is_of_use = row.clean_at_params and row.evaluations[0] > 1
    assert len(calls) == row.evaluations[0] + (not is_of_use)


def test_the_third_door_is_the_one_of_optax() -> None:
    up = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
    theirs = optax.contrib.sam(optax.sgd(0.01, momentum=0.9), up, sync_period=2, opaque_mode=True)
    ours = optax.chain(optax_sam.sam(0.1), optax.sgd(0.01, momentum=0.9))
    ends = []
    for tx, takes_number in ((theirs, True), (ours, False)):
        params = table.params()
        state = tx.init(params)
        for i in range(3):
            grad = grad_fn_of(table.batch(seed=i))
            grad_fn = (lambda w, _, grad=grad: grad(w)) if takes_number else grad
            updates, state = tx.update(grad(params), state, params, grad_fn=grad_fn)
            params = optax.apply_updates(params, updates)
        ends.append(params)
    chex.assert_trees_all_close(*ends, rtol=1e-5, atol=1e-6)


# The state.


def test_the_state_is_found_by_its_type() -> None:
    """Another class of the same name, that of `optax.contrib.sam`, does not confuse it."""
    params, sam = table.params(), optax_sam.sam(0.1)
    up = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
    theirs = optax.contrib.sam(optax.sgd(0.1), up, opaque_mode=True).init(params)
    mine = optax.chain(sam, optax.sgd(0.1)).init(params)
    _, grads = optax_sam.sam_value_and_grad(table.loss, sam)(params, table.batch(), state=(mine, theirs))
    chex.assert_trees_all_equal(grads, evaluated(sam))
    with pytest.raises(ValueError, match="`state` holds no state of a sharpness-aware variant"):
        optax_sam.sam_value_and_grad(table.loss, sam)(params, table.batch(), state=theirs)


@pytest.mark.parametrize("rho", [1, 0.5, np.float64(0.25), np.float32(0.3), jnp.asarray(0.2)])
def test_a_radius_that_was_set_keeps_its_type(rho: Any) -> None:
    """In a program compiled ahead of time, and in both branches of a `lax.cond`."""
    params = table.params()
    for made_with in (0.1, jnp.asarray(0.1), np.float64(0.1)):
        sam = optax_sam.sam(made_with)
        state = sam.init(params)
        assert state.rho.dtype == jnp.float32
        assert not state.rho.weak_type
        pair = optax_sam.SAMGradients(params, params)
        compiled = jax.jit(sam.update).lower(pair, state, params).compile()
        changed = optax.tree.set(state, rho=rho)
        _, after = compiled(pair, optax.tree.set(state, rho=jnp.asarray(rho, jnp.float32)), params)
        _, eager = sam.update(pair, changed, params)
        for new in (after, eager):
            assert new.rho.dtype == jnp.float32
            np.testing.assert_allclose(new.rho, rho, rtol=1e-6)

        def step(state: Any, sam: Any = sam, pair: Any = pair) -> Any:
            return jax.lax.cond(state.step < 5, lambda: sam.update(pair, state, params)[1], lambda: state)

        for _ in range(2):
            eager = jax.jit(step)(eager)
            np.testing.assert_allclose(eager.rho, rho, rtol=1e-6)


# An explicit mesh.


def sharded(kind: AxisType, spec: Any) -> Any:
    """Params whose kernel is split over the second axis of a mesh, and a batch over the first."""
    grid = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    specs = {"kernel": P(*spec), "out": P(*spec[::-1])}
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"kernel": jax.random.normal(keys[0], (8, 16)), "out": jax.random.normal(keys[1], (16, 4))}
    batch = jax.random.normal(keys[2], (32, 8))
    put = {name: jax.device_put(x, jax.NamedSharding(grid, specs[name])) for name, x in params.items()}
    return grid, params, batch, put, jax.device_put(batch, jax.NamedSharding(grid, P("data")))


@pytest.mark.parametrize(
    "row", [table.first(), table.first(compares=True), table.first(skips=True)], ids=lambda row: row.name
)
def test_shards_with_tensor_parallel_params_on_an_explicit_mesh(row: table.Row) -> None:
    grid, params, batch, put, put_batch = sharded(AxisType.Explicit, (None, "model"))
    variant = row.make()

    def parallel_loss(params: Any, batch: Any) -> Any:
        axis = jax.typeof(batch).sharding.spec[0]
        hidden = jnp.tanh(jnp.matmul(batch, params["kernel"], out_sharding=P(axis, "model")))
        return jnp.mean(jnp.sum(jnp.matmul(hidden, params["out"], out_sharding=P(axis, None)), axis=-1) ** 2)

    def plain_loss(params: Any, batch: Any) -> Any:
        return jnp.mean(jnp.sum(jnp.tanh(batch @ params["kernel"]) @ params["out"], axis=-1) ** 2)

    for how in ({"num_shards": 4}, {"num_shards": 8, "shard_mode": 2}):
        options = {**how, "batch_argnums": 1}

        def run(loss: Any, params: Any, batch: Any, options: Any = options) -> Any:
            value_and_grad = optax_sam.sam_value_and_grad(loss, variant, **options)
            return value_and_grad(params, batch, state=variant.init(params))[1]

        with jax.set_mesh(grid):
            found = jax.jit(functools.partial(run, parallel_loss))(put, put_batch)
        expected = jax.jit(functools.partial(run, plain_loss))(params, batch)
        chex.assert_trees_all_close(
            jax.device_get(found[:2]), jax.device_get(expected[:2]), rtol=1e-4, atol=1e-5
        )
        assert found.perturbed["kernel"].sharding.spec == P(None, "model")


def test_the_mesh_is_that_of_the_arrays() -> None:
    """No `jax.set_mesh` is needed under `jit`; shards in a loop are refused there."""
    _, params, batch, _, put_batch = sharded(AxisType.Explicit, (None, None))
    _, _, _, put, _ = sharded(AxisType.Explicit, (None, None))

    def loss(params: Any, batch: Any) -> Any:
        return jnp.mean(jnp.sum(jnp.tanh(batch @ params["kernel"]) @ params["out"], axis=-1) ** 2)

    for how in ({"num_shards": 4}, {"num_shards": 8, "shard_mode": 2}):
        run = jax.jit(optax_sam.sam_value_and_grad(loss, GSAM, batch_argnums=1, **how))
        found = run(put, put_batch, state=GSAM.init(params))
        expected = run(params, batch, state=GSAM.init(params))
        chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), rtol=1e-4, atol=1e-5)
    for mode in ("loop", 4):
        run = jax.jit(
            optax_sam.sam_value_and_grad(loss, GSAM, batch_argnums=1, num_shards=8, shard_mode=mode)
        )
        with pytest.raises(
            ValueError,
            match=r"spread over 4 devices, and . of its 8 shards run at once.*'vmap'`, or a divisor of 2 as",
        ):
            run(put, put_batch, state=GSAM.init(params))
    run = jax.jit(optax_sam.sam_value_and_grad(loss, GSAM, batch_argnums=1, num_shards=2))
    with pytest.raises(ValueError, match=r"2 of its 2 shards .*: make `num_shards` a multiple of 4\."):
        run(put, put_batch, state=GSAM.init(params))


# Another loss for the ascent, and a loss in two parts.


def test_the_ascent_along_another_loss() -> None:
    def other(params: Any, batch: Any) -> Any:
        return jnp.sum(jnp.sin(params["layer"]["kernel"])) + params["scale"] * jnp.mean(batch)

    params, batch = table.params(), table.batch()
    up = ascent.normalized()(jax.grad(other)(params, batch), 0.1, params)
    expected = jax.grad(table.loss)(optax.tree.add(params, up), batch)
    for how in ({}, {"num_shards": 1, "batch_argnums": 1}, {"microbatch_size": 4, "batch_argnums": 1}):
        value_and_grad = optax_sam.sam_value_and_grad(
            table.loss, optax_sam.sam(0.1), ascent_loss=other, return_metrics=True, **how
        )
        value, grads, metrics = jax.jit(value_and_grad)(params, batch, state=optax_sam.sam(0.1).init(params))
        chex.assert_trees_all_close(grads.perturbed, expected, rtol=1e-4, atol=1e-5)
        chex.assert_trees_all_close(grads.clean, jax.grad(other)(params, batch), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(value, other(params, batch), rtol=1e-5)
        np.testing.assert_allclose(
            metrics.perturbed_loss, table.loss(optax.tree.add(params, up), batch), rtol=1e-5
        )
        assert np.isnan(metrics.sharpness)
    with pytest.raises(ValueError, match=r"`ascent_loss` changes the clean gradient.*`gsam` also descends"):
        optax_sam.sam_value_and_grad(table.loss, optax_sam.gsam(), ascent_loss=other)
    with pytest.raises(TypeError, match=r"`ascent_loss` must be a loss, a function like `fun`, got int"):
        optax_sam.sam_value_and_grad(table.loss, optax_sam.sam(), ascent_loss=3)


@pytest.mark.parametrize("steps", [1, 2])
def test_an_ascent_rule_gets_no_half_precision(steps: int) -> None:
    dtypes = set()

    def rule(gradient: Any, rho: Any, _: Any) -> Any:
        dtypes.update(x.dtype.name for x in jax.tree.leaves(gradient))
        return optax.tree.scale(rho, gradient)

    variant = optax_sam.sam(0.1, steps=steps, step_mode="split", ascent=rule)
    params = table.params(jnp.bfloat16)
    state = variant.init(params)
    optax_sam.sam_value_and_grad(table.loss, variant)(params, table.batch(8, jnp.bfloat16), state=state)
    assert dtypes == {"float32"}


def test_a_composite_loss_shows_its_parts_to_a_rule() -> None:
    """f = a b, l = (f - y)^2 / 2 at (1, 2), y = 0.5, by hand; SAM itself sees an ordinary loss."""
    loss = optax_sam.CompositeLoss(
        lambda params, x: params[0] * params[1] * x, lambda z, y: jnp.mean((z - y) ** 2) / 2
    )
    params, x, y = jnp.array([1.0, 2.0]), jnp.ones(1), jnp.full(1, 0.5)
    wanted = {"functional": (3.0670820394, 1.6341640787), "sam": (3.53247452, 1.88212865)}
    for name, variant in (("functional", optax_sam.functional_sam(0.1)), ("sam", optax_sam.sam(0.1))):
        value, grads = optax_sam.sam_value_and_grad(loss, variant)(params, x, y, state=variant.init(params))
        np.testing.assert_allclose(value, 1.125, rtol=1e-6)
        np.testing.assert_allclose(grads.clean, [3.0, 1.5], rtol=1e-6)
        np.testing.assert_allclose(grads.perturbed, wanted[name], rtol=1e-6)
    with pytest.raises(TypeError, match=r"see the outputs of the network.*CompositeLoss"):
        evaluated(optax_sam.functional_sam(0.1))
    with pytest.raises(ValueError, match="`has_aux` is True, and that of the `CompositeLoss` is False"):
        optax_sam.sam_value_and_grad(loss, optax_sam.sam(), has_aux=True)


FUNCTIONAL_FORMS = {name: how for name, how in FORMS.items() if name != "devices, local, shards"}


@pytest.mark.parametrize("form", FUNCTIONAL_FORMS)
def test_a_composite_loss_in_all_forms(form: str) -> None:
    def model_fn(params: Any, x: Any) -> Any:
        hidden = jnp.tanh(x @ params["layer"]["kernel"] + params["layer"]["bias"])
        return hidden * params["scale"], {"mean": jnp.mean(x)}

    def output_loss(z: Any, y: Any) -> Any:
        return jnp.mean(jnp.sum(jnp.exp(z - y), axis=-1))

    loss = optax_sam.CompositeLoss(model_fn, output_loss, has_aux=True)
    params, x = table.params(), table.batch(16)
    y = jnp.cos(x @ jnp.ones((3, 4)))
    how = dict(FORMS[form])
    if "batch_argnums" in how:
        how["batch_argnums"] = (1, 2)

    def by_hand(x: Any, y: Any) -> Any:
        """Of one part of the batch."""
        z, pull_back = jax.vjp(lambda w: model_fn(w, x)[0], params)
        cotangent = jax.grad(output_loss)(z, y)
        (clean,) = pull_back(cotangent)
        point = optax.tree.add(params, ascent.normalized()(clean, 0.1, params))
        return clean, jax.vjp(lambda w: model_fn(w, x)[0], point)[1](cotangent)[0]

    parts = 4 if form.startswith("shards") or form == "devices, local" else 1
    split = [a.reshape(parts, -1, *a.shape[1:]) for a in (x, y)]
    expected = jax.tree.map(lambda g: jnp.mean(g, axis=0), jax.vmap(by_hand)(*split))
    variant = optax_sam.functional_sam(0.1)

    def run(params: Any, batch: Any) -> Any:
        value_and_grad = optax_sam.sam_value_and_grad(loss, variant, has_aux=True, **how)
        (_, aux), grads = value_and_grad(params, *batch, state=variant.init(params))
        return aux if "axis_name" not in how else 0.0, grads[:2]

    aux, found = jax.jit(on_devices(run, how))(params, (x, y))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
    if "axis_name" not in how:
        np.testing.assert_allclose(aux["mean"], jnp.mean(x), rtol=1e-5)


# What a variant is built of.


def two(a: Any, b: Any) -> Any:
    return a, b


def three(a: Any, b: Any, c: Any) -> Any:
    return a, b, c


@pytest.mark.parametrize(
    ("functions", "error", "words"),
    [
        ({"climb": two}, TypeError, r"`climb` is called with 3 arguments, got a .* \(a, b\)"),
        ({"evaluate": three}, TypeError, r"`evaluate` is called with 2 arguments"),
        ({"when": 3}, TypeError, r"`when` must be a function, got 3"),
        ({"descent": two}, TypeError, r"`descent` is called with 3 arguments"),
        ({"init_memory": two}, TypeError, r"`init_memory` is called with 1 argument,"),
        ({"ascent": three, "climb": three}, ValueError, r"`climb` replaces `ascent`: give one"),
        ({"when": len, "evaluate": two}, ValueError, r"`evaluate` replaces `when`: give one"),
    ],
)
def test_wrong_functions(functions: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        optax_sam.sharpness_aware(0.1, **functions)


def test_authors_of_variants_are_told_what_is_wrong() -> None:
    """At the first evaluation or update, and not by what JAX says of it later."""

    def evaluating(rule: Any) -> Any:
        return lambda: evaluated(optax_sam.sharpness_aware(0.1, evaluate=rule))

    def descending(rule: Any, init_memory: Any = None) -> Any:
        variant, params = optax_sam.sharpness_aware(0.1, None, rule, init_memory), table.params()
        pair = optax_sam.SAMGradients(params, params)
        return lambda: variant.update(pair, variant.init(params), params)

    gated = functools.partial(optax_sam.sharpness_aware, 0.1, when=lambda state: state.step > 0)
    cases: list[tuple[Any, type[Exception], str]] = [
        (evaluating(lambda loss, state: None), TypeError, r"must return what `loss.pair\(...\)` returns"),
        (evaluating(lambda loss, state: loss.pair(None, None)), TypeError, "`first` must be a pass"),
        (evaluating(lambda loss, state: loss.mean(loss.params)), TypeError, "`loss.mean` takes a scalar"),
        (evaluating(lambda loss, state: loss.at(3.0)), ValueError, "A perturbation must have the structure"),
        (
            evaluating(lambda loss, state: loss.pair(loss.ascent(), loss.at, when=jnp.ones(3))),
            TypeError,
            r"`when` must be a boolean scalar.*got shape \(3,\) and dtype float32",
        ),
        (
            lambda: evaluated(optax_sam.sharpness_aware(0.1, climb=lambda g, state, params: None)),
            ValueError,
            "What the ascent returns must have the structure of params",
        ),
        (descending(lambda g, state, params: g.clean), TypeError, r"must return a pair, `\(direction, mem"),
        (descending(lambda g, state, params: (g, ())), TypeError, "must be one tree, such as `gradients.per"),
        (
            descending(lambda g, state, params: (g.clean["layer"], ())),
            ValueError,
            "The direction that `descent` returns must have the structure of params",
        ),
        (
            descending(lambda g, state, params: (g.clean, g.clean)),
            ValueError,
            "without one: return `state.mem",
        ),
        (functools.partial(gated, ascent_only=True), ValueError, "leave out `ascent_only=True`"),
        (
            lambda: optax_sam.sam_value_and_grad(table.loss, gated(), ascent_dtype=jnp.bfloat16),
            ValueError,
            "`ascent_dtype` changes the clean gradient",
        ),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()


def test_own_memory_is_float32_or_better() -> None:
    variant = optax_sam.sharpness_aware(
        0.1,
        None,
        lambda g, state, params: (g.perturbed, state.memory),
        lambda params: (optax.tree.zeros_like(params), jnp.zeros((), jnp.int32)),
    )
    floats, count = variant.init(table.params(jnp.bfloat16)).memory
    assert {x.dtype for x in jax.tree.leaves(floats)} == {jnp.dtype("float32")}
    assert count.dtype == jnp.int32


def test_a_gate_leaves_the_second_gradient_out() -> None:
    """`when` of the state alone: sam in every second step, the plain gradient in between."""
    variant = optax_sam.sharpness_aware(0.1, when=lambda state: state.step % 2 == 0)
    params, batch = table.params(), table.batch()
    value_and_grad = jax.jit(optax_sam.sam_value_and_grad(table.loss, variant, return_metrics=True))
    state = variant.init(params)
    for i in range(4):
        _, grads, metrics = value_and_grad(params, batch, state=state)
        _, state = variant.update(grads, state, params)
        expected = evaluated(optax_sam.sam(0.1)).perturbed if i % 2 == 0 else grads.clean
        chex.assert_trees_all_close(grads.perturbed, expected, rtol=1e-5, atol=1e-6)
        assert np.isnan(metrics.perturbed_loss) == (i % 2 == 1)
        np.testing.assert_allclose(metrics.perturbation_norm, 0.1 * (i % 2 == 0), rtol=1e-5)


def test_a_variant_says_what_it_is() -> None:
    """The call of its constructor: numbers always, anything else where it is not the default."""
    texts = {
        "gsam(rho=0.05, alpha=0.4)": optax_sam.gsam(),
        "gsam(rho=0.1, alpha=0.4, objective='clean')": optax_sam.gsam(jnp.float32(0.1), objective="clean"),
        "sam(rho=<schedule>, steps=3)": optax_sam.sam(optax.linear_schedule(0.0, 0.1, 9), steps=3),
        "sam(rho=0.05, ascent=<AscentRule>)": optax_sam.sam(ascent=ascent.absolute()),
        "sharpness_aware(rho=0.2)": optax_sam.sharpness_aware(0.2),
        "gated(sam(rho=0.05), every(2))": optax_sam.gated(optax_sam.sam(), optax_sam.gates.every(2)),
    }
    for text, variant in texts.items():
        assert repr(variant).replace("0.10000000149011612", "0.1") == text
        assert repr(variant._replace(init=variant.init)) == repr(variant)
    seen = []
    jax.jit(lambda rho: seen.append(repr(optax_sam.gsam(rho))))(0.1)
    assert re.fullmatch(r"gsam\(rho=.*Tracer.*, alpha=0\.4\)", seen[0])


def test_a_pair_says_what_it_is_and_prints_no_array() -> None:
    text = repr(evaluated(optax_sam.gsam(0.1)))
    expected = "gsam(rho=0.1, alpha=0.4, objective='perturbed')"
    assert text == f"SAMGradients(clean and perturbed: 3 leaves with 17 entries each, by {expected})"
    assert repr(optax_sam.SAMGradients(1.0, 2.0)).endswith(
        "1 leaf with 1 entries each, by an unknown variant)"
    )


def test_a_scaled_loss_in_half_precision_keeps_the_modelled_gradient() -> None:
    """That of Hessian SAM is computed, not differentiated: small entries must not become zero in float16."""
    variant, params = optax_sam.hessian_sam(0.1), jnp.ones(2, jnp.float16)
    value_and_grad = optax_sam.sam_value_and_grad(
        lambda w: 1e-8 * jnp.sum(w.astype(jnp.float32) ** 2), variant
    )
    _, grads = value_and_grad(params, state=variant.init(params), loss_scale=2.0**15)
    assert jnp.all(grads.perturbed > 1e-8)


def test_a_grad_fn_in_another_precision_behind_a_conditional() -> None:
    variant = optax_sam.looksam(0.1, k=2)
    params, batch = table.params(jnp.bfloat16), table.batch(8, jnp.bfloat16)
    plain = jax.tree.map(lambda g: g.astype(jnp.float32), jax.grad(table.loss)(params, batch))

    @jax.jit
    def step(state: Any) -> Any:
        return variant.update(plain, state, params, grad_fn=lambda w: jax.grad(table.loss)(w, batch))

    direction, state = step(variant.init(params))
    step(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(direction, params)
