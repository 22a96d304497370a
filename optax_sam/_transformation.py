"""The type of all variants, their state, and the function that builds one from its two halves."""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from optax_sam import _checks, _tree
from optax_sam import ascent as ascents
from optax_sam._objective import Evaluation, Objective, SAMGradients


class SAMState(NamedTuple):
    """The state of every variant.

    Attributes:
      step: How many updates the variant has made. shape=(), dtype=int32
      rho: The radius of the next step: of a schedule its value, of a number that number, which
        `optax.tree.set(opt_state, rho=...)` changes at run time. shape=(), float32 or better
      memory: What the variant carries from step to step, in float32 or better; `()` for most.
    """

    step: jax.Array
    rho: jax.Array
    memory: Any


Evaluate = Callable[[Objective, optax.Params, SAMState], tuple[Evaluation, Any]]
"""An evaluation rule: from the loss, params and state to the pair, and to aux beside it."""


class SharpnessAwareTransformation(optax.GradientTransformationExtraArgs):
    """A variant: an `optax.GradientTransformationExtraArgs` that also knows what to evaluate.

    It has the two fields of every transformation, `init` and `update`, so that it chains like one.
    The attribute `evaluate`, which `sam_value_and_grad` uses, does not survive wrapping: hand the
    bare variant to `sam_value_and_grad`, and the chain that contains it to the training loop.

    Attributes:
      evaluate: The rule by which `sam_value_and_grad` evaluates the variant's gradients.
      ascent_only: Whether the clean gradient serves the ascent alone, so that one of fewer examples or
        of less precision will do.
      radius: What the variant calls its radius.
    """

    evaluate: Evaluate
    ascent_only: bool
    radius: str

    def __new__(
        cls, init: Any, update: Any, evaluate: Evaluate, ascent_only: bool = False, radius: str = "rho"
    ) -> "SharpnessAwareTransformation":
        """Builds the pair of functions and attaches the rule."""
        self = super().__new__(cls, init, update)
        self.evaluate = evaluate
        self.ascent_only = ascent_only
        self.radius = radius
        return self

    def __getnewargs__(self) -> Any:
        """What copies and pickles are built from."""
        return self.init, self.update, self.evaluate, self.ascent_only, self.radius


def find_state(state: optax.OptState, name: str = "rho") -> SAMState:
    """The one `SAMState` in an optimizer state, with the radius, of that name, that is in force."""
    found = [value for _, value in optax.tree.get_all_with_path(state, "SAMState")]
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
    _check_place(state)
    sam_state: SAMState = found[0]
    if isinstance(sam_state.rho, float | int):  # Set by hand, as `optax.tree.set(state, rho=0.1)`.
        sam_state = sam_state._replace(rho=jnp.asarray(sam_state.rho))
    for injected in _injected_radii(state, name):
        # `optax.inject_hyperparams` keeps the radius on its own; what a user writes there counts.
        (rho,), (like,) = jax.tree.leaves(injected), jax.tree.leaves(sam_state.rho)
        sam_state = sam_state._replace(rho=jnp.asarray(rho, like.dtype))
    return sam_state


def _injected_radii(state: Any, name: str) -> list[Any]:
    """What `optax.inject_hyperparams` around the variant holds as radius; other optimizers have a rho too."""
    found: list[Any] = []

    def look(node: Any) -> bool:
        """Looks at one node of the state; false, so that the search goes on into it."""
        # Also params may have an attribute of that name, and Adam's state holds copies of them.
        hyperparams: Any = getattr(node, "hyperparams", None)
        if not (isinstance(hyperparams, Mapping) and name in hyperparams):
            return False
        if _holds_variant(getattr(node, "inner_state", ())):
            if name in getattr(node, "hyperparams_states", ()):
                msg = (
                    f"`{name}` is a schedule of `optax.inject_hyperparams`, which evaluates it in the "
                    "update: the gradients of a step would be taken with the radius of the step before. "
                    "Give the schedule to the variant, as `optax_sam.sam(schedule)`, or name it in the "
                    f'static arguments, `optax.inject_hyperparams(..., static_args=("{name}",))'
                    f"({name}=schedule, ...)`. Its value is in the variant's state all the same, as `rho`."
                )
                raise ValueError(msg)
            found.append(cast("Mapping[str, Any]", hyperparams)[name])
        return False

    jax.tree.leaves(state, is_leaf=look)
    return found


