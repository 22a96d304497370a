"""Eight devices in every form JAX has for them give the numbers of one device, at the promised cost."""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import table
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_sam
from benchmarks import hlo
from optax_sam._loss import Loss, Pass, Peers

DEVICES = 8
STEPS = 3
every_row = pytest.mark.parametrize("row", table.ROWS, ids=lambda row: row.name)
# One whose every step is the same, and one whose steps are not; both without a perturbation of noise.
ONE_OR_TWO = (table.first(), table.first(skips=True))


pytestmark = pytest.mark.usefixtures("in_float64")


def make_params():
    """The params of the table, in a size that eight devices can share."""
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "layer": {
            "kernel": 0.3 * jax.random.normal(keys[0], (8, 16)),
            "bias": 0.3 * jax.random.normal(keys[1], (16,)),
        },
        "scale": jnp.asarray(0.5),
    }


SHARDED = {"layer": {"kernel": P("data"), "bias": P("data")}, "scale": P()}
REPLICATED = jax.tree.map(lambda _: P(), SHARDED, is_leaf=lambda x: isinstance(x, P))
SIZE = sum(x.size for x in jax.tree.leaves(jax.eval_shape(make_params)) if x.ndim)


def loss(params, batch):
    """The loss of the table, scaled such that the training on it is stable and rounding does not grow."""
    return table.loss(params, batch) / 100


def make_batch(size=32):
    return jax.random.normal(jax.random.key(1), (size, 8))


def make_mesh(kind=AxisType.Auto):
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,))


def make_step(row):
    variant, tx = row.optimizer()

    def step(carry, batch, **how):
        params, state = carry
        value, grads = optax_sam.sam_value_and_grad(loss, variant, **how)(params, batch, state=state)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    return step, tx


def both(step, devices_have_names):
    """One program with a step of each kind of perturbation, to compile once instead of twice."""
    shared, own = {}, {"num_shards": DEVICES, "batch_argnums": 1}
    if devices_have_names:
        shared, own = {"axis_name": "data"}, {"axis_name": "data", "perturbation": "local"}

    def run(carries, batch):
        return tuple(step(c, batch, **how) for c, how in zip(carries, (shared, own), strict=True))

    return run


def several(run):
    """Several steps in one program, which is then compiled and called once."""

    def train(carry, batch):
        def step(carries, _):
            results = run(carries, batch)
            return tuple(c for c, _ in results), tuple(value for _, value in results)

        return jax.lax.scan(step, (carry, carry), None, length=STEPS)

    return train


@functools.cache
def reference(row):
    """The same on one device: all of the batch, or one eighth after the other, without the mechanism."""
    variant, tx = row.optimizer()
    batch = make_batch()

    def step(carry, parts):
        params, state = carry
        kind = table.deciding_alike(loss, params, parts) if row.evaluates_by_data else Loss

        def evaluate(part):
            number, examples = part

            def pass_at(w, _):
                return Pass(*jax.value_and_grad(loss)(w, examples))

            own = kind(params, pass_at, pass_at, Peers(shard=number))
            evaluation = variant.evaluate(own, optax.tree.get(state, "SAMState"))
            return evaluation.value, evaluation.gradients

        found = jax.lax.map(evaluate, (jnp.arange(len(parts)), parts))
        value, grads = jax.tree.map(lambda x: jnp.mean(x, axis=0), found)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    def run(carries, batch):
        splits = (batch[None], batch.reshape(DEVICES, -1, 8))
        return tuple(step(c, parts) for c, parts in zip(carries, splits, strict=True))

    params = make_params()
    return jax.device_get(jax.jit(several(run))((params, tx.init(params)), batch))


