"""An ascent gradient of a part of the batch, or in less precision: what it is, and who may have it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import table
import tiers
from jax.sharding import PartitionSpec as P

import optax_sam

RHO, EXAMPLES, PART = 0.1, 16, 4
SAM = optax_sam.sam(RHO)
ASCENT_ONLY = [row for row in table.ROWS if row.make().ascent_only]


pytestmark = pytest.mark.usefixtures("in_float64")


def loss(params, batch):
    """With an aux that tells which examples were seen, and in which dtype."""
    value = table.loss(params, batch)
    return value, {"mean": jnp.mean(batch), "loss": value, "count": jnp.asarray(batch.shape[0])}


def value_and_grad(params, batch):
    return jax.value_and_grad(table.loss)(params, batch)


def setting():
    params, batch = table.params(jnp.float64), table.batch(EXAMPLES, jnp.float64)
    return params, batch, SAM.init(params)


@functools.partial(jax.jit, static_argnames="dtype")
def by_hand(params, part, batch, *, dtype=jnp.float64):
    """SAM whose ascent sees its own part of the batch: value, clean and perturbed gradient."""
    cast = jax.tree.map(lambda x: x.astype(dtype), (params, part))
    value, clean = jax.tree.map(lambda x: x.astype(jnp.float64), value_and_grad(*cast))
    point = jax.tree.map(lambda w, g: w + RHO * g / optax.tree.norm(clean), params, clean)
    return value, clean, value_and_grad(point, batch)[1]


def assert_close(got, expected, rtol=1e-9):
    (value, _), grads = got
    pairs = zip(jax.tree.leaves((value, *grads[:2])), jax.tree.leaves(expected), strict=True)
    for x, y in pairs:
        assert x.dtype == jnp.float64
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-12)


def evaluate(params, batch, state, **how):
    fun = optax_sam.sam_value_and_grad(loss, SAM, has_aux=True, batch_argnums=1, **how)
    return fun(params, batch, state=state)


def mean(trees):
    return jax.tree.map(lambda *xs: sum(xs) / len(xs), *trees)


def test_the_first_examples():
    """An int and a fraction, whole, in microbatches and in shards, eager and compiled, against SAM."""
    params, batch, state = setting()

    def run(params, batch):
        return (
            evaluate(params, batch, state, ascent_examples=PART / EXAMPLES),
            evaluate(params, batch, state, ascent_examples=PART, microbatch_size=2),
            evaluate(params, batch, state, ascent_examples=PART, microbatch_size=8),
            evaluate(params, batch, state, ascent_examples=1, num_shards=4),
            evaluate(params, batch, state, ascent_examples=0.25, num_shards=4, shard_mode="loop"),
        )

    expected = by_hand(params, batch[:PART], batch)
    eager = evaluate(params, batch, state, ascent_examples=PART)
    *whole, side_by_side, in_turn = jax.jit(run)(params, batch)
    for got in (eager, *whole):
        assert_close(got, expected)
        (_, aux), _ = got
        np.testing.assert_allclose(aux["mean"], jnp.mean(batch[:PART]))
        assert aux["count"] == PART
    parts = mean([by_hand(params, part[:1], part) for part in batch.reshape(4, 4, 3)])
    for got in (side_by_side, in_turn):
        assert_close(got, parts)
    assert not np.allclose(parts[2]["scale"], expected[2]["scale"], rtol=1e-6)


@pytest.mark.parametrize("perturbation", ["global", "local"])
def test_on_devices(perturbation):
    """The first examples of what each device has."""
    params, batch, state = setting()
    shared = perturbation == "global"

    def run(params, batch):
        return evaluate(
            params, batch, state, ascent_examples=0.5, axis_name="data", perturbation=perturbation
        )[1][:2]

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    got = jax.jit(mapped)(params, batch)
    parts = batch.reshape(4, 4, 3)
    if shared:
        expected = by_hand(params, parts[:, :2].reshape(-1, 3), batch)
    else:
        expected = mean([by_hand(params, part[:2], part) for part in parts])
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected[1:]), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)


def test_less_precision():
    """Params and batch in the lower dtype, everything that comes out in that of params."""
    params, batch, state = setting()

    def run(params, batch):
        fun = optax_sam.sam_value_and_grad(loss, SAM, has_aux=True, ascent_dtype=jnp.float32)
        return (
            evaluate(params, batch, state, ascent_dtype=jnp.float32),
            evaluate(params, batch, state, ascent_dtype=jnp.float32, ascent_examples=PART),
            fun(params, batch, state=state),
        )

    lower, of_part, params_only = jax.jit(run)(params, batch)
    expected = by_hand(params, batch, batch, dtype=jnp.float32)
    assert_close(lower, expected, rtol=1e-5)
    assert_close(of_part, by_hand(params, batch[:PART], batch, dtype=jnp.float32), rtol=1e-5)
    # The batch was left in double precision here, and so is what is computed from both.
    assert_close(params_only, expected, rtol=1e-5)
    for (_, aux), grads in (lower, of_part):
        assert aux["loss"].dtype == aux["mean"].dtype == jnp.float64
        rounded = jax.tree.map(lambda g: g.astype(jnp.float32).astype(jnp.float64), grads.clean)
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), grads.clean, rounded)))


@pytest.mark.parametrize("row", ASCENT_ONLY, ids=lambda row: row.name)
def test_whole_batch_in_its_own_precision_changes_nothing(row):
    """And a part of it changes both gradients, for every variant that allows it."""
    params, batch, _ = setting()
    variant = row.make()

    @jax.jit
    def run(params, batch, state):
        def pair(**how):
            return optax_sam.sam_value_and_grad(table.loss, variant, batch_argnums=1, **how)(
                params, batch, state=state
            )[1]

        return pair(), pair(ascent_examples=EXAMPLES, ascent_dtype=jnp.float64), pair(ascent_examples=0.5)

    state, differ = variant.init(params), []
    for _ in range(2):  # Some begin with a plain step.
        pairs = run(params, batch, state)
        _, state = variant.update(pairs[0], state, params)
        plain, same, part = (jax.tree.leaves(pair[:2]) for pair in pairs)
        for x, y in zip(plain, same, strict=True):
            np.testing.assert_allclose(y, x, rtol=1e-12)
        differ.append([not np.allclose(z, x, rtol=1e-9) for x, z in zip(plain, part, strict=True)])
    assert all(map(any, zip(*differ, strict=True)))


def test_traced_once_for_each_shape_and_dtype():
    params, batch, state = setting()
    seen = []

    def traced(params, batch):
        seen.append((batch.shape[0], str(batch.dtype)))
        return table.loss(params, batch)

    steps = optax_sam.sam(RHO, steps=3)
    how = {"ascent_examples": PART, "ascent_dtype": jnp.float32, "batch_argnums": 1}
    fun = optax_sam.sam_value_and_grad(traced, steps, **how)
    jax.jit(lambda params, batch: fun(params, batch, state=state)).lower(params, batch)
    assert seen == [(PART, "float32"), (EXAMPLES, "float64")]


def test_variants_that_descend_along_the_clean_gradient_are_refused():
    allowed = {row.name for row in ASCENT_ONLY}
    assert allowed.isdisjoint(
        ("gsam", "wsam", "looksam", "bsam", "hessian_sam", "msam", "async_sam_perturbed")
    )
    assert {"sam", "sam_pgd", "asam", "gcsam", "async_sam", "extragradient_ahead"} <= allowed
    for row in set(table.ROWS) - set(ASCENT_ONLY):
        for how in ({"ascent_examples": 2}, {"ascent_dtype": jnp.bfloat16}):
            with pytest.raises(ValueError, match=r"`ascent_(examples|dtype)`.*leave it out"):
                optax_sam.sam_value_and_grad(table.loss, row.make(), batch_argnums=1, **how)


def test_a_variant_of_ones_own_says_that_its_clean_gradient_is_for_the_ascent():
    def descent(gradients, state, params):
        del params
        return gradients.perturbed, state.memory

    own = [optax_sam.sharpness_aware(RHO, None, descent, ascent_only=only) for only in (None, True)]
    assert [variant.ascent_only for variant in own] == [False, True]
    assert optax_sam.sharpness_aware(RHO).ascent_only


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ({"ascent_examples": 2, "batch_argnums": None}, ValueError, "`ascent_examples=2` needs"),
        ({"ascent_examples": 0}, ValueError, r"`ascent_examples` must be an integer in .*\[1, inf\), got 0"),
        (
            {"ascent_examples": 1.5},
            ValueError,
            r"`ascent_examples` must be a number in .*\(0.0, 1.0\], got 1.5",
        ),
        ({"ascent_examples": True}, TypeError, "`ascent_examples` must be an integer, got True"),
        ({"ascent_examples": 17}, ValueError, "`ascent_examples=17` is more than the 16 examples"),
        (
            {"ascent_examples": 5, "num_shards": 4},
            ValueError,
            "more than the 4 examples of a batch, or of a",
        ),
        (
            {"ascent_examples": 6, "microbatch_size": 4},
            ValueError,
            "`microbatch_size=4` does not divide the 6 examples of the ascent",
        ),
        ({"ascent_dtype": "int8"}, TypeError, "`ascent_dtype` must be a floating-point dtype such as .*int8"),
        ({"ascent_dtype": "half a float"}, TypeError, "`ascent_dtype` must be a floating-point dtype"),
    ],
)
def test_wrong_arguments(how, error, words):
    params, batch, state = setting()
    with pytest.raises(error, match=words):
        optax_sam.sam_value_and_grad(table.loss, SAM, **{"batch_argnums": 1, **how})(
            params, batch, state=state
        )


@pytest.mark.parametrize("mode", tiers.later(["vmap", "loop", 2], [2]))
def test_what_aux_holds_besides_arrays_is_of_the_examples_that_were_seen(mode):
    """A number of Python, and a list as long as the batch, though the loss is traced with two batches."""
    params, batch, state = setting()

    def counted(params, batch):
        return table.loss(params, batch), {"count": len(batch), "means": [jnp.mean(x) for x in batch]}

    fun = optax_sam.sam_value_and_grad(
        counted, SAM, has_aux=True, batch_argnums=1, num_shards=4, ascent_examples=2, shard_mode=mode
    )
    (_, eager), _ = fun(params, batch, state=state)
    (_, compiled), _ = jax.jit(fun)(params, batch, state=state)
    for aux in (eager, compiled):
        assert aux["count"] == 4 * 2
        expected = batch.reshape(4, 4, 3)[:, :2].mean(axis=(0, 2))
        np.testing.assert_allclose(jnp.stack(aux["means"]), expected, rtol=1e-9)


def test_sharpness_between_different_losses_is_unknown():
    """Of other examples, or in less precision, whose rounding is as large as the sharpness."""
    params, batch, state = setting()
    options = {"ascent_examples": PART}, {"ascent_dtype": jnp.float32}, {}
    for how, unknown in zip(options, (True, True, False), strict=True):
        fun = optax_sam.sam_value_and_grad(table.loss, SAM, return_metrics=True, batch_argnums=1, **how)
        *_, metrics = fun(params, batch, state=state)
        assert jnp.isnan(metrics.sharpness) == unknown
        assert jnp.isfinite(metrics.loss)
        assert jnp.isfinite(metrics.perturbed_loss)
