"""From the user's loss to one gradient function; in parts of the batch, or in another dtype."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from optax_sam import _checks, _tree
from optax_sam._loss import CompositeLoss, Pass

GradientAt = Callable[[optax.Params, Sequence[Any], Any], Pass]
"""`(params, batch, cotangent) -> pass`, where batch holds the batch arguments in order."""

T = TypeVar("T")


class Call(NamedTuple):
    """How the loss is called in one step.

    Attributes:
      args: The positional arguments.
      kwargs: The keyword arguments.
      params_at: The positions of params.
      is_single: Whether params are one argument and not a tuple of several.
      batch_at: The positions of the batch arguments, empty if nothing is done to them.
      has_aux: Whether the loss returns a pair.
      loss_scale: What the loss is multiplied by for the derivative, or None.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    params_at: tuple[int, ...]
    is_single: bool
    batch_at: tuple[int, ...]
    has_aux: bool
    loss_scale: Any

    @property
    def params(self) -> Any:
        """What is differentiated."""
        given = tuple(self.args[i] for i in self.params_at)
        return given[0] if self.is_single else given

    @property
    def batch(self) -> tuple[Any, ...]:
        """The batch arguments."""
        return tuple(self.args[i] for i in self.batch_at)

    def filled(self, params: Any, batch: Sequence[Any]) -> list[Any]:
        """The positional arguments with other params and another batch."""
        args = list(self.args)
        for i, one in zip(self.batch_at, batch, strict=True):
            args[i] = one
        for i, one in zip(self.params_at, (params,) if self.is_single else params, strict=True):
            args[i] = one
        return args