def assert_same(result, row):
    expected = reference(row)
    flat = jax.tree_util.tree_leaves_with_path
    for (path, got), (_, want) in zip(flat(result), flat(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11, err_msg=jax.tree_util.keystr(path))


def assert_on_every_device(tree):
    """Every device holds the same bits, whether or not the sharding says so."""
    for leaf in jax.tree.leaves(tree):
        first, *others = (np.asarray(shard.data) for shard in leaf.addressable_shards)
        assert len(others) == DEVICES - 1
        for other in others:
            np.testing.assert_array_equal(first, other)


@pytest.mark.by_capability  # Since JAX 0.8 `pmap` is a `shard_map`.
@every_row
def test_pmap(row):
    step, tx = make_step(row)
    params, batch = make_params(), make_batch()
    run = jax.pmap(several(both(step, True)), axis_name="data", in_axes=(None, 0), out_axes=None)
    arguments = (params, tx.init(params)), batch.reshape(DEVICES, -1, 8)
    result = run.lower(*arguments).compile()(*arguments)
    assert_same(result, row)
    assert_on_every_device(result)


@every_row
def test_shard_map(row):
    in_a_shard_map(row, check_vma=True)


@pytest.mark.full
@pytest.mark.by_capability
@every_row
def test_shard_map_that_checks_nothing(row):
    in_a_shard_map(row, check_vma=False)


def in_a_shard_map(row, *, check_vma):
    step, tx = make_step(row)
    params = make_params()
    run = jax.shard_map(
        several(both(step, True)),
        mesh=make_mesh(),
        in_specs=(P(), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    result = jax.jit(run)((params, tx.init(params)), make_batch())
    assert_same(result, row)
    assert_on_every_device(result)


FORMS = [
    pytest.param(row, form, marks=() if form == "auto" or row in ONE_OR_TWO else pytest.mark.full)
    for row in table.VARIANTS
    for form in ("auto", "explicit", "fsdp")
]


@pytest.mark.parametrize(("row", "form"), FORMS, ids=lambda x: getattr(x, "name", x))
def test_jit(row, form):
    step, tx = make_step(row)
    mesh = make_mesh(AxisType.Explicit if form == "explicit" else AxisType.Auto)
    specs = SHARDED if form == "fsdp" else REPLICATED
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P)
    )
    params = jax.device_put(make_params(), shardings)
    batch = jax.device_put(make_batch(), NamedSharding(mesh, P("data")))
    state = tx.init(params)
    # The scalars of the state are born on one device; everything else has the sharding of its param.
    state = jax.tree.map(lambda x: x if x.ndim else jax.device_put(x, NamedSharding(mesh, P())), state)
    like = (params, state)
    # What the step hands back lies where it came from, as a training loop needs it.
    out = (jax.tree.map(lambda x: x.sharding, (like, like)), NamedSharding(mesh, P()))
    with jax.set_mesh(mesh) if form == "explicit" else contextlib.nullcontext():
        result = jax.jit(several(both(step, False)), out_shardings=out)(like, batch)
    assert_same(result, row)
    if form != "fsdp":
        assert_on_every_device(result)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_norms_of_sharded_leaves(kind):
    """Small leaves are reduced as one vector, but for those that are known to be spread."""
    rule, variant = optax_sam.ascent.normalized(), optax_sam.gsam(0.1)

    def measured(params, other):
        direction, _ = variant.update(optax_sam.SAMGradients(params, other), variant.init(params), params)
        return rule(params, 0.1, params), direction

    params = make_params() | {"long": jnp.linspace(-1, 1, 3000)}
    other = jax.tree.map(jnp.cos, params)
    mesh = make_mesh(kind)
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), SHARDED | {"long": P()}, is_leaf=lambda x: isinstance(x, P)
    )
    with jax.set_mesh(mesh):
        found = jax.jit(measured)(*jax.device_put((params, other), (shardings, shardings)))
    chex.assert_trees_all_close(jax.device_get(found), measured(params, other), rtol=1e-12)


