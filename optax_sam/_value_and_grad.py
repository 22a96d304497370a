"""`sam_value_and_grad`: evaluates what a variant needs, as `jax.value_and_grad` evaluates a gradient."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from optax_sam import _checks, _shards, _tree
from optax_sam._objective import AxisName, Evaluation, Objective, varying
from optax_sam._transformation import SAMState, SharpnessAwareTransformation, find_state

_ARRAY_TYPES = jax.Array | np.ndarray | np.generic


class SAMMetrics(NamedTuple):
    """What a run should log about its sharpness-aware steps: scalars in float32 or better.

    Attributes:
      loss: The clean loss, with `ascent_examples` of these; of a variant that evaluates a single
        gradient, the loss where it did.
      perturbed_loss: The loss at the perturbed point; NaN where only one point was visited: by a variant
        of a single gradient, and in the steps in which LookSAM reuses its correction.
      sharpness: Their difference, the estimate of sharpness that comes for free; NaN likewise, and with
        `ascent_examples`, as the two are then of different examples (`numpy.nanmean` averages what is
        known).
      clean_norm: Norm of the clean gradient.
      perturbed_norm: Norm of the perturbed gradient.
      cosine: Cosine of the angle between the two, of different examples with `ascent_examples`; 1 where
        one gradient stands for both.
      perturbation_norm: Norm of the perturbation that was really applied: below rho where rounding to
        the dtype of params swallowed some of it, 0 in a step that was not perturbed. The mean over
        shards where each has its own.
      rho: The radius in force.
    """

    loss: jax.Array
    perturbed_loss: jax.Array
    sharpness: jax.Array
    clean_norm: jax.Array
    perturbed_norm: jax.Array
    cosine: jax.Array
    perturbation_norm: jax.Array
    rho: jax.Array


def _metrics(evaluation: Evaluation, rho: jax.Array, same_examples: bool) -> SAMMetrics:
    clean, perturbed, _ = evaluation.gradients
    value, perturbed_value = _tree.upcast((evaluation.value, evaluation.perturbed_value))
    return SAMMetrics(
        loss=value,
        perturbed_loss=perturbed_value,
        sharpness=perturbed_value - value if same_examples else jnp.full_like(value, jnp.nan),
        clean_norm=_tree.norm(clean),
        perturbed_norm=_tree.norm(perturbed),
        cosine=_tree.cosine(clean, perturbed),
        perturbation_norm=evaluation.displacement,
        rho=rho,
    )


@jax.tree_util.register_static
class _Constant:
    """What `jit` would not return, a string in aux for example, as a part of the structure of its output."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _is_traced(tree: Any) -> bool:
    try:
        leaves = jax.tree.leaves(tree)
    except ValueError:  # A dict whose keys have no order: `jit` would have refused it.
        return False
    return any(isinstance(leaf, Tracer) for leaf in leaves)


def _trace_once(function: Callable[..., Any], *trees: Any) -> Callable[..., Any]:
    """The function, such that all calls of it within one trace share one trace of the user's loss.

    Outside of a trace every call runs as it stands, operation by operation.
    """
    if not any(map(_is_traced, trees)):
        return function

    def arrays_only(*args: Any) -> Any:
        return jax.tree.map(lambda x: x if isinstance(x, _ARRAY_TYPES) else _Constant(x), function(*args))

    traced = jax.jit(arrays_only, inline=True)

    def is_constant(x: Any) -> bool:
        return isinstance(x, _Constant)

    def once(*args: Any) -> Any:
        return jax.tree.map(lambda x: x.value if is_constant(x) else x, traced(*args), is_leaf=is_constant)

    return once


