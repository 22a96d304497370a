"""Sharpness in a ball: how much the loss rises within a radius of params."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam import _checks, _tree
from optax_sam import ascent as ascents
from optax_sam.sharpness import _data
from optax_sam.sharpness._data import LossFn


class Estimate(NamedTuple):
    """A mean over random samples.

    Attributes:
      mean: The estimate.
      standard_error: Its standard error: the standard deviation of the samples divided by the root of
        their number.
    """

    mean: Any
    standard_error: Any

    @classmethod
    def of(cls, samples: jax.Array) -> Estimate:
        """The estimate from samples along the first axis."""
        return cls(jnp.mean(samples, axis=0), jnp.std(samples, axis=0, ddof=1) / len(samples) ** 0.5)


class SurrogateGap(NamedTuple):
    """The result of `surrogate_gap`.

    Attributes:
      gap: The perturbed minus the clean loss. shape=()
      eigenvalue: An estimate of the top eigenvalue of the Hessian, from the largest increase in the ball.
        It is right at a minimum and for a small radius. shape=()
    """

    gap: jax.Array
    eigenvalue: jax.Array


# In this file a point of the ball is w + c * z, with z of norm at most rho. The factor c is |w| in the
# adaptive case and 1 otherwise. Differentiation with respect to z therefore gives c * g.


def _displace(adaptive: bool, params: optax.Params, z: Any) -> optax.Params:
    return jax.tree.map(lambda w, x: w + jnp.abs(w) * x if adaptive else w + x, params, z)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _value_and_grad(
    loss_fn: LossFn, adaptive: bool, params: optax.Params, z: Any, batch: Any
) -> tuple[jax.Array, Any]:
    return jax.value_and_grad(lambda z: _data.scalar_loss(loss_fn, _displace(adaptive, params, z), batch))(z)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _increase(loss_fn: LossFn, adaptive: bool, params: optax.Params, z: Any, batch: Any) -> jax.Array:
    point = _displace(adaptive, params, z)
    return _data.scalar_loss(loss_fn, point, batch) - _data.scalar_loss(loss_fn, params, batch)


class _Climb(NamedTuple):
    """The state of a projected ascent: its best point, the loss and gradient there, and the next stride."""

    z: Any
    value: jax.Array
    gradient: Any
    stride: jax.Array


@functools.partial(jax.jit, static_argnums=0)
def _trial(ord: float, rho: jax.Array, climb: _Climb) -> Any:
    """The next point to try: one step in the steepest direction of the norm, projected into the ball."""
    direction = ascents.normalized(ord)(climb.gradient, climb.stride, climb.z)
    z = jax.tree.map(jnp.add, climb.z, direction)
    if ord == jnp.inf:
        return jax.tree.map(lambda x: jnp.clip(x, -rho, rho), z)
    return _tree.into_ball(z, _tree.norm(z), rho)


@jax.jit
def _accept(climb: _Climb, z: Any, value: jax.Array, gradient: Any) -> _Climb:
    """Moves to z if the loss is larger there; otherwise, also for a NaN, stays and halves the stride."""
    up = value > climb.value
    there = (z, value, gradient)
    best = jax.tree.map(lambda new, old: jnp.where(up, new, old), there, tuple(climb[:3]))
    return _Climb(*best, stride=jnp.where(up, climb.stride, climb.stride / 2))


Loop = Callable[[int, int, Callable[[Any, Any], Any], Any], Any]


def _on_host(first: int, last: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """`jax.lax.fori_loop` as a Python loop, for evaluations that iterate over batches."""
    for i in range(first, last):
        carry = body(i, carry)
    return carry


def _climb(
    evaluate: Callable[[Any], tuple[jax.Array, Any]],
    start: Any,
    at_start: tuple[jax.Array, Any],
    rho: jax.Array,
    ord: float,
    steps: int,
    loop: Loop,
) -> _Climb:
    """Projected ascent that never descends. From the center it first steps in the direction of SAM's step."""

    def step(_: Any, climb: _Climb) -> _Climb:
        z = _trial(ord, rho, climb)
        return _accept(climb, z, *evaluate(z))

    return loop(0, steps, step, _Climb(start, *at_start, stride=2.0 * rho))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _starts(ord: float, restarts: int, params: optax.Params, rho: jax.Array, key: jax.Array) -> list[Any]:
    """The starting points of the ascent: the center, and random points on the border of the ball.

    An ascent from the center does not move if the gradient is zero there.
    """
    starts = [_tree.zeros_like(params)]
    for each in jax.random.split(key, restarts) if restarts else ():
        noise = optax.tree.random_like(each, params, jax.random.normal)
        starts.append(ascents.normalized(ord)(noise, rho, params))
    return starts


