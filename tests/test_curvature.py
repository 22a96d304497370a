"""Curvature against dense matrices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiers
from jax.flatten_util import ravel_pytree

import optax_sam
from optax_sam import landscape, sharpness
from optax_sam.sharpness import _data, curvature

_RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(_RNG.normal(size=(24, 4)), jnp.float32)
LABELS = jnp.asarray(_RNG.integers(0, 3, 24))
DATA = IMAGES, LABELS
PARAMS = {
    "first": jnp.asarray(_RNG.normal(size=(4, 6)), jnp.float32),
    "second": jnp.asarray(_RNG.normal(size=(6, 3)), jnp.float32),
}
FLAT, unravel = ravel_pytree(PARAMS)  # 42 params


def logits_fn(params: Any, batch: Any) -> jax.Array:
    return jnp.tanh(batch[0] @ params["first"]) @ params["second"]


def output_loss(logits: jax.Array, batch: Any) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))


def loss_fn(params: Any, batch: Any) -> jax.Array:
    return output_loss(logits_fn(params, batch), batch)


GAUSS_NEWTON = sharpness.GaussNewton(logits_fn, output_loss)


@functools.cache
def dense_hessian() -> np.ndarray:
    return np.asarray(jax.jit(jax.hessian(lambda p: loss_fn(unravel(p), DATA)))(FLAT), np.float64)


@functools.cache
def dense_gauss_newton() -> np.ndarray:
    jacobian = np.asarray(jax.jit(jax.jacfwd(lambda p: logits_fn(unravel(p), DATA)))(FLAT), np.float64)
    p = np.asarray(jax.nn.softmax(logits_fn(PARAMS, DATA)), np.float64)
    inner = np.einsum("nk,kl->nkl", p, np.eye(3)) - np.einsum("nk,nl->nkl", p, p)
    return np.einsum("nkp,nkl,nlq->pq", jacobian, inner, jacobian) / len(p)


def diagonal_loss(values: np.ndarray) -> Any:
    """A quadratic of the given spectrum."""
    diagonal = jnp.asarray(values, jnp.float32)

    def loss(w: jax.Array, batch: jax.Array) -> jax.Array:
        return jnp.mean(batch) * jnp.sum(diagonal * w**2) / 2

    return loss


@pytest.mark.parametrize(
    ("loss", "dense"),
    [
        (loss_fn, dense_hessian),
        pytest.param(GAUSS_NEWTON, dense_gauss_newton, marks=pytest.mark.full),
    ],
)
class TestAgainstTheDenseMatrix:
    def test_product(self, loss: Any, dense: Any) -> None:
        v = _RNG.normal(size=len(FLAT))
        vector = unravel(jnp.asarray(v, jnp.float32))
        product = sharpness.hessian_vector_product(loss, PARAMS, DATA, vector)
        np.testing.assert_allclose(ravel_pytree(product)[0], dense() @ v, rtol=1e-4, atol=1e-5)
        if loss is GAUSS_NEWTON:
            other = sharpness.gauss_newton_vector_product(logits_fn, output_loss, PARAMS, DATA, vector)
            jax.tree.map(np.testing.assert_array_equal, other, product)

    def test_top_eigenpairs(self, loss: Any, dense: Any) -> None:
        values, vectors = np.linalg.eigh(dense())
        # First by Lanczos in 30 of the 42 dimensions, then by the dense matrix.
        for num_matvecs in (30, 1000):
            top = sharpness.top_eigenpairs(loss, PARAMS, DATA, k=3, num_matvecs=num_matvecs)
            np.testing.assert_allclose(top.values, values[::-1][:3], rtol=1e-4)
            np.testing.assert_allclose(top.smallest, values[0], atol=1e-2 * values[-1])
            for i in range(3):
                found = ravel_pytree(jax.tree.map(lambda v, i=i: v[i], top.vectors))[0]
                np.testing.assert_allclose(abs(found @ vectors[:, -1 - i]), 1.0, rtol=1e-3)
            assert np.all(top.residuals < 1e-2 * values[-1])
            np.testing.assert_allclose(top.ratio(3), values[-1] / values[-3], rtol=1e-4)

    def test_trace(self, loss: Any, dense: Any) -> None:
        mean, error = sharpness.hessian_trace(loss, PARAMS, DATA, num_samples=400)
        assert abs(mean - np.trace(dense())) < 4 * error
        off_diagonal = dense() - np.diag(np.diag(dense()))
        np.testing.assert_allclose(error, np.sqrt(2 * np.sum(off_diagonal**2) / 400), rtol=0.25)

    def test_diagonal(self, loss: Any, dense: Any) -> None:
        mean, error = (
            ravel_pytree(x)[0] for x in sharpness.hessian_diagonal(loss, PARAMS, DATA, num_samples=400)
        )
        assert np.all(np.abs(mean - np.diag(dense())) < 5 * error)
        off_diagonal = dense() - np.diag(np.diag(dense()))
        np.testing.assert_allclose(error, np.sqrt(np.sum(off_diagonal**2, axis=1) / 400), rtol=0.25)

    def test_spectral_density(self, loss: Any, dense: Any) -> None:
        density = sharpness.spectral_density(loss, PARAMS, DATA, num_probes=60, num_matvecs=12)
        np.testing.assert_allclose(density.weights.sum(), 1.0, rtol=1e-5)
        assert np.all(density.weights >= 0)
        for power in (1, 2):
            exact = np.trace(np.linalg.matrix_power(dense(), power)) / len(FLAT)
            of_probes = 60 * np.sum(density.weights * density.nodes**power, axis=1)
            assert abs(density.moment(power) - exact) < 4 * np.std(of_probes) / 60**0.5


class TestTopEigenpairs:
    def test_known_spectrum(self) -> None:
        values = np.concatenate([[50.0, 20.0, 10.0, 5.0], np.linspace(-2.0, 2.0, 96)])
        top = sharpness.top_eigenpairs(
            diagonal_loss(values), jnp.zeros(100), jnp.ones(3), k=4, num_matvecs=24
        )
        np.testing.assert_allclose(top.values, values[:4], rtol=1e-5)
        np.testing.assert_allclose(top.smallest, -2.0, rtol=0.02)

    def test_rank_below_the_number_of_products(self) -> None:
        # The Krylov space closes after three steps. Later entries must not be taken for eigenvalues.
        values = np.concatenate([[3.0, 1.0], np.zeros(98)])
        loss = diagonal_loss(values)
        top = sharpness.top_eigenpairs(loss, jnp.zeros(100), jnp.ones(3), k=2, num_matvecs=40)
        np.testing.assert_allclose(top.values, [3.0, 1.0], rtol=1e-5)
        assert np.all(top.residuals < 1e-4)
        with pytest.raises(ValueError, match=r"`k` must be at most 3 here, got 5: .* different eigenvalues"):
            sharpness.top_eigenpairs(loss, jnp.zeros(100), jnp.ones(3), k=5, num_matvecs=40)

    @pytest.mark.parametrize("outlier", [1e5, 1e6])
    def test_an_outlier_does_not_end_the_search(self, outlier: float) -> None:
        # All residuals after the first are below the rounding errors of the outlier. The space is healthy.
        loss = diagonal_loss(np.r_[outlier, np.linspace(1.0, 5.0, 99)])
        top = sharpness.top_eigenpairs(loss, jnp.zeros(100), jnp.ones(3), k=2, num_matvecs=40)
        np.testing.assert_allclose(top.values, [outlier, 5.0], rtol=1e-3)
        assert top.residuals[0] < 1e-5 * outlier  # A hundred roundings of float32.
        assert top.residuals[1] < 0.1
        np.testing.assert_allclose(top.smallest, 1.0, rtol=0.02)
        density = sharpness.spectral_density(loss, jnp.zeros(100), jnp.ones(3), num_probes=1, num_matvecs=40)
        assert len(np.unique(density.nodes)) == 40

    def test_flat_everywhere(self) -> None:
        top = sharpness.top_eigenpairs(
            diagonal_loss(np.zeros(50)), jnp.ones(50), jnp.ones(3), k=1, num_matvecs=10
        )
        assert top.values[0] == 0.0

    def test_multiple_eigenvalues_of_few_params(self) -> None:
        top = sharpness.top_eigenpairs(diagonal_loss(np.ones(5)), jnp.zeros(5), jnp.ones(3), k=5)
        np.testing.assert_allclose(top.values, np.ones(5), rtol=1e-6)

    def test_bad_input(self) -> None:
        measure = functools.partial(sharpness.top_eigenpairs, loss_fn, PARAMS, DATA)
        with pytest.raises(ValueError, match=r"`k` must be an integer in the range \[1, 42\], got 43"):
            measure(k=43)
        with pytest.raises(ValueError, match=r"`k` must be an integer in the range \[1, 42\], got 0"):
            measure(k=0)
        with pytest.raises(ValueError, match=r"`num_matvecs` must be an integer in the range \[3, inf\)"):
            measure(k=3, num_matvecs=2)
        top = sharpness.Eigenpairs(jnp.ones(2), None, jnp.ones(2), jnp.ones(()))
        with pytest.raises(ValueError, match=r"`number` .* \[1, 2\], got 5"):
            top.ratio()


class TestSpectralDensity:
    def test_moments_are_those_of_the_probes(self) -> None:
        # The quadrature of one probe z is exact: its moments are z' H^j z / P.
        density = sharpness.spectral_density(loss_fn, PARAMS, DATA, num_probes=1, num_matvecs=8, key=3)
        key = jax.random.split(jax.random.key(3), 1)[0]
        z = np.asarray(jax.random.rademacher(key, FLAT.shape, FLAT.dtype), np.float64)
        for power in range(5):
            exact = z @ np.linalg.matrix_power(dense_hessian(), power) @ z / len(z)
            np.testing.assert_allclose(density.moment(power), exact, rtol=1e-3)

    def test_smooth(self) -> None:
        values = np.repeat([0.0, 5.0], [75, 25])
        density = sharpness.spectral_density(
            diagonal_loss(values), jnp.zeros(100), jnp.ones(3), num_probes=8, num_matvecs=10
        )
        np.testing.assert_allclose(density.weights.sum(), 1.0, rtol=1e-5)
        grid, curve = density.smooth()
        np.testing.assert_allclose(np.trapezoid(curve, grid), 1.0, rtol=0.01)
        # The curve above 2.5 holds the mass of the larger eigenvalue.
        np.testing.assert_allclose(np.trapezoid(curve[grid > 2.5], grid[grid > 2.5]), 0.25, rtol=0.01)
        grid, curve = density.smooth(np.linspace(-1.0, 6.0, 50), bandwidth=0.5)
        assert grid.shape == curve.shape == (50,)
        with pytest.raises(ValueError, match=r"`bandwidth` .*got 0"):
            density.smooth(bandwidth=0)

    def test_a_single_eigenvalue(self) -> None:
        density = sharpness.spectral_density(diagonal_loss(np.zeros(20)), jnp.zeros(20), jnp.ones(3))
        assert density.moment(1) == 0.0
        grid, curve = density.smooth()
        np.testing.assert_allclose(np.trapezoid(curve, grid), 1.0, rtol=0.01)

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match=r"`num_probes` .*got 0"):
            sharpness.spectral_density(loss_fn, PARAMS, DATA, num_probes=0)
        with pytest.raises(ValueError, match=r"`num_samples` .*got 1"):
            sharpness.hessian_trace(loss_fn, PARAMS, DATA, num_samples=1)


def test_batches_are_accumulated_in_constant_memory() -> None:
    def temporary_bytes(count: int) -> int:
        batch = jnp.ones((512, 4)), jnp.zeros(512, jnp.int32)
        groups = _data.stack([batch] * count)
        program = curvature._lanczos.lower(loss_fn, 5, False, PARAMS, groups, FLAT).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(32) < 1.2 * temporary_bytes(2)


def test_vectors_and_functions_are_checked() -> None:
    with pytest.raises(ValueError, match="`vector` must have the structure of params"):
        sharpness.hessian_vector_product(loss_fn, PARAMS, DATA, FLAT)
    with pytest.raises(TypeError, match="`model_fn` must be"):
        sharpness.gauss_newton_vector_product(None, output_loss, PARAMS, DATA, PARAMS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`output_loss` must be"):
        sharpness.gauss_newton_vector_product(logits_fn, 3, PARAMS, DATA, PARAMS)  # type: ignore[arg-type]


class TestCompositeLoss:
    """An ordinary loss whose batch is a pair; `GaussNewton.of` makes use of its parts."""

    LOSS = optax_sam.CompositeLoss(
        lambda params, images: logits_fn(params, (images,)),
        lambda logits, labels: output_loss(logits, (None, labels)),
    )
    WITH_AUX = optax_sam.CompositeLoss(
        lambda params, images: (logits_fn(params, (images,)), {"examples": len(images)}),
        LOSS.output_loss,
        has_aux=True,
    )
    BATCHES = (IMAGES[:10], LABELS[:10]), (IMAGES[10:], LABELS[10:])

    @pytest.mark.full
    @pytest.mark.parametrize(("has_aux", "split"), [(True, False), (False, True)])
    def test_gives_the_numbers_of_the_loss_and_of_gauss_newton(self, has_aux: bool, split: bool) -> None:
        loss, batches = self.WITH_AUX if has_aux else self.LOSS, list(self.BATCHES) if split else DATA
        for measure in (
            lambda f: sharpness.hessian_vector_product(f, PARAMS, batches, PARAMS),
            lambda f: sharpness.top_eigenpairs(f, PARAMS, batches, k=2, num_matvecs=20).values,
            lambda f: sharpness.hessian_trace(f, PARAMS, batches, num_samples=3),
            lambda f: sharpness.hessian_diagonal(f, PARAMS, batches, num_samples=3),
            lambda f: sharpness.spectral_density(f, PARAMS, batches, num_probes=1, num_matvecs=8).moment(2),
            lambda f: sharpness.relative_flatness(f, PARAMS, batches, "first", num_samples=3),
            lambda f: sharpness.gradient_norm(f, PARAMS, batches),
            lambda f: sharpness.one_step_sharpness(f, PARAMS, batches, 0.1),
            lambda f: landscape.line(f, PARAMS, batches, PARAMS, positions=[0.0, 1.0]).losses,
        ):
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7),
                (measure(loss), measure(sharpness.GaussNewton.of(loss))),
                (measure(loss_fn), measure(GAUSS_NEWTON)),
            )

    def test_equals_the_product_of_the_two_functions(self) -> None:
        product = sharpness.gauss_newton_vector_product(logits_fn, output_loss, PARAMS, DATA, PARAMS)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7),
            sharpness.hessian_vector_product(sharpness.GaussNewton.of(self.LOSS), PARAMS, DATA, PARAMS),
            product,
        )

    def test_an_equal_loss_is_not_traced_again(self) -> None:
        traces: list[int] = []

        def model_fn(params: Any, images: jax.Array) -> jax.Array:
            traces.append(1)
            return logits_fn(params, (images,))

        for i in range(2):
            loss = optax_sam.CompositeLoss(model_fn, self.LOSS.output_loss)
            sharpness.hessian_trace(loss, PARAMS, DATA, num_samples=2)
            sharpness.hessian_trace(sharpness.GaussNewton.of(loss), PARAMS, DATA, num_samples=2)
            if i == 0:
                first = len(traces)
        assert len(traces) == first

    @pytest.mark.parametrize("batches", [IMAGES, [IMAGES, LABELS], (IMAGES, LABELS, LABELS)])
    def test_a_batch_that_is_no_pair(self, batches: Any) -> None:
        for measure in (sharpness.gradient_norm, sharpness.hessian_trace):
            with pytest.raises(ValueError, match=r"With a `CompositeLoss` .* a pair `\(inputs, targets"):
                measure(self.LOSS, PARAMS, batches)


def test_relative_flatness_is_that_of_the_hessian() -> None:
    measure = functools.partial(sharpness.relative_flatness, num_samples=3)
    flatness = [measure(f, PARAMS, DATA, "first").mean for f in (loss_fn, GAUSS_NEWTON)]
    np.testing.assert_allclose(*flatness, rtol=1e-5)


@pytest.mark.parametrize("outlier", tiers.later([1e6, 1e8], [1e8]))
def test_an_outlier_does_not_end_the_search_in_float64(outlier: float) -> None:
    with jax.enable_x64(True):
        spectrum = np.r_[outlier, np.linspace(1.0, 10.0, 99)]
        diagonal = jnp.asarray(spectrum)

        def loss(w: jax.Array, batch: jax.Array) -> jax.Array:
            return jnp.mean(batch) * jnp.sum(diagonal * w**2) / 2

        pairs = sharpness.top_eigenpairs(loss, jnp.zeros(100), jnp.ones(3), k=3, num_matvecs=95)
        np.testing.assert_allclose(pairs.values, np.sort(spectrum)[::-1][:3], rtol=1e-9)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(3))
def test_a_space_that_closes_in_float64_ends_the_search(seed: int) -> None:
    """Matrices of rank 4, and of three eigenvalues: the results stay within their spectra."""
    random = np.random.default_rng(seed)
    basis = np.linalg.qr(random.normal(size=(150, 150)))[0]
    spectra = np.r_[np.zeros(146), 1e-3, 2.0, 3.0, 5e4], np.repeat([-4.0, 0.5, 1e3], 50)
    with jax.enable_x64(True):
        for spectrum in spectra:
            matrix = jnp.asarray(basis * spectrum @ basis.T)

            def loss(w: jax.Array, batch: jax.Array, matrix: Any = matrix) -> jax.Array:
                return jnp.mean(batch) * w @ matrix @ w / 2

            top = len(set(spectrum)) - 1
            pairs = sharpness.top_eigenpairs(
                loss, jnp.zeros(150), jnp.ones(3), k=top, num_matvecs=60, key=seed
            )
            slack = 1e-9 * max(spectrum)
            # Where rounding errors go on with an orthonormal basis, more copies of an eigenvalue are found.
            nearest = spectrum[np.argmin(np.abs(spectrum[:, None] - pairs.values), axis=0)]
            np.testing.assert_allclose(pairs.values, nearest, rtol=1e-6, atol=slack)
            assert np.all(pairs.residuals < 1e-6 * max(spectrum))
            once, all_copies = (np.sort(x)[::-1][:top] for x in (np.unique(spectrum), spectrum))
            assert np.all((once <= nearest) & (nearest <= all_copies))
            density = sharpness.spectral_density(
                loss, jnp.zeros(150), jnp.ones(3), num_probes=2, num_matvecs=60, key=seed
            )
            assert (
                min(spectrum) - slack <= density.nodes.min() <= density.nodes.max() <= max(spectrum) + slack
            )


def test_a_spectrum_as_wide_as_its_rounding_is_smoothed_as_one_point() -> None:
    nodes = jnp.full((2, 4), 2.0).at[0, 0].add(2.4e-7)
    grid, curve = curvature.SpectralDensity(nodes, jnp.full((2, 4), 1 / 8)).smooth()
    np.testing.assert_allclose(np.trapezoid(curve, grid), 1.0, atol=0.01)
