"""Checks of arguments, each an error that names the argument, what was got and what is right."""

import inspect
import operator
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.core import Tracer

T = TypeVar("T")


def number(
    name: str,
    value: Any,
    *,
    low: float = -np.inf,
    high: float = np.inf,
    above: bool = False,
    below: bool = False,
    integer: bool = False,
) -> None:
    """Raises unless it is a number in the range; of a traced one only the shape can be told.

    Args:
      name: The argument's name, for the message.
      value: What the caller passed.
      low: The least value; `above` excludes it.
      high: The largest value; `below` excludes it.
      above: Whether the value must be strictly above `low`.
      below: Whether the value must be strictly below `high`.
      integer: Whether only whole numbers will do.
    """
    kind = "an integer" if integer else "a number"
    if isinstance(value, Tracer) and np.ndim(value) == 0:
        return  # As under `optax.inject_hyperparams`.
    if isinstance(value, jax.Array | np.ndarray | np.generic) and np.ndim(value) == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        msg = f"`{name}` must be {kind}, got {value!r} of type {type(value).__name__}."
        raise TypeError(msg)
    whole = not integer or isinstance(value, int)
    inside = (value > low if above else value >= low) and (value < high if below else value <= high)
    # A number that is not finite is never inside, not even where the range has no end.
    if not (whole and inside and np.isfinite(value)):
        left, right = "(" if above or low == -np.inf else "[", ")" if below or high == np.inf else "]"
        msg = f"`{name}` must be {kind} in the range {left}{low}, {high}{right}, got {value!r}."
        raise ValueError(msg)


def static(name: str, value: Any) -> None:
    """Raises if it is an array: the number decides the shape of the program."""
    if isinstance(value, jax.Array):
        msg = (
            f"`{name}` decides what is evaluated and must be a Python number, got an array. Under "
            f'`optax.inject_hyperparams` name it in the static arguments, `static_args=("{name}",)`.'
        )
        raise TypeError(msg)


def static_integer(name: str, value: Any, *, low: float = -np.inf) -> None:
    """Raises unless it is a Python integer: the number decides the shape of the program."""
    static(name, value)
    number(name, value, low=low, integer=True)


def scalar_or_schedule(name: str, value: Any, *, low: float = 0.0, high: float = np.inf) -> None:
    """As `number`, but a schedule (any callable of the step) passes."""
    if callable(value):
        return
    if not isinstance(value, jax.Array | np.ndarray | np.generic | int | float) or isinstance(value, bool):
        msg = (
            f"`{name}` must be a number or a schedule (a function of the step), "
            f"got {value!r} of type {type(value).__name__}."
        )
        raise TypeError(msg)
    number(name, value, low=low, high=high)


def positions(name: str, value: Any) -> tuple[int, ...]:
    """The positional arguments that an integer, or a sequence of integers, stands for."""
    try:
        return tuple(operator.index(i) for i in ([value] if np.ndim(value) == 0 else value))
    except TypeError:
        msg = f"`{name}` must be an integer or a sequence of integers, got {value!r}."
        raise TypeError(msg) from None


def value_and_aux(output: Any) -> tuple[Any, Any]:
    """What a loss with aux returns, or an error if it is no pair."""
    if not isinstance(output, tuple | list) or len(cast("list[Any]", output)) != 2:
        msg = f"With `has_aux=True` `fun` must return a pair, `(loss, aux)`, got {output!r}."
        raise TypeError(msg)
    value, aux = cast("list[Any]", output)
    return value, aux


def value(output: Any) -> Any:
    """What a loss without aux returns, or an error if it is a pair."""
    if isinstance(output, tuple | list):
        msg = (
            f"`fun` must return a scalar, got a {type(output).__name__}. If it is `(loss, aux)`, write "
            "`has_aux=True`. If `fun` is `jax.value_and_grad(loss)`, pass `loss` itself."
        )
        raise TypeError(msg)
    return output


def choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises unless it is one of the names."""
    if value not in choices:
        listed = ", ".join(repr(c) for c in choices)
        msg = f"`{name}` must be one of {listed}, got {value!r}."
        raise ValueError(msg)


def params(tree: Any) -> None:
    """Raises if params hold anything but floating-point arrays, which alone can be perturbed."""
    _no_nnx_object(tree)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = getattr(leaf, "dtype", None)
        where = jax.tree_util.keystr(path) or "the only leaf"
        if dtype is None:
            if isinstance(leaf, float):
                continue
            advice = _of_equinox(tree) or "keep it out of params: pass it to the loss as another argument."
            msg = (
                f"params must hold floating-point arrays, got {leaf!r} of type {type(leaf).__name__} "
                f"at {where}: {advice}"
            )
            raise TypeError(msg)
        if not jax.numpy.issubdtype(dtype, np.floating):
            advice = (
                "split it into a real and an imaginary leaf and join them in the loss."
                if jax.numpy.issubdtype(dtype, np.complexfloating)
                else _of_equinox(tree) or "pass it to the loss as another argument, outside params."
            )
            msg = f"params must be floating-point, got dtype {dtype} at {where}: {advice}"
            raise TypeError(msg)
        if np.dtype(dtype).itemsize < 2:
            msg = (
                f"params must have 16 bits or more, got dtype {dtype} at {where}: keep them in bfloat16 or "
                "float32, and cast them in the loss."
            )
            raise TypeError(msg)


def _of_equinox(tree: Any) -> str:
    """What to write for a model of Equinox that was passed whole; empty for all else."""
    kind = getattr(sys.modules.get("equinox"), "Module", ())  # Where it is not imported there is no module.
    if not any(isinstance(x, kind) for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kind))):
        return ""
    return (
        "of an Equinox model pass the params alone, `eqx.filter(model, eqx.is_inexact_array)`, to `init` and "
        "`update`, and evaluate it by `optax_sam.equinox.sam_value_and_grad`, which takes the whole model."
    )


def _no_nnx_object(tree: Any) -> None:
    """Raises for a module of `flax.nnx`, which JAX treats as a pytree; variables and their states pass."""
    kind = getattr(sys.modules.get("flax.nnx"), "Pytree", ())  # Where it is not imported there is no module.
    for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kind)):
        if isinstance(x, kind):
            msg = (
                f"params must be arrays, got a `{type(x).__name__}` of `flax.nnx`: what the loss changes in "
                "it, such as the statistics of BatchNorm, would be lost. Write "
                "`optax_sam.nnx.sam_value_and_grad` in place of `optax_sam.sam_value_and_grad`, or pass the "
                "state of its params, `graphdef, params, rest = nnx.split(model, nnx.Param, ...)`."
            )
            raise TypeError(msg)


def difference(tree: Any, like: Any, owner: str, *, path: tuple[Any, ...] = (), prefix: bool = False) -> str:
    """The first place at which two trees differ in structure, in words.

    Args:
      tree: What was got.
      like: What it should be like.
      owner: Whose `like` is, with its verb, such as "params have".
      path: Where the trees lie in larger ones.
      prefix: Whether a leaf of `tree` may stand for a whole subtree of `like`.

    Returns:
      Such as "nothing at ['bias'], where params have an array of shape (3,)"; empty if they do not differ.
    """
    own, other = _children(tree), _children(like)
    where = jax.tree_util.keystr(path) or "the top"
    if own is None and (other is None or prefix):
        return ""
    if own is None or other is None or _top(tree) != _top(like):
        for key, x in (other or {}).items():
            if own is not None and key not in own:
                return f"nothing at {jax.tree_util.keystr((*path, key))}, where {owner} {_kind(x)}"
        for key, x in (own or {}).items():
            if other is not None and key not in other:
                return f"{_kind(x)} at {jax.tree_util.keystr((*path, key))}, where {owner} nothing"
        another = "another one (its static fields differ)" if type(tree) is type(like) else _kind(like)
        return f"{_kind(tree)} at {where}, where {owner} {another}"
    found = (difference(own[key], other[key], owner, path=(*path, key), prefix=prefix) for key in own)
    return next(filter(None, found), "")


def _children(tree: Any) -> dict[Any, Any] | None:
    """What hangs at the top of a tree, by its keys; None of a leaf."""
    if jax.tree_util.all_leaves([tree]):
        return None
    return {
        path[0]: x for path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is not tree)
    }


def _top(tree: Any) -> Any:
    """The structure of the top of a tree."""
    return jax.tree.structure(tree, is_leaf=lambda x: x is not tree)


def _kind(x: Any) -> str:
    """What something is, short enough for a message."""
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"an array of shape {tuple(x.shape)}"
    name = type(x).__name__
    return "None" if x is None else f"{'an' if name[0] in 'AEIOaeio' else 'a'} {name}"


def same_shapes(name: str, tree: Any, params: Any, *, updates: bool = False) -> None:
    """Raises unless a tree has the structure and shapes of params; for updates it says what helps."""
    if jax.tree.structure(tree) != jax.tree.structure(params):
        advice = " What changes the structure of updates, as `optax.flatten` does, comes after the variant."
        msg = f"{name} must have the structure of params, got {difference(tree, params, 'params have')}."
        raise ValueError(msg + (advice if updates else ""))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for (path, leaf), like in zip(leaves, jax.tree.leaves(params), strict=True):
        if np.shape(leaf) != np.shape(like):
            msg = (
                f"{name} must have the shapes of params, got {np.shape(leaf)} at "
                f"{jax.tree_util.keystr(path) or 'the only leaf'}, where params have {np.shape(like)}."
            )
            raise ValueError(msg)


def is_optimizer(value: Any) -> bool:
    """Whether this is an Optax transformation."""
    return callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))


def no_optimizer(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises if a constructor gets an optimizer, as `optax.contrib.sam` does."""
    if is_optimizer(args[0] if args else kwargs.get("optimizer")):
        msg = (
            f"`{name}` takes a radius, got an optimizer. That is the form of `optax.contrib.sam(optimizer, "
            "adv_optimizer)`; here the optimizer comes after the variant in a chain: "
            f"`optax.chain({name}(rho=0.05), optax.sgd(0.1))`."
        )
        raise TypeError(msg)


