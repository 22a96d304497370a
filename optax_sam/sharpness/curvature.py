"""Curvature of the loss: eigenvalues, trace, diagonal and spectral density, with `matfree`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import ArrayLike

from optax_sam import _checks, _tree
from optax_sam._loss import CompositeLoss
from optax_sam.sharpness import _data
from optax_sam.sharpness._data import LossFn
from optax_sam.sharpness.ball import Estimate


class GaussNewton(NamedTuple):
    """A loss for which the measures of curvature use the Gauss-Newton matrix in place of the Hessian.

    The Gauss-Newton matrix is the Hessian without the curvature of the model. It is positive semi-definite
    for a convex `output_loss`, and it is the Fisher information for a cross-entropy. Pass a `GaussNewton` as
    `loss_fn`. Only `relative_flatness` uses the Hessian of the whole loss in all cases.

    Attributes:
      model_fn: `(params, batch) -> outputs`, such as logits.
      output_loss: `(outputs, batch) -> scalar`, the mean loss of the batch.
    """

    model_fn: Callable[[Any, Any], Any]
    output_loss: Callable[[Any, Any], Any]

    def __call__(self, params: optax.Params, batch: Any) -> Any:
        """The loss."""
        return self.output_loss(self.model_fn(params, batch), batch)

    @classmethod
    def of(cls, loss: CompositeLoss) -> GaussNewton:
        """The same for a `CompositeLoss`, whose batch is the pair `(inputs, targets)`."""
        return cls(_Outputs(loss), _OutputLoss(loss))


# Dataclasses: those of equal losses are equal, and nothing is traced again.


@dataclasses.dataclass(frozen=True)
class _Outputs:
    loss: CompositeLoss

    def __call__(self, params: optax.Params, batch: Any) -> Any:
        outputs = self.loss.model_fn(params, _data.inputs_and_targets(batch)[0])
        return outputs[0] if self.loss.has_aux else outputs


@dataclasses.dataclass(frozen=True)
class _OutputLoss:
    loss: CompositeLoss

    def __call__(self, outputs: Any, batch: Any) -> Any:
        return self.loss.output_loss(outputs, _data.inputs_and_targets(batch)[1])


class Eigenpairs(NamedTuple):
    r"""The largest eigenvalues of a matrix.

    Attributes:
      values: The k largest eigenvalues, largest first. shape=(k,)
      vectors: Their eigenvectors of unit norm, a pytree like params with a first axis of length k.
      residuals: Norms of :math:`H v - \lambda v`, which bound the errors of the values. shape=(k,)
      smallest: An upper estimate of the smallest eigenvalue. shape=()
    """

    values: jax.Array
    vectors: Any
    residuals: jax.Array
    smallest: jax.Array

    def ratio(self, number: int = 5) -> jax.Array:
        """The largest eigenvalue divided by the eigenvalue of that number, the fifth in Foret et al."""
        _checks.number("number", number, low=1, high=len(self.values), integer=True)
        return self.values[0] / self.values[number - 1]


class SpectralDensity(NamedTuple):
    """A spectrum from stochastic Lanczos quadrature: point masses, several for every probe.

    Attributes:
      nodes: The positions of the masses. shape=(num_probes, num_matvecs)
      weights: The masses. All masses together sum to one. shape=(num_probes, num_matvecs)
    """

    nodes: jax.Array
    weights: jax.Array

    def moment(self, power: int) -> jax.Array:
        r"""The mean of :math:`\lambda^j` over all eigenvalues: the trace of the j-th power divided by P."""
        return jnp.sum(self.weights * self.nodes**power)

    def smooth(
        self, grid: ArrayLike | None = None, bandwidth: float | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The density as a curve, in which every mass is a Gaussian.

        Args:
          grid: The points of evaluation. None takes 1024 points over the spectrum and three bandwidths
            beyond it.
          bandwidth: The standard deviation of the Gaussians, > 0. None takes a hundredth of the width of
            the spectrum.

        Returns:
          The grid and the density on it.
        """
        low, high = jnp.min(self.nodes), jnp.max(self.nodes)
        if bandwidth is None:
            # A spectrum of one point has no width except for rounding errors. Its size is used instead.
            scale = jnp.maximum(jnp.abs(low), jnp.abs(high))
            is_wide = high - low > 1e-4 * scale
            width = jnp.where(is_wide, high - low, jnp.where(scale > 0.0, scale, 1.0))
            sigma = 0.01 * width
        else:
            _checks.number("bandwidth", bandwidth, low=0.0, above=True)
            sigma = jnp.asarray(bandwidth)
        x = jnp.linspace(low - 3 * sigma, high + 3 * sigma, 1024) if grid is None else jnp.asarray(grid)
        gaussians = jax.scipy.stats.norm.pdf(x[:, None], jnp.ravel(self.nodes), sigma)
        return x, gaussians @ jnp.ravel(self.weights)


