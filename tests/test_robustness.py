"""Whatever the tree, the dtypes and the scale, and whatever goes wrong on the way."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import table
import tiers
from hypothesis import given, settings
from hypothesis import strategies as st

import optax_sam
from optax_sam import _tree, ascent

pytestmark = pytest.mark.by_tier

every_row = pytest.mark.parametrize("row", table.ROWS, ids=lambda row: row.name)

# Generated cases, 2,200 in all with `--full`. The report shows their seed, and at its end their number.
CASES = {"norms": 700, "perturbations": 600, "steps": 400, "variants": 500}


def cases(name: str) -> Any:
    return settings(max_examples=tiers.cases(CASES[name]), deadline=None, database=None, print_blob=True)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What an array of a random tree is like."""

    shape: tuple[int, ...]
    dtype: Any
    exponent: int
    masked: bool


# Few shapes: in eager mode every operation is compiled once for each.
SHAPES = ((), (0,), (3,), (2, 3))
# Exponents: within the range in which sums of squares are accurate in float32.
DTYPES = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)
LEAVES = st.builds(
    Leaf, st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.integers(-14, 14), st.booleans()
)
TREES = st.recursive(
    LEAVES | st.none(),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.dictionaries(st.sampled_from("abcd"), inner),
    max_leaves=4,
)
SEEDS = st.integers(0, 2**32 - 1)


def grow(tree: Any, seed: int, *, scaled: bool = True) -> Any:
    """A tree of arrays with finite entries, some of them zero."""
    rng = np.random.default_rng(seed)

    def leaf(x: Leaf) -> jax.Array:
        values = rng.normal(size=x.shape) * (rng.random(size=x.shape) < 0.9)
        largest = float(jnp.finfo(x.dtype).max) / 64  # Leaves room for what adds or amplifies.
        values = np.clip(values * 10.0 ** (x.exponent if scaled else 0), -largest, largest)
        return jnp.asarray(values, x.dtype)

    return jax.tree.map(leaf, tree)


def selected(tree: Any, masks: bool) -> Any:
    """Which leaves are perturbed, and the mask: one that happens to select none is refused, but for False."""
    mask = jax.tree.map(lambda x: x.masked or not masks, tree)
    return mask, mask if any(jax.tree.leaves(mask)) else False


def exact(tree: Any) -> list[np.ndarray]:
    return [np.asarray(x).astype(np.longdouble) for x in jax.tree.leaves(tree)]


def exact_norm(leaves: Any) -> np.longdouble:
    """The range of an extended double is never left."""
    return np.sqrt(sum((np.sum(x**2) for x in leaves), start=np.longdouble(0)))


@pytest.mark.usefixtures("in_float64")
@cases("norms")
@given(TREES, SEEDS)
def test_norms(tree: Any, seed: int) -> None:
    """Global norms and inner products to the accuracy of float32, without overflow or underflow."""
    tiers.count("generated cases")
    a, b = grow(tree, seed), grow(tree, seed + 1)
    norm = exact_norm(exact(a))
    np.testing.assert_allclose(float(_tree.norm(a)), float(norm), rtol=3e-6)
    unit = _tree.unit(a)
    chex.assert_tree_all_finite(unit)
    np.testing.assert_allclose(float(exact_norm(exact(unit))), float(norm > 0), rtol=3e-6)
    product = sum(np.sum(x * y) for x, y in zip(exact(a), exact(b), strict=True))
    size = norm * exact_norm(exact(b))
    cosine = product / size if size else 0.0
    np.testing.assert_allclose(float(_tree.cosine(a, b)), float(cosine), atol=3e-6)
    rest = _tree.reject(a, b)
    chex.assert_tree_all_finite(rest)
    share = product / exact_norm(exact(b)) ** 2 if size else 0.0
    errors = [x - (y - share * z) for x, y, z in zip(*map(exact, (rest, a, b)), strict=True)]
    assert exact_norm(errors) <= 3e-6 * max(norm, exact_norm(exact(b)))  # To that of the larger tree.


RULES = {
    "normalized": ascent.normalized(eps=0.0),
    "normalized 3": ascent.normalized(3.0, eps=0.0),
    "normalized inf": ascent.normalized(jnp.inf),
    "layerwise": ascent.layerwise(),
    "adaptive": ascent.adaptive(),
    "absolute": ascent.absolute(),
    "centralized": ascent.centralized(),
    "unnormalized": ascent.unnormalized(),
    "fisher": ascent.fisher(),
    "bounded": ascent.bounded(ascent.layerwise(), 0.1),
    "scaled": ascent.scaled(3.0),
    "zscore": ascent.zscore(0.5),
    "random_mask": ascent.random_mask(0.5),
    "spectral": ascent.matrix("spectral"),
    "nuclear": ascent.matrix("nuclear"),
}