def _check(rho: Any, ord: float, steps: int, restarts: int) -> None:
    _checks.number("rho", rho, low=0.0, above=True)
    if ord not in (2.0, jnp.inf):
        msg = f"`ord` must be 2.0 or inf, the norm of the ball, got {ord!r}."
        raise ValueError(msg)
    _checks.number("steps", steps, low=1, integer=True)
    _checks.number("restarts", restarts, low=0, integer=True)


def one_step_sharpness(
    loss_fn: LossFn,
    params: optax.Params,
    batches: Any,
    rho: float,
    *,
    ord: float = 2.0,
    adaptive: bool = False,
    progress: bool | None = None,
) -> jax.Array:
    r"""The sharpness that SAM penalizes: the increase of the loss along one ascent step.

    .. math:: L(w + \epsilon) - L(w), \quad \epsilon = \rho\,g / \|g\|_2

    Args:
      loss_fn: The loss, `(params, batch) -> scalar`: the mean over the examples of the batch. It should
        leave out weight decay and run the model as in evaluation.
      params: The params, any pytree of floating-point arrays. Measured in float32 or better.
      batches: One batch (an array, or a tuple, dict or other pytree of arrays whose first axis counts
        examples) or an iterable of batches (a list, a loader, a generator). Batches are processed one
        at a time and weighted by their sizes. The result is that of their union.
      rho: The radius, > 0.
      ord: The norm p of the ball, 2.0 or inf (a box, with the step :math:`\rho\,\mathrm{sign}(g)`).
      adaptive: Whether the radius is relative to each weight, :math:`\|\epsilon / |w|\|_p \le \rho`. The
        adaptive measure does not change with a rescaling of layers; the plain one does.
      progress: Whether to show a progress bar. None shows one on a terminal if the measure takes long.

    Returns:
      The increase of the loss. shape=(), float32 or better. It takes two passes over the batches.

    Raises:
      TypeError, ValueError: If an argument has the wrong type or is out of range, the loss is not a
        scalar or not finite at params, or there is no batch.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> def loss_fn(w, x):
      ...     return jnp.mean(x * (10 * w[0] ** 2 + w[1] ** 2)) / 2
      >>> w, x = jnp.array([3.0, 40.0]), jnp.ones(5)
      >>> sharpness = optax_sam.sharpness.one_step_sharpness(loss_fn, w, x, rho=0.1)
      >>> print(f"{sharpness:.3f}")  # rho |g| + rho^2 / 2 times the curvature along g = (30, 40)
      5.021

    References:
      Foret et al., `Sharpness-Aware Minimization <https://arxiv.org/abs/2010.01412>`_, ICLR 2021.
    """
    _check(rho, ord, 1, 0)
    params, batches = _data.prepare(loss_fn, params, batches)
    z = _first_step(loss_fn, params, batches, rho, ord, adaptive, progress)
    return _data.mean(functools.partial(_increase, loss_fn, adaptive, params, z), batches, progress=progress)


def _first_step(
    loss_fn: LossFn,
    params: optax.Params,
    batches: Iterable[Any],
    rho: Any,
    ord: float,
    adaptive: bool,
    progress: bool | None,
) -> Any:
    evaluate = functools.partial(_value_and_grad, loss_fn, adaptive, params, _tree.zeros_like(params))
    value, gradient = _data.mean(evaluate, batches, progress=progress, description="gradient")
    _data.finite("The loss and its gradient", (value, gradient))
    return _steepest(ord, gradient, rho)


@functools.partial(jax.jit, static_argnums=0)
def _steepest(ord: float, gradient: Any, rho: Any) -> Any:
    return ascents.normalized(ord)(gradient, rho, gradient)


