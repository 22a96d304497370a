"""Tree arithmetic that `optax.tree` lacks: in float32 or better, and right on sharded leaves."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

_SMALL = 4096  # Entries of a leaf that is reduced together with others.


def cond_or_if(
    predicate: jax.Array, if_true: Callable[[], Any], if_false: Callable[[], Any], *, promotes: bool = False
) -> Any:
    """`jax.lax.cond`, or a plain `if` outside of a trace, where `cond` would compile in every call.

    Both branches must return the same dtypes, unless it `promotes` what they return to dtypes for both.
    """
    if not isinstance(predicate, Tracer):
        return if_true() if predicate else if_false()
    if promotes:
        if_true, if_false = _in_common_dtypes(if_true, if_false)
    return jax.lax.cond(predicate, if_true, if_false)


def _in_common_dtypes(*branches: Callable[[], Any]) -> list[Callable[[], Any]]:
    """The branches of a conditional, cast to the dtypes that hold the results of both."""
    like = jax.tree.map(lambda *x: jnp.result_type(*x), *map(jax.eval_shape, branches))

    def cast(branch: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: jax.tree.map(lambda x, dtype: jnp.asarray(x, dtype), branch(), like)

    return [cast(branch) for branch in branches]


def upcast(tree: Any) -> Any:
    """The tree with its floating-point leaves in float32 or better, and all others as they are."""

    def up(x: Any) -> Any:
        dtype = jnp.result_type(x)
        if not jnp.issubdtype(dtype, jnp.floating):
            return x
        return jnp.asarray(x, jnp.promote_types(dtype, jnp.float32))

    return jax.tree.map(up, tree)


def zeros_like(tree: Any) -> Any:
    """Zeros in the shapes of the tree, in float32 or better: how the memory of a variant starts.

    As `jnp.zeros_like` they take on the sharding of the tree, but for a tree of `jax.ShapeDtypeStruct`.
    """
    return jax.tree.map(lambda x: jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32)), tree)


def cast_like(tree: Any, like: Any) -> Any:
    """The tree in the dtypes of `like`, leaf by leaf."""
    return jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), tree, like)


def common_dtype(tree: Any) -> Any:
    """The dtype of scalars computed from the tree: float32, or float64 if a leaf has it."""
    return jnp.result_type(jnp.float32, *(x.dtype for x in jax.tree.leaves(tree)))


def _total(terms: Sequence[jax.Array]) -> jax.Array:
    return sum(terms[1:], start=terms[0]) if terms else jnp.zeros((), jnp.float32)


def root(total: jax.Array, ord: float = 2.0) -> jax.Array:
    """The `ord`-th root of numbers >= 0. Its derivative at zero is 0, for those who differentiate a step."""
    is_zero = total == 0.0
    safe = jax.lax.select(is_zero, jnp.ones_like(total), total)
    safe = jnp.sqrt(safe) if ord == 2.0 else safe ** (1.0 / ord)
    return jax.lax.select(is_zero, jnp.zeros_like(total), safe)


def _is_small(x: jax.Array) -> bool:
    # Leaves whose type says that they are sharded do not concatenate.
    return x.size <= _SMALL and not any(jax.typeof(x).sharding.spec)


def _bundles(*trees: Any) -> list[list[jax.Array]]:
    """The leaves of each tree in one dtype, the small ones joined into one vector.

    A reduction over a bias costs as much to compile, and to start, as one over a matrix.
    """
    columns = [jax.tree.leaves(upcast(tree)) for tree in trees]
    dtype = common_dtype(columns)
    is_small = [all(map(_is_small, row)) for row in zip(*columns, strict=True)]

    def bundle(column: Sequence[jax.Array]) -> list[jax.Array]:
        leaves = [(x.astype(dtype), small) for x, small in zip(column, is_small, strict=True)]
        joined = [x.ravel() for x, small in leaves if small]
        return [x for x, small in leaves if not small] + ([jnp.concatenate(joined)] if joined else [])

    return [bundle(column) for column in columns]


def dot(a: Any, b: Any) -> jax.Array:
    """The inner product of two trees. Unlike `optax.tree.vdot` it takes sharded leaves."""
    return _total([jnp.sum(x * y) for x, y in zip(*_bundles(a, b), strict=True)])


def squared_norm(tree: Any) -> jax.Array:
    """The sum of the squares of all entries."""
    (leaves,) = _bundles(tree)
    return _total([jnp.sum(jnp.square(x)) for x in leaves])


def norm(tree: Any, ord: float = 2.0) -> jax.Array:
    """The global `ord`-norm of all entries of the tree; NaN or infinite where an entry is."""
    if ord == 2.0:
        return root(squared_norm(tree))
    (leaves,) = _bundles(tree)
    # `initial`: an empty leaf has no largest entry.
    largest = jnp.zeros((), common_dtype(leaves))
    for x in leaves:
        largest = jnp.maximum(largest, jnp.max(jnp.abs(x), initial=0.0))
    if ord == jnp.inf:
        return largest
    # The powers of a large order leave the range of floats: they are taken in units of the largest entry.
    usable = (largest > 0.0) & jnp.isfinite(largest)
    unit = jnp.where(usable, largest, jnp.ones_like(largest))
    return unit * root(_total([jnp.sum(jnp.abs(x / unit) ** ord) for x in leaves]), ord)


def rescale(tree: Any, length: Any, current: jax.Array) -> Any:
    """The tree, whose length is `current`, in another length.

    By a multiplication: XLA would keep the quotients of a division by entry in memory, a copy of the tree.
    """
    scale = length / current
    return jax.tree.map(lambda x: x * scale, tree)


def unit(tree: Any) -> Any:
    """The tree divided by its norm; a zero tree stays zero."""
    length = norm(tree)
    return rescale(upcast(tree), 1.0, jnp.where(length > 0.0, length, jnp.ones_like(length)))


def cosine(a: Any, b: Any) -> jax.Array:
    """The cosine of the angle between two trees; zero if one of them is zero."""
    size = norm(a) * norm(b)
    return dot(a, b) / jnp.where(size > 0.0, size, jnp.ones_like(size))


def reject(tree: Any, onto: Any) -> Any:
    r"""The part of `tree` orthogonal to `onto`: :math:`a - \frac{\langle a, b \rangle}{\|b\|^2} b`.

    Computed from :math:`a - b`, which has the same orthogonal part. Two equal trees therefore give exactly
    zero, also where a sum of squares leaves the range of floats.
    """
    difference = jax.tree.map(jnp.subtract, upcast(tree), upcast(onto))
    squares, product = squared_norm(onto), dot(difference, onto)
    usable = (squares > 0.0) & jnp.isfinite(squares) & jnp.isfinite(product)
    share = jnp.where(usable, product, 0.0) / jnp.where(usable, squares, 1.0)
    return jax.tree.map(lambda d, b: d - share * b, difference, onto)


def into_ball(tree: Any, length: jax.Array, radius: Any) -> Any:
    """The tree, whose length is given, shortened to the radius (or its size) where it is longer."""
    radius = jnp.abs(radius)
    outside = length > radius
    shrink = jnp.where(outside, radius / jnp.where(outside, length, 1.0), 1.0)
    return jax.tree.map(lambda x: shrink * x, tree)


def all_finite(*trees: Any) -> jax.Array:
    """Whether no leaf of the trees holds a NaN or an infinity."""
    # Zero times anything finite is zero. A sum of floats runs three times as fast as one of booleans.
    return _total([jnp.sum(x * jnp.zeros((), x.dtype)) for x in jax.tree.leaves(trees)]) == 0.0


def keep_finite(new: Any, old: Any) -> Any:
    """The new memory in the dtypes of the old. Entries that are not finite keep their old value.

    By entry, so that it fuses with what computes the new memory.
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
        return jax.lax.select(jnp.isfinite(x), x, jnp.asarray(y))

    return jax.tree.map(keep, new, old)


