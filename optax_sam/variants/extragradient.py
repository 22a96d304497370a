"""Extragradient and its relatives: a look ahead along the descent direction."""

from __future__ import annotations

from typing import Any

import jax
import optax

from optax_sam import _checks, _tree
from optax_sam._loss import SAMGradients
from optax_sam._state import SAMState
from optax_sam._variant import SharpnessAwareTransformation, constructor, sharpness_aware


@constructor
def extragradient(
    step_size: optax.ScalarOrSchedule = 0.01, *, weights: tuple[float, float] = (0.5, 0.5)
) -> SharpnessAwareTransformation:
    r"""Mixes the gradient here with the gradient where a descent step would lead.

    Not a sharpness-aware method, though some texts call it one: the point is reached by descent, and
    the length of the step is not normalized.

    .. math:: u = a\, g + b\, \nabla L(w - \gamma g)

    Args:
      step_size: The look-ahead step :math:`\gamma`, >= 0, or a schedule of the step; 0 recovers the base
        optimizer for weights that sum to one.
      weights: The weights (a, b) of the gradient here and of the one ahead. (0.5, 0.5) averages, (0, 1) is
        the extragradient method; (1, step_size) is a plain step followed by a small one of the gradient
        ahead. (1, 1) sums them, which doubles the learning rate: halve it, or it may be too large (30
        points lost in one of 12 cells of docs/tuning.md).

    Returns:
      A transformation on the mechanism of the sharpness-aware ones. Two gradient evaluations a step, no
      state but scalars.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2
      >>> variant = optax_sam.extragradient(0.01, weights=(1.0, 1.0))
      >>> params = jnp.array([1.0, 1.0])
      >>> state = variant.init(params)
      >>> _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, state=state)
      >>> direction, state = variant.update(grads, state, params)
      >>> print([f"{x:.4f}" for x in direction])
      ['19.0000', '1.9900']

    References:
      Korpelevich, The extragradient method for finding saddle points and other problems, 1976.
    """
    _checks.numbers("weights", weights, 2)
    here, ahead = weights

    def descend(gradient: optax.Updates, rho: Any, params: optax.Params) -> optax.Updates:
        del params
        return jax.tree.map(lambda g: -rho * g, _tree.upcast(gradient))

    def descent(gradients: SAMGradients, state: SAMState, params: optax.Params) -> tuple[optax.Updates, Any]:
        del params
        direction = jax.tree.map(lambda c, p: here * c + ahead * p, gradients.clean, gradients.perturbed)
        return direction, state.memory

    return sharpness_aware(step_size, descend, descent, ascent_only=here == 0, rho_name="step_size")
