"""Preconditioned SAM: climbs along the gradient as Adam scales it (Singh et al., ICML 2025)."""

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
class PreconditionedSAMMemory(NamedTuple):
    """What preconditioned SAM remembers.

    Attributes:
      second_moment: Exponential average of the squares of the directions, zero before the first step. A
        pytree like params, in float32 or better.
    """

    second_moment: optax.Updates


@constructor
def preconditioned_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    power: float = 0.5,
    decay: float = 0.999,
    *,
    eps: float = 1e-8,
    ascent: ascents.Ascent | None = None,
) -> SharpnessAwareTransformation:
    r"""SAM in the geometry of Adam: entries whose gradients are small climb as far as the others.

    .. math::
      \epsilon_t = \rho \frac{d_t}{\|d_t\|_2}, \quad d_t = \frac{g_t}{\nu_{t-1}^\kappa + \mathrm{eps}}, \quad
      u_t = \nabla L(w_t + \epsilon_t), \quad \nu_t = \beta \nu_{t-1} + (1 - \beta)\, u_t^2

    With `optax.adam(..., b2=decay)` after it, :math:`\nu` is the second moment in Adam's own state, before
    the correction of its bias, which the normalization takes out. The first step is one of SAM. Entries that
    get their first gradient later, such as a row of an embedding that is looked up for the first time, take
    nearly all of the radius in that step; a larger `eps` prevents it.

    Args:
      rho: The radius, >= 0, or a schedule of the step; 0 recovers the base optimizer.
      power: The power :math:`\kappa` of the second moment, >= 0: 0 recovers SAM, 1/2 is Adam's
        preconditioner.
      decay: The decay :math:`\beta` of the second moment, in [0, 1); 0.999 is that of Adam.
      eps: Added to the power of the second moment; > 0.
      ascent: The ascent rule that receives d; None for `optax_sam.ascent.normalized()`.

    Returns:
      A sharpness-aware transformation. Two gradient evaluations a step, one copy of the params as state.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2
      >>> variant = optax_sam.preconditioned_sam(rho=0.1)
      >>> tx = optax.chain(variant, optax.adam(0.1))
      >>> params = jnp.array([1.0, 1.0])
      >>> state = tx.init(params)
      >>> for _ in range(2):  # Along the gradient first, then nearly along its sign.
      ...     _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, state=state)
      ...     e = (grads.perturbed - grads.clean) / jnp.array([10.0, 1.0])
      ...     print([f"{x:.3f}" for x in e])
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      ['0.100', '0.010']
      ['0.068', '0.074']

    References:
      Singh et al., `Avoiding spurious sharpness minimization broadens applicability of SAM
      <https://arxiv.org/abs/2502.02407>`_, ICML 2025, after its abstract: that the perturbation is
      preconditioned. The power of the second moment is ours.
    """
    _checks.number("power", power, low=0.0)
    _checks.number("decay", decay, low=0.0, high=1.0, below=True)
    _checks.number("eps", eps, low=0.0, above=True)
    rule = ascents.resolve(ascent)

    def scale(g: jax.Array, moment: jax.Array) -> jax.Array:
        # A zero moment is kept from the power, whose derivative there is infinite.
        is_known = moment > 0.0
        size = jnp.where(is_known, jnp.where(is_known, moment, 1.0) ** power, 0.0**power)
        return g / (size + eps)

    def climb(gradient: optax.Updates, state: SAMState, params: optax.Params) -> optax.Updates:
        scaled = jax.tree.map(scale, gradient, state.memory.second_moment)
        return ascents.at_step(rule, state.step)(scaled, state.rho, params)

    def descent(gradients: SAMGradients, state: SAMState, params: optax.Params) -> tuple[optax.Updates, Any]:
        del params
        squares = jax.tree.map(jnp.square, gradients.perturbed)
        moment = _tree.blend(state.memory.second_moment, squares, 1.0 - decay)
        return gradients.perturbed, PreconditionedSAMMemory(moment)

    def init_memory(params: optax.Params) -> PreconditionedSAMMemory:
        return PreconditionedSAMMemory(_tree.zeros_like(params))

    return sharpness_aware(rho, None, descent, init_memory, climb=climb, ascent_only=True)
