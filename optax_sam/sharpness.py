"""Measures of flatness."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_sam import _tree
from optax_sam._objective import SAMGradients
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

    return _per_class(share, grads)


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

    clean = _per_class(lambda masks, c, p: norm_of(masks, c), grads)
    perturbed = _per_class(lambda masks, c, p: norm_of(masks, p), grads)
    return clean, perturbed, _tree.cosine(grads.clean, grads.perturbed)
