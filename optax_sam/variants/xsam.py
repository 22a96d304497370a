"""XSAM: beyond the perturbed gradient on the sphere of directions (Chen, Zhou, ICLR 2026)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_sam import _checks, _tree
from optax_sam import ascent as ascents
from optax_sam._loss import SAMGradients
from optax_sam._state import SAMState
from optax_sam._variant import SharpnessAwareTransformation, constructor, sharpness_aware, value_at


@constructor
def xsam(
    rho: optax.ScalarOrSchedule = 0.05,
    alpha: optax.ScalarOrSchedule = 1.5,
    *,
    ascent: ascents.Ascent | None = None,
) -> SharpnessAwareTransformation:
    r"""SAM with a direction on the great circle through both gradients, of which SAM's own is one.

    .. math::
      u = \|g_\epsilon\|_2 \left( \frac{\sin((1 - \alpha)\theta)}{\sin\theta} \frac{g}{\|g\|_2}
      + \frac{\sin(\alpha\theta)}{\sin\theta} \frac{g_\epsilon}{\|g_\epsilon\|_2} \right), \quad
      \theta = \angle(g, g_\epsilon)

    Args:
      rho: The radius, >= 0, or a schedule of the step; 0 recovers the base optimizer. The authors' code takes
        0.15; 0.05 is the default of `sam` here, because the step is as long as SAM's.
      alpha: How far to go from the clean direction to the perturbed one and beyond, >= 0, or a schedule of
        the
        step: 0 is the clean direction, 1 SAM. The paper searches the best one in [0, 2] by losses at a larger
        radius, once an epoch; here it is fixed, at the middle of the range beyond SAM unless told otherwise.
      ascent: The ascent rule; None for `optax_sam.ascent.normalized()`.

    Returns:
      A sharpness-aware transformation. Two gradient evaluations a step, no state but scalars.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2
      >>> variant = optax_sam.xsam(rho=0.1, alpha=2.0)
      >>> params = jnp.array([1.0, 1.0])
      >>> state = variant.init(params)
      >>> _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, state=state)
      >>> direction, state = variant.update(grads, state, params)
      >>> print([f"{x:.3f}" for x in direction])
      ['11.003', '0.921']

    References:
      Chen and Zhou, `XSAM <https://arxiv.org/abs/2603.10048>`_, ICLR 2026, after the authors' code without
      its search; directions that are equal or opposite are interpolated linearly.
    """
    _checks.scalar_or_schedule("alpha", alpha)

    def descent(gradients: SAMGradients, state: SAMState, params: optax.Params) -> tuple[optax.Updates, Any]:
        del params
        position = value_at(alpha, state.step)
        clean, perturbed = gradients.clean, gradients.perturbed
        sizes = _tree.norm(clean), _tree.norm(perturbed)
        here, there = _tree.unit(clean), _tree.unit(perturbed)
        # The arc cosine would lose half of the digits of a small angle.
        across = _tree.norm(jax.tree.map(jnp.subtract, there, here))
        along = _tree.norm(jax.tree.map(jnp.add, there, here))
        angle = 2.0 * jnp.arctan2(across, along)
        sine = jnp.sin(angle)
        is_arc = sine > 1e-6
        sine = jnp.where(is_arc, sine, 1.0)
        first = jnp.where(is_arc, jnp.sin((1.0 - position) * angle) / sine, 1.0 - position)
        excess = jnp.where(is_arc, first + jnp.sin(position * angle) / sine - 1.0, 0.0)
        usable = (sizes[0] > 0.0) & (sizes[1] > 0.0) & jnp.isfinite(sizes[0]) & jnp.isfinite(sizes[1])
        ratio = sizes[1] / jnp.where(usable, sizes[0], 1.0)

        def combine(c: jax.Array, p: jax.Array) -> jax.Array:
            # From the perturbed gradient, so that two equal ones give it to the last bit.
            return p + jnp.where(usable, first * (ratio * c - p) + excess * p, 0.0)

        return jax.tree.map(combine, clean, perturbed), state.memory

    return sharpness_aware(rho, ascent, descent)
