"""The type of all variants, the function that builds one, and the doors of its `update`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from optax_sam import _checks, _tree
from optax_sam import ascent as ascents
from optax_sam._loss import Evaluation, Loss, MadeBy, Pass, Peers, SAMGradients
from optax_sam._state import SAMState, has_holes, is_hole, with_holes_of

Evaluate = Callable[[Loss, SAMState], Evaluation]
"""An evaluation rule: from the loss around params, and the variant's state, to the pair of gradients."""

Climb = Callable[[optax.Updates, SAMState, optax.Params], optax.Updates]
"""`(gradient, state, params) -> perturbation`: an ascent that needs the memory or the step."""

When = Callable[[SAMState], jax.Array]
"""`state -> whether this step pays for the second gradient`."""

P = ParamSpec("P")
T = TypeVar("T")


class SharpnessAwareTransformation(optax.GradientTransformationExtraArgs):
    """A variant: an `optax.GradientTransformationExtraArgs` that also knows what to evaluate.

    It has the two fields of every transformation, `init` and `update`, so that it chains like one. Its
    attributes do not survive a chain or another wrapper: give the variant itself to `sam_value_and_grad`, and
    the chain that contains it to the training loop.

    Attributes:
      evaluate: The rule by which `sam_value_and_grad` evaluates the variant's gradients.
      ascent_only: Whether the clean gradient serves the ascent alone, so that a cheaper one will do.
      compares: Whether the direction is made of both gradients.
      is_optimizer: Whether it is a whole optimizer: what it returns are updates, and no optimizer follows it.
      rho: The radius that it was made with, a number or a schedule.
      rho_name: What the variant calls its radius.
      has_plain_step: Whether it can do with the gradient at params alone, as `gated` lets it in some steps.
      made_by: The name and the arguments of its constructor, as its pairs of gradients carry them.
      arguments: The names of its constructor's arguments.
      remake: Makes it anew with some of the constructor's arguments replaced, or None.
      describe: Gives the call of the constructor, for people to read, or None.
    """

    evaluate: Evaluate
    ascent_only: bool
    compares: bool
    is_optimizer: bool
    rho: optax.ScalarOrSchedule
    rho_name: str
    has_plain_step: bool
    made_by: MadeBy
    arguments: tuple[str, ...] = ()
    remake: Callable[..., SharpnessAwareTransformation] | None
    describe: Callable[[], str] | None = None

    def __new__(cls, init: Any, update: Any, **attributes: Any) -> SharpnessAwareTransformation:
        """Builds the pair of functions and attaches the rest."""
        self = super().__new__(cls, init, update)
        self.__dict__.update(attributes)
        return self

    def __repr__(self) -> str:
        """The call of the constructor: `gsam(rho=0.05, alpha=0.4)`."""
        return self.describe() if self.describe else f"{self.made_by.name}({self.rho_name}={self.rho!r})"

    if not TYPE_CHECKING:  # Which takes `_replace` of a named tuple for final.

        def _replace(self, /, **kwargs: Any) -> SharpnessAwareTransformation:
            """A copy with another `init` or `update`, and the same evaluation rule."""
            return type(self)(**{**self._asdict(), **kwargs}, **self.__dict__)


def constructor(function: Callable[P, T]) -> Callable[P, T]:
    """Tells the variants that a constructor makes its name and their arguments.

    Then `sam` refuses a pair of gradients that `gsam` evaluated, and the evaluation uses the arguments that
    `optax.inject_hyperparams` holds.

    Args:
      function: A function that returns a variant, such as one made by `sharpness_aware`.

    Returns:
      The same function.

    Examples:
      >>> import optax_sam
      >>> @optax_sam.constructor
      ... def half_sam(rho=0.05):
      ...     return optax_sam.sharpness_aware(rho / 2)
      >>> half_sam(0.1).made_by.name
      'half_sam'
    """
    signature = inspect.signature(function)
    name = getattr(function, "__name__", "a variant")

    @functools.wraps(function)
    def make(*args: P.args, **kwargs: P.kwargs) -> T:
        if "rho" in [*signature.parameters][:1]:
            _checks.no_optimizer(name, args, kwargs)
        # `optax.inject_hyperparams` names every argument. Its arrays are what is in force; arrays that a user
        # passes are constants.
        if args or kwargs.keys() != signature.parameters.keys():
            args, kwargs = jax.tree.map(_as_number, (args, kwargs), is_leaf=_is_not_container)
        variant = function(*args, **kwargs)
        if isinstance(variant, SharpnessAwareTransformation):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()

            def remake(**arguments: Any) -> Any:
                known = {key: x for key, x in arguments.items() if key in signature.parameters}
                return cast("Any", make)(**{**bound.arguments, **known})

            constants = tuple((key, x) for key, x in bound.arguments.items() if _is_constant(x))
            variant.made_by, variant.remake = MadeBy(name, constants), remake
            variant.arguments = tuple(signature.parameters)
            variant.describe = lambda: f"{name}({', '.join(_shown(signature, bound.arguments))})"
        return variant

    return make


