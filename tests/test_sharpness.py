"""Measures of sharpness against closed forms, and how they iterate over batches."""

import functools
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiers
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import optax_sam
from optax_sam import sharpness

# A quadratic with a negative eigenvalue, far from its stationary point.
_RNG = np.random.default_rng(0)
_BASIS = np.linalg.qr(_RNG.normal(size=(6, 6)))[0]
HESSIAN = _BASIS @ np.diag([9.0, 4.0, 1.0, 0.5, 0.0, -2.0]) @ _BASIS.T
SLOPE = _RNG.normal(size=6)
ONES = jnp.ones(4)


def quadratic(w: Any, batch: jax.Array) -> jax.Array:
    return jnp.mean(batch) * (w @ jnp.asarray(SLOPE, w.dtype) + w @ jnp.asarray(HESSIAN, w.dtype) @ w / 2)


# A network with a smooth activation. Below it also has ReLU, for which a rescaling of layers changes nothing.
IMAGES = jnp.asarray(_RNG.normal(size=(24, 5)), jnp.float32)
LABELS = jnp.asarray(_RNG.integers(0, 3, 24))
DATA = IMAGES, LABELS
NET = {
    "first": {"kernel": jnp.asarray(_RNG.normal(size=(5, 8)), jnp.float32), "bias": jnp.full(8, 0.1)},
    "second": {"kernel": jnp.asarray(_RNG.normal(size=(8, 3)), jnp.float32) / 2, "bias": jnp.zeros(3)},
}


def logits_fn(params: Any, batch: Any, activation: Any = jnp.tanh) -> jax.Array:
    hidden = activation(batch[0] @ params["first"]["kernel"] + params["first"]["bias"])
    return hidden @ params["second"]["kernel"] + params["second"]["bias"]


def loss_fn(params: Any, batch: Any) -> jax.Array:
    logits = logits_fn(params, batch)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))


def relu_logits_fn(params: Any, batch: Any) -> jax.Array:
    return logits_fn(params, batch, jax.nn.relu)


def relu_loss_fn(params: Any, batch: Any) -> jax.Array:
    logits = relu_logits_fn(params, batch)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))


def rescaled(params: Any, factor: float) -> Any:
    """The same ReLU network, with the first layer scaled up and the second one down."""
    first, second = params["first"], params["second"]
    return {
        "first": {"kernel": first["kernel"] * factor, "bias": first["bias"] * factor},
        "second": {"kernel": second["kernel"] / factor, "bias": second["bias"]},
    }


# A model that compiles quickly, for tests that do not depend on the network.
SMALL = {"second": {"kernel": NET["first"]["kernel"], "bias": NET["first"]["bias"]}}


def small_loss_fn(params: Any, batch: Any) -> jax.Array:
    return jnp.mean(jnp.tanh(batch[0] @ params["second"]["kernel"] + params["second"]["bias"]) ** 2)


def trust_region(gradient: Any, hessian: Any, rho: float) -> float:
    """The maximum of a quadratic on the border of a ball, by bisection of the secular equation."""
    values, vectors = np.linalg.eigh(hessian)
    g = vectors.T @ gradient
    low, high = values[-1], values[-1] + np.linalg.norm(g) / rho + 1.0
    for _ in range(200):
        mu = (low + high) / 2
        low, high = (mu, high) if np.linalg.norm(g / (mu - values)) > rho else (low, mu)
    e = g / (high - values)
    return float(g @ e + e @ (values * e) / 2)


