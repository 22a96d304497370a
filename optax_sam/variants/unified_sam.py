"""Unified SAM: normalized steps, unnormalized ones, and all between (Oikonomou, Loizou, ICLR 2025)."""

from __future__ import annotations

import jax
import optax

from optax_sam import _checks, _tree
from optax_sam._state import SAMState
from optax_sam._variant import SharpnessAwareTransformation, constructor, sharpness_aware, value_at


@constructor
def unified_sam(
    rho: optax.ScalarOrSchedule = 0.05, mix: optax.ScalarOrSchedule = 0.5
) -> SharpnessAwareTransformation:
    r"""SAM, its unnormalized form (USAM), and everything between them.

    .. math::
      \epsilon = \rho \left(1 - \lambda + \frac{\lambda}{\|g\|_2 + 10^{-12}}\right) g, \quad
      u = \nabla L(w + \epsilon)

    Args:
      rho: The radius, >= 0, or a schedule of the step; 0 recovers the base optimizer. The authors' code has
        no default.
      mix: The weight :math:`\lambda` of the normalized step, in [0, 1], or a schedule of the step: 1 is SAM,
        0 is USAM. The authors' best results are those of a schedule that goes from USAM to SAM,
        `lambda step: 1 - 1 / (step + 1)`; the other way is `lambda step: 1 / (step + 1)`.

    Returns:
      A sharpness-aware transformation. Two gradient evaluations a step, no state but scalars. Unless mix is 1
      it is not invariant to a scaling of the loss.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2
      >>> variant = optax_sam.unified_sam(rho=0.1, mix=0.5)
      >>> params = jnp.array([1.0, 1.0])
      >>> state = variant.init(params)
      >>> _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, state=state)
      >>> direction, state = variant.update(grads, state, params)
      >>> print([f"{x:.4f}" for x in direction])
      ['15.4975', '1.0550']

    References:
      Oikonomou and Loizou, `Sharpness-Aware Minimization: General Analysis and Improved Rates
      <https://openreview.net/forum?id=8rvqpiTTFv>`_, ICLR 2025, after the authors' code.
    """
    _checks.scalar_or_schedule("mix", mix, high=1.0)

    def climb(gradient: optax.Updates, state: SAMState, params: optax.Params) -> optax.Updates:
        del params
        weight = value_at(mix, state.step)
        scale = state.rho * (1 - weight + weight / (_tree.norm(gradient) + 1e-12))
        return jax.tree.map(lambda g: scale * g, gradient)

    return sharpness_aware(rho, climb=climb)