def worst_case_sharpness(
    loss_fn: LossFn,
    params: optax.Params,
    batches: Any,
    rho: float,
    *,
    ord: float = 2.0,
    adaptive: bool = False,
    steps: int = 20,
    restarts: int = 1,
    key: Any = 0,
    progress: bool | None = None,
) -> jax.Array:
    r"""The largest increase of the loss in a ball, by projected ascent.

    .. math:: \max_{\|\epsilon / c\|_p \le \rho} \{L(w + \epsilon) - L(w)\}, \quad c = 1 \text{ or } |w|

    The ascent starts at the center and at random points of the border. It begins with strides of
    :math:`2\rho`, halves the stride after a step that does not increase the loss, and keeps the best point.
    The result is a lower bound of the maximum. With few steps it is close to the maximum if the loss is
    close to a quadratic that curves upwards. If the loss curves downwards along most directions, as at a
    saddle, take 100 steps. With few steps a result of 0 may mean that the ascent found no way up.

    Args:
      loss_fn: See `one_step_sharpness`, also for params and batches. All batches share one
        perturbation. In `m_sharpness` every m examples have their own.
      params: The params.
      batches: The batches.
      rho: The radius, > 0.
      ord: The norm p of the ball, 2.0 or inf.
      adaptive: Whether c is the size of the weights. The adaptive measure does not change with a
        rescaling of layers; the plain one does.
      steps: The number of ascent steps, >= 1.
      restarts: The number of additional ascents from random points, >= 0. At a minimum the gradient at
        the center is zero, and only these ascents find the maximum.
      key: The random key, or an integer seed.
      progress: Whether to show a progress bar. None shows one on a terminal if the measure takes long.

    Returns:
      The increase of the loss, >= 0. shape=(), float32 or better. It takes (steps + 1) (restarts + 1)
      passes over the batches, each with a gradient. A generator is therefore kept as a list.

    Raises:
      TypeError, ValueError: If an argument has the wrong type or is out of range, the loss is not a
        scalar or not finite at params, or there is no batch.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> def loss_fn(w, x):
      ...     return jnp.mean(x * (10 * w[0] ** 2 + w[1] ** 2)) / 2
      >>> at_minimum, x = jnp.zeros(2), jnp.ones(5)
      >>> sharpness = optax_sam.sharpness.worst_case_sharpness(loss_fn, at_minimum, x, rho=0.1)
      >>> print(f"{sharpness:.4f}")  # rho^2 / 2 times the top eigenvalue
      0.0500

    References:
      Keskar et al., `On Large-Batch Training for Deep Learning <https://arxiv.org/abs/1609.04836>`_,
      ICLR 2017; Andriushchenko et al., `A Modern Look at the Relationship between Sharpness and
      Generalization <https://arxiv.org/abs/2302.07011>`_, ICML 2023. They find that this measure
      follows the learning rate and does not reliably follow generalization. Their ascent uses momentum;
      this one uses backtracking.
    """
    _check(rho, ord, steps, restarts)
    params, batches = _data.prepare(loss_fn, params, batches)
    radius = jnp.asarray(rho, jnp.result_type(*jax.tree.leaves(params)))
    starts = _starts(ord, restarts, params, radius, _checks.key("key", key))
    with _data.progress_bar(progress, (steps + 1) * len(starts), "worst case") as tick:

        def evaluate(z: Any) -> tuple[jax.Array, Any]:
            tick()
            return _data.mean(
                functools.partial(_value_and_grad, loss_fn, adaptive, params, z), batches, progress=False
            )

        center = evaluate(starts[0])
        _data.finite("The loss and its gradient", center)
        best = jnp.zeros_like(center[0])
        for number, start in enumerate(starts):
            at_start = evaluate(start) if number else center
            climb = _climb(evaluate, start, at_start, radius, ord, steps, _on_host)
            best = jnp.fmax(best, climb.value - center[0])
    return best


