"""AsyncSAM: the gradient of the previous step gives the perturbation of this one (Jo, Lim, Lee, 2025)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import optax

from optax_sam import _checks, _tree
from optax_sam import ascent as ascents
from optax_sam._loss import Evaluation, Loss, SAMGradients, serializable
from optax_sam._state import SAMState
from optax_sam._variant import SharpnessAwareTransformation, constructor, sharpness_aware


@serializable
class AsyncSAMMemory(NamedTuple):
    """What AsyncSAM remembers.

    Attributes:
      gradient: The gradient of the previous step that gives the direction of ascent, zero before the
        first. A pytree like params, in float32 or better.
    """

    gradient: optax.Updates


@constructor
def async_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    reuse: Literal["clean", "perturbed"] = "clean",
    ascent: ascents.Ascent | None = None,
) -> SharpnessAwareTransformation:
    r"""SAM that climbs along the gradient of the previous step.

    As published: two gradients that can be computed in parallel. With `reuse="perturbed"`: one, at the
    cost of plain training.

    .. math::
      u_t = \nabla L_t\left(w_t + \rho \frac{m_t}{\|m_t\|_2}\right), \quad
      m_t = \nabla L_{t-1}(w_{t-1}) \;\text{("clean") or}\; m_t = u_{t-1} \;\text{("perturbed")}

    Args:
      rho: The radius, >= 0, or a schedule of the step; 0 recovers the base optimizer. 0.05 was safe in
        docs/tuning.md, 0.2 was not: it collapsed in 1 of 6 cells ("clean") or lost 17 points ("perturbed").
      reuse: Which gradient of the previous step gives the direction: "clean" as published, two gradient
        evaluations a step, and the first step is a SAM step; or "perturbed", one evaluation a step, and
        the first step is plain.
      ascent: The ascent rule; None for `optax_sam.ascent.normalized()`.

    Returns:
      A sharpness-aware transformation. Two gradient evaluations a step or one; one copy of the params as
      state. With "perturbed", value and aux are those of the perturbed point, the only one visited, the
      pair holds its gradient twice, and the perturbation is one for all devices and shards.

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

    def climb(gradient: optax.Updates, state: SAMState, params: optax.Params) -> optax.Updates:
        # There is no previous step at first: its own gradient stands in.
        along = _tree.select(state.step == 0, gradient, state.memory.gradient)
        return ascents.at_step(rule, state.step)(along, state.rho, params)

    def evaluate_once(loss: Loss, state: SAMState) -> Evaluation:
        climb_along = ascents.at_step(rule, state.step)
        return loss.pair(loss.ascent(climb_along(state.memory.gradient, state.rho, loss.params)), None)

    def descent(gradients: SAMGradients, state: SAMState, params: optax.Params) -> tuple[optax.Updates, Any]:
        del state, params
        return gradients.perturbed, AsyncSAMMemory(getattr(gradients, reuse))

    def init_memory(params: optax.Params) -> AsyncSAMMemory:
        return AsyncSAMMemory(_tree.zeros_like(params))

    if reuse == "perturbed":
        return sharpness_aware(
            rho, None, descent, init_memory, evaluate=evaluate_once, compares=False, has_plain_step=False
        )
    return sharpness_aware(rho, None, descent, init_memory, climb=climb, ascent_only=True)
