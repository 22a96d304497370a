"""What `cheap_sam.py` compares: three small tasks on which SAM gains something, and the ways to train."""

import copy
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import digits
import quantize
import small_images
import transformer_lm

import optax_sam


class Split(NamedTuple):
    """What a seed gives a task.

    Attributes:
      params: The initial params.
      train: What the loss takes besides params, for all training examples.
      test: What the score takes besides params.
    """

    params: Any
    train: tuple[jax.Array, ...]
    test: tuple[jax.Array, ...]


class Task(NamedTuple):
    """A problem.

    Attributes:
      title: What is measured.
      unit: Of the score.
      load: From a seed to a split.
      loss: `(params, *batch) -> loss`.
      score: `(params, *test) -> score`, the more the better.
      optimizer: From the number of steps to the base optimizer.
      epochs: How often to go through the training examples.
      batch_size: Examples in a step.
    """

    title: str
    unit: str
    load: Callable[[int], Split]
    loss: Callable[..., jax.Array]
    score: Callable[..., jax.Array]
    optimizer: Callable[[int], optax.GradientTransformation]
    epochs: int
    batch_size: int


def _momentum(rate: float) -> Callable[[int], optax.GradientTransformation]:
    return lambda steps: optax.sgd(optax.cosine_decay_schedule(rate, steps), momentum=0.9)


# Digits with wrong labels: what SAM keeps a network from is to learn them.


def _load_digits(seed: int) -> Split:
    data = digits.load(seed, 0.4)
    params = digits.initial_params(digits.MLP(), seed)
    return Split(params, (data.images, data.labels), (data.test_images, data.test_labels))


def _network_loss(network: Any) -> Callable[..., jax.Array]:
    def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        return digits.cross_entropy(network.apply({"params": params}, images), labels)

    return loss


