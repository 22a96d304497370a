"""Measures of gradients: their norms, SAM's edge of stability, the Fisher-Rao norm."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam import _checks, _tree
from optax_sam._loss import SAMGradients
from optax_sam._variant import as_pair
from optax_sam.sharpness import _data
from optax_sam.sharpness._data import LossFn
from optax_sam.variants.same import RatioClasses, ratio_classes

LogitsFn = Callable[[Any, Any], Any]
"""`(params, batch) -> logits` of shape (examples, ..., classes)."""


def _per_class(function: Callable[..., Any], grads: SAMGradients) -> RatioClasses:
    """Calls `function(masks, clean, perturbed)`, with lists of leaves, once for every class."""
    clean, perturbed = _tree.upcast((grads.clean, grads.perturbed))
    leaves = jax.tree.leaves(clean), jax.tree.leaves(perturbed)
    by_leaf = [ratio_classes(c, p) for c, p in zip(*leaves, strict=True)]
    return RatioClasses(*(function(masks, *leaves) for masks in zip(*by_leaf, strict=True)))


def gradient_ratio_fractions(grads: SAMGradients) -> RatioClasses:
    r"""The share of coordinates in each class of the SAME note: those that SAM amplifies, shrinks and flips.

    .. math:: f_k = \frac1P \left|\{i : g_{\epsilon,i} / g_i \in \text{class } k\}\right|

    Args:
      grads: The gradients of one step, from `sam_value_and_grad`.

    Returns:
      Scalars in [0, 1] that sum to one: `ckpt1` (ratio > 1), `ckpt2` (0 to 1), `ckpt3` (< -1), `ckpt4`
      (-1 to 0) and `neutral` (one of the two entries is zero, or both have the same size). They do not
      depend on the scale of the loss.

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
    r"""The norms of the clean and of the perturbed gradient in each class of the SAME note.

    .. math:: \|M_k \odot g\|_2, \quad \|M_k \odot g_\epsilon\|_2, \quad
      \frac{\langle g, g_\epsilon\rangle}{\|g\|_2 \|g_\epsilon\|_2}

    Args:
      grads: The gradients of one step, from `sam_value_and_grad`.

    Returns:
      The norms of the clean gradient per class, the norms of the perturbed gradient per class, and the
      cosine of the angle between the two gradients. All are scalars in float32 or better.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> grads = optax_sam.SAMGradients(jnp.array([3.0, 4.0, 1.0]), jnp.array([6.0, 8.0, 1.0]))
      >>> clean, perturbed, cosine = optax_sam.sharpness.gradient_ratio_norms(grads)
      >>> print(clean.ckpt1, perturbed.ckpt1, perturbed.neutral, f"{cosine:.3f}")
      5.0 10.0 1.0 0.995

    References:
      Luong, code of the repository lhchau/sam-hessian, 2024. The cosine is an addition.
    """

    def norm_of(masks: Any, leaves: Any) -> jax.Array:
        return _tree.norm([jnp.where(m, x, jnp.zeros_like(x)) for m, x in zip(masks, leaves, strict=True)])

    grads = as_pair(grads)
    clean = _per_class(lambda masks, c, _: norm_of(masks, c), grads)
    perturbed = _per_class(lambda masks, _, p: norm_of(masks, p), grads)
    return clean, perturbed, _tree.cosine(grads.clean, grads.perturbed)


