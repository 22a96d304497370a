"""Numbers worked by hand, or by the authors' own code, on quadratics in two dimensions.

All printed digits are compared. With the two coordinates in one array or in two leaves the numbers are the
same: a norm that was taken leaf by leaf would show.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import optax_sam
from optax_sam import ascent

# Batches: the diagonals of the curvature and the centers of the examples, of which the loss is the mean.
L1 = (np.array([[10.0, 1.0]]), np.array([[0.0, 0.0]]))
L2 = (np.array([[2.0, 4.0]]), np.array([[0.5, -0.5]]))
BOTH = tuple(np.concatenate(parts) for parts in zip(L1, L2, strict=True))
W0 = (1.0, 1.0)
G0 = (10.0, 1.0)  # The gradient of L1 there.


@pytest.fixture(autouse=True)
def _in_float64():
    with jax.enable_x64(True):
        yield


def in_an_array(coordinates):
    return jnp.asarray(coordinates)


def in_leaves(coordinates):
    return {"a": jnp.asarray(coordinates[0]), "b": jnp.asarray(coordinates[1:])}


@pytest.fixture(params=[in_an_array, in_leaves])
def store(request):
    """How the two coordinates are stored."""
    return request.param


def loss(params, batch):
    """The mean over examples of half of (w - c)^T A (w - c)."""
    curvature, center = batch
    w, _ = ravel_pytree(params)
    return jnp.mean(jnp.sum(curvature * (w - center) ** 2, axis=1)) / 2


def flat(tree):
    return ravel_pytree(tree)[0]


def direction(variant, params, batch=L1, **options):
    """The gradients of a first step, and what the variant hands to a base optimizer."""
    state = variant.init(params)
    _, grads = optax_sam.sam_value_and_grad(loss, variant, **options)(params, batch, state=state)
    updates, _ = variant.update(grads, state, params)
    return flat(grads.clean), flat(updates)


def step_of(variant, tx):
    """One step of an optimizer that contains the variant."""
    value_and_grad = optax_sam.sam_value_and_grad(loss, variant)

    def step(params, state, batch):
        value, grads = value_and_grad(params, batch, state=state)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value, grads

    return step


def walk(step, tx, params, batches):
    """What each of a few steps evaluates and leaves."""
    state, records = tx.init(params), []
    for batch in batches:
        params, state, value, grads = step(params, state, batch)
        memory = optax.tree.get(state, "SAMState").memory
        records.append((flat(params), [flat(x) for x in memory], value, grads))
    return records


def all_at_once(function, cases):
    """The function of every case, in one program: it compiles faster than many."""
    return jax.jit(lambda inputs: {name: function(name, x) for name, x in inputs.items()})(cases)


def close(got, expected, rtol=1e-10):
    """Equal to the digits given, of which there are twelve or so."""
    np.testing.assert_allclose(got, np.asarray(expected), rtol=rtol, atol=1e-13)


# Rules: gradient, rho, params, perturbation.
RULES = {
    "E1": (ascent.normalized(), G0, 0.1, W0, (0.0995037190210, 0.00995037190210)),
    "E1, step 1": (
        ascent.normalized(),
        (4.50248140490, 0.949502481405),
        0.1,
        W0,
        (0.0978479120942, 0.0206345850163),
    ),
    "E1, p = inf": (ascent.normalized(jnp.inf), G0, 0.1, W0, (0.1, 0.1)),
    "E1, p = 4": (ascent.normalized(4.0), G0, 0.1, W0, (0.0988721364778, 0.0458923804631)),
    "E1, zero gradient": (ascent.normalized(), (0.0, 0.0), 0.1, W0, (0.0, 0.0)),
    "E1, zero gradient, no eps": (ascent.normalized(eps=0.0), (0.0, 0.0), 0.1, W0, (0.0, 0.0)),
    "E2, eta = 0": (
        ascent.adaptive(0.0),
        (20.0, -0.5),
        0.5,
        (2.0, -0.5),
        (0.999980469322, -0.00156246948332),
    ),
    "E2, eta = 0.01": (
        ascent.adaptive(),
        (20.0, -0.5),
        0.5,
        (2.0, -0.5),
        (1.00497978139, -0.00161750477179),
    ),
    "E2, p = inf": (ascent.adaptive(ord=jnp.inf), (20.0, -0.5), 0.5, (2.0, -0.5), (1.005, -0.255)),
    "E2, of GSAM": (
        ascent.absolute(),
        (20.0, -0.5),
        0.5,
        (2.0, -0.5),
        (0.999687646408, -0.00624804779005),
    ),
    "E4": (ascent.unnormalized(), G0, 0.01, W0, (0.1, 0.01)),
    "E6, both": (ascent.normalized(), (5.5, 3.5), 0.1, W0, (0.0843661487732, 0.0536875492193)),
    "E6, shard 2": (ascent.normalized(), (1.0, 6.0), 0.1, W0, (0.0164398987305, 0.0986393923832)),
    "E11, EG-SAM": (ascent.extrapolated(0.05), G0, 0.1, W0, (-0.400496280979, -0.0400496280979)),
    "E11, SAGM": (ascent.extrapolated(0.001), G0, 0.05, W0, (0.0397518595105, 0.00397518595105)),
    "E21": (ascent.fisher(), G0, 0.1, W0, (0.00811093765406, 0.0409602351530)),
}


@functools.cache
def perturbations(store):
    inputs = {name: (store(gradient), store(params)) for name, (_, gradient, _, params, _) in RULES.items()}

    def perturbation(name, given):
        rule, _, rho, _, _ = RULES[name]
        gradient, params = given
        return flat(rule(gradient, rho, params))

    return all_at_once(perturbation, inputs)


@pytest.mark.parametrize("case", RULES)
def test_perturbations(case, store):
    close(perturbations(store)[case], RULES[case][-1])


def test_lengths_in_the_norms_of_the_rules(store):
    """The measure by which a rule is said to have length rho."""
    close(ascent.normalized(4.0).length(store((0.0988721364778, 0.0458923804631)), None), 0.1)
    for eta in (0.0, 0.01):
        rule, params = ascent.adaptive(eta), store((2.0, -0.5))
        close(rule.length(rule(store((20.0, -0.5)), 0.5, params), params), 0.5)
    e = flat(ascent.fisher()(store(G0), 0.1, None))
    close(e @ ((1 + np.array(G0) ** 2) * e), 0.01)


def test_e2_masks_and_coarser_scales():
    """What needs to know about leaves has only one way to be stored."""
    leaves = {"weight": jnp.array([2.0]), "bias": jnp.array([-0.5])}
    gradient = {"weight": jnp.array([20.0]), "bias": jnp.array([-0.5])}
    rule = ascent.adaptive(mask={"weight": True, "bias": False})
    e = rule(gradient, 0.5, leaves)
    close([e["weight"][0], e["bias"][0]], (1.0049222727, -0.00621842449877))
    by_leaf = ascent.adaptive(0.0, granularity="leaf")
    one_leaf = jnp.array([20.0, -0.5]), 0.5, jnp.array([2.0, -0.5])
    close(by_leaf(*one_leaf), (1.03045443969, -0.0257613609923))
    # A filter of a matrix is a column; with the output axis first, a row.
    by_filter = ascent.adaptive(0.0, granularity="filter")
    close(by_filter(one_leaf[0][:, None], 0.5, one_leaf[2][:, None])[:, 0], (1.03045443969, -0.0257613609923))
    rows = ascent.adaptive(0.0, granularity="filter", output_axis=0)
    close(rows(one_leaf[0][None], 0.5, one_leaf[2][None])[0], (1.03045443969, -0.0257613609923))
    close(by_filter(one_leaf[0][None], 0.5, one_leaf[2][None])[0], (0.999980469322, -0.00156246948332))


def test_adversarial_weight_perturbation():
    """In the form of Kaggle: one leaf, a small and a large radius."""
    for rho, fraction, e, u in (
        (0.1, 0.05, (0.05, 0.0140719594448), (10.5, 1.01407195944)),
        (1.0, 0.01, (0.01, 0.01), (10.1, 1.01)),
    ):
        rule = ascent.bounded(ascent.layerwise(1e-6, 1e-6), fraction)
        close(rule(jnp.array(G0), rho, jnp.array(W0)), e)
        close(direction(optax_sam.sam(rho, ascent=rule), jnp.array(W0))[1], u)


KERNEL = {
    "Frobenius": (ascent.normalized(), (0.0953462589, 0.0095346259, 0.0, -0.0286038777)),
    "spectral": (ascent.matrix("spectral"), (0.0997054486, 0.0076696499, 0.0076696499, -0.0997054486)),
    "nuclear": (ascent.matrix("nuclear"), (0.0993501990, 0.0109058928, -0.0032362429, -0.0003552496)),
    "z-score": (ascent.zscore(0.5), (0.0957826285, 0.0, 0.0, -0.0287347886)),
}


@pytest.mark.parametrize("case", KERNEL)
def test_rules_of_a_matrix(case):
    """As a matrix, and as a leaf of three axes; ten decimals are known."""
    rule, expected = KERNEL[case]
    for shape in ((2, 2), (2, 1, 2)):
        gradient = jnp.array([10.0, 1.0, 0.0, -3.0]).reshape(shape)
        e = rule(gradient, 0.1, gradient)
        assert e.shape == shape
        np.testing.assert_allclose(e.ravel(), expected, rtol=0, atol=1e-10)


def test_z_scores_leaf_by_leaf():
    """The kernel has a ball of its own; what is no matrix moves as in SAM."""
    gradient = {"kernel": jnp.array([[10.0, 1.0], [0.0, -3.0]]), "bias": jnp.array([5.0, 3.0])}
    e = ascent.zscore(0.5, per_leaf=True)(gradient, 0.1, gradient)
    np.testing.assert_allclose(e["kernel"].ravel(), KERNEL["z-score"][1], rtol=0, atol=1e-10)
    close(e["bias"], 0.1 * np.array([5.0, 3.0]) / 12.0)
    together = ascent.zscore(0.5)(gradient, 0.1, gradient)
    close(together["bias"], 0.1 * np.array([5.0, 3.0]) / np.sqrt(109 + 34))


def test_multipliers(store):
    """The gradient (10, 1) is (10, 3) in units of the multipliers (1, 3)."""
    e = flat(ascent.scaled(store((1.0, 3.0)))(store(G0), 0.1, store(W0)))
    close(e, 0.1 * np.array([10.0, 9.0]) / np.sqrt(109))


E3_WEIGHT = np.array([[1.0, 2.0, 6.0], [-1.0, 0.5, 2.0]])  # Rows are outputs.
E3_BIAS = np.array([0.5, -1.5])
E3 = {
    False: (
        (-0.0436435780472, -0.0218217890236, 0.0654653670708, -0.0327326835354, 0.0, 0.0327326835354),
        (0.0109108945118, -0.0327326835354),
    ),
    True: (
        (-0.0286445949616, -0.0143222974808, 0.0429668924424, -0.0214834462212, 0.0, 0.0214834462212),
        (0.00716114874039, -0.0214834462212),
    ),
}


@pytest.mark.parametrize("legacy_norm", [False, True])
@pytest.mark.parametrize("output_axis", [0, -1])
def test_e3_centralized(legacy_norm, output_axis):
    weight = jnp.asarray(E3_WEIGHT if output_axis == 0 else E3_WEIGHT.T)
    gradient = {"weight": weight, "bias": jnp.asarray(E3_BIAS)}
    rule = ascent.centralized(output_axis=output_axis, legacy_norm=legacy_norm)
    e = rule(gradient, 0.1, gradient)
    expected_weight, expected_bias = E3[legacy_norm]
    close((e["weight"] if output_axis == 0 else e["weight"].T).ravel(), expected_weight)
    close(e["bias"], expected_bias)
    close(np.linalg.norm(flat(e)), 0.0656330123314 if legacy_norm else 0.1)


def test_e3_the_descent():
    gradient = {"weight": jnp.asarray(E3_WEIGHT), "bias": jnp.asarray(E3_BIAS)}
    variant = optax_sam.gcsam(0.1, output_axis=0)
    linear = optax_sam.sam_value_and_grad(lambda w: optax.tree.vdot(gradient, w), variant)
    state = variant.init(gradient)
    _, grads = linear(gradient, state=state)
    direction, _ = variant.update(grads, state, gradient)
    close(direction["weight"], [[-2.0, -1.0, 3.0], [-1.5, 0.0, 1.5]])
    close(direction["bias"], E3_BIAS)
    close(np.linalg.norm(flat(direction)), 4.58257569496)


# Variants: where, and the direction in the first step on L1.
DIRECTIONS = {
    "E1": (optax_sam.sam(0.1), W0, (10.9950371902, 1.00995037190)),
    "E1, p = inf": (optax_sam.sam(0.1, ascent=ascent.normalized(jnp.inf)), W0, (11.0, 1.1)),
    "E1, p = 4": (
        optax_sam.sam(0.1, ascent=ascent.normalized(4.0)),
        W0,
        (10.9887213648, 1.04589238046),
    ),
    "E1, zero gradient": (optax_sam.sam(0.1), (0.0, 0.0), (0.0, 0.0)),
    "E2, eta = 0": (optax_sam.asam(0.5, eta=0.0), (2.0, -0.5), (29.9998046932, -0.501562469483)),
    "E2, eta = 0.01": (optax_sam.asam(0.5), (2.0, -0.5), (30.0497978139, -0.501617504772)),
    "E2, of GSAM": (
        optax_sam.sam(0.5, ascent=ascent.absolute()),
        (2.0, -0.5),
        (29.9968764641, -0.506248047790),
    ),
    "E4": (optax_sam.sam(0.01, ascent=ascent.unnormalized()), W0, (11.0, 1.01)),
    "E5, pgd 2": (optax_sam.sam(0.1, steps=2), W0, (10.9954306141, 1.00954876567)),
    "E5, pgd 3": (optax_sam.sam(0.1, steps=3), W0, (10.9956230930, 1.00934593856)),
    "E5, split": (optax_sam.sam(0.1, steps=2, step_mode="split"), W0, (10.9952429497, 1.00974012751)),
    "E5, free": (optax_sam.sam(0.1, steps=2, step_mode="free"), W0, (11.9908450190, 1.01909737586)),
    "E7": (optax_sam.gsam(0.1, 0.4), W0, (10.9980047503, 0.977643405226)),
    "E7, clean": (optax_sam.gsam(0.1, 0.4, objective="clean"), W0, (10.0035466672, 0.964533327874)),
    "E8, 0.8": (optax_sam.wsam(0.1, 0.8), W0, (13.9801487608, 1.03980148761)),
    "E8, 0.9": (optax_sam.wsam(0.1, 0.9), W0, (18.9553347119, 1.08955334712)),
    "E11, A": (optax_sam.extragradient(0.01, weights=(1.0, 1.0)), W0, (19.0, 1.99)),
    "E11, B": (optax_sam.extragradient(0.01, weights=(1.0, 0.01)), W0, (10.09, 1.0099)),
    "E11, EG": (optax_sam.extragradient(0.01, weights=(0.0, 1.0)), W0, (9.0, 0.99)),
    "E11, EG-SAM": (
        optax_sam.sam(0.1, ascent=ascent.extrapolated(0.05)),
        W0,
        (5.99503719021, 0.959950371902),
    ),
    "E11, SAGM": (
        optax_sam.wsam(0.05, alpha=0.5, ascent=ascent.extrapolated(0.001)),
        W0,
        (10.1987592976, 1.00198759298),
    ),
    "E12, WSAM": (optax_sam.wsam(0.1, alpha=0.8), W0, (10.7960297522, 1.00796029752)),
    "E12": (optax_sam.gnp(), W0, (10.7960297522, 1.00796029752)),
    "E12, of the code": (optax_sam.gnp(normalize_clean=True), W0, (8.99503719021, 0.827861041326)),
    "E26": (optax_sam.stable_sam(0.1), W0, (10.0077448218, 0.919262520881)),
    "LE-SAM": (optax_sam.le_sam(0.5, 2.0), W0, (10.4950495050, 1.00495049505)),
    "LE-SAM, the largest radius": (optax_sam.le_sam(10.0, 0.1), W0, (10.9950371902, 1.00995037190)),
    "Unified SAM": (optax_sam.unified_sam(0.1, 0.5), W0, (15.4975185951, 1.05497518595)),
    "XSAM, 0": (optax_sam.xsam(0.1, 0.0), W0, (10.9865283198, 1.09865283198)),
    "XSAM, 0.5": (optax_sam.xsam(0.1, 0.5), W0, (10.9908722402, 1.05431018589)),
    "XSAM, 2": (optax_sam.xsam(0.1, 2.0), W0, (11.0028299111, 0.921182129825)),
    "E21": (optax_sam.sam(0.1, ascent=ascent.fisher()), W0, (10.0811093765, 1.04096023515)),
}


@functools.cache
def directions(store):
    inputs = {name: store(params) for name, (_, params, _) in DIRECTIONS.items()}
    return all_at_once(lambda name, params: direction(DIRECTIONS[name][0], params)[1], inputs)


@pytest.mark.parametrize("case", DIRECTIONS)
def test_directions(case, store):
    close(directions(store)[case], DIRECTIONS[case][-1])


# Whole walks: variant, optimizer, batches, params after each of some steps.
ADAM = optax.adam(0.05)
WALKS = {
    "E1": (
        optax_sam.sam(0.1),
        optax.sgd(0.05),
        (L1, L1),
        {0: (0.450248140490, 0.949502481405), 1: (0.17620011419763945, 0.9009956280838337)},
    ),
    "E4": (
        optax_sam.sam(0.01, ascent=ascent.unnormalized()),
        optax.sgd(0.05),
        (L1,),
        {0: (0.45, 0.9495)},
    ),
    "E5, free": (
        optax_sam.sam(0.1, steps=2, step_mode="free"),
        optax.sgd(0.05),
        (L1, L1),
        {1: (0.10250354249425314, 0.8994814911819842)},
    ),
    "E8, coupled": (
        optax_sam.wsam(0.1, 0.9),
        optax.sgd(0.05, momentum=0.9),
        (L1, L1),
        {0: (0.0522332644055, 0.945522332644), 1: (-1.0444706322405495, 0.8098270455958212)},
    ),
    "E8, decoupled": (
        optax_sam.decoupled_wsam(optax.sgd(0.05, momentum=0.9), 0.05, 0.1, 0.9),
        None,
        (L1, L1),
        {0: (0.0522332644055, 0.945522332644), 1: (-0.6414805702055442, 0.8138569462161711)},
    ),
    "E8, coupled, Adam": (
        optax_sam.wsam(0.1, 0.9),
        ADAM,
        (L1,),
        {0: (0.950000000026, 0.950000000459)},
    ),
    "E8, decoupled, Adam": (
        optax_sam.decoupled_wsam(ADAM, 0.05, 0.1, 0.9),
        None,
        (L1,),
        {0: (0.502233264456, 0.945522333144)},
    ),
    "E11, A": (
        optax_sam.extragradient(0.01, weights=(1.0, 1.0)),
        optax.sgd(0.01),
        (L1,),
        {0: (0.81, 0.9801)},
    ),
    "E11, B": (
        optax_sam.extragradient(0.01, weights=(1.0, 0.01)),
        optax.sgd(0.01),
        (L1,),
        {0: (0.8991, 0.989901)},
    ),
    "E11, EG": (
        optax_sam.extragradient(0.01, weights=(0.0, 1.0)),
        optax.sgd(0.01),
        (L1,),
        {0: (0.91, 0.9901)},
    ),
    "E17": (
        optax_sam.msam(optax.sgd(0.05, momentum=0.9), 0.1),
        None,
        (L1, L2, L1),
        {
            0: (0.5, 0.95),
            1: (0.0599503719021, 0.616990074380),
            2: (-0.3261991337347449, 0.2894488474764095),
        },
    ),
    # The directions (10.9950371902, 1.00995037190), (0.0995037190210, 5.83781141323) and
    # (4.43557037001, 0.757597187795), added up.
    "E29": (
        optax_sam.async_sam(0.1),
        optax.sgd(0.05),
        (L1, L2, L1),
        {
            0: (0.450248140490, 0.949502481405),
            1: (0.44527295453895, 0.6576119107435),
            2: (0.22349443603845, 0.61973205135375),
        },
    ),
}


@functools.cache
def walks(store):
    def points(name, params):
        variant, base, batches, _ = WALKS[name]
        tx = variant if base is None else optax.chain(variant, base)
        return [w for w, *_ in walk(step_of(variant, tx), tx, params, batches)]

    return all_at_once(points, {name: store(W0) for name in WALKS})


@pytest.mark.parametrize("case", WALKS)
def test_walks(case, store):
    for t, w in WALKS[case][-1].items():
        close(walks(store)[case][t], w)


def test_unified_sam_moves_from_one_form_to_the_other(store):
    """In step 3, counted from one, of the schedule of the authors."""
    variant = optax_sam.unified_sam(0.1, lambda step: 1 - 1 / (step + 1))
    state = variant.init(store(W0))._replace(step=jnp.asarray(2))
    _, grads = optax_sam.sam_value_and_grad(loss, variant)(store(W0), L1, state=state)
    e = np.array([0.399669146014, 0.0399669146014])
    close(flat(grads.perturbed), np.array([10.0, 1.0]) * (1 + e))


def test_e23_cr_sam(store):
    """Of a loss with a cubic term; on a quadratic the curvature drops out."""
    variant = optax_sam.cr_sam(0.1, gamma=0.1, beta=0.01)
    close(direction(variant, store(W0))[1], (11.014937934014089, 1.0101493793401408))

    def cubic(params):
        w, _ = ravel_pytree(params)
        return loss(params, L1) + jnp.sum(w**3) / 3

    state = variant.init(store(W0))
    _, grads = optax_sam.sam_value_and_grad(cubic, variant)(store(W0), state=state)
    close(flat(grads.clean), (11.0, 2.0))
    close(flat(variant.update(grads, state, store(W0))[0]), (12.2158727700, 2.05512294409))


def test_e24_eigen_sam(store):
    """With the eigenvector (1, 0), or its negative, at hand; and that vector by power iterations."""
    variant, params = optax_sam.eigen_sam(0.1, alpha=0.2), store(W0)
    state = variant.init(params)
    for vector in ((1.0, 0.0), (-1.0, 0.0)):
        known = state._replace(step=jnp.asarray(1), memory=type(state.memory)(store(vector)))
        _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, L1, state=known)
        close(flat(grads.perturbed), (10.9970173882, 1.00797017388))
        d = flat(grads.perturbed) / np.array([10.0, 1.0]) - 1
        close(d, 0.1 * np.array([0.9970173882297315, 0.07970173882297316]), rtol=1e-9)
    many = optax_sam.eigen_sam(0.1, iterations=20)
    _, grads = optax_sam.sam_value_and_grad(loss, many)(params, L1, state=state)
    _, after = many.update(grads, state, params)
    close(np.abs(flat(after.memory.vector)), (1.0, 0.0))
    # A first product that was zero leaves no vector: the next one begins with noise again.
    _, grads = optax_sam.sam_value_and_grad(loss, many)(
        params, L1, state=state._replace(step=jnp.asarray(100))
    )
    _, after = many.update(grads, state, params)
    close(np.abs(flat(after.memory.vector)), (1.0, 0.0))


def test_e25_sampa(store):
    """From a gradient at the auxiliary point that is known before the first step, as the paper begins."""
    variant = optax_sam.sampa(0.05, rho=0.1, mix=0.2)
    tx = optax.chain(variant, optax.sgd(0.05))
    params = store(W0)
    state = tx.init(params)
    state = (state[0]._replace(memory=type(state[0].memory)(store(G0))), state[1])
    step, points, ahead = jax.jit(step_of(variant, tx)), [], []
    for _ in range(2):
        before = np.asarray(flat(state[0].memory.gradient)), np.asarray(flat(params))
        params, state, value, _ = step(params, state, L1)
        y = before[1] - 0.05 * before[0]
        ahead.append(y)
        close(value, (10 * y[0] ** 2 + y[1] ** 2) / 2)
        points.append(flat(params))
    close(ahead, [(0.5, 0.95), (0.260198512392, 0.902601985124)])
    close(points, [(0.510198512392, 0.950101985124), (0.240802278128, 0.902325243284)])


@pytest.mark.parametrize(
    ("variant", "rate", "w"),
    [
        (optax_sam.sam_sps(0.1), 0.0447084560303, (0.508428863230, 0.954846678205)),
        (optax_sam.sam_sps(0.01, ascent=ascent.unnormalized()), 0.0446643626747, None),
        (optax_sam.sam_sps(0.1, max_learning_rate=0.01), 0.01, None),
        # What is left of the linear model is below zero there.
        (optax_sam.sam_sps(5.0), 0.0, W0),
        (optax_sam.sam_sps(0.1, min_loss=100.0), 0.0, W0),
    ],
)
def test_sam_sps(store, variant, rate, w):
    params = store(W0)
    state = variant.init(params)
    _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, L1, state=state)
    updates, _ = variant.update(grads, state, params)
    close(flat(updates), -rate * np.asarray(flat(grads.perturbed)))
    if w is not None:
        close(flat(optax.apply_updates(params, updates)), w)


@pytest.mark.parametrize(
    ("power", "e"),
    [
        (0.0, (0.0995037190, 0.00995037190)),
        (0.5, (0.0707106781, 0.0707106781)),
        (1.0, (0.00995037190, 0.0995037190)),
    ],
)
def test_a_preconditioned_step(store, power, e):
    """Where the second moment is the square of the gradient; ten decimals are known."""
    variant, params = optax_sam.preconditioned_sam(0.1, power, eps=1e-14), store(W0)
    state = variant.init(params)
    state = state._replace(memory=type(state.memory)(store((100.0, 1.0))))
    _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, L1, state=state)
    np.testing.assert_allclose(flat(grads.perturbed) / np.array([10.0, 1.0]) - 1, e, rtol=0, atol=1e-10)


def test_e14_the_trajectory_loss():
    """Of SAF and MESA, with the temperature 5 and the weight 0.3."""
    z, past = jnp.array([2.0, 1.0, 0.0]), jnp.array([1.0, 1.5, 0.0])
    close(optax_sam.losses.trajectory(z, past), 0.209464514118)

    def weighed(z, past):
        return 0.3 * jnp.mean(optax_sam.losses.trajectory(z, past))

    value, gradient = jax.value_and_grad(weighed)(jnp.stack([z, z]), jnp.stack([past, past]))
    close(value, 0.0628393542355)
    close(2 * gradient[0], (0.0896262200603, -0.0735678280390, -0.0160583920213))
    assert not np.any(jax.grad(weighed, argnums=1)(z, past))
    masked = [jnp.append(x, -jnp.inf) for x in (z, past)]
    close(optax_sam.losses.trajectory(*masked), 0.209464514118)
    close(2 * jax.grad(weighed)(*masked), (*2 * jax.grad(weighed)(z, past), 0.0))


def test_the_objective_of_bisam():
    z, y = jnp.array([2.0, 1.0, 0.0]), jnp.array(1)
    close(optax_sam.losses.bisam(z, y), 1.14576306512)
    close(optax_sam.losses.bisam(jnp.stack([z, z]), jnp.array([1, 1])), [1.14576306512] * 2)
    margins = 10 * np.tanh([0.1, 0.0, -0.1])
    close(optax_sam.losses.bisam(z, y, form="tanh"), np.log(np.sum(np.exp(margins))))
    # Where another class is far ahead the exponential of the log form grows by e for each unit and no more.
    assert optax_sam.losses.bisam(jnp.array([1e4, 0.0]), jnp.array(1)) < 2.0


def test_e1_losses(store):
    variant = optax_sam.sam(0.1)
    state, params = variant.init(store(W0)), store(W0)
    value_and_grad = optax_sam.sam_value_and_grad(loss, variant, return_metrics=True)
    value, grads, metrics = value_and_grad(params, L1, state=state)
    close(value, 5.5)
    close(metrics.loss, 5.5)
    close(metrics.perturbed_loss, 6.55454201756)
    close(metrics.sharpness, 1.05454201756)
    close(metrics.clean_norm, 10.0498756211)
    close(metrics.perturbation_norm, 0.1, rtol=1e-7)  # A float32.
    close(flat(grads.clean), G0)
    close(flat(grads.perturbed), (10.9950371902, 1.00995037190))


@pytest.mark.parametrize(
    ("variant", "visits_two"),
    [
        (optax_sam.looksam(0.1, k=2), (True, False, True)),
        (optax_sam.async_sam(0.1, reuse="perturbed"), (False, False, False)),
    ],
)
def test_no_sharpness_where_one_point_was_visited(variant, visits_two, store):
    """NaN, not zero: zero would pass for flat."""
    params, state = store(W0), variant.init(store(W0))
    value_and_grad = optax_sam.sam_value_and_grad(loss, variant, return_metrics=True)
    for two in visits_two:
        _, grads, metrics = value_and_grad(params, L1, state=state)
        _, state = variant.update(grads, state, params)
        assert jnp.isfinite(metrics.loss)
        close(metrics.perturbed_loss, 6.55454201756 if two else jnp.nan)
        close(metrics.sharpness, 1.05454201756 if two else jnp.nan)


def test_e6_two_shards(store):
    """One perturbation for the batch, and one for each of its two examples."""
    variant = optax_sam.sam(0.1)
    clean, together = direction(variant, store(W0), BOTH)
    close(clean, (5.5, 3.5))
    close(together, (6.00619689264, 3.63421887305))
    for mode in ("vmap", "loop"):
        options = {"num_shards": 2, "shard_mode": mode, "batch_argnums": 1}
        clean, apart = jax.jit(functools.partial(direction, variant, **options))(store(W0), BOTH)
        close(clean, (5.5, 3.5))
        close(apart, (6.01395849384, 3.70225397072))


def test_e7_the_radius_follows_the_learning_rate():
    def at(rate, *rho, **options):
        limits = {"lr_max": 3e-3, "lr_min": 3e-5, **options}
        return optax_sam.schedules.rho_from_learning_rate(lambda _: rate, *rho, **limits)(0)

    close(at(1.5e-3, 0.6, 0.1), 0.347474747475)
    close(at(0.0, 0.6, 0.1, clip=False), 0.0949494949495)
    close(at(0.0, 0.6, 0.1), 0.1)
    close(at(6e-3, 0.6, 0.1), 0.6)
    close(at(0.0, 0.6, clip=False), -0.00606060606061)  # What the paper's own numbers give in a warm-up.
    close(at(0.0, 0.6), 0.0)
    close(at(1.5e-3, 0.6, 0.1, lr_max=3e-5), 0.6)


def test_the_radius_warms_up(store):
    rho = optax_sam.schedules.warmup(0.2, 4)
    close(np.array([rho(step) for step in (0, 1, 3, 4, 5, 1000)]), (0.0, 0.05, 0.15, 0.2, 0.2, 0.2))
    close(np.array(jax.jit(jax.vmap(rho))(jnp.arange(3))), (0.0, 0.05, 0.1))
    close(optax_sam.schedules.warmup(lambda step: 0.1 * step, 4)(2), 0.1)
    # The first step is the plain one; the second is that of E1, whose radius is 0.1, here in float32.
    variant = optax_sam.sam(optax_sam.schedules.warmup(0.2, 2))
    state, params = variant.init(store(W0)), store(W0)
    for expected in (G0, (10.9950371902, 1.00995037190)):
        _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, L1, state=state)
        updates, state = variant.update(grads, state, params)
        np.testing.assert_allclose(flat(updates), expected, rtol=1e-7)


def test_e8_the_sharpness_term(store):
    clean, perturbed = direction(optax_sam.sam(0.1), store(W0))
    close(perturbed - clean, (0.995037190210, 0.00995037190210))


E9 = {
    False: [(0.237495, 0.947745), (-0.6107805528280186, 0.8507541587410204)],
    True: [(0.244745518547, 0.947745005225), (-0.607843850852, 0.850766561895)],
}


@pytest.mark.parametrize("update_precision_first", [False, True])
def test_e9_bsam(monkeypatch, store, update_precision_first):
    noise = iter([(0.5, -1.0), (-0.3, 0.8)])
    monkeypatch.setattr(optax.tree, "random_like", lambda *_: store(next(noise)))
    variant = optax_sam.bsam(0.5, 100, rho=0.05, damping=0.1, update_precision_first=update_precision_first)
    # Not compiled: the draw stands in Python.
    records = walk(step_of(variant, variant), variant, store(W0), (L1, L1))
    for (w, *_), expected in zip(records, E9[update_precision_first], strict=True):
        close(w, expected)
    (_, memory, value, grads), (_, (momentum, precision), _, later) = records
    close(value, 5.0 * 1.05**2 + 0.5 * 0.9**2)  # The loss at the sample.
    close(flat(grads.clean), (10.5, 0.9))
    close(flat(grads.perturbed), (15.25, 1.045))
    close(memory, [(1.52501, 0.10451), (1.0096001, 1.0000001)])
    if not update_precision_first:
        close(flat(later.clean), (2.07637972904, 1.027744996))
        close(flat(later.perturbed), (3.40326790975, 0.999132244661))
        close(momentum, (1.7128381659254464, 0.1939817019161275))
        close(precision, (1.0107769225493002, 1.0001279449473872))


def test_e15_friendly_sam(store):
    """Of the authors' code, executed."""
    variant = optax_sam.friendly_sam(0.1)
    tx = optax.chain(variant, optax.sgd(0.05))
    records = walk(jax.jit(step_of(variant, tx)), tx, store(W0), (L1, L2, L1))
    close(records[1][1][0], (8.99004962810, 1.47980099256))
    close(flat(records[1][-1].perturbed), (-0.280154050463, 5.96965441577))
    close(flat(records[2][-1].perturbed), (3.66024843482, 0.632293556215))
    close(records[2][0], (0.2812434212714606, 0.6194050828055222))