@pytest.mark.parametrize("check_vma", [True, False])
def test_small_leaves_of_each_device(check_vma):
    """Whose vector is a little too short for XLA's library, and filled up."""
    rows = np.random.default_rng(0).normal(size=(DEVICES, 3000))

    def measured(x):
        return optax_sam.ascent.normalized()([x[0, :7], x[0, 7:]], 0.1, None)

    spread = jax.shard_map(
        measured, mesh=make_mesh(), in_specs=P("data"), out_specs=P("data"), check_vma=check_vma
    )
    first, rest = jax.jit(spread)(rows)
    expected = 0.1 * rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(first.reshape(DEVICES, -1), expected[:, :7], rtol=1e-9)
    np.testing.assert_allclose(rest.reshape(DEVICES, -1), expected[:, 7:], rtol=1e-9)


def compile_step(step, tx, *, form, how, base=None):
    """The compiled step on eight devices, its arguments abstract."""
    mesh = make_mesh()
    specs = SHARDED if form == "fsdp" else REPLICATED
    params = jax.tree.map(
        lambda spec, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        specs,
        jax.eval_shape(make_params),
        is_leaf=lambda x: isinstance(x, P),
    )
    state = jax.eval_shape(tx.init, params)
    batch = jax.ShapeDtypeStruct((32, 8), jnp.float64, sharding=NamedSharding(mesh, P("data")))
    run = base or (lambda carry, batch: step(carry, batch, **how))
    if form == "shard_map":
        run = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    return jax.jit(run).lower((params, state), batch).compile()


GLOBAL, LOCAL = {"axis_name": "data"}, {"axis_name": "data", "perturbation": "local"}
SHARDS = {"num_shards": DEVICES, "batch_argnums": 1}
ROUNDS = {"num_shards": 2 * DEVICES, "shard_mode": 2, "batch_argnums": 1}


@pytest.mark.parametrize(
    ("form", "how", "count"),
    [
        ("shard_map", GLOBAL, 2),
        ("shard_map", LOCAL, 1),
        ("shard_map", LOCAL | SHARDS | {"num_shards": 2}, 1),
        ("shard_map", GLOBAL | {"microbatch_size": 2, "batch_argnums": 1}, 2),
        ("jit", {}, 2),
        ("jit", SHARDS, 1),
        ("jit", ROUNDS, 1),
        ("fsdp", {}, 2),
        ("fsdp", SHARDS, 1),
    ],
)
def test_gradients_sent(form, how, count):
    step, tx = make_step(table.first())
    found = hlo.collectives(compile_step(step, tx, form=form, how=how).as_text(), DEVICES)
    reduced = hlo.gradient_sized(found)
    # Sharded params are reduced leaf by leaf, in more instructions but with the same load.
    assert sum(c.elements * c.times for c in reduced) == count * SIZE
    assert all(c.times == 1 for c in reduced)
    if form != "fsdp":
        assert len(reduced) == count
    gathered = {shape for c in found if c.kind == "all-gather" for _, shape in c.shapes}
    params = {(8, 16), (16,)} if form == "fsdp" else set()
    # The norm of one gradient for all devices takes small leaves as one vector: (8, 16) as a part of it.
    assert gathered == params | ({(128,)} if form == "fsdp" and not how else set())
    assert {c.kind for c in found} <= {"all-reduce", "all-gather"}


def test_plain_sgd_sends_one_gradient():
    tx = optax.sgd(0.1)

    def step(carry, batch):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    found = hlo.collectives(compile_step(None, tx, form="jit", how={}, base=step).as_text(), DEVICES)
    assert [c.elements for c in hlo.gradient_sized(found)] == [SIZE]


def test_a_loop_over_shards_gathers_what_is_sharded():
    # Why `shard_mode="loop"` is for one device, and rounds are for several.
    step, tx = make_step(table.first())
    text = compile_step(step, tx, form="jit", how=SHARDS | {"shard_mode": "loop"}).as_text()
    found = hlo.collectives(text, DEVICES)
    assert sum(c.elements for c in found if c.kind == "all-gather") == 32 * 8