def _accuracy(network: Any, bits: int | None = None) -> Callable[..., jax.Array]:
    def score(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        params = params if bits is None else quantize.rounded(params, bits)
        return small_images.accuracy(network, params, images, labels)

    return score


# MNIST with right labels: what SAM gains shows when the weights are rounded.


def _load_mnist(seed: int) -> Split:
    data = small_images.load("mnist", seed, 1000)
    params = small_images.init(small_images.MLP(), data.images, seed)
    return Split(params, (data.images, data.labels), (data.test_images, data.test_labels))


# Text, read many times over.

_CONTEXT, _SIZES = 64, {"width": 48, "heads": 4, "layers": 2, "dropout": 0.0}


def _transformer(key: jax.Array) -> transformer_lm.Transformer:
    return transformer_lm.Transformer(context=_CONTEXT, **_SIZES, rngs=nnx.Rngs(key))


@functools.cache
def _parts() -> tuple[Any, Any, Any]:
    """The graph, the params and what is neither, of a transformer whose params are replaced."""
    with jax.ensure_compile_time_eval():  # It is kept, so it must be no part of a trace.
        return nnx.split(_transformer(jax.random.key(0)), nnx.Param, ...)


def _load_text(seed: int) -> Split:
    _, text = transformer_lm.load(None, 30_000)
    tokens = np.frombuffer(text, np.uint8).astype(np.int32)
    length, held_out = _CONTEXT + 1, np.arange(len(tokens)) // 1000 % 3 == 2

    def pieces(part: np.ndarray) -> jax.Array:
        return jnp.asarray(part[: len(part) // length * length].reshape(-1, length))

    params = nnx.to_pure_dict(nnx.state(_transformer(jax.random.key(seed)), nnx.Param))
    return Split(params, (pieces(tokens[~held_out]),), (pieces(tokens[held_out]),))


def _text_loss(params: Any, tokens: jax.Array) -> jax.Array:
    graph, state, rest = _parts()
    state = copy.deepcopy(state)
    nnx.replace_by_pure_dict(state, params)
    return transformer_lm.bits_per_byte(nnx.merge(graph, state, rest), tokens, True)


@jax.jit
def _text_score(params: Any, tokens: jax.Array) -> jax.Array:
    return -_text_loss(quantize.rounded(params, 3), tokens)


def _adamw(steps: int) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-2, steps // 10, steps)
    return optax.adamw(rate, weight_decay=0.1)


TASKS = {
    "digits": Task(
        title="digits, 40 % of the labels wrong: test accuracy",
        unit="%",
        load=_load_digits,
        loss=_network_loss(digits.MLP()),
        score=_accuracy(digits.MLP()),
        optimizer=_momentum(0.01),
        epochs=100,
        batch_size=50,
    ),
    "mnist": Task(
        title="1000 images of MNIST, right labels: test accuracy with weights in 2 bits",
        unit="%",
        load=_load_mnist,
        loss=_network_loss(small_images.MLP()),
        score=_accuracy(small_images.MLP(), 2),
        optimizer=lambda steps: optax.adamw(optax.cosine_decay_schedule(1e-3, steps)),
        epochs=40,
        batch_size=50,
    ),
    "text": Task(
        title="a transformer on 20 kB of text: minus bits per byte with weights in 3 bits",
        unit="bits",
        load=_load_text,
        loss=_text_loss,
        score=_text_score,
        optimizer=_adamw,
        epochs=12,
        batch_size=16,
    ),
}


class Method(NamedTuple):
    """A way to train.

    Attributes:
      make: `(radius, base optimizer, steps) -> variant`; None is the base optimizer alone.
      gradients: Gradient evaluations a step, of the whole batch; None where the data decide.
      kinds: What share of the steps is like which step of a training, for their times.
      options: Of `sam_value_and_grad`; `batch_argnums` is added.
    """

    make: Callable[[Any, Any, int], Any] | None
    gradients: float | None
    kinds: dict[int, float] = {1: 1.0}  # noqa: RUF012 (a default that nobody changes)
    options: dict[str, Any] = {}  # noqa: RUF012


def make_run(task: Task, method: Method, epochs: int) -> Callable[[int, float], float]:
    """From a seed and a radius to the score at the end: one program for all of them."""

    @functools.partial(jax.jit, static_argnums=4)
    def run(params: Any, train: Any, order: jax.Array, rho: Any, steps: int) -> Any:
        base = task.optimizer(steps)
        if method.make is None:
            tx, value_and_grad = base, None
        else:
            variant = method.make(rho, base, steps)
            tx = variant if variant.is_optimizer else optax.chain(variant, base)
            options = method.options and {**method.options, "batch_argnums": range(1, 1 + len(train))}
            value_and_grad = optax_sam.sam_value_and_grad(task.loss, variant, **options)

        def step(carry: tuple[Any, Any], rows: jax.Array) -> tuple[tuple[Any, Any], None]:
            params, state = carry
            batch = [x[rows] for x in train]
            if value_and_grad is None:
                grads = jax.grad(task.loss)(params, *batch)
            else:
                _, grads = value_and_grad(params, *batch, state=state)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), order)[0][0]

    def score(seed: int, rho: float) -> float:
        split = task.load(seed)
        order = small_images.batch_order(seed, len(split.train[0]), epochs, task.batch_size)
        params = run(split.params, split.train, order, rho, len(order))
        return float(task.score(params, *split.test))

    return score


def _variant(make: Callable[[Any], Any], gate: Any = None) -> Callable[[Any, Any, int], Any]:
    if gate is None:
        return lambda rho, _base, _steps: make(rho)
    return lambda rho, _base, steps: optax_sam.gated(make(rho), gate(steps) if callable(gate) else gate)


_every, _window = optax_sam.gates.every, optax_sam.gates.window


def _each(k: int) -> dict[int, float]:
    return {0: 1 / k, 1: 1 - 1 / k}


METHODS = {
    "plain": Method(None, 1.0),
    "sam": Method(_variant(optax_sam.sam), 2.0),
    "every 5th step": Method(_variant(optax_sam.sam, _every(5)), 1.2, _each(5)),
    "every 10th step": Method(_variant(optax_sam.sam, _every(10)), 1.1, _each(10)),
    "every 20th step": Method(_variant(optax_sam.sam, _every(20)), 1.05, _each(20)),
    "every 5th, ascent on 1/4": Method(
        _variant(optax_sam.sam, _every(5)), 1.05, _each(5), {"ascent_examples": 0.25}
    ),
    "a random fifth": Method(_variant(optax_sam.sam, optax_sam.gates.randomly(0.2, key=0)), 1.2, {}),
    "first half": Method(_variant(optax_sam.sam, lambda steps: _window(0, steps // 2)), 1.5, {}),
    "last third": Method(_variant(optax_sam.sam, lambda steps: _window(2 * steps // 3)), 4 / 3, {}),
    "ae_sam": Method(_variant(optax_sam.ae_sam), None, {}),
    "looksam, k = 5": Method(_variant(lambda rho: optax_sam.looksam(rho, 5, 0.5)), 1.2, _each(5)),
    "every 2nd of looksam, k = 5": Method(
        _variant(lambda rho: optax_sam.looksam(rho, 5, 0.5), _every(2)), 1.1, {0: 0.1, 1: 0.5, 2: 0.4}
    ),
    "ascent on 1/5": Method(_variant(optax_sam.sam), 1.2, {1: 1.0}, {"ascent_examples": 0.2}),
    "weight_noise": Method(_variant(lambda scale: optax_sam.weight_noise(scale)), 1.0),
    "async_sam, perturbed": Method(_variant(lambda rho: optax_sam.async_sam(rho, reuse="perturbed")), 1.0),
    "msam": Method(lambda rho, base, _steps: optax_sam.msam(base, rho), 1.0),
    "msam along updates": Method(lambda rho, base, _steps: optax_sam.msam(base, rho, along="update"), 1.0),
}
