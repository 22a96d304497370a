"""The variant's state: its type, how it is found in the state of an optimizer, and what is refused there."""

import contextlib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam._loss import serializable


@serializable
class SAMState(NamedTuple):
    """The state of every variant.

    Attributes:
      step: How many updates the variant has made. shape=(), dtype=int32
      rho: The radius of the next step. If the variant was made with a number, `optax.tree.set(opt_state,
        rho=...)` changes it for good; if with a schedule, for one step. Where params have a key `rho` too,
        that would overwrite what an optimizer keeps of it: write `optax.tree.set(opt_state, lambda path, _:
        path[-1] == optax.tree_utils.NamedTupleKey("SAMState", "rho"), rho=...)`. shape=(), float32 or better
      memory: What the variant carries from step to step, in float32 or better; `()` for most.
    """

    step: jax.Array
    rho: jax.Array
    memory: Any


def _nodes(state: Any, wanted: Callable[[Any], bool]) -> list[Any]:
    """The outermost nodes of a tree for which `wanted` is true."""
    return [x for x in jax.tree.leaves(state, is_leaf=wanted) if wanted(x)]


def _is_variant_state(x: Any) -> bool:
    return isinstance(x, SAMState)


def _is_variant_state_as_dict(x: Any) -> bool:
    return isinstance(x, Mapping) and set(SAMState._fields) == set(cast("Mapping[Any, Any]", x))


def holds_variant(state: Any) -> bool:
    """Whether the state of a variant is in the state of an optimizer."""
    return bool(_nodes(state, _is_variant_state))


def find_state(state: optax.OptState, optimizer: str = "") -> SAMState:
    """The one state of a variant in the state of an optimizer.

    Args:
      state: The state of the optimizer.
      optimizer: The name of the variant, if it is a whole optimizer.

    Raises:
      ValueError: If there is none or there are several, or if a wrapper would silently break the variant.
    """
    found = _nodes(state, _is_variant_state)
    if not found and _nodes(state, _is_variant_state_as_dict):
        msg = (
            f"`state` is a {type(state).__name__} in which the variant's state has become a dict, as in a "
            "checkpoint that was restored without a target. Restore it with a target, such as "
            "`checkpointer.restore(path, tx.init(params))`."
        )
        raise ValueError(msg)
    if not found:
        msg = (
            "`state` holds no state of a sharpness-aware variant. Pass the whole optimizer state of a chain "
            "that contains the variant, as in `tx = optax.chain(variant, optax.sgd(0.1))`, "
            f"`opt_state = tx.init(params)`, `state=opt_state`. Got a {type(state).__name__}. If it is the "
            "state of a run without the variant, that of `optax.chain(variant, tx)` is "
            "`(variant.init(params), opt_state)`."
        )
        raise ValueError(msg)
    if len(found) > 1:
        msg = (
            f"`state` holds the states of {len(found)} sharpness-aware variants, so it is unclear which one "
            "to evaluate. Use one variant in an optimizer; to perturb some leaves only, give it "
            "`ascent=optax_sam.ascent.masked(...)`."
        )
        raise ValueError(msg)
    refuse_wrappers(state, optimizer)
    return found[0]


