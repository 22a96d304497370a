"""The door for Equinox: `sam_value_and_grad` for models that are pytrees of arrays and of anything else."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp

from optax_sam import _checks, _value_and_grad
from optax_sam._loss import CompositeLoss, SAMGradients
from optax_sam._types import AuxT, SAMOptions, SAMValueAndGrad
from optax_sam._value_and_grad import SAMMetrics
from optax_sam._variant import SharpnessAwareTransformation


@overload
def sam_value_and_grad(
    fun: Callable[..., Any],
    variant: SharpnessAwareTransformation,
    *,
    has_aux: Literal[False] = False,
    return_metrics: Literal[False] = False,
    **options: Unpack[SAMOptions],
) -> SAMValueAndGrad[tuple[jax.Array, SAMGradients]]: ...


@overload
def sam_value_and_grad(
    fun: Callable[..., Any],
    variant: SharpnessAwareTransformation,
    *,
    has_aux: Literal[False] = False,
    return_metrics: Literal[True],
    **options: Unpack[SAMOptions],
) -> SAMValueAndGrad[tuple[jax.Array, SAMGradients, SAMMetrics]]: ...


@overload
def sam_value_and_grad(
    fun: Callable[..., tuple[Any, AuxT]],
    variant: SharpnessAwareTransformation,
    *,
    has_aux: Literal[True],
    return_metrics: Literal[False] = False,
    **options: Unpack[SAMOptions],
) -> SAMValueAndGrad[tuple[tuple[jax.Array, AuxT], SAMGradients]]: ...


@overload
def sam_value_and_grad(
    fun: Callable[..., tuple[Any, AuxT]],
    variant: SharpnessAwareTransformation,
    *,
    has_aux: Literal[True],
    return_metrics: Literal[True],
    **options: Unpack[SAMOptions],
) -> SAMValueAndGrad[tuple[tuple[jax.Array, AuxT], SAMGradients, SAMMetrics]]: ...


def sam_value_and_grad(
    fun: Callable[..., Any],
    variant: SharpnessAwareTransformation,
    *,
    has_aux: bool = False,
    return_metrics: bool = False,
    **options: Unpack[SAMOptions],
) -> SAMValueAndGrad[Any]:
    """Like `equinox.filter_value_and_grad`, for a sharpness-aware variant.

    The loss takes the model as its first argument: any pytree. Its floating-point arrays are the params.
    Everything else in it, such as functions, flags and integer arrays, reaches both passes as it is. Both
    passes also get the same `equinox.nn.State` and the same random keys.

    Optimizers take the params alone: `tx.init(eqx.filter(model, eqx.is_inexact_array))`.

    Args:
      fun: The loss: a function that returns a scalar, or a pair `(scalar, aux)`.
      variant: The bare variant, e.g. `optax_sam.sam(0.05)`; not the chain that contains it.
      has_aux: Whether `fun` returns a pair.
      return_metrics: Whether to return `SAMMetrics` as a third output.
      **options: All other options of `optax_sam.sam_value_and_grad`; `batch_argnums` counts the model as
        argument 0. With `num_shards` or `microbatch_size` an `equinox.nn.State` in aux comes back with its
        floating-point arrays averaged over the parts, and its integers and booleans moved as in one pass.

    Returns:
      A function `(model, *args, state, loss_scale=None, **kwargs)` that takes the arguments of `fun` and,
      by keyword, the optimizer's state. It returns `(value, grads)` or `((value, aux), grads)`, and metrics
      after that, if asked for. Both gradients are like the model, with None for what is no param.

    Raises:
      TypeError: If the first argument holds no floating-point array, or `fun` is a gradient already.
      ValueError: As `optax_sam.sam_value_and_grad`.

    Examples:
      >>> import equinox as eqx, jax, jax.numpy as jnp, optax, optax_sam
      >>> sam = optax_sam.sam(rho=0.05)
      >>> tx = optax.chain(sam, optax.sgd(0.1))
      >>> model = eqx.nn.MLP(in_size=3, out_size=1, width_size=8, depth=1, key=jax.random.key(0))
      >>> opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
      >>> def loss_fn(model, x):
      ...     return jnp.mean((jax.vmap(model)(x) - 1.0) ** 2)
      >>> @eqx.filter_jit
      ... def train_step(model, opt_state, x):
      ...     loss, grads = optax_sam.equinox.sam_value_and_grad(loss_fn, sam)(model, x, state=opt_state)
      ...     updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
      ...     return eqx.apply_updates(model, updates), opt_state, loss
      >>> x = jnp.arange(6.0).reshape(2, 3) / 6
      >>> losses = []
      >>> for _ in range(3):
      ...     model, opt_state, loss = train_step(model, opt_state, x)
      ...     losses.append(f"{loss:.2f}")
      >>> print(losses)
      ['1.33', '0.46', '0.14']

    References:
      Foret et al., `Sharpness-Aware Minimization <https://arxiv.org/abs/2010.01412>`_, ICLR 2021.
    """
    import equinox as eqx  # Here and not above: the core does without Equinox.

    settings: dict[str, Any] = {"has_aux": has_aux, "return_metrics": return_metrics, **options}
    _refuse_gradient(eqx, fun)
    if "argnums" in settings:
        msg = (
            "`argnums` has no place here: as in Equinox the first argument is differentiated. Put several "
            "models into a tuple, and pass that first."
        )
        raise ValueError(msg)
    _value_and_grad.sam_value_and_grad(fun, variant, **settings)  # Checks what was given.
    in_parts = any(settings.get(name) is not None for name in ("num_shards", "microbatch_size"))
    ascent_loss = settings.pop("ascent_loss", None)

    def value_and_grads(*args: Any, state: Any = None, loss_scale: Any = None, **kwargs: Any) -> Any:
        params, static = _split(eqx, args)
        starts = _states(eqx, (args, kwargs)) if in_parts and has_aux else None
        loss, other = (_on_params(eqx, x, static, starts) for x in (fun, ascent_loss))
        value_and_grad = _value_and_grad.sam_value_and_grad(loss, variant, ascent_loss=other, **settings)
        outputs = value_and_grad(params, *args[1:], state=state, loss_scale=loss_scale, **kwargs)
        if starts is None:
            return outputs
        (value, (aux, parts)), *rest = outputs
        return (value, _moved(eqx, aux, starts, parts)), *rest

    return value_and_grads


def _refuse_gradient(eqx: Any, fun: Any) -> None:
    for name in ("filter_value_and_grad", "filter_grad"):
        if type(fun) is type(getattr(eqx, name)(len)):
            msg = (
                f"`fun` must be the loss, got `eqx.{name}(loss)`. Write "
                f"`optax_sam.equinox.sam_value_and_grad(loss, variant)` in place of `eqx.{name}(loss)`."
            )
            raise TypeError(msg)


def _split(eqx: Any, args: tuple[Any, ...]) -> tuple[Any, Any]:
    """The params of the model, and all else in it."""
    if not args:
        msg = "The first argument is differentiated: pass the model by position."
        raise TypeError(msg)
    params, static = eqx.partition(args[0], eqx.is_inexact_array)
    if not jax.tree.leaves(params):
        msg = (
            "The first argument is differentiated and must hold floating-point arrays, got "
            f"a {type(args[0]).__name__} without any."
        )
        raise TypeError(msg)
    return params, static


def _on_params(eqx: Any, fun: Any, static: Any, starts: Any) -> Any:
    """The loss as a function of the params of the model."""
    if fun is None:
        return None
    if isinstance(fun, CompositeLoss):
        model_fn = _on_params(eqx, fun.model_fn, static, starts)
        return dataclasses.replace(fun, model_fn=model_fn)

    @functools.wraps(fun, updated=())
    def loss(params: Any, *args: Any, **kwargs: Any) -> Any:
        # An `equinox.nn.State` can be used once only: each pass gets a copy.
        args, kwargs = jax.tree.map(lambda x: x, (args, kwargs))
        output = fun(eqx.combine(params, static), *args, **kwargs)
        if starts is None:
            return output
        value, aux = _checks.value_and_aux(output)
        return value, (_relative(eqx, aux, starts), jnp.ones((), jnp.int32))

    # The core asks a partial which arguments it has bound.
    return functools.partial(loss, **fun.keywords) if isinstance(fun, functools.partial) else loss


# Over the parts of a batch floats in aux are averaged and integers are summed. Neither is right for the
# counters of an `equinox.nn.State`, such as that of BatchNorm: they travel as differences from the start.


def _keys_and_shapes(state: Any) -> Any:
    """What tells states apart. Two models of one class have states of the same keys."""
    return jax.tree.structure(state), tuple(jnp.shape(x) for x in jax.tree.leaves(state))


def _states(eqx: Any, tree: Any) -> dict[Any, Any]:
    """The states in a tree, by their keys and shapes."""
    starts: dict[Any, Any] = {}
    for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, eqx.nn.State)):
        if not isinstance(x, eqx.nn.State):
            continue
        # With the same dtypes any one serves all: the differences from it are added to it again.
        start = starts.setdefault(_keys_and_shapes(x), x)
        dtypes = [[leaf.dtype for leaf in jax.tree.leaves(state)] for state in (x, start)]
        if dtypes[0] != dtypes[1]:
            msg = (
                "With `num_shards` or `microbatch_size` two `equinox.nn.State`s of the same keys and shapes "
                f"must have the same dtypes, got {dtypes[1]} and {dtypes[0]}."
            )
            raise TypeError(msg)
    return starts


def _map_states(eqx: Any, function: Callable[..., Any], tree: Any, starts: dict[Any, Any]) -> Any:
    """Maps over the arrays of all states in a tree, each with what it was at the start."""

    def at_state(x: Any) -> Any:
        if not isinstance(x, eqx.nn.State):
            return x
        start = starts.get(_keys_and_shapes(x))
        if start is None:
            return jax.tree.map(lambda leaf: function(leaf, None), x)
        return jax.tree.map(function, x, start)

    return jax.tree.map(at_state, tree, is_leaf=lambda x: isinstance(x, eqx.nn.State))


def _is_counter(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.signedinteger) or x.dtype == jnp.bool_


def _relative(eqx: Any, aux: Any, starts: dict[Any, Any]) -> Any:
    """The aux of one part, with the counters of its states as differences from where they started."""

    def difference(x: Any, start: Any) -> Any:
        if jnp.issubdtype(x.dtype, jnp.floating):
            return x
        if start is None or not _is_counter(x):
            msg = (
                "With `num_shards` or `microbatch_size` an `equinox.nn.State` in aux must have the keys "
                "and shapes of one that the loss got. Its floating-point arrays are averaged over the parts, "
                "its signed integers and booleans move as in one pass, and others are refused: got dtype "
                f"{x.dtype}."
            )
            raise TypeError(msg)
        dtype = jnp.promote_types(x.dtype, jnp.int32)
        return x.astype(dtype) - start.astype(dtype)

    return _map_states(eqx, difference, aux, starts)


def _moved(eqx: Any, aux: Any, starts: dict[Any, Any], parts: Any) -> Any:
    """The aux of all parts, with the counters of its states where one pass leaves them."""

    def move(x: Any, start: Any) -> Any:
        return x if start is None or not _is_counter(x) else (start + x // parts).astype(start.dtype)

    return _map_states(eqx, move, aux, starts)
