"""The variant's state: its type, how it is found in the state of an optimizer, and what is refused there."""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
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
        rho=...)` changes it for good; if with a schedule, for one step. shape=(), float32 or better
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


def _holds_variant(state: Any) -> bool:
    return bool(_nodes(state, _is_variant_state))


def find_state(state: optax.OptState) -> SAMState:
    """The one state of a variant in the state of an optimizer.

    Raises:
      ValueError: If there is none or there are several, or if a wrapper would silently break the variant.
    """
    found = _nodes(state, _is_variant_state)
    if not found:
        msg = (
            "`state` holds no state of a sharpness-aware variant. Pass the whole optimizer state of a chain "
            "that contains the variant, as in `tx = optax.chain(variant, optax.sgd(0.1))`, "
            f"`opt_state = tx.init(params)`, `state=opt_state`. Got a {type(state).__name__}."
        )
        raise ValueError(msg)
    if len(found) > 1:
        msg = (
            f"`state` holds the states of {len(found)} sharpness-aware variants, so it is unclear which one "
            "to evaluate. Use one variant in an optimizer; to perturb some leaves only, give it "
            "`ascent=optax_sam.ascent.masked(...)`."
        )
        raise ValueError(msg)
    refuse_wrappers(state)
    return found[0]


def injected_arguments(state: optax.OptState, rho_name: str) -> dict[str, Any]:
    """What `optax.inject_hyperparams` around the variant holds, as scalars: what a user sets there counts.

    Args:
      state: The state of the optimizer.
      rho_name: What the variant calls its radius.

    Returns:
      All injected hyperparameters by their names; empty if nothing is injected.

    Raises:
      ValueError: If the radius is a schedule there, which would lag one step.
    """
    found: dict[str, Any] = {}

    def look(node: Any) -> bool:
        """Looks at one node of the state; false, so that the search goes on into it."""
        # Params may have an attribute of that name too, and Adam's state holds copies of params.
        hyperparams: Any = getattr(node, "hyperparams", None)
        if not isinstance(hyperparams, Mapping) or not _holds_variant(getattr(node, "inner_state", ())):
            return False
        if rho_name in getattr(node, "hyperparams_states", ()):
            msg = (
                f"`{rho_name}` is a schedule of `optax.inject_hyperparams`, which evaluates it in the "
                "update: the gradients of a step would be taken with the radius of the step before. "
                "Give the schedule to the variant, as `optax_sam.sam(schedule)`, or name it in the "
                f'static arguments, `optax.inject_hyperparams(..., static_args=("{rho_name}",))'
                f"({rho_name}=schedule, ...)`. Its value is in the variant's state all the same, as `rho`."
            )
            raise ValueError(msg)
        # Each as its only leaf: `flax.nnx.Optimizer` puts every array into a variable.
        found.update(
            {name: jax.tree.leaves(x)[0] for name, x in cast("Mapping[str, Any]", hyperparams).items()}
        )
        return False

    jax.tree.leaves(state, is_leaf=look)
    return found


def refuse_wrappers(state: Any) -> None:
    """Raises where a wrapper would silently break the variant, as far as the state shows it."""

    def check(node: Any) -> bool:
        """Looks at one node of the state; false, so that the search goes on into it."""
        if isinstance(node, optax.MultiStepsState) and _holds_variant(node):
            msg = (
                "`optax.MultiSteps` around a sharpness-aware variant accumulates only one of its two "
                "gradients, and mixes batches. Put it after the variant, "
                "`optax.chain(variant, optax.MultiSteps(base, 4).gradient_transformation())`, or take the "
                "step of the whole batch, `sam_value_and_grad(..., microbatch_size=n, batch_argnums=1)`."
            )
            raise ValueError(msg)
        if type(node) is tuple or isinstance(node, OrderedDict):  # The state of a chain.
            links = list(node.values() if isinstance(node, OrderedDict) else node)
            at = next((i for i, link in enumerate(links) if _holds_variant(link)), 0)
            before = links[:at]
            if links and isinstance(getattr(links[at], "inner_state", links[at]), SAMState):
                # Surely a chain, and no tuple of a user's: what it holds may be chains again.
                before = jax.tree.leaves(before, is_leaf=_is_named_state)
            for link in before:
                if _is_named_state(link):
                    msg = (
                        "In a chain the variant comes first. Before it stands a transformation (its state is "
                        f"{type(link).__name__}) that would silently act on both gradients at once, or on "
                        "one alone. Put it after the variant: "
                        "`optax.chain(variant, optax.clip_by_global_norm(1.0), base)`."
                    )
                    raise ValueError(msg)
        return False

    jax.tree.leaves(state, is_leaf=check)


def _is_named_state(x: Any) -> bool:
    return isinstance(x, tuple) and type(x).__name__.endswith("State")


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
    if len(own) != len(leaves):
        got, right = f"{len(own)} arrays", f"{len(leaves)}"
    else:
        shapes = [(np.shape(x), np.shape(y)) for x, y in zip(own, leaves, strict=True)]
        wrong = [pair for pair in shapes if pair[0] != pair[1]]
        if not wrong:
            # `flax.nnx.Optimizer` boxes every array of its state: these are the same leaves, unboxed.
            matched: SAMState = jax.tree.unflatten(structure, own)
            return matched._replace(rho=jnp.asarray(matched.rho, like.rho.dtype))
        got, right = f"an array of shape {wrong[0][0]}", f"{wrong[0][1]}"
    msg = (
        f"`state` does not fit the variant and the params: it holds {got}, where `variant.init(params)` "
        f"makes {right}. Make it by the `init` of an optimizer with this variant, from the same params; "
        "inside `jax.shard_map` pass both whole (`in_specs=P()`)."
    )
    raise ValueError(msg)


def has_holes(tree: Any) -> bool:
    """Whether `optax.masked` or `optax.partition` left something out."""
    return bool(_nodes(tree, is_hole))


def is_hole(x: Any) -> bool:
    """Whether this is what `optax.masked` and `optax.partition` leave in place of what they hide."""
    return isinstance(x, optax.MaskedNode)