def _product(loss_fn: LossFn, params: optax.Params, vector: Any, batch: Any) -> Any:
    """The Hessian on one batch, or the Gauss-Newton matrix of a `GaussNewton`, times a vector."""
    if not isinstance(loss_fn, GaussNewton):
        gradient = jax.grad(lambda p: _data.scalar_loss(loss_fn, p, batch))
        return jax.jvp(gradient, (params,), (vector,))[1]

    def model(params: optax.Params) -> Any:
        return loss_fn.model_fn(params, batch)

    def loss(outputs: Any) -> jax.Array:
        return _data.scalar_loss(loss_fn.output_loss, outputs, batch)

    outputs, pull_back = jax.vjp(model, params)
    _, moved = jax.jvp(model, (params,), (vector,))
    return pull_back(jax.jvp(jax.grad(loss), (outputs,), (moved,))[1])[0]


_jitted_product = jax.jit(_product, static_argnums=0)


def hessian_vector_product(
    loss_fn: LossFn, params: optax.Params, batches: Any, vector: Any, *, progress: bool | None = None
) -> Any:
    r"""The Hessian of the loss times a vector.

    .. math:: H v = \frac{\mathrm d}{\mathrm dt} \nabla L(w + t v) \Big|_{t = 0}

    Args:
      loss_fn: The loss, `(params, batch) -> scalar`: the mean over the examples of the batch. A
        `GaussNewton` gives the product with the Gauss-Newton matrix.
      params: The params, any pytree of floating-point arrays. Measured in float32 or better.
      batches: One batch (an array, or a tuple, dict or other pytree of arrays whose first axis counts
        examples) or an iterable of batches, weighted by their sizes.
      vector: A pytree of the structure and shapes of params.
      progress: Whether to show a progress bar. None shows one on a terminal if the measure takes long.

    Returns:
      The product, a pytree like params. It takes one pass over the batches, in the memory of one batch.

    Raises:
      TypeError, ValueError: If an argument has the wrong type, the loss is not a scalar, the product is
        not finite, or there is no batch.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> def loss_fn(w, x):
      ...     return jnp.mean(x * (10 * w[0] ** 2 + w[1] ** 2)) / 2
      >>> vector = jnp.array([1.0, 2.0])
      >>> optax_sam.sharpness.hessian_vector_product(loss_fn, jnp.zeros(2), jnp.ones(5), vector)
      Array([10.,  2.], dtype=float32)

    References:
      Pearlmutter, Fast Exact Multiplication by the Hessian, Neural Computation 1994.
    """
    params, batches = _data.prepare(loss_fn, params, batches, once=True)
    _checks.same_shapes("`vector`", vector, params)
    vector = _tree.cast_like(jax.tree.map(jnp.asarray, vector), params)
    product = _data.mean(
        functools.partial(_jitted_product, loss_fn, params, vector), batches, progress=progress
    )
    _data.finite("The second derivatives of the loss", product)
    return product


