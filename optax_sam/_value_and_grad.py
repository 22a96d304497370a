"""`sam_value_and_grad`: evaluates what a variant needs, as `jax.value_and_grad` evaluates a gradient."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Unpack, cast, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from optax_sam import _checks, _tree
from optax_sam._gradient import Call, Parts, TracedOnce, batch_size, gradient_at, in_loop
from optax_sam._loss import (
    AxisName,
    CompositeLoss,
    Evaluation,
    Loss,
    Peers,
    SAMGradients,
    serializable,
    varying,
)
from optax_sam._shards import evaluate_shards
from optax_sam._state import SAMState, find_state, holds_variant, injected_arguments, match_structure
from optax_sam._types import AuxT, Perturbation, SAMOptions, SAMValueAndGrad, ShardMode
from optax_sam._variant import SharpnessAwareTransformation, checked_evaluation, settle
from optax_sam.losses import SharpestExamples


@serializable
class SAMMetrics(NamedTuple):
    """Measures of a sharpness-aware step, to be logged: scalars in float32 or better.

    Measure anything else on one gradient, `grads.perturbed`: `optax.tree.norm(grads)` counts both. What was
    not measured is NaN; under `jax_debug_nans`, which would stop the program, it is infinity.

    Attributes:
      loss: The loss of the clean pass. A variant with only one gradient reports the loss at its point; with
        `ascent_examples` it is the loss of these examples.
      perturbed_loss: The loss at the perturbed point. NaN in steps with only one gradient.
      sharpness: Their difference, an estimate of sharpness for free. NaN in steps with only one gradient, and
        with `ascent_examples`, `ascent_dtype` or `ascent_loss`, where the two losses are not comparable.
        `numpy.nanmean` averages the rest.
      clean_norm: Norm of the clean gradient.
      perturbed_norm: Norm of the perturbed gradient.
      cosine: Cosine of the angle between the two; 1 in steps with only one gradient.
      perturbation_norm: Norm of the perturbation that was applied. It is below rho if rounding to the dtype
        of params removed some of it, and 0 in a step that was not perturbed. If each shard has its own, the
        mean over shards.
      rho: The current radius.
    """

    loss: jax.Array
    perturbed_loss: jax.Array
    sharpness: jax.Array
    clean_norm: jax.Array
    perturbed_norm: jax.Array
    cosine: jax.Array
    perturbation_norm: jax.Array
    rho: jax.Array


@overload
def sam_value_and_grad(
    fun: Callable[..., Any],
    variant: SharpnessAwareTransformation,
    argnums: int | Sequence[int] = 0,
    has_aux: Literal[False] = False,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[SAMOptions],
) -> SAMValueAndGrad[tuple[jax.Array, SAMGradients]]: ...


@overload
def sam_value_and_grad(
    fun: Callable[..., Any],
    variant: SharpnessAwareTransformation,
    argnums: int | Sequence[int] = 0,
    has_aux: Literal[False] = False,
    *,
    return_metrics: Literal[True],
    **options: Unpack[SAMOptions],
) -> SAMValueAndGrad[tuple[jax.Array, SAMGradients, SAMMetrics]]: ...


@overload
def sam_value_and_grad(
    fun: Callable[..., tuple[Any, AuxT]],
    variant: SharpnessAwareTransformation,
    argnums: int | Sequence[int] = 0,
    has_aux: Literal[True] = ...,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[SAMOptions],
) -> SAMValueAndGrad[tuple[tuple[jax.Array, AuxT], SAMGradients]]: ...


@overload
def sam_value_and_grad(
    fun: Callable[..., tuple[Any, AuxT]],
    variant: SharpnessAwareTransformation,
    argnums: int | Sequence[int] = 0,
    has_aux: Literal[True] = ...,
    *,
    return_metrics: Literal[True],
    **options: Unpack[SAMOptions],
) -> SAMValueAndGrad[tuple[tuple[jax.Array, AuxT], SAMGradients, SAMMetrics]]: ...


def sam_value_and_grad(
    fun: Callable[..., Any],
    variant: SharpnessAwareTransformation,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    return_metrics: bool = False,
    axis_name: AxisName | None = None,
    perturbation: Perturbation = "global",
    num_shards: int | None = None,
    shard_mode: ShardMode = "vmap",
    microbatch_size: int | None = None,
    ascent_examples: int | float | None = None,
    ascent_dtype: DTypeLike | None = None,
    ascent_loss: Callable[..., Any] | None = None,
    batch_argnums: int | Sequence[int] | None = None,
) -> SAMValueAndGrad[Any]:
    r"""Like `jax.value_and_grad`, for a sharpness-aware variant.

    Args:
      fun: The loss: a function that returns a scalar, or a pair `(scalar, aux)`.
      variant: The bare variant, e.g. `optax_sam.sam(0.05)`; not the chain that contains it.
      argnums: Which positional argument holds the params, or which ones do. With several, params are
        their tuple, and the optimizer's state must have been made from that tuple.
      has_aux: Whether `fun` returns a pair.
      return_metrics: Whether to return `SAMMetrics` as a third output.
      axis_name: Inside `jax.pmap` or `jax.shard_map`, the name of the axis (or axes) over which the
        batch is spread. Value, gradients and metrics are averaged over it; aux is that of each
        device. If you leave it out and average the gradients yourself, you get
        `perturbation="local"`: each device perturbs by its own part.
      perturbation: With `axis_name`: "global" perturbs by the gradient of the whole batch (two
        all-reduces a step), "local" by that of each device's part (one all-reduce; m-sharpness).
      num_shards: Splits the batch arguments into so many contiguous shards along their first axis,
        each with a perturbation of its own (m-sharpness without devices).
      shard_mode: How the shards run: "vmap" (all at once), "loop" (one after the other, in the memory
        of one), or how many rounds to take, with `num_shards / rounds` shards at once. Under `jit`
        with a batch sharded over n devices take "vmap" or `num_shards // n` rounds.
      microbatch_size: Accumulates every gradient over microbatches of so many examples, by
        `optax.microbatch`: the step of the full batch in the memory of a microbatch.
      ascent_examples: Takes the ascent gradient from the first so many examples (an int) of the batch, or
        of each shard or device's part, or from that fraction of them (a float in (0, 1]): a step then
        costs 1 + n / B gradients. For variants that use the clean gradient for the ascent only (their
        attribute `ascent_only` is true, as that of `sam`); others are refused.
      ascent_dtype: The dtype in which the ascent gradient is computed, such as `jnp.bfloat16`: params and
        floating-point batch arguments, where `batch_argnums` names them, are cast to it, and all that
        comes out in it to the dtype of params. For the same variants.
      ascent_loss: Another loss, along whose gradient the ascent goes: a function of the same arguments that
        returns the same as `fun`. For the same variants.
      batch_argnums: Which positional arguments are batches: pytrees of arrays whose first axis counts
        examples. Needed for `num_shards`, `microbatch_size` and `ascent_examples`; the loss must be a
        mean over examples.

    Returns:
      A function `(*args, state, loss_scale=None, **kwargs)` that takes the arguments of `fun`, the
      optimizer's state by keyword, and optionally a factor by which the loss is multiplied before it is
      differentiated (for half precision); gradients are divided by it again. It returns `(value, grads)`
      or `((value, aux), grads)`, and metrics after that; `grads` are `SAMGradients` in the shapes of
      params. Value and aux are of the clean pass; the perturbed pass sees the same arguments and its
      aux is dropped. With `ascent_examples`, `ascent_dtype` or `ascent_loss` the clean pass has these
      examples, this precision or this loss, and so have value, aux and `grads.clean`. With shards or
      microbatches the floating-point leaves of aux are averaged and its integer leaves are summed. Inside a
      `jit` the loss is traced once, or once for each shape and dtype of batch that it sees.

    Raises:
      TypeError: If `variant` is not a variant, or params are not floating-point arrays.
      ValueError: If `state` holds none or several variants, or an argument is out of its range.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2
      >>> sam = optax_sam.sam(rho=0.1)
      >>> tx = optax.chain(sam, optax.sgd(0.05))
      >>> params = jnp.array([1.0, 1.0])
      >>> opt_state = tx.init(params)
      >>> value, grads = optax_sam.sam_value_and_grad(loss, sam)(params, state=opt_state)
      >>> print(f"{value:.1f}", [f"{x:.3f}" for x in grads.clean], [f"{x:.3f}" for x in grads.perturbed])
      5.5 ['10.000', '1.000'] ['10.995', '1.010']
      >>> updates, opt_state = tx.update(grads, opt_state, params)
      >>> print([f"{x:.4f}" for x in optax.apply_updates(params, updates)])
      ['0.4502', '0.9495']

    References:
      Foret et al., `Sharpness-Aware Minimization <https://arxiv.org/abs/2010.01412>`_, ICLR 2021,
      section 4.1 for m-sharpness.
    """
    _check_functions(fun, variant, has_aux)
    _checks.choice("perturbation", perturbation, ("global", "local"))
    if perturbation == "local" and axis_name is None and num_shards is None:
        msg = (
            "`perturbation='local'` needs `axis_name=`, the axis of a pmap or shard_map over devices. "
            "Elsewhere write `num_shards=K, batch_argnums=...`."
        )
        raise ValueError(msg)
    cheaper = {"ascent_examples": ascent_examples, "ascent_dtype": ascent_dtype, "ascent_loss": ascent_loss}
    _check_ascent(fun, variant, cheaper, has_aux)
    params_at = _checks.positions("argnums", argnums)
    plan = _make_plan(
        num_shards, shard_mode, microbatch_size, ascent_examples, ascent_dtype, batch_argnums, params_at
    )
    is_comparable = all(option is None for option in cheaper.values())

    def value_and_grads(*args: Any, state: Any = None, loss_scale: Any = None, **kwargs: Any) -> Any:
        call = Call(
            args, kwargs, params_at, np.ndim(cast("Any", argnums)) == 0, plan.batch_at, has_aux, loss_scale
        )
        _check_call(fun, call, state, argnums, batch_argnums)
        _check_axis(axis_name)
        current, sam_state = _read_state(variant, state, call.params)
        params = varying(jax.tree.map(jnp.asarray, call.params), axis_name)
        inputs = (*args, *kwargs.values(), state, loss_scale)
        descend = TracedOnce(gradient_at(fun, call), *inputs)
        climb = descend if ascent_loss is None else TracedOnce(gradient_at(ascent_loss, call), *inputs)

        def evaluate(peers: Peers, batch: Sequence[Any]) -> Evaluation:
            """The variant's rule on the batch, or on one shard of it."""
            descent = plan.parts.descent(descend)
            ascent, examples = plan.parts.ascent(climb, batch)
            loss = Loss(
                params,
                lambda point, cotangent: descent(point, batch, cotangent),
                lambda point, cotangent: ascent(point, examples, cotangent),
                peers,
                measures=return_metrics or current.compares,
                climbs_apart=not is_comparable,
            )
            return checked_evaluation(current.evaluate(loss, sam_state))

        # A single shard on each device is what a local perturbation is.
        peers = Peers(axis_name, local=perturbation == "local" or num_shards is not None)
        if plan.num_shards > 1:

            def all_shards(one: Callable[..., Evaluation]) -> Evaluation:
                return evaluate_shards(one, call.batch, peers, plan.num_shards, plan.rounds)

            evaluation = in_loop(all_shards, evaluate, descend.is_traced or plan.rounds == 1)
        else:
            if num_shards is not None:
                batch_size(call.batch)  # Refuses what is no batch.
            evaluation = evaluate(peers, call.batch)
        grads = settle(evaluation, current, descend.precision)
        output = (evaluation.value, evaluation.aux) if has_aux else evaluation.value
        if return_metrics:
            return output, grads, _metrics(evaluation, grads, sam_state.rho, is_comparable)
        return output, grads

    return value_and_grads


