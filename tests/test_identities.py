"""What must be true of the mathematics, whatever the code: identities between variants, exact facts about
SAM, and properties of norms, perturbations and classes for all trees."""

import functools

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
from jax.flatten_util import ravel_pytree

import optax_sam
from optax_sam import _tree, ascent

RHO = 0.1


pytestmark = pytest.mark.usefixtures("in_float64")


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


def batches():
    return jnp.stack([table.batch(dtype=jnp.float64, seed=seed) for seed in (1, 2, 3)])


def vectors_loss(params, x):
    """A loss whose params are vectors and a scalar."""
    return jnp.mean(jnp.tanh(x @ params["a"] + params["b"]) ** 2 + jnp.exp(0.3 * x @ params["a"]))


def quadratic_loss(params, x):
    """Least squares with a linear model."""
    residual = x @ params["layer"]["kernel"] + params["layer"]["bias"] - params["scale"]
    return jnp.mean((residual - jnp.arange(4.0)) ** 2)


def linear_loss(params, x):
    """A plane: the gradient is the same everywhere."""
    return jnp.mean(x @ params["layer"]["kernel"]) + jnp.sum(params["layer"]["bias"]) - 2 * params["scale"]


LOSSES = {
    "table": table.loss,
    "vectors": vectors_loss,
    "quadratic": quadratic_loss,
    "linear": linear_loss,
}


def first_params(problem):
    if problem == "vectors":
        return {"a": jnp.array([0.3, -1.0, 0.7]), "b": jnp.array(0.2)}
    return table.params(jnp.float64)


def walk(variant, problem="table", *, tx=None, base=None, **options):
    """The function from params to params after each of three steps on three batches."""
    base = optax.sgd(0.01, momentum=0.9) if base is None else base
    tx = (base if variant is None else optax.chain(variant, base)) if tx is None else tx
    loss = LOSSES[problem]
    gradients = None if variant is None else optax_sam.sam_value_and_grad(loss, variant, **options)

    def step(carry, x):
        params, state = carry
        grads = jax.grad(loss)(params, x) if gradients is None else gradients(params, x, state=state)[1]
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), ravel_pytree(params)[0]

    return lambda params, batches: jax.lax.scan(step, (params, tx.init(params)), batches)[1]


def leaf_by_leaf(gradient, rho, params):
    """A ball for each leaf."""
    del params
    return jax.tree.map(lambda g: rho * g / jnp.linalg.norm(g), gradient)


# The other sides of the identities below.
REFERENCES = {
    "leafwise": optax_sam.sam(RHO, ascent=leaf_by_leaf),
    "base": None,
    "sam": optax_sam.sam(RHO),
    "usam": optax_sam.sam(0.01, ascent=ascent.unnormalized()),
    "wsam": optax_sam.wsam(RHO, alpha=0.8),
}


def twin(name, variant, of="sam", problem="table", **options):
    """A variant that must walk as another one does."""
    return name, (variant, of, problem, options)


def at_zero(row):
    """A row with radius zero, against its base optimizer."""
    variant = row.make(**{row.radius: 0.0})
    # A whole optimizer has the base optimizer of the others in it.
    return twin(f"{row.name}_at_zero", variant, "base", tx=variant if row.whole_optimizer else None)


LOOKBEHIND = optax_sam.lookbehind(optax.sgd(0.01, momentum=0.9), RHO, k=1, alpha=1.0)
DECOUPLED = optax_sam.decoupled_wsam(optax.sgd(0.01, momentum=0.9), 0.01, RHO, 0.0)
AT_ZERO = [row for row in table.ROWS if row.base_at_zero]

