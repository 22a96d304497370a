"""Lookbehind: k steps up and k down on one batch, and a part of the way (Mordido et al., ICML 2024)."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from optax_sam import _checks, _tree
from optax_sam import ascent as ascents
from optax_sam._loss import Evaluation, Loss, SAMGradients
from optax_sam._state import SAMState
from optax_sam._variant import SharpnessAwareTransformation, constructor, sharpness_aware


@constructor
def lookbehind(
    base_optimizer: optax.GradientTransformation,
    rho: optax.ScalarOrSchedule = 0.025,
    k: int = 2,
    alpha: float | Literal["adaptive"] = 0.5,
    *,
    ascent: ascents.Ascent | None = None,
) -> SharpnessAwareTransformation:
    r"""Lookbehind-SAM: k steps up, k steps down, and then a part of the way. A whole optimizer.

    The ascent goes on from point to point. The gradient at each of them makes one step of the base optimizer,
    from the fast weights f. In the end params go a part of the way to these, as in Lookahead.

    .. math::
      p_i = p_{i-1} + \rho \frac{\nabla L(p_{i-1})}{\|\nabla L(p_{i-1})\|_2}, \quad
      f_i = \mathrm{base}(f_{i-1}, \nabla L(p_i)), \quad p_0 = f_0 = w, \quad
      w \leftarrow w + \alpha\,(f_k - w)

    .. warning::
      What it returns are updates, signs and learning rate included: nothing that is an optimizer comes after
      it. The base optimizer makes k steps in each: a schedule of its learning rate counts these, so that
      what shall end after n steps must be written for n k.

    Args:
      base_optimizer: The optimizer of the fast weights, its learning rate included. Its weight decay acts on
        these.
      rho: The length of each ascent step, >= 0, or a schedule of the step. 0 is no base optimizer, but k of
        its steps along one gradient. The authors take 0.05. With wrong labels and a large learning
        rate it lost 26 points of accuracy on a small CNN, and 0.025 lost 8 (docs/tuning.md).
      k: How many steps of both kinds, an integer >= 1. The authors' code has 5, and 2 in its
        example. Under `optax.inject_hyperparams` name it in `static_args`.
      alpha: The part of the way, in (0, 1]; or "adaptive", which makes it larger where the fast weights went
        straight on: :math:`(1 + \cos\angle(f_1 - w, f_k - w)) / 2`, leaf by leaf. 1 with k = 1 is SAM.
      ascent: The ascent rule, which sees the point that it starts from; None for
        `optax_sam.ascent.normalized()`.

    Returns:
      A sharpness-aware transformation that is an optimizer. k + 1 gradient evaluations a step, no state but
      that of the base optimizer. The gradients of the first k - 1 points go with the pair as `statistics`.

    Raises:
      TypeError, ValueError: By `update`, where the pair comes without its statistics, or without params.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2
      >>> tx = optax_sam.lookbehind(optax.sgd(0.05), rho=0.1, k=2, alpha=0.5)
      >>> params = jnp.array([1.0, 1.0])
      >>> state = tx.init(params)
      >>> _, grads = optax_sam.sam_value_and_grad(loss, tx)(params, state=state)
      >>> updates, state = tx.update(grads, state, params)
      >>> print([f"{x:.4f}" for x in optax.apply_updates(params, updates)])
      ['0.4254', '0.9493']

    References:
      Mordido et al., `Lookbehind-SAM: k steps back, 1 step forward <https://arxiv.org/abs/2307.16704>`_,
      ICML 2024, after the authors' code, which evaluates each gradient between two ascent steps twice, and
      whose adaptive alpha is for each tensor as here.
    """
    _checks.optimizer("base_optimizer", base_optimizer)
    _checks.static_integer("k", k, low=1)
    if isinstance(alpha, str):
        _checks.choice("alpha", alpha, ("adaptive",))
    else:
        _checks.number("alpha", alpha, low=0.0, high=1.0, above=True)
    base = optax.with_extra_args_support(base_optimizer)
    rule = ascents.resolve(ascent)

    def evaluate(loss: Loss, state: SAMState) -> Evaluation:
        of_step = ascents.at_step(rule, state.step)
        clean = here = loss.ascent()
        perturbation = _tree.zeros_like(loss.params)
        between: list[optax.Updates] = []
        for i in range(k):
            point = _tree.displace(loss.params, perturbation)
            climbed = of_step(_tree.upcast(here.gradient), state.rho, point)
            perturbation = optax.tree.add(perturbation, climbed)
            if i < k - 1:
                # It shapes the next step of the ascent too: of devices that share it, the average.
                here = loss.ascent(perturbation)
                between.append(here.gradient)
        # In the structure of params: what wrappers do to gradients (masks, `nnx.Optimizer`) it survives.
        stacked = jax.tree.map(lambda *gs: jnp.stack(gs), *between) if between else None
        return loss.pair(clean, loss.at(perturbation), statistics=stacked)

    def descent(
        gradients: SAMGradients, state: SAMState, params: optax.Params | None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        params = _checks.given_params("lookbehind", params)
        if k > 1 and gradients.statistics is None:
            raise TypeError(_NEEDS_GRADIENTS)
        memory: Any = state.memory
        moves = [_tree.zeros_like(params)]
        for i in range(k):
            last = gradients.perturbed
            gradient = last if i == k - 1 else jax.tree.map(lambda g, i=i: g[i], gradients.statistics)
            # The base optimizer gets all in the dtypes in which its state was made.
            fast = _tree.displace(params, moves[-1])
            update, memory = base.update(_tree.cast_like(gradient, params), memory, fast, **extra_args)
            moves.append(optax.tree.add(moves[-1], _tree.upcast(update)))
        if isinstance(alpha, str):
            return jax.tree.map(_adapted, moves[1], moves[-1]), memory
        return jax.tree.map(lambda m: alpha * m, moves[-1]), memory

    return sharpness_aware(
        rho,
        None,
        descent,
        base.init,
        evaluate=evaluate,
        compares=False,
        is_optimizer=True,
        has_plain_step=False,
    )


def _adapted(first: jax.Array, whole: jax.Array) -> jax.Array:
    """The part of the whole way of a leaf that its first step speaks for."""
    # Of unit vectors: one whose length leaves the range of floats has no direction.
    cosine = _tree.dot(_tree.unit(first), _tree.unit(whole))
    return (1.0 + cosine) / 2.0 * whole


_NEEDS_GRADIENTS = (
    "`lookbehind` needs the gradients of all its points: pass `update` the pair of `sam_value_and_grad` as "
    "it is, or write `update(grads.perturbed, state, params, clean_updates=grads.clean, "
    "statistics=grads.statistics)`."
)
