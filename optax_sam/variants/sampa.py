"""SAMPa: two gradients that do not wait for one another (Xie, Pethick, Cevher, NeurIPS 2024)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam import _checks, _tree
from optax_sam import ascent as ascents
from optax_sam._loss import Evaluation, Loss, SAMGradients, serializable
from optax_sam._state import SAMState
from optax_sam._variant import SharpnessAwareTransformation, constructor, sharpness_aware, value_at


@serializable
class SAMPaMemory(NamedTuple):
    """What SAMPa remembers.

    Attributes:
      gradient: The gradient at the auxiliary point :math:`y_t`, zero before the first step. A pytree like
        params, in float32 or better.
    """

    gradient: optax.Updates


@constructor
def sampa(
    learning_rate: optax.ScalarOrSchedule,
    rho: optax.ScalarOrSchedule = 0.1,
    mix: float = 0.2,
    *,
    ascent: ascents.Ascent | None = None,
) -> SharpnessAwareTransformation:
    r"""SAM parallelized: both points of a step are known before it begins.

    The perturbation is along the gradient at an auxiliary point, where the previous step looked ahead.

    .. math::
      y_{t+1} = w_t - \eta_t\, m_t, \quad
      u_t = (1 - \lambda)\, \nabla L\left(w_t + \rho \frac{m_t}{\|m_t\|_2}\right)
      + \lambda\, \nabla L(y_{t+1}), \quad m_{t+1} = \nabla L(y_{t+1})

    With :math:`m_0 = 0`: the first step is a step of the base optimizer.

    Args:
      learning_rate: :math:`\eta`, that of the base optimizer again, >= 0 or a schedule of the step.
      rho: The radius, >= 0, or a schedule of the step. 0 is not the base optimizer, but looks ahead.
      mix: The weight :math:`\lambda` of the gradient ahead, in [0, 1]; 0 is the paper's SAMPa, 0.2 its
        SAMPa-0.2.
      ascent: The ascent rule; None for `optax_sam.ascent.normalized()`.

    Returns:
      A sharpness-aware transformation. Two gradient evaluations a step, which compilers and devices may run
      at the same time; one copy of the params as state. The loss and aux reported, and the clean half of the
      pair, are those at :math:`y_{t+1}`.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2
      >>> variant = optax_sam.sampa(learning_rate=0.05)
      >>> tx = optax.chain(variant, optax.sgd(0.05))
      >>> params = jnp.array([1.0, 1.0])
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, state=state)
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print([f"{w:.3f}" for w in params])
      ['0.500', '0.950']
      ['0.260', '0.903']

    References:
      Xie, Pethick and Cevher, `SAMPa: Sharpness-aware Minimization Parallelized
      <https://arxiv.org/abs/2410.10683>`_, NeurIPS 2024; defaults and first step as in the authors' code.
      There the gradient at the perturbed point is of the batch before, and the point ahead knows of momentum
      and weight decay; here both gradients are of the current batch, and :math:`y` is the paper's.
    """
    _checks.scalar_or_schedule("learning_rate", learning_rate)
    _checks.number("mix", mix, low=0.0, high=1.0)
    rule = ascents.resolve(ascent)

    def evaluate(loss: Loss, state: SAMState) -> Evaluation:
        gradient = state.memory.gradient
        rate: Any = value_at(learning_rate, state.step)
        ahead = loss.ascent(jax.tree.map(lambda g: -rate * g, gradient))
        return loss.pair(ahead, loss.at(ascents.at_step(rule, state.step)(gradient, state.rho, loss.params)))

    def descent(gradients: SAMGradients, state: SAMState, params: optax.Params) -> tuple[optax.Updates, Any]:
        del state, params
        perturbed = gradients.perturbed
        # Where the gradient ahead is not finite: the old memory would lead to the same point again.
        ahead = jax.tree.map(lambda c, p: jnp.where(jnp.isfinite(c), c, p), gradients.clean, perturbed)
        return _tree.blend(perturbed, ahead, mix), SAMPaMemory(ahead)

    def init_memory(params: optax.Params) -> SAMPaMemory:
        return SAMPaMemory(_tree.zeros_like(params))

    return sharpness_aware(rho, None, descent, init_memory, evaluate=evaluate, has_plain_step=False)