class TestClosedForms:
    def test_one_step(self) -> None:
        w = _RNG.normal(size=6)
        g = SLOPE + HESSIAN @ w
        measure = functools.partial(
            sharpness.one_step_sharpness, quadratic, jnp.asarray(w, jnp.float32), ONES
        )
        unit, sign = g / np.linalg.norm(g), np.sign(g)
        for rho in (0.1, 0.7):
            plain = rho * np.linalg.norm(g) + rho**2 / 2 * unit @ HESSIAN @ unit
            np.testing.assert_allclose(measure(rho), plain, rtol=1e-5)
            box = rho * np.abs(g).sum() + rho**2 / 2 * sign @ HESSIAN @ sign
            np.testing.assert_allclose(measure(rho, ord=jnp.inf), box, rtol=1e-5)
            scaled = np.abs(w) * g
            step = rho * np.abs(w) * scaled / np.linalg.norm(scaled)
            np.testing.assert_allclose(
                measure(rho, adaptive=True), g @ step + step @ HESSIAN @ step / 2, rtol=1e-5
            )

    @pytest.mark.parametrize("rho", [0.05, 0.4, 2.0])
    def test_worst_case_is_the_trust_region_solution(self, rho: float) -> None:
        w = jnp.full(6, 0.2)
        exact = trust_region(SLOPE + HESSIAN @ np.asarray(w), HESSIAN, rho)
        found = sharpness.worst_case_sharpness(quadratic, w, ONES, rho, steps=60)
        one_step = sharpness.one_step_sharpness(quadratic, w, ONES, rho)
        np.testing.assert_allclose(found, exact, rtol=1e-4)
        assert one_step < found

    def test_worst_case_at_a_minimum_needs_restarts(self) -> None:
        def bowl(w: jax.Array, batch: jax.Array) -> jax.Array:
            return jnp.mean(batch) * (3 * w[0] ** 2 + w[1] ** 2) / 2

        measure = functools.partial(sharpness.worst_case_sharpness, bowl, jnp.zeros(2), ONES, 0.1)
        np.testing.assert_allclose(measure(restarts=1), 0.01 * 3 / 2, rtol=1e-4)
        assert measure(restarts=0) == 0.0

    def test_worst_case_in_a_box(self) -> None:
        # A convex function is largest at a corner.
        hessian = HESSIAN @ HESSIAN

        def convex(w: jax.Array, batch: jax.Array) -> jax.Array:
            return jnp.mean(batch) * (
                w @ jnp.asarray(SLOPE, w.dtype) + w @ jnp.asarray(hessian, w.dtype) @ w / 2
            )

        corners = 0.3 * np.array(np.meshgrid(*[(-1.0, 1.0)] * 6)).reshape(6, -1).T
        exact = max(SLOPE @ e + e @ hessian @ e / 2 for e in corners)
        found = sharpness.worst_case_sharpness(convex, jnp.zeros(6), ONES, 0.3, ord=jnp.inf, restarts=8)
        np.testing.assert_allclose(found, exact, rtol=1e-5)

    def test_adaptive_for_small_radii(self) -> None:
        w = _RNG.normal(size=6)
        scaled = np.abs(w) * (SLOPE + HESSIAN @ w)
        measure = functools.partial(
            sharpness.worst_case_sharpness, quadratic, jnp.asarray(w, jnp.float32), ONES, adaptive=True
        )
        np.testing.assert_allclose(measure(rho=1e-3), 1e-3 * np.linalg.norm(scaled), rtol=0.02)
        np.testing.assert_allclose(measure(rho=1e-3, ord=jnp.inf), 1e-3 * np.abs(scaled).sum(), rtol=0.02)

    def test_adaptive_at_a_minimum(self) -> None:
        w = np.array([2.0, -0.5, 1.0])
        hessian = np.diag([1.0, 30.0, 2.0])

        def bowl(x: jax.Array, batch: jax.Array) -> jax.Array:
            e = x - jnp.asarray(w, x.dtype)
            return jnp.mean(batch) * e @ jnp.asarray(hessian, x.dtype) @ e / 2

        found = sharpness.worst_case_sharpness(
            bowl, jnp.asarray(w, jnp.float32), ONES, 0.1, adaptive=True, steps=60
        )
        np.testing.assert_allclose(found, 0.01 / 2 * np.max(w**2 * np.diag(hessian)), rtol=1e-4)

    @pytest.mark.parametrize("adaptive", [False, True])
    def test_average(self, adaptive: bool) -> None:
        w = np.array([2.0, -0.5, 1.0, 0.3, -0.1, 1.0])
        scales = np.abs(w) if adaptive else np.ones(6)
        exact = 0.1**2 / 2 * np.sum(scales**2 * np.diag(HESSIAN))
        mean, error = sharpness.average_sharpness(
            quadratic, jnp.asarray(w, jnp.float32), ONES, 0.1, adaptive=adaptive, num_samples=20_000
        )
        assert abs(mean - exact) < 4 * error
        deviation = 0.1 * np.linalg.norm(scales * (SLOPE + HESSIAN @ w)) / 20_000**0.5
        np.testing.assert_allclose(error, deviation, rtol=0.1)

    def test_m_sharpness_of_single_examples(self) -> None:
        # The loss of one example is linear with gradient x, so the maximum is rho |x|.
        x = jnp.asarray(_RNG.normal(size=(7, 3)), jnp.float32)

        def linear(w: jax.Array, batch: jax.Array) -> jax.Array:
            return jnp.mean(batch @ w)

        measure = functools.partial(sharpness.m_sharpness, linear, jnp.ones(3), x, 0.3)
        np.testing.assert_allclose(measure(m=1), 0.3 * np.linalg.norm(x, axis=1).mean(), rtol=1e-5)
        # Three sets of two examples, and one set of the remaining example.
        means = [np.mean(x[i : i + 2], axis=0) for i in range(0, 7, 2)]
        exact = 0.3 * np.average(np.linalg.norm(means, axis=1), weights=[2, 2, 2, 1])
        np.testing.assert_allclose(measure(m=2), exact, rtol=1e-5)

    def test_m_sharpness_falls_with_m_to_the_worst_case(self) -> None:
        values = [sharpness.m_sharpness(small_loss_fn, SMALL, DATA, 0.3, m, chunk_size=24) for m in (4, 24)]
        assert values[0] > values[1]
        worst = sharpness.worst_case_sharpness(small_loss_fn, SMALL, DATA, 0.3)
        np.testing.assert_allclose(values[-1], worst, rtol=1e-4)

    def test_surrogate_gap(self) -> None:
        w = jnp.full(6, 0.2)
        gap = sharpness.surrogate_gap(quadratic, w, ONES, 0.3, steps=60)
        np.testing.assert_allclose(gap.gap, sharpness.one_step_sharpness(quadratic, w, ONES, 0.3))
        at_minimum = sharpness.surrogate_gap(
            lambda w, b: jnp.mean(b) * (7 * w[0] ** 2 + w[1] ** 2) / 2, jnp.zeros(2), ONES, 0.01
        )
        np.testing.assert_allclose(at_minimum.eigenvalue, 7.0, rtol=1e-4)

    def test_gradient_norms(self) -> None:
        flat, unravel = ravel_pytree(NET)
        gradient = jax.jit(jax.grad(lambda p: loss_fn(unravel(p), DATA)))(flat)
        np.testing.assert_allclose(
            sharpness.gradient_norm(loss_fn, NET, DATA), np.linalg.norm(gradient), rtol=1e-5
        )
        losses = optax.softmax_cross_entropy_with_integer_labels
        jacobian = jax.jit(jax.jacfwd(lambda p: losses(logits_fn(unravel(p), DATA), LABELS)))(flat)
        norms = sharpness.per_example_gradient_norms(loss_fn, NET, DATA, chunk_size=5)
        np.testing.assert_allclose(norms, np.linalg.norm(jacobian, axis=1), rtol=1e-5)

    @pytest.mark.parametrize("gradient_norm", [1e-3, 1.0, 50.0])
    def test_edge_is_the_root(self, gradient_norm: float) -> None:
        edge = float(sharpness.sam_edge(0.1, 0.05, gradient_norm))
        np.testing.assert_allclose(0.1 * edge * (1 + 0.05 * edge / gradient_norm), 2.0, rtol=1e-5)
        usam = float(sharpness.usam_edge(0.1, 0.05))
        np.testing.assert_allclose(0.1 * usam * (1 + 0.05 * usam), 2.0, rtol=1e-5)

    def test_edge_limits(self) -> None:
        for rho in (0.0, 1e-12):
            np.testing.assert_allclose(sharpness.sam_edge(0.1, rho, 0.7), 20.0, rtol=1e-6)
            np.testing.assert_allclose(sharpness.usam_edge(0.1, rho), 20.0, rtol=1e-6)
        assert sharpness.sam_edge(0.1, 0.0, 0.0) == 20.0
        assert sharpness.sam_edge(0.1, 0.1, 0.0) == 0.0
        assert sharpness.sam_edge(0.1, 0.1, jnp.ones(3)).shape == (3,)

    def test_edge_at_the_cycle_of_sam(self) -> None:
        # On a parabola SAM ends in a bounce of amplitude lr rho h / (2 - lr h), at its edge.
        h, rate, rho = 4.0, 0.1, 0.2
        amplitude = rate * rho * h / (2 - rate * h)
        np.testing.assert_allclose(sharpness.sam_edge(rate, rho, h * amplitude), h, rtol=1e-5)

    def test_fisher_rao_of_a_linear_softmax(self) -> None:
        weights = jnp.asarray(_RNG.normal(size=(5, 3)), jnp.float32)
        f = np.asarray(IMAGES @ weights)
        p = np.asarray(jax.nn.softmax(f))
        exact = np.sqrt(np.mean(np.sum(p * f**2, 1) - np.sum(p * f, 1) ** 2))
        found = sharpness.fisher_rao_norm(lambda w, x: x @ w, weights, IMAGES)
        np.testing.assert_allclose(found, exact, rtol=1e-5)
        sampled = sharpness.fisher_rao_norm(lambda w, x: x @ w, weights, IMAGES, num_samples=20_000)
        np.testing.assert_allclose(sampled, exact, rtol=0.01)
        # The positions of one example are independent and add up. Here two positions are equal.
        twice = sharpness.fisher_rao_norm(lambda w, x: jnp.stack([x @ w] * 2, 1), weights, IMAGES)
        np.testing.assert_allclose(twice, 2**0.5 * exact, rtol=1e-5)
        sampled = sharpness.fisher_rao_norm(
            lambda w, x: jnp.stack([x @ w] * 2, 1), weights, IMAGES, num_samples=20_000
        )
        np.testing.assert_allclose(sampled, 2**0.5 * exact, rtol=0.01)

    def test_relative_flatness(self) -> None:
        kernel = NET["first"]["kernel"]

        def of_kernel(w: jax.Array) -> jax.Array:
            return loss_fn({**NET, "first": {**NET["first"], "kernel": w}}, DATA)

        hessian = jax.jit(jax.hessian(of_kernel))(kernel)  # [input, output, input, output]
        exact = np.einsum("is,it,jsjt->", kernel, kernel, hessian)
        mean, error = sharpness.relative_flatness(loss_fn, NET, DATA, "first/kernel", num_samples=4000)
        assert abs(mean - exact) < 4 * error
        assert error < 0.1 * abs(exact)


