"""How the measures of flatness walk over data: one batch or many, weighted, with a progress bar."""

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from optax_sam import _checks, _tree

LossFn = Callable[[Any, Any], Any]
"""`(params, batch) -> mean loss of the batch`, a scalar."""


def extra(name: str) -> Any:
    """A module of the extra `sharpness`, which the rest of the library does without."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        msg = (
            f"This function needs {name.split('.')[0]}, which is not installed: "
            "`pip install optax-sam[sharpness]`."
        )
        raise ImportError(msg) from error


def shows_progress(progress: bool | None) -> bool:
    """Whether there will be a bar: on demand, or by default on a terminal where tqdm is installed."""
    if progress is None:
        try:
            extra("tqdm")
        except ImportError:
            return False
        return sys.stderr.isatty()
    return progress


@contextlib.contextmanager
def progress_bar(progress: bool | None, total: int | None, description: str) -> Generator[Callable[[], None]]:
    """Gives a function to be called once per piece of work.

    Args:
      progress: True for a bar, False for none; None for one that shows itself on a terminal, after
        a second, where tqdm is installed.
      total: How many pieces there will be, where that is known.
      description: What stands before the bar.
    """
    if not shows_progress(progress):
        yield lambda: None
        return
    patience = 0.0 if progress else 1.0
    with extra("tqdm").tqdm(total=total, desc=description, delay=patience, leave=bool(progress)) as bar:
        yield bar.update


def as_batches(batches: Any) -> Iterable[Any]:
    """Something to walk over more than once: a single batch becomes a list of one."""
    if isinstance(batches, list):
        return cast("list[Any]", batches)
    is_leaf = jax.tree_util.all_leaves([batches])
    if hasattr(batches, "shape") or not is_leaf:  # An array, or a tuple, dict, dataclass of arrays.
        return [batches]
    if isinstance(batches, Iterator):
        return list(cast("Iterator[Any]", batches))
    if isinstance(batches, Iterable) and not isinstance(batches, str | bytes):
        return cast("Iterable[Any]", batches)
    msg = (
        "`batches` must be one batch (an array, or a tuple, dict or other pytree of arrays) or an iterable "
        f"of batches such as a list, got {batches!r} of type {type(batches).__name__}."
    )
    raise TypeError(msg)


def batch_size(batch: Any) -> int:
    """The number of examples: the length of the first axis, which all arrays of a batch share."""
    sizes = {np.shape(x)[0] for x in jax.tree.leaves(batch) if np.ndim(x) > 0}
    if len(sizes) != 1 or 0 in sizes:
        found = ", ".join(str(np.shape(x)) for x in jax.tree.leaves(batch)) or "no arrays"
        msg = (
            "A batch in `batches` must hold arrays whose first axes count the same examples, one or more, "
            f"got shapes {found}. A tuple is one batch; several batches go into a list."
        )
        raise ValueError(msg)
    return sizes.pop()


def prepare(loss_fn: Any, params: Any, batches: Any, *, name: str = "loss_fn") -> tuple[Any, Iterable[Any]]:
    """Checks the three arguments that all measures share.

    Args:
      loss_fn: The loss, or another function of params and a batch.
      params: The params.
      batches: One batch, or an iterable of batches.
      name: What the first of them is called, for the message.

    Returns:
      The params in float32 or better, in which flatness has to be measured, and the batches.
    """
    try:
        hash(loss_fn)  # By which the program that was compiled for a function is found again.
        usable = callable(loss_fn)
    except TypeError:
        usable = False
    if not usable:
        msg = (
            f"`{name}` must be a (hashable) function of params and a batch, got {loss_fn!r} of type "
            f"{type(loss_fn).__name__}."
        )
        raise TypeError(msg)
    _checks.params(params)
    params = jax.tree.map(jnp.asarray, params)
    if not jax.tree.leaves(params):
        msg = f"params must hold at least one array, got {params!r}."
        raise ValueError(msg)
    return _tree.upcast(params), as_batches(batches)


def scalar_loss(loss_fn: LossFn, params: optax.Params, batch: Any) -> jax.Array:
    """The loss, after a check that it is one number."""
    value = loss_fn(params, batch)
    shape = getattr(value, "shape", None)
    if shape != () and not isinstance(value, float | int):
        got = f"an array of shape {shape}" if shape is not None else f"a {type(value).__name__}"
        msg = (
            f"`loss_fn` must return a scalar, the mean loss of a batch, got {got}. Average over examples; "
            "drop what a loss returns besides: `lambda params, batch: loss(params, batch)[0]`."
        )
        raise ValueError(msg)
    return _tree.upcast(jnp.asarray(value))


_all_finite = jax.jit(_tree.all_finite)


def finite(what: str, tree: Any) -> None:
    """Refuses a result that is not finite; inside a `jit` of the caller it cannot be told."""
    leaves = jax.tree.leaves(tree)
    if not any(isinstance(x, Tracer) for x in leaves) and not bool(_all_finite(leaves)):
        shown = f", got {leaves[0]}" if len(leaves) == 1 and np.ndim(leaves[0]) == 0 else ""
        msg = (
            f"{what} must be finite at params{shown}. Check that params are finite (has training diverged?) "
            "and that no batch holds a NaN."
        )
        raise ValueError(msg)


@jax.jit
def _toward(mean: Any, value: Any, share: jax.Array) -> Any:
    return jax.tree.map(lambda m, v: m + (v - m) * share.astype(m.dtype), mean, value)


def mean(
    function: Callable[[Any], Any],
    batches: Iterable[Any],
    *,
    progress: bool | None = None,
    description: str = "batches",
) -> Any:
    """The mean of a function over all examples, from its means over the batches, in constant memory.

    Args:
      function: From a batch to a tree of arrays, its mean over the examples of the batch.
      batches: The batches; one is held at a time.
      progress: As for `progress_bar`.
      description: As for `progress_bar`.

    Returns:
      The tree of means, in which a batch counts by its number of examples.
    """
    total, result = 0, None
    with progress_bar(progress, _length(batches), description) as tick:
        for batch in batches:
            size = batch_size(batch)
            total += size
            value = function(batch)
            # A running mean: no sum to overflow, and a single batch comes out as it is.
            result = value if result is None else _toward(result, value, jnp.asarray(size / total))
            tick()
    if result is None:
        raise ValueError(_EMPTY)
    return result


_EMPTY = "`batches` must hold at least one batch, got an empty iterable. A generator can be walked over once."


def _length(batches: Iterable[Any]) -> int | None:
    return len(batches) if isinstance(batches, Sequence) else None


def stack(batches: Iterable[Any]) -> tuple[Any, ...]:
    """Batches of equal shapes stacked along a new first axis, for `scan_mean`.

    Returns:
      One tree per shape: for a ragged last batch a second one.
    """
    groups: dict[Any, list[Any]] = {}
    for batch in batches:
        batch_size(batch)
        leaves, structure = jax.tree.flatten(batch)
        shapes = tuple((np.shape(x), jnp.result_type(x)) for x in leaves)
        groups.setdefault((structure, shapes), []).append(batch)
    if not groups:
        raise ValueError(_EMPTY)
    return tuple(jax.tree.map(lambda *xs: jnp.stack(xs), *group) for group in groups.values())


def scan_mean(function: Callable[[Any], Any], groups: tuple[Any, ...]) -> Any:
    """As `mean`, inside a compiled program, on what `stack` returned.

    One batch is worked on at a time, in the memory of one.
    """
    counts = [np.shape(jax.tree.leaves(group)[0])[0] for group in groups]
    sizes = [batch_size(jax.tree.map(lambda x: x[0], group)) for group in groups]
    total = sum(n * size for n, size in zip(counts, sizes, strict=True))
    means: list[Any] = []
    for group, count, size in zip(groups, counts, sizes, strict=True):
        if count == 1:  # Without a loop, in which XLA is slow at convolutions on a CPU.
            value = function(jax.tree.map(lambda x: x[0], group))
        else:
            shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], group))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            value, _ = jax.lax.scan(functools.partial(_add, function), zeros, group)
        means.append(jax.tree.map(functools.partial(jnp.multiply, size / total), value))
    return functools.reduce(functools.partial(jax.tree.map, jnp.add), means)


def _add(function: Callable[[Any], Any], total: Any, batch: Any) -> tuple[Any, None]:
    return jax.tree.map(jnp.add, total, function(batch)), None