def _check_functions(fun: Any, variant: Any, has_aux: bool) -> None:
    if not callable(fun):
        msg = f"`fun` must be the loss, a function, got {type(fun).__name__}."
        raise TypeError(msg)
    if isinstance(fun, CompositeLoss) and fun.has_aux != has_aux:
        msg = f"`has_aux` is {has_aux}, and that of the `CompositeLoss` is {fun.has_aux}: give both the same."
        raise ValueError(msg)
    if not isinstance(variant, SharpnessAwareTransformation):
        msg = (
            "`variant` must be the bare variant, such as `sam = optax_sam.sam(0.05)`, got "
            f"{type(variant).__name__}. A chain, and any other wrapper, no longer knows what to evaluate: "
            "pass `sam` here and `optax.chain(sam, optax.sgd(0.1))` to the training loop."
        )
        raise TypeError(msg)


def _check_ascent(
    fun: Any, variant: SharpnessAwareTransformation, cheaper: dict[str, Any], has_aux: bool
) -> None:
    """Raises if the ascent has another gradient than the variant needs, or a loss that cannot serve it."""
    asked = [name for name, value in cheaper.items() if value is not None]
    if asked and not variant.ascent_only:
        msg = (
            f"`{asked[0]}` changes the clean gradient, which is then good enough for an ascent only. "
            f"`{variant.made_by.name}` also descends along it, or evaluates no other: leave it out, or take "
            "a variant that uses the clean gradient for the ascent only, such as `sam` (its attribute "
            "`ascent_only` is true). If this holds for a variant of your own, write "
            "`sharpness_aware(..., ascent_only=True)`."
        )
        raise ValueError(msg)
    other = cheaper["ascent_loss"]
    if isinstance(fun, SharpestExamples):
        if other is None or isinstance(other, SharpestExamples):
            msg = (
                "`SharpestExamples` is a loss for the second gradient: at params no loss has risen yet. Give "
                "the first gradient all examples: `sam_value_and_grad(loss, variant, ascent_loss=loss.mean)`."
            )
            raise ValueError(msg)
        if variant.made_by.name == "gated":
            msg = (
                "`SharpestExamples` compares examples by what the perturbation does to them, and a gated "
                "variant has steps without one. Take the variant without its gate."
            )
            raise ValueError(msg)
    if other is not None:
        if not callable(other):
            msg = f"`ascent_loss` must be a loss, a function like `fun`, got {type(other).__name__}."
            raise TypeError(msg)
        _check_functions(other, variant, has_aux)