def injected_arguments(state: optax.OptState, names: Collection[str]) -> dict[str, Any]:
    """What `optax.inject_hyperparams` around the variant holds, as scalars: what a user sets there counts.

    Args:
      state: The state of the optimizer.
      names: The arguments of the variant.

    Returns:
      All injected hyperparameters by their names; empty if nothing is injected.

    Raises:
      ValueError: If an argument of the variant is a schedule there, which would lag one step.
    """
    found: dict[str, Any] = {}

    def look(node: Any) -> bool:
        """Looks at one node of the state; false, so that the search goes on into it."""
        # Params may have an attribute of that name too, and Adam's state holds copies of params.
        hyperparams: Any = getattr(node, "hyperparams", None)
        if not isinstance(hyperparams, Mapping) or not holds_variant(getattr(node, "inner_state", ())):
            return False
        schedules = getattr(node, "hyperparams_states", ())
        # Each as its only leaf: `flax.nnx.Optimizer` puts every array into a variable.
        found.update(
            {name: jax.tree.leaves(x)[0] for name, x in cast("Mapping[str, Any]", hyperparams).items()}
        )
        for name in schedules:
            if jnp.issubdtype(jnp.result_type(found[name]), np.bool_):
                msg = (
                    f"`{name}` gives a boolean: it is a mask, a function of params, which "
                    "`optax.inject_hyperparams` takes for a schedule of the step. Name it in the static "
                    f'arguments, `static_args=("{name}",)`.'
                )
                raise ValueError(msg)
            if name in names:
                msg = (
                    f"`{name}` is a schedule of `optax.inject_hyperparams`, which evaluates it in the "
                    "update: the gradients of a step would be taken with its value of the step before. Give "
                    "the schedule to the variant, as `optax_sam.sam(schedule)`, or name it in the static "
                    f'arguments, `optax.inject_hyperparams(..., static_args=("{name}",))({name}=schedule, '
                    "...)`. The radius is still in the variant's state, as `rho`."
                )
                raise ValueError(msg)
        return False

    jax.tree.leaves(state, is_leaf=look)
    return found


def refuse_wrappers(state: Any, optimizer: str = "") -> None:
    """Raises where a wrapper would silently break the variant, as far as the state shows it.

    Args:
      state: The state of the optimizer.
      optimizer: The name of the variant, if it is a whole optimizer.
    """

    def check(node: Any) -> bool:
        """Looks at one node of the state; false, so that the search goes on into it."""
        if isinstance(node, optax.MultiStepsState) and holds_variant(node):
            _refuse_multi_steps(optimizer)
        links = _links(node)
        at = next((i for i, link in enumerate(links) if holds_variant(link)), None)
        if at is not None:
            _refuse_before(links, at)
            if optimizer:
                _refuse_after(links[at + 1 :], optimizer)
        return False

    jax.tree.leaves(state, is_leaf=check)


def _links(node: Any) -> list[Any]:
    """The states of the links, if this is the state of a chain."""
    if isinstance(node, OrderedDict):  # Of a named chain.
        return list(cast("OrderedDict[str, Any]", node).values())
    return list(cast("tuple[Any, ...]", node)) if type(node) is tuple else []


def _is_named_state(x: Any) -> bool:
    return isinstance(x, tuple) and type(x).__name__.endswith("State")


def _refuse_multi_steps(optimizer: str) -> None:
    place = (
        f"After `{optimizer}`, a whole optimizer, it has no place: take"
        if optimizer
        else "Put it after the variant, `optax.chain(variant, "
        "optax.MultiSteps(base, 4).gradient_transformation())`, or take"
    )
    msg = (
        "`optax.MultiSteps` around a sharpness-aware variant accumulates one gradient, but the variant takes "
        f"the two gradients of one batch. {place} the step of the whole batch, "
        "`sam_value_and_grad(..., microbatch_size=n, batch_argnums=1)`."
    )
    raise ValueError(msg)


def _refuse_before(links: list[Any], at: int) -> None:
    """Raises if something with a state comes before the variant."""
    before = links[:at]
    if isinstance(getattr(links[at], "inner_state", links[at]), SAMState):
        # Surely a chain, and no tuple of a user's: what it holds may be chains again.
        before = jax.tree.leaves(before, is_leaf=_is_named_state)
    for link in filter(_is_named_state, before):
        msg = (
            "In a chain the variant comes first. Here a transformation comes before it (its state is "
            f"{type(link).__name__}), which would silently act on both gradients at once, or on one alone. "
            "Put it after the variant: `optax.chain(variant, optax.clip_by_global_norm(1.0), base)`."
        )
        if isinstance(link, optax.EmptyState):
            msg += " By its state `optax.identity()` cannot be told from a clip: leave it out."
        raise ValueError(msg)


