"""Schedules of the radius that Optax lacks.

Any Optax schedule is a schedule of the radius too.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from optax_sam import _checks


def warmup(rho: optax.ScalarOrSchedule, steps: int) -> optax.Schedule:
    r"""A radius that grows from 0, in a straight line, for the first steps.

    .. math::
      \rho_t = \rho \min(1, t / \mathrm{steps})

    Early in training, gradients are large and change fast, and a radius that suits later can then stop the
    network from learning at all. The first step, with a radius of 0, is that of the base optimizer.

    Args:
      rho: The radius after the warm-up; >= 0. A schedule is multiplied by the factor.
      steps: How many steps the warm-up takes; >= 1. Begin with 30 % of all steps; a tenth
        to a third is usual.

    Returns:
      A schedule: a function of the step.

    Examples:
      >>> import optax_sam
      >>> rho = optax_sam.schedules.warmup(0.2, 100)
      >>> print([f"{rho(step):.2f}" for step in (0, 25, 100, 500)])
      ['0.00', '0.05', '0.20', '0.20']
      >>> variant = optax_sam.sam(rho)

    References:
      Zhao, Zhang and Hu, `When Will Gradient Regularization Be Harmful?
      <https://arxiv.org/abs/2406.09723>`_, ICML 2024, warms up the strength of a penalty on the gradient's
      norm; the same for the radius.
    """
    _checks.scalar_or_schedule("rho", rho)
    _checks.number("steps", steps, low=1, integer=True)

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        target = rho(step) if callable(rho) else rho
        return jnp.asarray(target) * jnp.minimum(1.0, jnp.asarray(step) / steps)

    return schedule


def rho_from_learning_rate(
    learning_rate: optax.Schedule,
    rho_max: float,
    rho_min: float = 0.0,
    *,
    lr_max: float,
    lr_min: float = 0.0,
    clip: bool = True,
) -> optax.Schedule:
    r"""A radius that follows the learning rate (GSAM).

    .. math::
      \rho_t = \rho_\min + (\rho_\max - \rho_\min)
      \frac{\mathrm{lr}_t - \mathrm{lr}_\min}{\mathrm{lr}_\max - \mathrm{lr}_\min}

    Args:
      learning_rate: The schedule of the learning rate.
      rho_max: The radius at `lr_max`; >= `rho_min`. Also the constant radius if `lr_max == lr_min`.
      rho_min: The radius at `lr_min`; >= 0.
      lr_max: The largest learning rate.
      lr_min: The smallest learning rate, that of the end of training.
      clip: Whether to keep the radius between `rho_min` and `rho_max`. Without, as in the published
        code, a warm-up from below `lr_min` gives a smaller and even a negative radius.

    Returns:
      A schedule: a function of the step.

    Raises:
      TypeError: If `learning_rate` is no schedule, or another argument no number.
      ValueError: If an argument is out of its range.

    Examples:
      >>> import optax, optax_sam
      >>> learning_rate = optax.cosine_decay_schedule(0.1, 100)
      >>> rho = optax_sam.schedules.rho_from_learning_rate(learning_rate, 0.6, 0.1, lr_max=0.1)
      >>> print([f"{rho(step):.2f}" for step in (0, 50, 100)])
      ['0.60', '0.35', '0.10']

    References:
      Zhuang et al., `Surrogate Gap Guided Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.08065>`_, ICLR 2022; clipped, which the published code is not.
    """
    if not callable(learning_rate):
        msg = (
            f"`learning_rate` must be a schedule, a function of the step, got {learning_rate!r}. With a "
            "constant learning rate the radius is constant: write `rho=` as a number."
        )
        raise TypeError(msg)
    _checks.number("rho_min", rho_min, low=0.0)
    _checks.number("rho_max", rho_max, low=rho_min)
    _checks.number("lr_min", lr_min, low=0.0)
    _checks.number("lr_max", lr_max, low=lr_min)

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        if lr_max == lr_min:
            return jnp.asarray(rho_max)
        fraction = (jnp.asarray(learning_rate(step)) - lr_min) / (lr_max - lr_min)
        rho = rho_min + (rho_max - rho_min) * fraction
        return jnp.clip(rho, rho_min, rho_max) if clip else rho

    return schedule
