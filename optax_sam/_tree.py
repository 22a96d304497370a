"""Tree arithmetic that `optax.tree` lacks.

Accumulated in float32 or better, without overflow or underflow, and right on sharded leaves.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer


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


def _root(total: jax.Array, power: float) -> jax.Array:
    # The inner `where` keeps the derivative at zero finite, for those who differentiate a step.
    is_zero = total == 0.0
    safe = jnp.where(is_zero, jnp.ones_like(total), total)
    return jnp.where(is_zero, jnp.zeros_like(total), safe**power)


def norm(tree: Any, ord: float = 2.0) -> jax.Array:
    """The global `ord`-norm of all entries of the tree; NaN or infinite where an entry is.

    The 2-norm costs one pass over memory: only where the plain sum of squares leaves the range in
    which float arithmetic is accurate does a second, rescaled pass run.
    """
    leaves = jax.tree.leaves(upcast(tree))
    if ord == jnp.inf:
        return _largest(leaves)
    if ord != 2.0:
        largest = _largest(leaves)
        usable = (largest > 0.0) & jnp.isfinite(largest)
        scale = jnp.where(usable, largest, jnp.ones_like(largest))
        return scale * _root(_total([jnp.sum(jnp.abs(x / scale) ** ord) for x in leaves]), 1 / ord)

    squares = _total([jnp.sum(jnp.square(x)) for x in leaves])
    info = jnp.finfo(squares.dtype)
    # Below `smallest` the squares of single entries may have been flushed to zero.
    smallest = float(info.tiny) / float(info.eps) ** 2
    in_range = (squares >= smallest) & (squares <= float(info.max))

    def rescaled() -> jax.Array:
        # Powers of two are exact, and these keep the squares of all that is out of range inside it.
        up, down = 2.0 ** (5 * info.maxexp // 8), 2.0 ** (-3 * info.maxexp // 4)
        # Not a `where` of two constants: JAX 0.8 cannot `vmap` that over an explicitly sharded axis.
        is_small = (squares < 1.0).astype(info.dtype)
        scale = is_small * up + (1.0 - is_small) * down
        return _root(_total([jnp.sum(jnp.square(x * scale)) for x in leaves]), 0.5) / scale

    return branch(in_range, lambda: jnp.sqrt(squares), rescaled)


def dot(a: Any, b: Any) -> jax.Array:
    """The inner product of two trees. Unlike `optax.tree.vdot` it takes sharded leaves."""
    products = jax.tree.map(lambda x, y: jnp.sum(x * y), upcast(a), upcast(b))
    return _total(jax.tree.leaves(products))


def rescale(tree: Any, radius: Any, length: jax.Array) -> Any:
    """The tree times `radius / length`, where no entry is larger than its length.

    By multiplications: XLA keeps the quotients of a division by entry in memory, a copy of the tree. Two of
    them, for the quotient of two numbers may be too large or too small for a float where those are not.
    """
    root = jnp.sqrt(length)
    first, second = 1.0 / root, radius / root
    return jax.tree.map(lambda x: (x * first) * second, tree)


def unit(tree: Any) -> Any:
    """The tree divided by its norm; a zero tree stays zero."""
    length = norm(tree)
    return rescale(upcast(tree), 1.0, jnp.where(length > 0.0, length, jnp.ones_like(length)))


def cosine(a: Any, b: Any) -> jax.Array:
    """The cosine of the angle between two trees; zero if one of them is zero."""
    return dot(unit(a), unit(b))


def reject(tree: Any, onto: Any) -> Any:
    r"""The part of `tree` orthogonal to `onto`: :math:`a - \langle a, \hat b \rangle \hat b`.

    Exactly zero where the two are parallel but for rounding: what LookSAM rescales must not be noise.
    """
    direction = unit(onto)
    coefficient = dot(tree, direction)
    rest = jax.tree.map(lambda x, d: x - coefficient * d, upcast(tree), direction)
    # Relative to the coefficient nothing that counts can overflow. (The norm would keep `rest` in memory.)
    squares = _total([jnp.sum(jnp.square(r / coefficient)) for r in jax.tree.leaves(rest)])
    is_noise = squares <= (16 * jnp.finfo(coefficient.dtype).eps) ** 2
    return jax.tree.map(lambda r: jnp.where(is_noise, jnp.zeros_like(r), r), rest)


def into_ball(tree: Any, length: jax.Array, radius: Any) -> Any:
    """The tree, whose length is given, shortened to the radius where it is longer."""
    outside = length > radius
    shrink = jnp.where(outside, radius / jnp.where(outside, length, 1.0), 1.0)
    return jax.tree.map(lambda x: shrink * x, tree)


def all_finite(*trees: Any) -> jax.Array:
    """Whether no leaf of the trees holds a NaN or an infinity."""
    # Zero times anything finite is zero, and a sum of numbers runs at the speed of memory, where one of
    # truth values takes three times as long.
    return _total([jnp.sum(x * jnp.zeros((), x.dtype)) for x in jax.tree.leaves(trees)]) == 0.0


def keep_if_finite(new: Any, old: Any, *gradients: Any) -> Any:
    """What to remember after a step: the old where a gradient is not finite, or all later steps are lost."""
    return optax.tree.where(all_finite(*gradients), new, old)


def displace(params: Any, perturbation: Any) -> Any:
    """The point `params + perturbation`, computed in float32 or better, in the dtypes of params.

    An entry of the perturbation that is not finite displaces nothing: a gradient with a NaN must
    not throw the second evaluation into nowhere too.
    """

    def add(w: jax.Array, e: jax.Array) -> jax.Array:
        e = jnp.where(jnp.isfinite(e), e, jnp.zeros_like(e))
        return (w.astype(jnp.promote_types(w.dtype, jnp.float32)) + e).astype(w.dtype)

    return jax.tree.map(add, params, perturbation)


def displacement_norm(point: Any, params: Any) -> jax.Array:
    """The norm of `point - params`: of a perturbation, what rounding to the dtype has left of it."""
    return norm(jax.tree.map(jnp.subtract, upcast(point), upcast(params)))