def _is_not_container(x: Any) -> bool:
    return type(x) not in (tuple, list, dict)


def _as_number(x: Any) -> Any:
    """A constant array without axes as a Python number; all else as it is."""
    is_scalar = isinstance(x, jax.Array | np.ndarray | np.generic) and np.ndim(x) == 0
    if is_scalar and not isinstance(x, Tracer) and jnp.issubdtype(x.dtype, np.number):
        return x.item()
    return x


def _is_constant(x: Any) -> bool:
    """Whether an argument can be compared: a Python number, a string, or a tuple of these."""
    if isinstance(x, tuple):
        return all(map(_is_constant, cast("tuple[Any, ...]", x))) and type(x) is tuple
    return isinstance(x, bool | int | float | str)


def _shown(signature: inspect.Signature, arguments: Mapping[str, Any]) -> Iterator[str]:
    """Arguments as in a call: numbers always, others where they are not the default."""
    for name, x in arguments.items():
        default = signature.parameters[name].default
        is_number = isinstance(x, int | float) and not isinstance(x, bool)
        if not is_number and (x is default or (_is_constant(x) and x == default)):
            continue
        text = repr(x)
        if len(text) > 100 or " at 0x" in text:
            text = f"<{getattr(x, '__name__', type(x).__name__)}>"
        yield f"{name}={text}"


def _refuse_pair_of_another(evaluated: MadeBy, chained: MadeBy) -> None:
    """Raises if a pair was evaluated by another variant, or by the same with other constants."""
    if not evaluated.name:
        return
    if evaluated.name != chained.name:
        msg = (
            f"The gradients were evaluated by `{evaluated.name}`, and `{chained.name}` is in the optimizer. "
            "Give one variant to both, `sam_value_and_grad(loss, variant)` and `optax.chain(variant, ...)`."
        )
        raise ValueError(msg)
    ours = dict(chained.arguments)
    for name, value in evaluated.arguments:
        if name in ours and ours[name] != value:
            msg = (
                f"The gradients were evaluated by `{evaluated.name}({name}={value!r})`, and "
                f"`{chained.name}({name}={ours[name]!r})` is in the optimizer. Give one variant to both, "
                "`sam_value_and_grad(loss, variant)` and `optax.chain(variant, ...)`."
            )
            raise ValueError(msg)


def value_at(value: Any, step: jax.Array) -> Any:
    """What a number or schedule is at a step."""
    if not callable(value):
        return value
    result: Any = value(step)
    if np.shape(result):
        msg = f"A schedule must return a scalar, got an array of shape {np.shape(result)} from {value!r}."
        raise ValueError(msg)
    return result


def as_arrays(params: Any) -> Any:
    """Params, checked, with arrays in place of plain numbers. Abstract arrays stay as they are."""
    _checks.params(params)
    return jax.tree.map(lambda x: x if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x), params)


def first_rho(rho: Any, params: Any) -> jax.Array:
    """The radius to begin with, in float32 or the better dtype of params, in a buffer of its own."""
    return jnp.array(value_at(rho, jnp.zeros((), jnp.int32)), _tree.common_dtype(params))


def rho_at(rho: Any, current: Any, params: Any) -> jax.Array:
    """The radius that is in force, in the dtype of its place in the state.

    Args:
      rho: What the variant was made with.
      current: The radius in the state, perhaps set by a user as a number. It counts, unless `rho` is an
        array: that is what `optax.inject_hyperparams` says, or a transformation around the whole training.
      params: The params, for the dtype of a radius that was set as a number.
    """
    dtype = current.dtype if isinstance(current, jax.Array) else _tree.common_dtype(params)
    value = rho if isinstance(rho, jax.Array) else current
    return jnp.asarray(value, jnp.promote_types(dtype, jnp.float32))


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
            # Through `flax.nnx` the mark comes on the names of the fields.
            mark = next((name.made_by for name in updates if hasattr(name, "made_by")), MadeBy())
            made_by = updates.get("made_by", mark)
            return SAMGradients(updates["clean"], updates["perturbed"], updates.get("statistics"), made_by)
        msg = (
            "The pair of gradients lost its perturbed half: flax.nnx drops it where both halves are "
            "the same object. Write `optimizer.update(model, grads.perturbed, clean_updates=grads.clean)`."
        )
        raise TypeError(msg)
    msg = (
        "A sharpness-aware variant needs two gradients and got a single one. Take them from "
        "`optax_sam.sam_value_and_grad(loss, variant)(params, ..., state=opt_state)` and write "
        "`update(grads, opt_state, params)`, or, if a wrapper needs updates with the structure of "
        "params, `update(grads.perturbed, opt_state, params, clean_updates=grads.clean)`. With a plain "
        "gradient write `update(grads, opt_state, params, grad_fn=lambda params: jax.grad(loss)(params, "
        f"batch))`. Got a {type(updates).__name__}. In a chain the variant comes first, and "
        "`optax.MultiSteps` goes around what follows it, not around the variant."
    )
    raise TypeError(msg)


