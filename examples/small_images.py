"""Clean images, small networks, and whole runs as one program: shared by the examples on what SAM is for.

Those are `quantize.py`, `forgetting.py` and `vit_small_data.py`. Only the optimizer differs between the runs
of a seed: the images, the initial params and the batches are the same.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import image_data
import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import Conv, cross_entropy, make_train_step
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import optax_sam


class Data(NamedTuple):
    """One split of a data set; pixels have mean 0 and variance 1 over the training images.

    Attributes:
      images: Training images. shape=(examples, side, side)
      labels: Their classes. shape=(examples,)
      test_images: All the other images. shape=(others, side, side)
      test_labels: Their classes. shape=(others,)
    """

    images: jax.Array
    labels: jax.Array
    test_images: jax.Array
    test_labels: jax.Array


def load(name: str, seed: int, train_size: int) -> Data:
    """Draws the training images of "digits" (of 1797) or "mnist" (of 5000); the rest is for the test."""
    if name == "digits":
        images, labels = load_digits(return_X_y=True)
        images = images.reshape(-1, 8, 8)
    else:
        images, labels = image_data.mnist_5k()
        images = images[..., 0]
    order = np.random.default_rng([seed, 2]).permutation(len(images))
    train, test = order[:train_size], order[train_size:]
    images = (images - images[train].mean()) / images[train].std()
    arrays = images[train].astype(np.float32), labels[train], images[test].astype(np.float32), labels[test]
    return Data(*map(jnp.asarray, arrays))


def batch_order(seed: int, size: int, epochs: int, batch_size: int) -> jax.Array:
    """Which images are in the batch of which step. shape=(steps, batch_size)."""
    rng = np.random.default_rng([seed, 1])
    steps = size // batch_size
    rows = [rng.permutation(size)[: steps * batch_size].reshape(steps, batch_size) for _ in range(epochs)]
    return jnp.asarray(np.concatenate(rows))


he_normal = nn.initializers.he_normal()


class MLP(nn.Module):
    """Two hidden layers of 256 units."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of images of shape (batch, side, side)."""
        x = images.reshape(len(images), -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(256, kernel_init=he_normal)(x))
        return nn.Dense(10, kernel_init=he_normal)(x)


class CNN(nn.Module):
    """Two convolutions, of 16 and 32 features, and a hidden layer of 128 units."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of images of shape (batch, side, side)."""
        x = nn.relu(Conv(16, stride=1 if images.shape[1] < 16 else 2)(images[..., None]))
        x = nn.relu(Conv(32, stride=2)(x))
        x = nn.relu(nn.Dense(128, kernel_init=he_normal)(x.reshape(len(x), -1)))
        return nn.Dense(10, kernel_init=he_normal)(x)


MODELS = {"mlp": MLP, "cnn": CNN}


@functools.partial(jax.jit, static_argnums=0)
def init(model: nn.Module, images: jax.Array, seed: int) -> optax.Params:
    """The params that a seed gives a network for such images."""
    return model.init(jax.random.key(seed), images[:1])["params"]


class Weights(NamedTuple):
    """What a run ends with.

    Attributes:
      last: The params after the last step.
      averaged: The exponential moving average of the params, without bias to the first ones.
    """

    last: optax.Params
    averaged: optax.Params


Recipe = Callable[..., tuple[optax_sam.SharpnessAwareTransformation | None, optax.GradientTransformation]]
"""From numbers, such as a radius, to the bare variant, or None, and the optimizer that contains it."""
Run = Callable[..., Weights]
"""From initial params, data, order of the batches, decay of the average and the recipe's numbers."""


def make_run(model: nn.Module, recipe: Recipe) -> Run:
    """A whole run as one program, compiled once for all seeds and all numbers of the recipe.

    Args:
      model: The network.
      recipe: How to train.

    Returns:
      From initial params, data, the order of the batches, the decay of the average and the numbers of the
      recipe to the weights.
    """

    @jax.jit
    def run(params: optax.Params, data: Data, order: jax.Array, decay: Any, *numbers: Any) -> Weights:
        variant, tx = recipe(*numbers)
        train_step = make_train_step(model, variant)

        def step(carry: tuple[TrainState, Any], rows: jax.Array) -> tuple[tuple[TrainState, Any], None]:
            state, average = carry
            state, _ = train_step(state, data.images[rows], data.labels[rows])
            return (state, optax.incremental_update(state.params, average, 1 - decay)), None

        state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
        (state, average), _ = jax.lax.scan(step, (state, optax.tree.zeros_like(params)), order)
        return Weights(state.params, optax.tree.bias_correction(average, decay, len(order)))

    return run


@functools.partial(jax.jit, static_argnums=0)
def accuracy(model: nn.Module, params: optax.Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The share of right predictions, in percent."""
    logits = model.apply({"params": params}, images)
    return 100 * jnp.mean(jnp.argmax(logits, axis=-1) == labels)


@functools.partial(jax.jit, static_argnums=0)
def loss(model: nn.Module, params: optax.Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The cross entropy."""
    return cross_entropy(model.apply({"params": params}, images), labels)