TWINS = dict(
    [
        twin("schedule", optax_sam.sam(optax.constant_schedule(RHO))),
        *(twin(f"one_step_{mode}", optax_sam.sam(RHO, step_mode=mode)) for mode in ("pgd", "split", "free")),
        twin("one_shard", optax_sam.sam(RHO), num_shards=1, batch_argnums=1),
        twin("steps_on_a_plane_pgd", optax_sam.sam(RHO, steps=3), problem="linear"),
        twin("steps_on_a_plane_split", optax_sam.sam(RHO, steps=3, step_mode="split"), problem="linear"),
        twin("order_two_of_any", optax_sam.sam(RHO, ascent=ascent.normalized(2.0 + 1e-13))),
        twin("asam_unmasked", optax_sam.asam(RHO, adaptive_mask=False)),
        twin("masked_all", optax_sam.sam(RHO, ascent=ascent.masked(True))),
        twin("masked_all_norm_all", optax_sam.sam(RHO, ascent=ascent.masked(True, norm="all"))),
        twin("fisher", optax_sam.sam(RHO, ascent=ascent.fisher(0.0))),
        twin("bounded_far_away", optax_sam.sam(RHO, ascent=ascent.bounded(None, 1e9))),
        twin("scaled_alike", optax_sam.sam(RHO / 3, ascent=ascent.scaled(3.0))),
        twin("random_mask_keeps_all", optax_sam.sam(RHO, ascent=ascent.random_mask(1.0))),
        *(
            twin(f"matrix_{norm}", optax_sam.sam(RHO, ascent=ascent.matrix(norm)), "leafwise", "vectors")
            for norm in ("spectral", "nuclear")
        ),
        twin("zscore", optax_sam.sam(RHO, ascent=ascent.zscore(0.5)), problem="vectors"),
        twin("extrapolated", optax_sam.sam(RHO, ascent=ascent.extrapolated(0.0))),
        twin("gcsam", optax_sam.gcsam(RHO), problem="vectors"),
        twin("gcsam_ascent_only", optax_sam.gcsam(RHO, centralize_descent=False), problem="vectors"),
        twin("gsam", optax_sam.gsam(RHO, 0.0)),
        twin("gsam_clean", optax_sam.gsam(RHO, 0.0, objective="clean"), "base"),
        twin("wsam_half", optax_sam.wsam(RHO, 0.5)),
        twin("wsam_zero", optax_sam.wsam(RHO, 0.0), "base"),
        twin("wsam_four_ninths", optax_sam.wsam(RHO, 4 / 9), "wsam"),
        twin("gnp", optax_sam.hessian_sam(0.8 * RHO, difference=RHO), "wsam"),
        twin("gnp_one", optax_sam.gnp(RHO, 1.0)),
        twin("gnp_by_name", optax_sam.gnp(RHO, 0.8), "wsam"),
        twin("gnp_zero", optax_sam.gnp(RHO, 0.0), "base"),
        twin("preconditioned_power_zero", optax_sam.preconditioned_sam(RHO, 0.0)),
        twin("eigen_sam_zero", optax_sam.eigen_sam(RHO, 0.0)),
        twin("cr_sam_zero", optax_sam.cr_sam(RHO, 0.0, 0.0)),
        twin("unified_one", optax_sam.unified_sam(RHO, 1.0)),
        twin("unified_zero", optax_sam.unified_sam(0.01, 0.0), "usam"),
        twin("le_sam_far", optax_sam.le_sam(1e9, RHO)),
        twin("xsam_one", optax_sam.xsam(RHO, 1.0)),
        twin("decoupled_zero", DECOUPLED, "base", tx=DECOUPLED),
        twin("lookbehind_one", LOOKBEHIND, tx=LOOKBEHIND),
        twin("looksam", optax_sam.looksam(RHO, k=1)),
        twin("looksam_per_leaf", optax_sam.looksam(RHO, k=1, per_leaf=True)),
        twin("same", optax_sam.same(RHO)),
        twin("same_clean", optax_sam.same(RHO, (0,) * 4, clean_gains=(1,) * 4), "base"),
        twin("custom_same", optax_sam.custom_same(RHO, 1.0)),
        twin("saner", optax_sam.saner(RHO, 1.0)),
        twin("hessian_sam", optax_sam.hessian_sam(RHO), problem="quadratic"),
        twin("hessian_sam_raw", optax_sam.hessian_sam(0.01, normalize=False), "usam", "quadratic"),
        twin("hessian_sam_difference", optax_sam.hessian_sam(RHO, difference=0.3), problem="quadratic"),
        twin("extragradient_here", optax_sam.extragradient(0.01, weights=(1.0, 0.0)), "base"),
        *(at_zero(row) for row in tiers.some(AT_ZERO)),
    ]
)


def run_all(functions, *args):
    """All functions of the same arguments in one program, which compiles faster than many."""
    run = jax.jit(lambda *args: {name: function(*args) for name, function in functions.items()})
    return jax.tree.map(np.asarray, run(*args))


@functools.cache
def walks(problem):
    """The points of all twins and references on a problem."""
    twins = {name: walk(v, problem, **rest) for name, (v, _, p, rest) in TWINS.items() if p == problem}
    references = {of: walk(REFERENCES[of], problem) for _, of, p, _ in TWINS.values() if p == problem}
    return run_all(twins | references, first_params(problem), batches())