def displace(params: Any, perturbation: Any) -> Any:
    """The point `params + perturbation`, computed in float32 or better, in the dtypes of params.

    An entry of the perturbation that is not finite displaces nothing: a NaN in a gradient must not spoil the
    second evaluation too.
    """

    def add(w: jax.Array, e: jax.Array) -> jax.Array:
        e = jax.lax.select(jnp.isfinite(e), e, jnp.zeros_like(e))
        return (w.astype(jnp.promote_types(w.dtype, jnp.float32)) + e).astype(w.dtype)

    return jax.tree.map(add, params, perturbation)


def displacement_norm(point: Any, params: Any) -> jax.Array:
    """The norm of `point - params`: of a perturbation, what rounding to the dtype has left of it."""
    return norm(jax.tree.map(jnp.subtract, upcast(point), upcast(params)))


def unknown(like: jax.Array) -> jax.Array:
    """NaN, in place of a number that was not measured; infinity where `jax_debug_nans` would stop for it.

    Computed from the number that it is like, to keep the mark of what differs between devices.
    """
    stops = cast("Any", jax.config).jax_debug_nans
    return jnp.where(jnp.isnan(like), like, jnp.inf if stops else jnp.nan)


def blend(old: Any, new: Any, weight: Any) -> Any:
    """An average moved towards `new`: exactly `old` for a weight of 0, exactly `new` for 1."""
    return jax.tree.map(lambda x, y: (1.0 - weight) * x + weight * y, old, new)