class TestRescaling:
    """Which measures do not change when a layer is scaled up and the next one down."""

    @pytest.mark.parametrize("ord", tiers.later([2.0, jnp.inf], [2.0]))
    def test_worst_case(self, ord: float) -> None:
        measure = functools.partial(sharpness.worst_case_sharpness, relu_loss_fn, batches=DATA, ord=ord)
        other = rescaled(NET, 4.0)
        adaptive = [measure(params=p, rho=0.1, adaptive=True) for p in (NET, other)]
        np.testing.assert_allclose(*adaptive, rtol=1e-4)
        plain = [measure(params=p, rho=0.1) for p in (NET, other)]
        assert plain[1] > 1.5 * plain[0]

    def test_average(self) -> None:
        measure = functools.partial(sharpness.average_sharpness, relu_loss_fn, batches=DATA, rho=0.1)
        other = rescaled(NET, 4.0)
        adaptive = [measure(params=p, adaptive=True).mean for p in (NET, other)]
        np.testing.assert_allclose(*adaptive, rtol=1e-4)
        assert measure(params=other).mean > 1.5 * measure(params=NET).mean

    def test_fisher_rao_and_relative_flatness(self) -> None:
        norms = [sharpness.fisher_rao_norm(relu_logits_fn, p, DATA) for p in (NET, rescaled(NET, 4.0))]
        np.testing.assert_allclose(*norms, rtol=1e-4)
        flatness = [
            sharpness.relative_flatness(relu_loss_fn, p, DATA, "second/kernel").mean
            for p in (NET, rescaled(NET, 4.0))
        ]
        np.testing.assert_allclose(*flatness, rtol=1e-4)