def gauss_newton_vector_product(
    model_fn: Callable[[Any, Any], Any],
    output_loss: Callable[[Any, Any], Any],
    params: optax.Params,
    batches: Any,
    vector: Any,
    *,
    progress: bool | None = None,
) -> Any:
    r"""The Gauss-Newton matrix of the loss times a vector.

    .. math:: G v = J^\top H_\mathrm{out} J v

    Here J is the Jacobian of the outputs, and :math:`H_\mathrm{out}` is the Hessian of the loss with respect
    to the outputs. `hessian_vector_product` computes the same product for a `GaussNewton`.

    Args:
      model_fn: `(params, batch) -> outputs`, such as logits.
      output_loss: `(outputs, batch) -> scalar`, the mean loss of the batch.
      params: See `hessian_vector_product`, also for batches and vector.
      batches: The batches.
      vector: A pytree of the structure and shapes of params.
      progress: Whether to show a progress bar. None shows one on a terminal if the measure takes long.

    Returns:
      The product, a pytree like params. It takes one pass over the batches, in the memory of one batch.

    Raises:
      TypeError, ValueError: As for `hessian_vector_product`.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> x = jnp.array([[1.0, 2.0]])
      >>> optax_sam.sharpness.gauss_newton_vector_product(
      ...     lambda w, x: x @ w, lambda y, x: jnp.mean(y**2) / 2, jnp.zeros(2), x, jnp.array([1.0, 0.0]))
      Array([1., 2.], dtype=float32)

    References:
      Schraudolph, Fast Curvature Matrix-Vector Products, Neural Computation 2002.
    """
    for name, function in (("model_fn", model_fn), ("output_loss", output_loss)):
        _data.prepare(function, params, (), name=name)
    return hessian_vector_product(
        GaussNewton(model_fn, output_loss), params, batches, vector, progress=progress
    )


# The functions that advance the progress bars. A running program calls the last one once per product.
_ticks: list[Callable[[], None]] = []


def _tick() -> None:
    if _ticks:
        _ticks[-1]()


def _matvec(loss_fn: LossFn, params: optax.Params, groups: Any, ticks: bool) -> Callable[[Any], Any]:
    def matvec(vector: Any) -> Any:
        if ticks:
            jax.debug.callback(_tick)
        return _data.scan_mean(functools.partial(_product, loss_fn, params, vector), groups)

    return matvec


