"""RWP and m-RWP: random weight perturbation in place of an ascent (Li et al., 2022 and 2024)."""

from __future__ import annotations

from typing import Any, Literal

import jax
import optax

from optax_sam import _checks, _tree
from optax_sam import ascent as ascents
from optax_sam._loss import Evaluation, Loss, SAMGradients
from optax_sam._state import SAMState
from optax_sam._variant import SharpnessAwareTransformation, constructor, sharpness_aware

_GRANULARITIES = {"filter": "filter", "leaf": "leaf", "weight": "elementwise"}


@constructor
def weight_noise(
    scale: optax.ScalarOrSchedule = 0.01,
    *,
    mix: float = 1.0,
    per: Literal["filter", "leaf", "weight"] = "filter",
    output_axis: int = -1,
    key: int | jax.Array = 0,
) -> SharpnessAwareTransformation:
    r"""Random weight perturbation: the gradient at a random point nearby, at the price of one.

    .. math::
      u = \alpha \nabla L(w + n) + (1 - \alpha) \nabla L(w), \quad n_f \sim N(0, \gamma^2 \|w_f\|_2^2)

    for every filter f of a leaf: all entries that feed one output.

    Args:
      scale: :math:`\gamma`, the deviation of each entry's noise relative to the norm of its filter; >= 0,
        or a schedule of the step, such as one that grows from 0; 0 recovers the base optimizer. Of a filter
        of n entries the noise has about :math:`\gamma \sqrt{n}` times the norm: a scale is no radius.
      mix: :math:`\alpha`, the weight of the noisy gradient, in (0, 1]. 1 is RWP and takes one gradient; less
        is m-RWP and takes two.
      per: What the deviation is relative to: the norm of the "filter" (a leaf of fewer than two axes is one
        filter, as in the authors' code), of the "leaf", or the size of each "weight".
      output_axis: The axis of a leaf that counts its filters; -1 in Flax and Haiku, 0 in layouts
        taken over from PyTorch.
      key: The seed of the noise, an integer or a random key, typed or raw. The noise of a step depends on key
        and step alone, so nothing random is in the state. Under `optax.inject_hyperparams` name it, `mix`
        and `output_axis` in `static_args`.

    Returns:
      A sharpness-aware transformation without memory. One gradient evaluation a step, whose value and aux are
      those of the noisy point, and the pair holds its gradient twice; with `mix` below 1 two, and the value
      is the clean one. Each shard, and each device with `perturbation="local"`, draws its own noise.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2
      >>> variant = optax_sam.weight_noise(0.1, key=1)
      >>> params = jnp.array([1.0, 1.0])
      >>> _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, state=variant.init(params))
      >>> noise = grads.perturbed / jnp.array([10.0, 1.0]) - params
      >>> print(bool(jnp.all(jnp.abs(noise) < 0.5)))  # The deviation is 0.14.
      True

    References:
      Li et al., `Efficient Generalization Improvement Guided by Random Weight Perturbation
      <https://arxiv.org/abs/2211.11489>`_, 2022, and `Revisiting Random Weight Perturbation for Efficiently
      Improving Generalization <https://arxiv.org/abs/2404.00357>`_, TMLR 2024, after the authors' code.
      There the two gradients of m-RWP are of two batches, each on its own worker; here of one batch.
    """
    _checks.scalar_or_schedule("scale", scale)
    _checks.static("mix", mix)
    _checks.number("mix", mix, low=0.0, high=1.0, above=True)
    _checks.choice("per", per, tuple(_GRANULARITIES))
    _checks.static_integer("output_axis", output_axis)
    seed = _checks.key("key", key)

    def noise(loss: Loss, state: SAMState) -> optax.Updates:
        own_key = loss.random_key(jax.random.fold_in(seed, state.step))
        params = _tree.upcast(loss.params)
        normal = optax.tree.random_like(own_key, params, jax.random.normal)

        def draw(n: jax.Array, w: jax.Array) -> jax.Array:
            granularity = "leaf" if per == "filter" and w.ndim < 2 else _GRANULARITIES[per]
            return state.rho * ascents.size_of(w, granularity, output_axis) * n

        return jax.tree.map(draw, normal, params)

    def evaluate(loss: Loss, state: SAMState) -> Evaluation:
        if mix == 1.0:
            return loss.pair(loss.at(noise(loss, state)), None)
        return loss.pair(loss.ascent(), loss.at(noise(loss, state)))

    def descent(gradients: SAMGradients, state: SAMState, params: optax.Params) -> tuple[optax.Updates, Any]:
        del params
        mixed = jax.tree.map(lambda g, n: g + mix * (n - g), gradients.clean, gradients.perturbed)
        return mixed, state.memory

    if mix == 1.0:
        return sharpness_aware(scale, evaluate=evaluate, has_plain_step=False, rho_name="scale")
    return sharpness_aware(scale, None, descent, evaluate=evaluate, rho_name="scale")