def _one_step(f: Any, p: Any, b: Any) -> Any:
    return sharpness.one_step_sharpness(f, p, b, 0.2)


def _worst_case(f: Any, p: Any, b: Any) -> Any:
    return sharpness.worst_case_sharpness(f, p, b, 0.2, steps=5)


def _adaptive(f: Any, p: Any, b: Any) -> Any:
    return sharpness.worst_case_sharpness(f, p, b, 0.2, steps=5, ord=jnp.inf, adaptive=True)


def _average(f: Any, p: Any, b: Any) -> Any:
    return sharpness.average_sharpness(f, p, b, 0.2, num_samples=5)


def _m_sharpness(f: Any, p: Any, b: Any) -> Any:
    return sharpness.m_sharpness(f, p, b, 0.2, m=2, steps=5, chunk_size=1)


def _gap(f: Any, p: Any, b: Any) -> Any:
    return sharpness.surrogate_gap(f, p, b, 0.2, steps=5)


def _flatness(f: Any, p: Any, b: Any) -> Any:
    return sharpness.relative_flatness(f, p, b, "second/kernel", num_samples=4)


def _hessian_product(f: Any, p: Any, b: Any) -> Any:
    return sharpness.hessian_vector_product(f, p, b, jax.tree.map(jnp.ones_like, p))


