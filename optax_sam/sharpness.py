r"""Measures of flatness.

Most of them are called as `measure(loss_fn, params, batches, ...)`, where `loss_fn(params, batch)` is the
mean loss of a batch, and `batches` is one batch or an iterable of batches, over which the measure is
taken as if they were one; others say what they take. Programs are compiled once per `loss_fn`, so give
the same function object to repeated calls. Measure a fixed set of training examples, the model as in
evaluation, no weight decay.

Two warnings. Measures of the plain Hessian or of a plain ball change when a ReLU network's layers are
rescaled, one up and the next one down, though the network stays the same (Dinh et al., `Sharp Minima
Can Generalize <https://arxiv.org/abs/1703.04933>`_); adaptive measures do not. And a small sharpness is
no proof of generalization: Andriushchenko et al. (`arXiv:2302.07011
<https://arxiv.org/abs/2302.07011>`_) find that it follows the learning rate more than the test error.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam import _batches, _checks, _tree
from optax_sam._batches import LossFn
from optax_sam._curvature import Eigenpairs as Eigenpairs
from optax_sam._curvature import GaussNewton as GaussNewton
from optax_sam._curvature import SpectralDensity as SpectralDensity
from optax_sam._curvature import gauss_newton_vector_product as gauss_newton_vector_product
from optax_sam._curvature import hessian_diagonal as hessian_diagonal
from optax_sam._curvature import hessian_trace as hessian_trace
from optax_sam._curvature import hessian_vector_product as hessian_vector_product
from optax_sam._curvature import relative_flatness as relative_flatness
from optax_sam._curvature import spectral_density as spectral_density
from optax_sam._curvature import top_eigenpairs as top_eigenpairs
from optax_sam._neighbourhood import Estimate as Estimate
from optax_sam._neighbourhood import SurrogateGap as SurrogateGap
from optax_sam._neighbourhood import average_sharpness as average_sharpness
from optax_sam._neighbourhood import m_sharpness as m_sharpness
from optax_sam._neighbourhood import one_step_sharpness as one_step_sharpness
from optax_sam._neighbourhood import surrogate_gap as surrogate_gap
from optax_sam._neighbourhood import worst_case_sharpness as worst_case_sharpness
from optax_sam._objective import SAMGradients
from optax_sam._transformation import as_pair
from optax_sam.variants.same import RatioClasses, ratio_classes


def _per_class(function: Callable[..., Any], grads: SAMGradients) -> RatioClasses:
    """Applies a function of the trees of masks, clean and perturbed gradients to every class."""
    clean, perturbed, _ = _tree.upcast(tuple(grads))
    leaves = jax.tree.leaves(clean), jax.tree.leaves(perturbed)
    by_leaf = [ratio_classes(c, p) for c, p in zip(*leaves, strict=True)]
    return RatioClasses(*(function(masks, *leaves) for masks in zip(*by_leaf, strict=True)))


def gradient_ratio_fractions(grads: SAMGradients) -> RatioClasses:
    r"""The shares of the classes of the SAME note: what SAM amplifies, shrinks and flips.

    .. math:: f_k = \frac1P \left|\{i : g_{\epsilon,i} / g_i \in \text{class } k\}\right|

    Args:
      grads: The gradients of one step, from `sam_value_and_grad`.

    Returns:
      Scalars in [0, 1] that sum to one: `ckpt1` (ratio > 1), `ckpt2` (0 to 1), `ckpt3` (< -1), `ckpt4`
      (-1 to 0) and `neutral` (a zero among the two, or both of one size). They do not depend on the
      scale of the loss.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> grads = optax_sam.SAMGradients(jnp.array([1.0, 1.0, 1.0, 0.0]), jnp.array([2.0, 3.0, -0.5, 1.0]))
      >>> fractions = optax_sam.sharpness.gradient_ratio_fractions(grads)
      >>> print({name: float(share) for name, share in fractions._asdict().items()})
      {'ckpt1': 0.5, 'ckpt2': 0.0, 'ckpt3': 0.0, 'ckpt4': 0.25, 'neutral': 0.25}

    References:
      Luong, README of the repository lhchau/sam-hessian, July 2024.
    """

    def share(masks: Any, clean: Any, perturbed: Any) -> jax.Array:
        del clean
        total = sum(x.size for x in perturbed)
        return sum((jnp.sum(m, dtype=jnp.float32) for m in masks), jnp.zeros(())) / max(total, 1)

    return _per_class(share, as_pair(grads))


def gradient_ratio_norms(grads: SAMGradients) -> tuple[RatioClasses, RatioClasses, jax.Array]:
    r"""The norms of the clean and of the perturbed gradient on each class of the SAME note.

    .. math:: \|M_k \odot g\|_2, \quad \|M_k \odot g_\epsilon\|_2, \quad
      \frac{\langle g, g_\epsilon\rangle}{\|g\|_2 \|g_\epsilon\|_2}

    Args:
      grads: The gradients of one step, from `sam_value_and_grad`.

    Returns:
      The norms of the clean gradient per class, those of the perturbed gradient, and the cosine of the
      angle between the two: scalars in float32 or better.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> grads = optax_sam.SAMGradients(jnp.array([3.0, 4.0, 1.0]), jnp.array([6.0, 8.0, 1.0]))
      >>> clean, perturbed, cosine = optax_sam.sharpness.gradient_ratio_norms(grads)
      >>> print(clean.ckpt1, perturbed.ckpt1, perturbed.neutral, f"{cosine:.3f}")
      5.0 10.0 1.0 0.995

    References:
      Luong, code of the repository lhchau/sam-hessian, 2024; the cosine is added.
    """

    def norm_of(masks: Any, leaves: Any) -> jax.Array:
        return _tree.norm([jnp.where(m, x, jnp.zeros_like(x)) for m, x in zip(masks, leaves, strict=True)])

    grads = as_pair(grads)
    clean = _per_class(lambda masks, c, _: norm_of(masks, c), grads)
    perturbed = _per_class(lambda masks, _, p: norm_of(masks, p), grads)
    return clean, perturbed, _tree.cosine(grads.clean, grads.perturbed)


@functools.partial(jax.jit, static_argnums=0)
def _value_and_grad(loss_fn: LossFn, params: optax.Params, batch: Any) -> tuple[jax.Array, Any]:
    return jax.value_and_grad(lambda p: _batches.scalar_loss(loss_fn, p, batch))(params)


# Compiled: `_tree.norm` by itself holds a branch that JAX would compile in every call.
_norm = jax.jit(_tree.norm)


def gradient_norm(
    loss_fn: LossFn, params: optax.Params, batches: Any, *, progress: bool | None = None
) -> jax.Array:
    r"""The norm of the gradient of the loss over all batches.

    .. math:: \|\nabla L(w)\|_2

    Args:
      loss_fn: The loss, `(params, batch) -> scalar`: the mean over the examples of the batch.
      params: The params, any pytree of floating-point arrays. Measured in float32 or better.
      batches: One batch (an array, or a tuple, dict or other pytree of arrays whose first axis counts
        examples) or an iterable of batches, weighted by their sizes.
      progress: Whether to show a progress bar; None for one on a terminal, if it takes long.

    Returns:
      The norm. shape=(), float32 or better. One pass over the batches.

    Raises:
      TypeError, ValueError: If an argument is not of its kind, the loss is not a scalar, not finite, or
        there is no batch.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> def loss_fn(w, x):
      ...     return jnp.mean(x @ w)
      >>> batches = [jnp.array([[3.0, 0.0]]), jnp.array([[3.0, 6.0], [3.0, 6.0]])]
      >>> print(optax_sam.sharpness.gradient_norm(loss_fn, jnp.zeros(2), batches))
      5.0
    """
    params, batches = _batches.prepare(loss_fn, params, batches)
    evaluate = functools.partial(_value_and_grad, loss_fn, params)
    value, gradient = _batches.mean(evaluate, batches, progress=progress)
    _batches.finite("The loss and its gradient", (value, gradient))
    return _norm(gradient)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _example_norms(loss_fn: LossFn, chunk_size: int, params: optax.Params, batch: Any) -> jax.Array:
    def norm_of(index: jax.Array) -> jax.Array:
        example = jax.tree.map(lambda x: x[index][None] if jnp.ndim(x) else x, batch)
        return _tree.norm(_value_and_grad(loss_fn, params, example)[1])

    return jax.lax.map(norm_of, jnp.arange(_batches.batch_size(batch)), batch_size=chunk_size)


def per_example_gradient_norms(
    loss_fn: LossFn,
    params: optax.Params,
    batches: Any,
    *,
    chunk_size: int = 32,
    progress: bool | None = None,
) -> jax.Array:
    r"""The norm of the gradient of every example by itself.

    .. math:: \|\nabla \ell_i(w)\|_2

    Their mean square is the trace of the empirical Fisher information.

    Args:
      loss_fn: As for `gradient_norm`, and so are params and batches; it is called on batches of one.
      params: The params.
      batches: The batches.
      chunk_size: How many gradients to hold at once, >= 1.
      progress: Whether to show a progress bar; None for one on a terminal, if it takes long.

    Returns:
      The norms, in the order of the examples. shape=(number of examples,)

    Raises:
      TypeError, ValueError: If an argument is not of its kind or out of its range, the loss is not a
        scalar, a gradient is not finite, or there is no batch.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> def loss_fn(w, x):
      ...     return jnp.mean(x @ w)
      >>> x = jnp.array([[3.0, 4.0], [0.0, 2.0]])
      >>> optax_sam.sharpness.per_example_gradient_norms(loss_fn, jnp.zeros(2), x)
      Array([5., 2.], dtype=float32)
    """
    _checks.number("chunk_size", chunk_size, low=1, integer=True)
    params, batches = _batches.prepare(loss_fn, params, batches)
    parts: list[jax.Array] = []

    def keep(batch: Any) -> tuple[()]:
        parts.append(_example_norms(loss_fn, chunk_size, params, batch))
        return ()

    _batches.mean(keep, batches, progress=progress)
    norms = jnp.concatenate(parts)
    _batches.finite("The gradients of the loss", norms)
    return norms


def sam_edge(learning_rate: Any, rho: Any, gradient_norm: Any) -> jax.Array:
    r"""SAM's edge of stability: the top eigenvalue around which gradient descent with SAM settles.

    .. math:: \lambda^* = \frac{\|g\|}{2\rho} \left( \sqrt{1 + \frac{8\rho}{\eta \|g\|}} - 1 \right)

    the root of :math:`\eta \lambda (1 + \rho \lambda / \|g\|) = 2`. Log it next to the top eigenvalue.

    Args:
      learning_rate: The learning rate of plain gradient descent, > 0.
      rho: The radius, >= 0; 0 gives :math:`2 / \eta`.
      gradient_norm: The norm of the clean gradient, >= 0.

    Returns:
      The edge. Takes arrays too, and broadcasts.

    Raises:
      TypeError, ValueError: If an argument is a number out of its range.

    Examples:
      >>> import optax_sam
      >>> for rho in (0.0, 0.1):
      ...     print(f"{optax_sam.sharpness.sam_edge(0.1, rho, gradient_norm=0.5):.3f}")
      20.000
      7.808

    References:
      Long and Bartlett, `Sharpness-Aware Minimization and the Edge of Stability
      <https://arxiv.org/abs/2309.12488>`_, JMLR 2024. Rewritten so that small radii cancel nothing.
    """
    _check_edge(learning_rate, rho)
    if np.ndim(gradient_norm) == 0:
        _checks.number("gradient_norm", gradient_norm, low=0.0)
    rho, gradient_norm = jnp.asarray(rho), jnp.asarray(gradient_norm)
    # Without a radius there is nothing to divide, not even by a zero gradient.
    safe = jnp.where(rho == 0.0, 1.0, gradient_norm)
    return 4.0 / learning_rate / (jnp.sqrt(1.0 + 8.0 * rho / (learning_rate * safe)) + 1.0)


def usam_edge(learning_rate: Any, rho: Any) -> jax.Array:
    r"""The edge of stability of SAM with the unnormalized ascent step.

    .. math:: \lambda^* = \frac{1}{2\rho} \left( \sqrt{1 + 8\rho / \eta} - 1 \right)

    the root of :math:`\eta \lambda (1 + \rho \lambda) = 2`.

    Args:
      learning_rate: The learning rate of plain gradient descent, > 0.
      rho: The factor of `optax_sam.ascent.unnormalized`, >= 0; 0 gives :math:`2 / \eta`.

    Returns:
      The edge. Takes arrays too, and broadcasts.

    Raises:
      TypeError, ValueError: If an argument is a number out of its range.

    Examples:
      >>> import optax_sam
      >>> print(f"{optax_sam.sharpness.usam_edge(0.1, 0.1):.3f}")
      10.000

    References:
      Long and Bartlett, `Sharpness-Aware Minimization and the Edge of Stability
      <https://arxiv.org/abs/2309.12488>`_, JMLR 2024, for the normalized step.
    """
    _check_edge(learning_rate, rho)
    return 4.0 / learning_rate / (jnp.sqrt(1.0 + 8.0 * jnp.asarray(rho) / learning_rate) + 1.0)


def _check_edge(learning_rate: Any, rho: Any) -> None:
    if np.ndim(learning_rate) == 0:
        _checks.number("learning_rate", learning_rate, low=0.0, above=True)
    if np.ndim(rho) == 0:
        _checks.number("rho", rho, low=0.0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score_squares(
    logits_fn: LossFn, num_samples: int | None, params: optax.Params, key: jax.Array, batch: Any
) -> jax.Array:
    logits, slopes = jax.jvp(lambda p: logits_fn(p, batch), (params,), (params,))
    if jnp.ndim(logits) < 2:
        msg = f"`logits_fn` must return logits of shape (examples, ..., classes), got {jnp.shape(logits)}."
        raise ValueError(msg)
    logits, slopes = _tree.upcast((logits, slopes))
    # The slope of the loss of a label along the params is `expected - slopes[label]`, positions of one
    # example (its axes between the first and the last) add up, and their labels are independent.
    positions = tuple(range(1, logits.ndim - 1))
    probabilities = jax.nn.softmax(logits)
    expected = jnp.sum(probabilities * slopes, axis=-1, keepdims=True)
    if num_samples is None:
        variance = jnp.sum(probabilities * (slopes - expected) ** 2, axis=-1)
        return jnp.mean(jnp.sum(variance, axis=positions))
    labels = jax.random.categorical(key, logits, shape=(num_samples, *logits.shape[:-1]))
    chosen = jnp.take_along_axis(
        jnp.broadcast_to(slopes, (num_samples, *slopes.shape)), labels[..., None], -1
    )
    scores = jnp.sum(jnp.squeeze(expected - chosen, -1), axis=tuple(p + 1 for p in positions))
    return jnp.mean(scores**2)


def fisher_rao_norm(
    logits_fn: Callable[[Any, Any], Any],
    params: optax.Params,
    batches: Any,
    *,
    num_samples: int | None = None,
    key: Any = 0,
    progress: bool | None = None,
) -> jax.Array:
    r"""The Fisher-Rao norm of the params of a classifier.

    .. math:: \sqrt{w^\top F w}, \quad
      w^\top F w = \mathbb{E}_x \mathbb{E}_{y \sim p_w(\cdot | x)} \langle w, \nabla \ell(x, y) \rangle^2

    for the cross-entropy :math:`\ell` and labels drawn from the model itself. A rescaling of layers leaves
    it alone.

    Args:
      logits_fn: `(params, batch) -> logits`, of shape (examples, ..., classes).
      params: The params, any pytree of floating-point arrays. Measured in float32 or better.
      batches: One batch (an array, or a tuple, dict or other pytree of arrays whose first axis counts
        examples) or an iterable of batches, weighted by their sizes. Labels are not used.
      num_samples: How many labels to draw for an example, >= 1; None for the exact expectation over
        the labels, which costs no more unless there are very many classes.
      key: The random key of the labels, or an integer seed.
      progress: Whether to show a progress bar; None for one on a terminal, if it takes long.

    Returns:
      The norm. shape=(), float32 or better. One pass over the batches, forward only.

    Raises:
      TypeError, ValueError: If an argument is not of its kind or out of its range, the logits are not
        finite or no logits, or there is no batch.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> def logits_fn(w, x):
      ...     return jnp.stack([x * w, jnp.zeros_like(x)], axis=-1)
      >>> norm = optax_sam.sharpness.fisher_rao_norm(logits_fn, jnp.array(2.0), jnp.ones(5))
      >>> print(f"{norm:.4f}")  # w x sqrt(p (1 - p)), with p = 0.8808
      0.6481

    References:
      Liang et al., `Fisher-Rao Metric, Geometry, and Complexity of Neural Networks
      <https://arxiv.org/abs/1711.01530>`_, AISTATS 2019.
    """
    if num_samples is not None:
        _checks.number("num_samples", num_samples, low=1, integer=True)
    params, batches = _batches.prepare(logits_fn, params, batches, name="logits_fn")
    random_key = _checks.key("key", key)
    count = 0

    def squares(batch: Any) -> jax.Array:
        nonlocal count
        count += 1
        each = jax.random.fold_in(random_key, count)
        return _score_squares(logits_fn, num_samples, params, each, batch)

    total = _batches.mean(squares, batches, progress=progress)
    _batches.finite("The logits", total)
    return jnp.sqrt(total)
