"""WSAM: weighted sharpness-aware minimization (Yue et al., KDD 2023)."""

from __future__ import annotations

from typing import Any

import jax
import optax

from optax_sam import _checks, _tree
from optax_sam import ascent as ascents
from optax_sam._loss import SAMGradients
from optax_sam._state import SAMState
from optax_sam._variant import SharpnessAwareTransformation, constructor, sharpness_aware, value_at


def _weight(gamma: Any, alpha: Any, default: float) -> optax.ScalarOrSchedule:
    """The weight of the sharpness term from either of its two names, or from the default of gamma."""
    if alpha is not None:
        if gamma is not None:
            msg = (
                "`gamma` and `alpha` are two names of one weight, alpha = gamma / (1 - gamma): give one of "
                f"them, got gamma={gamma!r} and alpha={alpha!r}."
            )
            raise ValueError(msg)
        _checks.scalar_or_schedule("alpha", alpha)
        return alpha
    gamma = default if gamma is None else gamma
    _checks.number("gamma", gamma, low=0.0, high=1.0, below=True)
    return gamma / (1.0 - gamma)


@constructor
def wsam(
    rho: optax.ScalarOrSchedule = 0.05,
    gamma: float | None = None,
    *,
    alpha: optax.ScalarOrSchedule | None = None,
    ascent: ascents.Ascent | None = None,
) -> SharpnessAwareTransformation:
    r"""Weighted sharpness-aware minimization, coupled: the sharpness term goes through the base optimizer.

    Minimizes the loss plus a weighted sharpness. SAM is the case of weight one.

    .. math:: u = g + \alpha\,(g_\epsilon - g), \quad \alpha = \frac{\gamma}{1 - \gamma}

    Args:
      rho: The radius, >= 0, or a schedule of the step; 0 recovers the base optimizer.
      gamma: The weight, in [0, 1): 0 recovers the base optimizer, 1/2 SAM. None: 0.6 (alpha 1.5), unless
        alpha is given. The paper takes 0.9, a ninefold weight: with rho 0.05 it collapsed
        in 3 of 12 cells of docs/tuning.md, and 0.8 in 1 of 6. Both need a smaller rho, of 0.0125 to 0.02.
      alpha: The weight as a factor, >= 0, or a schedule of the step; instead of gamma. 0.5 together
        with `ascent=optax_sam.ascent.extrapolated(...)` is SAGM.
      ascent: The ascent rule; None for `optax_sam.ascent.normalized()`.

    Returns:
      A sharpness-aware transformation. Two gradient evaluations a step, no state but scalars.

    Raises:
      ValueError: If gamma and alpha are both given.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2
      >>> wsam = optax_sam.wsam(rho=0.1, gamma=0.9)
      >>> params = jnp.array([1.0, 1.0])
      >>> state = wsam.init(params)
      >>> _, grads = optax_sam.sam_value_and_grad(loss, wsam)(params, state=state)
      >>> direction, state = wsam.update(grads, state, params)
      >>> print([f"{x:.4f}" for x in direction])
      ['18.9553', '1.0896']

    References:
      Yue et al., `Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term
      <https://arxiv.org/abs/2305.15817>`_, KDD 2023, without the optional clipping of its code.
    """
    weight = _weight(gamma, alpha, default=0.6)

    def descent(gradients: SAMGradients, state: SAMState, params: optax.Params) -> tuple[optax.Updates, Any]:
        del params
        factor = value_at(weight, state.step)
        direction = jax.tree.map(lambda c, p: c + factor * (p - c), gradients.clean, gradients.perturbed)
        return direction, state.memory

    return sharpness_aware(rho, ascent, descent)


@constructor
def decoupled_wsam(
    base_optimizer: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    rho: optax.ScalarOrSchedule = 0.05,
    gamma: float | None = None,
    *,
    alpha: optax.ScalarOrSchedule | None = None,
    ascent: ascents.Ascent | None = None,
) -> SharpnessAwareTransformation:
    r"""Weighted sharpness-aware minimization, decoupled: a whole optimizer, after which no other may come.

    The base optimizer sees the clean gradient; the sharpness term bypasses its momentum, its
    preconditioner and its weight decay.

    .. math:: \Delta w = \mathrm{base}(g) - \eta\,\alpha\,(g_\epsilon - g), \quad
      \alpha = \frac{\gamma}{1 - \gamma}

    .. warning::
      What it returns are updates, signs and learning rate included: `optax.chain(decoupled_wsam(...),
      optax.adamw(...))` is wrong. `sam_value_and_grad` refuses it where the state shows another optimizer;
      a single link without a state, such as `optax.scale(-0.1)`, looks like a clip. And beside an adaptive
      base optimizer the term is not scaled down by its preconditioner: steps can be many times the learning
      rate.

    Args:
      base_optimizer: The optimizer of the clean gradient, its own learning rate included.
      learning_rate: That learning rate again, :math:`\eta`, >= 0 or a schedule of the step, for the
        sharpness term.
      rho: The radius, >= 0, or a schedule of the step; 0 recovers the base optimizer.
      gamma: The weight, in [0, 1). None: 0.8 (alpha 4), unless alpha is given. The paper takes 0.9, which
        lost 7 points in one of 12 cells of docs/tuning.md. `wsam` needs less, because a momentum of 0.9
        multiplies its sharpness term tenfold.
      alpha: The weight as a factor, >= 0, or a schedule of the step; instead of gamma.
      ascent: The ascent rule; None for `optax_sam.ascent.normalized()`.

    Returns:
      A sharpness-aware transformation that is an optimizer. Two gradient evaluations a step, the state
      of the base optimizer.

    Raises:
      ValueError: If gamma and alpha are both given.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2
      >>> tx = optax_sam.decoupled_wsam(optax.sgd(0.05, momentum=0.9), 0.05, rho=0.1, gamma=0.9)
      >>> params = jnp.array([1.0, 1.0])
      >>> state = tx.init(params)
      >>> _, grads = optax_sam.sam_value_and_grad(loss, tx)(params, state=state)
      >>> updates, state = tx.update(grads, state, params)
      >>> print([f"{x:.4f}" for x in optax.apply_updates(params, updates)])
      ['0.0522', '0.9455']

    References:
      Yue et al., `Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term
      <https://arxiv.org/abs/2305.15817>`_, KDD 2023, without the optional clipping of its code.
    """
    _checks.optimizer("base_optimizer", base_optimizer)
    _checks.scalar_or_schedule("learning_rate", learning_rate)
    weight = _weight(gamma, alpha, default=0.8)
    base = optax.with_extra_args_support(base_optimizer)

    def descent(
        gradients: SAMGradients, state: SAMState, params: optax.Params | None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        # The base optimizer gets the gradient in the dtypes in which its state was made.
        clean = _tree.cast_like(gradients.clean, gradients.clean if params is None else params)
        updates, memory = base.update(clean, state.memory, params, **extra_args)
        rate: Any = value_at(learning_rate, state.step)
        factor: Any = rate * value_at(weight, state.step)
        return jax.tree.map(
            lambda u, c, p: u - factor * (p - c), updates, gradients.clean, gradients.perturbed
        ), memory

    return sharpness_aware(
        rho,
        ascent,
        descent,
        base.init,
        is_optimizer=True,
        # Behind a gate a schedule would count open steps, and that of the base optimizer all steps.
        has_plain_step=not callable(learning_rate),
    )