def checked_evaluation(result: Any) -> Evaluation:
    """What an evaluation rule returned, or an error that says what it must return."""
    if not isinstance(result, Evaluation):
        msg = f"`evaluate` must return what `loss.pair(...)` returns, got {type(result).__name__}."
        raise TypeError(msg)
    return result


def settle(
    evaluation: Evaluation, variant: SharpnessAwareTransformation, precision: str | None = None
) -> SAMGradients:
    """The pair of an evaluation, marked with who made it.

    Two gradients at the same point differ by rounding when they come from differently compiled passes. A rule
    that looks at their difference would amplify that: it gets the clean one for both.

    Args:
      evaluation: What the evaluation rule returned, averaged over all peers.
      variant: The variant that evaluated.
      precision: The least precise dtype in which the loss was computed, if that is known.

    Returns:
      The pair.
    """
    made_by = dataclasses.replace(variant.made_by, precision=precision)
    gradients = evaluation.gradients._replace(made_by=made_by)
    if not variant.compares:
        return gradients
    moved = evaluation.moved != 0.0
    return gradients._replace(perturbed=_tree.select(moved, gradients.perturbed, gradients.clean))


def rounding(gradients: SAMGradients, params: Any) -> float:
    """The relative rounding error of the gradients: that of the least precise dtype on their way."""
    tree = gradients.perturbed if params is None else params
    dtypes: list[Any] = [x.dtype for x in jax.tree.leaves(tree)]
    if gradients.made_by.precision is not None:
        dtypes.append(gradients.made_by.precision)
    return max((float(jnp.finfo(dtype).eps) for dtype in dtypes), default=0.0)


def _evaluate_by(
    grad_fn: Any,
    gradient: Any,
    params: Any,
    all_params: Any,
    variant: SharpnessAwareTransformation,
    state: SAMState,
) -> SAMGradients:
    """The pair, from a gradient at params and the function that gives more of them.

    Inside `optax.masked` params have holes. They are filled from `all_params` for `grad_fn`, and cut out of
    what it returns.
    """
    _checks.grad_fn(grad_fn)
    if params is None:
        msg = "With `grad_fn=` a variant needs the params: write `update(grads, state, params, grad_fn=...)`."
        raise ValueError(msg)
    if not has_holes(params):
        all_params = params
    elif all_params is None or has_holes(all_params):
        msg = (
            "Inside `optax.masked` or `optax.partition` the variant sees a part of params, and `grad_fn` "
            "needs all of them: write `update(grads, state, params, grad_fn=..., all_params=params)`, and "
            "leave out `mask_compatible_extra_args`."
        )
        raise ValueError(msg)
    unknown = _tree.unknown(jnp.zeros((), _tree.common_dtype(params)))

    def pass_at(point: optax.Params, cotangent: Any) -> Pass:
        del cotangent
        filled = jax.tree.map(lambda x, y: y if is_hole(x) else x, point, all_params, is_leaf=is_hole)
        found = grad_fn(filled)
        _checks.same_shapes("What `grad_fn` returns", found, all_params)
        return Pass(unknown, _tree.upcast(with_holes_of(params, found)))

    given = Pass(unknown, _tree.upcast(gradient), displacement=jnp.zeros((), jnp.float32))
    loss = Loss(params, pass_at, pass_at, Peers(), measures=variant.compares, given=given)
    return settle(checked_evaluation(variant.evaluate(loss, state)), variant)


