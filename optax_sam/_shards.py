"""Parts of a batch: shards, each with a perturbation of its own, and microbatches, which save memory."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam import _checks, _tree
from optax_sam._objective import Evaluation, Objective, ValueAndGrad, varying
from optax_sam._transformation import Evaluate, SAMState

GradientAt = Callable[[optax.Params, Sequence[Any]], tuple[tuple[jax.Array, Any], optax.Updates]]
"""`(params, batch) -> ((value, aux), gradient)`, where batch holds the batch arguments in order."""


_PLACE = "optax_sam.shards"  # The name under which a shard finds its place in a round.


class Split(NamedTuple):
    """How the batch is taken apart.

    Attributes:
      num_shards: How many perturbations, or None for one of the whole batch.
      rounds: In how many rounds the shards run.
      microbatch_size: Examples at once in one gradient, or None for all.
      ascent_examples: How many examples, or which part of them, an ascent gradient sees; None for all.
      ascent_dtype: In which dtype an ascent gradient is computed; None for that of params.
      positions: Positions of the batch arguments, empty if nothing is done to them.
    """

    num_shards: int | None = None
    rounds: int = 1
    microbatch_size: int | None = None
    ascent_examples: int | float | None = None
    ascent_dtype: Any = None
    positions: tuple[int, ...] = ()


def make_split(
    num_shards: int | None,
    shard_mode: str | int,
    microbatch_size: int | None,
    ascent_examples: int | float | None,
    ascent_dtype: Any,
    batch_argnums: int | Sequence[int] | None,
    argnums: Sequence[int],
) -> Split:
    """The split that the arguments of `sam_value_and_grad` ask for, or an error."""
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
    asked = (num_shards, microbatch_size, ascent_examples)
    if all(x is None for x in asked) and (ascent_dtype is None or batch_argnums is None):
        return Split(ascent_dtype=ascent_dtype)
    positions = () if batch_argnums is None else _checks.positions("batch_argnums", batch_argnums)
    if not positions or set(positions) & set(argnums) or min(positions) < 0:
        msg = (
            "`batch_argnums` must name positional arguments other than params (`argnums`), "
            f"got {batch_argnums} with `argnums` {tuple(argnums)}."
        )
        raise ValueError(msg)
    return Split(num_shards, rounds, microbatch_size, ascent_examples, ascent_dtype, positions)


def _batch_size(batch: Sequence[Any]) -> int:
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


def _is_mean(path: Any, leaf: Any) -> bool:
    """Whether a leaf of aux is averaged over the parts (floats) or summed (integers)."""
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


def _zeros(like: Any) -> jax.Array:
    """What a sum begins with: many terms in half precision would lose the last of them."""
    if jnp.issubdtype(like.dtype, jnp.inexact):
        return jnp.zeros_like(like, jnp.promote_types(like.dtype, jnp.float32))
    return jnp.zeros_like(like)


def _sum_dtype(like: Any) -> Any:
    """That of a sum over shards: of float16, whose range it might leave, float32."""
    return jnp.float32 if like.dtype == jnp.float16 else like.dtype


def _accumulated(gradient_at: GradientAt, size: int) -> GradientAt:
    """The gradient function in the memory of a microbatch."""

    def precise(params: optax.Params, batch: Sequence[Any]) -> Any:
        (value, aux), gradient = gradient_at(params, batch)
        return (_tree.upcast(value), aux), _tree.upcast(gradient)

    def accumulated(params: optax.Params, batch: Sequence[Any]) -> Any:
        batch = tuple(batch)
        total = _batch_size(batch)
        if total % size:
            msg = f"`microbatch_size={size}` does not divide the batch of {total} examples."
            raise ValueError(msg)
        count = total // size
        # Every count-th example: a batch that is sharded over devices stays so. Optax is handed the
        # numbers of the microbatches, for it cannot cut an explicitly sharded batch with every JAX.
        parts = jax.tree.map(lambda x: jnp.reshape(x, (size, count, *np.shape(x)[1:])), batch)

        def part(number: jax.Array) -> Any:
            def take(x: jax.Array) -> jax.Array:
                return jax.lax.dynamic_index_in_dim(x, number[0], axis=1, keepdims=False)

            return jax.tree.map(take, parts)

        def of_part(number: jax.Array, params: optax.Params) -> Any:
            return precise(params, part(number))

        def as_it_comes(number: jax.Array) -> Any:
            (value, aux), gradient = gradient_at(params, part(number))
            jax.tree_util.tree_map_with_path(_is_mean, aux)  # Refuses what has no shape, such as a string.
            return (value, aux), gradient

        numbers = jnp.arange(count)
        (_, aux), like = jax.eval_shape(as_it_comes, numbers[:1])
        mean, added = optax.microbatching.AccumulationType.MEAN, optax.microbatching.AccumulationType.SUM
        rules = jax.tree_util.tree_map_with_path(lambda p, x: mean if _is_mean(p, x) else added, aux)
        run = optax.microbatch(of_part, argnums=0, microbatch_size=1, accumulator=((mean, rules), mean))
        (value, aux), gradient = run(numbers, params)
        return (value, aux), _tree.cast_like(gradient, like)

    return accumulated


def _in_dtype(gradient_at: GradientAt, dtype: Any) -> GradientAt:
    """The gradient function computed in another dtype; what it returns is in that of params again."""

    def is_floating(x: Any) -> bool:
        return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)

    def cast(params: optax.Params, batch: Sequence[Any]) -> Any:
        given = jax.tree.map(lambda x: jnp.asarray(x, dtype) if is_floating(x) else x, (params, batch))
        output, gradient = gradient_at(*given)
        own = jnp.result_type(*jax.tree.leaves(params))

        def back(x: Any) -> Any:
            # aux may also hold strings and the like.
            return x.astype(own) if getattr(x, "dtype", None) == dtype else x

        return jax.tree.map(back, output), _tree.cast_like(gradient, params)

    return cast


def _ascent(split: Split, gradient_at: GradientAt, batch: Sequence[Any]) -> ValueAndGrad | None:
    """The gradient function of the ascent, where it has one of its own."""
    if split.ascent_examples is None and split.ascent_dtype is None:
        return None
    if split.ascent_examples is not None:
        total, wanted = _batch_size(batch), split.ascent_examples
        count = max(1, round(wanted * total)) if isinstance(wanted, float) else wanted
        if count > total:
            msg = f"`ascent_examples={wanted}` is more than the {total} examples of the batch, or of a shard."
            raise ValueError(msg)
        size = split.microbatch_size
        if size is not None and count > size and count % size:
            msg = f"`microbatch_size={size}` does not divide the {count} examples of the ascent."
            raise ValueError(msg)
        batch = jax.tree.map(lambda x: x[:count], batch)
    if split.ascent_dtype is not None:
        gradient_at = _in_dtype(gradient_at, split.ascent_dtype)
    if split.microbatch_size is not None and _batch_size(batch) > split.microbatch_size:
        gradient_at = _accumulated(gradient_at, split.microbatch_size)
    return lambda w: gradient_at(w, batch)


def evaluate(
    split: Split,
    rule: Evaluate,
    gradient_at: GradientAt,
    objective: Objective,
    params: optax.Params,
    state: SAMState,
    batch: Sequence[Any],
) -> tuple[Evaluation, Any]:
    """Runs the rule on the batch, or on each shard of it, and averages.

    Args:
      split: How the batch is taken apart.
      rule: The variant's evaluation rule.
      gradient_at: The user's loss and its gradient.
      objective: Everything about the objective but its gradient function.
      params: The params.
      state: The variant's state.
      batch: The batch arguments.

    Returns:
      The evaluation of the whole batch, and aux.
    """
    descent_at = gradient_at
    if split.microbatch_size is not None:
        descent_at = _accumulated(gradient_at, split.microbatch_size)

    def run(objective: Objective, batch: Sequence[Any]) -> tuple[Evaluation, Any]:
        ascent = _ascent(split, gradient_at, batch)
        return rule(objective.on(lambda w: descent_at(w, batch), ascent), params, state)

    if split.num_shards is None:
        return run(objective, batch)

    total, count, rounds = _batch_size(batch), split.num_shards, split.rounds
    if total % count:
        msg = f"`num_shards={count}` does not divide the batch of {total} examples."
        raise ValueError(msg)
    together = count // rounds

    def cut(x: Any) -> jax.Array:
        # Shards are contiguous; those of one round lie `rounds` apart, so that a batch that is
        # sharded over `together` devices keeps one shard of each round on each of them.
        return jnp.reshape(x, (together, rounds, total // count, *np.shape(x)[1:]))

    shards = jax.tree.map(cut, tuple(batch))

    def one_round(number: Any) -> tuple[Evaluation, Any]:
        """The evaluations of the shards of a round, side by side where it has several."""

        def one(shard: Sequence[Any]) -> tuple[Evaluation, Any]:
            place = 0 if together == 1 else jax.lax.axis_index(_PLACE)
            # The average over devices is taken once, of the averages over shards.
            evaluation, aux = run(objective.on_shard(place * rounds + number, count), shard)
            jax.tree_util.tree_map_with_path(_is_mean, aux)  # Before a sum makes integers of booleans.
            return evaluation, jax.tree.map(jnp.asarray, aux)  # Python's numbers are numbers too.

        # Not as the operand of the scan below, which would need a copy of the batch.
        of_round = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, number, axis=1, keepdims=False), shards
        )
        if together == 1:
            return one(jax.tree.map(lambda x: x[0], of_round))
        return jax.vmap(one, axis_name=_PLACE)(of_round)

    if rounds == 1:
        sums = like = one_round(0)
    else:
        like = jax.eval_shape(one_round, 0)
        zeros = varying(jax.tree.map(_zeros, like), objective.axis_name)

        def step(sums: Any, number: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, one_round(number)), None

        sums, _ = jax.lax.scan(step, zeros, jnp.arange(rounds))
        sums = jax.tree.map(lambda x, y: x.astype(_sum_dtype(y)), sums, like)
    if together > 1:
        # After the rounds: what lies on different devices is then sent once and not in every round.
        sums = jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=_sum_dtype(x)), sums)

    def mean(path: Any, total: Any, like: Any) -> Any:
        return (total / count).astype(like.dtype) if _is_mean(path, like) else total

    evaluation, aux = jax.tree_util.tree_map_with_path(mean, sums, like)
    return objective.average(evaluation), aux