@pytest.mark.usefixtures("in_float64")
@cases("perturbations")
@given(TREES, SEEDS, st.sampled_from(sorted(RULES)), st.floats(0.0, 10.0), st.booleans())
def test_perturbations(tree: Any, seed: int, name: str, rho: float, masks: bool) -> None:
    """Finite, uphill, of length rho where the rule has a length, and zero where masked or where g is."""
    tiers.count("generated cases")
    gradient, params = grow(tree, seed), grow(tree, seed + 1, scaled=False)
    rule = RULES[name]
    mask, given = selected(tree, masks)
    if masks:
        rule = ascent.masked(given, rule)
    perturbation = rule(gradient, rho, params)
    if name not in ("unnormalized", "fisher"):  # Which grow with the gradient.
        chex.assert_tree_all_finite(perturbation)
    chex.assert_trees_all_equal_shapes(perturbation, gradient)
    chosen = jax.tree.leaves(mask)
    for e, g, is_chosen in zip(*map(jax.tree.leaves, (perturbation, gradient)), chosen, strict=True):
        assert e.dtype in (jnp.float32, jnp.float64)
        assert jnp.promote_types(e.dtype, g.dtype) == e.dtype
        if not is_chosen or not np.any(g):
            assert not np.any(e)
        elif name not in ("centralized", "spectral", "nuclear"):
            assert np.all(np.asarray(e) * np.sign(np.asarray(g, np.float64)) >= 0)
    seen = [g for g, is_chosen in zip(exact(gradient), chosen, strict=True) if is_chosen]
    if name == "normalized":
        expected = rho if exact_norm(seen) else 0.0
        np.testing.assert_allclose(float(exact_norm(exact(perturbation))), expected, rtol=1e-5, atol=1e-30)


# How far a step in this precision may be from the exact one, relative to the largest term.
ACCURACY = {jnp.float16: 4e-3, jnp.bfloat16: 3e-2, jnp.float32: 1e-5, jnp.float64: 1e-6}


@pytest.mark.usefixtures("in_float64")
@cases("steps")
@given(TREES, SEEDS, st.sampled_from([0.0, 0.01, 0.5, 20.0]), st.booleans())
def test_steps(tree: Any, seed: int, rho: float, masks: bool) -> None:
    """SAM's two gradients of a quadratic with slopes and curvatures of any scale, against numpy."""
    tiers.count("generated cases")
    params = grow(tree, seed, scaled=False)
    slope = grow(tree, seed + 1)
    curvature = jax.tree.map(jnp.abs, grow(tree, seed + 2))
    mask, given = selected(tree, masks)
    variant = optax_sam.sam(rho, ascent=ascent.masked(given, ascent.normalized(eps=0.0)))

    def loss(params: Any) -> Any:
        terms = jax.tree.map(lambda w, a, b: jnp.sum(a * w + b * w**2 / 2), params, slope, curvature)
        return sum((x.astype(jnp.float64) for x in jax.tree.leaves(terms)), start=jnp.zeros((), jnp.float64))

    state = variant.init(params)
    _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, state=state)
    direction, _ = variant.update(grads, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(direction, params)
    chex.assert_tree_all_finite(direction)
    # From the clean gradient as it was rounded: a norm must not depend on how it was.
    w, a, b, g = map(exact, (params, slope, curvature, grads.clean))
    chosen = jax.tree.leaves(mask)
    norm = exact_norm([x for x, c in zip(g, chosen, strict=True) if c])
    for i, u in enumerate(exact(direction)):
        e = rho * g[i] / norm if norm and chosen[i] else 0.0 * g[i]
        dtype = jax.tree.leaves(direction)[i].dtype
        accuracy = ACCURACY[dtype.type]
        smallest = float(jnp.finfo(dtype).smallest_normal)
        size = np.abs(a[i]) + np.abs(b[i]) * (np.abs(w[i]) + np.abs(e))
        assert np.all(np.abs(u - (a[i] + b[i] * (w[i] + e))) <= accuracy * size + 4 * smallest)


@functools.cache
def compiled(row: table.Row, dtype: Any) -> Any:
    del dtype  # The program depends on it.
    variant = row.make()

    @jax.jit
    def step(params: Any, slope: Any, curvature: Any) -> Any:
        def loss(params: Any) -> Any:
            terms = jax.tree.map(lambda w, a, b: jnp.sum(a * w + b * w**2 / 2), params, slope, curvature)
            return sum(x.astype(jnp.float32) for x in jax.tree.leaves(terms))

        state = variant.init(params)
        for _ in range(2):
            _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, state=state)
            direction, state = variant.update(grads, state, params)
        return direction, state

    return step