@pytest.mark.by_tier
@pytest.mark.parametrize("name", TWINS)
def test_variants_that_coincide(name):
    _, of, problem, _ = TWINS[name]
    got = walks(problem)
    np.testing.assert_allclose(got[name], got[of], rtol=1e-12, atol=1e-12)


def test_the_references_differ():
    """Twins would prove nothing if all walked alike."""
    points = [walks("table")[name] for name in ("base", "sam", "wsam")]
    points.append(walks("quadratic")["usam"])
    for i, one in enumerate(points):
        assert all(np.max(np.abs(one - other)) > 1e-4 for other in points[:i])


def test_decoupled_wsam_is_wsam_for_plain_sgd():
    decoupled = optax_sam.decoupled_wsam(optax.sgd(0.01), 0.01, RHO, 0.8)
    with_momentum = optax_sam.decoupled_wsam(optax.sgd(0.01, momentum=0.9), 0.01, RHO, 0.8)
    coupled = optax_sam.wsam(RHO, 0.8)
    functions = {
        "decoupled": walk(decoupled, tx=decoupled),
        "coupled": walk(coupled, base=optax.sgd(0.01)),
        "decoupled, momentum": walk(with_momentum, tx=with_momentum),
        "coupled, momentum": walk(coupled),
    }
    got = run_all(functions, first_params("table"), batches())
    np.testing.assert_allclose(got["decoupled"], got["coupled"], rtol=1e-12, atol=1e-12)
    assert np.max(np.abs(got["decoupled, momentum"] - got["coupled, momentum"])) > 1e-4


def test_sam_is_the_one_of_optax():
    up = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    theirs = optax.contrib.sam(optax.sgd(0.01, momentum=0.9), up, sync_period=2, opaque_mode=True)

    @jax.jit
    def step(params, state, x):
        def grad(params, _):
            return jax.grad(table.loss)(params, x)

        updates, state = theirs.update(grad(params, 0), state, params, grad_fn=grad)
        return optax.apply_updates(params, updates), state

    params, points = first_params("table"), []
    state = theirs.init(params)
    for x in batches():
        params, state = step(params, state, x)
        points.append(flat(params))
    np.testing.assert_allclose(points, walks("table")["sam"], rtol=1e-12, atol=1e-12)


def test_without_a_power_preconditioned_sam_is_sam_where_a_second_moment_is_zero():
    """An entry that gets its first gradient in the second step."""
    variant, sam = optax_sam.preconditioned_sam(RHO, 0.0), optax_sam.sam(RHO)
    params = jnp.array([1.0, 2.0])
    state = variant.init(params)

    def loss(w, m):
        return jnp.sum(m * w**2) / 2

    _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, jnp.array([1.0, 0.0]), state=state)
    _, state = variant.update(grads, state, params)
    _, found = optax_sam.sam_value_and_grad(loss, variant)(params, jnp.ones(2), state=state)
    _, expected = optax_sam.sam_value_and_grad(loss, sam)(params, jnp.ones(2), state=sam.init(params))
    np.testing.assert_allclose(found.perturbed, expected.perturbed, rtol=1e-7)


def test_the_second_moment_of_preconditioned_sam_is_that_of_adam():
    """Which stands in Adam's state too, if both decay alike."""
    variant = optax_sam.preconditioned_sam(RHO, decay=0.9)
    tx = optax.chain(variant, optax.adam(0.01, b2=0.9))
    value_and_grad = optax_sam.sam_value_and_grad(table.loss, variant)
    params = first_params("table")
    state = tx.init(params)
    for x in batches():
        _, grads = value_and_grad(params, x, state=state)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    ours, theirs = state[0].memory.second_moment, optax.tree.get(state, "nu")
    np.testing.assert_allclose(flat(ours), flat(theirs), rtol=1e-12)


