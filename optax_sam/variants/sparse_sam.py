"""SSAM-F and SSAM-D: sparse perturbations, whose masks refresh themselves (Mi et al., NeurIPS 2022)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam import _checks, _tree
from optax_sam import ascent as ascents
from optax_sam._loss import SAMGradients, serializable
from optax_sam._state import SAMState
from optax_sam._variant import Climb, SharpnessAwareTransformation, constructor, sharpness_aware, value_at


@serializable
class SSAMFMemory(NamedTuple):
    """What SSAM-F remembers.

    Attributes:
      mask: Which entries are perturbed; none before the first refresh. A pytree like params, of booleans.
      squares: The sum of the squared clean gradients since the last refresh. A pytree like params, in float32
        or better.
    """

    mask: Any
    squares: optax.Updates


@serializable
class SSAMDMemory(NamedTuple):
    """What SSAM-D remembers.

    Attributes:
      mask: Which entries are perturbed; none before the first refresh. A pytree like params, of booleans.
    """

    mask: Any


def _no_mask(params: optax.Params) -> Any:
    return jax.tree.map(lambda w: jnp.zeros_like(w, dtype=bool), params)


def _climb(ascent: ascents.Ascent | None) -> Climb:
    """The perturbation of a rule where the mask is true; the rule sees the whole gradient."""
    rule = ascents.resolve(ascent)

    def climb(gradient: optax.Updates, state: SAMState, params: optax.Params) -> optax.Updates:
        whole = ascents.at_step(rule, state.step)(gradient, state.rho, params)
        return jax.tree.map(lambda m, e: jnp.where(m, e, jnp.zeros_like(e)), state.memory.mask, whole)

    return climb


def _check(sparsity: float, every: int) -> None:
    _checks.number("sparsity", sparsity, low=0.0, high=1.0, below=True)
    _checks.number("every", every, low=1, integer=True)


@constructor
def ssam_f(
    rho: optax.ScalarOrSchedule = 0.05,
    sparsity: float = 0.5,
    every: int = 100,
    *,
    ascent: ascents.Ascent | None = None,
) -> SharpnessAwareTransformation:
    r"""Sparse SAM by Fisher information: perturbs the entries with the largest squared gradients.

    .. math::
      \epsilon_t = \rho\, m_t \odot \frac{g_t}{\|g_t\|_2}, \quad u_t = \nabla L(w_t + \epsilon_t), \quad
      m_{t+1} = \left[\, F \text{ is among its } (1 - s) n \text{ largest entries} \,\right], \quad
      F = \sum_{\tau} g_\tau^2

    The mask is found anew every so many steps, from the gradients since the last time. The perturbation is
    shorter than rho, as the norm is that of the whole gradient.

    Args:
      rho: The radius, >= 0, or a schedule of the step; 0 recovers the base optimizer. The authors'
        commands take 0.1 on CIFAR-10 and 0.7 on ImageNet, their default is 0.05.
      sparsity: The part s of the entries that is not perturbed, in [0, 1); 0 is SAM from the second step on.
      every: After which steps the mask is found anew, an integer >= 1: after the first, and then after each
        multiple of it. The first step is a plain one. The authors' code counts epochs: 5, and in its
        commands 1.
      ascent: The ascent rule, which sees the whole gradient; None for `optax_sam.ascent.normalized()`.

    Returns:
      A sharpness-aware transformation. Two gradient evaluations a step; one copy of the params and one byte
      for each entry as state. The perturbed gradient is computed whole, so that no time is saved.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2
      >>> variant = optax_sam.ssam_f(rho=0.1, sparsity=0.5)
      >>> tx = optax.chain(variant, optax.sgd(0.05))
      >>> params = jnp.array([1.0, 1.0])
      >>> state = tx.init(params)
      >>> for _ in range(2):  # A plain step, then one that perturbs the coordinate of the large gradient.
      ...     _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, state=state)
      ...     print([f"{p - c:.3f}" for p, c in zip(grads.perturbed, grads.clean)])
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      ['0.000', '0.000']
      ['0.982', '0.000']

    References:
      Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach
      <https://arxiv.org/abs/2210.05177>`_, NeurIPS 2022, after the authors' code. There F is the sum of the
      squared gradients of single examples, for which each refresh reads the data again; here it is that of
      the gradients of batches, which the steps have anyway. Where gradients are mostly noise, both are the
      diagonal of the empirical Fisher information but for a factor.
    """
    _check(sparsity, every)

    def descent(gradients: SAMGradients, state: SAMState, params: optax.Params) -> tuple[optax.Updates, Any]:
        del params
        before: SSAMFMemory = state.memory
        squares = jax.tree.map(lambda s, g: s + g * g, before.squares, gradients.clean)
        squares = _tree.keep_finite(squares, before.squares)

        def refreshed() -> SSAMFMemory:
            smallest = _tree.smallest(squares, _tree.count_of(squares, sparsity))
            return SSAMFMemory(jax.tree.map(jnp.logical_not, smallest), _tree.zeros_like(squares))

        is_due = (state.step % every == 0) | _is_empty(before.mask)
        is_known = _tree.squared_norm(squares) > 0.0  # Not after bad batches alone.
        memory = _tree.cond_or_if(is_due & is_known, refreshed, lambda: SSAMFMemory(before.mask, squares))
        return gradients.perturbed, memory

    def init_memory(params: optax.Params) -> SSAMFMemory:
        return SSAMFMemory(_no_mask(params), _tree.zeros_like(params))

    return sharpness_aware(rho, None, descent, init_memory, climb=_climb(ascent), ascent_only=True)


@constructor
def ssam_d(
    rho: optax.ScalarOrSchedule = 0.05,
    sparsity: float = 0.5,
    every: int = 100,
    *,
    drop: optax.ScalarOrSchedule = 0.5,
    key: Any = None,
    ascent: ascents.Ascent | None = None,
) -> SharpnessAwareTransformation:
    r"""Sparse SAM by dynamic sparse training: drops entries with small gradients, and draws others.

    .. math::
      \epsilon_t = \rho\, m_t \odot \frac{g_t}{\|g_t\|_2}, \quad u_t = \nabla L(w_t + \epsilon_t)

    Every so many steps a part d of the entries in the mask leaves it, those with the smallest :math:`|g_t|`,
    and as many that were not in it are drawn to replace them.

    Args:
      rho: The radius, >= 0, or a schedule of the step; 0 recovers the base optimizer. 0.05 is the
        default of the authors' code.
      sparsity: The part of the entries that is not perturbed, in [0, 1); 0 is SAM from the second step on.
      every: After which steps the mask changes, an integer >= 1: after the first, which is a plain one and
        draws it, and then after each multiple of it. The authors' code counts epochs: 5.
      drop: d, in [0, 1], or a schedule of the step: `optax.cosine_decay_schedule(0.5, steps)` as the authors.
      key: The seed of the draws, an integer or a random key, typed or raw; None for 0. Under
        `optax.inject_hyperparams` name it in `static_args`.
      ascent: The ascent rule, which sees the whole gradient; None for `optax_sam.ascent.normalized()`.

    Returns:
      A sharpness-aware transformation. Two gradient evaluations a step, one byte for each entry as state. The
      perturbed gradient is computed whole, so that no time is saved.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> variant = optax_sam.ssam_d(rho=0.1, sparsity=0.75, every=1)
      >>> gradient = params = jnp.arange(1.0, 9.0)
      >>> state = variant.init(params)
      >>> for _ in range(3):  # Of two entries that with the larger gradient stays.
      ...     _, state = variant.update(optax_sam.SAMGradients(gradient, gradient), state, params)
      ...     print([i for i in range(8) if state.memory.mask[i]])
      [5, 6]
      [2, 6]
      [0, 6]

    References:
      Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach
      <https://arxiv.org/abs/2210.05177>`_, NeurIPS 2022, after the authors' code, which draws the first mask
      before the first step.
    """
    _check(sparsity, every)
    _checks.scalar_or_schedule("drop", drop, high=1.0)
    seed = _checks.key("key", 0 if key is None else key)

    def refresh(gradient: optax.Updates, state: SAMState) -> SSAMDMemory:
        mask = state.memory.mask
        total, outside = _tree.count_of(mask, 1.0), _tree.count_of(mask, sparsity)
        live = total - outside
        dropped = jnp.floor(value_at(drop, state.step) * live).astype(live.dtype)
        # What is not in the mask has the smallest size of all, zero.
        sizes = jax.tree.map(lambda m, g: jnp.where(m, jnp.maximum(jnp.abs(g), 1e-30), 0.0), mask, gradient)
        small = _tree.smallest(sizes, outside + dropped)
        kept = jax.tree.map(jnp.logical_not, small)
        missing = live - _tree.count_true(kept, live.dtype)
        draws = optax.tree.random_like(jax.random.fold_in(seed, state.step), gradient, jax.random.uniform)

        def lot(m: jax.Array, k: jax.Array, x: jax.Array) -> jax.Array:
            # Those that were not in the mask come first. Those that left it come only where these are too
            # few: gradients that are exactly zero tie, and all of them leave.
            return jnp.where(k, 0.0, jnp.where(m, 1.0, 2.0) - x)

        rest = _tree.smallest(jax.tree.map(lot, mask, kept, draws), total - missing)
        return SSAMDMemory(jax.tree.map(lambda k, r: k | ~r, kept, rest))

    def descent(gradients: SAMGradients, state: SAMState, params: optax.Params) -> tuple[optax.Updates, Any]:
        del params
        is_due = (state.step % every == 0) | _is_empty(state.memory.mask)
        memory = _tree.cond_or_if(
            is_due & _tree.all_finite(gradients.clean),
            lambda: refresh(gradients.clean, state),
            lambda: state.memory,
        )
        return gradients.perturbed, memory

    def init_memory(params: optax.Params) -> SSAMDMemory:
        return SSAMDMemory(_no_mask(params))

    return sharpness_aware(rho, None, descent, init_memory, climb=_climb(ascent), ascent_only=True)


def _is_empty(mask: Any) -> jax.Array:
    """Whether nothing is perturbed: no mask was drawn yet."""
    return ~jnp.any(jnp.stack([jnp.any(m) for m in jax.tree.leaves(mask)] or [jnp.zeros((), bool)]))