def gradient_at(fun: Callable[..., Any], call: Call) -> GradientAt:
    """The loss and its gradient at any params and on any part of the batch."""

    def scaled(value: Any) -> Any:
        return value if call.loss_scale is None else value * call.loss_scale

    def unscaled(gradient: Any) -> Any:
        if call.loss_scale is None:
            return gradient
        return jax.tree.map(lambda g: g / call.loss_scale, _tree.upcast(gradient))

    def composite(params: optax.Params, batch: Sequence[Any], cotangent: Any) -> Pass:
        loss = cast("CompositeLoss", fun)

        def outputs_of(params: optax.Params) -> Any:
            own, inputs, _ = call.filled(params, batch)
            outputs = loss.model_fn(own, inputs)
            return outputs if call.has_aux else (outputs, None)

        def loss_of(outputs: Any) -> Any:
            value = loss.output_loss(outputs, call.filled(params, batch)[-1])
            return scaled(value), value

        outputs, pull_back, aux = jax.vjp(outputs_of, params, has_aux=True)
        (_, value), derivative = jax.value_and_grad(loss_of, has_aux=True)(outputs)
        (gradient,) = pull_back(derivative if cotangent is None else cotangent)
        return Pass(value, unscaled(gradient), aux, derivative, None)

    def ordinary(params: optax.Params, batch: Sequence[Any], cotangent: Any) -> Pass:
        del cotangent  # An ordinary loss has none.

        def loss(params: optax.Params) -> tuple[jax.Array, Any]:
            output: Any = fun(*call.filled(params, batch), **call.kwargs)
            value, aux = _checks.value_and_aux(output) if call.has_aux else (_checks.value(output), None)
            if isinstance(value, float | int):
                value = jnp.asarray(value)
            return scaled(value), (value, aux)

        (_, (value, aux)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return Pass(value, unscaled(gradient), aux, None, None)

    return composite if isinstance(fun, CompositeLoss) else ordinary


# Tracing the user's loss once.


@jax.tree_util.register_static
class _Constant:
    """Carries what is no array, such as a string in aux, through `jit` as static structure."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _is_array(x: Any) -> bool:
    """Whether `jit` can return this: JAX knows no NumPy arrays of strings, objects or dates."""
    if isinstance(x, np.ndarray | np.generic):
        return jnp.issubdtype(x.dtype, np.number) or jnp.issubdtype(x.dtype, np.bool_)
    return isinstance(x, jax.Array)


def _is_traced(tree: Any) -> bool:
    try:
        leaves = jax.tree.leaves(tree)
    except ValueError:  # A dict whose keys have no order: `jit` would have refused it.
        return False
    return any(isinstance(leaf, Tracer) for leaf in leaves)


class TracedOnce:
    """A gradient function whose calls within one trace share one trace of the user's loss.

    Outside of a trace every call runs as it stands, operation by operation.

    Attributes:
      is_traced: Whether it is called within a trace.
      precision: After a call within a trace, the least precise floating-point dtype that it computed in.
    """

    def __init__(self, function: GradientAt, *trees: Any) -> None:
        """`trees` are what the function closes over: if one of them is traced, so is every call."""
        self.precision: str | None = None
        self.is_traced = any(map(_is_traced, trees))
        self._function = function

        def arrays_only(*args: Any) -> Any:
            return jax.tree.map(lambda x: x if _is_array(x) else _Constant(x), function(*args))

        self._jitted = jax.jit(arrays_only, inline=True)

    def __call__(self, params: optax.Params, batch: Sequence[Any], cotangent: Any) -> Pass:
        """The pass."""
        args = (params, tuple(batch), cotangent)
        if not self.is_traced:
            return self._function(*args)
        if self.precision is None:
            self.precision = _least_precise(self._jitted.trace(*args).jaxpr.jaxpr)
        return jax.tree.map(
            lambda x: x.value if isinstance(x, _Constant) else x,
            self._jitted(*args),
            is_leaf=lambda x: isinstance(x, _Constant),
        )


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a program, those of its inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def _least_precise(jaxpr: Any) -> str | None:
    """The least precise floating-point dtype that a program computes in, by its name."""
    dtypes = {getattr(x.aval, "dtype", None) for equation in _equations(jaxpr) for x in equation.outvars}
    floats = [x for x in dtypes if x is not None and jnp.issubdtype(x, jnp.floating)]
    return max(floats, key=lambda x: float(jnp.finfo(x).eps)).name if floats else None


# Parts of the batch.


def batch_size(batch: Sequence[Any]) -> int:
    """The number of examples of the batch arguments, or an error if they do not agree."""
    sizes: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tuple(batch)):
        where = f"batch argument {jax.tree_util.keystr(path)}"
        if not np.shape(leaf):
            msg = (
                "Every leaf of a batch argument must be an array whose first axis counts examples, got "
                f"{leaf!r} at {where}. Pass what is not a batch in an argument of its own."
            )
            raise ValueError(msg)
        sizes[where] = np.shape(leaf)[0]
    if len(set(sizes.values())) != 1:
        msg = f"The batch arguments must agree in the number of examples, got {sizes or 'no arrays'}."
        raise ValueError(msg)
    size = next(iter(sizes.values()))
    if size == 0:
        msg = "The batch arguments must hold at least one example, got none."
        raise ValueError(msg)
    return size


def is_mean(path: Any, leaf: Any) -> bool:
    """Whether a leaf of aux is averaged over the parts of a batch (floats) or summed (integers)."""
    dtype = getattr(leaf, "dtype", type(leaf))
    if jnp.issubdtype(dtype, jnp.inexact):
        return True
    if jnp.issubdtype(dtype, jnp.integer):
        return False
    msg = (
        f"aux{jax.tree_util.keystr(path)} has dtype {dtype}: over shards and microbatches floats are "
        "averaged and integers summed. Return it as one of these."
    )
    raise TypeError(msg)


def in_loop(loop: Callable[[Callable[..., T]], T], turn: Callable[..., T], is_traced: bool) -> T:
    """`loop(turn)`, in which a loop of JAX is a plain Python loop outside of a trace.

    Otherwise it would be compiled in every call, because it closes over the loss and its arguments.
    """
    if is_traced:
        return loop(turn)
    is_disabled = cast("Any", jax.config).jax_disable_jit  # As a user may have asked for.

    def compiled(*args: Any) -> T:
        with jax.disable_jit(is_disabled):
            return turn(*args)

    with jax.disable_jit():
        return loop(compiled)


def accumulated(gradient_at: GradientAt, size: int, is_traced: bool) -> GradientAt:
    """The gradient function in the memory of a microbatch."""
    kinds = optax.microbatching.AccumulationType

    def run(params: optax.Params, batch: Sequence[Any], cotangent: Any) -> Pass:
        total = batch_size(batch)
        if total % size:
            msg = f"`microbatch_size={size}` does not divide the batch of {total} examples."
            raise ValueError(msg)
        count = total // size
        # Every count-th example: a batch that is sharded over devices stays so. Optax is handed the
        # numbers of the microbatches, because it cannot cut an explicitly sharded batch with every JAX.
        parts = jax.tree.map(lambda x: jnp.reshape(x, (size, count, *np.shape(x)[1:])), tuple(batch))

        def one(number: jax.Array, params: optax.Params) -> Pass:
            part = jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(x, number[0], axis=1, keepdims=False), parts
            )
            # The cotangents of the first pass lie in the order of the microbatches.
            own = jax.tree.map(lambda x: jnp.take(x, number[0], axis=0), cotangent)
            return gradient_at(params, part, own)

        def precise(number: jax.Array, params: optax.Params) -> Pass:
            found = one(number, params)
            return found._replace(
                value=_tree.upcast(found.value),
                gradient=_tree.upcast(found.gradient),
                cotangent=jax.tree.map(lambda x: x[None], found.cotangent),
            )

        def checked(number: jax.Array) -> Pass:
            found = one(number, params)
            jax.tree_util.tree_map_with_path(is_mean, found.aux)  # Refuses what has no dtype.
            return found

        numbers = jnp.arange(count)
        like = jax.eval_shape(checked, numbers[:1])
        rules = jax.tree_util.tree_map_with_path(
            lambda p, x: kinds.MEAN if is_mean(p, x) else kinds.SUM, like.aux
        )
        how: Any = Pass(*cast("Any", (kinds.MEAN, kinds.MEAN, rules, kinds.CONCAT, None)))

        def run_all(one: Callable[..., Pass]) -> Pass:
            return optax.microbatch(one, argnums=0, microbatch_size=1, accumulator=how)(numbers, params)

        found = in_loop(run_all, precise, is_traced)
        return found._replace(gradient=_tree.cast_like(found.gradient, like.gradient))

    return run


def in_dtype(gradient_at: GradientAt, dtype: Any) -> GradientAt:
    """The gradient function computed in another dtype; what it returns is in that of params again."""

    def is_floating(x: Any) -> bool:
        return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)

    def run(params: optax.Params, batch: Sequence[Any], cotangent: Any) -> Pass:
        args = params, tuple(batch)
        params_in_dtype, batch = jax.tree.map(lambda x: jnp.asarray(x, dtype) if is_floating(x) else x, args)
        found = gradient_at(params_in_dtype, batch, cotangent)
        own = jnp.result_type(*jax.tree.leaves(params))

        def back(x: Any) -> Any:
            # aux may also hold strings and the like.
            return x.astype(own) if getattr(x, "dtype", None) == dtype else x

        return jax.tree.map(back, found)._replace(gradient=_tree.cast_like(found.gradient, params))

    return run


class Parts(NamedTuple):
    """How gradients are evaluated on the batch at hand.

    Attributes:
      microbatch_size: Examples at once in one gradient, or None for all.
      ascent_examples: How many examples, or which fraction of them, an ascent gradient sees; None for all.
      ascent_dtype: In which dtype an ascent gradient is computed; None for that of params.
    """

    microbatch_size: int | None = None
    ascent_examples: int | float | None = None
    ascent_dtype: Any = None

    def descent(self, traced: TracedOnce) -> GradientAt:
        """The gradient function of all the batch."""
        return (
            traced
            if self.microbatch_size is None
            else accumulated(traced, self.microbatch_size, traced.is_traced)
        )

    def ascent(self, traced: TracedOnce, batch: Sequence[Any]) -> tuple[GradientAt, Sequence[Any]]:
        """The gradient function of the ascent, and the examples for it."""
        size, wanted = self.microbatch_size, self.ascent_examples
        gradient_at: GradientAt = traced
        if wanted is not None:
            total = batch_size(batch)
            count = max(1, round(wanted * total)) if isinstance(wanted, float) else wanted
            if count > total:
                msg = (
                    f"`ascent_examples={wanted}` is more than the {total} examples of a batch, or of a shard."
                )
                raise ValueError(msg)
            if size is not None and count > size and count % size:
                msg = f"`microbatch_size={size}` does not divide the {count} examples of the ascent."
                raise ValueError(msg)
            batch = jax.tree.map(lambda x: x[:count], batch)
        if self.ascent_dtype is not None:
            gradient_at = in_dtype(gradient_at, self.ascent_dtype)
        if size is not None and (wanted is None or batch_size(batch) > size):
            gradient_at = accumulated(gradient_at, size, traced.is_traced)
        return gradient_at, batch