def average_sharpness(
    loss_fn: LossFn,
    params: optax.Params,
    batches: Any,
    rho: float,
    *,
    adaptive: bool = False,
    num_samples: int = 100,
    key: Any = 0,
    progress: bool | None = None,
) -> Estimate:
    r"""The mean increase of the loss under Gaussian noise.

    .. math:: \mathbb{E}\,L(w + \epsilon) - L(w), \quad \epsilon_i \sim N(0, \rho^2 c_i^2), \quad
      c = 1 \text{ or } |w|

    At a minimum and for a small radius the mean is :math:`\tfrac{\rho^2}{2} \sum_i c_i^2 H_{ii}`.

    Args:
      loss_fn: See `one_step_sharpness`, also for params and batches.
      params: The params.
      batches: The batches.
      rho: The standard deviation of the noise of one weight, > 0. For P weights the norm of the noise is
        about :math:`\rho \sqrt P`.
      adaptive: Whether the noise is relative to the size of the weights. The adaptive measure does not
        change with a rescaling of layers; the plain one does.
      num_samples: The number of perturbations, >= 2. All batches use the same perturbations.
      key: The random key, or an integer seed.
      progress: Whether to show a progress bar. None shows one on a terminal if the measure takes long.

    Returns:
      The mean increase of the loss and its standard error. It takes one pass over the batches.

    Raises:
      TypeError, ValueError: If an argument has the wrong type or is out of range, the loss is not a
        scalar or not finite at params, or there is no batch.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> def loss_fn(w, x):
      ...     return jnp.mean(x * (10 * w[0] ** 2 + w[1] ** 2)) / 2
      >>> mean, error = optax_sam.sharpness.average_sharpness(
      ...     loss_fn, jnp.zeros(2), jnp.ones(5), rho=0.1, num_samples=1000, key=1)
      >>> print(f"{mean:.3f} +- {error:.3f}")  # rho^2 / 2 times the trace, 0.055
      0.055 +- 0.002

    References:
      Andriushchenko et al., `A Modern Look at the Relationship between Sharpness and Generalization
      <https://arxiv.org/abs/2302.07011>`_, ICML 2023.
    """
    _check(rho, 2.0, 1, 0)
    _checks.number("num_samples", num_samples, low=2, integer=True)
    params, batches = _data.prepare(loss_fn, params, batches, once=True)
    sample = functools.partial(_noise_increases, loss_fn, adaptive, num_samples, params, rho)
    clean, increases = _data.mean(
        functools.partial(sample, _checks.key("key", key)), batches, progress=progress
    )
    _data.finite("The loss", clean)
    return Estimate.of(increases)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _noise_increases(
    loss_fn: LossFn, adaptive: bool, num_samples: int, params: Any, rho: Any, key: Any, batch: Any
) -> Any:
    clean = _data.scalar_loss(loss_fn, params, batch)

    def increase(key: jax.Array) -> jax.Array:
        noise = optax.tree.random_like(key, params, jax.random.normal)
        point = _displace(adaptive, params, jax.tree.map(lambda x: rho * x, noise))
        return _data.scalar_loss(loss_fn, point, batch) - clean

    return clean, jax.lax.map(increase, jax.random.split(key, num_samples))


def m_sharpness(
    loss_fn: LossFn,
    params: optax.Params,
    batches: Any,
    rho: float,
    m: int,
    *,
    ord: float = 2.0,
    adaptive: bool = False,
    steps: int = 20,
    restarts: int = 1,
    chunk_size: int = 8,
    key: Any = 0,
    progress: bool | None = None,
) -> jax.Array:
    r"""The worst-case sharpness of m examples at a time, averaged.

    .. math:: \frac1N \sum_{S} |S| \max_{\|\epsilon / c\|_p \le \rho} \{L_S(w + \epsilon) - L_S(w)\}

    The sets S are disjoint and hold m successive examples each. SAM with batches of m examples lowers this
    kind of sharpness. Multiplication of m by a whole number joins sets and does not increase the sharpness.

    Args:
      loss_fn: See `one_step_sharpness`, also for params and batches.
      params: The params.
      batches: The batches. The examples that remain of a batch after sets of m form a smaller set, which
        is weighted by its size.
      rho: The radius, > 0.
      m: The number of examples that share a perturbation, >= 1.
      ord: See `worst_case_sharpness`, also for adaptive, steps and restarts.
      adaptive: Whether c is the size of the weights.
      steps: The number of ascent steps, >= 1.
      restarts: The number of additional ascents from random points, >= 0.
      chunk_size: The number of sets that are processed at once, each with a copy of params, >= 1.
      key: The random key, or an integer seed.
      progress: Whether to show a progress bar. None shows one on a terminal if the measure takes long.

    Returns:
      The mean increase of the loss, >= 0. shape=(), float32 or better. It takes one pass over the batches.

    Raises:
      TypeError, ValueError: If an argument has the wrong type or is out of range, the loss is not a
        scalar or not finite at params, or there is no batch.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> def loss_fn(w, x):  # The gradients of the examples 1 and -1 cancel.
      ...     return jnp.mean(x * w)
      >>> w, x = jnp.array(1.0), jnp.array([1.0, -1.0])
      >>> for m in (1, 2):
      ...     print(m, f"{optax_sam.sharpness.m_sharpness(loss_fn, w, x, rho=0.1, m=m):.3f}")
      1 0.100
      2 0.000

    References:
      Foret et al., `Sharpness-Aware Minimization <https://arxiv.org/abs/2010.01412>`_, ICLR 2021,
      section 4.1.
    """
    _check(rho, ord, steps, restarts)
    _checks.number("m", m, low=1, integer=True)
    _checks.number("chunk_size", chunk_size, low=1, integer=True)
    params, batches = _data.prepare(loss_fn, params, batches, once=True)
    radius = jnp.asarray(rho, jnp.result_type(*jax.tree.leaves(params)))
    starts = _starts(ord, restarts, params, radius, _checks.key("key", key))
    starts = jax.tree.map(lambda *xs: jnp.stack(xs), *starts)
    per_set = functools.partial(_mean_over_sets, loss_fn, m, ord, adaptive, steps, chunk_size)
    clean, increase = _data.mean(
        functools.partial(per_set, params, radius, starts), batches, progress=progress
    )
    _data.finite("The loss", clean)
    return increase


