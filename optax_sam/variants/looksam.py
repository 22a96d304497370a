"""LookSAM: sharpness-aware minimization every k-th step (Liu, Mai, Chen, Hsieh, You, CVPR 2022)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam import _checks, _tree
from optax_sam import ascent as ascents
from optax_sam._objective import Evaluation, Objective, SAMGradients
from optax_sam._transformation import SAMState, SharpnessAwareTransformation, sharpness_aware


class LookSAMMemory(NamedTuple):
    """What LookSAM remembers.

    Attributes:
      direction: The part of the last perturbed gradient that was orthogonal to the clean one, divided by
        its norm plus eps. A pytree like params, in float32 or better.
    """

    direction: optax.Updates


def looksam(
    rho: optax.ScalarOrSchedule = 0.1,
    k: int = 10,
    alpha: float = 0.7,
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
        however small the true one was: the larger k, the more it pays to tune it.
      per_leaf: Decompose and rescale every leaf on its own, as widespread PyTorch ports do, instead of
        the whole gradient, as the paper does.
      ascent: The ascent rule; None for `optax_sam.ascent.normalized()`; with
        `optax_sam.ascent.layerwise()` this is Look-LayerSAM.
      eps: Added to the norm of the reused part; >= 0.

    Returns:
      A sharpness-aware transformation. 1 + 1/k gradient evaluations a step on average (the second is
      skipped by `jax.lax.cond`; under a `vmap` over states both are computed), one copy of the params as
      state. In a step without perturbation the pair holds the clean gradient twice.

    Raises:
      TypeError, ValueError: If an argument is not of its kind or out of its range.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2
      >>> looksam = optax_sam.looksam(rho=0.1, k=2)
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
    rule = ascents.resolve(ascent)

    def evaluate(objective: Objective, params: optax.Params, state: SAMState) -> tuple[Evaluation, Any]:
        clean = objective.ascent_at(params)

        def refresh() -> Evaluation:
            perturbation = rule(clean.gradient, state.rho, params)
            return objective.combine(clean, objective.at(params, perturbation))

        def reuse() -> Evaluation:
            return objective.combine(clean, None)

        # The step is the same on all devices, so all of them take the same branch.
        evaluation = _tree.branch(state.step % k == 0, refresh, reuse)
        return objective.beside(evaluation, clean), clean.aux

    def correction(clean: Any, perturbed: Any, length: jax.Array) -> Any:
        length = jnp.where(length > 0.0, length, jnp.ones_like(length))
        # Not `_tree.reject`: the norm is known, and rounding noise is dealt with below. In units of that
        # norm, in which the perturbed gradient, too, is of the order of one, so that nothing has to be
        # guarded. A single leaf may be far from that.
        inverse = 1.0 / length
        unit = jax.tree.map(lambda c: c * inverse, clean)
        along = _tree.dot(perturbed, unit) * inverse
        rest = jax.tree.map(lambda p, d: p * inverse - along * d, perturbed, unit)
        size = (_tree.norm if per_leaf else _tree.plain_norm)(rest)
        # What is left of parallel gradients is rounding noise, which must not be scaled up.
        is_noise = size <= 16 * jnp.finfo(size.dtype).eps * jnp.abs(along)
        factor = jnp.where(is_noise, 0.0, length / (length * jnp.where(is_noise, 1.0, size) + eps))
        return jax.tree.map(lambda r: factor * r, rest)

    def by_part(function: Any, *trees: Any) -> Any:
        return jax.tree.map(function, *trees) if per_leaf else function(*trees)

    def descent(gradients: SAMGradients, state: SAMState, params: optax.Params) -> tuple[optax.Updates, Any]:
        del params
        clean, perturbed, _ = gradients
        old = state.memory.direction
        is_due = state.step % k == 0
        lengths = by_part(_tree.norm, clean)

        def refresh() -> optax.Updates:
            return _tree.keep_finite(by_part(correction, clean, perturbed, lengths), old)

        # The direction is made of what comes out here, which in a step that reuses is `old`, and not of `old`
        # itself: the new memory may then be written over the old one, where else both would be kept.
        memory = _tree.branch(is_due, refresh, lambda: old)

        def correct(gradient: Any, unit: Any, length: jax.Array) -> Any:
            weight = jnp.where(is_due, 0.0, alpha * length)
            return jax.tree.map(lambda g, d: g + weight * d, gradient, unit)

        # In a step that reuses the memory the perturbed gradient is the clean one.
        return by_part(correct, perturbed, memory, lengths), LookSAMMemory(memory)

    def init_memory(params: optax.Params) -> LookSAMMemory:
        return LookSAMMemory(_tree.zeros_like(params))

    return sharpness_aware(rho, None, descent, init_memory, evaluate=evaluate, keeps_memory=True)