def _refuse_after(links: list[Any], optimizer: str) -> None:
    """Raises if another optimizer comes after a whole one: a chain in the chain, or one with a momentum.

    A single link without a state, such as `optax.scale`, cannot be told from a clip, and passes.
    """

    def is_of_an_optimizer(x: Any) -> bool:
        name = type(x).__name__
        has_momentum = name == "TraceState" or (name.startswith("ScaleBy") and name != "ScaleByScheduleState")
        return has_momentum or any(map(_is_named_state, _links(x)))

    if _nodes(links, is_of_an_optimizer):
        msg = (
            f"`{optimizer}` is a whole optimizer: it returns updates, learning rate and sign included. "
            "Another optimizer comes after it and would take these for gradients: leave it out. What acts "
            f"on updates may follow, link by link: `optax.chain({optimizer}(...), optax.clip(0.1))`."
        )
        raise ValueError(msg)


def match_structure(state: SAMState, init: Callable[[], SAMState]) -> SAMState:
    """The state in the structure and with the dtype of rho that the variant gave it.

    Args:
      state: What was found in the state of an optimizer.
      init: Makes the state anew.

    Returns:
      The state, where `optax.masked` or `optax.partition` left something out with what `init` makes of it.

    Raises:
      ValueError: If it is not the state of this variant and of these params.
    """
    like = jax.eval_shape(init)
    if has_holes(state):
        with contextlib.suppress(ValueError):  # Of another variant: said below.
            state = jax.tree.map(lambda x, y: y if is_hole(x) else x, state, init(), is_leaf=is_hole)
    leaves, structure = jax.tree.flatten(like)
    own = jax.tree.leaves(state)
    kinds = type(state.memory), type(like.memory)
    if kinds[0] is not kinds[1] and any(hasattr(kind, "_fields") for kind in kinds):
        got, right = f"a {kinds[0].__name__}", f"a {kinds[1].__name__}"
    elif len(own) != len(leaves):
        pairs = itertools.zip_longest(_paths(state), _paths(like), fillvalue="the end")
        # `flax.nnx.Optimizer` boxes every array of its state: the path into the box is longer.
        first = next(
            right if len(own) < len(leaves) else got for got, right in pairs if not got.startswith(right)
        )
        got, right = f"{len(own)} arrays", f"{len(leaves)} (they differ first at {first})"
    else:
        shapes = [(np.shape(x), np.shape(y)) for x, y in zip(own, leaves, strict=True)]
        wrong = next((i for i, (got, right) in enumerate(shapes) if got != right), None)
        if wrong is None:
            matched: SAMState = jax.tree.unflatten(structure, own)  # Unboxed.
            return matched._replace(rho=jnp.asarray(matched.rho, like.rho.dtype))
        got, right = f"an array of shape {shapes[wrong][0]} at {_paths(like)[wrong]}", f"{shapes[wrong][1]}"
    msg = (
        f"`state` does not fit the variant and the params: it holds {got}, where `variant.init(params)` "
        f"makes {right}. Make it by the `init` of an optimizer with this variant, from the same params; "
        "inside `jax.shard_map` pass both whole (`in_specs=P()`)."
    )
    raise ValueError(msg)


def _paths(tree: Any) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def has_holes(tree: Any) -> bool:
    """Whether `optax.masked` or `optax.partition` left something out."""
    return bool(_nodes(tree, is_hole))


def with_holes_of(like: Any, tree: Any) -> Any:
    """The tree without what `optax.masked` or `optax.partition` left out of the one like it."""
    if not has_holes(like):
        return tree
    with contextlib.suppress(ValueError):  # Of another structure: whoever uses it says so.
        return jax.tree.map(lambda x, y: x if is_hole(x) else y, like, tree, is_leaf=is_hole)
    return tree


def is_hole(x: Any) -> bool:
    """Whether this is what `optax.masked` and `optax.partition` leave in place of what they hide."""
    return isinstance(x, optax.MaskedNode)
