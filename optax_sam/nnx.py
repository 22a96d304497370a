"""The door for Flax NNX: `sam_value_and_grad` for models that hold their own state."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, Unpack, cast, overload

import jax
import jax.numpy as jnp

from optax_sam import _checks, _value_and_grad
from optax_sam._gradient import Call
from optax_sam._loss import MadeBy, SAMGradients
from optax_sam._state import SAMState
from optax_sam._types import AuxT, SAMOptions, SAMValueAndGrad
from optax_sam._value_and_grad import SAMMetrics
from optax_sam._variant import SharpnessAwareTransformation

_TAG = "optax_sam"  # Under which NNX remembers which object within the loss is which one outside.


@overload
def sam_value_and_grad(
    fun: Callable[..., Any],
    variant: SharpnessAwareTransformation,
    argnums: Any = 0,
    has_aux: Literal[False] = False,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[SAMOptions],
) -> SAMValueAndGrad[tuple[jax.Array, SAMGradients]]: ...


@overload
def sam_value_and_grad(
    fun: Callable[..., Any],
    variant: SharpnessAwareTransformation,
    argnums: Any = 0,
    has_aux: Literal[False] = False,
    *,
    return_metrics: Literal[True],
    **options: Unpack[SAMOptions],
) -> SAMValueAndGrad[tuple[jax.Array, SAMGradients, SAMMetrics]]: ...


@overload
def sam_value_and_grad(
    fun: Callable[..., tuple[Any, AuxT]],
    variant: SharpnessAwareTransformation,
    argnums: Any = 0,
    has_aux: Literal[True] = ...,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[SAMOptions],
) -> SAMValueAndGrad[tuple[tuple[jax.Array, AuxT], SAMGradients]]: ...


@overload
def sam_value_and_grad(
    fun: Callable[..., tuple[Any, AuxT]],
    variant: SharpnessAwareTransformation,
    argnums: Any = 0,
    has_aux: Literal[True] = ...,
    *,
    return_metrics: Literal[True],
    **options: Unpack[SAMOptions],
) -> SAMValueAndGrad[tuple[tuple[jax.Array, AuxT], SAMGradients, SAMMetrics]]: ...


def sam_value_and_grad(
    fun: Callable[..., Any],
    variant: SharpnessAwareTransformation,
    argnums: Any = 0,
    has_aux: bool = False,
    *,
    return_metrics: bool = False,
    **options: Unpack[SAMOptions],
) -> SAMValueAndGrad[Any]:
    """Like `flax.nnx.value_and_grad`, for a sharpness-aware variant.

    The loss takes NNX objects: the model, and perhaps an `nnx.Rngs`, metrics and the like, by position
    or by keyword. What the loss changes in them is afterwards as one ordinary pass would have left it: the
    statistics of BatchNorm, the counters of random numbers, and also plain attributes and new modules.
    Both passes start from the same state, so they draw the same dropout masks.

    `nnx.Optimizer` keeps its arrays in variables. To change the radius of a run, inside of `nnx.jit` or
    outside, write `optax.tree.get(optimizer.opt_state, "rho")[...] = 0.2`.

    Args:
      fun: The loss: a function that returns a scalar, or a pair `(scalar, aux)`.
      variant: The bare variant, e.g. `optax_sam.sam(0.05)`; not the chain that contains it.
      argnums: Which positional argument holds the params, or which ones do: an integer, which stands
        for all `nnx.Param` in it (or for what the optimizer trains, where `state` is one), or an
        `nnx.DiffState(position, filter)`. Arrays and variables that lie in it outside of modules are params
        too. With several positions, params are the tuple of their states.
      has_aux: Whether `fun` returns a pair.
      return_metrics: Whether to return `SAMMetrics` as a third output.
      **options: All other options of `optax_sam.sam_value_and_grad`. With `num_shards` or
        `microbatch_size` the floating-point variables that the loss changes are averaged over the
        parts, random counters move as in one pass, and any other changed variable is refused.

    Returns:
      A function `(*args, state, loss_scale=None, **kwargs)` that takes the arguments of `fun` and, by
      keyword, the `nnx.Optimizer` or its `opt_state`. It returns `(value, grads)` or
      `((value, aux), grads)`, and metrics after that, if asked for; `grads` go into
      `optimizer.update(model, grads)`, or, through wrappers such as `optax.apply_if_finite`, into
      `optimizer.update(model, grads.perturbed, clean_updates=grads.clean)`.

    Raises:
      TypeError: If an argument that is to be differentiated holds nothing to differentiate.
      ValueError: As `optax_sam.sam_value_and_grad`.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> from flax import nnx
      >>> class Model(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.linear = nnx.Linear(3, 4, rngs=rngs)
      ...         self.norm = nnx.BatchNorm(4, rngs=rngs)
      ...     def __call__(self, x):
      ...         return self.norm(self.linear(x))
      >>> sam = optax_sam.sam(rho=0.05)
      >>> model = Model(nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, optax.chain(sam, optax.sgd(0.1)), wrt=nnx.Param)
      >>> def loss_fn(model, x):
      ...     return jnp.mean((model(x) - 1.0) ** 2)
      >>> @nnx.jit
      ... def train_step(model, optimizer, x):
      ...     loss, grads = optax_sam.nnx.sam_value_and_grad(loss_fn, sam)(model, x, state=optimizer)
      ...     optimizer.update(model, grads)
      ...     return loss
      >>> x = jnp.arange(6.0).reshape(2, 3)
      >>> print([f"{train_step(model, optimizer, x):.2f}" for _ in range(3)])
      ['2.00', '1.80', '1.62']

    References:
      Foret et al., `Sharpness-Aware Minimization <https://arxiv.org/abs/2010.01412>`_, ICLR 2021.
    """
    from flax import nnx  # Here and not above: the core does without Flax.

    filters = _filters(nnx, argnums)
    positions = tuple(filters) if isinstance(argnums, tuple | list) else next(iter(filters))
    settings: dict[str, Any] = {"argnums": positions, "return_metrics": return_metrics, **options}
    _value_and_grad.sam_value_and_grad(fun, variant, has_aux=has_aux, **settings)  # Checks what was given.
    _refuse_method(nnx, fun)
    in_parts = any(settings.get(name) is not None for name in ("num_shards", "microbatch_size"))
    if settings.get("ascent_loss") is not None:
        settings["ascent_loss"] = _pure(nnx, settings["ascent_loss"], filters, has_aux, in_parts)
    pure = _pure(nnx, fun, filters, has_aux, in_parts)
    evaluate = _value_and_grad.sam_value_and_grad(pure, variant, has_aux=True, **settings)

    def value_and_grads(*args: Any, state: Any = None, loss_scale: Any = None, **kwargs: Any) -> Any:
        if state is not None:
            _check_keywords(nnx, fun, args, kwargs, state, loss_scale)
        if kwargs:  # As in NNX, those that have a position get it.
            bound = inspect.signature(fun).bind(*args, **kwargs)
            args, kwargs = bound.args, bound.kwargs
        trained = None
        if isinstance(state, nnx.Optimizer):
            trained, state = cast("Any", state).wrt, cast("Any", state).opt_state
        _refuse_plain_radius(nnx, state)
        with nnx.update_context(_TAG):
            nodes, trees = _split(nnx, args, kwargs, filters, trained)
            counters = [x for x in _variables(nnx, nodes) if in_parts and isinstance(x, nnx.RngCount)]
            counts = [x.get_value() for x in counters]
            output, grads, *metrics = evaluate(*trees, state=state, loss_scale=loss_scale, nodes=nodes)
            value, (aux, after, parts) = output
            _, aux = nnx.from_tree((_filled(after, (trees, nodes)), aux), ctxtag=_TAG, is_inner=False)
        for counter, old in zip(counters, counts, strict=True):
            if (total := counter.get_value()) is not old:  # The sum over all parts, which may wrap around.
                counter.set_value(old + (total - parts * old) // parts)
        return ((value, aux) if has_aux else value), _Gradients(*grads), *metrics

    return value_and_grads


def _filters(nnx: Any, argnums: Any) -> dict[int, Any]:
    """The positions of params, each with the filter of its `DiffState` or with None."""
    given = cast("Sequence[Any]", argnums if isinstance(argnums, tuple | list) else (argnums,))
    filters = {x.argnum if isinstance(x, nnx.DiffState) else x: getattr(x, "filter", None) for x in given}
    if len(filters) < len(given):
        msg = f"`argnums` must name each positional argument once, got {argnums}."
        raise ValueError(msg)
    return filters


def _refuse_method(nnx: Any, fun: Any) -> None:
    if isinstance(getattr(fun, "__self__", None), nnx.Pytree):
        msg = (
            f"`fun` must take the model as an argument, got the bound method `{fun.__name__}`: write "
            f"`lambda model, *args: model.{fun.__name__}(*args)`."
        )
        raise TypeError(msg)


def _check_keywords(
    nnx: Any, fun: Any, args: tuple[Any, ...], kwargs: dict[str, Any], state: Any, loss_scale: Any
) -> None:
    """The check of the core, which sees the loss as a function of trees."""
    call = Call(args, kwargs, (), True, (), False, loss_scale)
    opt_state = state.opt_state if isinstance(state, nnx.Optimizer) else state
    _value_and_grad.check_keywords(fun, call, opt_state)


def _refuse_plain_radius(nnx: Any, state: Any) -> None:
    """Raises if `optax.tree.set` put a number in place of the variable that holds the radius."""

    def is_sam_state(x: Any) -> bool:
        return isinstance(x, SAMState)

    for x in filter(is_sam_state, jax.tree.leaves(state, is_leaf=is_sam_state)):
        if isinstance(x.step, nnx.Variable) and not isinstance(x.rho, nnx.Variable):
            msg = (
                f"The radius in an `nnx.Optimizer` must lie in a variable, got {x.rho!r} in its place. Write "
                '`optax.tree.get(optimizer.opt_state, "rho")[...] = 0.2`.'
            )
            raise TypeError(msg)


# The loss as a function of trees. In place of each object stands an `nnx.NodeStates`: its structure, and two
# states, the one of its params and the one of all else.


def _split(
    nnx: Any, args: tuple[Any, ...], kwargs: dict[str, Any], filters: dict[int, Any], trained: Any
) -> tuple[Any, tuple[Any, ...]]:
    """The arguments as trees.

    Args:
      nnx: The module `flax.nnx`.
      args: The positional arguments.
      kwargs: The keyword arguments.
      filters: The positions of params, each with the filter of its `DiffState` or with None.
      trained: The filter of an `nnx.Optimizer`, or None.

    Returns:
      The positional and the keyword arguments as trees; and the positional ones with the params alone of
      those that hold some.
    """
    inside = _inside(filters, args)
    chosen = [_is_param(nnx, x, inside[i], trained) if i in inside else False for i, x in enumerate(args)]

    def split(context: Any, path: Any, state: Any, x: Any) -> Any:
        del path
        return nnx.NodeStates.from_split(*context.split(x, state.filter, ...))

    prefix = tuple(nnx.DiffState(-1, x) for x in chosen), nnx.DiffState(-1, False)
    nodes = nnx.to_tree((args, kwargs), prefix=prefix, split_fn=split, ctxtag=_TAG)
    trees = list(nodes[0])
    for i, own in inside.items():
        trees[i] = _map_nodes(nnx, lambda node: node.states[0], trees[i])
        if not jax.tree.leaves(trees[i]):
            wanted = own if own is not None else trained if trained is not None else nnx.Param
            msg = (
                f"Positional argument {i} must hold params, got a {type(args[i]).__name__} in which nothing "
                f"passes the filter {wanted}. Name others by `argnums`, such as `nnx.DiffState({i}, filter)`."
            )
            raise TypeError(msg)
    return nodes, tuple(trees)


def _inside(filters: dict[int, Any], args: Sequence[Any]) -> dict[int, Any]:
    """The filters by position, counted from 0; a position without an argument is refused later on."""
    return {range(len(args))[i]: own for i, own in filters.items() if -len(args) <= i < len(args)}


def _is_param(nnx: Any, arg: Any, own: Any, trained: Any) -> Callable[[Any, Any], bool]:
    """The filter of the params of an argument: its own one, or that of the optimizer, or `nnx.Param`."""
    if own is None and trained is not None:
        ids = {id(x) for x in _variables(nnx, nnx.state(arg, trained))}
        return lambda _, x: id(x) in ids
    passes = nnx.filterlib.to_predicate(nnx.Param if own is None else own)
    # As in NNX a variable that is nobody's attribute, and so has no path, is always a param.
    return lambda path, x: not path or passes(path, x)


def _pure(
    nnx: Any, fun: Callable[..., Any], filters: dict[int, Any], has_aux: bool, in_parts: bool
) -> Callable[..., Any]:
    """The loss as a function of trees, which also returns as a tree how it left its objects."""

    def join(node: Any, params: Any) -> Any:
        return node.replace(states=(params, *node.states[1:]))

    def pure(*args: Any, nodes: Any) -> Any:
        before = jax.tree.leaves((args, nodes))  # Kept alive: the id of a leaf that is gone may come again.
        kept = {id(x): _Kept(i) for i, x in enumerate(before)}
        trees = list(args)
        for i in _inside(filters, args):
            trees[i] = _map_nodes(nnx, join, nodes[0][i], args[i])
        objects = nnx.from_tree((tuple(trees), nodes[1]), ctxtag=_TAG, is_inner=True)
        output = fun(*objects[0], **objects[1])
        value, aux = _checks.value_and_aux(output) if has_aux else (_checks.value(output), None)
        after, aux = nnx.to_tree((nnx.extract.clear_non_graph_nodes(objects), aux), ctxtag=_TAG)
        # What the loss left alone need not be returned, nor be rounded by an average or by `ascent_dtype`.
        after = jax.tree.map(lambda x: kept.get(id(x), x), after)
        if in_parts:
            _refuse_counts(nnx, after)
        return value, (aux, after, jnp.ones((), jnp.uint32) if in_parts else None)

    return pure


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Kept:
    """In place of a leaf that the loss left alone: its number among the leaves of the arguments."""

    index: int


def _filled(after: Any, arguments: Any) -> Any:
    """How the loss left the objects, with the leaves that it left alone."""
    leaves = jax.tree.leaves(arguments)

    def is_kept(x: Any) -> bool:
        return isinstance(x, _Kept)

    return jax.tree.map(lambda x: leaves[x.index] if is_kept(x) else x, after, is_leaf=is_kept)


def _refuse_counts(nnx: Any, after: Any) -> None:
    """Raises if a part of the batch changed what can be neither averaged over the parts nor counted."""
    for x in _variables(nnx, after):
        for leaf in jax.tree.leaves(x):
            if not isinstance(x, nnx.RngCount) and not jnp.issubdtype(leaf.dtype, jnp.floating):
                msg = (
                    "With `num_shards` or `microbatch_size` the loss may change floating-point variables "
                    f"(averaged over the parts) and random counters, got a {type(x).__name__} of dtype "
                    f"{leaf.dtype}. Return what a metric needs as aux, and update the metric outside of the "
                    "loss."
                )
                raise TypeError(msg)


def _map_nodes(nnx: Any, function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Maps over the objects of a tree; of other leaves it takes those of the last tree."""

    def at_leaf(x: Any, *rest: Any) -> Any:
        return function(x, *rest) if isinstance(x, nnx.NodeStates) else (x, *rest)[-1]

    return jax.tree.map(at_leaf, tree, *others, is_leaf=lambda x: isinstance(x, nnx.NodeStates))


def _variables(nnx: Any, tree: Any) -> list[Any]:
    """The variables of a tree, and its arrays outside of variables."""
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


# The pair of gradients.


class _Field(str):
    """The name of a field of a pair, and who made the pair."""

    made_by: MadeBy

    def __new__(cls, name: str, made_by: MadeBy) -> _Field:
        """The name with the mark on it."""
        self = super().__new__(cls, name)
        self.made_by = made_by
        return self


@jax.tree_util.register_pytree_with_keys_class
class _Gradients(SAMGradients):
    """The pair with its mark on the names of its fields.

    `nnx.Optimizer` makes of it a mapping from these names to states, and drops what holds no array.
    """

    __slots__ = ()

    def tree_flatten_with_keys(self) -> tuple[Any, MadeBy]:
        """The fields that hold arrays, and the mark."""
        names = [_Field(name, self.made_by) for name in self._fields[:-1]]
        return [
            (jax.tree_util.GetAttrKey(name), x) for name, x in zip(names, self, strict=False)
        ], self.made_by

    @classmethod
    def tree_unflatten(cls, made_by: MadeBy, children: Any) -> _Gradients:
        """The pair again."""
        return cls(*children, made_by=made_by)