@pytest.mark.parametrize("row", AT_ZERO, ids=lambda row: row.name)
def test_radius_zero_is_the_base_optimizer_to_the_last_bit(row):
    """Operation by operation; compiled programs, which may be fused differently, are compared above."""
    base = row.kwargs.get("base_optimizer", optax.sgd(0.01, momentum=0.9))
    variant, tx = row.optimizer(base, **{row.radius: 0.0})
    value_and_grad = optax_sam.sam_value_and_grad(table.loss, variant)
    params = plain = table.params()
    state, plain_state = tx.init(params), base.init(params)
    for seed in range(2):
        x = table.batch(seed=seed)
        _, grads = value_and_grad(params, x, state=state)
        updates, state = tx.update(grads, state, params)
        expected, plain_state = base.update(jax.grad(table.loss)(plain, x), plain_state, plain)
        # The updates: in the params, which are larger, a difference in the last bits would drown.
        if len(row.evaluations) == 1:
            np.testing.assert_array_equal(flat(updates), flat(expected))
        else:  # A rule that decides at run time what to evaluate does so in a compiled `lax.cond`.
            np.testing.assert_allclose(flat(updates), flat(expected), rtol=1e-5, atol=1e-6)
        params, plain = optax.apply_updates(params, updates), optax.apply_updates(plain, expected)


@pytest.mark.parametrize("objective", ["perturbed", "clean"])
def test_a_gradient_has_no_part_orthogonal_to_itself(objective):
    """Not even one of rounding errors, which a large alpha would bring to light."""
    variant = optax_sam.gsam(0.0, 2.0, objective=objective)
    for seed in range(3):
        g = jax.random.normal(jax.random.key(seed), (17,), jnp.float32)
        direction, _ = variant.update(optax_sam.SAMGradients(g, g), variant.init(g), g)
        np.testing.assert_array_equal(direction, g)


def test_looksam_reuses_nothing_where_nothing_was_orthogonal():
    """Around a round bowl both gradients are parallel, and rounding errors are no direction to go."""
    looksam = optax_sam.looksam(0.1, k=2)
    tx = optax.chain(looksam, optax.sgd(0.1))
    value_and_grad = optax_sam.sam_value_and_grad(lambda w: jnp.sum(w**2) / 2, looksam)
    params = jnp.array([1.0, 2.0, 3.0], jnp.float32)
    state = tx.init(params)
    for _ in range(4):
        _, grads = value_and_grad(params, state=state)
        updates, state = tx.update(grads, state, params)
        np.testing.assert_allclose(updates, -0.1 * grads.perturbed, rtol=1e-5)
        params = optax.apply_updates(params, updates)


# Hessian-SAM and what SAM is to first order.


def directions(variant, loss, params):
    """The clean gradient, and what the variant hands on in its first step."""

    @jax.jit
    def step(params):
        state = variant.init(params)
        _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, state=state)
        return ravel_pytree(grads.clean)[0], ravel_pytree(variant.update(grads, state, params)[0])[0]

    return [np.asarray(x) for x in step(params)]


def here():
    params, x = first_params("table"), batches()[0]
    return params, functools.partial(table.loss, batch=x)


def test_hessian_sam_differs_from_sam_in_second_order():
    params, loss = here()

    @jax.jit
    def difference(rho):
        out = []
        for variant in (optax_sam.sam(rho), optax_sam.hessian_sam(rho)):
            state = variant.init(params)
            _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, state=state)
            out.append(ravel_pytree(variant.update(grads, state, params)[0])[0])
        return jnp.linalg.norm(out[0] - out[1])

    sizes = np.array([difference(rho) for rho in 0.02 / 2.0 ** np.arange(5)])
    ratios = sizes[:-1] / sizes[1:]
    assert sizes[0] > 1e-4
    np.testing.assert_allclose(ratios[-1], 4.0, rtol=0.01)
    assert np.all(np.abs(np.diff(np.abs(ratios - 4.0))) < 0.5)
    np.testing.assert_allclose(ratios, 4.0, rtol=0.1)


def test_hessian_sam_is_the_gradient_of_a_penalty():
    """The derivative of the norm of the gradient is the Hessian times its unit vector."""
    params, loss = here()

    def gradient_norm(w):
        return jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(jax.grad(loss)(w))))

    clean, direction = directions(optax_sam.hessian_sam(RHO), loss, params)
    np.testing.assert_allclose(
        (direction - clean) / RHO, flat(jax.jit(jax.grad(gradient_norm))(params)), rtol=1e-11
    )
    penalized = jax.jit(jax.grad(lambda w: loss(w) + RHO * gradient_norm(w)))(params)
    np.testing.assert_allclose(direction, flat(penalized), rtol=1e-11)
    _, direction = directions(optax_sam.hessian_sam(RHO, normalize=False), loss, params)
    penalized = jax.jit(jax.grad(lambda w: loss(w) + RHO / 2 * gradient_norm(w) ** 2))(params)
    np.testing.assert_allclose(direction, flat(penalized), rtol=1e-11)


