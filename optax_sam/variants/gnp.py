"""GNP: penalizing the gradient norm (Zhao, Zhang, Hu, ICML 2022)."""

from __future__ import annotations

from typing import Any

import jax
import optax

from optax_sam import _checks, _tree
from optax_sam import ascent as ascents
from optax_sam._loss import SAMGradients
from optax_sam._state import SAMState
from optax_sam._variant import SharpnessAwareTransformation, constructor, sharpness_aware, value_at


@constructor
def gnp(
    rho: optax.ScalarOrSchedule = 0.1,
    alpha: optax.ScalarOrSchedule = 0.8,
    *,
    normalize_clean: bool = False,
    ascent: ascents.Ascent | None = None,
) -> SharpnessAwareTransformation:
    r"""Penalizes the norm of the gradient, by a finite difference of length rho.

    .. math:: u = (1 - \alpha)\, g + \alpha\, g_\epsilon \approx
      \nabla \left( L + \alpha\rho\, \|\nabla L\|_2 \right)

    With an adaptive base optimizer warm rho or alpha up, over the warm-up of the learning rate or longer:
    `gnp(optax.warmup_constant_schedule(0.0, 0.1, steps))`.

    Args:
      rho: The radius r, >= 0, or a schedule of the step; 0 recovers the base optimizer. The paper takes 0.1
        on CIFAR and 0.05 on ImageNet.
      alpha: The weight of the perturbed gradient, the penalty's weight divided by r; in [0, 1], or a schedule
        of the step. 0 recovers the base optimizer, 1 SAM. Above 1: `wsam(alpha=...)`.
      normalize_clean: Divide the clean gradient by its norm first, as the authors' code does unless told
        otherwise, and the paper does not. It is then no longer the gradient of that penalty, and neither
        rho = 0 nor alpha = 0 recovers the base optimizer.
      ascent: The ascent rule; None for `optax_sam.ascent.normalized()`.

    Returns:
      A sharpness-aware transformation. Two gradient evaluations a step, no state but scalars.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2
      >>> gnp = optax_sam.gnp()
      >>> params = jnp.array([1.0, 1.0])
      >>> state = gnp.init(params)
      >>> _, grads = optax_sam.sam_value_and_grad(loss, gnp)(params, state=state)
      >>> direction, state = gnp.update(grads, state, params)
      >>> print([f"{x:.4f}" for x in direction])
      ['10.7960', '1.0080']

    References:
      Zhao, Zhang and Hu, `Penalizing Gradient Norm for Efficiently Improving Generalization in Deep Learning
      <https://arxiv.org/abs/2202.03599>`_, ICML 2022; the warm-up after `When Will Gradient Regularization Be
      Harmful? <https://arxiv.org/abs/2406.09723>`_, ICML 2024.
    """
    _checks.scalar_or_schedule("alpha", alpha, high=1.0)

    def descent(gradients: SAMGradients, state: SAMState, params: optax.Params) -> tuple[optax.Updates, Any]:
        del params
        weight = value_at(alpha, state.step)
        clean, perturbed = gradients.clean, gradients.perturbed
        if normalize_clean:
            unit = _tree.unit(clean)
            return jax.tree.map(lambda c, p: (1 - weight) * c + weight * p, unit, perturbed), state.memory
        return jax.tree.map(lambda c, p: c + weight * (p - c), clean, perturbed), state.memory

    return sharpness_aware(rho, ascent, descent)