def _eigenvalues(f: Any, p: Any, b: Any) -> Any:
    return sharpness.top_eigenpairs(f, p, b, k=2, num_matvecs=12).values


def _trace(f: Any, p: Any, b: Any) -> Any:
    return sharpness.hessian_trace(f, p, b, num_samples=4)


def _diagonal(f: Any, p: Any, b: Any) -> Any:
    return sharpness.hessian_diagonal(f, p, b, num_samples=4)


def _density(f: Any, p: Any, b: Any) -> Any:
    density = sharpness.spectral_density(f, p, b, num_probes=2, num_matvecs=10)
    return [density.moment(i) for i in range(3)]


STREAMED = [
    _one_step,
    _worst_case,
    _adaptive,
    _average,
    _m_sharpness,
    _gap,
    sharpness.gradient_norm,
    sharpness.per_example_gradient_norms,
    _flatness,
    _hessian_product,
]
MEASURES = [*STREAMED, _eigenvalues, _trace, _diagonal, _density]
# Without the measures that run the programs of other measures.
DISTINCT = [m for m in MEASURES if m not in (_adaptive, _gap, _diagonal)]
# One that streams, one that keeps all batches, and one that draws.
FEW = (_one_step, _eigenvalues, _average)
# Batches of 10, 10 and 4 examples. All sizes are even, so that sets of two stay within a batch.
SPLIT = [(IMAGES[i : i + 10], LABELS[i : i + 10]) for i in (0, 10, 20)]


class _Loader:
    """An iterable without a length that can be iterated any number of times."""

    def __iter__(self) -> Any:
        return iter(SPLIT)


@pytest.mark.parametrize("measure", tiers.later(MEASURES, FEW))
def test_streaming_equals_the_full_batch(measure: Any) -> None:
    whole = measure(small_loss_fn, SMALL, DATA)
    for batches in (SPLIT, _Loader(), iter(SPLIT)):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5),
            measure(small_loss_fn, SMALL, batches),
            whole,
        )


@pytest.mark.parametrize(
    "measure", [sharpness.gradient_norm, _average, _m_sharpness, _flatness, _hessian_product]
)
def test_one_pass_over_a_generator_holds_one_batch(measure: Any) -> None:
    evaluated: list[int] = []

    def loss(params: Any, batch: Any) -> Any:
        jax.debug.callback(lambda: evaluated.append(1))
        return small_loss_fn(params, batch)

    def batches() -> Any:
        for i, batch in enumerate(SPLIT):
            jax.effects_barrier()
            assert len(evaluated) >= i
            yield batch

    measure(loss, SMALL, batches())


def test_streaming_the_fisher_rao_norm() -> None:
    whole = sharpness.fisher_rao_norm(logits_fn, NET, DATA)
    np.testing.assert_allclose(sharpness.fisher_rao_norm(logits_fn, NET, SPLIT), whole, rtol=1e-5)


def counting(function: Any) -> tuple[Any, list[int]]:
    """The function, and a list that grows by one with every trace of it."""
    traces: list[int] = []

    def counted(params: Any, batch: Any) -> Any:
        traces.append(1)
        return function(params, batch)

    return counted, traces