def _checked(given: SAMGradients, like: Any) -> SAMGradients:
    """The pair in float32 or better, in the structure of params."""
    # Inside a mask the updates have holes, and the extra arguments have none.
    clean, statistics = with_holes_of(like, given.clean), with_holes_of(like, given.statistics)
    _checks.same_shapes("The perturbed gradient", given.perturbed, like, updates=True)
    _checks.same_shapes("The clean gradient", clean, like, updates=True)
    clean, perturbed, statistics = _tree.upcast((clean, given.perturbed, statistics))
    return SAMGradients(clean, perturbed, statistics, given.made_by)


def _checked_descent(result: Any, memory: Any, like: Any) -> tuple[Any, Any]:
    """What `descent` returned, or an error that says what it must return."""
    if type(result) is not tuple or len(result) != 2:
        msg = f"`descent` must return a pair, `(direction, memory)`, got {type(result).__name__}."
        raise TypeError(msg)
    direction, new = result
    if isinstance(direction, SAMGradients):
        msg = "The direction that `descent` returns must be one tree, such as `gradients.perturbed`."
        raise TypeError(msg)
    _checks.same_shapes("The direction that `descent` returns", direction, like)
    if jax.tree.structure(new) != jax.tree.structure(memory):
        msg = (
            "The memory that `descent` returns must have the structure of what `init_memory` makes (without "
            f"one: return `state.memory`), got {_checks.difference(new, memory, 'the state holds')}."
        )
        raise ValueError(msg)
    return direction, new


def _takes_extra_args(descent: Any) -> bool:
    """Whether it ends in `**extra_args`."""
    parameters = inspect.signature(descent).parameters.values() if descent is not None else ()
    return any(p.kind is p.VAR_KEYWORD for p in parameters)


def _check_functions(
    ascent: Any,
    descent: Any,
    init_memory: Any,
    climb: Any,
    when: Any,
    evaluate: Any,
    ascent_only: bool | None,
) -> None:
    """Raises if a function cannot be called as it will be, or if two exclude each other."""
    _checks.takes("descent", descent, 3)
    _checks.takes("init_memory", init_memory, 1)
    _checks.takes("climb", climb, 3)
    _checks.takes("when", when, 1)
    _checks.takes("evaluate", evaluate, 2)
    functions = {"ascent": ascent, "climb": climb, "when": when, "evaluate": evaluate}
    excluded = {"evaluate": ("ascent", "climb", "when"), "climb": ("ascent",)}
    for name, others in excluded.items():
        for other in others:
            if functions[name] is not None and functions[other] is not None:
                msg = f"`{name}` replaces `{other}`: give one of them."
                raise ValueError(msg)
    if ascent_only and when is not None:
        msg = "A variant with `when` descends along the clean gradient too: leave out `ascent_only=True`."
        raise ValueError(msg)


def _one_climb(ascent: ascents.Ascent | None, climb: Climb | None, when: When | None) -> Evaluate:
    """The evaluation rule of most variants: one ascent step, one more gradient."""
    rule = ascents.resolve(ascent)

    def evaluate(loss: Loss, state: SAMState) -> Evaluation:
        clean = loss.ascent()

        def perturbed() -> Pass:
            gradient = _tree.upcast(clean.gradient)
            if climb is None:
                perturbation = ascents.at_step(rule, state.step)(gradient, state.rho, loss.params)
            else:
                perturbation = climb(gradient, state, loss.params)
            _checks.same_shapes("What the ascent returns", perturbation, loss.params)
            return loss.at(perturbation)

        return loss.pair(clean, perturbed, when=None if when is None else when(state))

    return evaluate


