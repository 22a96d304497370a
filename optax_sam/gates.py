"""Gates: in which steps a variant pays for its second gradient. Between them a step is a plain one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam import _checks, _tree
from optax_sam._loss import Evaluation, Loss, MadeBy, SAMGradients, serializable
from optax_sam._state import SAMState
from optax_sam._variant import (
    SharpnessAwareTransformation,
    checked_evaluation,
    sharpness_aware,
    value_at,
)


class Now(NamedTuple):
    """What a gate decides by.

    Attributes:
      step: The step of the training. shape=(), dtype=int32
      rho: The radius in force. shape=()
      squared_norm: The squared norm of the clean gradient, alike on all devices and shards; None for a gate
        that does not ask for it. shape=()
    """

    step: jax.Array
    rho: jax.Array
    squared_norm: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Gate:
    """Decides whether a step pays for the second gradient.

    Gates combine: `a & b` is open where both are, `a | b` where one is, `~a` where `a` is shut.

    Attributes:
      decide: `(now, memory) -> (is_open, memory)`: a boolean scalar, and what the gate remembers for the next
        step. It is asked once a step, whether the gate is open or not, and must not draw on anything that
        differs between devices.
      init: `() -> memory`: scalars in a pytree; the default remembers nothing.
      by_gradient: Whether it asks for `now.squared_norm`.
      name: What it is called in messages.

    Examples:
      A gate of your own, open in the first step of every ten and in the one after it:

      >>> import optax_sam
      >>> two_of_ten = optax_sam.gates.Gate(lambda now, memory: (now.step % 10 < 2, memory), name="two")
      >>> two_of_ten | optax_sam.gates.window(0, 100)
      (two | window(0, 100))
    """

    decide: Callable[[Now, Any], tuple[jax.Array, Any]]
    init: Callable[[], Any] = tuple
    by_gradient: bool = False
    name: str = "a gate"

    def __repr__(self) -> str:
        """The call that makes it."""
        return self.name

    def __and__(self, other: Gate) -> Gate:
        """Open where both are."""
        return _combined(self, other, jnp.logical_and, "&")

    def __or__(self, other: Gate) -> Gate:
        """Open where one of them is."""
        return _combined(self, other, jnp.logical_or, "|")

    def __invert__(self) -> Gate:
        """Open where this one is shut."""

        def decide(now: Now, memory: Any) -> tuple[jax.Array, Any]:
            is_open, memory = self.decide(now, memory)
            return ~is_open, memory

        return dataclasses.replace(self, decide=decide, name=f"~{self.name}")


def _combined(a: Gate, b: Gate, operation: Callable[..., jax.Array], sign: str) -> Gate:
    _check_gate(b)

    def decide(now: Now, memory: Any) -> tuple[jax.Array, Any]:
        first, of_a = a.decide(now, memory[0])
        second, of_b = b.decide(now, memory[1])
        return operation(first, second), (of_a, of_b)

    return Gate(
        decide, lambda: (a.init(), b.init()), a.by_gradient or b.by_gradient, f"({a.name} {sign} {b.name})"
    )


def _name_of(value: optax.ScalarOrSchedule) -> str:
    """A number, or that it is a schedule: two that do the same are different objects."""
    return "<schedule>" if callable(value) else str(value)


def _check_gate(gate: Any) -> None:
    if not isinstance(gate, Gate):
        msg = (
            f"A gate must be one of `optax_sam.gates`, such as `optax_sam.gates.every(5)`, got {gate!r} of "
            f"type {type(gate).__name__}."
        )
        raise TypeError(msg)


def every(k: int) -> Gate:
    r"""Open every k-th step, the first one included: where :math:`t \bmod k = 0`.

    A step costs 1 + 1/k gradients on average. On digits with wrong labels the best radius grew with k
    (docs/guides/cheaper_than_sam.md): start at k times the radius that you take in every step,
    and watch for a collapse.

    Args:
      k: The period, an integer >= 1.

    Returns:
      The gate.

    Raises:
      TypeError, ValueError: If `k` is no integer >= 1.

    Examples:
      >>> import optax_sam
      >>> variant = optax_sam.gated(optax_sam.sam(0.5), optax_sam.gates.every(10))

    References:
      The `interval` of SAM in `Composer <https://github.com/mosaicml/composer>`_, whose radius is 10 times
      as large for an interval of 10.
    """
    _checks.number("k", k, low=1, integer=True)
    return Gate(lambda now, memory: (now.step % k == 0, memory), name=f"every({k})")


def window(start: int, stop: int | None = None) -> Gate:
    r"""Open in a part of the training: where :math:`\mathrm{start} \le t < \mathrm{stop}`.

    SAM late (`window(start)`), SAM first (`window(0, stop)`), or SAM in the middle.

    Args:
      start: The first step, an integer >= 0.
      stop: The step after the last one, an integer > `start`; None: to the end.

    Returns:
      The gate.

    Examples:
      >>> import optax_sam
      >>> late = optax_sam.gates.window(9_000)  # The last tenth of 10,000 steps.
      >>> variant = optax_sam.gated(optax_sam.sam(0.1), late)

    References:
      Zhou et al., `Sharpness-Aware Minimization Efficiently Selects Flatter Minima Late in Training
      <https://arxiv.org/abs/2410.10373>`_, ICLR 2025. With wrong labels and a cosine schedule it is the early
      phase that counts (docs/guides/cheaper_than_sam.md).
    """
    _checks.number("start", start, low=0, integer=True)
    if stop is None:
        return Gate(lambda now, memory: (now.step >= start, memory), name=f"window({start})")
    _checks.number("stop", stop, low=start, above=True, integer=True)
    return Gate(
        lambda now, memory: ((now.step >= start) & (now.step < stop), memory), name=f"window({start}, {stop})"
    )


def randomly(probability: optax.ScalarOrSchedule, key: int | jax.Array = 0) -> Gate:
    r"""Open in random steps: a draw from the key, folded with the step, alike on all devices.

    Args:
      probability: How often, in [0, 1], or a schedule of the step. A step costs 1 + probability gradients
        on average.
      key: The seed of the draws, an integer or a random key, typed or raw.

    Returns:
      The gate.

    Examples:
      >>> import optax_sam
      >>> variant = optax_sam.gated(optax_sam.sam(0.1), optax_sam.gates.randomly(0.5, key=1))

    References:
      Zhao, Zhang and Hu, `SS-SAM <https://arxiv.org/abs/2203.09962>`_, 2022, and "Randomized
      Sharpness-Aware Training", AAAI 2023, after the form of it in the authors' code for penalties of the
      gradient norm.
    """
    _checks.scalar_or_schedule("probability", probability, high=1.0)
    seed = _checks.key("key", key)

    def decide(now: Now, memory: Any) -> tuple[jax.Array, Any]:
        draw = jax.random.uniform(jax.random.fold_in(seed, now.step))
        return draw < value_at(probability, now.step), memory

    return Gate(decide, name=f"randomly({_name_of(probability)})")


@serializable
class Moments(NamedTuple):
    """What the gate of AE-SAM remembers of the squared norms of the gradients so far.

    Attributes:
      mean: Their moving average. shape=()
      variance: The moving average of their squared distance from it. shape=()
    """

    mean: jax.Array
    variance: jax.Array


def large_gradient(threshold: optax.ScalarOrSchedule = 0.0, decay: float = 0.9) -> Gate:
    r"""Open where the gradient is large, compared with the steps before: the rule of AE-SAM.

    .. math::
      \|g_t\|^2 \ge \mu_t + c_t \sigma_t, \quad \mu_t = \delta \mu_{t-1} + (1 - \delta) \|g_t\|^2, \quad
      \sigma_t^2 = \delta \sigma_{t-1}^2 + (1 - \delta) (\|g_t\|^2 - \mu_t)^2

    The moments begin at zero, so that the first steps are open. With shards, or a local perturbation, the
    squared norm is the mean of theirs: all decide alike.

    Args:
      threshold: :math:`c`, any number: the larger, the fewer steps; or a schedule of the step.
      decay: :math:`\delta`, in [0, 1).

    Returns:
      The gate. It remembers two scalars.

    Examples:
      >>> import optax_sam
      >>> variant = optax_sam.gated(optax_sam.gsam(0.1), optax_sam.gates.large_gradient())

    References:
      Jiang, Yang, Zhang and Kwok, `An Adaptive Policy to Employ Sharpness-Aware Minimization
      <https://arxiv.org/abs/2304.14647>`_, ICLR 2023, after two summaries of it: no official code is known.
    """
    _checks.scalar_or_schedule("threshold", threshold, low=-float("inf"))
    _checks.number("decay", decay, low=0.0, high=1.0, below=True)

    def decide(now: Now, memory: Moments) -> tuple[jax.Array, Moments]:
        squared: Any = now.squared_norm
        mean = decay * memory.mean + (1.0 - decay) * squared
        variance = decay * memory.variance + (1.0 - decay) * (squared - mean) ** 2
        return squared >= mean + value_at(threshold, now.step) * jnp.sqrt(variance), Moments(mean, variance)

    return Gate(
        decide,
        lambda: Moments(jnp.zeros(()), jnp.zeros(())),
        by_gradient=True,
        name=f"large_gradient({_name_of(threshold)}, {decay})",
    )


def nonzero_radius() -> Gate:
    """Open where the radius is not zero: a schedule of rho that begins at 0 then costs one gradient there.

    Returns:
      The gate.

    Examples:
      >>> import optax, optax_sam
      >>> rho = optax.schedules.piecewise_interpolate_schedule("linear", 0.1, {1_000: 0.0})
      >>> variant = optax_sam.gated(optax_sam.sam(rho), optax_sam.gates.nonzero_radius())
    """
    return Gate(lambda now, memory: (now.rho != 0.0, memory), name="nonzero_radius()")


@serializable
class GatedMemory(NamedTuple):
    """What a gated variant remembers.

    Attributes:
      variant: What the variant remembers.
      gate: What the gate remembers: scalars, or nothing.
      open_steps: In how many steps the gate was open: the step that the variant sees. shape=(), dtype=int32
    """

    variant: Any
    gate: Any
    open_steps: jax.Array


def gated(variant: SharpnessAwareTransformation, gate: Gate) -> SharpnessAwareTransformation:
    r"""A variant that pays for its second gradient in some steps only.

    .. math:: u_t = u_t^{\mathrm{variant}} \;\text{where the gate is open,} \quad
      u_t = \nabla L(w_t) \;\text{where it is shut}

    In a shut step the second gradient is really not computed, the variant's memory is left alone, and the
    metrics of the perturbed point are NaN. The variant counts the steps in which it acts: LookSAM's period,
    F-SAM's first step and the keys of noise are those of open steps. Schedules of rho, and the gate, go by
    the step of the training; all other schedules of the variant, such as that of GSAM's alpha, by open steps.

    Args:
      variant: Any variant that has a plain step: not one that never takes the gradient at params, such as
        `bsam`, `msam`, `sampa` and `weight_noise`, nor one that measures something for its direction in its
        first pass (`eigen_sam`, `sam_sps`), nor `decoupled_wsam` with a schedule, which must be the base
        optimizer's. Of a whole optimizer the base optimizer makes the plain steps.
      gate: One of `optax_sam.gates`, or several combined with `&`, `|` and `~`.

    Returns:
      A sharpness-aware transformation: between one gradient a step and those of the variant. Under a `vmap`
      over states both branches are computed. `ascent_examples` and its like are allowed where the variant
      allows them and the gate does not look at the gradient: a shut step then takes the whole gradient.

    Raises:
      TypeError: If `variant` is no variant, or `gate` no gate.
      ValueError: If the variant has no plain step, or is gated already.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2
      >>> variant = optax_sam.gated(optax_sam.sam(0.1), optax_sam.gates.every(2))
      >>> tx = optax.chain(variant, optax.sgd(0.05))
      >>> params = jnp.array([1.0, 1.0])
      >>> state = tx.init(params)
      >>> for _ in range(2):  # A step of SAM, then a plain one.
      ...     _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, state=state)
      ...     print([f"{p - c:.3f}" for p, c in zip(grads.perturbed, grads.clean)])
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      ['0.995', '0.010']
      ['0.000', '0.000']

    References:
      Those of the gates: Composer's `interval` (`gates.every`), Zhou et al. 2025 (`gates.window`), SS-SAM and
      RST (`gates.randomly`), AE-SAM (`gates.large_gradient`).
    """
    _check_gated(variant, gate)

    def init_memory(params: optax.Params) -> GatedMemory:
        of_variant: Any = variant.init(params)
        return GatedMemory(of_variant.memory, gate.init(), jnp.zeros((), jnp.int32))

    def inner(state: SAMState) -> SAMState:
        return SAMState(state.memory.open_steps, state.rho, state.memory.variant)

    def evaluate(loss: Loss, state: SAMState) -> Evaluation:
        if loss.climbs_apart:  # Not along the gradient that a plain step needs.
            is_open, _ = gate.decide(Now(state.step, state.rho), state.memory.gate)
            return _tree.cond_or_if(
                is_open,
                lambda: _evaluation(variant, loss, inner(state)),
                lambda: loss.pair(loss.at(), None),
                promotes=True,  # The cheaper pass may have its own.
            )
        clean = loss.ascent()
        squared = loss.mean(_tree.squared_norm(clean.gradient)) if gate.by_gradient else None
        is_open, _ = gate.decide(Now(state.step, state.rho, squared), state.memory.gate)
        known = dataclasses.replace(loss, given=clean)
        evaluation = loss.pay_if(is_open, clean, lambda: _evaluation(variant, known, inner(state)))
        if squared is None:
            return evaluation
        statistics = _tree.at_every_leaf(jnp.stack([is_open.astype(squared.dtype), squared]), loss.params)
        return evaluation._replace(gradients=evaluation.gradients._replace(statistics=statistics))

    def descent(
        gradients: SAMGradients, state: SAMState, params: optax.Params | None, **extra_args: Any
    ) -> tuple[optax.Updates, GatedMemory]:
        is_open, memory = _decided(gate, gradients, state)
        pair = gradients._replace(statistics=None, made_by=MadeBy(precision=gradients.made_by.precision))
        result: Any = variant.update(pair, inner(state), params, **extra_args)
        direction, new = result[0], result[1].memory
        if not variant.is_optimizer:
            direction = _tree.select(is_open, direction, gradients.clean)
            new = _tree.select(is_open, new, state.memory.variant)
        open_steps = state.memory.open_steps + is_open.astype(jnp.int32)
        return direction, GatedMemory(new, _tree.keep_finite(memory, state.memory.gate), open_steps)

    result = sharpness_aware(
        variant.rho,
        None,
        descent,
        init_memory,
        evaluate=evaluate,
        ascent_only=variant.ascent_only and not gate.by_gradient,
        compares=variant.compares,
        is_optimizer=variant.is_optimizer,
        has_plain_step=False,  # For a second gate: `&` combines gates.
        guards_memory=True,
        rho_name=variant.rho_name,
    )
    _sign(result, variant, gate)
    return result


def _decided(gate: Gate, gradients: SAMGradients, state: SAMState) -> tuple[jax.Array, Any]:
    """How the gate decided in the evaluation, and what it remembers."""
    if not gate.by_gradient:
        return gate.decide(Now(state.step, state.rho), state.memory.gate)
    if gradients.statistics is None:
        msg = (
            "A gate that looks at the gradient needs to know how it decided: pass `update` the pair of "
            "`sam_value_and_grad` as it is, or write `update(grads.perturbed, state, params, "
            "clean_updates=grads.clean, statistics=grads.statistics)`."
        )
        raise TypeError(msg)
    opened, squared = _tree.first_leaf(gradients.statistics, jnp.zeros(2))
    _, memory = gate.decide(Now(state.step, state.rho, squared), state.memory.gate)
    return opened > 0.0, memory  # No rounding decides anew, and no scaling of the pair.


def _sign(result: SharpnessAwareTransformation, variant: SharpnessAwareTransformation, gate: Gate) -> None:
    """Lets a gated variant know what it is made of, as `constructor` does for others."""
    arguments = (("variant", variant.made_by.name), *variant.made_by.arguments, ("gate", gate.name))
    result.made_by, remake = MadeBy("gated", arguments), variant.remake
    result.arguments = variant.arguments
    result.describe = lambda: f"gated({variant!r}, {gate!r})"
    if remake is not None:
        result.remake = lambda **arguments: gated(remake(**arguments), gate)


def _evaluation(variant: SharpnessAwareTransformation, loss: Loss, state: SAMState) -> Evaluation:
    evaluation = checked_evaluation(variant.evaluate(loss, state))
    if evaluation.gradients.statistics is not None:
        msg = (
            f"`{variant.made_by.name}` measures something in its first pass, for its direction, so it has no "
            "plain step: write `sharpness_aware(..., has_plain_step=False)`, and take it without a gate."
        )
        raise ValueError(msg)
    return evaluation


def _check_gated(variant: Any, gate: Any) -> None:
    if not isinstance(variant, SharpnessAwareTransformation):
        msg = (
            f"`variant` must be a bare variant, such as `optax_sam.sam(0.05)`, got {type(variant).__name__}. "
            "A chain comes around: `optax.chain(optax_sam.gated(variant, gate), optax.sgd(0.1))`."
        )
        raise TypeError(msg)
    _check_gate(gate)
    if not variant.has_plain_step:
        name = variant.made_by.name
        msg = (
            f"`{name}` has no plain step: it never takes the gradient at params, needs more than it, or has "
            "a gate already. Take it without a gate, gate another variant, or combine gates, "
            "`optax_sam.gated(variant, first & second)`."
        )
        raise ValueError(msg)