def test_e16_vasso(store):
    """Of the authors' code, executed."""
    variant = optax_sam.vasso(0.1, theta=0.4, ascent=optax_sam.ascent.normalized(eps=1e-7))
    tx = optax.chain(variant, optax.sgd(0.05))
    records = walk(jax.jit(step_of(variant, tx)), tx, store(W0), (L1, L2, L1))
    close(records[1][1][0], (5.96019851279, 2.91920397026))
    close(flat(records[1][-1].perturbed), (0.0801097367013, 5.97395316278))
    close(flat(records[2][-1].perturbed), (5.39867324817, 0.685939146847))
    close(records[2][0], (0.17630899174110284, 0.6165078659285593))


def test_e10_looksam(store):
    looksam = optax_sam.looksam(0.1, k=2, alpha=0.7)
    tx = optax.chain(looksam, optax.sgd(0.05))
    records = walk(jax.jit(step_of(looksam, tx)), tx, store(W0), (L1, L2, L1, L2))
    expected = [  # Direction and params.
        ((10.9950371902, 1.00995037190), (0.450248140490, 0.949502481405)),
        ((0.304402187882, 1.75895085659), (0.435028031095, 0.861554938576)),
        ((5.33122789354, 0.880982197829), (0.168466636418, 0.817505828684)),
        ((0.0592583129700, 1.62276153315), (0.165503720770, 0.736367752027)),
    ]
    before = np.array(W0)
    for (after, *_), (u, w) in zip(records, expected, strict=True):
        close((before - after) / 0.05, u)
        close(after, w)
        before = after
    (first, first_length), (kept, _), (second, second_length), _ = (memory for _, memory, *_ in records)
    g_v = np.array([[0.00886666803157, -0.0886666803157], [0.0333204902252, -0.168246348651]])
    close([first, second], g_v)
    close([first_length[0], second_length[0]], np.linalg.norm(g_v, axis=1))
    np.testing.assert_array_equal(kept, first)
    *_, reused = records[1]
    close(flat(reused.clean), (-0.0995037190210, 5.79800992562))
    np.testing.assert_array_equal(flat(reused.perturbed), flat(reused.clean))


