"""SAME and SANER: gains on the coordinates that SAM amplifies, shrinks or flips (Luong et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam import _checks
from optax_sam import ascent as ascents
from optax_sam._loss import SAMGradients
from optax_sam._state import SAMState
from optax_sam._variant import (
    SharpnessAwareTransformation,
    constructor,
    rounding,
    sharpness_aware,
    value_at,
)


class RatioClasses(NamedTuple):
    """One entry for each class of the ratio of perturbed to clean gradient, coordinate by coordinate.

    Attributes:
      ckpt1: Same sign, larger: ratio > 1.
      ckpt2: Same sign, smaller: 0 < ratio < 1.
      ckpt3: Flipped and larger: ratio < -1.
      ckpt4: Flipped and smaller: -1 < ratio < 0.
      neutral: One of the two is zero, or they are of the same size.
    """

    ckpt1: Any
    ckpt2: Any
    ckpt3: Any
    ckpt4: Any
    neutral: Any


def ratio_classes(clean: jax.Array, perturbed: jax.Array, tolerance: float = 0.0) -> RatioClasses:
    """Which coordinates of a leaf belong to which class, without a division.

    Args:
      clean: The leaf of the clean gradient.
      perturbed: The leaf of the perturbed gradient.
      tolerance: The relative difference up to which sizes count as the same.

    Returns:
      Booleans in the shape of the leaf.
    """
    along, size = jnp.sign(clean) * perturbed, jnp.abs(clean)
    larger, smaller = (1 + tolerance) * size, (1 - tolerance) * size
    first, second = along > larger, (along > 0) & (along < smaller)
    third, fourth = along < -larger, (along < 0) & (along > -smaller)
    return RatioClasses(first, second, third, fourth, ~(first | second | third | fourth))


Gains = Sequence[optax.ScalarOrSchedule]


def _is_number(gain: Any, number: float) -> bool:
    """Whether it is known before tracing that a gain changes nothing."""
    return isinstance(gain, int | float) and gain == number


@constructor
def same(
    rho: optax.ScalarOrSchedule = 0.05,
    gains: Gains = (1.0, 1.0, 1.0, 1.0),
    *,
    clean_gains: Gains = (0.0, 0.0, 0.0, 0.0),
    ascent: ascents.Ascent | None = None,
) -> SharpnessAwareTransformation:
    r"""SAM with gains on the four classes of coordinates ("checkpoints") of the SAME note.

    Every coordinate belongs to a class by the ratio of its perturbed to its clean gradient: amplified
    (1), shrunk (2), flipped and amplified (3), flipped and shrunk (4); coordinates in none of them, as
    where a gradient is zero, keep the perturbed gradient.

    .. math::
      u = \sum_k M_k \odot (\gamma_k\, g_\epsilon + \beta_k\, g) + M_0 \odot g_\epsilon

    Args:
      rho: The radius, >= 0, or a schedule of the step; 0 recovers the base optimizer.
      gains: The gains :math:`\gamma_k` of the perturbed gradient in the classes 1 to 4, numbers or
        schedules of the step. Ones recover SAM; the note's :math:`g_\epsilon + g_\epsilon \odot M_k` is a
        gain of 2.
      clean_gains: The gains :math:`\beta_k` of the clean gradient in the same classes.
      ascent: The ascent rule; None for `optax_sam.ascent.normalized()`.

    Returns:
      A sharpness-aware transformation. Two gradient evaluations a step, no state but scalars.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 - w[1] ** 2) / 2
      >>> variant = optax_sam.same(rho=0.1, gains=(2, 1, 1, 1))
      >>> params = jnp.array([1.0, 1.0])
      >>> state = variant.init(params)
      >>> _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, state=state)
      >>> direction, state = variant.update(grads, state, params)
      >>> print([f"{p:.3f} -> {d:.3f}" for p, d in zip(grads.perturbed, direction)])
      ['10.995 -> 21.990', '-0.990 -> -0.990']

    References:
      Luong, notes and code of the repository lhchau/sam-hessian, 2024. The classes are restated without
      the division by the gradient, which misplaced coordinates with a gradient near zero.
    """
    _checks.numbers("gains", gains, 4, schedules=True)
    _checks.numbers("clean_gains", clean_gains, 4, schedules=True)
    both = gains, clean_gains
    uses_clean = not all(_is_number(g, 0.0) for g in clean_gains)

    def descent(gradients: SAMGradients, state: SAMState, params: optax.Params) -> tuple[optax.Updates, Any]:
        tolerance = 4 * rounding(gradients, params)
        gain, clean_gain = ([value_at(g, state.step) for g in each] for each in both)

        def pick(classes: RatioClasses, values: Sequence[Any], neutral: float) -> jax.Array:
            picked = jnp.asarray(neutral)
            for members, value in zip(classes[:4], values, strict=True):
                if not _is_number(value, neutral):
                    picked = jnp.where(members, value, picked)
            return picked

        def combine(clean: jax.Array, perturbed: jax.Array) -> jax.Array:
            classes = ratio_classes(clean, perturbed, tolerance)
            direction = pick(classes, gain, 1.0) * perturbed
            return direction + pick(classes, clean_gain, 0.0) * clean if uses_clean else direction

        return jax.tree.map(combine, gradients.clean, gradients.perturbed), state.memory

    return sharpness_aware(rho, ascent, descent)


@constructor
def custom_same(
    rho: optax.ScalarOrSchedule = 0.05, condition: float = 1.25, *, ascent: ascents.Ascent | None = None
) -> SharpnessAwareTransformation:
    r"""CustomSAME: `same` with the gains :math:`(c, 1, 1/c, c)`.

    .. math:: u = c\,g_\epsilon \text{ on classes 1 and 4}, \quad g_\epsilon / c \text{ on class 3}, \quad
      g_\epsilon \text{ elsewhere}

    Kept as the note describes it. On noisy labels it does worse than SAM where it was measured; `saner`
    does better.

    Args:
      rho: The radius, >= 0, or a schedule of the step.
      condition: The factor c, > 0; 1 recovers SAM. The note takes 2, which lost 30 points in one of 12
        cells of docs/tuning.md, and 1.5 lost 12.
      ascent: The ascent rule; None for `optax_sam.ascent.normalized()`.

    Returns:
      A sharpness-aware transformation. Two gradient evaluations a step, no state but scalars.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 - w[1] ** 2) / 2
      >>> variant = optax_sam.custom_same(rho=0.1, condition=3.0)
      >>> params = jnp.array([1.0, 1.0])
      >>> state = variant.init(params)
      >>> _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, state=state)
      >>> direction, state = variant.update(grads, state, params)
      >>> print([f"{x:.3f}" for x in direction])
      ['32.985', '-0.990']

    References:
      Luong, README of the repository lhchau/sam-hessian, July 2024.
    """
    _checks.number("condition", condition, low=0.0, above=True)
    return same(rho, (condition, 1.0, 1.0 / condition, condition), ascent=ascent)


@constructor
def saner(
    rho: optax.ScalarOrSchedule = 0.05,
    keep: optax.ScalarOrSchedule = 0.5,
    *,
    ascent: ascents.Ascent | None = None,
) -> SharpnessAwareTransformation:
    r"""SANER: `same` with the gains :math:`(1, \kappa, 1, 1)`, against the fitting of noisy labels.

    .. math:: u = \kappa\,g_\epsilon \text{ where } 0 < g_\epsilon / g < 1, \quad g_\epsilon \text{ elsewhere}

    Args:
      rho: The radius, >= 0, or a schedule of the step. 0.05 was safe in docs/tuning.md, 0.2 collapsed in 1
        of 6 cells.
      keep: What is kept, :math:`\kappa`, of the coordinates that SAM shrinks: a number >= 0, or a
        schedule of the step, such as the paper's linear one from 1 in the first quarter of training.
        1 recovers SAM; 0 makes training unstable.
      ascent: The ascent rule; None for `optax_sam.ascent.normalized()`.

    Returns:
      A sharpness-aware transformation. Two gradient evaluations a step, no state but scalars.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 - w[1] ** 2) / 2
      >>> variant = optax_sam.saner(rho=0.1, keep=0.5)
      >>> params = jnp.array([1.0, 1.0])
      >>> state = variant.init(params)
      >>> _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, state=state)
      >>> direction, state = variant.update(grads, state, params)
      >>> print([f"{p:.3f} -> {d:.3f}" for p, d in zip(grads.perturbed, direction)])
      ['10.995 -> 10.995', '-0.990 -> -0.495']

    References:
      Luong et al., SANER, `arXiv:2411.17132 <https://arxiv.org/abs/2411.17132>`_, AISTATS 2026. `keep` is
      the factor that stays, as in the published code, where the paper's alpha is what goes.
    """
    _checks.scalar_or_schedule("keep", keep)
    return same(rho, (1.0, keep, 1.0, 1.0), ascent=ascent)
