"""AE-SAM: SAM where the gradient is large (Jiang, Yang, Zhang, Kwok, ICLR 2023)."""

from __future__ import annotations

import optax

from optax_sam import ascent as ascents
from optax_sam._variant import SharpnessAwareTransformation, constructor
from optax_sam.gates import gated, large_gradient
from optax_sam.variants.sam import sam


@constructor
def ae_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    threshold: optax.ScalarOrSchedule = 0.0,
    decay: float = 0.9,
    *,
    ascent: ascents.Ascent | None = None,
) -> SharpnessAwareTransformation:
    r"""Adaptive policy: a SAM step when the gradient is large compared with earlier steps, else a plain step.

    .. math::
      u_t = g_\epsilon \;\text{if}\; \|g_t\|^2 \ge \mu_t + c_t \sigma_t, \quad \text{else}\; u_t = g_t

    with moving averages :math:`\mu` and :math:`\sigma^2` of the squared norms. The paper lowers c linearly,
    from 1 to -1, so that SAM becomes more frequent: `threshold=optax.linear_schedule(1.0, -1.0, steps)`.

    Args:
      rho: The radius, >= 0, or a schedule of the step; 0 recovers the base optimizer.
      threshold: :math:`c`, any number, or a schedule of the step.
      decay: The decay of the moving averages, in [0, 1).
      ascent: The ascent rule; None for `optax_sam.ascent.normalized()`.

    Returns:
      A sharpness-aware transformation: `gated(sam(rho), gates.large_gradient(threshold, decay))`. One or two
      gradient evaluations a step, about 1.5 with a threshold around 0; three scalars as state.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2
      >>> variant = optax_sam.ae_sam(rho=0.1)
      >>> tx = optax.chain(variant, optax.sgd(0.05))
      >>> params = jnp.array([1.0, 1.0])
      >>> state = tx.init(params)
      >>> for _ in range(3):  # The squared norms are 101, 21.2 and 5.3.
      ...     _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, state=state)
      ...     print([f"{p - c:.3f}" for p, c in zip(grads.perturbed, grads.clean)])
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      ['0.995', '0.010']
      ['0.978', '0.021']
      ['0.000', '0.000']

    References:
      Jiang, Yang, Zhang and Kwok, `An Adaptive Policy to Employ Sharpness-Aware Minimization
      <https://arxiv.org/abs/2304.14647>`_, ICLR 2023, after two summaries of it: no official code is known,
      and the schedule of the threshold is from one of them.
    """
    return gated(sam(rho, ascent=ascent), large_gradient(threshold, decay))