@pytest.mark.parametrize("measure", tiers.later(DISTINCT, FEW))
def test_no_retracing_per_batch(measure: Any) -> None:
    counted, traces = counting(small_loss_fn)
    equal = [(IMAGES[i : i + 6], LABELS[i : i + 6]) for i in (0, 6, 12)]
    measure(counted, SMALL, equal[:2])
    first = len(traces)
    # Measures that run batch by batch are compiled already. The others compile once per number of batches.
    measure(counted, SMALL, equal)
    assert len(traces) - first in ((0,) if measure in STREAMED else (0, first))
    # With other values nothing is compiled again.
    first = len(traces)
    measure(counted, jax.tree.map(lambda w: w + 0.1, SMALL), [equal[2], *equal[:2]])
    assert len(traces) == first


@pytest.mark.parametrize(
    "measure", tiers.later([_one_step, _worst_case, _average, sharpness.gradient_norm, _flatness], FEW)
)
def test_a_ragged_batch_traces_once_more(measure: Any) -> None:
    counted, traces = counting(small_loss_fn)
    measure(counted, SMALL, SPLIT[:2])
    first = len(traces)
    for _ in range(2):
        measure(counted, SMALL, SPLIT)
        assert len(traces) == 2 * first


@pytest.mark.parametrize("measure", tiers.later(DISTINCT, FEW))
def test_sharded_params(measure: Any) -> None:
    mesh = Mesh(np.array(jax.devices()), ("x",), axis_types=(AxisType.Auto,))

    def put(leaf: jax.Array) -> jax.Array:
        # The axes of length 8 are sharded over the 8 devices.
        spec = [("x" if n == 8 else None) for n in leaf.shape]
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    sharded = jax.tree.map(put, SMALL)
    batch = jax.device_put(DATA, NamedSharding(mesh, PartitionSpec("x")))
    assert len(sharded["second"]["kernel"].sharding.device_set) == 8
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5),
        measure(small_loss_fn, sharded, batch),
        measure(small_loss_fn, SMALL, DATA),
    )


class _Params(NamedTuple):
    scale: Any
    layers: list[Any]


def test_any_pytree_of_params() -> None:
    def loss(params: _Params, batch: Any) -> jax.Array:
        return jnp.mean((params.scale * (batch["x"] @ params.layers[0])) ** 2) + params.layers[1]["b"]

    params = _Params(jnp.array(2.0), [jnp.ones((5, 2), jnp.bfloat16), {"b": 0.5}])
    for measure in (_one_step, _worst_case, sharpness.gradient_norm, _trace):
        assert all(
            x.dtype == jnp.float32 and np.all(np.isfinite(x))
            for x in jax.tree.leaves(measure(loss, params, {"x": IMAGES}))
        )


def test_half_precision_does_not_swallow_the_perturbation() -> None:
    def loss(w: jax.Array, batch: jax.Array) -> jax.Array:
        return jnp.mean(batch) * jnp.sum(w**2)

    w = jnp.full(4, 100.0, jnp.bfloat16)
    # The perturbation 1e-2 / 2 is below the spacing of bfloat16 at 100, which is a half.
    np.testing.assert_allclose(sharpness.one_step_sharpness(loss, w, ONES, 1e-2), 2 * 200.0 * 1e-2, rtol=0.02)


def test_inside_a_jit_of_the_caller() -> None:
    for measure in (_one_step, _average, sharpness.gradient_norm):
        inside = jax.jit(functools.partial(measure, small_loss_fn))(SMALL, DATA)
        outside = measure(small_loss_fn, SMALL, DATA)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), inside, outside)


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    sharpness.gradient_norm(small_loss_fn, SMALL, SPLIT, progress=True)
    assert "3/3" in capsys.readouterr().err
    sharpness.worst_case_sharpness(small_loss_fn, SMALL, SPLIT, 0.1, steps=5, restarts=2, progress=True)
    assert "18/18" in capsys.readouterr().err
    sharpness.top_eigenpairs(small_loss_fn, SMALL, SPLIT, k=2, num_matvecs=10, progress=True)
    assert "12/12" in capsys.readouterr().err
    sharpness.spectral_density(small_loss_fn, SMALL, SPLIT, num_probes=2, num_matvecs=10, progress=True)
    assert "20/20" in capsys.readouterr().err
    for progress in (False, None):  # None shows nothing here, because stderr is not a terminal.
        sharpness.gradient_norm(small_loss_fn, SMALL, SPLIT, progress=progress)
        assert capsys.readouterr().err == ""