@pytest.mark.parametrize(("form", "how"), [("shard_map", GLOBAL), ("shard_map", LOCAL), ("jit", {})])
def test_a_skipped_evaluation_sends_one_gradient(form, how):
    step, tx = make_step(table.first(skips=True))
    text = compile_step(step, tx, form=form, how=how).as_text()
    reuse = hlo.gradient_sized(hlo.collectives(text, DEVICES, branch=min))
    refresh = hlo.gradient_sized(hlo.collectives(text, DEVICES, branch=max))
    assert [sum(c.elements for c in found) for found in (reuse, refresh)] == [SIZE, 2 * SIZE]


@pytest.mark.parametrize("how", [GLOBAL, LOCAL], ids=["global", "local"])
def test_noise(how):
    """Each device draws for itself where its perturbation is its own, and all draw alike where it is not."""
    variant = table.first(clean_at_params=False).make()
    params = make_params()
    state = variant.init(params)

    def draw(params, state, batch):
        seen = []

        def spy(params, batch):
            seen.append(params["scale"])
            return loss(params, batch)

        # Not under `jit`, which would hide the points from this list.
        def pass_at(w, _):
            return Pass(spy(w, batch), jax.grad(loss)(w, batch))

        variant.evaluate(Loss(params, pass_at, pass_at, Peers("data", how is LOCAL)), state)
        return seen[0][None]

    run = jax.jit(
        jax.shard_map(
            draw, mesh=make_mesh(), in_specs=(P(), P(), P("data")), out_specs=P("data"), check_vma=False
        )
    )
    points = run(params, state, make_batch())
    assert len(set(points.tolist())) == (1 if how is GLOBAL else DEVICES)
    np.testing.assert_array_equal(points, run(params, state, make_batch()))
    later = run(params, state._replace(step=state.step + 1), make_batch())
    assert not np.isin(later, points).any()


def test_aux_is_the_devices_own_and_the_value_is_not():
    def with_aux(params, batch):
        value = loss(params, batch)
        return value, {"loss": value[None], "seen": jnp.full((1,), batch.shape[0]), "flag": value[None] > 0}

    variant, tx = table.first().optimizer()
    params, batch = make_params(), make_batch()

    def run(params, state, batch):
        return optax_sam.sam_value_and_grad(with_aux, variant, has_aux=True, axis_name="data")(
            params, batch, state=state
        )[0]

    run = jax.shard_map(run, mesh=make_mesh(), in_specs=(P(), P(), P("data")), out_specs=(P(), P("data")))
    value, aux = jax.jit(run)(params, tx.init(params), batch)
    parts = jnp.stack([loss(params, part) for part in batch.reshape(DEVICES, -1, 8)])
    np.testing.assert_allclose(value, jnp.mean(parts), rtol=1e-12)
    np.testing.assert_allclose(aux["loss"], parts, rtol=1e-12)
    np.testing.assert_array_equal(aux["seen"], [4] * DEVICES)
    assert aux["flag"].dtype == bool


def test_the_metrics_are_the_same_on_all_devices():
    variant, tx = table.first(compares=True).optimizer()
    params, batch = make_params(), make_batch()

    def run(params, state, batch):
        evaluate = optax_sam.sam_value_and_grad(loss, variant, return_metrics=True, **LOCAL)
        return evaluate(params, batch, state=state)[2]

    run = jax.shard_map(run, mesh=make_mesh(), in_specs=(P(), P(), P("data")), out_specs=P())
    metrics = jax.jit(run)(params, tx.init(params), batch)
    on_one = optax_sam.sam_value_and_grad(loss, variant, return_metrics=True, **SHARDS)
    expected = jax.jit(lambda params, state: on_one(params, batch, state=state))(params, tx.init(params))[2]
    for got, want in zip(metrics, expected, strict=True):
        # The norm of the perturbation is kept in float32.
        np.testing.assert_allclose(got, want, rtol=1e-10 if want.dtype == jnp.float64 else 2e-7)
    np.testing.assert_allclose(metrics.perturbation_norm, 0.1, rtol=1e-6)