ROW_DTYPES = (jnp.float32, jnp.bfloat16)
FIXED = (Leaf((2, 3), None, 0, False), {"a": Leaf((3,), None, 0, False), "b": Leaf((), None, 0, False)})


@cases("variants")
@given(
    st.sampled_from(tiers.some(table.ROWS)),
    st.sampled_from(ROW_DTYPES),
    st.lists(st.integers(-30, 30), min_size=3, max_size=3),
    SEEDS,
)
def test_variants(row: table.Row, dtype: Any, exponents: list[int], seed: int) -> None:
    """Two steps of any variant at any scale of the gradient: finite if that is, in the dtype of params."""
    tiers.count("generated cases")
    leaves, structure = jax.tree.flatten(FIXED)
    if not row.scale_invariant:  # These step as far as the gradient says: they may leave the range.
        exponents = [min(x, 3) for x in exponents]
    tree = jax.tree.unflatten(
        structure,
        [dataclasses.replace(x, dtype=dtype, exponent=n) for x, n in zip(leaves, exponents, strict=True)],
    )
    params = grow(tree, seed, scaled=False)
    step = compiled(row, dtype)
    direction, state = step(params, grow(tree, seed + 1), jax.tree.map(jnp.abs, grow(tree, seed + 2)))
    chex.assert_trees_all_equal_shapes_and_dtypes(direction, params)
    chex.assert_tree_all_finite((direction, state))


def test_enough_cases() -> None:
    assert sum(CASES.values()) >= 2000
    assert all(tiers.cases(number) >= 40 for number in CASES.values())


@every_row
def test_faults(row: table.Row) -> None:
    """300 steps with bad batches under `apply_if_finite`: bit for bit the run in which these were left out.

    And batches without any gradient, or with an exploding one, leave params and state finite.
    """
    variant, tx = row.optimizer()
    tx = optax.apply_if_finite(optax.chain(tx, optax.clip_by_global_norm(0.1)), max_consecutive_errors=300)

    def loss(params: Any, batch: Any) -> Any:
        x, factor = batch
        return factor * table.loss(params, x)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, batch, state=state)
        updates, state = tx.update(
            grads.perturbed, state, params, clean_updates=grads.clean, statistics=grads.statistics
        )
        return optax.apply_updates(params, updates), state

    def run(batches: Any) -> Any:
        params = table.params()
        state = tx.init(params)
        for batch in batches:
            params, state = step(params, state, batch)
        return params, state.inner_state, int(state.total_notfinite)

    rng = np.random.default_rng(np.frombuffer(row.name.encode(), np.uint8))
    xs = rng.normal(size=(300, 8, 3)).astype(np.float32)
    kinds = rng.choice(["good", "nan", "inf", "overflow"], size=300, p=[0.7, 0.1, 0.1, 0.1])
    spoiled = xs.copy()
    for x, kind in zip(spoiled, kinds, strict=True):
        if kind in ("nan", "inf"):
            x[rng.integers(8), rng.integers(3)] = float(kind) * rng.choice([-1, 1])
    factors = np.where(kinds == "overflow", np.inf, 1.0).astype(np.float32)
    *end, skipped = run(zip(spoiled, factors, strict=True))
    *expected, none = run((x, np.float32(1.0)) for x, kind in zip(xs, kinds, strict=True) if kind == "good")
    chex.assert_trees_all_equal(end, expected)
    assert (skipped, none) == (np.sum(kinds != "good"), 0)

    factors = rng.choice([0.0, 1.0, 1e-30, 1e10, 1e25], size=300).astype(np.float32)
    chex.assert_tree_all_finite(run(zip(xs, factors, strict=True))[:2])
    tiers.count("steps with bad batches", 2 * len(xs))


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("granularity", ["leaf", "filter"])
def test_sizes_of_weights_of_any_scale(granularity: str, scale: float) -> None:
    """A perturbation in units of the weights does not depend on theirs."""
    gradient, weights = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[3.0, 1.0], [4.0, 2.0]])
    rule = ascent.adaptive(0.0, granularity=granularity, eps=0.0)
    expected = rule(gradient, 0.1, weights)
    np.testing.assert_allclose(rule(gradient, 0.1, weights * scale) / scale, expected, rtol=1e-5)


DIVIDES = [row for row in table.ROWS if row.divides_by_norm and row.base_at_zero and not row.whole_optimizer]