def converge(loss, variant, params, rate, steps, data=None):
    """Where gradient descent with a variant ends, and one step later."""
    tx = optax.chain(variant, optax.sgd(rate))
    value_and_grad = optax_sam.sam_value_and_grad(loss, variant)

    def step(carry, x):
        params, state = carry
        _, grads = value_and_grad(params, *(() if x is None else (x,)), state=state)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(carry):
        carry, _ = jax.lax.scan(step, carry, data, steps)
        following, _ = step(carry, None if data is None else jax.tree.map(lambda x: x[0], data))
        return carry[0], following[0]

    return [np.asarray(x) for x in run((params, tx.init(params)))]


def test_sam_bounces_on_a_quadratic():
    """A cycle of period two along the top eigenvector, of known amplitude (Bartlett, Long, Bousquet), at
    which the curvature is at SAM's edge of stability (Long, Bartlett)."""
    curvature, rate, rho = jnp.array([5.0, 2.0, 0.5]), 0.25, 0.1
    last, following = converge(
        lambda w: jnp.sum(curvature * w**2) / 2, optax_sam.sam(rho), jnp.array([0.3, 0.7, -0.2]), rate, 3000
    )
    amplitude = rate * rho * 5.0 / (2 - rate * 5.0)
    np.testing.assert_allclose(np.abs(last), [amplitude, 0.0, 0.0], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(last, -following, atol=1e-9)
    length = 5.0 * amplitude
    edge = length / (2 * rho) * (np.sqrt(1 + 8 * rho / (rate * length)) - 1)
    np.testing.assert_allclose(edge, 5.0, rtol=1e-12)


@pytest.mark.parametrize(("factor", "stable"), [(0.99, True), (1.01, False)])
def test_the_edge_of_unnormalized_sam(factor, stable):
    rate, rho = 0.1, 0.05
    curvature = factor * (np.sqrt(1 + 8 * rho / rate) - 1) / (2 * rho)
    usam = optax_sam.sam(rho, ascent=ascent.unnormalized())
    last, _ = converge(lambda w: curvature * w**2 / 2, usam, jnp.array(1.0), rate, 300)
    assert (np.abs(last) < 1e-2) == stable
    assert (np.abs(last) > 1e2) != stable


def two_sheets(x, weights):
    """A plane of minima, x3 = x4 = 0, whose two curvatures depend on where one is on it."""
    first = 3 + (x[0] - 1) ** 2 + x[1] ** 2
    second = 2 + (x[0] + 1) ** 2 / 2 + x[1] ** 2 / 2
    return weights[0] * first * x[2] ** 2 + weights[1] * second * x[3] ** 2


def test_what_sam_minimizes():
    """Wen, Ma, Li: gradient descent stops where it arrives; SAM goes on to the smallest top eigenvalue, at
    (1, 0), and SAM on one summand at a time to the smallest trace, at (1/3, 0)."""
    start, steps = jnp.array([0.0, 0.5, 0.1, 0.1]), 100_000
    whole = functools.partial(two_sheets, weights=(1.0, 1.0))
    last, _ = converge(whole, optax_sam.sam(0.0), start, 0.02, steps)
    np.testing.assert_allclose(last, [0.0, 0.499, 0.0, 0.0], atol=1e-3)
    last, _ = converge(whole, optax_sam.sam(0.1), start, 0.02, steps)
    bounce = 0.02 * 0.1 * 6.0 / (2 - 0.02 * 6.0)
    np.testing.assert_allclose(np.abs(last), [1.0, 0.0, bounce, 0.0], atol=1e-6)
    second = jax.random.bernoulli(jax.random.key(0), shape=(steps,))
    summands = jnp.stack([~second, second], axis=1).astype(jnp.float64)
    last, _ = converge(two_sheets, optax_sam.sam(0.1), start, 0.02, steps, data=summands)
    np.testing.assert_allclose(last[:2], [1 / 3, 0.0], atol=0.05)


# Classes of ratios.


def test_every_sign_case_has_its_class():
    clean = jnp.array([1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0, 0.0, 0.0, 0.0, 1.0, -1.0, 1.0, 1.0, -1.0])
    perturbed = jnp.array(
        [2.0, 0.5, -2.0, -0.5, -2.0, -0.5, 2.0, 0.5, 1.0, -1.0, 0.0, 0.0, 0.0, 1.0, -1.0, 1.0]
    )
    expected = [1, 2, 3, 4] * 2 + [0] * 8
    for i, kind in enumerate(expected):
        grads = optax_sam.SAMGradients(clean[i : i + 1], perturbed[i : i + 1])
        fractions = optax_sam.sharpness.gradient_ratio_fractions(grads)
        assert [float(x) for x in fractions] == [float(kind == k) for k in (1, 2, 3, 4, 0)]
    # Tiny gradients of either sign too: the ports add 1e-8 to the signed gradient before they divide.
    scaled = optax_sam.SAMGradients(1e-9 * clean, 1e-9 * perturbed)
    fractions = optax_sam.sharpness.gradient_ratio_fractions(scaled)
    np.testing.assert_allclose(fractions, [2 / 16] * 4 + [8 / 16], rtol=1e-6)


def test_gains_act_on_their_classes_alone():
    clean = jnp.array([1.0, 1.0, -1.0, -1.0, 0.0, 1.0, 1.0, -1.0])
    perturbed = jnp.array([2.0, 0.5, 2.0, 0.5, 3.0, 0.0, 1.0, 1.0])
    variant = optax_sam.same(0.1, (2.0, 3.0, 5.0, 7.0), clean_gains=(0.5, 0.25, 0.125, 1.0))
    direction, _ = variant.update(optax_sam.SAMGradients(clean, perturbed), variant.init(clean), clean)
    # 2 * 2 + 0.5, 3 * 0.5 + 0.25, 5 * 2 - 0.125, 7 * 0.5 - 1, and the neutral ones as they were.
    np.testing.assert_array_equal(direction, [4.5, 1.75, 9.875, 2.5, 3.0, 0.0, 1.0, 1.0])


# Symmetries.


def network(params, x):
    """Scaling one layer up and the other down leaves it unchanged."""
    return jnp.mean((jax.nn.relu(x @ params["first"]) @ params["second"] - jnp.sum(x, axis=1)) ** 2)


@pytest.mark.parametrize("rule", [ascent.adaptive(0.0), ascent.adaptive(0.0, granularity="leaf")])
def test_asam_does_not_see_how_layers_are_scaled(rule):
    keys, x = jax.random.split(jax.random.key(5), 2), batches()[0]
    params = {
        "first": jax.random.normal(keys[0], (3, 5), jnp.float64),
        "second": jax.random.normal(keys[1], (5,), jnp.float64),
    }
    scaled = {"first": 7.0 * params["first"], "second": params["second"] / 7.0}

    @functools.partial(jax.jit, static_argnums=0)
    def perturbed_loss(rule, params):
        e = rule(jax.grad(network)(params, x), 0.5, params)
        return network(optax.tree.add(params, e), x), e

    value, e = perturbed_loss(rule, params)
    scaled_value, scaled_e = perturbed_loss(rule, scaled)
    np.testing.assert_allclose(scaled_value, value, rtol=1e-12)
    np.testing.assert_allclose(scaled_e["first"], 7.0 * e["first"], rtol=1e-11)
    np.testing.assert_allclose(scaled_e["second"], e["second"] / 7.0, rtol=1e-11)
    sam = ascent.normalized()
    assert abs(perturbed_loss(sam, params)[0] / perturbed_loss(sam, scaled)[0] - 1) > 0.01


def test_sam_rotates_with_the_coordinates():
    rotation, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(6), (5, 5), jnp.float64))
    w = jax.random.normal(jax.random.key(7), (5,), jnp.float64)

    def loss(w):
        return jnp.sum(jnp.arange(1.0, 6.0) * w**4) + jnp.prod(w)

    for rule, rotates in ((ascent.normalized(), True), (ascent.normalized(jnp.inf), False)):
        variant = optax_sam.sam(RHO, ascent=rule)
        _, direction = directions(variant, loss, w)
        _, rotated = directions(variant, lambda v: loss(rotation.T @ v), rotation @ w)
        gap = np.max(np.abs(rotation @ direction - rotated))
        assert (gap < 1e-11) if rotates else (gap > 1e-3)