def _check_place(state: Any) -> None:
    """Refuses what an optimizer's state shows to be wrong around the variant, and is silent about it."""

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


def _holds_variant(state: Any) -> bool:
    return bool(optax.tree.get_all_with_path(state, "SAMState"))


def at_step(value: Any, step: jax.Array) -> Any:
    """What a number or schedule is at a step."""
    return value(step) if callable(value) else value


def radius(rho: Any, step: jax.Array, params: Any, current: jax.Array | None = None) -> jax.Array:
    """The radius at a step, in float32 or the better dtype of params.

    A schedule is evaluated; an array (also a traced one, as under `optax.inject_hyperparams`) is
    taken as it is, in a buffer of its own, as a state may be donated; a Python number gives way to the
    radius in the state, which may have been changed.
    """
    if callable(rho):
        rho = rho(step)
    elif not isinstance(rho, jax.Array):
        # Weakly typed, as the number is that a user may put in its place: nothing is compiled anew.
        return jnp.asarray(float(rho) if current is None else current)
    if current is not None:
        return jnp.array(rho, jnp.result_type(jnp.float32, current))  # Perhaps a number, set by hand.
    leaves = jax.tree.leaves(params)
    return jnp.array(rho, jnp.result_type(jnp.float32, *(x.dtype for x in leaves)))


def is_pair(updates: Any, params: Any = None) -> bool:
    """Whether updates are `SAMGradients`, or a mapping that was made of them and not of params."""
    if isinstance(updates, SAMGradients):
        return True
    if not isinstance(updates, Mapping):
        return False
    keys = set(cast("Mapping[str, Any]", updates))
    params_keys = set(cast("Mapping[str, Any]", params)) if isinstance(params, Mapping) else None
    return "clean" in keys and keys <= set(SAMGradients._fields) and keys != params_keys


def as_pair(
    updates: Any, clean_updates: Any = None, statistics: Any = None, params: Any = None
) -> SAMGradients:
    """The pair, whichever door it came through.

    Args:
      updates: `SAMGradients`, a mapping with its field names (what `flax.nnx.Optimizer` makes of
        it), or the perturbed gradient.
      clean_updates: The clean gradient, if `updates` is the perturbed one.
      statistics: The statistics that go with them.
      params: The params; a mapping is no pair if they have the same keys.

    Returns:
      The gradients.

    Raises:
      TypeError: If there is but one gradient.
    """
    if isinstance(updates, SAMGradients):
        return updates
    if clean_updates is not None:
        return SAMGradients(clean_updates, updates, statistics)
    if is_pair(updates, params):
        if "perturbed" in updates:
            return SAMGradients(updates["clean"], updates["perturbed"], updates.get("statistics"))
        msg = (
            "The pair of gradients lost its perturbed half: flax.nnx drops it where both halves are "
            "the same object. Write `optimizer.update(model, grads.perturbed, clean_updates=grads.clean)`."
        )
        raise TypeError(msg)
    msg = (
        "A sharpness-aware variant needs two gradients and got a single one. Take them from "
        "`optax_sam.sam_value_and_grad(loss, variant)(params, ..., state=opt_state)` and write "
        "`update(grads, opt_state, params)`, or, where a wrapper insists on updates with the structure of "
        "params, `update(grads.perturbed, opt_state, params, clean_updates=grads.clean)`. "
        f"Got a {type(updates).__name__}. In a chain the variant comes first."
    )
    raise TypeError(msg)


def perturb_once(ascent: ascents.Ascent | None = None) -> Evaluate:
    """The evaluation rule of most variants: one ascent step, one more gradient."""
    ascent = ascents.resolve(ascent)

    def evaluate(objective: Objective, params: optax.Params, state: SAMState) -> tuple[Evaluation, Any]:
        clean = objective.ascent_at(params)
        perturbation = ascent(clean.gradient, state.rho, params)
        perturbed = objective.at(params, perturbation)
        return objective.combine(clean, perturbed), clean.aux

    return evaluate


