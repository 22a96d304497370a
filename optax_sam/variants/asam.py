"""ASAM: adaptive sharpness-aware minimization (Kwon, Kim, Park, Choi, ICML 2021)."""

from __future__ import annotations

import optax

from optax_sam import _checks
from optax_sam import ascent as ascents
from optax_sam._variant import SharpnessAwareTransformation, constructor, sharpness_aware


@constructor
def asam(
    rho: optax.ScalarOrSchedule = 0.1, *, eta: float = 0.01, adaptive_mask: ascents.Mask | None = None
) -> SharpnessAwareTransformation:
    r"""Adaptive sharpness-aware minimization.

    SAM in a neighbourhood that scales with the weights, so that rescaling layers without changing the
    network does not change the step either.

    .. math::
      \epsilon = \rho\, T \frac{T g}{\|T g\|_2}, \quad T = |w| + \eta, \quad u = \nabla L(w + \epsilon)

    Args:
      rho: The radius, >= 0, or a schedule of the step; 0 recovers the base optimizer. About twice SAM's is
        safe; the paper takes 0.5 to 1, which collapsed in 2 of 12 and 1 of 6 cells of docs/tuning.md, all of
        them of a network with BatchNorm at a large learning rate. Elsewhere up to 1 did well.
      eta: Added to the absolute weights; >= 0.
      adaptive_mask: Which leaves adapt: a pytree of booleans, a prefix of params, or a function of
        params that returns one; the others have T = 1. None: all of them. The published code leaves
        biases out; leaf- and filter-wise T: `sam(ascent=optax_sam.ascent.adaptive(granularity=...))`. Under
        `optax.inject_hyperparams` name it in `static_args`.

    Returns:
      A sharpness-aware transformation. Two gradient evaluations a step, no state but scalars.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2
      >>> asam = optax_sam.asam(rho=0.5, eta=0.0)
      >>> params = jnp.array([2.0, -0.5])
      >>> state = asam.init(params)
      >>> _, grads = optax_sam.sam_value_and_grad(loss, asam)(params, state=state)
      >>> direction, state = asam.update(grads, state, params)
      >>> print([f"{x:.4f}" for x in direction])
      ['29.9998', '-0.5016']

    References:
      Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep
      Neural Networks <https://arxiv.org/abs/2102.11600>`_, ICML 2021.
    """
    mask = True if adaptive_mask is None else adaptive_mask
    _checks.mask("adaptive_mask", mask)
    return sharpness_aware(rho, ascents.adaptive(eta, mask=mask))