class _Plan(NamedTuple):
    """What the options about parts of the batch ask for.

    Attributes:
      num_shards: How many perturbations a device has.
      rounds: In how many rounds the shards run.
      parts: How a gradient is evaluated on a shard.
      batch_at: Positions of the batch arguments, empty if nothing is done to them.
    """

    num_shards: int = 1
    rounds: int = 1
    parts: Parts = Parts()
    batch_at: tuple[int, ...] = ()


def _make_plan(
    num_shards: int | None,
    shard_mode: str | int,
    microbatch_size: int | None,
    ascent_examples: int | float | None,
    ascent_dtype: Any,
    batch_argnums: int | Sequence[int] | None,
    params_at: Sequence[int],
) -> _Plan:
    sizes = {"num_shards": num_shards, "microbatch_size": microbatch_size, "ascent_examples": ascent_examples}
    for name, size in sizes.items():
        if size is None:
            continue
        if name == "ascent_examples" and isinstance(size, float):
            _checks.number(name, size, low=0.0, high=1.0, above=True)
        else:
            _checks.number(name, size, low=1, integer=True)
        if batch_argnums is None:
            msg = (
                f"`{name}={size}` needs `batch_argnums=`: which positional arguments of the loss are "
                "batches, such as `batch_argnums=1` for `loss(params, batch)`."
            )
            raise ValueError(msg)
    if isinstance(shard_mode, str):
        _checks.choice("shard_mode", shard_mode, ("vmap", "loop"))
        rounds = 1 if shard_mode == "vmap" else num_shards or 1
    else:
        _checks.number("shard_mode", shard_mode, low=1, integer=True)
        rounds = shard_mode
        if num_shards is not None and num_shards % rounds:
            msg = f"`shard_mode={rounds}` rounds do not divide `num_shards={num_shards}`."
            raise ValueError(msg)
    if ascent_dtype is not None:
        _checks.floating("ascent_dtype", ascent_dtype)
    parts = Parts(microbatch_size, ascent_examples, ascent_dtype)
    if all(size is None for size in sizes.values()) and (ascent_dtype is None or batch_argnums is None):
        return _Plan(parts=parts)
    batch_at = () if batch_argnums is None else _checks.positions("batch_argnums", batch_argnums)
    if not batch_at or set(batch_at) & set(params_at) or min(batch_at) < 0:
        msg = (
            "`batch_argnums` must name positional arguments other than params (`argnums`), "
            f"got {batch_argnums} with `argnums` {tuple(params_at)}."
        )
        raise ValueError(msg)
    return _Plan(num_shards or 1, rounds, parts, batch_at)