@pytest.mark.parametrize("scale", [1e25, jnp.inf, jnp.nan])
@pytest.mark.parametrize("row", DIVIDES, ids=lambda row: row.name)
def test_a_norm_that_is_not_finite_perturbs_nothing(row: table.Row, scale: float) -> None:
    """And nothing is corrected: entries of the direction whose gradient is finite are that gradient."""
    variant, params = row.make(), table.params()

    def loss(params: Any, batch: Any) -> Any:
        bad = jnp.array([1.0, 0.0, 0.0, 0.0]) * scale if scale != 1e25 else jnp.full(4, scale)
        return table.loss(params, batch) + jnp.sum(params["layer"]["bias"] * bad)

    state = variant.init(params)
    _, state = variant.update(
        optax_sam.sam_value_and_grad(table.loss, variant)(params, table.batch(), state=state)[1],
        state,
        params,
    )
    _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, table.batch(), state=state)
    direction, state = variant.update(grads, state, params)
    expected = jax.grad(loss)(params, table.batch())
    chex.assert_tree_all_finite(state)
    for got, want in zip(jax.tree.leaves(direction), jax.tree.leaves(expected), strict=True):
        finite = jnp.isfinite(want)
        np.testing.assert_allclose(got[finite], want[finite], rtol=1e-5, atol=1e-6)


def test_a_leaf_whose_clean_gradient_is_tiny_keeps_its_direction() -> None:
    """Of LookSAM leaf by leaf: what is orthogonal to (c, 0) in (c, 1) is (0, 1), however small c is."""
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    variant = optax_sam.looksam(0.1, 2, per_leaf=True, eps=0.0)
    for c in (1e-15, 1.0):
        clean = {"a": jnp.ones(2), "b": jnp.array([c, 0.0])}
        perturbed = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([c, 1.0])}
        pair = optax_sam.SAMGradients(clean, perturbed)
        _, state = variant.update(pair, variant.init(params), params)
        np.testing.assert_allclose(state.memory.orthogonal["b"], [0.0, 1.0], rtol=1e-6)


def test_a_negative_radius_is_one_of_descent() -> None:
    """As `rho_from_learning_rate(clip=False)` may give one: several steps go where one goes."""
    params, batch = table.params(), table.batch()
    norms = []
    for steps in (1, 2):
        variant = optax_sam.sam(lambda _: -0.05, steps=steps)
        value_and_grad = optax_sam.sam_value_and_grad(table.loss, variant, return_metrics=True)
        _, _, metrics = value_and_grad(params, batch, state=variant.init(params))
        assert metrics.sharpness < 0.0
        norms.append(metrics.perturbation_norm)
    np.testing.assert_allclose(norms, 0.05, rtol=1e-5)


def test_a_very_large_order_is_that_of_a_box() -> None:
    gradient = jnp.array([3.0, -4.0, 0.0])
    np.testing.assert_allclose(ascent.normalized(1e17)(gradient, 0.1, gradient), [0.1, -0.1, 0.0])


@pytest.mark.parametrize("variant", [optax_sam.ssam_f(0.1), optax_sam.ssam_d(0.1)], ids=["ssam_f", "ssam_d"])
def test_a_bad_first_batch_delays_the_mask_by_one_step(variant: Any) -> None:
    params = table.params()
    state = variant.init(params)
    for seed in range(3):
        batch = table.batch(seed=seed)
        batch = batch.at[0, 0].set(jnp.nan) if seed == 0 else batch
        _, grads = optax_sam.sam_value_and_grad(table.loss, variant)(params, batch, state=state)
        _, state = variant.update(grads, state, params)
        perturbed = sum(int(jnp.sum(m)) for m in jax.tree.leaves(state.memory.mask))
        total = sum(w.size for w in jax.tree.leaves(params))
        assert perturbed == (0 if seed == 0 else total - round(total / 2))


def test_a_bad_batch_leaves_the_mask_alone() -> None:
    for variant in (optax_sam.ssam_f(0.1, every=1), optax_sam.ssam_d(0.1, every=1)):
        params = table.params()
        state, masks = variant.init(params), []
        for seed in range(2):
            batch = table.batch(seed=seed)
            batch = batch.at[0, 0].set(jnp.nan) if seed == 1 else batch
            _, grads = optax_sam.sam_value_and_grad(table.loss, variant)(params, batch, state=state)
            _, state = variant.update(grads, state, params)
            masks.append(state.memory.mask)
        for x, y in zip(*map(jax.tree.leaves, masks), strict=True):
            np.testing.assert_array_equal(x, y)
