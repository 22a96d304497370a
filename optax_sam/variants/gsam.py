"""GSAM: surrogate-gap guided sharpness-aware minimization (Zhuang et al., ICLR 2022)."""

from __future__ import annotations

from typing import Any, Literal

import jax
import optax

from optax_sam import _checks, _tree
from optax_sam import ascent as ascents
from optax_sam._loss import SAMGradients
from optax_sam._state import SAMState
from optax_sam._variant import SharpnessAwareTransformation, constructor, sharpness_aware, value_at


@constructor
def gsam(
    rho: optax.ScalarOrSchedule = 0.05,
    alpha: optax.ScalarOrSchedule = 0.4,
    *,
    objective: Literal["perturbed", "clean"] = "perturbed",
    ascent: ascents.Ascent | None = None,
) -> SharpnessAwareTransformation:
    r"""Surrogate-gap guided sharpness-aware minimization.

    Descends the perturbed loss and, in the directions that leave it unchanged, ascends the clean one:
    both losses then meet, and the gap between them is a measure of sharpness that stays meaningful
    where the perturbed loss alone does not.

    .. math::
      g_\perp = g - \frac{\langle g, g_\epsilon \rangle}{\|g_\epsilon\|_2^2} g_\epsilon, \quad
      u = g_\epsilon - \alpha\, g_\perp

    Args:
      rho: The radius, >= 0, or a schedule of the step; with `schedules.rho_from_learning_rate` as in
        the paper. 0 recovers the base optimizer.
      alpha: Weight of the orthogonal part, >= 0, or a schedule of the step; 0 recovers SAM. The paper
        takes 0.01 for ResNets and 0.4 to 1 for transformers. 0.4 was safe with rho 0.05 and collapsed
        with 0.2 in 1 of 6 cells of docs/tuning.md; so did 0.1.
      objective: "perturbed" as above, or "clean", in which the gradients swap roles and the sign turns:
        :math:`u = g + \alpha (g_\epsilon)_\perp`.
      ascent: The ascent rule; None for `optax_sam.ascent.normalized()`. What the paper calls adaptive
        is `optax_sam.ascent.absolute()`.

    Returns:
      A sharpness-aware transformation. Two gradient evaluations a step, no state but scalars.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2
      >>> gsam = optax_sam.gsam(rho=0.1, alpha=0.4)
      >>> params = jnp.array([1.0, 1.0])
      >>> state = gsam.init(params)
      >>> _, grads = optax_sam.sam_value_and_grad(loss, gsam)(params, state=state)
      >>> direction, state = gsam.update(grads, state, params)
      >>> print([f"{x:.4f}" for x in direction])
      ['10.9980', '0.9776']

    References:
      Zhuang et al., `Surrogate Gap Guided Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.08065>`_, ICLR 2022, algorithm 1; "clean" is of the published code.
    """
    _checks.scalar_or_schedule("alpha", alpha)
    _checks.choice("objective", objective, ("perturbed", "clean"))

    def descent(gradients: SAMGradients, state: SAMState, params: optax.Params) -> tuple[optax.Updates, Any]:
        del params
        weight = value_at(alpha, state.step)
        clean, perturbed = gradients.clean, gradients.perturbed
        if objective == "perturbed":
            orthogonal = _tree.reject(clean, perturbed)
            return jax.tree.map(lambda p, o: p - weight * o, perturbed, orthogonal), state.memory
        orthogonal = _tree.reject(perturbed, clean)
        return jax.tree.map(lambda c, o: c + weight * o, clean, orthogonal), state.memory

    return sharpness_aware(rho, ascent, descent)