@pytest.mark.parametrize(
    "row", [table.first(), *(row for row in table.ROWS if row.evaluations == (1,))], ids=lambda row: row.name
)
def test_the_metrics_of_a_global_perturbation(row):
    """Those of one device with the whole batch, of a rule of a single gradient too."""
    variant = row.make()
    params, batch = make_params(), make_batch()
    state = variant.init(params)

    def run(params, batch, **how):
        evaluate = optax_sam.sam_value_and_grad(loss, variant, return_metrics=True, **how)
        return evaluate(params, batch, state=state)[2]

    there = functools.partial(run, axis_name="data")
    there = jax.shard_map(there, mesh=make_mesh(), in_specs=(P(), P("data")), out_specs=P())
    for got, want in zip(jax.jit(there)(params, batch), jax.jit(run)(params, batch), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10 if want.dtype == jnp.float64 else 2e-7)


@pytest.mark.parametrize("how", [GLOBAL, LOCAL], ids=["global", "local"])
def test_an_axis_of_vmap_is_an_axis(how):
    """A compiled `vmap` knows no marks of what differs between devices."""
    variant = table.first().make()
    params, parts = make_params(), make_batch().reshape(DEVICES, -1, 8)
    state = variant.init(params)

    def run(part):
        return optax_sam.sam_value_and_grad(loss, variant, **how)(params, part, state=state)

    mapped = jax.jit(jax.vmap(run, axis_name="data", out_axes=None))(parts)
    how = SHARDS if how is LOCAL else {}
    on_one = optax_sam.sam_value_and_grad(loss, variant, **how)(params, make_batch(), state=state)
    chex.assert_trees_all_close(mapped, on_one, rtol=1e-9)


def test_devices_agree_on_a_decision_taken_from_the_gradient():
    """A rule that skips its second gradient by what it sees: all devices and shards take the mean of it.

    Each peer alone sees another norm. Half of the devices would wait for the others for ever.
    """
    params, batch = make_params(), make_batch()
    parts = batch.reshape(DEVICES, -1, 8)
    norms = np.array([float(optax.tree.norm(jax.grad(loss)(params, part))) for part in parts])
    climb = optax_sam.ascent.normalized()

    def variant_above(threshold):
        def evaluate(loss, state):
            clean = loss.ascent()
            due = loss.mean(optax.tree.norm(clean.gradient)) > threshold

            def perturbed():
                return loss.at(climb(clean.gradient, state.rho, loss.params))

            return loss.pair(clean, perturbed, when=due)

        return optax_sam.sharpness_aware(0.1, evaluate=evaluate)

    def gradients(part):
        clean = jax.grad(loss)(params, part)
        return clean, jax.grad(loss)(optax.tree.add(params, climb(clean, 0.1, params)), part)

    clean, perturbed = jax.tree.map(lambda x: jnp.mean(x, axis=0), jax.vmap(gradients)(parts))
    whole = float(optax.tree.norm(jax.grad(loss)(params, batch)))
    forms = {
        "devices, local": (LOCAL, P("data"), np.mean(norms)),
        "shards": (SHARDS, P(), np.mean(norms)),
        "shards of devices": (LOCAL | SHARDS | {"num_shards": 1}, P("data"), np.mean(norms)),
        "devices, global": (GLOBAL, P("data"), whole),
    }
    for name, (how, spec, level) in forms.items():
        for threshold, is_due in ((0.999 * level, True), (1.001 * level, False)):
            assert min(norms) < threshold < max(norms) or name == "devices, global"
            variant = variant_above(threshold)

            def run(params, state, batch, variant=variant, how=how):
                return optax_sam.sam_value_and_grad(loss, variant, **how)(params, batch, state=state)[1]

            run = jax.shard_map(run, mesh=make_mesh(), in_specs=(P(), P(), spec), out_specs=P())
            grads = jax.jit(run)(params, variant.init(params), batch)
            chex.assert_trees_all_close(grads.clean, clean, rtol=1e-9)
            expected = perturbed if is_due else clean
            if name == "devices, global" and is_due:
                point = optax.tree.add(params, climb(clean, 0.1, params))
                expected = jax.grad(loss)(point, batch)
            chex.assert_trees_all_close(grads.perturbed, expected, rtol=1e-9)


