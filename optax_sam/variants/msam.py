"""Momentum-SAM: the optimizer's momentum gives the perturbation (Becker, Altrock, Risse, 2024)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam import _checks, _tree
from optax_sam import ascent as ascents
from optax_sam._loss import Evaluation, Loss, SAMGradients, serializable
from optax_sam._state import SAMState, is_hole, with_holes_of
from optax_sam._variant import (
    SharpnessAwareTransformation,
    as_arrays,
    constructor,
    first_rho,
    is_pair,
    rho_at,
    sharpness_aware,
    value_at,
)


def _momentum(state: optax.OptState, params: optax.Params) -> optax.Updates:
    """The one momentum in the state of the base optimizer, which `optax.partition` keeps in parts."""
    found = [x for name in ("trace", "mu") for _, x in optax.tree.get_all_with_path(state, name)]
    found = [x for x in found if jax.tree.structure(x) == jax.tree.structure(with_holes_of(x, params))]

    def by_leaf(part: Any) -> Any:
        """The part with a hole for each leaf, where one hole stands for a whole branch of params."""
        return jax.tree.map(
            lambda m, w: jax.tree.map(lambda _: m, w) if is_hole(m) else m, part, params, is_leaf=is_hole
        )

    momenta = jax.tree.map(
        lambda _, *parts: [x for x in parts if not is_hole(x)], params, *map(by_leaf, found)
    )
    of_each = jax.tree.leaves(jax.tree.map(lambda _, each: len(each), params, momenta))
    if not found or set(of_each) - {1}:
        msg = (
            "`base_optimizer` must keep one momentum of all params, such as that of `optax.sgd(0.1, "
            "momentum=0.9)` or `optax.adam(1e-3)`, in a field `trace` or `mu`, got an optimizer that keeps "
            f"{min(of_each, default=0)}. `optax_sam.msam(base_optimizer, rho, along='update')` goes along "
            "the last update of any optimizer, for one gradient a step too."
        )
        raise ValueError(msg)
    return jax.tree.map(lambda _, each: each[0], params, momenta)


@serializable
class MSAMMemory(NamedTuple):
    """What `msam` remembers along updates.

    Attributes:
      base: The state of the base optimizer.
      update: The last update that was not zero; zero before the first. A pytree like params, in float32 or
        better.
    """

    base: optax.OptState
    update: optax.Updates


@constructor
def msam(
    base_optimizer: optax.GradientTransformation,
    rho: optax.ScalarOrSchedule = 0.3,
    *,
    along: Literal["momentum", "update"] = "momentum",
    ascent: ascents.Ascent | None = None,
) -> SharpnessAwareTransformation:
    r"""SAM in one gradient a step: the perturbation follows the momentum. A whole optimizer.

    The point lies further along the last steps, against the momentum, where the loss of the next batch
    tends to be larger; it is known before the gradient is, which then has to be taken once.

    .. math:: u_t = \nabla L\left(w_t - \rho \frac{v_t}{\|v_t\|_2}\right), \quad
      v_{t+1} = \mu v_t + u_t, \quad w_{t+1} = w_t - \eta v_{t+1}

    With `along="update"` it follows the last update of any base optimizer, preconditioner, orthogonalization
    and weight decay included: :math:`w_t + \rho\, (w_t - w_{t-1}) / \|w_t - w_{t-1}\|_2`. With
    plain momentum and a constant learning rate the two are the same.

    Args:
      base_optimizer: The optimizer, its learning rate included. For `along="momentum"` with one momentum in
        its state: the `trace` of `optax.sgd(..., momentum=...)`, or the first moment `mu` of `optax.adam` and
        its like, of `optax.contrib.muon` for example. Its weight decay acts on the unperturbed params. In
        `optax.MultiSteps(..., n).gradient_transformation()` it makes one step of n batches.
      rho: The radius, >= 0, or a schedule of the step; 0 recovers the base optimizer. About ten times
        that of SAM: up to 1.2 was safe in docs/tuning.md.
      along: "momentum", as the paper has it, or "update", which any optimizer makes: `optax.lion`,
        `optax.contrib.schedule_free_adamw`, a `optax.partition`. The first step is a plain one.
      ascent: The rule that makes a perturbation of the momentum, or of the update; None for
        `optax_sam.ascent.normalized()`.

    Returns:
      A sharpness-aware transformation that is an optimizer. One gradient evaluation a step, no state but
      that of the base optimizer, and with `along="update"` one copy of the params. Params are the
      unperturbed ones, to be evaluated and saved as they are; `shifted_msam` holds the perturbed ones and
      takes plain gradients. Value and aux are those of the perturbed point, the only one visited, the pair
      holds its gradient twice, and the perturbation is one for all devices and shards.

    Raises:
      ValueError: If the base optimizer has no momentum or several.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2
      >>> tx = optax_sam.msam(optax.sgd(0.05, momentum=0.9), rho=0.1)
      >>> params = jnp.array([1.0, 1.0])
      >>> state = tx.init(params)
      >>> for _ in range(2):  # A plain step, then one with a perturbation against the momentum.
      ...     _, grads = optax_sam.sam_value_and_grad(loss, tx)(params, state=state)
      ...     print([f"{x:.4f}" for x in grads.perturbed])
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      ['10.0000', '1.0000']
      ['4.0050', '0.9400']

    References:
      Becker, Altrock and Risse, `Momentum-SAM <https://arxiv.org/abs/2401.12033>`_, 2024, which keeps
      the perturbed params; here the unperturbed ones are kept, and weight decay acts on these.
    """
    _checks.optimizer("base_optimizer", base_optimizer)
    _checks.choice("along", along, ("momentum", "update"))
    base = optax.with_extra_args_support(base_optimizer)
    rule = ascents.resolve(ascent)

    def init_memory(params: optax.Params) -> Any:
        state = base.init(params)
        if along == "update":
            return MSAMMemory(state, _tree.zeros_like(params))
        _momentum(state, params)  # Said now rather than at the first step.
        return state

    def evaluate(loss: Loss, state: SAMState) -> Evaluation:
        of_step = ascents.at_step(rule, state.step)
        if along == "update":
            perturbation = of_step(state.memory.update, state.rho, loss.params)
        else:
            perturbation = of_step(_momentum(state.memory, loss.params), -state.rho, loss.params)
        return loss.pair(loss.ascent(perturbation), None)

    def descent(
        gradients: SAMGradients, state: SAMState, params: optax.Params | None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        # The base optimizer gets the gradient in the dtypes in which its state was made.
        gradient = _tree.cast_like(gradients.perturbed, gradients.perturbed if params is None else params)
        if along == "momentum":
            return base.update(gradient, state.memory, params, **extra_args)
        update, new = base.update(gradient, state.memory.base, params, **extra_args)
        # `optax.MultiSteps` updates by zero while it accumulates: the update before stays the last one.
        moves = _tree.squared_norm(update) > 0.0
        return update, MSAMMemory(new, _tree.select(moves, _tree.upcast(update), state.memory.update))

    return sharpness_aware(
        rho,
        None,
        descent,
        init_memory,
        evaluate=evaluate,
        compares=False,
        is_optimizer=True,
        has_plain_step=False,
    )


@serializable
class ShiftedMSAMState(NamedTuple):
    """The state of `shifted_msam`.

    Attributes:
      step: How many updates were made. shape=(), dtype=int32
      rho: The radius of the next perturbation. If it is a number, `optax.tree.set(opt_state, rho=...)`
        changes it for good; of a schedule it is what the schedule gave. shape=(), float32 or better
      applied_rho: The radius by which the params of now are perturbed. shape=(), float32 or better
      base: The state of the base optimizer, in which the momentum is.
    """

    step: jax.Array
    rho: jax.Array
    applied_rho: jax.Array
    base: optax.OptState


@constructor
def shifted_msam(
    base_optimizer: optax.GradientTransformation, rho: optax.ScalarOrSchedule = 0.3
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum-SAM on perturbed params: a whole optimizer that takes plain gradients.

    The same algorithm as `msam`, for a training loop that cannot be changed. The params of the loop are
    the perturbed ones; what to evaluate and to save as a model are `msam_eval_params(state, params)`.

    .. math:: \tilde w_t = w_t - \rho_t \frac{v_t}{\|v_t\|_2}, \quad u_t = \nabla L(\tilde w_t), \quad
      v_{t+1} = \mu v_t + u_t, \quad w_{t+1} = w_t - \eta v_{t+1}

    Args:
      base_optimizer: The optimizer, its learning rate included, with one momentum in its state: the
        `trace` of `optax.sgd(..., momentum=...)`, or the first moment `mu` of `optax.adam` and its like.
        Its weight decay acts on the unperturbed params.
      rho: The radius, >= 0, or a schedule of the step; 0 recovers the base optimizer.

    Returns:
      An optimizer, to be used with `jax.value_and_grad`, not with `sam_value_and_grad`; nothing comes
      after it. One gradient evaluation a step, no state but that of the base optimizer.

    Raises:
      TypeError, ValueError: If the base optimizer has no momentum or several, or `update` gets no params or a
        pair of gradients.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2
      >>> tx = optax_sam.shifted_msam(optax.sgd(0.05, momentum=0.9), rho=0.1)
      >>> params = jnp.array([1.0, 1.0])
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jax.grad(loss)(params), state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> print([f"{x:.4f}" for x in params])
      ['0.4005', '0.9400']
      >>> print([f"{x:.4f}" for x in optax_sam.msam_eval_params(state, params)])
      ['0.5000', '0.9500']

    References:
      Becker, Altrock and Risse, `Momentum-SAM <https://arxiv.org/abs/2401.12033>`_, 2024, algorithm 1 in
      the form of its code; there weight decay acts on the perturbed params.
    """
    _checks.optimizer("base_optimizer", base_optimizer)
    _checks.scalar_or_schedule("rho", rho)
    base = optax.with_extra_args_support(base_optimizer)

    def init(params: optax.Params) -> ShiftedMSAMState:
        params = as_arrays(params)
        state = base.init(params)
        _momentum(state, params)  # Said now rather than at the first step.
        return ShiftedMSAMState(
            jnp.zeros((), jnp.int32), first_rho(rho, params), first_rho(rho, params), state
        )

    def update(
        updates: Any, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, ShiftedMSAMState]:
        params = _checks.given_params("shifted_msam", params)
        if is_pair(updates, params):
            msg = (
                "`shifted_msam` takes one gradient, at the params as they are: that of `jax.value_and_grad`. "
                "With `sam_value_and_grad` write `optax_sam.msam(base_optimizer, rho)`."
            )
            raise TypeError(msg)
        here = _shift(state, params)
        steps, base_state = base.update(updates, state.base, _unperturbed(params, here), **extra_args)
        step = jnp.asarray(optax.safe_increment(state.step))
        # Params carry the radius that was applied to them, whatever `rho` was set to since.
        dtype = state.applied_rho.dtype
        applied = jnp.array(value_at(rho, step) if callable(rho) else rho_at(rho, state.rho, params), dtype)
        base_state = _tree.keep_finite(base_state, state.base)
        new = ShiftedMSAMState(step, applied, jnp.copy(applied), base_state)
        total = jax.tree.map(lambda u, new, old: u + (new - old), steps, _shift(new, params), here)
        return _tree.cast_like(total, params), new

    return optax.GradientTransformationExtraArgs(init, update)