# Properties of all trees.

# A few structures, and everything else drawn: each is compiled once.
STRUCTURES = {
    "many": {"a": (2, 3), "b": {"c": (), "d": (0,), "e": (1,)}, "f": (4, 1, 2), "g": (2, 0)},
    "two": {"a": (3,), "b": (3, 2)},
    "scalar": {"a": ()},
    "empty": {"a": (0,), "b": (2, 0)},
}
# Within the range in which sums of squares are accurate in float32.
EXPONENTS = st.lists(st.integers(-14, 14), min_size=6, max_size=6)
TREES = st.tuples(st.sampled_from(sorted(STRUCTURES)), EXPONENTS, st.integers(0, 2**16))
PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def grow(structure, exponents, seed):
    """A tree of float32 leaves, each with a scale of its own; some of their entries are zero."""
    rng = np.random.default_rng(seed)
    shapes, treedef = jax.tree.flatten(STRUCTURES[structure], is_leaf=lambda x: isinstance(x, tuple))
    out = []
    for shape, exponent in zip(shapes, exponents, strict=False):
        values = rng.normal(size=shape) * (rng.random(size=shape) < 0.9) * 10.0**exponent
        out.append(jnp.asarray(np.asarray(values, np.float32)))
    return jax.tree.unflatten(treedef, out)


