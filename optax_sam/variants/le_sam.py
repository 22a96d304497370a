"""LE-SAM: a fixed rise of the loss in place of a fixed radius (Wang, Liu, Xie, Gao, ICML 2026)."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from optax_sam import _checks, _tree
from optax_sam import ascent as ascents
from optax_sam._state import SAMState
from optax_sam._variant import SharpnessAwareTransformation, constructor, sharpness_aware


@constructor
def le_sam(loss_rise: optax.ScalarOrSchedule = 0.05, rho_max: float = 0.1) -> SharpnessAwareTransformation:
    r"""SAM that climbs until the loss, by its linear model, has risen by so much.

    .. math::
      \epsilon = \rho_t \frac{g}{\|g\|_2}, \quad
      \rho_t = \min\left(\frac{\sigma_t}{\|g\|_2}, \rho_\max\right), \quad u = \nabla L(w + \epsilon)

    Below the largest radius, :math:`\langle g, \epsilon \rangle = \sigma_t`: steep points are perturbed less.

    Args:
      loss_rise: The rise :math:`\sigma`, in units of the loss, >= 0, or a schedule of the step; 0 recovers
        the base optimizer. The paper anneals it to 0 over the last epochs, as in the example. It takes the
        place of the radius: `SAMState.rho` and the metric `rho` are this number.
      rho_max: The largest radius, > 0, for points where the gradient is short.

    Returns:
      A sharpness-aware transformation. Two gradient evaluations a step, no state but scalars. It is not
      invariant to a scaling of the loss.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> constant, tail = optax.constant_schedule(0.5), optax.cosine_decay_schedule(0.5, 10)
      >>> loss_rise = optax.join_schedules([constant, tail], [90])
      >>> print([f"{loss_rise(step):.2f}" for step in (0, 90, 95, 100)])
      ['0.50', '0.50', '0.25', '0.00']
      >>> variant = optax_sam.le_sam(loss_rise, rho_max=0.2)
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2
      >>> params = jnp.array([1.0, 1.0])
      >>> state = variant.init(params)
      >>> _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, state=state)
      >>> print([f"{x:.3f}" for x in grads.perturbed])
      ['10.495', '1.005']

    References:
      Wang et al., `Fix the Loss, Not the Radius: Rethinking the Adversarial Perturbation of Sharpness-Aware
      Minimization <https://arxiv.org/abs/2605.10183>`_, ICML 2026, after its abstract and a summary; the
      authors' code was not to be had. The defaults are not theirs: 0.1 is the largest radius that was safe
      for `sam`.
    """
    _checks.number("rho_max", rho_max, low=0.0, above=True)
    along = ascents.normalized()

    def climb(gradient: optax.Updates, state: SAMState, params: optax.Params) -> optax.Updates:
        radius = jnp.minimum(state.rho / (_tree.norm(gradient) + 1e-12), rho_max)
        return along(gradient, radius, params)

    return sharpness_aware(loss_rise, climb=climb, rho_name="loss_rise")
