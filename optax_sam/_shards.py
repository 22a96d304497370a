"""An evaluation rule on each shard of the batch, and the average: a perturbation for each shard."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_sam._gradient import batch_size, is_mean
from optax_sam._loss import Evaluation, Peers, varying

SHARD_AXIS = "optax_sam.shards"  # The axis on which the shards of a round lie side by side.


def _zeros(like: Any) -> jax.Array:
    """What a sum begins with: many terms in half precision would lose the last of them."""
    if jnp.issubdtype(like.dtype, jnp.inexact):
        return jnp.zeros_like(like, jnp.promote_types(like.dtype, jnp.float32))
    return jnp.zeros_like(like, _sum_dtype(like))


def _sum_dtype(like: Any) -> Any:
    """That of a sum over shards, which might leave the range of float16 and of integers of 8 or 16 bits."""
    if jnp.issubdtype(like.dtype, jnp.integer):
        is_signed = jnp.issubdtype(like.dtype, jnp.signedinteger)
        return jnp.promote_types(like.dtype, jnp.int32 if is_signed else jnp.uint32)
    return jnp.float32 if like.dtype == jnp.float16 else like.dtype


def _explicit_mesh(batch: Sequence[Any], num_shards: int, together: int) -> Any:
    """The mesh over which the types of the batch say that it is spread, or None.

    A `vmap` over such an array needs its mesh, which is set nowhere if no `jax.set_mesh` stands around.
    """
    for leaf in jax.tree.leaves(batch):
        sharding: Any = jax.typeof(leaf).sharding
        axes = sharding.spec[0] if sharding.spec else None
        if axes is None:
            continue
        names = axes if isinstance(axes, tuple) else (axes,)
        devices = int(np.prod([sharding.mesh.shape[name] for name in names]))
        if together % devices:
            advice = (
                f"make `num_shards` a multiple of {devices}"
                if num_shards % devices
                else f"write `shard_mode='vmap'`, or a divisor of {num_shards // devices} as number of rounds"
            )
            msg = (
                f"The batch is spread over {devices} devices, and {together} of its {num_shards} shards run "
                f"at once, which is no multiple of {devices}: {advice}."
            )
            raise ValueError(msg)
        return None if jax.sharding.get_abstract_mesh().shape_tuple else sharding.mesh
    return None


def evaluate_shards(
    evaluate: Callable[[Peers, Sequence[Any]], Evaluation],
    batch: Sequence[Any],
    peers: Peers,
    num_shards: int,
    rounds: int,
) -> Evaluation:
    """Evaluates each shard of the batch, and averages over shards and devices.

    Args:
      evaluate: `(peers, shard) -> evaluation`, the rule on one shard.
      batch: The batch arguments.
      peers: Those of the whole batch.
      num_shards: How many shards, each with a perturbation of its own; > 1.
      rounds: In how many rounds they run, `num_shards / rounds` at once.

    Returns:
      The evaluation of the whole batch. Of aux, floats are averaged and integers summed, in at least 32 bits.

    Raises:
      ValueError: If the batch cannot be split so.
    """
    total = batch_size(batch)
    if total % num_shards:
        msg = f"`num_shards={num_shards}` does not divide the batch of {total} examples."
        raise ValueError(msg)
    together = num_shards // rounds
    mesh = _explicit_mesh(batch, num_shards, together)
    own = Peers(peers.axis, True, 0, num_shards, SHARD_AXIS if rounds == 1 else None)

    def cut(x: Any) -> jax.Array:
        # Shards are contiguous. Those of one round lie `rounds` apart, so that a batch that is
        # sharded over `together` devices keeps one shard of each round on each of them.
        return jnp.reshape(x, (together, rounds, total // num_shards, *np.shape(x)[1:]))

    shards = jax.tree.map(cut, tuple(batch))

    def one_round(number: Any) -> Evaluation:
        """The evaluations of the shards of a round, side by side where it has several."""

        def one(shard: Sequence[Any]) -> Evaluation:
            place = 0 if together == 1 else jax.lax.axis_index(SHARD_AXIS)
            evaluation = evaluate(own._replace(shard=place * rounds + number), shard)
            jax.tree_util.tree_map_with_path(
                is_mean, evaluation.aux
            )  # Before a sum makes integers of booleans.
            return evaluation._replace(aux=jax.tree.map(jnp.asarray, evaluation.aux))

        # Not as the operand of the scan below, which would need a copy of the batch.
        of_round = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, number, axis=1, keepdims=False), shards
        )
        if together == 1:
            return one(jax.tree.map(lambda x: x[0], of_round))
        with contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh):
            return jax.vmap(one, axis_name=SHARD_AXIS)(of_round)

    if rounds == 1:
        sums = like = one_round(0)
    else:
        like = jax.eval_shape(one_round, 0)
        zeros = varying(jax.tree.map(_zeros, like), peers.axis)

        def step(sums: Any, number: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, one_round(number)), None

        sums, _ = jax.lax.scan(step, zeros, jnp.arange(rounds))
        sums = jax.tree.map(lambda x, y: x.astype(_sum_dtype(y)), sums, like)
    if together > 1:
        # After the rounds: what lies on different devices is then sent once and not in every round.
        sums = jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=_sum_dtype(x)), sums)

    def mean(path: Any, total: Any, like: Any) -> Any:
        return (total / num_shards).astype(like.dtype) if is_mean(path, like) else total

    evaluation = jax.tree_util.tree_map_with_path(mean, sums, like)
    if peers.axis is None:
        return evaluation
    # One average over devices, of the averages over shards. aux stays as the device has it.
    return jax.lax.pmean(evaluation._replace(aux=None), peers.axis)._replace(aux=evaluation.aux)
