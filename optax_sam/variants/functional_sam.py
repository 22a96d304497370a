"""Functional SAM: the network is linearized anew, the loss is not (Singh et al., ICML 2025)."""

from __future__ import annotations

import optax

from optax_sam import _tree
from optax_sam import ascent as ascents
from optax_sam._loss import Evaluation, Loss
from optax_sam._state import SAMState
from optax_sam._variant import SharpnessAwareTransformation, constructor, sharpness_aware


@constructor
def functional_sam(
    rho: optax.ScalarOrSchedule = 0.05, *, ascent: ascents.Ascent | None = None
) -> SharpnessAwareTransformation:
    r"""SAM that regularizes the function of the network and leaves the loss of its outputs alone.

    SAM's gradient at the perturbed point changes for two reasons: the Jacobian of the network changes, and so
    does the derivative of the loss with respect to the outputs. Here the second is kept as it was.

    .. math::
      u = J(w + \epsilon)^\top c, \quad \epsilon = \rho \frac{g}{\|g\|_2}, \quad g = J(w)^\top c, \quad
      c = \frac{\partial \ell}{\partial z}\Big|_{z = f_w(x)}

    Args:
      rho: The radius, >= 0, or a schedule of the step; 0 recovers the base optimizer.
      ascent: The ascent rule; None for `optax_sam.ascent.normalized()`.

    Returns:
      A sharpness-aware transformation. Two gradient evaluations a step, no state but scalars. The loss must
      be an `optax_sam.CompositeLoss(model_fn, output_loss)`, which shows the outputs.

    Raises:
      TypeError: Where it evaluates, if the loss is not composite.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = optax_sam.CompositeLoss(
      ...     model_fn=lambda w, x: w[0] * w[1] * x, output_loss=lambda z, y: jnp.mean((z - y) ** 2) / 2
      ... )
      >>> variant = optax_sam.functional_sam(rho=0.1)
      >>> params, x, y = jnp.array([1.0, 2.0]), jnp.array([1.0]), jnp.array([0.5])
      >>> state = variant.init(params)
      >>> _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, x, y, state=state)
      >>> print([f"{x:.4f}" for x in grads.perturbed])  # SAM's would be (3.5325, 1.8821).
      ['3.0671', '1.6342']

    References:
      Singh et al., `Avoiding spurious sharpness minimization broadens applicability of SAM
      <https://arxiv.org/abs/2502.02407>`_, ICML 2025, after its abstract and a summary; the same rule is
      J-SAM of Baek, Kolter and Raghunathan, `Why is SAM Robust to Label Noise?
      <https://arxiv.org/abs/2405.03676>`_, ICLR 2024.
    """
    rule = ascents.resolve(ascent)

    def evaluate(loss: Loss, state: SAMState) -> Evaluation:
        clean = loss.ascent()
        gradient = _tree.upcast(clean.gradient)
        perturbation = ascents.at_step(rule, state.step)(gradient, state.rho, loss.params)
        return loss.pair(clean, loss.at(perturbation, cotangent_of=clean))

    return sharpness_aware(rho, evaluate=evaluate)
