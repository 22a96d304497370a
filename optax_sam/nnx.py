"""The door for Flax NNX: `sam_value_and_grad` for models that hold their own state."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp

from optax_sam import _checks, _value_and_grad
from optax_sam._variant import SharpnessAwareTransformation


def sam_value_and_grad(
    fun: Callable[..., Any],
    variant: SharpnessAwareTransformation,
    argnums: Any = 0,
    has_aux: bool = False,
    *,
    batch_argnums: int | Sequence[int] | None = None,
    **options: Any,
) -> Callable[..., Any]:
    """Like `flax.nnx.value_and_grad`, for a sharpness-aware variant.

    The loss takes NNX objects: the model, and perhaps an `nnx.Rngs`, metrics and the like, by position
    or by keyword. What the loss changes in them, such as the statistics of BatchNorm and the counters of
    random numbers, is afterwards as one ordinary pass would have left it. Both passes start from the
    same state, so that they draw the same dropout masks. Variables are all that is handed back, also new
    ones: plain Python attributes that the loss sets, variables that it deletes and modules that it makes
    are not.

    Args:
      fun: The loss: a function that returns a scalar, or a pair `(scalar, aux)`.
      variant: The bare variant, e.g. `optax_sam.sam(0.05)`; not the chain that contains it.
      argnums: Which positional argument holds the params, or which ones do: an integer, which stands
        for all `nnx.Param` in it (or for what the optimizer trains, where `state` is one), or an
        `nnx.DiffState(position, filter)`. With several, params are the tuple of their states.
      has_aux: Whether `fun` returns a pair.
      batch_argnums: Which positional arguments are batches; see `optax_sam.sam_value_and_grad`.
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
      TypeError: If an argument that is to be differentiated is no NNX object, or has no params.
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

    single = isinstance(argnums, int | nnx.DiffState)
    given = (argnums,) if single else tuple(argnums)
    positions = [x.argnum if isinstance(x, nnx.DiffState) else cast("int", x) for x in given]
    batches = (batch_argnums,) if isinstance(batch_argnums, int) else tuple(batch_argnums or ())
    if set(batches) & set(positions) or min((*batches, *positions), default=0) < 0:
        msg = (
            "`argnums` and `batch_argnums` must name different positional arguments, counted from 0, got "
            f"{argnums} and {batch_argnums}."
        )
        raise ValueError(msg)
    in_parts = any(options.get(name) is not None for name in ("num_shards", "microbatch_size"))

    def holds_state(arg: Any) -> bool:
        def is_object(x: Any) -> bool:
            return isinstance(x, nnx.Object | nnx.Variable)

        return any(is_object(x) for x in jax.tree.leaves(arg, is_leaf=is_object))

    def value_and_grads(*args: Any, state: Any = None, loss_scale: Any = None, **kwargs: Any) -> Any:
        default: Any = nnx.Param
        if isinstance(state, nnx.Optimizer):
            default, state = cast("Any", state).wrt, cast("Any", state).opt_state
        filters = {
            i: nnx.filterlib.to_predicate(x.filter if isinstance(x, nnx.DiffState) else default)
            for i, x in zip(positions, given, strict=True)
        }

        def is_param(path: Any, value: Any) -> bool:
            # A path begins with 0 for positional arguments, and goes on with the position.
            return path[0] == 0 and path[1] in filters and filters[path[1]](path[2:], value)

        # All objects are split at once: what two of them share stays shared.
        objects = (
            tuple(x if holds_state(x) else None for x in args),
            {name: x for name, x in kwargs.items() if holds_state(x)},
        )
        others = [None if holds_state(x) else x for x in args]
        keywords = {name: x for name, x in kwargs.items() if name not in objects[1]}
        graph, found, rest = nnx.split(objects, is_param, ...)
        for i in positions:
            if i >= len(args) or 0 not in found or i not in found[0]:
                got = type(args[i]).__name__ if i < len(args) else "nothing"
                msg = (
                    f"`argnums` is {argnums}: positional argument {i} must be an NNX object with variables "
                    f"to differentiate, got {got}. Params that are a plain pytree go through "
                    "`optax_sam.sam_value_and_grad`."
                )
                raise TypeError(msg)
        params = found[0][positions[0]] if single else tuple(found[0][i] for i in positions)

        def pure(params: Any, rest: Any, *others: Any, **keywords: Any) -> Any:
            by_position = dict(zip(positions, (params,) if single else params, strict=True))
            copies = nnx.merge(graph, nnx.State({0: by_position}), rest, copy=True)
            both = [y if x is None else x for x, y in zip(others, copies[0], strict=True)]
            output = fun(*both, **keywords, **copies[1])
            value, aux = _checks.value_and_aux(output) if has_aux else (output, None)
            after = nnx.state(copies, nnx.Not(is_param))
            return value, (aux, _changes(nnx, after, rest) if in_parts else after)

        output, grads, *metrics = _value_and_grad.sam_value_and_grad(
            pure,
            variant,
            has_aux=True,
            batch_argnums=None if batch_argnums is None else tuple(i + 2 for i in batches),
            **options,
        )(params, rest, *others, state=state, loss_scale=loss_scale, **keywords)
        value, (aux, after) = output
        nnx.update(objects, _changed(nnx, after, rest) if in_parts else after)
        # New variables: NNX would drop the perturbed half of a pair whose halves are the same object.
        grads = jax.tree.map(lambda x: x, grads)
        return ((value, aux) if has_aux else value), grads, *metrics

    return value_and_grads


def _changes(nnx: Any, after: Any, before: Any) -> Any:
    """What a part of the batch changed, such that floats can be averaged and integers summed."""
    counts, keys, variables = nnx.split_state(after, nnx.RngCount, nnx.RngKey, ...)
    del keys  # A pass leaves them as they are.
    for path, x in jax.tree_util.tree_leaves_with_path(variables):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            msg = (
                "With `num_shards` or `microbatch_size` the loss may hold floating-point variables (averaged "
                f"over the parts) and random counters, got dtype {x.dtype} at {jax.tree_util.keystr(path)}. "
                "Return what a metric needs as aux, and update the metric outside of the loss."
            )
            raise TypeError(msg)
    moved = jax.tree.map(jnp.subtract, counts, nnx.filter_state(before, nnx.RngCount))
    return variables, moved, jnp.ones((), jnp.uint32)


def _changed(nnx: Any, changes: Any, before: Any) -> Any:
    """The state after one pass, from the changes of all parts."""
    variables, moved, parts = changes
    counts = nnx.filter_state(before, nnx.RngCount)
    return nnx.merge_state(variables, jax.tree.map(lambda old, m: old + m // parts, counts, moved))
