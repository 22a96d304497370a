"""The first-order model of SAM: a Hessian-vector product instead of a second gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from optax_sam import _checks, _tree
from optax_sam._loss import Evaluation, Loss
from optax_sam._state import SAMState
from optax_sam._variant import SharpnessAwareTransformation, constructor, sharpness_aware


@constructor
def hessian_sam(
    rho: optax.ScalarOrSchedule = 0.05, *, normalize: bool = True, difference: float | None = None
) -> SharpnessAwareTransformation:
    r"""SAM to first order in rho, which is the exact gradient of a gradient-norm penalty.

    .. math:: u = g + \rho\, H \frac{g}{\|g\|_2} = \nabla \left( L + \rho \|\nabla L\|_2 \right)

    Equal to SAM where the loss is quadratic, and otherwise up to terms of order :math:`\rho^2`. It is
    a reference for what curvature does in SAM, not a cheaper SAM: on networks with ReLU, whose Hessian
    does not see the kinks that SAM's finite step crosses, it is clearly weaker.

    Args:
      rho: The radius, >= 0, or a schedule of the step; 0 recovers the base optimizer.
      normalize: False drops the norm: :math:`u = g + \rho H g`, the gradient of
        :math:`L + \tfrac{\rho}{2} \|\nabla L\|_2^2`.
      difference: For losses that have no forward-mode derivative: replaces the product by a finite
        difference of this length, :math:`Hv \approx (\nabla L(w + r v) - g) / r`; > 0. The penalty is
        then that of Zhao et al. None: the exact product.

    Returns:
      A sharpness-aware transformation. One gradient and one Hessian-vector product a step, about 2.9
      gradients (2 with `difference`); no state but scalars.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2
      >>> variant = optax_sam.hessian_sam(rho=0.1)
      >>> params = jnp.array([1.0, 1.0])
      >>> state = variant.init(params)
      >>> _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, state=state)
      >>> direction, state = variant.update(grads, state, params)
      >>> print([f"{x:.4f}" for x in direction])  # SAM's, because the loss is quadratic.
      ['10.9950', '1.0100']

    References:
      Zhao, Zhang and Hu, `Penalizing Gradient Norm for Efficiently Improving Generalization in Deep
      Learning <https://arxiv.org/abs/2202.03599>`_, ICML 2022, for the penalty.
    """
    if difference is not None:
        _checks.number("difference", difference, low=0.0, above=True)

    def evaluate(loss: Loss, state: SAMState) -> Evaluation:
        def gradient_of(point: optax.Params) -> optax.Updates:
            return _tree.upcast(loss.pass_at(point, None).gradient)

        clean = loss.ascent()
        gradient = _tree.upcast(clean.gradient)
        vector = _tree.unit(gradient) if normalize else gradient
        if difference is None:
            try:
                _, product = jax.jvp(gradient_of, (loss.params,), (_tree.cast_like(vector, loss.params),))
            except (TypeError, ValueError, NotImplementedError) as error:
                error.add_note("If the loss has no forward mode, write `hessian_sam(rho, difference=1e-3)`.")
                raise
        else:
            step = jax.tree.map(lambda v: difference * v, vector)
            shifted = _tree.upcast(loss.at(step).gradient)
            product = jax.tree.map(lambda p, g: (p - g) / difference, shifted, gradient)
        # A gradient that is not finite stays as it is.
        usable = jnp.isfinite(_tree.squared_norm(gradient))
        direction = jax.tree.map(lambda g, p: jnp.where(usable, g + state.rho * p, g), gradient, product)
        # The loss is known at no second point.
        value = _tree.unknown(clean.value) if loss.measures else clean.value
        modelled = clean._replace(value=value, gradient=_tree.cast_like(direction, clean.gradient))
        return loss.pair(clean, modelled)

    return sharpness_aware(rho, evaluate=evaluate)
