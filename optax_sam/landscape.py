r"""Pictures of the loss around params: slices along lines and planes, and the path of training.

The functions `line`, `between` and `plane` evaluate a slice and return arrays. The functions `plot_line`,
`plot_contour` and `plot_surface` draw it; they need the extra `sharpness` (matplotlib). Directions come
from `random_direction`, `eigenvector_directions` or `trajectory`, or are any pytrees like params.

A picture shows only one or two dimensions out of very many. Directions that are not filter-normalized show
the scale of the weights as much as flatness. Compare two pictures only on the same scales.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import ArrayLike

from optax_sam import _checks, _tree
from optax_sam.sharpness import _data, curvature
from optax_sam.sharpness._data import LossFn


class Line(NamedTuple):
    """The loss along a line.

    Attributes:
      positions: The points of evaluation, in multiples of the direction. shape=(n,)
      losses: The loss at these points. shape=(n,)
    """

    positions: np.ndarray[Any, Any]
    losses: np.ndarray[Any, Any]


class Plane(NamedTuple):
    """The loss on a plane.

    Attributes:
      x: The grid along the first direction, in multiples of that direction. shape=(n,)
      y: The grid along the second direction, in multiples of that direction. shape=(m,)
      losses: The loss at `params + x[i] * directions[0] + y[j] * directions[1]`. shape=(n, m)
    """

    x: np.ndarray[Any, Any]
    y: np.ndarray[Any, Any]
    losses: np.ndarray[Any, Any]


class Trajectory(NamedTuple):
    """The path of training, projected on the plane of its two principal directions.

    Attributes:
      coordinates: The coordinates of every checkpoint in that plane. The last checkpoint is the origin.
        shape=(checkpoints, 2)
      directions: The two principal directions. They are orthogonal pytrees like params, of unit norm.
      explained: The share of the path's variance along each of them. shape=(2,)
    """

    coordinates: np.ndarray[Any, Any]
    directions: tuple[Any, Any]
    explained: np.ndarray[Any, Any]


def random_direction(params: optax.Params, key: Any = 0) -> optax.Params:
    r"""A random direction whose filters have the same norms as those of params.

    .. math:: d_f \leftarrow \frac{d_f}{\|d_f\|_2} \|w_f\|_2, \quad d \sim N(0, 1)

    A filter holds the weights of one output: all entries of a leaf that share an index on the last axis, as
    in the kernels of Flax and Haiku. The direction is zero for biases and all other leaves of at most one
    axis. A slice along the direction does not change with a rescaling of whole layers that leaves the
    function of the network unchanged: one factor for all filters of a layer, and its inverse for the next.

    Args:
      params: The params, a pytree of floating-point arrays.
      key: The random key, or an integer seed.

    Returns:
      The direction, a pytree like params.

    Raises:
      TypeError: If params are not floating-point arrays, or `key` is not a random key.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 2.0]]), "bias": jnp.ones(2)}
      >>> direction = optax_sam.landscape.random_direction(params)
      >>> print([f"{x:.3f}" for x in jnp.linalg.norm(direction["kernel"], axis=0)], direction["bias"])
      ['5.000', '2.000'] [0. 0.]

    References:
      Li et al., `Visualizing the Loss Landscape of Neural Nets <https://arxiv.org/abs/1712.09913>`_,
      NeurIPS 2018.
    """
    _checks.params(params)
    params = _tree.upcast(jax.tree.map(jnp.asarray, params))

    def normalize(d: jax.Array, w: jax.Array) -> jax.Array:
        if w.ndim < 2:
            return jnp.zeros_like(w)
        axes = tuple(range(w.ndim - 1))
        lengths = (jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True)) for x in (w, d))
        return d * jnp.divide(*lengths)

    noise = optax.tree.random_like(_checks.key("key", key), params, jax.random.normal)
    return jax.tree.map(normalize, noise, params)


def eigenvector_directions(
    loss_fn: LossFn, params: optax.Params, batches: Any, k: int = 2, **options: Any
) -> list[optax.Params]:
    """The directions of largest curvature, of unit norm.

    Args:
      loss_fn: See `optax_sam.sharpness.top_eigenpairs`, also for params and batches.
      params: The params.
      batches: The batches.
      k: The number of directions.
      **options: Other arguments of `optax_sam.sharpness.top_eigenpairs`.

    Returns:
      The directions, sharpest first. Compare only pictures with directions of one length. Note that the
      sharpest directions differ from solution to solution.

    Raises:
      ImportError, TypeError, ValueError: As for `optax_sam.sharpness.top_eigenpairs`.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> def loss_fn(w, x):
      ...     return jnp.mean(x * (10 * w[0] ** 2 + w[1] ** 2)) / 2
      >>> (sharpest,) = optax_sam.landscape.eigenvector_directions(loss_fn, jnp.zeros(2), jnp.ones(5), k=1)
      >>> print([f"{abs(x):.3f}" for x in sharpest])
      ['1.000', '0.000']
    """
    vectors = curvature.top_eigenpairs(loss_fn, params, batches, k, **options).vectors
    return [jax.tree.map(lambda v, i=i: v[i], vectors) for i in range(k)]


def _grid(name: str, positions: Any) -> np.ndarray[Any, Any]:
    grid = np.asarray(positions, np.float64)
    if grid.ndim != 1 or grid.size == 0 or not np.all(np.isfinite(grid)):
        msg = f"`{name}` must be a sequence of one or more finite numbers, got {positions!r}."
        raise ValueError(msg)
    return grid


@functools.partial(jax.jit, static_argnums=0)
def _losses(loss_fn: LossFn, params: Any, directions: Any, points: jax.Array, batch: Any) -> jax.Array:
    def loss_at(point: jax.Array) -> jax.Array:
        there = params
        for i, direction in enumerate(directions):
            there = jax.tree.map(lambda w, d, i=i: w + point[i].astype(w.dtype) * d, there, direction)
        return _data.scalar_loss(loss_fn, there, batch)

    return jax.vmap(loss_at)(points)


def _evaluate(
    loss_fn: LossFn,
    params: optax.Params,
    batches: Any,
    directions: Sequence[Any],
    points: np.ndarray[Any, Any],
    chunk_size: int,
    progress: bool | None,
) -> np.ndarray[Any, Any]:
    """The losses at points given by their coordinates along the directions. shape=(number of points,)."""
    _checks.number("chunk_size", chunk_size, low=1, integer=True)
    params, batches = _data.prepare(loss_fn, params, batches, once=True)
    for i, direction in enumerate(directions):
        _checks.same_shapes(f"direction {i}", direction, params)
    directions = [_tree.cast_like(jax.tree.map(jnp.asarray, d), params) for d in directions]
    # The last point is repeated to fill the last chunk, so that all chunks share one compiled program.
    count = -(-len(points) // chunk_size)
    padded = np.concatenate([points, np.repeat(points[-1:], count * chunk_size - len(points), axis=0)])
    chunks = jnp.asarray(padded.reshape(count, chunk_size, -1))
    total = len(batches) * count if isinstance(batches, Sequence) else None
    with _data.progress_bar(progress, total, "landscape") as tick:

        def losses(batch: Any) -> jax.Array:
            parts: list[jax.Array] = []
            for chunk in chunks:
                parts.append(_losses(loss_fn, params, directions, chunk, batch))
                tick()
            return jnp.concatenate(parts)

        result = np.asarray(_data.mean(losses, batches, progress=False))[: len(points)]
    # A loss may overflow far from the center. At the point nearest to the center it must be finite.
    _data.finite("The loss", jnp.asarray(result[np.argmin(np.sum(points**2, axis=1))]))
    return result


_LINE = np.linspace(-1.0, 1.0, 51)
_BETWEEN = np.linspace(-0.5, 1.5, 51)
_PLANE = np.linspace(-1.0, 1.0, 25)


def line(
    loss_fn: LossFn,
    params: optax.Params,
    batches: Any,
    direction: optax.Params,
    *,
    positions: ArrayLike = _LINE,
    chunk_size: int = 16,
    progress: bool | None = None,
) -> Line:
    r"""The loss along a direction.

    .. math:: t \mapsto L(w + t d)

    Args:
      loss_fn: The loss, `(params, batch) -> scalar`: the mean over the examples of the batch.
      params: The params, any pytree of floating-point arrays.
      batches: One batch (an array, or a tuple, dict or other pytree of arrays whose first axis counts
        examples) or an iterable of batches, weighted by their sizes.
      direction: A pytree like params.
      positions: The values of t.
      chunk_size: The number of points that are evaluated at once, each with a copy of params, >= 1.
      progress: Whether to show a progress bar. None shows one on a terminal if the evaluation takes long.

    Returns:
      The positions and the losses, as NumPy arrays. It takes one pass over the batches.

    Raises:
      TypeError, ValueError: If an argument has the wrong type or is out of range, the loss is not a
        scalar or not finite at the position nearest to 0, or there is no batch.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> def loss_fn(w, x):
      ...     return jnp.mean(x * (10 * w[0] ** 2 + w[1] ** 2)) / 2
      >>> at_minimum, direction = jnp.zeros(2), jnp.array([1.0, 0.0])
      >>> result = optax_sam.landscape.line(
      ...     loss_fn, at_minimum, jnp.ones(5), direction, positions=[-1.0, 0.0, 2.0])
      >>> print(result.losses)
      [ 5.  0. 20.]

    References:
      Goodfellow, Vinyals and Saxe, `Qualitatively Characterizing Neural Network Optimization Problems
      <https://arxiv.org/abs/1412.6544>`_, ICLR 2015.
    """
    grid = _grid("positions", positions)
    return Line(grid, _evaluate(loss_fn, params, batches, [direction], grid[:, None], chunk_size, progress))


def between(
    loss_fn: LossFn,
    start: optax.Params,
    end: optax.Params,
    batches: Any,
    *,
    positions: ArrayLike = _BETWEEN,
    chunk_size: int = 16,
    progress: bool | None = None,
) -> Line:
    r"""The loss on the line through two solutions, such as those of SGD and SAM.

    .. math:: t \mapsto L((1 - t)\,w_\mathrm{start} + t\,w_\mathrm{end})

    Args:
      loss_fn: See `line`, also for batches, chunk_size and progress.
      start: The params at position 0.
      end: The params at position 1.
      batches: The batches.
      positions: The values of t.
      chunk_size: The number of points that are evaluated at once, each with a copy of params, >= 1.
      progress: Whether to show a progress bar. None shows one on a terminal if the evaluation takes long.

    Returns:
      The positions and the losses, as NumPy arrays. It takes one pass over the batches.

    Raises:
      TypeError, ValueError: As for `line`.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> def loss_fn(w, x):
      ...     return jnp.mean(x * w**2)
      >>> result = optax_sam.landscape.between(
      ...     loss_fn, jnp.array(0.0), jnp.array(2.0), jnp.ones(5), positions=[0.0, 0.5, 1.0])
      >>> print(result.losses)
      [0. 1. 4.]

    References:
      Goodfellow, Vinyals and Saxe, `Qualitatively Characterizing Neural Network Optimization Problems
      <https://arxiv.org/abs/1412.6544>`_, ICLR 2015.
    """
    _checks.params(start)
    _checks.params(end)
    _checks.same_shapes("`end`", end, start)
    start, end = _tree.upcast(jax.tree.map(jnp.asarray, (start, end)))
    direction = jax.tree.map(jnp.subtract, end, start)
    return line(
        loss_fn, start, batches, direction, positions=positions, chunk_size=chunk_size, progress=progress
    )


def plane(
    loss_fn: LossFn,
    params: optax.Params,
    batches: Any,
    directions: Sequence[optax.Params] | None = None,
    *,
    x: ArrayLike = _PLANE,
    y: ArrayLike | None = None,
    chunk_size: int = 16,
    key: Any = 0,
    progress: bool | None = None,
) -> Plane:
    r"""The loss on a plane through params.

    .. math:: (s, t) \mapsto L(w + s d_1 + t d_2)

    Args:
      loss_fn: See `line`, also for params, batches, chunk_size and progress.
      params: The params.
      batches: The batches.
      directions: Two pytrees like params. None takes two calls of `random_direction`.
      x: The values of s.
      y: The values of t. None takes the values of s.
      chunk_size: The number of points that are evaluated at once, each with a copy of params, >= 1.
      key: The random key of the directions, or an integer seed.
      progress: Whether to show a progress bar. None shows one on a terminal if the evaluation takes long.

    Returns:
      The grid and the losses, as NumPy arrays. It takes one pass over the batches.

    Raises:
      TypeError, ValueError: As for `line`.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> def loss_fn(w, x):
      ...     return jnp.mean(x * (10 * w[0] ** 2 + w[1] ** 2)) / 2
      >>> axes = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
      >>> result = optax_sam.landscape.plane(
      ...     loss_fn, jnp.zeros(2), jnp.ones(5), axes, x=[0.0, 1.0], y=[0.0, 1.0, 2.0])
      >>> print(result.losses)
      [[0.  0.5 2. ]
       [5.  5.5 7. ]]

    References:
      Li et al., `Visualizing the Loss Landscape of Neural Nets <https://arxiv.org/abs/1712.09913>`_,
      NeurIPS 2018.
    """
    grid_x, grid_y = _grid("x", x), _grid("y", x if y is None else y)
    if directions is None:
        keys = jax.random.split(_checks.key("key", key))
        directions = [random_direction(params, each) for each in keys]
    if len(directions) != 2:
        msg = f"`directions` must be two pytrees like params, got {len(directions)}."
        raise ValueError(msg)
    points = np.stack(np.meshgrid(grid_x, grid_y, indexing="ij"), axis=-1).reshape(-1, 2)
    losses = _evaluate(loss_fn, params, batches, directions, points, chunk_size, progress)
    return Plane(grid_x, grid_y, losses.reshape(len(grid_x), len(grid_y)))


def trajectory(checkpoints: Iterable[optax.Params]) -> Trajectory:
    """The path of training, projected on its two principal directions.

    Args:
      checkpoints: The params at three or more times of training, in order of time. They are kept in the
        main memory of the host.

    Returns:
      The path. Its directions are those for a `plane` around the last checkpoint.

    Raises:
      TypeError, ValueError: If params are not floating-point arrays, differ in structure or shape, are
        not finite, or lie on one line, or there are fewer than three.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> checkpoints = [jnp.array([4.0, 0.0, 1.0]), jnp.array([1.0, 1.0, 1.0]), jnp.array([0.0, 0.0, 1.0])]
      >>> path = optax_sam.landscape.trajectory(checkpoints)
      >>> print([f"{x:.3f}" for x in path.explained], path.coordinates[-1])
      ['0.948', '0.052'] [0. 0.]

    References:
      Li et al., `Visualizing the Loss Landscape of Neural Nets <https://arxiv.org/abs/1712.09913>`_,
      NeurIPS 2018, section 7: the principal components of the differences from the last params. The
      differences are not centered.
    """
    flat: list[np.ndarray[Any, Any]] = []
    first, unravel = None, None
    for i, params in enumerate(checkpoints):
        _checks.params(params)
        if first is None:
            first = params
            _, unravel = jax.flatten_util.ravel_pytree(_tree.upcast(jax.tree.map(jnp.asarray, params)))
        _checks.same_shapes(f"`checkpoints[{i}]`", params, first)
        flat.append(np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(params)]))
    if len(flat) < 3 or unravel is None:
        msg = f"`checkpoints` must hold three params or more, got {len(flat)}."
        raise ValueError(msg)
    steps = np.stack(flat[:-1]) - flat[-1]
    if not np.all(np.isfinite(steps)):
        msg = "`checkpoints` must be finite, got a NaN or an infinity among them. Has training diverged?"
        raise ValueError(msg)
    # The small Gram matrix of the steps has the same nonzero spectrum as the large one of the params.
    squares, left = np.linalg.eigh(steps @ steps.T)
    squares, left = np.maximum(squares[::-1], 0.0), left[:, ::-1]
    if squares[1] <= 1e-12 * squares[0]:
        msg = "`checkpoints` must span a plane, got points of one line."
        raise ValueError(msg)
    axes = left[:, :2].T @ steps / np.sqrt(squares[:2, None])
    coordinates = np.concatenate([steps @ axes.T, np.zeros((1, 2))])
    dtype = jnp.result_type(float)
    directions = unravel(jnp.asarray(axes[0], dtype)), unravel(jnp.asarray(axes[1], dtype))
    return Trajectory(coordinates, directions, squares[:2] / np.sum(squares))


def _axes(axes: Any, **options: Any) -> Any:
    if axes is not None:
        return axes
    # A figure without pyplot, which would keep it alive.
    figure = _data.extra("matplotlib.figure").Figure(layout="constrained")
    return figure.add_subplot(**options)


def plot_line(lines: Line | dict[str, Line], axes: Any = None, *, log: bool = False) -> Any:
    """Draws the loss along one or several lines.

    Args:
      lines: A result of `line` or `between`, or a dict of several. Its keys are the names in the legend.
      axes: The matplotlib axes to draw in. None makes a new figure.
      log: Whether the axis of the loss is logarithmic.

    Returns:
      The axes. `axes.figure.savefig("line.png")` writes the picture.

    Raises:
      ImportError: If the extra `sharpness` is not installed.

    Examples:
      >>> import numpy as np, optax_sam
      >>> t = np.linspace(-1.0, 1.0, 51)
      >>> axes = optax_sam.landscape.plot_line({"sharp": (t, 5 * t**2), "flat": (t, t**2)})
      >>> print([text.get_text() for text in axes.get_legend().get_texts()])
      ['sharp', 'flat']
    """
    axes = _axes(axes)
    for name, (positions, losses) in (lines if isinstance(lines, dict) else {"": lines}).items():
        axes.plot(positions, losses, label=name)
    if isinstance(lines, dict):
        axes.legend(frameon=False)
    if log:
        axes.set_yscale("log")
    axes.set_xlabel("position")
    axes.set_ylabel("loss")
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def plot_contour(
    result: Plane,
    axes: Any = None,
    *,
    path: Trajectory | None = None,
    levels: ArrayLike | int = 20,
    log: bool = True,
    colorbar: bool = True,
) -> Any:
    """Draws the loss on a plane as filled contours.

    Args:
      result: A result of `plane`.
      axes: The matplotlib axes to draw in. None makes a new figure.
      path: A result of `trajectory`, which is drawn over the contours. The plane must have its directions.
      levels: The levels of the contours, two or more, or their number. Give two pictures the same levels to
        compare them.
      log: Whether the levels are spaced by the logarithm of the loss if only their number is given.
      colorbar: Whether to draw the color scale beside the picture. One is enough for pictures with the
        same levels.

    Returns:
      The axes. `axes.figure.savefig("plane.png")` writes the picture.

    Raises:
      ImportError: If the extra `sharpness` is not installed.
      TypeError, ValueError: If `levels` is neither two or more numbers nor the number of levels, or no loss
        on the plane is finite.

    Examples:
      >>> import numpy as np, optax_sam
      >>> x = np.linspace(-1.0, 1.0, 25)
      >>> result = optax_sam.landscape.Plane(x, x, 5 * x[:, None] ** 2 + x**2)
      >>> axes = optax_sam.landscape.plot_contour(result)
      >>> print(axes.get_xlabel())
      first direction
    """
    axes = _axes(axes)
    losses = np.where(np.isfinite(result.losses), result.losses, np.nan)
    if np.all(np.isnan(losses)):
        msg = "`result` must hold a finite loss to draw, got a plane without any."
        raise ValueError(msg)
    if np.ndim(levels) == 0:
        _checks.number("levels", levels, low=2, integer=True)
        levels = int(cast("int", levels))
        low, high = float(np.nanmin(losses)), float(np.nanmax(losses))
        is_log = log and high > 0.0
        if is_log:
            low, high = max(low, 1e-4 * high), max(high, 1e-30) * (1 + 1e-6)
        # Levels must increase, also if the loss is constant on the plane.
        high = max(high, low + 1e-6 * (max(abs(low), abs(high)) or 1.0))
        levels = np.geomspace(low, high, levels) if is_log else np.linspace(low, high, levels)
    levels = np.asarray(levels)
    if levels.size < 2:
        msg = f"`levels` must be two increasing numbers or more, or how many, got {levels.tolist()}."
        raise ValueError(msg)
    norm = _data.extra("matplotlib.colors").BoundaryNorm(levels, 256, extend="both")
    filled = axes.contourf(
        result.x, result.y, losses.T, levels=levels, norm=norm, cmap="viridis", extend="both"
    )
    axes.contour(result.x, result.y, losses.T, levels=levels, colors="white", linewidths=0.4, alpha=0.6)
    if path is not None:
        axes.plot(*path.coordinates.T, ".-", color="white", linewidth=1.0, markersize=3)
        axes.plot(*path.coordinates[-1], "*", color="white", markersize=9)
    if colorbar:
        axes.figure.colorbar(filled, ax=axes, label="loss", format="%.2g")
    axes.set_xlabel("first direction")
    axes.set_ylabel("second direction")
    return axes


def plot_surface(result: Plane, axes: Any = None, *, largest: float | None = None) -> Any:
    """Draws the loss on a plane as a surface.

    Args:
      result: A result of `plane`.
      axes: The matplotlib axes to draw in, with `projection="3d"`. None makes a new figure.
      largest: The value at which the loss is cut off and the axis ends, > 0. None cuts nothing. Give two
        pictures the same value to compare them.

    Returns:
      The axes. `axes.figure.savefig("surface.png")` writes the picture.

    Raises:
      ImportError: If the extra `sharpness` is not installed.

    Examples:
      >>> import numpy as np, optax_sam
      >>> x = np.linspace(-1.0, 1.0, 25)
      >>> result = optax_sam.landscape.Plane(x, x, 5 * x[:, None] ** 2 + x**2)
      >>> axes = optax_sam.landscape.plot_surface(result, largest=4.0)
      >>> print(axes.get_zlim()[1])
      4.0
    """
    if largest is not None:
        _checks.number("largest", largest, low=0.0, above=True)
    axes = _axes(axes, projection="3d")
    losses = np.where(np.isfinite(result.losses), result.losses, np.inf if largest else np.nan)
    if largest is not None:
        losses = np.minimum(losses, largest)
    grid = np.meshgrid(result.x, result.y, indexing="ij")
    # Colors follow the root of the loss, so that they distinguish small losses.
    low, high = float(np.nanmin(losses)), float(np.nanmax(losses)) if largest is None else largest
    norm = _data.extra("matplotlib.colors").PowerNorm(0.5, low, high)
    axes.plot_surface(
        *grid, losses, cmap="viridis", norm=norm, rstride=1, cstride=1,
        linewidth=0.15, edgecolor=(1, 1, 1, 0.35), antialiased=True,
    )  # fmt: skip
    if largest is not None:
        axes.set_zlim(min(0.0, low), largest)
    axes.set_xlabel("first direction")
    axes.set_ylabel("second direction")
    axes.set_zlabel("loss")
    return axes
