"""LookSAM: sharpness-aware minimization every k-th step (Liu, Mai, Chen, Hsieh, You, CVPR 2022)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam import _checks, _tree
from optax_sam import ascent as ascents
from optax_sam._loss import SAMGradients, serializable
from optax_sam._state import SAMState
from optax_sam._variant import SharpnessAwareTransformation, constructor, rounding, sharpness_aware


@serializable
class LookSAMMemory(NamedTuple):
    """What LookSAM remembers.

    Attributes:
      orthogonal: The part g_v of the last perturbed gradient that was orthogonal to the clean one. A pytree
        like params, in float32 or better.
      length: Its norm, or 0 if it was no more than rounding and nothing is reused. shape=(); with `per_leaf`
        a pytree like params of such scalars.
    """

    orthogonal: optax.Updates
    length: Any


@constructor
def looksam(
    rho: optax.ScalarOrSchedule = 0.1,
    k: int = 10,
    alpha: float = 0.1,
    *,
    per_leaf: bool = False,
    ascent: ascents.Ascent | None = None,
    eps: float = 1e-8,
) -> SharpnessAwareTransformation:
    r"""SAM every k-th step; in between, the clean gradient and a reused correction.

    The part of the perturbed gradient that is orthogonal to the clean one changes slowly. It is kept
    and, scaled to the current gradient, stands in for SAM's correction while the second gradient
    evaluation is skipped.

    .. math::
      t \bmod k = 0:\; u = g_\epsilon, \quad
      g_v = g_\epsilon - \frac{\langle g_\epsilon, g \rangle}{\|g\|_2^2} g; \qquad
      \text{else:}\; u = g + \alpha \frac{\|g\|_2}{\|g_v\|_2 + \mathrm{eps}} g_v

    Args:
      rho: The radius, >= 0, or a schedule of the step.
      k: The period, an integer >= 1; 1 recovers SAM.
      alpha: Weight of the reused part, >= 0. The correction has norm alpha times that of the gradient
        however small the true one was, so that alpha decides what is safe and a smaller rho does not help.
        The paper takes 0.7, which collapsed in 3 of 6 cells of docs/tuning.md with k 5 and 10, and lost 22
        points in one with k 2. It suits networks that were tuned to it.
      per_leaf: Decompose and rescale every leaf on its own, as widespread PyTorch ports do, instead of
        the whole gradient, as the paper does.
      ascent: The ascent rule; None for `optax_sam.ascent.normalized()`; with
        `optax_sam.ascent.layerwise()` this is Look-LayerSAM.
      eps: Added to the norm of the reused part; >= 0.

    Returns:
      A sharpness-aware transformation. 1 + 1/k gradient evaluations a step on average (the second is
      skipped by `jax.lax.cond`; under a `vmap` over states both are computed), one copy of the params as
      state. In a step without perturbation the pair holds the clean gradient twice.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2
      >>> looksam = optax_sam.looksam(rho=0.1, k=2, alpha=0.7)
      >>> tx = optax.chain(looksam, optax.sgd(0.05))
      >>> params = jnp.array([1.0, 1.0])
      >>> state = tx.init(params)
      >>> for _ in range(2):  # A SAM step, then a step that reuses its correction.
      ...     _, grads = optax_sam.sam_value_and_grad(loss, looksam)(params, state=state)
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print([f"{x:.4f}" for x in params])
      ['0.4502', '0.9495']
      ['0.2091', '1.0623']

    References:
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.02714>`_, CVPR 2022; `eps` after the ports, no official code is known.
    """
    _checks.number("k", k, low=1, integer=True)
    _checks.number("alpha", alpha, low=0.0)
    _checks.number("eps", eps, low=0.0)

    def is_due(state: SAMState) -> jax.Array:
        return state.step % k == 0

    def by_part(function: Any, *trees: Any) -> Any:
        return jax.tree.map(function, *trees) if per_leaf else function(*trees)

    def descent(gradients: SAMGradients, state: SAMState, params: optax.Params) -> tuple[optax.Updates, Any]:
        clean, perturbed = gradients.clean, gradients.perturbed
        noise = 4 * rounding(gradients, params)
        sizes = by_part(_tree.norm, clean)
        orthogonal = by_part(_tree.reject, perturbed, clean)
        lengths = by_part(_tree.norm, orthogonal)
        usable = by_part(lambda length, size: jnp.where(length > noise * size, length, 0.0), lengths, sizes)
        # A gradient that is not finite leaves the memory as it was.
        fresh = is_due(state) & jnp.isfinite(sum(jax.tree.leaves(lengths)))
        new = LookSAMMemory(orthogonal, usable)
        memory = _tree.cast_like(_tree.select(fresh, new, state.memory), state.memory)

        def correct(gradient: Any, part: Any, length: jax.Array, size: jax.Array) -> Any:
            reuses = ~is_due(state) & (length > 0.0) & jnp.isfinite(size)
            weight = jnp.where(reuses, alpha * size / (jnp.where(reuses, length, 1.0) + eps), 0.0)
            return jax.tree.map(lambda g, v: g + weight * v, gradient, part)

        # In a step that reuses the memory the perturbed gradient is the clean one.
        return by_part(correct, perturbed, *state.memory, sizes), memory

    def init_memory(params: optax.Params) -> LookSAMMemory:
        zeros = _tree.zeros_like(params)
        return LookSAMMemory(zeros, by_part(_tree.norm, zeros))

    return sharpness_aware(rho, ascent, descent, init_memory, when=is_due, guards_memory=True)
