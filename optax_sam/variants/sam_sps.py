"""SAM-SPS: sharpness-aware minimization with Polyak's step size (Oikonomou, Loizou, ICML 2026)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_sam import _checks, _tree
from optax_sam import ascent as ascents
from optax_sam._loss import Evaluation, Loss, SAMGradients
from optax_sam._state import SAMState
from optax_sam._variant import SharpnessAwareTransformation, constructor, sharpness_aware


@constructor
def sam_sps(
    rho: optax.ScalarOrSchedule = 0.1,
    *,
    max_learning_rate: float = 1.0,
    weight_decay: float = 0.0,
    min_loss: float = 0.0,
    ascent: ascents.Ascent | None = None,
) -> SharpnessAwareTransformation:
    r"""SAM without a learning rate: a whole optimizer with Polyak's step size.

    .. math::
      \Delta w = -\eta\,(g_\epsilon + \delta w), \quad
      \eta = \min\left(\frac{\max(L(w + \epsilon) - \ell^* - \langle g_\epsilon, \epsilon \rangle, 0)}
      {\|g_\epsilon\|_2^2}, \eta_\max\right)

    .. warning::
      What it returns are updates, sign and step size included: nothing that is an optimizer comes after it.

    Args:
      rho: The radius, >= 0, or a schedule of the step; 0 gives the stochastic Polyak step size of plain
        gradient descent.
      max_learning_rate: The largest step size :math:`\eta_\max`, > 0.
      weight_decay: :math:`\delta`, >= 0, added to the gradient after the step size is known. The authors'
        code takes 5e-4.
      min_loss: :math:`\ell^*`, the least that the loss of a batch can be; 0 for losses that are never
        negative.
      ascent: The ascent rule; None for `optax_sam.ascent.normalized()`. With `unnormalized()` this is
        USAM-SPS.

    Returns:
      A sharpness-aware transformation that is an optimizer. Two gradient evaluations a step, no state but
      scalars. The step size needs the loss at the perturbed point, which goes with the pair as `statistics`.

    Raises:
      TypeError: By `update`, where the pair comes without its statistics, or with `grad_fn=`.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2
      >>> tx = optax_sam.sam_sps(rho=0.1)
      >>> params = jnp.array([1.0, 1.0])
      >>> state = tx.init(params)
      >>> _, grads = optax_sam.sam_value_and_grad(loss, tx)(params, state=state)
      >>> updates, state = tx.update(grads, state, params)
      >>> print([f"{x:.4f}" for x in optax.apply_updates(params, updates)])
      ['0.5084', '0.9548']

    References:
      Oikonomou and Loizou, `Adaptive Sharpness-Aware Minimization with a Polyak-type Step Size
      <https://arxiv.org/abs/2606.01827>`_, ICML 2026, after the authors' code, of which are the defaults but
      for the weight decay.
    """
    _checks.number("max_learning_rate", max_learning_rate, low=0.0, above=True)
    _checks.number("weight_decay", weight_decay, low=0.0)
    _checks.number("min_loss", min_loss)
    rule = ascents.resolve(ascent)

    def evaluate(loss: Loss, state: SAMState) -> Evaluation:
        if loss.given is not None:
            raise TypeError(_NEEDS_VALUES)
        clean = loss.ascent()
        gradient = _tree.upcast(clean.gradient)
        perturbation = ascents.at_step(rule, state.step)(gradient, state.rho, loss.params)
        perturbed = loss.at(perturbation)
        # The value at params of the linear model that touches the loss at the perturbed point.
        model = _tree.upcast(perturbed.value) - _tree.dot(perturbed.gradient, perturbation)
        if loss.peers.num_shards == 1:
            model = loss.mean(model)
        return loss.pair(clean, perturbed, statistics=_tree.at_every_leaf(model, loss.params))

    def descent(
        gradients: SAMGradients, state: SAMState, params: optax.Params | None
    ) -> tuple[optax.Updates, Any]:
        params = _checks.given_params("sam_sps", params)
        if gradients.statistics is None:
            raise TypeError(_NEEDS_VALUES)
        model = _tree.first_leaf(gradients.statistics, jnp.zeros(()))
        squares = jnp.maximum(_tree.squared_norm(gradients.perturbed), 1e-12)
        rate = jnp.clip((model - min_loss) / squares, 0.0, max_learning_rate)
        decayed = jax.tree.map(lambda p, w: p + weight_decay * w, gradients.perturbed, _tree.upcast(params))
        return jax.tree.map(lambda d: -rate * d, decayed), state.memory

    return sharpness_aware(
        rho,
        None,
        descent,
        evaluate=evaluate,
        ascent_only=True,
        is_optimizer=True,
        has_plain_step=False,
    )


_NEEDS_VALUES = (
    "`sam_sps` needs the loss at the perturbed point: pass `update` the pair of `sam_value_and_grad` as it "
    "is, or write `update(grads.perturbed, state, params, clean_updates=grads.clean, "
    "statistics=grads.statistics)`."
)