@functools.partial(jax.jit, static_argnums=0)
def _value_and_grad(loss_fn: LossFn, params: optax.Params, batch: Any) -> tuple[jax.Array, Any]:
    return jax.value_and_grad(lambda p: _data.scalar_loss(loss_fn, p, batch))(params)


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
      progress: Whether to show a progress bar. None shows one on a terminal if the measure takes long.

    Returns:
      The norm. shape=(), float32 or better. It takes one pass over the batches.

    Raises:
      TypeError, ValueError: If an argument has the wrong type, the loss is not a scalar, the loss or its
        gradient is not finite, or there is no batch.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> def loss_fn(w, x):
      ...     return jnp.mean(x @ w)
      >>> batches = [jnp.array([[3.0, 0.0]]), jnp.array([[3.0, 6.0], [3.0, 6.0]])]
      >>> print(optax_sam.sharpness.gradient_norm(loss_fn, jnp.zeros(2), batches))
      5.0
    """
    params, batches = _data.prepare(loss_fn, params, batches, once=True)
    evaluate = functools.partial(_value_and_grad, loss_fn, params)
    value, gradient = _data.mean(evaluate, batches, progress=progress)
    _data.finite("The loss and its gradient", (value, gradient))
    return _tree.norm(gradient)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _example_norms(loss_fn: LossFn, chunk_size: int, params: optax.Params, batch: Any) -> jax.Array:
    def norm_of(index: jax.Array) -> jax.Array:
        example = jax.tree.map(lambda x: x[index][None] if jnp.ndim(x) else x, batch)
        return _tree.norm(_value_and_grad(loss_fn, params, example)[1])

    return jax.lax.map(norm_of, jnp.arange(_data.batch_size(batch)), batch_size=chunk_size)


def per_example_gradient_norms(
    loss_fn: LossFn,
    params: optax.Params,
    batches: Any,
    *,
    chunk_size: int = 32,
    progress: bool | None = None,
) -> jax.Array:
    r"""The norm of the gradient of every single example.

    .. math:: \|\nabla \ell_i(w)\|_2

    The mean square of these norms is the trace of the empirical Fisher information.

    Args:
      loss_fn: See `gradient_norm`, also for params and batches. It is called on batches of one example.
      params: The params.
      batches: The batches.
      chunk_size: The number of gradients that are held at once, >= 1.
      progress: Whether to show a progress bar. None shows one on a terminal if the measure takes long.

    Returns:
      The norms, in the order of the examples. shape=(number of examples,)

    Raises:
      TypeError, ValueError: If an argument has the wrong type or is out of range, the loss is not a
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
    params, batches = _data.prepare(loss_fn, params, batches, once=True)
    parts: list[jax.Array] = []

    def keep(batch: Any) -> tuple[()]:
        parts.append(_example_norms(loss_fn, chunk_size, params, batch))
        return ()

    _data.mean(keep, batches, progress=progress)
    norms = jnp.concatenate(parts)
    _data.finite("The gradients of the loss", norms)
    return norms


def sam_edge(learning_rate: Any, rho: Any, gradient_norm: Any) -> jax.Array:
    r"""SAM's edge of stability: the value near which the top eigenvalue settles under SAM.

    .. math:: \lambda^* = \frac{\|g\|}{2\rho} \left( \sqrt{1 + \frac{8\rho}{\eta \|g\|}} - 1 \right)

    The edge is the root of :math:`\eta \lambda (1 + \rho \lambda / \|g\|) = 2`. Gradient descent with SAM
    settles around it. Log it next to the top eigenvalue.

    Args:
      learning_rate: The learning rate of plain gradient descent, > 0.
      rho: The radius, >= 0. A radius of 0 gives :math:`2 / \eta`.
      gradient_norm: The norm of the clean gradient, >= 0.

    Returns:
      The edge. The arguments may also be arrays, which broadcast.

    Raises:
      TypeError, ValueError: If an argument is a number out of range.

    Examples:
      >>> import optax_sam
      >>> for rho in (0.0, 0.1):
      ...     print(f"{optax_sam.sharpness.sam_edge(0.1, rho, gradient_norm=0.5):.3f}")
      20.000
      7.808

    References:
      Long and Bartlett, `Sharpness-Aware Minimization and the Edge of Stability
      <https://arxiv.org/abs/2309.12488>`_, JMLR 2024. The formula is rewritten so that small radii
      cause no cancellation.
    """
    _check_edge(learning_rate, rho)
    if np.ndim(gradient_norm) == 0:
        _checks.number("gradient_norm", gradient_norm, low=0.0)
    rho, gradient_norm = jnp.asarray(rho), jnp.asarray(gradient_norm)
    # A radius of 0 makes the quotient below 0, also where the gradient is zero.
    safe = jnp.where(rho == 0.0, 1.0, gradient_norm)
    return 4.0 / learning_rate / (jnp.sqrt(1.0 + 8.0 * rho / (learning_rate * safe)) + 1.0)


