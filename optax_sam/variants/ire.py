"""IRE: implicit regularization enhancement (Wang et al., NeurIPS 2024)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam import _checks, _tree
from optax_sam._loss import serializable
from optax_sam._state import with_holes_of
from optax_sam._variant import as_pair, is_pair, value_at


@serializable
class IREState(NamedTuple):
    """The state of IRE.

    Attributes:
      step: How many updates were made. shape=(), dtype=int32
      flat: Which coordinates are boosted. A pytree of booleans like params.
      base: The state of the base optimizer.
    """

    step: jax.Array
    flat: Any
    base: optax.OptState


def ire(
    base_optimizer: optax.GradientTransformation,
    kappa: optax.ScalarOrSchedule = 1.0,
    *,
    flat_fraction: float = 0.9,
    interval: int = 10,
    start_step: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Speeds any optimizer up along the flattest coordinates.

    .. math:: \Delta w = (1 + \kappa\, n) \odot \mathrm{base}(g), \quad
      n_i = 1 \text{ for the fraction } \gamma \text{ of coordinates with the smallest } h_i = \bar g_i^2

    Sharpness-aware drift lives in flat directions, which the boost accelerates while the sharp ones,
    which limit the learning rate, keep their step. What is boosted is the realized update: momentum,
    preconditioning and decoupled weight decay included.

    Args:
      base_optimizer: Any optimizer, a chain with a variant included.
      kappa: The boost, >= 0, or a schedule of the step; 0 recovers the base optimizer.
      flat_fraction: The fraction :math:`\gamma` of coordinates that count as flat, in [0, 1].
      interval: How many steps a choice of coordinates lasts, an integer >= 1.
      start_step: The step at which the boost begins, an integer >= 0: after the warm-up.

    Returns:
      An optimizer. Its `update` takes what the base optimizer's takes, and as `curvature_updates=` a
      gradient whose square stands for the curvature. The paper's is a gradient with labels that the
      model itself draws, which `sampled_label_gradient` makes; it is used every `interval` steps.
      Without it the clean gradient that the base optimizer gets is used. A gradient that is not
      finite leaves the choice as it was. No gradient evaluations of its own; one byte per
      weight, a boolean, as state.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2
      >>> tx = optax_sam.ire(optax.sgd(0.05), kappa=3.0, flat_fraction=0.5)
      >>> params = jnp.array([1.0, 1.0])
      >>> updates, state = tx.update(jax.grad(loss)(params), tx.init(params), params)
      >>> print([f"{x:.2f}" for x in updates])  # The second, flat coordinate goes four times as far.
      ['-0.50', '-0.20']

    References:
      Wang et al., `Improving Generalization and Convergence by Enhancing Implicit Regularization
      <https://arxiv.org/abs/2405.20763>`_, NeurIPS 2024, without the moving average of the curvature,
      whose published default is off.
    """
    _checks.optimizer("base_optimizer", base_optimizer)
    _checks.scalar_or_schedule("kappa", kappa)
    _checks.number("flat_fraction", flat_fraction, low=0.0, high=1.0)
    _checks.number("interval", interval, low=1, integer=True)
    _checks.number("start_step", start_step, low=0, integer=True)
    base = optax.with_extra_args_support(base_optimizer)

    def init(params: optax.Params) -> IREState:
        flat = jax.tree.map(lambda w: jnp.zeros_like(w, dtype=bool), params)
        return IREState(jnp.zeros((), jnp.int32), flat, base.init(params))

    def update(
        updates: Any,
        state: Any,
        params: optax.Params | None = None,
        *,
        curvature_updates: optax.Updates | None = None,
        clean_updates: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, IREState]:
        gradient = curvature_updates
        if gradient is None:
            has_pair = clean_updates is not None or is_pair(updates, params)
            gradient = as_pair(updates, clean_updates, params=params).clean if has_pair else updates
        if clean_updates is not None:
            extra_args["clean_updates"] = clean_updates
        gradient = with_holes_of(state.flat, gradient)  # Inside a mask.
        what = "The gradient" if curvature_updates is None else "`curvature_updates`"
        _checks.same_shapes(what, gradient, state.flat, updates=True)
        base_updates, base_state = base.update(updates, state.base, params, **extra_args)
        due = (state.step >= start_step) & ((state.step - start_step) % interval == 0)
        due &= _tree.all_finite(gradient)
        flat = _tree.cond_or_if(due, lambda: _flattest(gradient, flat_fraction), lambda: state.flat)
        factor = value_at(kappa, state.step)

        def boost(u: jax.Array, n: jax.Array) -> jax.Array:
            return jnp.where(n, (1.0 + factor) * u, u).astype(u.dtype)

        new_state = IREState(jnp.asarray(optax.safe_increment(state.step)), flat, base_state)
        return jax.tree.map(boost, base_updates, flat), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _flattest(gradient: optax.Updates, fraction: Any) -> Any:
    """Marks the fraction of all coordinates with the smallest absolute gradient; ties all count."""
    sizes = jax.tree.map(jnp.abs, _tree.upcast(gradient))
    return _tree.smallest(sizes, _tree.count_of(sizes, fraction))


def sampled_label_gradient(
    logits_fn: Callable[..., jax.Array], key: jax.Array, params: optax.Params, *args: Any, **kwargs: Any
) -> optax.Updates:
    r"""The gradient of the cross entropy with labels that the model draws itself.

    .. math:: \bar g = \nabla \frac1B \sum_i -\log p_w(\hat y_i \mid x_i), \quad
      \hat y_i \sim p_w(\cdot \mid x_i)

    Its square, times the batch size, is an unbiased estimate of the diagonal of the Fisher information:
    what `ire` takes as `curvature_updates=`.

    Args:
      logits_fn: `(params, *args, **kwargs) -> logits`, of shape (..., classes).
      key: A random key, typed or raw, or an integer seed.
      params: Where to take the gradient.
      *args: Further arguments of `logits_fn`.
      **kwargs: Further keyword arguments of `logits_fn`.

    Returns:
      A pytree like params.

    Raises:
      TypeError: If the key is none.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_sam
      >>> logits = lambda w, x: x @ w
      >>> key, params = jax.random.key(0), jnp.zeros((3, 2))
      >>> gradient = optax_sam.sampled_label_gradient(logits, key, params, jnp.eye(3))
      >>> print([f"{abs(x):.3f}" for x in gradient.ravel()])
      ['0.167', '0.167', '0.167', '0.167', '0.167', '0.167']

    References:
      Wang et al., `Improving Generalization and Convergence by Enhancing Implicit Regularization
      <https://arxiv.org/abs/2405.20763>`_, NeurIPS 2024, after its code.
    """
    key = _checks.key("key", key)

    def loss(params: optax.Params) -> jax.Array:
        logits = logits_fn(params, *args, **kwargs)
        labels = jax.lax.stop_gradient(jax.random.categorical(key, logits))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    return jax.grad(loss)(params)