def _flat_matvec(loss_fn: LossFn, params: optax.Params, groups: Any, ticks: bool) -> Callable[[Any], Any]:
    _, unravel = jax.flatten_util.ravel_pytree(params)
    matvec = _matvec(loss_fn, params, groups, ticks)
    return lambda v: jax.flatten_util.ravel_pytree(matvec(unravel(v)))[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _lanczos(
    loss_fn: LossFn, num_matvecs: int, ticks: bool, params: optax.Params, groups: Any, start: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The basis of the Krylov space of a vector, one basis vector per row, and the matrix in that basis.

    The third output says for each row how far it is from a unit vector that is orthogonal to those before.
    """
    # Lanczos with full reorthogonalization is Arnoldi. matfree's `tridiag_sym` also runs Arnoldi, but it
    # averages the matrix with its transpose. That average hides where the Krylov space closes early.
    # `custom_vjp=False`: the result is not differentiated.
    arnoldi = _data.extra("matfree.decomp").hessenberg(num_matvecs, reortho="full", custom_vjp=False)
    basis, matrix, *_ = arnoldi(_flat_matvec(loss_fn, params, groups, ticks), start)
    products = jnp.matmul(basis, basis.T, precision=jax.lax.Precision.HIGHEST)
    overlaps = jnp.max(jnp.abs(jnp.tril(products - jnp.eye(num_matvecs, dtype=basis.dtype))), axis=1)
    return basis, matrix, overlaps


@functools.partial(jax.jit, static_argnums=(0, 1))
def _dense(loss_fn: LossFn, ticks: bool, params: optax.Params, groups: Any) -> jax.Array:
    """The whole matrix. It is used where the number of products is at least the number of params."""
    flat, _ = jax.flatten_util.ravel_pytree(params)
    matrix = jax.lax.map(_flat_matvec(loss_fn, params, groups, ticks), jnp.eye(flat.size, dtype=flat.dtype))
    return (matrix + matrix.T) / 2


def _closed(matrix: np.ndarray[Any, Any], overlaps: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The leading block of the matrix up to where the Krylov space closes, made symmetric.

    The space closes early if the start vector lies in the span of a few eigenvectors, as with a Hessian of
    low rank. A residual (an entry below the diagonal) is then zero up to rounding, and the next basis vector
    is a rounding error or NaN. A small residual alone does not say so: where one eigenvalue is far above all
    others, all residuals are small. The space is cut only where the basis is no longer orthonormal. If it
    stays so beyond a small residual, later entries are right: they find more copies of an eigenvalue.
    """
    bad_rows = np.flatnonzero(~(overlaps < 1e-3))  # NaN is bad.
    size = len(matrix)
    # In float64 the products of a dense matrix leave residuals up to 1e-9 where the exact residual is zero.
    tolerance = 1e-8 if matrix.dtype == np.float64 else 100 * np.finfo(np.float32).eps
    matrix = matrix.astype(np.float64)
    if len(bad_rows):
        size = bad_rows[0]
        residuals = np.abs(np.diagonal(matrix, -1)[:size])  # The last one made the first bad row.
        before = residuals[: size - 1]
        scale = np.max(before[np.isfinite(before)], initial=np.abs(matrix[0, 0]))
        small = np.flatnonzero(~(residuals > tolerance * scale))
        size = small[0] + 1 if len(small) else size
    return (matrix[:size, :size] + matrix[:size, :size].T) / 2


def _prepare(loss_fn: LossFn, params: optax.Params, batches: Any) -> tuple[Any, Any, int]:
    """The params, the stacked batches and the number of params."""
    params, batches = _data.prepare(loss_fn, params, batches)
    return params, _data.stack(batches), sum(x.size for x in jax.tree.leaves(params))


def top_eigenpairs(
    loss_fn: LossFn,
    params: optax.Params,
    batches: Any,
    k: int = 5,
    *,
    num_matvecs: int | None = None,
    key: Any = 0,
    progress: bool | None = None,
) -> Eigenpairs:
    r"""The largest eigenvalues of the Hessian and their eigenvectors, by the Lanczos method.

    .. math:: H v_i = \lambda_i v_i, \quad \lambda_1 \ge \dots \ge \lambda_k

    A rescaling of layers changes the eigenvalues although the network computes the same function.
    Compare only solutions of one architecture, best at equal training loss.

    Args:
      loss_fn: See `hessian_vector_product`, also for params and batches. A `GaussNewton` gives the
        eigenvalues of the Gauss-Newton matrix.
      params: The params.
      batches: The batches. All of them are kept in memory; a product processes one at a time.
      k: The number of eigenpairs, from 1 to the number of params.
      num_matvecs: The number of products, >= k. The method needs the memory of that many copies of params.
        None takes 4 k + 20. If it is at least the number of params, the whole matrix is computed instead,
        by one product per param. Raise it if `residuals` are large.
      key: The random key of the start vector, or an integer seed.
      progress: Whether to show a progress bar. None shows one on a terminal if the measure takes long.

    Returns:
      The eigenpairs. The method may find a multiple eigenvalue only once, unless it computes the whole
      matrix.

    Raises:
      ImportError: If the extra `sharpness` is not installed.
      TypeError, ValueError: If an argument has the wrong type or is out of range, the loss is not a
        scalar, the products are not finite, there is no batch, or the method finds fewer than k different
        eigenvalues.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> def loss_fn(w, x):
      ...     return jnp.mean(x * (10 * w[0] ** 2 + w[1] ** 2)) / 2
      >>> top = optax_sam.sharpness.top_eigenpairs(loss_fn, jnp.zeros(2), jnp.ones(5), k=2)
      >>> print([f"{x:.3f}" for x in top.values], f"{top.ratio(2):.3f}")
      ['10.000', '1.000'] 10.000

    References:
      Lanczos, 1950, as in `matfree <https://pypi.org/project/matfree>`_, with full
      reorthogonalization. The ratio is that of Foret et al., ICLR 2021, section 4.2.
    """
    params, groups, dimension = _prepare(loss_fn, params, batches)
    _checks.number("k", k, low=1, high=dimension, integer=True)
    _checks.number("num_matvecs", 4 * k + 20 if num_matvecs is None else num_matvecs, low=k, integer=True)
    count = min(4 * k + 20 if num_matvecs is None else num_matvecs, dimension)
    start, unravel = jax.flatten_util.ravel_pytree(
        optax.tree.random_like(_checks.key("key", key), params, jax.random.normal)
    )
    _data.extra("matfree")
    ticks = _data.shows_progress(progress)
    with _data.progress_bar(progress, count + k, "eigenvalues") as tick:
        _ticks.append(tick)
        try:
            if count == dimension:
                basis, matrix = None, np.asarray(_dense(loss_fn, ticks, params, groups))
            else:
                basis, projected, overlaps = _lanczos(loss_fn, count, ticks, params, groups, start)
                matrix = _closed(np.asarray(projected), np.asarray(overlaps))
            _data.finite("The second derivatives of the loss", matrix)
            if k > len(matrix):
                msg = (
                    f"`k` must be at most {len(matrix)} here, got {k}: the matrix has so few different "
                    "eigenvalues that the Lanczos method ends after as many steps."
                )
                raise ValueError(msg)
            values, coefficients = np.linalg.eigh(matrix)
            # The columns in reverse order: the largest eigenvalue first.
            top = jnp.asarray(coefficients[:, ::-1][:, :k].T, start.dtype)
            flat = top if basis is None else top @ basis[: len(matrix)]
            vectors = jax.vmap(unravel)(flat)
            largest = jnp.asarray(values[::-1][:k], start.dtype)
            residuals = _residuals(loss_fn, ticks, params, groups, largest, vectors)
            jax.effects_barrier()
        finally:
            _ticks.pop()
    return Eigenpairs(largest, vectors, residuals, jnp.asarray(values[0], start.dtype))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _residuals(
    loss_fn: LossFn, ticks: bool, params: optax.Params, groups: Any, values: jax.Array, vectors: Any
) -> jax.Array:
    matvec = _matvec(loss_fn, params, groups, ticks)

    def residual(pair: Any) -> jax.Array:
        value, vector = pair
        return _tree.norm(jax.tree.map(lambda hv, v: hv - value * v, matvec(vector), vector))

    return jax.lax.map(residual, (values, vectors))


@functools.partial(jax.jit, static_argnums=0)
def _probe(loss_fn: LossFn, params: optax.Params, groups: Any, key: jax.Array) -> Any:
    """One sample of the trace and of the diagonal."""
    stochtrace = _data.extra("matfree.stochtrace")
    estimate = stochtrace.estimator_monte_carlo(
        stochtrace.monte_carlo_trace_and_diagonal(), stochtrace.sampler_signs(params, num=1)
    )
    return estimate(_matvec(loss_fn, params, groups, ticks=False), key)


@jax.jit
def _accumulate(number: jax.Array, mean: Any, squares: Any, sample: Any) -> tuple[Any, Any]:
    """One step of Welford's running mean and sum of squared deviations."""
    new = jax.tree.map(lambda m, x: m + (x - m) / number.astype(m.dtype), mean, sample)
    squares = jax.tree.map(lambda s, m, n, x: s + (x - m) * (x - n), squares, mean, new, sample)
    return new, squares


def _hutchinson(
    name: str,
    loss_fn: LossFn,
    params: optax.Params,
    batches: Any,
    num_samples: int,
    key: Any,
    progress: bool | None,
) -> Estimate:
    params, groups, _ = _prepare(loss_fn, params, batches)
    _checks.number("num_samples", num_samples, low=2, integer=True)
    keys = jax.random.split(_checks.key("key", key), num_samples)
    _data.extra("matfree")
    mean = squares = None
    with _data.progress_bar(progress, num_samples, name) as tick:
        for number, each in enumerate(keys, start=1):
            sample = _probe(loss_fn, params, groups, each)[name]
            if mean is None:
                mean, squares = sample, optax.tree.zeros_like(sample)
            else:
                mean, squares = _accumulate(jnp.asarray(number), mean, squares, sample)
            tick()
    _data.finite("The second derivatives of the loss", mean)
    # The variance of the mean is the variance of one sample divided by the number of samples.
    divisor = num_samples * (num_samples - 1)
    return Estimate(mean, jax.tree.map(lambda s: jnp.sqrt(s / divisor), squares))


def hessian_trace(
    loss_fn: LossFn,
    params: optax.Params,
    batches: Any,
    *,
    num_samples: int = 100,
    key: Any = 0,
    progress: bool | None = None,
) -> Estimate:
    r"""The trace of the Hessian, by Hutchinson's estimator.

    .. math:: \mathrm{tr}\,H = \mathbb{E}\, z^\top H z, \quad z_i = \pm 1

    A rescaling of layers changes the trace although the network computes the same function.

    Args:
      loss_fn: See `hessian_vector_product`, also for params and batches. A `GaussNewton` gives the trace
        of the Gauss-Newton matrix.
      params: The params.
      batches: The batches. All of them are kept in memory; a product processes one at a time.
      num_samples: The number of random vectors, >= 2. Each costs one product.
      key: The random key, or an integer seed.
      progress: Whether to show a progress bar. None shows one on a terminal if the measure takes long.

    Returns:
      The estimate and its standard error.

    Raises:
      ImportError: If the extra `sharpness` is not installed.
      TypeError, ValueError: If an argument has the wrong type or is out of range, the loss is not a
        scalar, the products are not finite, or there is no batch.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> def loss_fn(w, x):
      ...     return jnp.mean(x * (10 * w[0] ** 2 + w[1] ** 2)) / 2
      >>> trace = optax_sam.sharpness.hessian_trace(loss_fn, jnp.zeros(2), jnp.ones(5), num_samples=3)
      >>> print(trace.mean, trace.standard_error)  # Exact: this Hessian is diagonal.
      11.0 0.0

    References:
      Hutchinson, 1990, as in `matfree <https://pypi.org/project/matfree>`_.
    """
    return _hutchinson("trace", loss_fn, params, batches, num_samples, key, progress)


def hessian_diagonal(
    loss_fn: LossFn,
    params: optax.Params,
    batches: Any,
    *,
    num_samples: int = 100,
    key: Any = 0,
    progress: bool | None = None,
) -> Estimate:
    r"""The diagonal of the Hessian, by Hutchinson's estimator.

    .. math:: \mathrm{diag}\,H = \mathbb{E}\, z \odot H z, \quad z_i = \pm 1

    Args:
      loss_fn: See `hessian_trace`, also for all other arguments.
      params: The params.
      batches: The batches.
      num_samples: The number of random vectors, >= 2. Each costs one product.
      key: The random key, or an integer seed.
      progress: Whether to show a progress bar. None shows one on a terminal if the measure takes long.

    Returns:
      The estimate and its standard error, each a pytree like params. The method needs the memory of a few
      copies of params, for any number of samples.

    Raises:
      ImportError, TypeError, ValueError: As for `hessian_trace`.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> def loss_fn(w, x):
      ...     return jnp.mean(x * (10 * w[0] ** 2 + w[1] ** 2)) / 2
      >>> optax_sam.sharpness.hessian_diagonal(loss_fn, jnp.zeros(2), jnp.ones(5), num_samples=3).mean
      Array([10.,  1.], dtype=float32)

    References:
      Bekas, Kokiopoulou and Saad, An estimator for the diagonal of a matrix, 2007, as in
      `matfree <https://pypi.org/project/matfree>`_.
    """
    return _hutchinson("diagonal", loss_fn, params, batches, num_samples, key, progress)


def spectral_density(
    loss_fn: LossFn,
    params: optax.Params,
    batches: Any,
    *,
    num_probes: int = 4,
    num_matvecs: int = 80,
    key: Any = 0,
    progress: bool | None = None,
) -> SpectralDensity:
    r"""The density of all eigenvalues of the Hessian, by stochastic Lanczos quadrature.

    .. math:: \frac1P \sum_i \delta(\lambda - \lambda_i) \approx
      \frac1n \sum_{z} \sum_j (e_1^\top u_j)^2\, \delta(\lambda - \theta_j), \quad T_z u_j = \theta_j u_j

    Here :math:`T_z` is the tridiagonal matrix of the Lanczos method that starts at a random z.

    Args:
      loss_fn: See `hessian_vector_product`, also for params and batches. A `GaussNewton` gives the density
        of the Gauss-Newton matrix.
      params: The params.
      batches: The batches. All of them are kept in memory; a product processes one at a time.
      num_probes: The number of random vectors, >= 1.
      num_matvecs: The number of products for each vector, >= 1. It is cut to the number of params. The
        method needs the memory of that many copies of params.
      key: The random key, or an integer seed.
      progress: Whether to show a progress bar. None shows one on a terminal if the measure takes long.

    Returns:
      The masses. Their method `smooth` turns them into a curve, and `moment` gives the means of powers.

    Raises:
      ImportError, TypeError, ValueError: As for `hessian_trace`.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> def loss_fn(w, x):
      ...     return jnp.mean(x * (10 * w[0] ** 2 + w[1] ** 2)) / 2
      >>> density = optax_sam.sharpness.spectral_density(loss_fn, jnp.zeros(2), jnp.ones(5))
      >>> print(f"{density.weights.sum():.3f} {density.moment(1):.3f}")  # The trace is 11, of 2 params.
      1.000 5.500

    References:
      Ghorbani, Krishnan and Xiao, `An Investigation into Neural Net Optimization via Hessian Eigenvalue
      Density <https://arxiv.org/abs/1901.10159>`_, ICML 2019.
    """
    params, groups, dimension = _prepare(loss_fn, params, batches)
    _checks.number("num_probes", num_probes, low=1, integer=True)
    _checks.number("num_matvecs", num_matvecs, low=1, integer=True)
    count = min(num_matvecs, dimension)
    flat, _ = jax.flatten_util.ravel_pytree(params)
    _data.extra("matfree")
    nodes, weights = np.zeros((num_probes, count)), np.zeros((num_probes, count))
    keys = jax.random.split(_checks.key("key", key), num_probes)
    ticks = _data.shows_progress(progress)
    with _data.progress_bar(progress, num_probes * count, "spectral density") as tick:
        _ticks.append(tick)
        try:
            for i, each in enumerate(keys):
                probe = jax.random.rademacher(each, flat.shape, flat.dtype)
                _, projected, overlaps = _lanczos(loss_fn, count, ticks, params, groups, probe)
                matrix = _closed(np.asarray(projected), np.asarray(overlaps))
                _data.finite("The second derivatives of the loss", matrix)
                values, vectors = np.linalg.eigh(matrix)
                # Nodes beyond a closed Krylov space get mass zero, at the position of the last node.
                nodes[i] = values[-1]
                nodes[i, : len(values)], weights[i, : len(values)] = values, vectors[0] ** 2
            jax.effects_barrier()
        finally:
            _ticks.pop()
    return SpectralDensity(jnp.asarray(nodes, flat.dtype), jnp.asarray(weights / num_probes, flat.dtype))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _layer_samples(
    loss_fn: LossFn, position: int, num_samples: int, params: optax.Params, key: jax.Array, batch: Any
) -> jax.Array:
    leaves, structure = jax.tree.flatten(params)
    kernel = leaves[position]
    matrix = kernel.reshape(-1, kernel.shape[-1])

    def gradient(kernel: jax.Array) -> jax.Array:
        def loss(kernel: jax.Array) -> jax.Array:
            there = [*leaves[:position], kernel, *leaves[position + 1 :]]
            return _data.scalar_loss(loss_fn, jax.tree.unflatten(structure, there), batch)

        return jax.grad(loss)(kernel)

    def sample(key: jax.Array) -> jax.Array:
        signs = jax.random.rademacher(key, (2, len(matrix)), matrix.dtype)
        u = jnp.outer(signs[0], signs[1] @ matrix).reshape(kernel.shape)
        return jnp.sum(u * jax.jvp(gradient, (kernel,), (u,))[1])

    return jax.lax.map(sample, jax.random.split(key, num_samples))


def relative_flatness(
    loss_fn: LossFn,
    params: optax.Params,
    batches: Any,
    layer: str,
    *,
    num_samples: int = 100,
    key: Any = 0,
    progress: bool | None = None,
) -> Estimate:
    r"""The relative flatness of a layer: its second derivatives, weighted by products of its weights.

    .. math:: \kappa = \sum_{s, s'} \langle w_s, w_{s'} \rangle\, \mathrm{tr}\,H_{s s'}
      = \mathbb{E}\, u^\top H u, \quad u = \zeta\, (\xi^\top W), \quad \zeta_i, \xi_i = \pm 1

    Here :math:`w_s` are the weights of the output s of the layer, which is the column s of W in Flax's
    layout, and :math:`H_{s s'}` is the block of second derivatives with respect to :math:`w_s` and
    :math:`w_{s'}`. A small value means a flat loss. The measure does not change when one layer is scaled up
    and the next one down.

    Args:
      loss_fn: See `hessian_vector_product`, also for params and batches. The measure uses the
        Hessian of the whole loss also for a `GaussNewton`.
      params: The params.
      batches: The batches.
      layer: The path of the kernel in params, such as "Dense_1/kernel". The last axis of the kernel must
        count the outputs. The usual choice is the last layer but one.
      num_samples: The number of random pairs of vectors, >= 2. Each costs one product.
      key: The random key, or an integer seed.
      progress: Whether to show a progress bar. None shows one on a terminal if the measure takes long.

    Returns:
      The estimate and its standard error. It takes one pass over the batches, in the memory of one batch.

    Raises:
      TypeError, ValueError: If an argument has the wrong type or is out of range, there is no such
        layer, the loss is not a scalar, the products are not finite, or there is no batch.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> def loss_fn(params, x):
      ...     return jnp.mean((x @ params["kernel"]) ** 2) / 2
      >>> params, x = {"kernel": jnp.array([[3.0]])}, jnp.full((5, 1), 2.0)
      >>> flatness = optax_sam.sharpness.relative_flatness(loss_fn, params, x, "kernel", num_samples=2)
      >>> print(flatness.mean)  # w^2 = 9 times the second derivative, 4
      36.0

    References:
      Petzka et al., `Relative Flatness and Generalization <https://arxiv.org/abs/2001.00939>`_, NeurIPS
      2021.
    """
    params, batches = _data.prepare(loss_fn, params, batches, once=True)
    _checks.number("num_samples", num_samples, low=2, integer=True)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    kernels = {
        jax.tree_util.keystr(path, simple=True, separator="/"): i
        for i, (path, leaf) in enumerate(leaves)
        if leaf.ndim >= 2
    }
    if not kernels:
        msg = "`params` must hold a leaf of two axes or more, the kernel of a layer, got none."
        raise ValueError(msg)
    _checks.choice("layer", layer, tuple(kernels))
    sample = functools.partial(_layer_samples, loss_fn, kernels[layer], num_samples, params)
    samples = _data.mean(functools.partial(sample, _checks.key("key", key)), batches, progress=progress)
    _data.finite("The second derivatives of the loss", samples)
    return Estimate.of(samples)
