"""SAM: sharpness-aware minimization (Foret, Kleiner, Mobahi, Neyshabur, ICLR 2021)."""

from __future__ import annotations

from typing import Any, Literal, cast

import optax

from optax_sam import _checks, _tree
from optax_sam import ascent as ascents
from optax_sam._loss import Evaluation, Loss
from optax_sam._state import SAMState
from optax_sam._variant import Evaluate, SharpnessAwareTransformation, constructor, sharpness_aware

StepMode = Literal["pgd", "split", "free"]
"""What several ascent steps do."""


@constructor
def sam(
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    ascent: ascents.Ascent | None = None,
    steps: int | None = None,
    step_mode: StepMode = "pgd",
) -> SharpnessAwareTransformation:
    r"""Sharpness-aware minimization.

    Minimizes the largest loss in a ball around params instead of the loss at params, by taking the
    gradient at the point where a linear model of the loss is largest.

    .. math::
      \epsilon = \rho \frac{g}{\|g\|_2}, \quad g = \nabla L(w), \quad u = \nabla L(w + \epsilon)

    Args:
      rho: The radius, >= 0, or a schedule of the step; 0 recovers the base optimizer. 0.05 is
        cautious; docs/tuning.md begins with a warm-up to 0.1. On its images up to 0.1 was safe everywhere;
        0.2 often did better, and lost 15 points on a network with BatchNorm at a large learning rate.
      ascent: The ascent rule; None for `optax_sam.ascent.normalized()`.
      steps: How many ascent steps, >= 1; None for one. Under `optax.inject_hyperparams` name it in
        `static_args`.
      step_mode: What several steps do: "pgd" takes steps of length rho and projects to the ball,
        "split" takes steps of length rho / steps, "free" takes steps of length rho without projection
        (so does `optax.contrib.sam`).

    Returns:
      A sharpness-aware transformation. steps + 1 gradient evaluations a step, no state but scalars.

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
    _checks.choice("step_mode", step_mode, ("pgd", "split", "free"))
    steps = 1 if steps is None else steps
    _checks.static_integer("steps", steps, low=1)
    rule = ascents.resolve(ascent)
    if steps == 1:
        return sharpness_aware(rho, rule)
    return sharpness_aware(rho, evaluate=_several_steps(rule, steps, step_mode), ascent_only=True)


def _several_steps(ascent: ascents.Ascent, steps: int, mode: StepMode) -> Evaluate:
    length = getattr(ascent, "length", None)
    if mode == "pgd" and length is None:
        msg = (
            "`step_mode='pgd'` projects to a ball, and this ascent rule has no norm to measure one. Write "
            "`step_mode='split'` or `'free'`, or give the rule a norm: "
            "`optax_sam.ascent.AscentRule(rule, length)`."
        )
        raise ValueError(msg)

    def evaluate(loss: Loss, state: SAMState) -> Evaluation:
        rule = ascents.at_step(ascent, state.step)
        stride = state.rho / steps if mode == "split" else state.rho
        clean = loss.ascent()
        perturbation = rule(_tree.upcast(clean.gradient), stride, loss.params)
        for _ in range(steps - 1):
            here = _tree.upcast(loss.ascent(perturbation).gradient)
            perturbation = optax.tree.add(perturbation, rule(here, stride, loss.params))
            if mode == "pgd":
                size = cast("Any", length)(perturbation, loss.params)
                perturbation = _tree.into_ball(perturbation, size, state.rho)
        return loss.pair(clean, loss.at(perturbation))

    return evaluate