class TestBadInput:
    @pytest.mark.parametrize("measure", MEASURES)
    @pytest.mark.parametrize("batches", [[], iter(())])
    def test_no_batch(self, measure: Any, batches: Any) -> None:
        with pytest.raises(ValueError, match="`batches` must hold at least one batch, got an empty iterable"):
            measure(small_loss_fn, SMALL, batches)

    @pytest.mark.parametrize("measure", MEASURES)
    def test_loss_that_is_not_a_scalar(self, measure: Any) -> None:
        def per_example(params: Any, batch: Any) -> jax.Array:
            return batch[0] @ params["second"]["kernel"][:, 0]

        with pytest.raises(ValueError, match=r"`loss_fn` must return a scalar.* an array of shape \(\d+,\)"):
            measure(per_example, SMALL, DATA)
        with pytest.raises(ValueError, match=r"`loss_fn` must return a scalar.* a tuple.*Average"):
            measure(lambda p, b: (small_loss_fn(p, b), {}), SMALL, DATA)

    @pytest.mark.parametrize("measure", tiers.later(MEASURES, FEW))
    def test_loss_that_is_not_finite(self, measure: Any) -> None:
        poisoned = jax.tree.map(lambda w: w.at[0].set(jnp.nan), SMALL)
        with pytest.raises(ValueError, match="must be finite at params"):
            measure(small_loss_fn, poisoned, DATA)

    def test_the_value_that_is_not_finite_is_named(self) -> None:
        with pytest.raises(ValueError, match="The loss must be finite at params, got nan"):
            _average(lambda p, b: loss_fn(p, b) * jnp.nan, NET, DATA)

    @pytest.mark.parametrize("rho", [0.0, -0.1, float("nan"), float("inf")])
    @pytest.mark.parametrize("measure", ["one_step", "worst_case", "average"])
    def test_radius(self, measure: str, rho: float) -> None:
        with pytest.raises(ValueError, match=rf"`rho` must be a number in the range \(0.0, inf\), got {rho}"):
            getattr(sharpness, f"{measure}_sharpness")(loss_fn, NET, DATA, rho)

    def test_numbers(self) -> None:
        with pytest.raises(ValueError, match=r"`m` must be an integer in the range \[1, inf\), got 0"):
            sharpness.m_sharpness(loss_fn, NET, DATA, 0.1, 0)
        with pytest.raises(ValueError, match=r"`ord` must be 2.0 or inf, the norm of the ball, got 1.0"):
            sharpness.worst_case_sharpness(loss_fn, NET, DATA, 0.1, ord=1.0)
        with pytest.raises(ValueError, match=r"`steps` .*got 0"):
            sharpness.worst_case_sharpness(loss_fn, NET, DATA, 0.1, steps=0)
        with pytest.raises(ValueError, match=r"`restarts` .*got -1"):
            sharpness.worst_case_sharpness(loss_fn, NET, DATA, 0.1, restarts=-1)
        with pytest.raises(ValueError, match=r"`num_samples` .*\[2, inf\), got 1"):
            sharpness.average_sharpness(loss_fn, NET, DATA, 0.1, num_samples=1)
        with pytest.raises(ValueError, match=r"`chunk_size` .*got 0"):
            sharpness.per_example_gradient_norms(loss_fn, NET, DATA, chunk_size=0)
        with pytest.raises(ValueError, match=r"`learning_rate` .*got 0"):
            sharpness.sam_edge(0, 0.1, 1.0)
        with pytest.raises(ValueError, match=r"`gradient_norm` .*got -1"):
            sharpness.sam_edge(0.1, 0.1, -1.0)
        with pytest.raises(ValueError, match=r"`rho` .*got -1"):
            sharpness.usam_edge(0.1, -1)
        with pytest.raises(ValueError, match=r"`learning_rate` .*got -0.1"):
            sharpness.sam_edge(np.float32(-0.1), 0.1, 1.0)
        with pytest.raises(ValueError, match=r"`rho` .*got -3"):
            sharpness.usam_edge(0.1, jnp.asarray(-3.0))

    @pytest.mark.parametrize("grads", [jnp.ones(3), (jnp.ones(3), jnp.ones(3))])
    @pytest.mark.parametrize("measure", [sharpness.gradient_ratio_fractions, sharpness.gradient_ratio_norms])
    def test_gradients_of_a_step(self, measure: Any, grads: Any) -> None:
        with pytest.raises(TypeError, match="needs two gradients and got a single one"):
            measure(grads)
        pair = optax_sam.SAMGradients(jnp.ones(3), jnp.full(3, 2.0))
        mapping = {"clean": pair.clean, "perturbed": pair.perturbed}  # As `flax.nnx` passes them.
        jax.tree.map(np.testing.assert_array_equal, measure(mapping), measure(pair))

    def test_batches(self) -> None:
        with pytest.raises(
            TypeError, match=r"`batches` must be one batch .* or an iterable of batches.* int"
        ):
            sharpness.gradient_norm(loss_fn, NET, 3)
        with pytest.raises(ValueError, match=r"first axes count the same examples.*\(24, 5\), \(23,\)"):
            sharpness.gradient_norm(loss_fn, NET, (IMAGES, LABELS[:-1]))
        with pytest.raises(ValueError, match="got shapes no arrays"):
            sharpness.gradient_norm(loss_fn, NET, ())

    def test_functions_and_params(self) -> None:
        with pytest.raises(TypeError, match=r"`loss_fn` must be a .*function of params and a batch, got 3"):
            sharpness.gradient_norm(3, NET, DATA)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"`logits_fn` must be a .*function"):
            sharpness.fisher_rao_norm(None, NET, DATA)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"`logits_fn` must return logits of shape.*got \(24,\)"):
            sharpness.fisher_rao_norm(lambda p, b: logits_fn(p, b)[:, 0], NET, DATA)
        with pytest.raises(
            ValueError, match=r"got \(24, 1\)\. For a binary classifier .* append a zero logit"
        ):
            sharpness.fisher_rao_norm(lambda p, b: logits_fn(p, b)[:, :1], NET, DATA)
        with pytest.raises(TypeError, match="params must be floating-point, got dtype int32"):
            sharpness.gradient_norm(loss_fn, {"w": jnp.arange(3)}, DATA)
        with pytest.raises(ValueError, match="params must hold at least one array"):
            sharpness.gradient_norm(loss_fn, {}, DATA)
        with pytest.raises(ValueError, match="`layer` must be one of 'first/kernel', 'second/kernel'"):
            sharpness.relative_flatness(loss_fn, NET, DATA, "third")
        with pytest.raises(ValueError, match="`params` must hold a leaf of two axes or more"):
            sharpness.relative_flatness(lambda w, _: jnp.sum(w), jnp.ones(3), DATA, "kernel")
        with pytest.raises(TypeError, match="`key` must be a random key"):
            sharpness.average_sharpness(loss_fn, NET, DATA, 0.1, key="seed")


