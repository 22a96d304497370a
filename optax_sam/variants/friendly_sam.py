"""F-SAM: friendly sharpness-aware minimization (Li, Zhou, He, Cheng, Huang, CVPR 2024)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam import _checks, _tree
from optax_sam import ascent as ascents
from optax_sam._loss import SAMGradients, serializable
from optax_sam._state import SAMState
from optax_sam._variant import SharpnessAwareTransformation, constructor, sharpness_aware


@serializable
class FriendlySAMMemory(NamedTuple):
    """What F-SAM remembers.

    Attributes:
      average: Exponential average of the clean gradients, an estimate of the gradient of the full batch; zero
        before the first step. A pytree like params, in float32 or better.
    """

    average: optax.Updates


@constructor
def friendly_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    sigma: float = 1.0,
    decay: float = 0.9,
    *,
    ascent: ascents.Ascent | None = None,
) -> SharpnessAwareTransformation:
    r"""Friendly SAM: climbs along the part of the gradient that is specific to the batch.

    The part that all batches share, estimated by an average over the past steps, is taken out of the ascent.

    .. math::
      \epsilon_t = \rho \frac{d_t}{\|d_t\|_2}, \quad d_t = g_t - \sigma m_{t-1}, \quad
      m_t = \lambda m_{t-1} + (1 - \lambda) g_t, \quad u_t = \nabla L(w_t + \epsilon_t)

    The first step is a SAM step, with :math:`m_0 = g_0`.

    Args:
      rho: The radius, >= 0, or a schedule of the step; 0 recovers the base optimizer.
      sigma: How much of the average is taken out, >= 0; 0 recovers SAM.
      decay: The decay :math:`\lambda` of the average, in [0, 1). The published runs take 0.6 to 0.95.
      ascent: The ascent rule that receives :math:`d_t`; None for `optax_sam.ascent.normalized()`.

    Returns:
      A sharpness-aware transformation. Two gradient evaluations a step, one copy of the params as state.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2
      >>> variant = optax_sam.friendly_sam(rho=0.1, sigma=0.5)
      >>> tx = optax.chain(variant, optax.sgd(0.05))
      >>> params = jnp.array([1.0, 1.0])
      >>> state = tx.init(params)
      >>> for _ in range(2):  # The gradients are (10, 1) and (4.50, 0.95), the second d is (-0.50, 0.45).
      ...     _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, state=state)
      ...     print([f"{p - c:.3f}" for p, c in zip(grads.perturbed, grads.clean)])
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      ['0.995', '0.010']
      ['-0.742', '0.067']

    References:
      Li et al., `Friendly Sharpness-Aware Minimization <https://arxiv.org/abs/2403.12350>`_, CVPR 2024, in
      the order of the authors' code: d takes the average of the steps before.
    """
    _checks.number("sigma", sigma, low=0.0)
    _checks.number("decay", decay, low=0.0, high=1.0, below=True)
    rule = ascents.resolve(ascent)

    def climb(gradient: optax.Updates, state: SAMState, params: optax.Params) -> optax.Updates:
        average = state.memory.average
        deviation = jax.tree.map(lambda g, m: g - sigma * m, gradient, average)
        return ascents.at_step(rule, state.step)(deviation, state.rho, params)

    def descent(gradients: SAMGradients, state: SAMState, params: optax.Params) -> tuple[optax.Updates, Any]:
        del params
        weight = jnp.where(state.step == 0, 1.0, 1.0 - decay)
        average = _tree.blend(state.memory.average, gradients.clean, weight)
        return gradients.perturbed, FriendlySAMMemory(average)

    def init_memory(params: optax.Params) -> FriendlySAMMemory:
        return FriendlySAMMemory(_tree.zeros_like(params))

    return sharpness_aware(rho, None, descent, init_memory, climb=climb, ascent_only=True)