def usam_edge(learning_rate: Any, rho: Any) -> jax.Array:
    r"""The edge of stability of SAM with the unnormalized ascent step.

    .. math:: \lambda^* = \frac{1}{2\rho} \left( \sqrt{1 + 8\rho / \eta} - 1 \right)

    The edge is the root of :math:`\eta \lambda (1 + \rho \lambda) = 2`.

    Args:
      learning_rate: The learning rate of plain gradient descent, > 0.
      rho: The factor of `optax_sam.ascent.unnormalized`, >= 0. A factor of 0 gives :math:`2 / \eta`.

    Returns:
      The edge. The arguments may also be arrays, which broadcast.

    Raises:
      TypeError, ValueError: If an argument is a number out of range.

    Examples:
      >>> import optax_sam
      >>> print(f"{optax_sam.sharpness.usam_edge(0.1, 0.1):.3f}")
      10.000

    References:
      Long and Bartlett, `Sharpness-Aware Minimization and the Edge of Stability
      <https://arxiv.org/abs/2309.12488>`_, JMLR 2024, who treat the normalized step.
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
    logits_fn: LogitsFn, num_samples: int | None, params: optax.Params, key: jax.Array, batch: Any
) -> jax.Array:
    logits, slopes = jax.jvp(lambda p: logits_fn(p, batch), (params,), (params,))
    if jnp.ndim(logits) < 2:
        msg = f"`logits_fn` must return logits of shape (examples, ..., classes), got {jnp.shape(logits)}."
        raise ValueError(msg)
    if logits.shape[-1] < 2:
        msg = (
            f"`logits_fn` must return a logit for each of two classes or more, got {logits.shape}. For a "
            "binary classifier with one logit append a zero logit, `jnp.concatenate([z, 0 * z], -1)`."
        )
        raise ValueError(msg)
    logits, slopes = _tree.upcast((logits, slopes))
    # `slopes` is the derivative of the logits along the params. The derivative of the cross-entropy of a
    # label is then `expected - slopes[label]`. The positions of one example (its axes between the first and
    # the last) add up, and their labels are independent.
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
    logits_fn: LogitsFn,
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

    Here :math:`\ell` is the cross-entropy, and labels are drawn from the model itself. The norm does not
    change with a rescaling of layers.

    Args:
      logits_fn: `(params, batch) -> logits`, of shape (examples, ..., classes).
      params: The params, any pytree of floating-point arrays. Measured in float32 or better.
      batches: One batch (an array, or a tuple, dict or other pytree of arrays whose first axis counts
        examples) or an iterable of batches, weighted by their sizes. The measure uses no labels.
      num_samples: The number of labels drawn per example, >= 1. None takes the exact expectation over the
        labels, which costs no more unless there are very many classes.
      key: The random key of the labels, or an integer seed.
      progress: Whether to show a progress bar. None shows one on a terminal if the measure takes long.

    Returns:
      The norm. shape=(), float32 or better. It takes one forward pass over the batches.

    Raises:
      TypeError, ValueError: If an argument has the wrong type or is out of range, the logits are not
        finite or do not have the shape of logits, or there is no batch.

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
    params, batches = _data.prepare(logits_fn, params, batches, name="logits_fn", once=True)
    random_key = _checks.key("key", key)
    count = 0

    def squares(batch: Any) -> jax.Array:
        nonlocal count
        count += 1
        each = jax.random.fold_in(random_key, count)
        return _score_squares(logits_fn, num_samples, params, each, batch)

    total = _data.mean(squares, batches, progress=progress)
    _data.finite("The logits", total)
    return jnp.sqrt(total)