def exact(tree):
    """All entries of the tree, in float64."""
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def exact_norm(tree, ord=2.0):
    """The norm in float64, whose range none of these trees leaves."""
    x = np.abs(exact(tree))
    if not np.any(x):
        return 0.0
    return x.max() if ord == np.inf else np.sum((x / x.max()) ** ord) ** (1 / ord) * x.max()


@jax.jit
def norms(tree):
    return [_tree.norm(tree, ord) for ord in (1.0, 2.0, 3.0, np.inf)], _tree.unit(tree)


@PROPERTY
@given(TREES)
def test_norms_are_those_of_float64(drawn):
    tree = grow(*drawn)
    got, unit = norms(tree)
    for value, ord in zip(got, (1.0, 2.0, 3.0, np.inf), strict=True):
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(np.float64(value), exact_norm(tree, ord), rtol=3e-6)
    np.testing.assert_allclose(exact_norm(unit), 1.0 if exact_norm(tree) else 0.0, rtol=3e-6)


REJECT = jax.jit(_tree.reject)


@PROPERTY
@given(TREES, st.integers(-14, 14))
def test_the_rejected_part_is_orthogonal(drawn, exponent):
    """To the rounding of the larger of the two trees: it is computed from their difference. All of a tree is
    orthogonal to zero."""
    structure, _, seed = drawn
    tree, onto = grow(*drawn), grow(structure, [exponent] * 6, seed + 1)
    a, b, rest = exact(tree), exact(onto), exact(REJECT(tree, onto))
    b_hat = b / np.linalg.norm(b) if np.any(b) else b
    size = max(np.linalg.norm(a), np.linalg.norm(b))
    assert abs(rest @ b_hat) <= 1e-6 * size
    np.testing.assert_allclose(rest, a - (a @ b_hat) * b_hat, atol=1e-6 * size)


@pytest.mark.parametrize("exponent", [-100.0, -75.0, 64.5, 100.0])
def test_nothing_is_corrected_where_sums_of_squares_leave_the_range(exponent):
    """Of float32: a direction is there the gradient that it was made of."""
    rng = np.random.default_rng(0)
    a = jnp.asarray(rng.normal(size=5) * 2.0**exponent, jnp.float32)
    for variant in (optax_sam.gsam(0.1), optax_sam.looksam(0.1, k=2)):
        state = variant.init(a)._replace(step=jnp.asarray(1, jnp.int32))
        direction, _ = variant.update(optax_sam.SAMGradients(a, a), state, a)
        np.testing.assert_array_equal(direction, a)


@pytest.mark.parametrize("size", [8, 4096, 4097, 9000])
def test_small_leaves_of_any_number_are_summed(size):
    """As one vector, and a large one beside them."""
    rng = np.random.default_rng(size)
    tree = [jnp.asarray(rng.normal(size=n), jnp.float32) for n in (7, size - 7)]
    for value, ord in zip(norms(tree)[0], (1.0, 2.0, 3.0, np.inf), strict=True):
        np.testing.assert_allclose(np.float64(value), exact_norm(tree, ord), rtol=3e-6)
    for reject in (REJECT, _tree.reject):  # As where GSAM has a radius of zero.
        np.testing.assert_array_equal(exact(reject(tree, tree)), np.zeros(size))


def some_leaves(params):
    """A mask: the leaves whose names come first."""
    return {name: name == "a" for name in params}


