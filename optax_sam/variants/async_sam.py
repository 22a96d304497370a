"""AsyncSAM: the gradient of the previous step gives the perturbation of this one (Jo, Lim, Lee, 2025)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam import _checks, _tree
from optax_sam import ascent as ascents
from optax_sam._objective import Evaluation, Objective, SAMGradients
from optax_sam._transformation import SAMState, SharpnessAwareTransformation, sharpness_aware


class AsyncSAMMemory(NamedTuple):
    """What AsyncSAM remembers.

    Attributes:
      gradient: The gradient of the previous step that gives the direction of ascent, zero before the
        first. A pytree like params, in float32 or better.
    """

    gradient: optax.Updates


def async_sam(
    rho: optax.ScalarOrSchedule = 0.05, *, reuse: str = "clean", ascent: ascents.Ascent | None = None
) -> SharpnessAwareTransformation:
    r"""SAM that climbs along the gradient of the step before.

    As published: two gradients that can be computed in parallel. With `reuse="perturbed"`: one, at the
    cost of plain training.

    .. math::
      u_t = \nabla L_t\left(w_t + \rho \frac{m_t}{\|m_t\|_2}\right), \quad
      m_t = \nabla L_{t-1}(w_{t-1}) \;\text{("clean") or}\; m_t = u_{t-1} \;\text{("perturbed")}

    Args:
      rho: The radius, >= 0, or a schedule of the step; 0 recovers the base optimizer.
      reuse: Which gradient of the previous step gives the direction: "clean" as published, two gradient
        evaluations a step, the first step being one of SAM; or "perturbed", one evaluation a step, the
        first step being plain.
      ascent: The ascent rule; None for `optax_sam.ascent.normalized()`.

    Returns:
      A sharpness-aware transformation. Two gradient evaluations a step or one; one copy of the params as
      state. With "perturbed", value and aux are those of the perturbed point, the only one visited, the
      pair holds its gradient twice, and the perturbation is one for all devices and shards.

    Raises:
      TypeError, ValueError: If an argument is not of its kind or out of its range.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2
      >>> variant = optax_sam.async_sam(rho=0.1, reuse="perturbed")
      >>> tx = optax.chain(variant, optax.sgd(0.05))
      >>> params = jnp.array([1.0, 1.0])
      >>> state = tx.init(params)
      >>> for _ in range(2):  # A plain step, then one with a perturbation along its gradient.
      ...     _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, state=state)
      ...     print([f"{x:.4f}" for x in grads.perturbed])
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      ['10.0000', '1.0000']
      ['5.9950', '0.9600']

    References:
      Jo, Lim and Lee, `Asynchronous Sharpness-Aware Minimization <https://arxiv.org/abs/2503.11147>`_,
      2025, with a delay of one step, after a summary of it; "perturbed" is not theirs.
    """
    _checks.choice("reuse", reuse, ("clean", "perturbed"))
    rule = ascents.resolve(ascent)

    def evaluate(objective: Objective, params: optax.Params, state: SAMState) -> tuple[Evaluation, Any]:
        previous = state.memory.gradient
        if reuse == "perturbed":
            here = objective.ascent_at(params, rule(previous, state.rho, params))
            return objective.combine(here, None), here.aux
        clean = objective.ascent_at(params)
        # There is no previous step at first: its own gradient stands in.
        along = jax.tree.map(lambda m, c: jnp.where(state.step == 0, c, m), previous, clean.gradient)
        perturbed = objective.at(params, rule(along, state.rho, params))
        return objective.combine(clean, perturbed), clean.aux

    def descent(gradients: SAMGradients, state: SAMState, params: optax.Params) -> tuple[optax.Updates, Any]:
        del state, params
        return gradients.perturbed, AsyncSAMMemory(getattr(gradients, reuse))

    return sharpness_aware(
        rho,
        None,
        descent,
        lambda params: AsyncSAMMemory(_tree.zeros_like(params)),
        evaluate=evaluate,
        ascent_only=reuse == "clean",
    )
