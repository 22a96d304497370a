"""StableSAM: the perturbed gradient in the length of the clean one (Tan et al., JMLR 2025)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_sam import _tree
from optax_sam import ascent as ascents
from optax_sam._loss import SAMGradients
from optax_sam._state import SAMState
from optax_sam._variant import SharpnessAwareTransformation, constructor, sharpness_aware


@constructor
def stable_sam(
    rho: optax.ScalarOrSchedule = 0.05, *, ascent: ascents.Ascent | None = None
) -> SharpnessAwareTransformation:
    r"""SAM whose steps are as long as those of the base optimizer.

    The perturbed gradient gives only the direction, so a large radius does not lengthen a step.

    .. math:: u = \frac{\|g\|_2}{\|g_\epsilon\|_2}\, g_\epsilon

    Args:
      rho: The radius, >= 0, or a schedule of the step; 0 recovers the base optimizer.
      ascent: The ascent rule; None for `optax_sam.ascent.normalized()`.

    Returns:
      A sharpness-aware transformation. Two gradient evaluations a step, no state but scalars.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2
      >>> variant = optax_sam.stable_sam(rho=0.1)
      >>> params = jnp.array([1.0, 1.0])
      >>> state = variant.init(params)
      >>> _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, state=state)
      >>> direction, state = variant.update(grads, state, params)
      >>> print([f"{x:.4f}" for x in direction])
      ['10.0077', '0.9193']

    References:
      Tan et al., `Stabilizing Sharpness-Aware Minimization Through A Simple Renormalization Strategy
      <https://arxiv.org/abs/2401.07250>`_, JMLR 2025, after its abstract and a summary.
    """

    def descent(gradients: SAMGradients, state: SAMState, params: optax.Params) -> tuple[optax.Updates, Any]:
        del params
        clean, perturbed = _tree.norm(gradients.clean), _tree.norm(gradients.perturbed)
        usable = (perturbed > 0.0) & jnp.isfinite(clean) & jnp.isfinite(perturbed)
        scale = jnp.where(usable, clean / jnp.where(usable, perturbed, 1.0), 1.0)
        return jax.tree.map(lambda p: scale * p, gradients.perturbed), state.memory

    return sharpness_aware(rho, ascent, descent)