# Rules whose perturbation has length rho in a norm of theirs. Without eps, which tiny gradients would feel.
ORDERS = {"two": 2.0, "one_and_a_half": 1.5, "four": 4.0, "inf": np.inf}
LENGTH_RHO = {
    **{name: ascent.normalized(ord, eps=0.0) for name, ord in ORDERS.items()},
    "adaptive": ascent.adaptive(eps=0.0),
    "adaptive_eta_0": ascent.adaptive(0.0, eps=0.0),
    "adaptive_leaf": ascent.adaptive(granularity="leaf", eps=0.0),
    "adaptive_filter": ascent.adaptive(granularity="filter", eps=0.0),
    "adaptive_inf": ascent.adaptive(ord=np.inf),
    "adaptive_masked": ascent.adaptive(mask=some_leaves, eps=0.0),
    "masked": ascent.masked(some_leaves, ascent.normalized(eps=0.0)),
    "centralized": ascent.centralized(ascent.normalized(eps=0.0)),
}


@jax.jit
def perturbations(gradient, params):
    out = {}
    for name, rule in LENGTH_RHO.items():
        e = rule(gradient, 0.05, params)
        out[name] = e, rule.length(e, params)
    return out, ascent.centralize(gradient)


@PROPERTY
@given(TREES)
def test_perturbations_have_length_rho(drawn):
    structure, _, seed = drawn
    gradient = grow(*drawn)
    # Weights of ordinary size, none zero.
    params = jax.tree.map(lambda x: jnp.where(x == 0.0, 0.5, x), grow(structure, [0] * 6, seed + 1))
    results, centralized = perturbations(gradient, params)
    seen = dict.fromkeys(LENGTH_RHO, gradient) | {"masked": gradient["a"], "centralized": centralized}
    for name, (e, length) in results.items():
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(e))
        expected = 0.05 if exact_norm(seen[name]) else 0.0
        np.testing.assert_allclose(length, expected, rtol=1e-5, err_msg=name)
        if not name.startswith("adaptive"):
            np.testing.assert_allclose(
                exact_norm(e, ORDERS.get(name, 2.0)), expected, rtol=1e-5, err_msg=name
            )
        gain = exact(e) @ exact(gradient)
        assert gain >= 0.0 or name == "centralized"
        if name in ORDERS:  # The most that a linear loss can gain within the ball (Hoelder).
            dual = 1.0 if name == "inf" else ORDERS[name] / (ORDERS[name] - 1)
            np.testing.assert_allclose(gain, expected * exact_norm(gradient, dual), rtol=1e-5, err_msg=name)
    others = {name: x for name, x in results["masked"][0].items() if name != "a"}
    assert not any(np.any(x) for x in jax.tree.leaves(others))


FRACTIONS = jax.jit(optax_sam.sharpness.gradient_ratio_fractions)


@PROPERTY
@given(TREES, st.sampled_from([-8.0, -1.0, 2.0**-20, 4.0]))
def test_the_classes_partition_the_coordinates(drawn, scale):
    """The shares add up to one, and the loss may be measured in any unit, and upside down."""
    structure, exponents, seed = drawn
    clean, perturbed = grow(*drawn), grow(structure, exponents, seed + 1)
    fractions = FRACTIONS(optax_sam.SAMGradients(clean, perturbed))
    g, g_p = exact(clean), exact(perturbed)
    r = g_p[g != 0] / g[g != 0]
    counts = [np.sum(r > 1), np.sum((r > 0) & (r < 1)), np.sum(r < -1), np.sum((r < 0) & (r > -1))]
    counts.append(g.size - sum(counts))
    np.testing.assert_allclose(fractions, np.array(counts) / max(g.size, 1), rtol=1e-6)
    scaled = jax.tree.map(lambda x: scale * x, optax_sam.SAMGradients(clean, perturbed))
    np.testing.assert_array_equal(FRACTIONS(scaled), fractions)


@pytest.mark.full
def test_lookbehind_at_zero_is_k_steps_along_one_gradient():
    """Its base optimizer decays the fast weights, and counts every step."""
    base, params, x = (
        optax.adamw(0.1, weight_decay=0.5),
        table.params(jnp.float64),
        table.batch(dtype=jnp.float64),
    )
    tx = optax_sam.lookbehind(base, 0.0, k=3, alpha=1.0)
    state = tx.init(params)
    _, grads = optax_sam.sam_value_and_grad(LOSSES["table"], tx)(params, x, state=state)
    updates, state = tx.update(grads, state, params)
    end, of_base = params, base.init(params)
    for _ in range(3):
        step, of_base = base.update(grads.clean, of_base, end)
        end = optax.apply_updates(end, step)
    chex.assert_trees_all_close(
        (optax.apply_updates(params, updates), state.memory), (end, of_base), rtol=1e-12
    )
    assert optax.tree.get(state, "count") == 3