@pytest.mark.parametrize(
    ("mask", "norm", "rho", "eps", "e", "u"),
    [
        pytest.param((1, 0), "all", 0.1, 1e-12, (0.0995037190210, 0.0), (10.9950371902, 1.0), id="E18"),
        pytest.param((0, 1), "selected", 0.1, 1e-12, (0.0, 0.1), (10.0, 1.1), id="E19"),
        # A random half of the coordinates, and twice the radius.
        pytest.param((1, 0), "all", 0.2, 1e-7, (0.199007436062, 0.0), (11.9900743606, 1.0), id="E13"),
    ],
)
def test_masks(store, mask, norm, rho, eps, e, u):
    rule = ascent.masked(store(mask), ascent.normalized(eps=eps), norm=norm)
    close(flat(rule(store(G0), rho, store(W0))), e)
    close(direction(optax_sam.sam(rho, ascent=rule), store(W0))[1], u)


def test_e17_on_perturbed_params(store):
    tx = optax_sam.shifted_msam(optax.sgd(0.05, momentum=0.9), 0.1)
    params = store(W0)
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        params = optax.apply_updates(params, updates)
        return params, state, optax_sam.msam_eval_params(state, params)

    points, kept = [], []
    for batch in (L1, L2, L1):
        params, state, unperturbed = step(params, state, batch)
        points.append(flat(params))
        kept.append(flat(unperturbed))
    close(points[0], (0.400496280979, 0.940049628098))
    close(points[2], (-0.4024598648881599, 0.22476267519867618))
    close(kept[0], (0.5, 0.95))
    close(kept[1], (0.0599503719021, 0.616990074380))
    close(kept[2], (-0.3261991337347449, 0.2894488474764095))


