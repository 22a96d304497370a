"""XSAM: beyond the perturbed gradient on the sphere of directions (Chen, Zhou, ICLR 2026)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_sam import _checks, _tree
from optax_sam import ascent as ascents
from optax_sam._loss import SAMGradients
from optax_sam._state import SAMState
from optax_sam._variant import (
    SharpnessAwareTransformation,
    as_pair,
    constructor,
    sharpness_aware,
    value_at,
)


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
        the step: 0 is the clean direction, 1 SAM. The paper searches the best one in [0, 2] by losses at a
        larger radius, once an epoch, as `xsam_alpha` does. Unless told otherwise it is fixed, at the middle
        of the range beyond SAM.
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
      Chen and Zhou, `XSAM <https://arxiv.org/abs/2603.10048>`_, ICLR 2026, after the authors' code, whose
      search is `xsam_alpha`; directions that are equal or opposite are interpolated linearly.
    """
    _checks.scalar_or_schedule("alpha", alpha)

    def descent(gradients: SAMGradients, state: SAMState, params: optax.Params) -> tuple[optax.Updates, Any]:
        del params
        position = value_at(alpha, state.step)
        return _on_the_arc(gradients.clean, gradients.perturbed, position), state.memory

    return sharpness_aware(rho, ascent, descent)


def _on_the_arc(clean: optax.Updates, perturbed: optax.Updates, position: Any) -> optax.Updates:
    """The direction at a position, 0 along the clean gradient and 1 the perturbed one, as long as this."""
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

    return jax.tree.map(combine, clean, perturbed)


def xsam_alpha(
    loss_fn: Callable[[optax.Params], jax.Array],
    grads: SAMGradients,
    params: optax.Params,
    radius: Any,
    *,
    alpha_max: float = 2.0,
    count: int = 21,
) -> jax.Array:
    r"""Searches the alpha of `xsam`: the direction in which the loss is largest, by forward passes alone.

    .. math:: \alpha = \arg\max_\alpha L\left(w + \rho_\max \frac{u(\alpha)}{\|u(\alpha)\|_2}\right)

    It is for one step in an epoch, between the gradients and the update, which goes in the direction found.
    For that alpha must be in the state, where `optax.inject_hyperparams` holds it.

    Args:
      loss_fn: `params -> loss`, on the batch of the gradients, with the same dropout key. Under
        `jax.shard_map` its mean over the devices, so that all find the same alpha.
      grads: What `sam_value_and_grad` made of this batch for `xsam`.
      params: Where they were taken.
      radius: :math:`\rho_\max`, > 0, or an array. The authors' code takes 0.3, twice its rho.
      alpha_max: Where the search ends; it begins at 0. > 0.
      count: How many values are tried, each a forward pass; an integer >= 2.

    Returns:
      The best alpha. shape=(), float32 or better

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2
      >>> variant = optax_sam.xsam(rho=0.1)
      >>> tx = optax.chain(optax.inject_hyperparams(optax_sam.xsam)(rho=0.1, alpha=1.5), optax.sgd(0.05))
      >>> params = jnp.array([1.0, 1.0])
      >>> state = tx.init(params)
      >>> _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, state=state)
      >>> alpha = optax_sam.xsam_alpha(loss, grads, params, radius=0.3)
      >>> print(f"{alpha:.1f}")
      2.0
      >>> state = optax.tree.set(state, alpha=alpha)
      >>> updates, state = tx.update(grads, state, params)

    References:
      Chen and Zhou, `XSAM <https://arxiv.org/abs/2603.10048>`_, ICLR 2026, after the authors' code, which
      searches on the second batch of every epoch.
    """
    _checks.number("radius", radius, low=0.0, above=True)
    _checks.number("alpha_max", alpha_max, low=0.0, above=True)
    _checks.static_integer("count", count, low=2)
    pair = as_pair(grads, params=params)
    clean, perturbed = _tree.upcast((pair.clean, pair.perturbed))

    def loss_at(alpha: jax.Array) -> jax.Array:
        direction = _tree.unit(_on_the_arc(clean, perturbed, alpha))
        point = _tree.displace(params, jax.tree.map(lambda d: radius * d, direction))
        return _tree.upcast(_checks.value(loss_fn(point)))

    alphas = jnp.linspace(0.0, alpha_max, count, dtype=_tree.common_dtype(params))
    losses = jax.lax.map(loss_at, alphas)
    return alphas[jnp.argmax(jnp.where(jnp.isnan(losses), -jnp.inf, losses))]
