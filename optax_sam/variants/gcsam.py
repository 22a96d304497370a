"""GCSAM: gradient-centralized sharpness-aware minimization (Hassan, Vakanski, Zhang, Xian, 2025)."""

from __future__ import annotations

from typing import Any

import optax

from optax_sam import ascent as ascents
from optax_sam._loss import SAMGradients
from optax_sam._state import SAMState
from optax_sam._variant import SharpnessAwareTransformation, constructor, sharpness_aware


@constructor
def gcsam(
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    centralize_descent: bool = True,
    ascent: ascents.Ascent | None = None,
    output_axis: int | None = None,
) -> SharpnessAwareTransformation:
    r"""Gradient-centralized sharpness-aware minimization.

    SAM whose gradients lose their mean over all axes but the output axis, leaf by leaf, before the
    norm is taken.

    .. math::
      \epsilon = \rho \frac{\mathrm{GC}(g)}{\|\mathrm{GC}(g)\|_2}, \quad
      u = \mathrm{GC}(\nabla L(w + \epsilon))

    Args:
      rho: The radius, >= 0, or a schedule of the step; 0 recovers the base optimizer on the
        centralized gradient.
      centralize_descent: Whether the perturbed gradient is centralized too.
      ascent: The ascent rule that receives the centralized gradient; None for
        `optax_sam.ascent.normalized()`.
      output_axis: The axis of a leaf that is not averaged over: -1 in Flax and Haiku, which None stands
        for; 0 in layouts taken over from PyTorch.

    Returns:
      A sharpness-aware transformation. Two gradient evaluations a step, no state but scalars.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: jnp.sum(w**3) / 3
      >>> gcsam = optax_sam.gcsam(rho=0.1)
      >>> params = jnp.array([[1.0, 2.0], [2.0, 1.0]])
      >>> state = gcsam.init(params)
      >>> _, grads = optax_sam.sam_value_and_grad(loss, gcsam)(params, state=state)
      >>> direction, state = gcsam.update(grads, state, params)
      >>> print([f"{x:.3f}" for x in direction.ravel()])
      ['-1.650', '1.650', '1.650', '-1.650']

    References:
      Hassan et al., `GCSAM: Gradient Centralized Sharpness Aware Minimization
      <https://arxiv.org/abs/2501.11584>`_, IEEE Access 2025; that the descent is centralized too is
      taken from a summary of it.
    """
    axis = -1 if output_axis is None else output_axis

    def descent(gradients: SAMGradients, state: SAMState, params: optax.Params) -> tuple[optax.Updates, Any]:
        del params
        if not centralize_descent:
            return gradients.perturbed, state.memory
        return ascents.centralize(gradients.perturbed, axis), state.memory

    return sharpness_aware(rho, ascents.centralized(ascent, output_axis=axis), descent, ascent_only=True)