def _shift(state: ShiftedMSAMState, params: optax.Params) -> optax.Updates:
    """The perturbation that is in the params."""
    return ascents.normalized()(_momentum(state.base, params), -state.applied_rho, params)


def _unperturbed(params: optax.Params, perturbation: optax.Updates) -> optax.Params:
    return _tree.displace(params, jax.tree.map(jnp.negative, perturbation))


def msam_eval_params(state: optax.OptState, params: optax.Params) -> optax.Params:
    r"""The unperturbed params of a training with `shifted_msam`: those to evaluate and to keep.

    .. math:: w_t = \tilde w_t + \rho_t \frac{v_t}{\|v_t\|_2}

    Args:
      state: The optimizer's state, which holds that of `shifted_msam`.
      params: The params of the training loop.

    Returns:
      Params of the same structure, shapes and dtypes.

    Raises:
      ValueError: If the state holds none of `shifted_msam`, or several.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> params = jnp.array([1.0, 1.0])
      >>> state = optax_sam.shifted_msam(optax.sgd(0.1, momentum=0.9)).init(params)
      >>> print(optax_sam.msam_eval_params(state, params))  # Without a step there is no momentum yet.
      [1. 1.]

    References:
      Becker, Altrock and Risse, `Momentum-SAM <https://arxiv.org/abs/2401.12033>`_, 2024.
    """
    found = [value for _, value in optax.tree.get_all_with_path(state, "ShiftedMSAMState")]
    if len(found) != 1:
        msg = (
            "`state` must be that of an optimizer with one `optax_sam.shifted_msam`, got one with "
            f"{len(found)}. The params of `optax_sam.msam` are unperturbed as they are."
        )
        raise ValueError(msg)
    params = jax.tree.map(jnp.asarray, params)
    return _unperturbed(params, _shift(found[0], params))
