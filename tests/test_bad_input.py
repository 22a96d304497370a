"""Bad input is refused in words: each message names the argument, what was got, and what to write."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import table
from flax import nnx

import optax_sam
from optax_sam import _checks

SAM = optax_sam.sam(0.1)
PARAMS = table.params()
BASE = optax.sgd(0.1)

CONSTRUCTORS: list[tuple[Any, type[Exception], str]] = [
    (lambda: optax_sam.sam(-0.1), ValueError, r"`rho` must be a number in the range \[0.0, inf\), got -0.1"),
    (lambda: optax_sam.sam(float("nan")), ValueError, "`rho` must be a number in the range .* got nan"),
    (lambda: optax_sam.sam(float("inf")), ValueError, "`rho` must be .* got inf"),
    (
        lambda: optax_sam.sam("0.1"),
        TypeError,
        "`rho` must be a number or a schedule .* got '0.1' of type str",
    ),
    (lambda: optax_sam.sam(None), TypeError, "`rho` must be a number or a schedule"),
    (lambda: optax_sam.sam(True), TypeError, "`rho` must be a number or a schedule"),
    (
        lambda: optax_sam.sam(steps=0),
        ValueError,
        r"`steps` must be an integer in the range \[1, inf\), got 0",
    ),
    (lambda: optax_sam.sam(steps=1.5), ValueError, "`steps` must be an integer"),
    (lambda: optax_sam.sam(steps=2.0), ValueError, "`steps` must be an integer .* got 2.0"),
    (lambda: optax_sam.sam(step_mode="pdg"), ValueError, "`step_mode` must be one of 'pgd', 'split', 'free'"),
    (
        lambda: optax_sam.sam(steps=2, ascent=optax_sam.ascent.unnormalized()),
        ValueError,
        "`step_mode='pgd'` projects to a ball, .*`step_mode='split'`",
    ),
    (
        lambda: optax_sam.looksam(ascent=optax_sam.ascent.normalized),
        TypeError,
        r"`ascent` must be an ascent rule, .* got `normalized`, which takes \(ord, eps\)",
    ),
    (
        lambda: optax_sam.gsam(ascent="adaptive"),
        TypeError,
        "`ascent` must be an ascent rule, .* got 'adaptive' of type str",
    ),
    (
        lambda: optax_sam.ascent.masked(True, lambda gradient, rho: rho * gradient),
        TypeError,
        r"`rule` must be an ascent rule, .* which takes \(gradient, rho\)",
    ),
    (
        lambda: optax_sam.ascent.centralize(jnp.ones((2, 3)), output_axis=2),
        ValueError,
        r"`output_axis` is 2, but a leaf has shape \(2, 3\)",
    ),
    (
        lambda: optax_sam.ascent.adaptive(granularity="filter", output_axis=-3)(PARAMS, 0.1, PARAMS),
        ValueError,
        "`output_axis` is -3, but a leaf has shape",
    ),
    (lambda: optax_sam.asam(eta=-1.0), ValueError, "`eta` must be .* got -1.0"),
    (lambda: optax_sam.asam(rho=-1.0), ValueError, "`rho`"),
    (lambda: optax_sam.gcsam(rho=-1.0), ValueError, "`rho`"),
    (lambda: optax_sam.gsam(alpha=-0.1), ValueError, "`alpha` must be .* got -0.1"),
    (lambda: optax_sam.gsam(objective="fp"), ValueError, "`objective` must be one of 'perturbed', 'clean'"),
    (
        lambda: optax_sam.wsam(gamma=1.0),
        ValueError,
        r"`gamma` must be a number in the range \[0.0, 1.0\), got 1.0",
    ),
    (
        lambda: optax_sam.wsam(gamma=0.9, alpha=1.0),
        ValueError,
        "give one of them, got gamma=0.9 and alpha=1.0",
    ),
    (lambda: optax_sam.wsam(alpha=-1.0), ValueError, "`alpha`"),
    (lambda: optax_sam.decoupled_wsam(0.1, 0.1), TypeError, "`base_optimizer` must be an Optax optimizer"),
    (lambda: optax_sam.decoupled_wsam(BASE, -0.1), ValueError, "`learning_rate` must be"),
    (lambda: optax_sam.decoupled_wsam(BASE, 0.1, gamma=0.9, alpha=1.0), ValueError, "give one of them"),
    (
        lambda: optax_sam.bsam(0.1, 0),
        ValueError,
        r"`num_data` must be an integer in the range \[1, inf\), got 0",
    ),
    (lambda: optax_sam.bsam(-0.1, 1), ValueError, "`learning_rate`"),
    (lambda: optax_sam.bsam(0.1, 1, b1=1.0), ValueError, r"`b1` must be .*\[0.0, 1.0\)"),
    (lambda: optax_sam.bsam(0.1, 1, b2=-0.1), ValueError, "`b2`"),
    (lambda: optax_sam.bsam(0.1, 1, weight_decay=-1.0), ValueError, "`weight_decay`"),
    (lambda: optax_sam.bsam(0.1, 1, damping=-1.0), ValueError, "`damping`"),
    (
        lambda: optax_sam.bsam(0.1, 1, initial_precision=0.0),
        ValueError,
        r"`initial_precision` must be .*\(0.0, inf\)",
    ),
    (
        lambda: optax_sam.bsam(0.1, 1, key="a"),
        TypeError,
        r"`key` must be a random key such as `jax.random.key\(0\)`",
    ),
    (lambda: optax_sam.bsam(0.1, 1, key=jnp.ones(3)), TypeError, "`key` must be a random key"),
    (lambda: optax_sam.looksam(k=0), ValueError, r"`k` must be an integer in the range \[1, inf\), got 0"),
    (lambda: optax_sam.looksam(alpha=-1.0), ValueError, "`alpha`"),
    (lambda: optax_sam.async_sam(reuse="old"), ValueError, "`reuse` must be one of 'clean', 'perturbed'"),
    (lambda: optax_sam.msam(0.1), TypeError, "`base_optimizer` must be an Optax optimizer"),
    (
        lambda: optax_sam.msam(optax.sgd(0.1)).init(PARAMS),
        ValueError,
        "`base_optimizer` must keep one momentum .* keeps 0",
    ),
    (
        lambda: optax_sam.msam(optax.chain(optax.trace(0.9), optax.adam(0.1))).init(PARAMS),
        ValueError,
        "keeps 2",
    ),
    (
        lambda: optax_sam.same(gains=(1, 2, 3)),
        ValueError,
        r"`gains` must be a tuple of 4 numbers, got \(1, 2, 3\)",
    ),
    (lambda: optax_sam.same(clean_gains=(1, 2, 3, 4, 5)), ValueError, "`clean_gains` must be a tuple of 4"),
    (lambda: optax_sam.same(gains=(1, 2, 3, "a")), TypeError, r"`gains\[3\]` must be a number"),
    (lambda: optax_sam.custom_same(condition=0.0), ValueError, "`condition`"),
    (lambda: optax_sam.saner(keep=-0.5), ValueError, "`keep`"),
    (lambda: optax_sam.hessian_sam(difference=0.0), ValueError, r"`difference` must be .*\(0.0, inf\)"),
    (lambda: optax_sam.extragradient(-0.1), ValueError, "`step_size` must be"),
    (lambda: optax_sam.extragradient(weights=(1.0,)), ValueError, "`weights` must be a tuple of 2 numbers"),
    (lambda: optax_sam.ire(None), TypeError, "`base_optimizer` must be an Optax optimizer"),
    (lambda: optax_sam.ire(BASE, -1.0), ValueError, "`kappa`"),
    (
        lambda: optax_sam.ire(BASE, flat_fraction=1.1),
        ValueError,
        r"`flat_fraction` must be .*\[0.0, 1.0\], got 1.1",
    ),
    (lambda: optax_sam.ire(BASE, interval=0), ValueError, "`interval`"),
    (lambda: optax_sam.ire(BASE, start_step=-1), ValueError, "`start_step`"),
    (
        lambda: optax_sam.ascent.normalized(1.0),
        ValueError,
        r"`ord` must be a number in the range \(1.0, inf\)",
    ),
    (lambda: optax_sam.ascent.normalized(eps=-1.0), ValueError, "`eps`"),
    (
        lambda: optax_sam.ascent.adaptive(granularity="row"),
        ValueError,
        "`granularity` must be one of 'elementwise'",
    ),
    (
        lambda: optax_sam.ascent.masked(True, norm="some"),
        ValueError,
        "`norm` must be one of 'selected', 'all'",
    ),
    (lambda: optax_sam.ascent.fisher(-1.0), ValueError, "`eta`"),
    (lambda: optax_sam.gcsam(output_axis="x"), TypeError, "`output_axis` must be an integer, got 'x'"),
    (lambda: optax_sam.ascent.centralized(output_axis=0.5), ValueError, "`output_axis` .*got 0.5"),
    (lambda: optax_sam.ascent.centralize(jnp.ones((2, 2)), 0.5), ValueError, "`output_axis` .*got 0.5"),
    (
        lambda: optax_sam.sam(jnp.asarray(-0.1)),
        ValueError,
        r"`rho` must be a number in the range \[0.0, inf\)",
    ),
    (lambda: optax_sam.sam(jnp.array([0.1, 0.2])), TypeError, "`rho` must be a number, got Array"),
    (
        lambda: optax_sam.sam(steps=np.int64(2), ascent=optax_sam.ascent.unnormalized()),
        ValueError,
        "`step_mode='pgd'` projects to a ball",
    ),
    (
        lambda: optax_sam.gnp(alpha=1.5),
        ValueError,
        r"`alpha` must be a number in the range \[0.0, 1.0\], got 1.5",
    ),
    (lambda: optax_sam.losses.bisam(jnp.ones((2, 3)), jnp.ones(2)), ValueError, "`labels` must be integers"),
    (
        lambda: optax_sam.losses.bisam(jnp.ones((2, 3)), jnp.ones(3, int)),
        ValueError,
        r"`labels` must be .*\(2,\), got shape \(3,\)",
    ),
    (
        lambda: optax_sam.losses.bisam(jnp.ones(3), jnp.array(1), form="exp"),
        ValueError,
        "`form` must be one of 'log', 'tanh'",
    ),
    (
        lambda: optax_sam.losses.trajectory(jnp.ones(3), jnp.ones(2)),
        ValueError,
        r"`past_logits` must have the shape of `logits`, \(3,\), got \(2,\)",
    ),
    (lambda: optax_sam.losses.trajectory(jnp.ones(3), jnp.ones(3), 0.0), ValueError, "`temperature`"),
    (lambda: optax_sam.preconditioned_sam(power=-1.0), ValueError, "`power`"),
    (
        lambda: optax_sam.preconditioned_sam(decay=1.0),
        ValueError,
        r"`decay` must be .* \[0.0, 1.0\), got 1.0",
    ),
    (lambda: optax_sam.preconditioned_sam(eps=0.0), ValueError, "`eps`"),
    (lambda: optax_sam.eigen_sam(alpha=-1.0), ValueError, "`alpha`"),
    (lambda: optax_sam.eigen_sam(every=0), ValueError, r"`every` must be an integer in the range \[1, inf\)"),
    (lambda: optax_sam.eigen_sam(iterations=0), ValueError, "`iterations`"),
    (lambda: optax_sam.cr_sam(gamma=-1.0), ValueError, "`gamma`"),
    (lambda: optax_sam.cr_sam(beta=-1.0), ValueError, "`beta`"),
    (lambda: optax_sam.sampa(-0.1), ValueError, "`learning_rate`"),
    (lambda: optax_sam.sampa(0.1, mix=2.0), ValueError, r"`mix` must be a number in the range \[0.0, 1.0\]"),
    (lambda: optax_sam.ssam_f(sparsity=1.0), ValueError, r"`sparsity` must be .* \[0.0, 1.0\), got 1.0"),
    (lambda: optax_sam.ssam_d(every=0), ValueError, r"`every` must be an integer in the range \[1, inf\)"),
    (lambda: optax_sam.ssam_d(drop=1.5), ValueError, r"`drop` must be .* \[0.0, 1.0\], got 1.5"),
    (lambda: optax_sam.ssam_d(key="seed"), TypeError, "`key` must be a random key"),
    (lambda: optax_sam.lookbehind(0.1), TypeError, r"`base_optimizer` must be an Optax optimizer .* got 0.1"),
    (lambda: optax_sam.lookbehind(optax.sgd(0.1), k=0), ValueError, "`k` must be an integer"),
    (lambda: optax_sam.lookbehind(optax.sgd(0.1), alpha=0.0), ValueError, r"`alpha` must be .*\(0.0, 1.0\]"),
    (
        lambda: optax_sam.lookbehind(optax.sgd(0.1), alpha="auto"),
        ValueError,
        "`alpha` must be one of 'adaptive'",
    ),
    (lambda: optax_sam.sam_sps(max_learning_rate=0.0), ValueError, "`max_learning_rate`"),
    (lambda: optax_sam.sam_sps(weight_decay=-1.0), ValueError, "`weight_decay`"),
    (lambda: optax_sam.sam_sps(min_loss=float("inf")), ValueError, "`min_loss`"),
    (lambda: optax_sam.unified_sam(mix=-0.5), ValueError, r"`mix` must be .* \[0.0, 1.0\], got -0.5"),
    (lambda: optax_sam.le_sam(-1.0), ValueError, "`loss_rise` must be a number"),
    (lambda: optax_sam.le_sam(rho_max=0.0), ValueError, "`rho_max` must be a number"),
    (lambda: optax_sam.xsam(alpha=-0.1), ValueError, "`alpha`"),
    (lambda: optax_sam.ascent.extrapolated(-1.0), ValueError, "`step_size`"),
    (lambda: optax_sam.ascent.layerwise(eta=-1.0), ValueError, "`eta`"),
    (
        lambda: optax_sam.ascent.bounded(None, 0.0),
        ValueError,
        r"`fraction` must be a number in the range \(0.0, inf\), got 0.0",
    ),
    (lambda: optax_sam.ascent.matrix("frobenius"), ValueError, "`norm` must be one of 'spectral', 'nuclear'"),
    (lambda: optax_sam.ascent.matrix("nuclear", iterations=0), ValueError, "`iterations`"),
    (
        lambda: optax_sam.ascent.random_mask(0.0),
        ValueError,
        r"`keep` must be a number in the range \(0.0, 1.0\], got 0.0",
    ),
    (lambda: optax_sam.ascent.random_mask(0.5, "seed"), TypeError, "`key` must be a random key"),
    (lambda: optax_sam.ascent.zscore(1.0), ValueError, r"`quantile` must be .* \[0.0, 1.0\), got 1.0"),
    (
        lambda: optax_sam.ascent.scaled({"layer": -1.0, "scale": 1.0}),
        ValueError,
        r"`multipliers` must be a number in the range \[0.0, inf\), got -1.0",
    ),
    (lambda: optax_sam.ascent.scaled("2"), TypeError, "`multipliers` must be a number, got '2'"),
    (
        lambda: optax_sam.ascent.scaled({"layers": 2.0})(PARAMS, 0.1, PARAMS),
        ValueError,
        "`multipliers` must be a pytree of numbers with the structure of params",
    ),
    (
        lambda: optax_sam.ascent.scaled(lambda params: params)(PARAMS, 0.1, {"w": -1}),
        ValueError,
        "`multipliers` must be a number in the range",
    ),
    (
        lambda: optax_sam.schedules.rho_from_learning_rate(0.1, 0.5, lr_max=1.0),  # pyright: ignore
        TypeError,
        "`learning_rate` must be a schedule, .* got 0.1",
    ),
    (
        lambda: optax_sam.schedules.rho_from_learning_rate(lambda _: 0.1, 0.5, 0.6, lr_max=1.0),
        ValueError,
        r"`rho_max` must be a number in the range \[0.6, inf\), got 0.5",
    ),
    (lambda: optax_sam.schedules.warmup(-0.1, 10), ValueError, r"`rho` must be a number in the range \[0.0"),
    (lambda: optax_sam.schedules.warmup(0.1, 0), ValueError, r"`steps` must be an integer in the range \[1"),
    (lambda: optax_sam.schedules.warmup(0.1, 2.5), ValueError, r"`steps` must be an integer"),  # pyright: ignore
]


@pytest.mark.parametrize(("call", "error", "words"), CONSTRUCTORS)
def test_constructors(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def evaluate(variant: Any = SAM, state: Any = None, params: Any = None, **options: Any) -> Any:
    params = PARAMS if params is None else params
    state = optax.chain(SAM, BASE).init(params) if state is None else state
    return optax_sam.sam_value_and_grad(table.loss, variant, **options)(params, table.batch(), state=state)


LOOKSAM = optax_sam.looksam()
VECTOR = {"layer": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}, "scale": jnp.ones(2)}
CHAIN = optax.chain(SAM, BASE)
TWICE = optax.chain(SAM, optax_sam.gsam(), BASE)

CALLS: list[tuple[Any, type[Exception], str]] = [
    (lambda: evaluate(CHAIN), TypeError, "`variant` must be the bare variant, .*A chain, .* no longer knows"),
    (lambda: evaluate(BASE), TypeError, "`variant` must be the bare variant"),
    (
        lambda: optax_sam.sam_value_and_grad(table.loss, optax.inject_hyperparams(optax_sam.sam)(0.1)),
        TypeError,
        "any other wrapper",
    ),
    (
        lambda: optax_sam.sam_value_and_grad(None, SAM),
        TypeError,
        "`fun` must be the loss, a function, got NoneType",
    ),
    (
        lambda: optax_sam.sam_value_and_grad(table.loss, SAM)(PARAMS, table.batch()),
        TypeError,
        "`state=opt_state`",
    ),
    (lambda: evaluate(state=BASE.init(PARAMS)), ValueError, r"holds no state .* `tx = optax.chain\(variant"),
    (lambda: evaluate(state=TWICE.init(PARAMS)), ValueError, "states of 2 sharpness-aware variants"),
    (
        lambda: evaluate(optax_sam.looksam(), state=optax.chain(SAM, BASE).init(PARAMS)),
        ValueError,
        "`state` does not fit the variant and the params",
    ),
    (
        lambda: evaluate(
            LOOKSAM, state=optax.tree.map_params(LOOKSAM, lambda x: x[:1], LOOKSAM.init(VECTOR))
        ),
        ValueError,
        r"`state` does not fit .*\(1,\) at \.memory\.orthogonal\['layer'\]\['bias'\].*in_specs=P\(\)",
    ),
    (
        lambda: evaluate(LOOKSAM, state=LOOKSAM.init({"layer": PARAMS["layer"]})),
        ValueError,
        r"holds 5 arrays, where .* makes 6 \(they differ first at \.memory\.orthogonal\['scale'\]\)",
    ),
    (lambda: evaluate(perturbation="globl"), ValueError, "`perturbation` must be one of 'global', 'local'"),
    (lambda: evaluate(perturbation="local"), ValueError, "`perturbation='local'` needs `axis_name=`"),
    (lambda: evaluate(argnums=5), TypeError, "`argnums` is 5, but only 2 positional arguments"),
    (lambda: evaluate(argnums=-3), TypeError, "`argnums` is -3, but only 2 positional arguments"),
    (lambda: evaluate(argnums="w"), TypeError, "`argnums` must be an integer or a sequence of .*got 'w'"),
    (
        lambda: evaluate(num_shards=2, batch_argnums="b"),
        TypeError,
        "`batch_argnums` must be an integer or a sequence of integers, got 'b'",
    ),
    (
        lambda: optax_sam.sam_value_and_grad(table.loss, SAM, num_shards=1, batch_argnums=1)(
            PARAMS, table.batch()[:0], state=SAM.init(PARAMS)
        ),
        ValueError,
        "must hold at least one example",
    ),
    (
        lambda: evaluate(optax_sam.sam(ascent=optax_sam.ascent.masked({"layers": True}))),
        ValueError,
        r"`mask` must be a pytree of booleans with .* got nothing at \['layer'\], where params have a dict\.",
    ),
    (
        lambda: evaluate(state=SAM.init(PARAMS), params={"n": jnp.arange(3)}),
        TypeError,
        r"got dtype int32 at \['n'\]: pass it to the loss as another argument",
    ),
    (
        lambda: evaluate(state=SAM.init(PARAMS), params={"z": jnp.ones(3, jnp.complex64)}),
        TypeError,
        "got dtype complex64 .*: split it into a real and an imaginary leaf",
    ),
    (lambda: evaluate(state=SAM.init(PARAMS), params={"name": "mlp"}), TypeError, "got 'mlp' of type str at"),
]


@pytest.mark.parametrize(("call", "error", "words"), CALLS)
def test_calls(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def update(updates: Any, params: Any = PARAMS, **kwargs: Any) -> Any:
    return SAM.update(updates, SAM.init(PARAMS), params, **kwargs)


SMALLER = {"layer": PARAMS["layer"]}
OTHER_SHAPE = {**PARAMS, "scale": jnp.ones(2)}

UPDATES: list[tuple[Any, type[Exception], str]] = [
    (
        lambda: update(PARAMS),
        TypeError,
        r"needs two gradients .*sam_value_and_grad.*clean_updates=grads.clean",
    ),
    (lambda: update(jnp.ones(3)), TypeError, "needs two gradients and got a single one"),
    (lambda: update({"clean": PARAMS}), TypeError, "lost its perturbed half: flax.nnx drops it"),
    (
        lambda: update(optax_sam.SAMGradients(PARAMS, SMALLER)),
        ValueError,
        r"The perturbed gradient .*, got nothing at \['scale'\], where params have an array of shape \(\)",
    ),
    (
        lambda: update(optax_sam.SAMGradients(SMALLER, PARAMS)),
        ValueError,
        "The clean gradient must have the structure of params",
    ),
    (
        lambda: update(optax_sam.SAMGradients(PARAMS, OTHER_SHAPE)),
        ValueError,
        r"must have the shapes of params, got \(2,\) at \['scale'\], where params have \(\)",
    ),
    (
        lambda: update(PARAMS, clean_updates=OTHER_SHAPE),
        ValueError,
        "The clean gradient must have the shapes",
    ),
    (
        lambda: update(optax_sam.SAMGradients(PARAMS, SMALLER), None),
        ValueError,
        "The clean gradient must have",
    ),
]


@pytest.mark.parametrize(("call", "error", "words"), UPDATES)
def test_updates(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_ire_takes_a_curvature_shaped_like_params() -> None:
    tx = optax_sam.ire(BASE)
    with pytest.raises(ValueError, match=r"`curvature_updates` must have the shapes of params, got \(2,\)"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, curvature_updates=OTHER_SHAPE)


def test_calls_of_another_form() -> None:
    state, batch = SAM.init(PARAMS), table.batch(8)
    by_keyword = optax_sam.sam_value_and_grad(table.loss, SAM, num_shards=2, batch_argnums=1)
    with pytest.raises(TypeError, match=r"`batch_argnums` is 1, but only 1 positional .* batch by position"):
        by_keyword(PARAMS, batch=batch, state=state)
    no_aux = optax_sam.sam_value_and_grad(table.loss, SAM, has_aux=True)
    with pytest.raises(
        TypeError, match=r"With `has_aux=True` `fun` must return a pair, `\(loss, aux\)`, got"
    ):
        no_aux(PARAMS, batch, state=state)


def test_unusual_input_that_is_right() -> None:
    """Positions of NumPy, a loss that is a number of Python, a dict whose keys have no order."""
    state, batch = SAM.init(PARAMS), table.batch(8)
    how = {"argnums": np.int64(0), "num_shards": 2, "batch_argnums": np.int64(1)}
    optax_sam.sam_value_and_grad(table.loss, SAM, **how)(PARAMS, batch, state=state)
    both = optax_sam.sam_value_and_grad(lambda a, b: jnp.sum(a * b), SAM, range(2))
    _, grads = both(jnp.ones(2), jnp.ones(2), state=SAM.init((jnp.ones(2), jnp.ones(2))))
    assert len(grads.clean) == 2
    value, *_ = optax_sam.sam_value_and_grad(lambda _: 3.0, SAM, return_metrics=True)(PARAMS, state=state)
    assert value == 3.0
    with_options = optax_sam.sam_value_and_grad(lambda w, batch, _: table.loss(w, batch), SAM)
    with_options(PARAMS, batch, {0: 1.0, "a": 2.0}, state=state)


def test_a_loss_of_nnx_without_its_aux() -> None:
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    no_aux = optax_sam.nnx.sam_value_and_grad(lambda m, x: jnp.mean(m(x) ** 2), SAM, has_aux=True)
    with pytest.raises(TypeError, match=r"With `has_aux=True` `fun` must return a pair"):
        no_aux(model, table.batch(), state=SAM.init(nnx.state(model, nnx.Param)))


def test_bsam_needs_params() -> None:
    variant = optax_sam.bsam(0.1, 10)
    with pytest.raises(ValueError, match="`bsam` needs the params"):
        variant.update(optax_sam.SAMGradients(PARAMS, PARAMS), variant.init(PARAMS))


def test_lookbehind_needs_params_and_all_gradients() -> None:
    variant = optax_sam.lookbehind(optax.sgd(0.1), k=3)
    state = variant.init(PARAMS)
    with pytest.raises(ValueError, match="`lookbehind` needs the params"):
        variant.update(optax_sam.SAMGradients(PARAMS, PARAMS), state)
    with pytest.raises(
        TypeError, match=r"needs the gradients of all its points: .*statistics=grads.statistics"
    ):
        variant.update(PARAMS, state, PARAMS, clean_updates=PARAMS)


def test_bsam_sample_needs_its_state() -> None:
    with pytest.raises(ValueError, match=r"`state` must be the state of `optax_sam.bsam`"):
        optax_sam.bsam_sample(jax.random.key(0), PARAMS, SAM.init(PARAMS), 10)


def test_memory_keeps_its_shapes() -> None:
    variant = optax_sam.sharpness_aware(
        0.1, None, lambda pair, *_: (pair.perturbed, jnp.zeros(3)), lambda _: jnp.zeros(())
    )
    with pytest.raises(
        ValueError, match=r"must keep its shapes from step to step, got \(3,\) where the state"
    ):
        variant.update(optax_sam.SAMGradients(PARAMS, PARAMS), variant.init(PARAMS), PARAMS)


def test_params_with_keys_of_the_pair() -> None:
    """Params that happen to be called clean and perturbed are not taken for a pair of gradients."""
    params = {"clean": jnp.ones(2), "perturbed": jnp.ones(3)}
    with pytest.raises(TypeError, match="needs two gradients"):
        SAM.update(params, SAM.init(params), params)


def test_transformations_before_the_variant() -> None:
    """What keeps a state shaped like params fails on a pair; a clip would not, and that is documented."""
    variant, params = SAM, PARAMS
    _, grads = optax_sam.sam_value_and_grad(table.loss, variant)(
        params, table.batch(), state=variant.init(params)
    )
    for before in (optax.scale_by_adam(), optax.trace(0.9), optax.add_decayed_weights(0.1)):
        tx = optax.chain(before, variant)
        with pytest.raises(Exception, match=r"(?i)structure|mismatch|prefix|arity|custom node|named tuple"):
            tx.update(grads, tx.init(params), params)


ARRAY = jnp.ones(3)


class Point(NamedTuple):
    x: Any
    y: Any


TREES: list[tuple[Any, Any, str]] = [
    ({"a": ARRAY}, {"a": ARRAY, "b": ARRAY}, "nothing at ['b'], where params have an array of shape (3,)"),
    ({"a": ARRAY, "b": {}}, {"a": ARRAY}, "a dict at ['b'], where params have nothing"),
    ({"a": [ARRAY]}, {"a": (ARRAY,)}, "a list at ['a'], where params have a tuple"),
    ({"a": [ARRAY]}, {"a": [ARRAY, ARRAY]}, "nothing at ['a'][1], where params have an array of shape (3,)"),
    ({"a": None}, {"a": ARRAY}, "None at ['a'], where params have an array of shape (3,)"),
    ({"a": ARRAY}, {"a": {"b": ARRAY}}, "an array of shape (3,) at ['a'], where params have a dict"),
    (Point(1, {"z": 2}), Point(1, {"z": (2,)}), "an int at .y['z'], where params have a tuple"),
    (Point(1, 2), (1, 2), "nothing at [0], where params have an int"),
    (ARRAY, (), "an array of shape (3,) at the top, where params have a tuple"),
    (jnp.ones(2), ARRAY, ""),  # Shapes are another question.
]


@pytest.mark.parametrize(("tree", "params", "words"), TREES)
def test_trees_that_differ(tree: Any, params: Any, words: str) -> None:
    """The first leaf that differs, by its path; an empty text only where the structures are the same."""
    assert _checks.difference(tree, params, "params have") == words
    assert (words == "") == (jax.tree.structure(tree) == jax.tree.structure(params))


def test_messages_about_large_trees_are_short() -> None:
    layers = [{"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)} for _ in range(100)]
    with pytest.raises(ValueError, match=r"got nothing at \[99\]\['bias'\], where params have") as caught:
        SAM.update(optax_sam.SAMGradients(layers, [*layers[:99], {"kernel": 1}]), SAM.init(layers), layers)
    assert len(str(caught.value)) < 300