def _check_call(fun: Callable[..., Any], call: Call, state: Any, argnums: Any, batch_argnums: Any) -> None:
    if state is None:
        msg = "`state=` is missing: pass the optimizer's state by keyword, `state=opt_state`."
        raise TypeError(msg)
    count = len(call.args)
    if max(call.params_at, default=0) >= count or min(call.params_at, default=0) < -count:
        msg = f"`argnums` is {argnums}, but only {count} positional arguments were given."
        raise TypeError(msg)
    if max(call.batch_at, default=0) >= count:
        msg = (
            f"`batch_argnums` is {batch_argnums}, but only {count} positional arguments were given: "
            "pass the batch by position."
        )
        raise TypeError(msg)
    if isinstance(fun, CompositeLoss) and (count != 3 or call.kwargs):
        msg = (
            "A `CompositeLoss` takes three positional arguments, `(params, inputs, targets)`, got "
            f"{count} and the keywords {[*call.kwargs]}. Put several inputs into a tuple."
        )
        raise TypeError(msg)
    _checks.params(call.params)
    check_keywords(fun, call, state)


def check_keywords(fun: Callable[..., Any], call: Call, state: Any) -> None:
    """Raises if an argument of the loss has the name of a keyword here, and so would not get its value."""
    try:
        signature = inspect.signature(fun)
        given = signature.bind_partial(*call.args, **call.kwargs).arguments
    except (TypeError, ValueError):  # Wrong calls of the loss are its own to refuse.
        return
    if isinstance(fun, functools.partial):
        given = {**given, **fun.keywords}
    own = {name: x for name, x in signature.parameters.items() if name not in given}
    if "loss_scale" in own and call.loss_scale is not None:
        name, what = "loss_scale", "the factor of the loss"
    elif "state" in own and (own["state"].default is inspect.Parameter.empty or not holds_variant(state)):
        name, what = "state", "the optimizer's state"
    else:
        return
    msg = (
        f"The loss has an argument `{name}` of its own, and `{name}=` is {what} here, which the loss does "
        f"not get. Pass its own by position, or bind it: `functools.partial(loss, {name}=...)`."
    )
    raise TypeError(msg)


