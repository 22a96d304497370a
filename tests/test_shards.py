"""Shards, each with a perturbation of its own, and microbatches: the numbers, the memory, the errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import table

import optax_sam
from optax_sam._loss import Loss, Pass, Peers

SHARDS = 4
every_row = pytest.mark.parametrize("row", table.ROWS, ids=lambda row: row.name)
SAM = table.first().make()


def evaluate(variant, params, batch, *, jit=True, loss=table.loss, **how):
    def run(params, state, batch):
        return optax_sam.sam_value_and_grad(loss, variant, **how)(params, batch, state=state)

    return (jax.jit(run) if jit else run)(params, variant.init(params), batch)


def assert_close(got, want, rtol=1e-12, atol=1e-13):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


@pytest.mark.by_capability
@every_row
def test_parts_are_the_mean_of_single_evaluations(row):
    """Shards in a loop and, side by side, in rounds with microbatches, against one after the other."""
    with jax.enable_x64(True):
        variant, params, batch = row.make(), table.params(jnp.float64), table.batch(16, jnp.float64)
        state, kind = variant.init(params), Loss

        def split(batch, **how):
            return optax_sam.sam_value_and_grad(table.loss, variant, batch_argnums=1, **how)(
                params, batch, state=state
            )

        def alone(part):
            number, examples = part

            def pass_at(w, _):
                return Pass(*jax.value_and_grad(table.loss)(w, examples))

            evaluation = variant.evaluate(kind(params, pass_at, pass_at, Peers(shard=number)), state)
            return evaluation.value, evaluation.gradients

        def run(batch):
            nonlocal kind
            parts, modes = batch.reshape(SHARDS, -1, 3), ({"shard_mode": "loop"}, {"shard_mode": 2})
            if row.evaluates_by_data:  # All shards decide together: they run side by side.
                kind, modes = table.deciding_alike(table.loss, params, parts), ({}, {})
            expected = jax.lax.map(alone, (jnp.arange(SHARDS), parts))
            shards = [split(batch, num_shards=SHARDS, **modes[0])]
            shards += [split(batch, num_shards=SHARDS, microbatch_size=2, **modes[1])]
            kind = Loss
            full = alone((0, batch))
            microbatches = split(batch, microbatch_size=4)
            return jax.tree.map(lambda x: jnp.mean(x, axis=0), expected), shards, full, microbatches

        # One program, to compile once.
        expected, shards, full, microbatches = jax.jit(run)(batch)
        for result in shards:
            assert_close(result, expected)
        assert_close(microbatches, full)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_microbatches_in_the_dtype_of_params(dtype):
    params, batch = table.params(dtype), table.batch(16)
    full = evaluate(SAM, params, batch)
    accumulated = evaluate(SAM, params, batch, microbatch_size=4, batch_argnums=1)
    assert jax.tree.map(lambda x: x.dtype, accumulated[1]) == jax.tree.map(lambda x: x.dtype, full[1])
    assert_close(
        jax.tree.map(lambda x: x.astype(jnp.float32), accumulated),
        jax.tree.map(lambda x: x.astype(jnp.float32), full),
        # In half precision within its rounding: every gradient is rounded once.
        rtol=1e-6 if dtype == jnp.float32 else 2**-6,
        atol=1e-6 if dtype == jnp.float32 else 2**-6,
    )


def test_the_whole_batch_is_one_shard():
    params, batch = table.params(), table.batch(8)
    full = evaluate(SAM, params, batch)
    for how in ({"num_shards": 1}, {"num_shards": 1, "shard_mode": "loop"}, {"microbatch_size": 8}):
        assert_close(evaluate(SAM, params, batch, batch_argnums=1, **how), full, rtol=1e-6)


def test_several_batch_arguments_and_trees():
    def loss(params, images, scale, labels):
        return jnp.mean((images["x"] @ params["w"] * scale - labels) ** 2), {"mean": jnp.mean(images["z"])}

    def joined(params, batch):
        return loss(params, {"x": batch["x"], "z": batch["z"]}, 2.0, batch["y"])

    keys = jax.random.split(jax.random.key(2), 3)
    batch = {
        k: jax.random.normal(key, (8, 3) if k == "x" else (8,)) for k, key in zip("xyz", keys, strict=True)
    }
    params = {"w": jnp.array([0.5, -1.0, 2.0])}
    state = SAM.init(params)
    for how in ({"num_shards": 4}, {"num_shards": 4, "shard_mode": 2}, {"microbatch_size": 2}):
        split = optax_sam.sam_value_and_grad(loss, SAM, has_aux=True, batch_argnums=(1, 3), **how)
        images = {"x": batch["x"], "z": batch["z"]}
        got = jax.jit(lambda *args, split=split: split(*args, state=state))(params, images, 2.0, batch["y"])
        want = evaluate(SAM, params, batch, loss=joined, has_aux=True, batch_argnums=1, **how)
        assert_close(got, want, rtol=1e-6)
        np.testing.assert_allclose(got[0][1]["mean"], jnp.mean(batch["z"]), rtol=1e-5)


FORMS = [
    {"num_shards": 4},
    {"num_shards": 4, "shard_mode": "loop"},
    {"num_shards": 4, "shard_mode": 2},
    {"microbatch_size": 2},
    {"num_shards": 2, "microbatch_size": 2},
]
by_form = pytest.mark.parametrize("how", FORMS, ids=lambda how: "-".join(f"{k}={v}" for k, v in how.items()))


@by_form
def test_aux_floats_are_averaged_and_integers_summed(how):
    def loss(params, batch):
        value = table.loss(params, batch)
        return value, {
            "mean": jnp.mean(batch),
            "vector": jnp.mean(batch, axis=0),
            "count": jnp.sum(batch > 0),
            "size": batch.shape[0],
            "nothing": None,
        }

    params, batch = table.params(), table.batch(8)
    (_, aux), _ = evaluate(SAM, params, batch, loss=loss, has_aux=True, batch_argnums=1, **how)
    np.testing.assert_allclose(aux["mean"], jnp.mean(batch), rtol=1e-5)
    np.testing.assert_allclose(aux["vector"], jnp.mean(batch, axis=0), rtol=1e-5)
    assert aux["count"] == jnp.sum(batch > 0)
    assert aux["size"] == 8  # A Python number is one as well.
    assert jnp.issubdtype(aux["count"].dtype, jnp.integer)
    assert aux["nothing"] is None


@pytest.mark.parametrize("mode", ["vmap", "loop", 2])
def test_sums_of_short_integers_do_not_overflow(mode):
    """As with `jnp.sum` they have 32 bits or more."""
    dtypes = {jnp.int8: jnp.int32, jnp.uint8: jnp.uint32, jnp.int16: jnp.int32, jnp.uint32: jnp.uint32}

    def loss(params, batch):
        return table.loss(params, batch), [jnp.asarray(100, dtype) for dtype in dtypes]

    (_, aux), _ = evaluate(
        SAM, table.params(), table.batch(8), loss=loss, has_aux=True, batch_argnums=1,
        num_shards=4, shard_mode=mode,
    )  # fmt: skip
    assert [int(x) for x in aux] == [400] * 4
    assert [x.dtype for x in aux] == [*dtypes.values()]


@by_form
@pytest.mark.parametrize("what", ["flag", "name"])
def test_other_aux_is_refused(how, what):
    def loss(params, batch):
        return table.loss(params, batch), {what: jnp.all(batch > 0) if what == "flag" else "train"}

    kind = {"flag": "bool", "name": ".*str.*"}[what]
    message = (
        rf"aux\['{what}'\] has dtype {kind}: over shards and microbatches floats are averaged and integers"
    )
    with pytest.raises(TypeError, match=message):
        evaluate(SAM, table.params(), table.batch(8), loss=loss, has_aux=True, batch_argnums=1, **how)


def test_aux_of_the_full_batch_is_left_alone():
    def loss(params, batch):
        return table.loss(params, batch), {"flag": jnp.all(batch > 0), "name": "train"}

    (_, aux), _ = evaluate(SAM, table.params(), table.batch(8), jit=False, loss=loss, has_aux=True)
    assert aux["flag"].dtype == bool
    assert aux["name"] == "train"


@functools.cache
def temporary_bytes(size, **how):
    """What the compiler needs beside arguments and results, for a network whose activations are large."""

    def loss(params, batch):
        hidden = batch
        for _ in range(4):
            hidden = jnp.tanh(hidden @ params)
        return jnp.mean(hidden**2)

    params = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    state = jax.eval_shape(SAM.init, params)

    def run(params, state, batch):
        return optax_sam.sam_value_and_grad(loss, SAM, batch_argnums=1, **how)(params, batch, state=state)

    batch = jax.ShapeDtypeStruct((size, 32), jnp.float32)
    return jax.jit(run).lower(params, state, batch).compile().memory_analysis().temp_size_in_bytes


def test_microbatches_save_memory():
    full = temporary_bytes(4096)
    assert temporary_bytes(4096, microbatch_size=256) < full / 3
    assert temporary_bytes(4096, num_shards=4, microbatch_size=128) < full / 3


def test_shards_in_a_loop_take_the_memory_of_one():
    few, many = (temporary_bytes(256 * n, num_shards=n, shard_mode="loop") for n in (4, 16))
    assert many == few
    side_by_side = [temporary_bytes(256 * n, num_shards=n) for n in (4, 16)]
    assert side_by_side[1] > 3 * side_by_side[0]
    # Rounds lie in between.
    assert many < temporary_bytes(256 * 16, num_shards=16, shard_mode=4) < side_by_side[1]


def test_many_rounds_do_not_lose_bits_to_half_precision():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), table.params())
    batch = jnp.tile(table.batch(1), (256, 1))  # All shards alike: the mean is any of them.
    _, one = evaluate(SAM, params, batch[:1])
    _, many = evaluate(SAM, params, batch, num_shards=256, shard_mode="loop", batch_argnums=1)
    for x, y in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(x.astype(jnp.float32), y.astype(jnp.float32), rtol=2**-7)


@pytest.mark.parametrize("mode", ["vmap", "loop", 4])
def test_a_sum_over_shards_may_leave_the_range_of_float16(mode):
    def loss(params, batch):
        return (jnp.mean(batch) * params[0]).astype(jnp.float16)

    params, batch = jnp.ones(2, jnp.float16), jnp.full(64, 2e4, jnp.float32)
    value, pair = evaluate(SAM, params, batch, loss=loss, num_shards=64, shard_mode=mode, batch_argnums=1)
    assert value.dtype == pair.clean.dtype == jnp.float16
    np.testing.assert_array_equal([value, pair.clean[0], pair.perturbed[0]], [2e4] * 3)


def test_microbatches_keep_small_gradients_of_a_scaled_loss():
    """They are divided by the scale in float32, where 1e-8 is a number; as a float16 it would be zero."""

    def loss(params, batch):
        return jnp.sum(params * jnp.float16(1e-4) * jnp.mean(batch, 0))

    params, batch = jnp.ones(2, jnp.float16), jnp.full((8, 2), 1e-4, jnp.float16)
    run = optax_sam.sam_value_and_grad(loss, SAM, microbatch_size=2, batch_argnums=1)
    _, pair = run(params, batch, state=SAM.init(params), loss_scale=jnp.float32(8192))
    np.testing.assert_allclose(pair.clean, 1e-8, rtol=1e-2)


def test_noise_differs_between_shards_and_is_reproducible():
    variant = table.first(clean_at_params=False).make()
    params, state = table.params(), variant.init(table.params())

    def point(*peers):
        def pass_at(w, _):
            return Pass(w["scale"], w)

        return float(variant.evaluate(Loss(params, pass_at, pass_at, Peers(*peers)), state).value)

    points = [point(None, True, i, 8) for i in range(8)]
    assert len(set(points)) == 8
    assert points[3] == point(None, True, 3, 8)
    assert point() == points[0]


@pytest.mark.parametrize("jit", [False, True])
def test_the_mean_over_shards_is_not_one_over_an_outer_vmap(jit):
    """Of a number that is the same for all shards, too."""

    def evaluate(loss, state):
        clean = loss.ascent()
        size = loss.mean(state.rho)
        return loss.pair(clean, loss.at(jax.tree.map(lambda g: size * g, clean.gradient)))

    variant = optax_sam.sharpness_aware(0.1, evaluate=evaluate)
    params, batch = table.params(), table.batch(4)
    state = variant.init(params)
    value_and_grad = optax_sam.sam_value_and_grad(table.loss, variant, num_shards=2, batch_argnums=1)

    def run(rho):
        return value_and_grad(params, batch, state=state._replace(rho=rho))[1].perturbed

    radii = jnp.array([0.01, 0.03])
    together = (jax.jit if jit else lambda f: f)(jax.vmap(run))(radii)
    for i, rho in enumerate(radii):
        for x, y in zip(jax.tree.leaves(together), jax.tree.leaves(run(rho)), strict=True):
            np.testing.assert_allclose(x[i], y, rtol=1e-4, atol=1e-6)


def test_a_skipped_evaluation_is_skipped_in_every_shard():
    """`lax.cond` survives the `vmap` over shards, for the step is the same for all of them."""
    row = table.first(skips=True)
    variant, params = row.make(), table.params()
    calls = []

    def loss(params, batch):
        jax.debug.callback(lambda: calls.append(1))
        return table.loss(params, batch)

    counts = []
    state = variant.init(params)
    run = jax.jit(
        lambda state: optax_sam.sam_value_and_grad(loss, variant, num_shards=2, batch_argnums=1)(
            params, table.batch(8), state=state
        )
    )
    for step in range(len(row.evaluations)):
        jax.block_until_ready(run(state._replace(step=jnp.asarray(step, jnp.int32))))
        jax.effects_barrier()
        counts.append(len(calls))
        calls.clear()
    assert counts == list(row.evaluations)  # The callback is not mapped: once for both shards.


WRONG = [
    ({"num_shards": 3, "batch_argnums": 1}, r"`num_shards=3` does not divide the batch of 8 examples"),
    (
        {"microbatch_size": 5, "batch_argnums": 1},
        r"`microbatch_size=5` does not divide the batch of 8 examples",
    ),
    (
        {"num_shards": 2, "microbatch_size": 3, "batch_argnums": 1},
        r"`microbatch_size=3` does not divide the batch of 4 examples",
    ),
    ({"num_shards": 2}, r"`num_shards=2` needs `batch_argnums=`"),
    ({"microbatch_size": 2}, r"`microbatch_size=2` needs `batch_argnums=`"),
    (
        {"num_shards": 4, "shard_mode": 3, "batch_argnums": 1},
        r"`shard_mode=3` rounds do not divide `num_shards=4`",
    ),
    (
        {"num_shards": 4, "shard_mode": "scan", "batch_argnums": 1},
        r"`shard_mode` must be one of 'vmap', 'loop'",
    ),
    ({"num_shards": 0, "batch_argnums": 1}, r"`num_shards` must be an integer in the range \[1"),
    ({"microbatch_size": 0, "batch_argnums": 1}, r"`microbatch_size` must be an integer in the range \[1"),
    (
        {"num_shards": 2, "batch_argnums": 0},
        r"`batch_argnums` must name positional arguments other than params",
    ),
    ({"perturbation": "locally", "axis_name": "data"}, r"`perturbation` must be one of 'global', 'local'"),
    ({"perturbation": "local"}, r"`perturbation='local'` needs `axis_name="),
]


@pytest.mark.parametrize(("how", "words"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_wrong_arguments(how, words):
    with pytest.raises(ValueError, match=words):
        evaluate(SAM, table.params(), table.batch(8), jit=False, **how)


@pytest.mark.parametrize("how", [{"num_shards": 2}, {"microbatch_size": 2}], ids=["shards", "microbatches"])
def test_wrong_batches(how):
    params, state = table.params(), SAM.init(table.params())

    def loss(params, batch, mask):
        return table.loss(params, batch) * jnp.mean(mask)

    run = optax_sam.sam_value_and_grad(loss, SAM, batch_argnums=(1, 2), **how)
    with pytest.raises(
        ValueError, match=r"array whose first axis counts examples, got 0.5 at batch argument"
    ):
        run(params, table.batch(8), 0.5, state=state)
    with pytest.raises(ValueError, match=r"must agree in the number of examples, got .*8.*6"):
        run(params, table.batch(8), jnp.ones(6), state=state)
    with pytest.raises(ValueError, match=r"must agree in the number of examples, got no arrays"):
        run(params, None, None, state=state)


def test_microbatches_and_optax_multi_steps():
    """Two ways of accumulation for two purposes: an exact large batch, and a mean of SAM steps."""
    params, batch = table.params(), table.batch(8)
    tx = optax.chain(SAM, optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation())
    state, moved = tx.init(params), params
    for part in (batch[:4], batch[4:]):
        _, grads = optax_sam.sam_value_and_grad(table.loss, SAM)(moved, part, state=state)
        updates, state = tx.update(grads, state, moved)
        moved = optax.apply_updates(moved, updates)
    _, pair = evaluate(SAM, params, batch, num_shards=2, batch_argnums=1)
    expected = jax.tree.map(lambda w, g: w - 0.1 * g, params, pair.perturbed)
    assert_close(moved, expected, rtol=1e-5, atol=1e-6)