def sam_value_and_grad(
    fun: Callable[..., Any],
    variant: SharpnessAwareTransformation,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    return_metrics: bool = False,
    axis_name: AxisName | None = None,
    perturbation: str = "global",
    num_shards: int | None = None,
    shard_mode: str | int = "vmap",
    microbatch_size: int | None = None,
    ascent_examples: int | float | None = None,
    ascent_dtype: Any = None,
    batch_argnums: int | Sequence[int] | None = None,
) -> Callable[..., Any]:
    r"""Like `jax.value_and_grad`, for a sharpness-aware variant.

    Args:
      fun: The loss: a function that returns a scalar, or a pair `(scalar, aux)`.
      variant: The bare variant, e.g. `optax_sam.sam(0.05)`; not the chain that contains it.
      argnums: Which positional argument holds the params, or which ones do. With several, params are
        their tuple, and the optimizer's state must have been made from that tuple.
      has_aux: Whether `fun` returns a pair.
      return_metrics: Whether to return `SAMMetrics` as a third output.
      axis_name: Inside `jax.pmap` or `jax.shard_map`, the name of the axis (or axes) over which the
        batch is spread. Value, gradients and metrics come back averaged over it, aux as the
        device has it.
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
        costs 1 + n / B gradients. For variants whose clean gradient serves the ascent alone (`sam`,
        `asam`, `gcsam`, `async_sam` and your own with `ascent_only=True`); others are refused.
      ascent_dtype: The dtype in which the ascent gradient is computed, such as `jnp.bfloat16`: params and
        floating-point batch arguments, where `batch_argnums` names them, are cast to it, and all that
        comes out in it to the dtype of params. For the same variants.
      batch_argnums: Which positional arguments are batches: pytrees of arrays whose first axis counts
        examples. Needed for `num_shards`, `microbatch_size` and `ascent_examples`; the loss must be a
        mean over examples.

    Returns:
      A function `(*args, state, loss_scale=None, **kwargs)` that takes the arguments of `fun`, the
      optimizer's state by keyword, and perhaps a factor by which the loss is multiplied while it is
      differentiated (for half precision) and which is divided out again. It returns `(value, grads)`
      or `((value, aux), grads)`, and metrics after that; `grads` are `SAMGradients` in the shapes of
      params. Value and aux are of the clean pass; the perturbed pass sees the same arguments and its
      aux is dropped. With `ascent_examples` or `ascent_dtype` the clean pass is the ascent's: value, aux
      and `grads.clean` are of those examples in that precision. With shards or microbatches the
      floating-point leaves of aux are averaged and its integer leaves are summed. Inside a `jit` the loss
      is traced once, or once for each shape and dtype of batch that it sees.

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
    if not callable(fun):
        msg = f"`fun` must be the loss, a function, got {type(fun).__name__}."
        raise TypeError(msg)
    if not isinstance(cast("Any", variant), SharpnessAwareTransformation):
        msg = (
            "`variant` must be the bare variant, such as `sam = optax_sam.sam(0.05)`, got "
            f"{type(variant).__name__}. A chain, and any other wrapper, no longer knows what to evaluate: "
            "pass `sam` here and `optax.chain(sam, optax.sgd(0.1))` to the training loop."
        )
        raise TypeError(msg)
    _checks.choice("perturbation", perturbation, ("global", "local"))
    if perturbation == "local" and axis_name is None and num_shards is None:
        msg = (
            "`perturbation='local'` needs `axis_name=`, the axis of a pmap or shard_map over devices. "
            "Elsewhere write `num_shards=K, batch_argnums=...`."
        )
        raise ValueError(msg)
    positions = _checks.positions("argnums", argnums)
    is_single = np.ndim(cast("Any", argnums)) == 0
    if not variant.ascent_only and not (ascent_examples is None and ascent_dtype is None):
        msg = (
            "`ascent_examples` and `ascent_dtype` make the clean gradient a cheap one, good enough for an "
            "ascent. This variant descends along it, or evaluates no other: leave them out, or take a "
            "variant whose clean gradient serves the ascent alone (`sam`, `asam`, `gcsam`, `async_sam`). If "
            "that is so for a variant of your own, write `sharpness_aware(..., ascent_only=True)`."
        )
        raise ValueError(msg)
    split = _shards.make_split(
        num_shards, shard_mode, microbatch_size, ascent_examples, ascent_dtype, batch_argnums, positions
    )

    def value_and_grads(*args: Any, state: Any = None, loss_scale: Any = None, **kwargs: Any) -> Any:
        if state is None:
            msg = "`state=` is missing: pass the optimizer's state by keyword, `state=opt_state`."
            raise TypeError(msg)
        sam_state = find_state(state, variant.radius)
        if max(positions, default=0) >= len(args) or min(positions, default=0) < -len(args):
            msg = f"`argnums` is {argnums}, but only {len(args)} positional arguments were given."
            raise TypeError(msg)
        if max(split.positions, default=0) >= len(args):
            msg = (
                f"`batch_argnums` is {batch_argnums}, but only {len(args)} positional arguments were given: "
                "pass the batch by position."
            )
            raise TypeError(msg)
        raw_params = args[positions[0]] if is_single else tuple(args[i] for i in positions)
        _checks.params(raw_params)
        _check_axis(axis_name)
        sam_state = _fit(sam_state, jax.eval_shape(variant.init, raw_params))
        params = varying(jax.tree.map(jnp.asarray, raw_params), axis_name)

        def loss_and_grad(params: optax.Params, batch: Sequence[Any]) -> Any:
            """One gradient, at any params and on any part of the batch."""

            def loss(params: optax.Params) -> tuple[jax.Array, Any]:
                filled = list(args)
                for i, batch_argument in zip(split.positions, batch, strict=True):
                    filled[i] = batch_argument
                for i, one in zip(positions, (params,) if is_single else cast("Any", params), strict=True):
                    filled[i] = one
                output: Any = fun(*filled, **kwargs)
                value, aux = _checks.value_and_aux(output) if has_aux else (output, None)
                if isinstance(value, float | int):
                    value = jnp.asarray(value)
                return (value if loss_scale is None else value * loss_scale), (value, aux)

            (_, output), gradient = jax.value_and_grad(loss, has_aux=True)(params)
            if loss_scale is not None:
                gradient = jax.tree.map(lambda g: g / loss_scale, _tree.upcast(gradient))
            return output, gradient

        evaluation, aux = _shards.evaluate(
            split,
            variant.evaluate,
            _trace_once(loss_and_grad, *args, *kwargs.values(), state, loss_scale),
            Objective(
                axis_name=axis_name,
                share_ascent=axis_name is not None and perturbation == "global",
                sharded_over=axis_name,
                measure=return_metrics,
            ),
            params,
            sam_state,
            [args[i] for i in split.positions],
        )
        output = (evaluation.value, aux) if has_aux else evaluation.value
        if return_metrics:
            metrics = _metrics(evaluation, sam_state.rho, same_examples=ascent_examples is None)
            return output, evaluation.gradients, metrics
        return output, evaluation.gradients

    return value_and_grads


def _fit(state: SAMState, like: SAMState) -> SAMState:
    """The state in the structure that the variant gave it, or an error if it is not this variant's."""
    leaves, structure = jax.tree.flatten(like)
    own = jax.tree.leaves(state)
    if len(own) != len(leaves):
        if len(own) < len(leaves) and _has_holes(state):
            return state  # Some params are masked out, and nothing is remembered of them.
        got, right = f"{len(own)} arrays", f"{len(leaves)}"
    else:
        shapes = [(np.shape(x), np.shape(y)) for x, y in zip(own, leaves, strict=True)]
        wrong = [pair for pair in shapes if pair[0] != pair[1]]
        if not wrong:
            # `flax.nnx.Optimizer` boxes every array of its state: these are the same leaves, unboxed.
            return jax.tree.unflatten(structure, own)
        got, right = f"an array of shape {wrong[0][0]}", f"{wrong[0][1]}"
    msg = (
        f"`state` does not fit the variant and the params: it holds {got}, where `variant.init(params)` "
        f"makes {right}. Make it by the `init` of an optimizer with this variant, from the same params; "
        "inside `jax.shard_map` pass both whole (`in_specs=P()`)."
    )
    raise ValueError(msg)


def _has_holes(state: SAMState) -> bool:
    """Whether `optax.masked` or `optax.partition` left something out."""

    def is_hole(x: Any) -> bool:
        return isinstance(x, optax.MaskedNode)

    return any(is_hole(x) for x in jax.tree.leaves(state, is_leaf=is_hole))


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