def at_every_leaf(x: jax.Array, tree: Any) -> Any:
    """An array in place of every leaf: in this form statistics survive what wrappers do to gradients."""
    return jax.tree.map(lambda _: x, tree)


def first_leaf(tree: Any, default: Any = None) -> Any:
    """The array of `at_every_leaf`; the default of a tree without leaves."""
    return next(iter(jax.tree.leaves(tree)), default)


def select(predicate: jax.Array, if_true: Any, if_false: Any) -> Any:
    """`jnp.where` for trees."""
    return jax.tree.map(lambda x, y: jnp.where(predicate, x, y), if_true, if_false)


def count_of(tree: Any, fraction: Any) -> jax.Array:
    """How many of all entries of a tree a fraction of them is, rounded."""
    total = sum(x.size for x in jax.tree.leaves(tree))
    # Integers of 32 bits are exact. Beyond 2**32 entries the count is a float32, to within 1e-7 of it.
    number = jnp.uint32 if total < 2**32 else jnp.float32
    if isinstance(fraction, jax.Array):
        return jnp.round(fraction * total).astype(number)
    return jnp.asarray(np.round(np.float64(fraction) * total).astype(number))


def count_true(mask: Any, dtype: Any) -> jax.Array:
    """How many entries of a tree of booleans are true; no leaf has more of them than 32 bits can count."""
    total = jnp.zeros((), dtype)
    for x in jax.tree.leaves(mask):
        total += jnp.sum(x, dtype=jnp.uint32).astype(dtype)
    return total


@functools.partial(jax.jit, inline=True)  # Outside of a trace its loop would be compiled in every call.
def smallest(sizes: Any, count: jax.Array) -> Any:
    """Marks the count smallest of all entries of a tree, which are >= 0; ties all count."""
    # Floats that are not negative are ordered as the integers of their bits. So the count-th smallest is
    # found bit by bit: no sort, and nothing is gathered from the devices but counts.
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(sizes))
    unsigned = jnp.uint64 if dtype == jnp.float64 else jnp.uint32
    bits = jax.tree.map(lambda x: jax.lax.bitcast_convert_type(x.astype(dtype), unsigned), sizes)
    one, highest = jnp.ones((), unsigned), 8 * dtype.itemsize - 2

    def add_bit(i: jax.Array, threshold: jax.Array) -> jax.Array:
        larger = threshold | (one << (highest - i).astype(unsigned))
        below = count_true(jax.tree.map(lambda x: x < larger, bits), count.dtype)
        return jnp.where(below < count, larger, threshold)

    threshold = jax.lax.fori_loop(0, highest + 1, add_bit, jnp.zeros((), unsigned))
    return jax.tree.map(lambda x: (x <= threshold) & (count > 0), bits)