def optimizer(name: str, value: Any) -> None:
    """Raises unless it is an Optax transformation."""
    if not is_optimizer(value):
        msg = (
            f"`{name}` must be an Optax optimizer such as `optax.sgd(0.1)`, got {value!r} of type "
            f"{type(value).__name__}."
        )
        raise TypeError(msg)


def mask(name: str, value: Any) -> None:
    """Raises unless it is a pytree of booleans or arrays, or a function from params to one."""
    if callable(value):
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        if not isinstance(leaf, bool | int | np.bool_ | np.ndarray | jax.Array):
            msg = (
                f"`{name}` must be a pytree of booleans (or of arrays of zeros and ones), got {leaf!r} of "
                f"type {type(leaf).__name__} at {jax.tree_util.keystr(path) or 'the only leaf'}. To select "
                "by name write a function of params: `lambda params: jax.tree_util.tree_map_with_path(lambda "
                "path, _: 'kernel' in str(path), params)`."
            )
            raise TypeError(msg)


def floating(name: str, value: Any) -> None:
    """Raises unless it is a floating-point dtype."""
    try:
        dtype = jax.numpy.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or not jax.numpy.issubdtype(dtype, np.floating):
        msg = f"`{name}` must be a floating-point dtype such as `jnp.bfloat16`, got {value!r}."
        raise TypeError(msg)


def given_params(name: str, params: T | None) -> T:
    """The params; raises if they were left out of the call of `update`."""
    if params is None:
        msg = f"`{name}` needs the params: write `update(grads, state, params)`."
        raise ValueError(msg)
    return params


def takes(name: str, function: Any, count: int) -> None:
    """Raises unless a function is None or takes `count` positional arguments."""
    if function is None:
        return
    if not callable(function):
        msg = f"`{name}` must be a function, got {function!r} of type {type(function).__name__}."
        raise TypeError(msg)
    try:
        signature = inspect.signature(function)
    except ValueError:  # Some built-in functions do not tell what they take.
        return
    try:
        signature.bind(*[None] * count)
    except TypeError:
        plural = "arguments" if count > 1 else "argument"
        got = ", ".join(signature.parameters)
        msg = f"`{name}` is called with {count} {plural}, got a function of ({got})."
        raise TypeError(msg) from None


def grad_fn(function: Any) -> None:
    """Raises unless it is a function from params to a gradient."""
    try:
        takes("grad_fn", function, 1)
    except TypeError as error:
        msg = (
            f"{error} Write `grad_fn=lambda params: jax.grad(loss)(params, batch)`; the one of "
            "`optax.contrib.sam` takes a number too."
        )
        raise TypeError(msg) from None


def numbers(name: str, value: Any, count: int, *, low: float = -np.inf, schedules: bool = False) -> None:
    """Raises unless it is a sequence of so many numbers (or schedules, where these are allowed)."""
    if not isinstance(value, tuple | list) or len(cast("Sequence[Any]", value)) != count:
        msg = f"`{name}` must be a tuple of {count} numbers, got {value!r}."
        raise ValueError(msg)
    for i, entry in enumerate(cast("Sequence[Any]", value)):
        if schedules:
            scalar_or_schedule(f"{name}[{i}]", entry, low=low)
        else:
            number(f"{name}[{i}]", entry, low=low)


def key(name: str, value: Any) -> jax.Array:
    """The random key that an integer seed, a typed or a raw key stands for."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return jax.random.key(int(value))
    if isinstance(value, jax.Array | np.ndarray):
        if jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key) and value.shape == ():
            return cast("jax.Array", value)
        if value.dtype == np.uint32 and value.ndim == 1:
            return jax.random.wrap_key_data(jax.numpy.asarray(value))
    msg = (
        f"`{name}` must be a random key such as `jax.random.key(0)`, or an integer seed, "
        f"got {value!r} of type {type(value).__name__}."
    )
    raise TypeError(msg)
