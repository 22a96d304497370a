"""Tree arithmetic that `optax.tree` lacks.

Accumulated in float32 or better, without overflow or underflow, and right on sharded leaves.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

_SMALL = 4096  # Entries of a leaf, sixteen kilobytes.


def branch(predicate: jax.Array, if_true: Callable[[], Any], if_false: Callable[[], Any]) -> Any:
    """`jax.lax.cond`, but outside of a trace, where that would compile anew in every call, a plain `if`."""
    if isinstance(predicate, Tracer):
        return jax.lax.cond(predicate, if_true, if_false)
    return if_true() if predicate else if_false()


def upcast(tree: Any) -> Any:
    """The tree with every leaf in float32 or better."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32)), tree)


def zeros_like(tree: Any) -> Any:
    """Zeros in the shapes of the tree, in float32 or better: what a variant remembers starts so."""
    return optax.tree.zeros_like(upcast(tree))


def cast_like(tree: Any, like: Any) -> Any:
    """The tree in the dtypes of `like`, leaf by leaf."""
    return jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), tree, like)


def _total(terms: Sequence[jax.Array]) -> jax.Array:
    return sum(terms[1:], start=terms[0]) if terms else jnp.zeros((), jnp.float32)


def _largest(leaves: Sequence[jax.Array]) -> jax.Array:
    largest = jnp.zeros((), jnp.float32)
    for x in leaves:
        # `initial`: an empty leaf has no largest entry.
        largest = jnp.maximum(largest, jnp.max(jnp.abs(x), initial=0.0))
    return largest


def root(total: jax.Array, ord: float = 2.0) -> jax.Array:
    """The `ord`-th root of numbers >= 0, with derivative 0 at zero for those who differentiate a step."""
    is_zero = total == 0.0
    safe = jax.lax.select(is_zero, jnp.ones_like(total), total)
    safe = jnp.sqrt(safe) if ord == 2.0 else safe ** (1.0 / ord)
    return jax.lax.select(is_zero, jnp.zeros_like(total), safe)


def _sum_of_squares(leaves: Sequence[jax.Array]) -> jax.Array:
    return _total([jnp.sum(jnp.square(x)) for x in leaves])


