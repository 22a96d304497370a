"""CR-SAM: curvature regularized sharpness-aware minimization (Wu, Luo, Wunsch, AAAI 2024)."""

from __future__ import annotations

import jax
import optax

from optax_sam import _checks, _tree
from optax_sam import ascent as ascents
from optax_sam._loss import Evaluation, Loss
from optax_sam._state import SAMState
from optax_sam._variant import SharpnessAwareTransformation, constructor, sharpness_aware


@constructor
def cr_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    gamma: float = 0.1,
    beta: float = 0.01,
    *,
    ascent: ascents.Ascent | None = None,
) -> SharpnessAwareTransformation:
    r"""SAM that also keeps the curvature along the perturbation small, by a third gradient on the other side.

    .. math::
      u = g_+ + \gamma\,(g_+ + g_- - 2 g) + \beta\,(g_+ - g_-), \quad
      g_\pm = \nabla L(w \pm \epsilon), \quad \epsilon = \rho \frac{g}{\|g\|_2}

    The first difference is the gradient of the curvature along :math:`\epsilon`, the second that of the
    slope.

    Args:
      rho: The radius, >= 0, or a schedule of the step; 0 recovers the base optimizer. The authors' script
        takes 0.1; 0.05 is the default of `sam` here.
      gamma: The weight of the curvature, >= 0.
      beta: The weight of the slope, >= 0. With gamma 0 too, this is SAM. The defaults of both are those of
        the authors' script.
      ascent: The ascent rule; None for `optax_sam.ascent.normalized()`.

    Returns:
      A sharpness-aware transformation. Three gradient evaluations a step, of which the last two do not wait
      for one another; no state but scalars. The pair holds the direction in place of the perturbed gradient.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2 + jnp.sum(w**3) / 3
      >>> variant = optax_sam.cr_sam(rho=0.1)
      >>> params = jnp.array([1.0, 1.0])
      >>> state = variant.init(params)
      >>> _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, state=state)
      >>> direction, state = variant.update(grads, state, params)
      >>> print([f"{x:.3f}" for x in direction])
      ['12.216', '2.055']

    References:
      Wu, Luo and Wunsch, `CR-SAM: Curvature Regularized Sharpness-Aware Minimization
      <https://arxiv.org/abs/2312.13555>`_, AAAI 2024, after the authors' code; the paper regularizes the
      logarithm of a normalized trace, of which this is the finite difference.
    """
    _checks.number("gamma", gamma, low=0.0)
    _checks.number("beta", beta, low=0.0)
    rule = ascents.resolve(ascent)

    def evaluate(loss: Loss, state: SAMState) -> Evaluation:
        clean = loss.ascent()
        gradient = _tree.upcast(clean.gradient)
        perturbation = ascents.at_step(rule, state.step)(gradient, state.rho, loss.params)
        up, down = loss.at(perturbation), loss.at(optax.tree.scale(-1.0, perturbation))

        def combine(g: jax.Array, p: jax.Array, m: jax.Array) -> jax.Array:
            return p + gamma * ((p - g) + (m - g)) + beta * (p - m)

        direction = jax.tree.map(combine, gradient, *map(_tree.upcast, (up.gradient, down.gradient)))
        return loss.pair(clean, up._replace(gradient=_tree.cast_like(direction, up.gradient)))

    return sharpness_aware(rho, evaluate=evaluate, compares=True)