def sharpness_aware(
    rho: optax.ScalarOrSchedule,
    ascent: ascents.Ascent | None = None,
    descent: Callable[..., tuple[optax.Updates, Any]] | None = None,
    init_memory: Callable[[optax.Params], Any] | None = None,
    *,
    evaluate: Evaluate | None = None,
    ascent_only: bool | None = None,
    keeps_memory: bool = False,
    name: str = "rho",
) -> SharpnessAwareTransformation:
    r"""Builds a sharpness-aware variant from an ascent rule and a descent rule.

    .. math::
      \epsilon = \mathrm{ascent}(g, \rho, w), \quad g = \nabla L(w), \quad
      g_\epsilon = \nabla L(w + \epsilon), \quad u = \mathrm{descent}(g, g_\epsilon)

    Args:
      rho: The radius, a number >= 0 or a schedule of the variant's own step.
      ascent: `(gradient, rho, params) -> perturbation`, a pytree like params; None for
        `optax_sam.ascent.normalized()`.
      descent: `(gradients, state, params) -> (direction, memory)`, where gradients are the
        `SAMGradients` in float32 or better and state is the `SAMState`. If it ends in
        `**extra_args`, it receives those of `update`. None hands on the perturbed gradient.
      init_memory: `params -> memory`, for variants that remember something; `descent` returns memory of
        the same shapes.
      evaluate: What to evaluate instead of one ascent step and one perturbed gradient; `ascent` is
        then not used.
      ascent_only: Whether the clean gradient serves the ascent alone and takes no part in the direction:
        what `sam_value_and_grad` needs to know for `ascent_examples` and `ascent_dtype`. None: if neither
        `descent` nor `evaluate` is given.
      keeps_memory: Whether `descent` itself sees to it that the memory stays finite, for a variant that
        would pay for it in steps that change no memory.
      name: What the variant calls its radius, for error messages.

    Returns:
      The variant, the first link of an `optax.chain`. Its direction comes in the dtypes of params.
      Where an entry of the new memory is not finite, the old one stays.

    Raises:
      TypeError, ValueError: If `rho` is neither a number >= 0 nor a schedule, or `ascent` no ascent rule.

    Examples:
      A variant that takes the mean of both gradients:

      >>> import jax.numpy as jnp, optax, optax_sam
      >>> def mean(gradients, state, params):
      ...     del params
      ...     total = optax.tree.add(gradients.clean, gradients.perturbed)
      ...     return optax.tree.scale(0.5, total), state.memory
      >>> variant = optax_sam.sharpness_aware(0.1, optax_sam.ascent.normalized(), mean)
      >>> params = jnp.array([3.0, 4.0])
      >>> state = variant.init(params)
      >>> loss = lambda w: jnp.sum(w**4) / 4
      >>> value, grads = optax_sam.sam_value_and_grad(loss, variant)(params, state=state)
      >>> direction, state = variant.update(grads, state, params)
      >>> print([f"{x:.3f}" for x in direction])
      ['27.532', '66.263']
    """
    _checks.scalar_or_schedule(name, rho)
    rule = perturb_once(ascent) if evaluate is None else evaluate
    if ascent_only is None:
        ascent_only = descent is None and evaluate is None
    takes_extra_args = descent is not None and any(
        p.kind is p.VAR_KEYWORD for p in inspect.signature(descent).parameters.values()
    )

    def init(params: optax.Params) -> SAMState:
        params = jax.tree.map(jnp.asarray, params)  # Some may be plain numbers.
        step = jnp.zeros((), jnp.int32)
        memory = () if init_memory is None else init_memory(params)
        return SAMState(step, radius(rho, step, params), memory)

    def update(
        updates: Any,
        state: SAMState,
        params: optax.Params | None = None,
        *,
        clean_updates: optax.Updates | None = None,
        statistics: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SAMState]:
        given = as_pair(updates, clean_updates, statistics, params)
        params = jax.tree.map(jnp.asarray, params)
        like = given.perturbed if params is None else params
        _checks.same_shapes("The perturbed gradient", given.perturbed, like, updates=True)
        _checks.same_shapes("The clean gradient", given.clean, like, updates=True)
        gradients = SAMGradients(*_tree.upcast(tuple(given)))
        if descent is None:
            direction, memory = gradients.perturbed, state.memory
        else:
            direction, memory = descent(gradients, state, params, **(extra_args if takes_extra_args else {}))
        if jax.tree.leaves(memory) and not keeps_memory:
            memory = _tree.keep_finite(memory, state.memory)
        step = jnp.asarray(optax.safe_increment(state.step))
        new_state = SAMState(step, radius(rho, step, params, state.rho), memory)
        return _tree.cast_like(direction, like), new_state

    return SharpnessAwareTransformation(init, update, rule, ascent_only, name)
