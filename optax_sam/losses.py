"""Losses of outputs that methods beside SAM's own add, or climb along."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from optax_sam import _checks


def bisam(logits: jax.Array, labels: jax.Array, *, form: Literal["log", "tanh"] = "log") -> jax.Array:
    r"""The objective along which BiSAM climbs: a smooth lower bound of the 0-1 loss, times mu.

    .. math::
      Q = \log \sum_j e^{\mu\, \varphi(z_j - z_y)}, \quad
      \varphi(x) = 1 - \log\left(1 + (e - 1)\, e^{-x}\right) \;\text{or}\; \tanh(x / 10)

    For the ascent alone, as `ascent_loss=`; the descent keeps its cross entropy.

    Args:
      logits: The outputs of the network. shape=(..., classes), floating-point
      labels: The right classes, integers. shape=(...)
      form: "log", with :math:`\mu = 1`, or "tanh", with :math:`\mu = 10`, as in the authors' code.

    Returns:
      The objective of each example. shape=(...)

    Raises:
      ValueError: If `form` is neither, or the shapes do not fit.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> def loss(params, x, y):
      ...     return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(x @ params, y))
      >>> def ascent_loss(params, x, y):
      ...     return jnp.mean(optax_sam.losses.bisam(x @ params, y))
      >>> sam = optax_sam.sam(rho=0.1)
      >>> value_and_grad = optax_sam.sam_value_and_grad(loss, sam, ascent_loss=ascent_loss)
      >>> print(f"{optax_sam.losses.bisam(jnp.array([2.0, 1.0, 0.0]), jnp.array(1)):.4f}")
      1.1458

      Any other objective will do. This one weighs the classes by their rarity, in the ascent alone, so that
      the perturbation serves rare classes:

      >>> weights = jnp.array([1.0, 1.0, 10.0])
      >>> def class_wise(params, x, y):
      ...     each = optax.losses.softmax_cross_entropy_with_integer_labels(x @ params, y)
      ...     return jnp.sum(weights[y] * each) / jnp.sum(weights[y])
      >>> value_and_grad = optax_sam.sam_value_and_grad(loss, sam, ascent_loss=class_wise)

    References:
      Xie et al., `Improving SAM Requires Rethinking its Optimization Formulation
      <https://arxiv.org/abs/2407.12993>`_, ICML 2024, in the form of the authors' code.
    """
    _checks.choice("form", form, ("log", "tanh"))
    if labels.shape != logits.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        msg = (
            "`labels` must be integers in the shape of the logits without their last axis, "
            f"{logits.shape[:-1]}, got shape {labels.shape} and dtype {labels.dtype}."
        )
        raise ValueError(msg)
    margins = logits - jnp.take_along_axis(logits, labels[..., None], axis=-1)
    if form == "log":
        exponents = 1.0 - jnp.logaddexp(0.0, jnp.log(jnp.e - 1.0) - margins)
    else:
        exponents = 10.0 * jnp.tanh(margins / 10.0)
    return jax.scipy.special.logsumexp(exponents, axis=-1)


def trajectory(logits: jax.Array, past_logits: jax.Array, temperature: float = 5.0) -> jax.Array:
    r"""What SAF and MESA add to the loss: how far the outputs have moved from those of before.

    .. math::
      T^2\, \mathrm{KL}\left(\mathrm{softmax}(z^{\mathrm{past}} / T) \,\|\, \mathrm{softmax}(z / T)\right)

    It keeps the loss from falling steeply along the path of training, for the price of no second gradient.
    The past outputs are those that the same examples had some epochs ago (SAF: keep them by the number of the
    example), or those of averaged params, such as `optax.ema` keeps them (MESA: one more forward pass).

    Args:
      logits: The outputs of the network. shape=(..., classes), floating-point
      past_logits: Those of before, in the same shape; nothing is differentiated through them.
      temperature: :math:`T`, > 0.

    Returns:
      The term of each example, to be weighed by 0.3 (SAF) or 0.8 (MESA). shape=(...)

    Raises:
      TypeError, ValueError: If `temperature` is no number above 0, or the shapes differ.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> term = optax_sam.losses.trajectory(jnp.array([2.0, 1.0, 0.0]), jnp.array([1.0, 1.5, 0.0]))
      >>> print(f"{0.3 * term:.4f}")
      0.0628

    References:
      Du et al., `Sharpness-Aware Training for Free <https://arxiv.org/abs/2205.14083>`_, NeurIPS 2022, with
      the factor :math:`T^2` of the authors' code; weights and temperature are theirs.
    """
    _checks.number("temperature", temperature, low=0.0, above=True)
    if logits.shape != past_logits.shape:
        msg = f"`past_logits` must have the shape of `logits`, {logits.shape}, got {past_logits.shape}."
        raise ValueError(msg)
    past = jax.nn.log_softmax(jax.lax.stop_gradient(past_logits) / temperature)
    present = jax.nn.log_softmax(logits / temperature)
    return temperature**2 * jnp.sum(jnp.exp(past) * (past - present), axis=-1)