@pytest.mark.parametrize("mode", ["loop", 2])
def test_shards_that_cannot_agree_are_refused(mode):
    def evaluate(loss, state):
        del state
        clean = loss.ascent()
        return loss.pair(clean, loss.at, when=loss.mean(clean.value) > 0.0)

    variant, params = optax_sam.sharpness_aware(0.1, evaluate=evaluate), make_params()
    run = optax_sam.sam_value_and_grad(loss, variant, **SHARDS, shard_mode=mode)
    with pytest.raises(ValueError, match=r"decides by a gradient.*all shards must decide alike.*'vmap'"):
        run(params, make_batch(), state=variant.init(params))


@pytest.mark.parametrize("row", [row for row in table.ROWS if row.skips], ids=lambda r: r.name)
def test_what_decides_is_the_same_on_all_devices(row):
    """With `check_vma` on, `jax.shard_map` refuses a result that may differ and is said to be the same."""
    step, tx = make_step(row)
    params = make_params()
    seen = []

    def run(carry, batch):
        (params, state), _ = step(carry, batch, axis_name="data", perturbation="local")
        seen.append(optax.tree.get(state, "SAMState").step)
        return seen[-1], params

    run = jax.shard_map(run, mesh=make_mesh(), in_specs=(P(), P("data")), out_specs=P(), check_vma=True)
    steps, _ = jax.jit(run)((params, tx.init(params)), make_batch())
    assert steps == 1
    assert_on_every_device(steps)


def test_axis_name_outside_of_any_axis():
    variant, tx = table.first().optimizer()
    params = make_params()
    evaluate = optax_sam.sam_value_and_grad(loss, variant, axis_name="data")
    for run in (evaluate, jax.jit(evaluate)):
        with pytest.raises(ValueError, match=r"`axis_name` is 'data', but no such axis is bound here.*pmap"):
            run(params, make_batch(), state=tx.init(params))


def test_a_state_that_does_not_match_its_sharding():
    """A state of other params, or of their shards, is refused by the shapes."""
    row = table.first(skips=True)
    step, tx = make_step(row)
    params = make_params()
    state = tx.init(jax.tree.map(lambda x: x[: x.shape[0] // 2] if x.ndim else x, params))
    with pytest.raises((TypeError, ValueError), match=r"shape"):
        jax.jit(step)((params, state), make_batch())


def test_how_collectives_are_counted():
    text = """HloModule step, entry_computation_layout={()->f32[]}

%body (p: (f32[4])) -> (f32[4]) {
  %x = f32[4]{0} get-tuple-element(%p), index=0
  ROOT %ar.1 = f32[4]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
}

%one (p: f32[]) -> f32[] {
  %ag = (f32[2]{0}, f32[8]{0}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}
}

%two (p: f32[]) -> f32[] {
  %small = (f32[], bf16[2,3]{1,0}) all-reduce(%p, %p), replica_groups=[1,8]<=[8], to_apply=%add
}

ENTRY %main (a: f32[4]) -> f32[] {
  %w = (f32[4]) while(%a), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %r = f32[] conditional(%i, %a, %a), branch_computations={%one, %two}
}
"""
    most = hlo.collectives(text, DEVICES, max)
    least = hlo.collectives(text, DEVICES, min)
    assert [(c.kind, c.elements, c.group, c.times, c.moved) for c in most] == [
        ("all-reduce", 4, 2, 3, 16.0),
        ("all-reduce", 6, 8, 1, 28.0),
    ]
    assert [(c.kind, c.elements, c.group, c.times, c.moved) for c in least][1:] == [
        ("all-gather", 8, 4, 1, 24.0)
    ]