def test_e22_lookbehind(store):
    """Of the authors' code, executed: with both coordinates in one tensor, to which it adapts alpha."""
    half = np.array((0.4253529447700142, 0.9492738063059344))
    whole = 2 * half - W0
    adapted = (-0.14929048408237472, 0.8985479327254597)
    # A tensor of one entry goes straight on, and all the way.
    expected = {0.5: half, 1.0: whole, "adaptive": adapted if store is in_an_array else whole}
    for alpha, end in expected.items():
        tx = optax_sam.lookbehind(optax.sgd(0.05), 0.1, k=2, alpha=alpha)
        ((w, *_),) = walk(jax.jit(step_of(tx, tx)), tx, store(W0), (L1,))
        close(w, end)


@pytest.mark.full
def test_e18_with_a_mask_that_finds_itself():
    """The first step is a plain one; from then on the coordinate of the large gradient is perturbed."""
    params, variant = in_leaves(W0), optax_sam.ssam_f(0.1, sparsity=0.5)
    state = variant.init(params)
    for u in (G0, (10.9950371902, 1.0)):
        _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, L1, state=state)
        updates, state = variant.update(grads, state, params)
        close(flat(updates), u)


def test_the_mask_of_ssam_d_keeps_its_size():
    """From draw to draw, where a schedule drops all, where gradients vanish, and where all but one live."""
    params = jnp.linspace(0.0, 1.0, 40)
    for sparsity, live in ((0.9, 4), (0.5, 20), (0.02, 39), (0.0, 40)):
        variant = optax_sam.ssam_d(
            0.1, sparsity, every=1, drop=lambda step: jnp.where(step % 2 == 0, 1.0, 0.3)
        )
        state, masks = variant.init(params), []
        for gradient in (params, params, jnp.zeros(40), params):
            _, state = variant.update(optax_sam.SAMGradients(gradient, gradient), state, params)
            masks.append(state.memory.mask)
            assert np.sum(masks[-1]) == live
        # All but those few that nothing can replace are dropped, or a third of them.
        stay = [int(np.sum(a & b)) for a, b in itertools.pairwise(masks)]
        dropped = [min(int(d * live), 40 - live) for d in (0.3, 1.0, 0.3)]
        assert stay == [live - d for d in dropped]


def test_eigen_sam_is_handed_its_vector(store):
    variant, params = optax_sam.eigen_sam(0.1), store(W0)
    state = variant.init(params)
    _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, L1, state=state)
    with pytest.raises(TypeError, match=r"needs the eigenvector.*statistics=grads\.statistics"):
        variant.update(grads.perturbed, state, params, clean_updates=grads.clean)
    assert np.any(flat(variant.update(grads, state, params)[1].memory.vector))
