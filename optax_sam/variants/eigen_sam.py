"""Eigen-SAM: climbs towards the sharpest direction too (Luo et al., NeurIPS 2024)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam import _checks, _tree
from optax_sam._loss import Evaluation, Loss, SAMGradients, serializable, varying
from optax_sam._state import SAMState
from optax_sam._variant import SharpnessAwareTransformation, constructor, sharpness_aware


@serializable
class EigenSAMMemory(NamedTuple):
    """What Eigen-SAM remembers.

    Attributes:
      vector: An estimate of the first eigenvector of the Hessian, of length one; zero before the first step.
        A pytree like params, in float32 or better.
    """

    vector: optax.Updates


@constructor
def eigen_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    alpha: float = 0.2,
    every: int = 100,
    *,
    iterations: int = 5,
    key: Any = None,
) -> SharpnessAwareTransformation:
    r"""SAM that turns its perturbation towards the first eigenvector of the Hessian.

    .. math::
      \epsilon = \rho \left( \hat g + \alpha\, \mathrm{sign}(\langle g, v \rangle)\,
      (v - \langle \hat g, v \rangle\, \hat g) \right), \quad \hat g = \frac{g}{\|g\|_2}, \quad
      u = \nabla L(w + \epsilon)

    where v is found by a few power iterations on the current batch, every so many steps.

    Args:
      rho: The radius, >= 0, or a schedule of the step; 0 recovers the base optimizer. The perturbation is
        :math:`\sqrt{1 + \alpha^2}` times as long at most. The authors' script takes 0.1.
      alpha: The weight of the eigenvector, >= 0; 0 recovers SAM.
      every: In which steps the eigenvector is estimated anew, an integer >= 1: in the first, and then in each
        multiple of it.
      iterations: How many power iterations, >= 1, each a Hessian-vector product.
      key: The seed of the vector to begin with, an integer or a random key, typed or raw; None for 0. Under
        `optax.inject_hyperparams` name it in `static_args`, and `iterations` too.

    Returns:
      A sharpness-aware transformation. Two gradient evaluations a step, and every so many steps some products
      of about two gradients each; one copy of the params as state. Of several shards, and of devices with a
      perturbation of their own, each estimates an eigenvector, and the mean is remembered.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2
      >>> variant = optax_sam.eigen_sam(rho=0.1)
      >>> params = jnp.array([1.0, 1.0])
      >>> state = variant.init(params)
      >>> _, grads = optax_sam.sam_value_and_grad(loss, variant)(params, state=state)
      >>> direction, state = variant.update(grads, state, params)
      >>> print([f"{x:.3f}" for x in direction])
      ['10.997', '1.008']

    References:
      Luo et al., `Explicit Eigenvalue Regularization Improves Sharpness-Aware Minimization
      <https://arxiv.org/abs/2501.12666>`_, NeurIPS 2024, after the authors' code, which begins without a
      vector and does not normalize the gradient until it has one.
    """
    _checks.number("alpha", alpha, low=0.0)
    _checks.number("every", every, low=1, integer=True)
    _checks.static_integer("iterations", iterations, low=1)
    seed = _checks.key("key", 0 if key is None else key)

    def is_due(state: SAMState) -> jax.Array:
        return (state.step % every == 0) | _is_zero(state.memory.vector)

    def estimate(loss: Loss, state: SAMState) -> optax.Updates:
        """Power iterations, from the last estimate, or from noise where there is none."""
        zeros = _tree.zeros_like(loss.params)

        def gradient_at(perturbation: optax.Updates) -> optax.Updates:
            return _tree.upcast(loss.ascent(perturbation).gradient)

        noise = optax.tree.random_like(seed, zeros, jax.random.normal)
        vector = _tree.select(_is_zero(state.memory.vector), noise, state.memory.vector)
        for _ in range(iterations):
            _, product = jax.jvp(gradient_at, (zeros,), (vector,))
            # The norm of leaves of several dtypes is in the best of them.
            vector = _tree.cast_like(_tree.unit(product), zeros)
        return vector

    def evaluate(loss: Loss, state: SAMState) -> Evaluation:
        # What each device estimates for itself is marked as such, and then so must be what it had.
        own = loss.peers.axis if loss.peers.local else None
        vector = _tree.cond_or_if(
            is_due(state),
            lambda: estimate(loss, state),
            lambda: varying(state.memory.vector, own),
        )
        clean = loss.ascent()
        gradient = _tree.upcast(clean.gradient)
        along = _tree.unit(gradient)
        share = _tree.dot(along, vector)
        # A norm that is not finite perturbs nothing, not even along the vector.
        is_known = jnp.isfinite(_tree.squared_norm(gradient))
        turn = jnp.where(is_known, alpha * jnp.sign(share), 0.0)
        perturbation = jax.tree.map(lambda g, v: state.rho * (g + turn * (v - share * g)), along, vector)
        return loss.pair(clean, loss.at(perturbation), statistics=vector)

    def descent(gradients: SAMGradients, state: SAMState, params: optax.Params) -> tuple[optax.Updates, Any]:
        del params
        if gradients.statistics is None:
            msg = (
                "`eigen_sam` needs the eigenvector of the evaluation: pass `update` the pair as it is, or "
                "write `update(grads.perturbed, state, params, clean_updates=grads.clean, "
                "statistics=grads.statistics)`."
            )
            raise TypeError(msg)
        # The mean of several estimates is shorter than one.
        vector = _tree.select(is_due(state), _tree.unit(gradients.statistics), state.memory.vector)
        return gradients.perturbed, EigenSAMMemory(vector)

    def init_memory(params: optax.Params) -> EigenSAMMemory:
        return EigenSAMMemory(_tree.zeros_like(params))

    return sharpness_aware(
        rho, None, descent, init_memory, evaluate=evaluate, ascent_only=True, has_plain_step=False
    )


def _is_zero(vector: optax.Updates) -> jax.Array:
    """Whether no vector is known."""
    return _tree.squared_norm(vector) == 0.0