def _scaled_squares(tree: Any) -> tuple[jax.Array, jax.Array]:
    """The sum of the squares of the tree times a power of two, and that power.

    One pass over memory, with the power 1, where the plain sum is in the range in which float arithmetic is
    accurate; else two. Powers of two are exact, and these bring all that is out of that range into it.
    """
    # Without the barrier XLA puts off the gradients of biases until they are gathered, and keeps what they
    # are computed from until then.
    (leaves,) = _bundles(jax.lax.optimization_barrier(tree))
    squares = _sum_of_squares(leaves)
    info = jnp.finfo(squares.dtype)
    # Below `smallest` the squares of single entries may have been flushed to zero.
    smallest = float(info.tiny) / float(info.eps) ** 2
    in_range = (squares >= smallest) & (squares <= float(info.max))
    up, down = 2.0 ** (5 * info.maxexp // 8), 2.0 ** (-3 * info.maxexp // 4)
    # Not a `where` of constants: JAX 0.8 cannot `vmap` that over an explicitly sharded axis.
    is_low = (squares < 1.0).astype(info.dtype)
    scale = jnp.where(in_range, jnp.ones_like(squares), is_low * up + (1.0 - is_low) * down)
    return branch(in_range, lambda: squares, lambda: _sum_of_squares([x * scale for x in leaves])), scale


def _is_small(x: jax.Array) -> bool:
    # In explicit sharding mode the type tells how a leaf is spread, and such leaves do not concatenate.
    return x.size <= _SMALL and not any(jax.typeof(x).sharding.spec)


def _bundles(*trees: Any) -> list[list[jax.Array]]:
    """The leaves of each tree for a reduction over all: of one dtype, and the small ones as one vector.

    A reduction over a bias costs as much to compile, and to start, as one over a matrix.
    """
    columns = [jax.tree.leaves(upcast(tree)) for tree in trees]
    # Of one dtype: the square of a float32 may leave the range of float32 beside a leaf of float64.
    dtype = jnp.result_type(jnp.float32, *(x for column in columns for x in column))
    is_small = [all(map(_is_small, row)) for row in zip(*columns, strict=True)]

    def bundle(column: Sequence[jax.Array]) -> list[jax.Array]:
        leaves = [(x.astype(dtype), small) for x, small in zip(column, is_small, strict=True)]
        rest = [x.ravel() for x, small in leaves if small]
        missing = _SMALL - sum(x.size for x in rest)
        if 0 < missing <= _SMALL // 2:
            # XLA for CPUs has a library for sums of so many, and for fewer compiles three kernels.
            rest.append(jnp.zeros(missing, dtype))
        return [x for x, small in leaves if not small] + ([jnp.concatenate(rest)] if rest else [])

    return [bundle(column) for column in columns]


def norm(tree: Any, ord: float = 2.0) -> jax.Array:
    """The global `ord`-norm of all entries of the tree; NaN or infinite where an entry is.

    The 2-norm costs one pass over memory: only where the plain sum of squares leaves the range in
    which float arithmetic is accurate does a second, rescaled pass run.
    """
    if ord == 2.0:
        squares, scale = _scaled_squares(tree)
        return root(squares) / scale
    (leaves,) = _bundles(tree)
    largest = _largest(leaves)
    if ord == jnp.inf:
        return largest
    usable = (largest > 0.0) & jnp.isfinite(largest)
    scale = jnp.where(usable, largest, jnp.ones_like(largest))
    return scale * root(_total([jnp.sum(jnp.abs(x / scale) ** ord) for x in leaves]), ord)


def dot(a: Any, b: Any) -> jax.Array:
    """The inner product of two trees. Unlike `optax.tree.vdot` it takes sharded leaves."""
    return _total([jnp.sum(x * y) for x, y in zip(*_bundles(a, b), strict=True)])


def rescale(tree: Any, radius: Any, length: jax.Array) -> Any:
    """The tree times `radius / length`; zero where that is too small for a float, below 1e-38.

    By a multiplication: XLA keeps the quotients of a division by entry in memory, a copy of the tree.
    """
    scale = radius / length
    return jax.tree.map(lambda x: x * scale, tree)


def plain_norm(tree: Any) -> jax.Array:
    """The 2-norm of what is known to be in the range where squares are accurate, which nothing guards."""
    (leaves,) = _bundles(tree)
    return root(_sum_of_squares(leaves))


def unit(tree: Any) -> Any:
    """The tree divided by its norm; a zero tree stays zero."""
    length = norm(tree)
    return rescale(upcast(tree), 1.0, jnp.where(length > 0.0, length, jnp.ones_like(length)))


def cosine(a: Any, b: Any) -> jax.Array:
    """The cosine of the angle between two trees; zero if one of them is zero."""
    return dot(unit(a), unit(b))


def reject(tree: Any, onto: Any) -> Any:
    r"""The part of `tree` orthogonal to `onto`: :math:`a - \frac{\langle a, b \rangle}{\|b\|^2} b`.

    Exactly zero for `reject(a, a)`, operation by operation.
    """
    squares, scale = _scaled_squares(onto)
    info = jnp.finfo(squares.dtype)
    # The power of two next to the norm: to divide by it is exact, and what is divided can be multiplied.
    length = jnp.clip(root(squares) / scale, float(info.tiny), float(info.max) / 4)
    power = jax.lax.reduce_precision(length, info.nexp, 0)
    direction = rescale(upcast(onto), 1.0, power)
    # Those of the direction. Neither `/ x**2` nor `/ x / x`, which XLA makes of it: the square may overflow.
    inverse = 1.0 / (scale * power)
    squares = (squares * inverse) * inverse
    share = dot(tree, direction) / jnp.where(squares > 0.0, squares, jnp.ones_like(squares))
    return jax.tree.map(lambda x, d: x - share * d, upcast(tree), direction)


def into_ball(tree: Any, length: jax.Array, radius: Any) -> Any:
    """The tree, whose length is given, shortened to the radius (or its size) where it is longer."""
    radius = jnp.abs(radius)
    outside = length > radius
    shrink = jnp.where(outside, radius / jnp.where(outside, length, 1.0), 1.0)
    return jax.tree.map(lambda x: shrink * x, tree)


def all_finite(*trees: Any) -> jax.Array:
    """Whether no leaf of the trees holds a NaN or an infinity."""
    # Zero times anything finite is zero, and a sum of numbers runs at the speed of memory, where one of
    # truth values takes three times as long.
    return _total([jnp.sum(x * jnp.zeros((), x.dtype)) for x in jax.tree.leaves(trees)]) == 0.0


def keep_finite(new: Any, old: Any) -> Any:
    """What to remember after a step, in the dtypes of the old, entry by entry: where not finite, the old.

    By entry, so that it fuses with what computes the new. To know of all gradients that they are finite
    before one of them may be written would cost a copy of them and a pass over memory.
    """

    def keep(x: Any, y: Any) -> Any:
        if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
            return x
        if jnp.result_type(x) != jnp.result_type(y):
            x = jnp.asarray(x, jnp.result_type(y))
        if jnp.shape(x) != jnp.shape(y):
            msg = (
                "What a variant remembers must keep its shapes from step to step, got "
                f"{jnp.shape(x)} where the state holds {jnp.shape(y)}: return the memory in the shapes of "
                "`init_memory`."
            )
            raise ValueError(msg)
        return jax.lax.select(jnp.isfinite(x), x, y)

    return jax.tree.map(keep, new, old)


def displace(params: Any, perturbation: Any) -> Any:
    """The point `params + perturbation`, computed in float32 or better, in the dtypes of params.

    An entry of the perturbation that is not finite displaces nothing: a gradient with a NaN must
    not throw the second evaluation into nowhere too.
    """

    def add(w: jax.Array, e: jax.Array) -> jax.Array:
        e = jax.lax.select(jnp.isfinite(e), e, jnp.zeros_like(e))
        return (w.astype(jnp.promote_types(w.dtype, jnp.float32)) + e).astype(w.dtype)

    return jax.tree.map(add, params, perturbation)


def displacement_norm(point: Any, params: Any) -> jax.Array:
    """The norm of `point - params`: of a perturbation, what rounding to the dtype has left of it."""
    return norm(jax.tree.map(jnp.subtract, upcast(point), upcast(params)))
