"""SAM: sharpness-aware minimization (Foret, Kleiner, Mobahi, Neyshabur, ICLR 2021)."""

from typing import Any, cast

import jax
import optax

from optax_sam import _checks, _tree
from optax_sam import ascent as ascents
from optax_sam._objective import Evaluation, Objective
from optax_sam._transformation import (
    Evaluate,
    SAMState,
    SharpnessAwareTransformation,
    perturb_once,
    sharpness_aware,
)


def sam(
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    ascent: ascents.Ascent | None = None,
    steps: int = 1,
    step_mode: str = "pgd",
) -> SharpnessAwareTransformation:
    r"""Sharpness-aware minimization.

    Minimizes the largest loss in a ball around params instead of the loss at params, by taking the
    gradient at the point where a linear model of the loss is largest.

    .. math::
      \epsilon = \rho \frac{g}{\|g\|_2}, \quad g = \nabla L(w), \quad u = \nabla L(w + \epsilon)

    Args:
      rho: The radius, >= 0, or a schedule of the step; 0 recovers the base optimizer. 0.05 is the
        usual first try; convolutional networks take 0.02 to 0.2, transformers up to 0.6.
      ascent: The ascent rule; None for `optax_sam.ascent.normalized()`.
      steps: How many ascent steps, >= 1.
      step_mode: What several steps do: "pgd" takes steps of length rho and projects to the ball,
        "split" takes steps of length rho / steps, "free" takes steps of length rho without projection
        (so does `optax.contrib.sam`).

    Returns:
      A sharpness-aware transformation. steps + 1 gradient evaluations a step, no state but scalars.

    Raises:
      TypeError, ValueError: If an argument is not of its kind or out of its range.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2
      >>> sam = optax_sam.sam(rho=0.1)
      >>> params = jnp.array([1.0, 1.0])
      >>> state = sam.init(params)
      >>> _, grads = optax_sam.sam_value_and_grad(loss, sam)(params, state=state)
      >>> direction, state = sam.update(grads, state, params)
      >>> print([f"{x:.4f}" for x in direction])
      ['10.9950', '1.0100']

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving Generalization
      <https://arxiv.org/abs/2010.01412>`_, ICLR 2021, equations 2 and 3; several steps after its
      appendix C.6. As published, with a guard against a zero gradient.
    """
    _checks.number("steps", steps, low=1, integer=True)
    steps = steps if isinstance(cast("Any", steps), jax.Array) else int(steps)
    _checks.choice("step_mode", step_mode, ("pgd", "split", "free"))
    rule = ascents.resolve(ascent)
    return sharpness_aware(rho, evaluate=_climb(rule, steps, step_mode), ascent_only=True)


def _climb(ascent: ascents.Ascent, steps: Any, mode: str) -> Evaluate:
    """One ascent step or several."""
    # Under `optax.inject_hyperparams` the number of steps is an array, in `update`, which does not climb.
    if isinstance(steps, int) and steps == 1:
        return perturb_once(ascent)
    length = getattr(ascent, "length", None)
    if mode == "pgd" and length is None and isinstance(steps, int):
        msg = (
            "`step_mode='pgd'` projects to a ball, and this ascent rule has no norm to measure one. Write "
            "`step_mode='split'` or `'free'`, or give the rule a norm: "
            "`optax_sam.ascent.AscentRule(rule, length)`."
        )
        raise ValueError(msg)

    def evaluate(objective: Objective, params: optax.Params, state: SAMState) -> tuple[Evaluation, Any]:
        stride = state.rho / steps if mode == "split" else state.rho
        clean = objective.ascent_at(params)
        perturbation = ascent(clean.gradient, stride, params)
        for _ in range(steps - 1):
            here = objective.ascent_at(params, perturbation)
            perturbation = optax.tree.add(perturbation, ascent(here.gradient, stride, params))
            if mode == "pgd":
                size = cast("Any", length)(perturbation, params)
                perturbation = _tree.into_ball(perturbation, size, state.rho)
        return objective.combine(clean, objective.at(params, perturbation)), clean.aux

    return evaluate