class TestWithoutTheExtra:
    @pytest.mark.parametrize("measure", [_eigenvalues, _trace, _diagonal, _density])
    def test_matfree(self, measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("matfree", "matfree.decomp", "matfree.stochtrace"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=r"needs matfree.*`pip install optax-sam\[sharpness\]`"):
            measure(small_loss_fn, SMALL, DATA)

    def test_tqdm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tqdm", None)
        with pytest.raises(ImportError, match=r"needs tqdm.*`pip install optax-sam\[sharpness\]`"):
            sharpness.gradient_norm(small_loss_fn, SMALL, DATA, progress=True)
        assert np.isfinite(sharpness.gradient_norm(small_loss_fn, SMALL, DATA))


def test_an_ascent_that_starts_where_the_loss_is_no_number_is_left_out() -> None:
    """The loss rises by 18.3 elsewhere in the ball. Restarts must not make the largest rise smaller."""

    def barrier(w: jax.Array, batch: jax.Array) -> jax.Array:
        return -jnp.mean(batch) * jnp.sum(jnp.log(w))

    w, ones = jnp.full(2, 0.05), jnp.ones(4)
    without = sharpness.m_sharpness(barrier, w, ones, 0.1, 4, restarts=0)
    for key in range(4):
        assert sharpness.m_sharpness(barrier, w, ones, 0.1, 4, key=key) >= without > 18.0
