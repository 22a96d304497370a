"""The door for `flax.training.dynamic_scale`: loss scaling that finds its own scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeVar, Unpack, overload

import jax
import jax.numpy as jnp

from optax_sam import _tree, _value_and_grad
from optax_sam._loss import AxisName, SAMGradients
from optax_sam._types import AuxT, OptionsButAxis, OutputT
from optax_sam._value_and_grad import SAMMetrics
from optax_sam._variant import SharpnessAwareTransformation

ScaleT = TypeVar("ScaleT")


class ScaledValueAndGrad(Protocol[OutputT]):
    """What `dynamic_scale_value_and_grad` returns: a function that asks for the optimizer's state."""

    def __call__(self, *args: Any, state: Any, **kwargs: Any) -> OutputT:
        """The new scale, whether all is finite, the value of the loss and the pair of gradients."""
        ...


@overload
def dynamic_scale_value_and_grad(
    dynamic_scale: ScaleT,
    fun: Callable[..., Any],
    variant: SharpnessAwareTransformation,
    argnums: int | Sequence[int] = 0,
    has_aux: Literal[False] = False,
    axis_name: AxisName | None = None,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[OptionsButAxis],
) -> ScaledValueAndGrad[tuple[ScaleT, jax.Array, jax.Array, SAMGradients]]: ...


@overload
def dynamic_scale_value_and_grad(
    dynamic_scale: ScaleT,
    fun: Callable[..., Any],
    variant: SharpnessAwareTransformation,
    argnums: int | Sequence[int] = 0,
    has_aux: Literal[False] = False,
    axis_name: AxisName | None = None,
    *,
    return_metrics: Literal[True],
    **options: Unpack[OptionsButAxis],
) -> ScaledValueAndGrad[tuple[ScaleT, jax.Array, jax.Array, SAMGradients, SAMMetrics]]: ...


@overload
def dynamic_scale_value_and_grad(
    dynamic_scale: ScaleT,
    fun: Callable[..., tuple[Any, AuxT]],
    variant: SharpnessAwareTransformation,
    argnums: int | Sequence[int] = 0,
    has_aux: Literal[True] = ...,
    axis_name: AxisName | None = None,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[OptionsButAxis],
) -> ScaledValueAndGrad[tuple[ScaleT, jax.Array, tuple[jax.Array, AuxT], SAMGradients]]: ...


@overload
def dynamic_scale_value_and_grad(
    dynamic_scale: ScaleT,
    fun: Callable[..., tuple[Any, AuxT]],
    variant: SharpnessAwareTransformation,
    argnums: int | Sequence[int] = 0,
    has_aux: Literal[True] = ...,
    axis_name: AxisName | None = None,
    *,
    return_metrics: Literal[True],
    **options: Unpack[OptionsButAxis],
) -> ScaledValueAndGrad[tuple[ScaleT, jax.Array, tuple[jax.Array, AuxT], SAMGradients, SAMMetrics]]: ...


def dynamic_scale_value_and_grad(
    dynamic_scale: Any,
    fun: Callable[..., Any],
    variant: SharpnessAwareTransformation,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    axis_name: AxisName | None = None,
    **options: Any,
) -> ScaledValueAndGrad[Any]:
    """Like `dynamic_scale.value_and_grad`, for a sharpness-aware variant.

    The loss is multiplied by the scale in both passes, both gradients are divided by it before the
    ascent, and the scale moves by Flax's own rule: down after a step with a gradient that is not finite
    (clean or perturbed, on any device), up after many steps without.

    Args:
      dynamic_scale: The `flax.training.dynamic_scale.DynamicScale`.
      fun: The loss: a function that returns a scalar, or a pair `(scalar, aux)`.
      variant: The bare variant, e.g. `optax_sam.sam(0.05)`; not the chain that contains it.
      argnums: Which positional argument holds the params, or which ones do.
      has_aux: Whether `fun` returns a pair.
      axis_name: Inside `jax.pmap` or `jax.shard_map`, the name of the axis over which the batch is
        spread.
      **options: All other options of `optax_sam.sam_value_and_grad`.

    Returns:
      A function `(*args, state, **kwargs)` that takes the arguments of `fun` and the optimizer's state,
      and returns `(dynamic_scale, is_finite, value, grads)` or
      `(dynamic_scale, is_finite, (value, aux), grads)`, and metrics after that, if asked for. Where
      `is_finite` is false, keep the old params and the whole old optimizer state, the variant's
      included, as with Flax's own.

    Raises:
      TypeError, ValueError: As `optax_sam.sam_value_and_grad`.

    Examples:
      >>> import functools, jax, jax.numpy as jnp, optax, optax_sam
      >>> from flax.training.dynamic_scale import DynamicScale
      >>> sam = optax_sam.sam(rho=0.1)
      >>> tx = optax.chain(sam, optax.sgd(0.01))
      >>> loss = lambda w: jnp.sum(w.astype(jnp.float16) ** 2)
      >>> params = jnp.array([3.0, 4.0])
      >>> opt_state = tx.init(params)
      >>> dynamic_scale = DynamicScale()  # 65536, too much for half precision at first.
      >>> for _ in range(6):
      ...     grad_fn = optax_sam.linen.dynamic_scale_value_and_grad(dynamic_scale, loss, sam)
      ...     dynamic_scale, is_finite, value, grads = grad_fn(params, state=opt_state)
      ...     updates, new_opt_state = tx.update(grads, opt_state, params)
      ...     new_params = optax.apply_updates(params, updates)
      ...     params, opt_state = jax.tree.map(
      ...         functools.partial(jnp.where, is_finite), (new_params, new_opt_state), (params, opt_state)
      ...     )
      ...     print(f"{dynamic_scale.scale:.0f} {params[0]:.3f}")
      32768 3.000
      16384 3.000
      8192 3.000
      4096 3.000
      4096 2.939
      4096 2.879

    References:
      Micikevicius et al., `Mixed Precision Training <https://arxiv.org/abs/1710.03740>`_, ICLR 2018.
    """
    if not hasattr(dynamic_scale, "scale") or not hasattr(dynamic_scale, "value_and_grad"):
        msg = (
            "`dynamic_scale` must be a `flax.training.dynamic_scale.DynamicScale`, got "
            f"{type(dynamic_scale).__name__}. For a fixed scale write `loss_scale=` at the call of "
            "`optax_sam.sam_value_and_grad`."
        )
        raise TypeError(msg)
    value_and_grad = _value_and_grad.sam_value_and_grad(
        fun, variant, argnums, has_aux, axis_name=axis_name, **options
    )

    def value_and_grads(*args: Any, state: Any = None, **kwargs: Any) -> Any:
        if "loss_scale" in kwargs:
            msg = (
                "`loss_scale=` has no place here: the scale is that of `dynamic_scale`. For a fixed scale "
                "call what `optax_sam.sam_value_and_grad` returns."
            )
            raise TypeError(msg)
        output, grads, *metrics = value_and_grad(*args, state=state, loss_scale=dynamic_scale.scale, **kwargs)
        finite = _tree.all_finite(grads)
        # Flax moves the scale by the gradient of a loss; this one has a gradient of 1 or of NaN.
        probe = dynamic_scale.value_and_grad(lambda x: x * jnp.where(finite, 1.0, jnp.nan))
        moved, *_ = probe(jnp.ones(()))
        return moved, finite, output, grads, *metrics

    return value_and_grads