@functools.partial(jax.jit, static_argnums=tuple(range(6)))
def _mean_over_sets(
    loss_fn: LossFn,
    m: int,
    ord: float,
    adaptive: bool,
    steps: int,
    chunk_size: int,
    params: Any,
    rho: jax.Array,
    starts: Any,
    batch: Any,
) -> tuple[jax.Array, jax.Array]:
    size = _data.batch_size(batch)

    def largest(indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        chosen = jax.tree.map(lambda x: x[indices] if jnp.ndim(x) else x, batch)
        clean = _data.scalar_loss(loss_fn, params, chosen)

        def at(z: Any) -> Any:
            return _value_and_grad(loss_fn, adaptive, params, z, chosen)

        def from_start(start: Any) -> jax.Array:
            return _climb(at, start, at(start), rho, ord, steps, jax.lax.fori_loop).value

        values = jax.lax.map(from_start, starts)
        return clean, jnp.fmax(jnp.nanmax(values), clean) - clean

    whole = size - size % m
    total = jnp.zeros(()), jnp.zeros(())
    if whole:
        sets = jnp.arange(whole).reshape(-1, m)
        total = jax.tree.map(lambda x: m * jnp.sum(x), jax.lax.map(largest, sets, batch_size=chunk_size))
    if whole < size:
        rest = largest(jnp.arange(whole, size))
        total = jax.tree.map(lambda x, y: x + (size - whole) * y, total, rest)
    return jax.tree.map(lambda x: x / size, total)


def surrogate_gap(
    loss_fn: LossFn,
    params: optax.Params,
    batches: Any,
    rho: float,
    *,
    steps: int = 20,
    restarts: int = 1,
    key: Any = 0,
    progress: bool | None = None,
) -> SurrogateGap:
    r"""The surrogate gap of GSAM, and the estimate of the top eigenvalue that belongs to it.

    .. math:: h = L(w + \rho\,g / \|g\|_2) - L(w), \quad
      \lambda_1 \approx \frac{2}{\rho^2} \max_{\|\epsilon\|_2 \le \rho} \{L(w + \epsilon) - L(w)\}

    The gap is the one-step sharpness. The estimate of the eigenvalue uses the maximum in the ball instead,
    because near a minimum the step along the gradient misses the sharpest direction. Both change with a
    rescaling of layers.

    Args:
      loss_fn: See `one_step_sharpness`, also for params and batches.
      params: The params. The eigenvalue is right near a minimum.
      batches: The batches.
      rho: The radius, > 0.
      steps: See `worst_case_sharpness`, also for restarts and key.
      restarts: The number of additional ascents from random points, >= 0.
      key: The random key, or an integer seed.
      progress: Whether to show a progress bar. None shows one on a terminal if the measure takes long.

    Returns:
      The gap and the eigenvalue.

    Raises:
      TypeError, ValueError: As for `worst_case_sharpness`.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> def loss_fn(w, x):
      ...     return jnp.mean(x * (10 * w[0] ** 2 + w[1] ** 2)) / 2
      >>> gap = optax_sam.sharpness.surrogate_gap(loss_fn, jnp.zeros(2), jnp.ones(5), rho=0.1)
      >>> print(f"{gap.gap:.3f} {gap.eigenvalue:.3f}")
      0.000 10.000

    References:
      Zhuang et al., `Surrogate Gap Guided Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.08065>`_, ICLR 2022, lemma 3.3.
    """
    batches = _data.as_batches(batches)
    gap = one_step_sharpness(loss_fn, params, batches, rho, progress=progress)
    worst = worst_case_sharpness(
        loss_fn, params, batches, rho, steps=steps, restarts=restarts, key=key, progress=progress
    )
    return SurrogateGap(gap, 2.0 * worst / rho**2)