def sharpness_aware(
    rho: optax.ScalarOrSchedule,
    ascent: ascents.Ascent | None = None,
    descent: Callable[..., tuple[optax.Updates, Any]] | None = None,
    init_memory: Callable[[optax.Params], Any] | None = None,
    *,
    climb: Climb | None = None,
    when: When | None = None,
    evaluate: Evaluate | None = None,
    ascent_only: bool | None = None,
    compares: bool | None = None,
    guards_memory: bool = False,
    is_optimizer: bool = False,
    has_plain_step: bool = True,
    rho_name: str = "rho",
) -> SharpnessAwareTransformation:
    r"""Builds a sharpness-aware variant from a few small functions.

    .. math::
      \epsilon = \mathrm{ascent}(g, \rho, w), \quad g = \nabla L(w), \quad
      g_\epsilon = \nabla L(w + \epsilon), \quad u = \mathrm{descent}(g, g_\epsilon)

    Args:
      rho: The radius, a number >= 0 or a schedule of the variant's own step.
      ascent: `(gradient, rho, params) -> perturbation`, a pytree like params; None for
        `optax_sam.ascent.normalized()`. The gradient is in float32 or better.
      descent: `(gradients, state, params) -> (direction, memory)`, where gradients are the
        `SAMGradients` in float32 or better and state is the `SAMState`. If it ends in
        `**extra_args`, it receives those of `update`. None: the
        direction is the perturbed gradient.
      init_memory: `params -> memory`, for variants that remember something, in float32 or better. `descent`
        returns memory of the same structure and shapes, which is cast to the dtypes that it began with.
        Entries that are not finite keep their old value.
      climb: `(gradient, state, params) -> perturbation`: an ascent that needs the memory or the step. It
        replaces `ascent`.
      when: `state -> whether this step takes the second gradient`, a boolean scalar. In the other steps the
        pair holds the clean gradient twice. None: in every step.
      evaluate: `(loss, state) -> evaluation`, for what the other functions cannot express: several
        ascent steps, noise, decisions that depend on a gradient. `loss` is a `Loss`. It replaces `ascent`,
        `climb` and `when`.
      ascent_only: Whether the clean gradient serves the ascent alone and takes no part in the direction:
        what `sam_value_and_grad` needs to know for `ascent_examples`, `ascent_dtype` and `ascent_loss`. None:
        if none of `descent`, `evaluate` and `when` is given. Never true of a variant that takes a single
        gradient, or skips one.
      compares: Whether the direction is made of both gradients. They are then the same, to the last bit, in
        steps in which nothing was perturbed. None: if `descent` is given and `ascent_only` is not true.
      guards_memory: Whether `descent` itself keeps the memory finite.
      is_optimizer: Whether `descent` returns updates, learning rate and sign included: a whole optimizer,
        after which `sam_value_and_grad` refuses another.
      has_plain_step: Whether a step can do with the clean gradient alone: the first pass is `loss.ascent()`,
        and `descent` needs no statistics. Else `gated` refuses the variant.
      rho_name: What the constructor calls the radius, for messages and for `optax.inject_hyperparams`.

    Returns:
      The variant, the first link of an `optax.chain`. Its direction comes in the dtypes of params.

    Raises:
      TypeError, ValueError: If `rho` is neither a number >= 0 nor a schedule, a function cannot be called
        with its arguments, or functions exclude one another.

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
    _checks.scalar_or_schedule(rho_name, rho)
    _check_functions(ascent, descent, init_memory, climb, when, evaluate, ascent_only)
    rule = _one_climb(ascent, climb, when) if evaluate is None else evaluate
    if ascent_only is None:
        ascent_only = descent is None and evaluate is None and when is None
    if compares is None:
        compares = descent is not None and not ascent_only

    def init(params: optax.Params) -> SAMState:
        params = as_arrays(params)
        memory = () if init_memory is None else init_memory(params)
        if not is_optimizer:  # Whose base optimizer keeps the dtypes that it likes.
            memory = _tree.upcast(memory)
        return SAMState(jnp.zeros((), jnp.int32), first_rho(rho, params), memory)

    def update(
        updates: Any,
        state: SAMState,
        params: optax.Params | None = None,
        *,
        clean_updates: optax.Updates | None = None,
        statistics: Any = None,
        grad_fn: Callable[[optax.Params], optax.Updates] | None = None,
        all_params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SAMState]:
        params = as_arrays(params)
        state = state._replace(rho=rho_at(rho, state.rho, params))
        if grad_fn is not None and clean_updates is None and not is_pair(updates, params):
            given = _evaluate_by(grad_fn, updates, params, all_params, variant, state)
        else:
            given = as_pair(updates, clean_updates, statistics, params)
        _refuse_pair_of_another(given.made_by, variant.made_by)
        like = given.perturbed if params is None else params
        gradients = _checked(given, like)
        if descent is None:
            direction, memory = gradients.perturbed, state.memory
        else:
            extra_args = extra_args if _takes_extra_args(descent) else {}
            result = descent(gradients, state, params, **extra_args)
            direction, memory = _checked_descent(result, state.memory, like)
        if jax.tree.leaves(memory) and not guards_memory:
            memory = _tree.keep_finite(memory, state.memory)
        step = jnp.asarray(optax.safe_increment(state.step))
        next_rho = jnp.array(value_at(rho, step) if callable(rho) else state.rho, state.rho.dtype)
        return _tree.cast_like(direction, like), SAMState(step, next_rho, memory)

    variant = SharpnessAwareTransformation(
        init,
        update,
        evaluate=rule,
        ascent_only=ascent_only,
        compares=compares,
        is_optimizer=is_optimizer,
        rho=rho,
        rho_name=rho_name,
        has_plain_step=has_plain_step,
        made_by=MadeBy("sharpness_aware"),
        remake=None,
    )
    return variant