def _read_state(
    variant: SharpnessAwareTransformation, state: Any, params: Any
) -> tuple[SharpnessAwareTransformation, SAMState]:
    """The variant and its state, with what `optax.inject_hyperparams` holds in force."""
    sam_state = find_state(state, variant.made_by.name if variant.is_optimizer else "")
    injected = injected_arguments(state, (variant.rho_name, *variant.arguments))
    if injected and variant.remake is not None:
        variant = variant.remake(**injected)
    if variant.rho_name in injected:
        # A constructor may make its radius of the argument.
        given = variant.rho if variant.remake is not None else injected[variant.rho_name]
        sam_state = sam_state if callable(given) else sam_state._replace(rho=jnp.asarray(given))
    return variant, match_structure(sam_state, lambda: cast("SAMState", variant.init(params)))


def _metrics(evaluation: Evaluation, grads: SAMGradients, rho: jax.Array, is_comparable: bool) -> SAMMetrics:
    value, perturbed_value = _tree.upcast((evaluation.value, evaluation.perturbed_value))
    return SAMMetrics(
        loss=value,
        perturbed_loss=perturbed_value,
        sharpness=perturbed_value - value if is_comparable else _tree.unknown(value),
        clean_norm=_tree.norm(grads.clean),
        perturbed_norm=_tree.norm(grads.perturbed),
        cosine=_tree.cosine(grads.clean, grads.perturbed),
        perturbation_norm=evaluation.displacement,
        rho=rho,
    )


def _check_axis(axis_name: AxisName | None) -> None:
    if axis_name is None:
        return
    try:
        jax.lax.axis_index(axis_name)
    except NameError as error:
        msg = (
            f"`axis_name` is {axis_name!r}, but no such axis is bound here. Call the function inside "
            f"`jax.pmap(..., axis_name={axis_name!r})` or `jax.shard_map` over a mesh with that axis; under "
            "plain `jit` leave `axis_name` out."
        )
        raise ValueError(msg) from error
