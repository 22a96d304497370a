"""Losses for BiSAM (its ascent), SAF and MESA (added to the loss) and ESAM (its descent)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from optax_sam import _checks, _tree
from optax_sam._gradient import batch_size


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

    It keeps the loss from falling steeply along the path of training, without a second gradient.
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
    # A class that is masked by -inf has the share 0, and adds nothing.
    share = jnp.exp(past)
    terms = jnp.where(share > 0.0, share * (past - present), 0.0)
    return temperature**2 * jnp.sum(terms, axis=-1)


@dataclasses.dataclass(frozen=True)
class SharpestExamples:
    r"""The loss of the examples that the perturbation harms most: ESAM's selection of data.

    .. math::
      L_S(w + \epsilon) = \frac{1}{|S|} \sum_{i \in S} \ell_i(w + \epsilon), \quad
      S = \text{the } \gamma B \text{ examples with the largest } \ell_i(w + \epsilon) - \ell_i(w)

    The ascent goes along the mean over all examples, `ascent_loss=loss.mean`. A step costs one gradient of
    all examples, a forward pass of all at the perturbed point, and a gradient of the selected ones: about
    :math:`4/3 + \gamma`, because under `jit` the compiler reuses the losses at params that the ascent has
    computed. Pass the params a second time, as `clean_params=params`; a Flax NNX model as
    `clean_params=nnx.clone(model)`. Where the radius is 0, no loss has risen, and the first
    examples are taken.

    Each device, shard or microbatch selects among its own examples. In a batch that `jit` spreads over
    devices all are compared, and the selected ones move between devices, which JAX refuses on an explicit
    mesh: take `jax.shard_map` there.

    Attributes:
      example_losses: `(params, *args, **kwargs) -> losses`, one value for each example, shape=(B,).
      fraction: The part :math:`\gamma` of the examples that is kept, in (0, 1], rounded to at least one;
        1 recovers SAM.
      batch_argnums: Which positional arguments are batches, as in `sam_value_and_grad`.
      has_aux: Whether `example_losses` returns a pair, of which aux is the second.

    Raises:
      TypeError, ValueError: If an argument is out of its range, or the losses are not one for each example.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> def example_losses(params, x, y):
      ...     return (x @ params - y) ** 2
      >>> loss = optax_sam.losses.SharpestExamples(example_losses, 0.5, batch_argnums=(1, 2))
      >>> sam = optax_sam.sam(rho=0.1)  # ESAM's other half is `ascent=optax_sam.ascent.random_mask(0.6)`.
      >>> value_and_grad = optax_sam.sam_value_and_grad(loss, sam, ascent_loss=loss.mean)
      >>> params, x, y = jnp.array([1.0, 2.0]), jnp.eye(2), jnp.zeros(2)
      >>> value, grads = value_and_grad(params, x, y, clean_params=params, state=sam.init(params))
      >>> print(value, [f"{g:.3f}" for g in grads.perturbed])
      2.5 ['0.000', '4.179']

    References:
      Du et al., `Efficient Sharpness-Aware Minimization for Improved Training of Neural Networks
      <https://arxiv.org/abs/2110.03141>`_, ICLR 2022; the authors' code keeps one example fewer, because
      it takes those strictly above the smallest selected rise.
    """

    example_losses: Callable[..., Any]
    fraction: float
    batch_argnums: int | Sequence[int] = 1
    has_aux: bool = False

    def __post_init__(self) -> None:
        """Checks the arguments."""
        _checks.static("fraction", self.fraction)
        _checks.number("fraction", self.fraction, low=0.0, high=1.0, above=True)
        for position in _checks.positions("batch_argnums", self.batch_argnums):
            _checks.number("batch_argnums", position, low=1)  # Params are argument 0.

    def _losses(self, params: Any, args: Sequence[Any], kwargs: Any) -> tuple[jax.Array, Any]:
        """The loss of each example, and aux if there is one."""
        output: Any = self.example_losses(params, *args, **kwargs)
        losses, aux = _checks.value_and_aux(output) if self.has_aux else (_checks.value(output), None)
        size = batch_size(self._batch(args))
        if np.shape(losses) != (size,):
            msg = (
                "`example_losses` must return one value for each example, without a mean over the batch: "
                f"shape {(size,)}, got {np.shape(losses)}."
            )
            raise ValueError(msg)
        return losses, aux

    def _batch(self, args: Sequence[Any]) -> list[Any]:
        return [args[i - 1] for i in _checks.positions("batch_argnums", self.batch_argnums)]

    def _mean(self, params: Any, args: Sequence[Any], kwargs: Any) -> Any:
        losses, aux = self._losses(params, args, kwargs)
        return (jnp.mean(losses), aux) if self.has_aux else jnp.mean(losses)

    def mean(self, params: Any, *args: Any, clean_params: Any, **kwargs: Any) -> Any:
        """The mean over all examples: what the ascent goes along. With `has_aux` a pair of it and aux."""
        del clean_params
        return self._mean(params, args, kwargs)

    def __call__(self, params: Any, *args: Any, clean_params: Any, **kwargs: Any) -> Any:
        """The mean over the selected examples. With `has_aux` a pair of it and aux."""
        # Each pass gets a copy: random keys and states of models must not move between them.
        before, _ = self._losses(clean_params, *jax.tree.map(lambda x: x, (args, kwargs)))
        # A model also holds what has no gradient, such as functions.
        fixed = jax.tree.map(lambda x: jax.lax.stop_gradient(x) if isinstance(x, jax.Array) else x, params)
        after, _ = self._losses(fixed, *jax.tree.map(lambda x: x, (args, kwargs)))
        count = max(1, round(self.fraction * len(before)))
        _, chosen = jax.lax.top_k(_tree.upcast(after) - _tree.upcast(before), count)
        selected = list(args)
        for i in _checks.positions("batch_argnums", self.batch_argnums):
            selected[i - 1] = jax.tree.map(lambda x: jnp.take(x, chosen, axis=0), args[i - 1])
        return self._mean(params, selected, kwargs)
