"""How the measures of flatness iterate over data: one batch or many, weighted, with a progress bar."""

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
from optax_sam._loss import CompositeLoss

LossFn = Callable[[Any, Any], Any] | CompositeLoss
"""`(params, batch) -> mean loss of the batch`, a scalar. For a `CompositeLoss` the batch is the pair
`(inputs, targets)`."""


def extra(name: str) -> Any:
    """Imports a module of the extra `sharpness`. The rest of the library does not need these modules."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        msg = (
            f"This function needs {name.split('.')[0]}, which is not installed: "
            "`pip install optax-sam[sharpness]`."
        )
        raise ImportError(msg) from error


def shows_progress(progress: bool | None) -> bool:
    """Whether to show a bar. For None that is on a terminal, if tqdm is installed."""
    if progress is None:
        try:
            extra("tqdm")
        except ImportError:
            return False
        return sys.stderr.isatty()
    return progress


@contextlib.contextmanager
def progress_bar(progress: bool | None, total: int | None, description: str) -> Generator[Callable[[], None]]:
    """A context with a progress bar. It gives a function that the caller calls once per piece of work.

    Args:
      progress: True shows a bar, False shows none. None shows one on a terminal after a second, if tqdm is
        installed.
      total: The number of pieces, or None if it is unknown.
      description: The text before the bar.
    """
    if not shows_progress(progress):
        yield lambda: None
        return
    patience = 0.0 if progress else 1.0
    with extra("tqdm").tqdm(total=total, desc=description, delay=patience, leave=bool(progress)) as bar:
        yield bar.update


def as_batches(batches: Any, *, once: bool = False) -> Iterable[Any]:
    """An iterable of batches. A single batch becomes a list of one.

    It can be iterated more than once, for which a generator is kept as a list. With `once` it stays as it is.
    """
    if isinstance(batches, list):
        return cast("list[Any]", batches)
    is_leaf = jax.tree_util.all_leaves([batches])
    if hasattr(batches, "shape") or not is_leaf:  # An array, or a tuple, dict or dataclass of arrays.
        return [batches]
    if isinstance(batches, Iterator):
        return cast("Iterator[Any]", batches) if once else list(cast("Iterator[Any]", batches))
    if isinstance(batches, Iterable) and not isinstance(batches, str | bytes):
        return cast("Iterable[Any]", batches)
    msg = (
        "`batches` must be one batch (an array, or a tuple, dict or other pytree of arrays) or an iterable "
        f"of batches such as a list, got {batches!r} of type {type(batches).__name__}."
    )
    raise TypeError(msg)


def batch_size(batch: Any) -> int:
    """The number of examples: the length of the first axis, which must be the same for all arrays."""
    sizes = {np.shape(x)[0] for x in jax.tree.leaves(batch) if np.ndim(x) > 0}
    if len(sizes) != 1 or 0 in sizes:
        found = ", ".join(str(np.shape(x)) for x in jax.tree.leaves(batch)) or "no arrays"
        msg = (
            "A batch in `batches` must hold arrays whose first axes count the same examples, one or more, "
            f"got shapes {found}. A tuple is one batch; several batches go into a list."
        )
        raise ValueError(msg)
    return sizes.pop()


def prepare(
    loss_fn: Any, params: Any, batches: Any, *, name: str = "loss_fn", once: bool = False
) -> tuple[Any, Iterable[Any]]:
    """Checks the three arguments that the measures have in common.

    Args:
      loss_fn: The loss, or another function of params and a batch.
      params: The params.
      batches: One batch, or an iterable of batches.
      name: The name of the first argument, for error messages.
      once: Whether the caller iterates over the batches only once.

    Returns:
      The params in float32 or better, the precision in which flatness is measured, and the batches.
    """
    try:
        hash(loss_fn)  # `jax.jit` finds the compiled program of a function by its hash.
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
    return _tree.upcast(params), as_batches(batches, once=once)


def inputs_and_targets(batch: Any) -> tuple[Any, Any]:
    """The two parts of a batch for a `CompositeLoss`."""
    if not isinstance(batch, tuple | list) or len(cast("Sequence[Any]", batch)) != 2:
        msg = (
            "With a `CompositeLoss` a batch in `batches` must be a pair `(inputs, targets)`, got one of the "
            f"structure {jax.tree.structure(batch)}. A tuple is one batch; several batches go into a list."
        )
        raise ValueError(msg)
    inputs, targets = cast("Sequence[Any]", batch)
    return inputs, targets


def scalar_loss(loss_fn: LossFn, params: optax.Params, batch: Any) -> jax.Array:
    """The loss, after a check that it is one number."""
    if isinstance(loss_fn, CompositeLoss):
        value = loss_fn(params, *inputs_and_targets(batch))
        value = value[0] if loss_fn.has_aux else value
    else:
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
    """Raises an error if a result is not finite. Inside a `jit` of the caller the check is skipped."""
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
    # Not `m + (v - m) * share`, which is NaN for two infinities.
    return jax.tree.map(lambda m, v: m * (1 - share).astype(m.dtype) + v * share.astype(m.dtype), mean, value)


def mean(
    function: Callable[[Any], Any],
    batches: Iterable[Any],
    *,
    progress: bool | None = None,
    description: str = "batches",
) -> Any:
    """The mean of a function over all examples, from its means over the batches, in constant memory.

    Args:
      function: Maps a batch to a tree of arrays, each a mean over the examples of the batch.
      batches: The batches. Only one is held at a time, unless they are a list.
      progress: See `progress_bar`.
      description: See `progress_bar`.

    Returns:
      The tree of means, in which every batch is weighted by its number of examples.
    """
    total, result = 0, None
    with progress_bar(progress, _length(batches), description) as tick:
        for batch in batches:
            size = batch_size(batch)
            total += size
            value = function(batch)
            # A running mean cannot overflow as a sum can, and it returns a single batch unchanged.
            result = value if result is None else _toward(result, value, jnp.asarray(size / total))
            tick()
    if result is None:
        raise ValueError(_EMPTY)
    return result


_EMPTY = "`batches` must hold at least one batch, got an empty iterable. A generator can be walked over once."


def _length(batches: Iterable[Any]) -> int | None:
    return len(batches) if isinstance(batches, Sequence) else None


def stack(batches: Iterable[Any]) -> tuple[Any, ...]:
    """Stacks batches of equal shapes along a new first axis, for `scan_mean`.

    Returns:
      One tree per shape. A smaller last batch has its own tree.
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
    """The same as `mean`, inside a compiled program, for batches from `stack`.

    The program processes one batch at a time, in the memory of one batch.
    """
    counts = [np.shape(jax.tree.leaves(group)[0])[0] for group in groups]
    sizes = [batch_size(jax.tree.map(lambda x: x[0], group)) for group in groups]
    total = sum(n * size for n, size in zip(counts, sizes, strict=True))
    means: list[Any] = []
    for group, count, size in zip(groups, counts, sizes, strict=True):
        if count == 1:  # No loop: on CPUs XLA runs convolutions inside a loop slowly.
            value = function(jax.tree.map(lambda x: x[0], group))
        else:
            shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], group))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            value, _ = jax.lax.scan(functools.partial(_add, function), zeros, group)
        means.append(jax.tree.map(functools.partial(jnp.multiply, size / total), value))
    return functools.reduce(functools.partial(jax.tree.map, jnp.add), means)


def _add(function: Callable[[Any], Any], total: Any, batch: Any) -> tuple[Any, None]:
    return jax.tree.map(jnp.add, total, function(batch)), None
