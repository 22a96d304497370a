"""Rules that change the gradient first, or start from another point."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_sam import _checks, _tree
from optax_sam.ascent._rule import Ascent, AscentRule, follow, length_of, other_axes, resolve


def centralize(tree: Any, output_axis: int = -1) -> Any:
    """Gradient centralization: leaves of two or more axes lose their mean over all but the output axis.

    Args:
      tree: A pytree of arrays.
      output_axis: The axis that is not averaged over: -1 in Flax and Haiku, 0 in layouts taken over
        from PyTorch.

    Returns:
      The centralized tree; vectors and scalars as they came.

    Raises:
      TypeError, ValueError: If `output_axis` is no integer, or no axis of a leaf.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> optax_sam.ascent.centralize(jnp.array([[1.0, 2.0], [3.0, 6.0]]))
      Array([[-1., -2.],
             [ 1.,  2.]], dtype=float32)

    References:
      Yong et al., `Gradient Centralization <https://arxiv.org/abs/2004.01461>`_, ECCV 2020.
    """
    _checks.number("output_axis", output_axis, integer=True)

    def subtract_mean(x: jax.Array) -> jax.Array:
        return x - jnp.mean(x, axis=other_axes(x, output_axis), keepdims=True) if x.ndim > 1 else x

    return jax.tree.map(subtract_mean, tree)


def centralized(
    rule: Ascent | None = None, *, output_axis: int = -1, legacy_norm: bool = False
) -> AscentRule:
    r"""Applies another rule to the centralized gradient.

    .. math:: \epsilon = \mathrm{rule}(\mathrm{GC}(g), \rho, w)

    Args:
      rule: The rule; None for `normalized()`.
      output_axis: The axis of a leaf that is not averaged over; see `centralize`.
      legacy_norm: Centralize after the rule instead of before, as a widespread PyTorch port does: the
        perturbation is then shorter than rho.

    Returns:
      The rule.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> gradient = jnp.array([[1.0, 2.0], [3.0, 6.0]])
      >>> perturbation = optax_sam.ascent.centralized()(gradient, 0.1, None)
      >>> print([f"{x:.3f}" for x in perturbation.ravel()])
      ['-0.032', '-0.063', '0.032', '0.063']

    References:
      Hassan et al., `GCSAM <https://arxiv.org/abs/2501.11584>`_, IEEE Access 2025.
    """
    _checks.number("output_axis", output_axis, integer=True)
    inner = resolve(rule, "rule")

    def perturb(gradient: optax.Updates, rho: Any, params: optax.Params) -> optax.Updates:
        if legacy_norm:
            return centralize(inner(gradient, rho, params), output_axis)
        return inner(centralize(_tree.upcast(gradient), output_axis), rho, params)

    def remake(rule: Ascent) -> Ascent:
        return centralized(rule, output_axis=output_axis, legacy_norm=legacy_norm)

    return AscentRule(perturb, length_of(inner), follow(inner, remake))


def extrapolated(step_size: float, rule: Ascent | None = None) -> AscentRule:
    r"""Ascends from the point that a descent step would reach (EG-SAM, SAGM).

    .. math:: \epsilon = \mathrm{rule}(g, \rho, w) - \gamma\, g

    Args:
      step_size: The length :math:`\gamma` of the descent step, in gradients; >= 0; 0 recovers `rule`.
        EG-SAM takes the learning rate; SAGM a coefficient of its own, and the mean of both gradients:
        `wsam(alpha=0.5, ascent=extrapolated(...))`.
      rule: The rule; None for `normalized()`.

    Returns:
      The rule.

    Raises:
      ValueError: If `step_size` is negative.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> perturbation = optax_sam.ascent.extrapolated(0.05)(jnp.array([10.0, 1.0]), 0.1, None)
      >>> print([f"{x:.4f}" for x in perturbation])
      ['-0.4005', '-0.0400']

    References:
      Yu et al., `Improving Sharpness-Aware Minimization by Lookahead
      <https://proceedings.mlr.press/v235/yu24q.html>`_, ICML 2024; Wang et al., `Sharpness-Aware
      Gradient Matching <https://arxiv.org/abs/2303.10353>`_, CVPR 2023.
    """
    _checks.number("step_size", step_size, low=0.0)
    inner = resolve(rule, "rule")

    def perturb(gradient: optax.Updates, rho: Any, params: optax.Params) -> optax.Updates:
        up = inner(gradient, rho, params)
        return jax.tree.map(lambda e, g: e - step_size * g, up, _tree.upcast(gradient))

    return AscentRule(perturb, None, follow(inner, lambda rule: extrapolated(step_size, rule)))
