"""Handwritten digits with wrong labels: the data, two small networks and the training loop."""

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits
from tqdm import tqdm

import optax_sam

NUM_TRAIN = 1000
NUM_CLASSES = 10


class Digits(NamedTuple):
    """One split of the data.

    Attributes:
      images: Training images, standardised. shape=(1000, 64)
      labels: Training labels, some of them wrong. shape=(1000,)
      flipped: Which labels are wrong. shape=(1000,)
      test_images: The other images. shape=(797, 64)
      test_labels: Their labels, all of them right. shape=(797,)
    """

    images: jax.Array
    labels: jax.Array
    flipped: jax.Array
    test_images: jax.Array
    test_labels: jax.Array


def pixels(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's digits in random order, the training images first; pixels from 0 to 1."""
    images, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(images))
    return images[order] / 16, labels[order]


def scale(images: np.ndarray) -> tuple[np.ndarray, np.floating]:
    """What standardises images: the mean of every pixel of the training images, and their deviation."""
    return images[:NUM_TRAIN].mean(axis=0), images[:NUM_TRAIN].std()


def load(seed: int, label_noise: float) -> Digits:
    """Splits scikit-learn's digits; exactly `round(label_noise * 1000)` training labels become wrong."""
    rng = np.random.default_rng(seed)
    images, labels = pixels(rng)
    mean, std = scale(images)
    images = ((images - mean) / std).astype(np.float32)

    wrong = rng.choice(NUM_TRAIN, round(label_noise * NUM_TRAIN), replace=False)
    flipped = np.isin(np.arange(NUM_TRAIN), wrong)
    noisy = labels[:NUM_TRAIN].copy()
    noisy[wrong] = (noisy[wrong] + rng.integers(1, NUM_CLASSES, len(wrong))) % NUM_CLASSES
    arrays = images[:NUM_TRAIN], noisy, flipped, images[NUM_TRAIN:], labels[NUM_TRAIN:]
    return Digits(*map(jnp.asarray, arrays))


def batch_order(seed: int, epochs: int, batch_size: int) -> jax.Array:
    """Which images are in which batch: (epochs, batches, batch_size). A smaller last batch is dropped."""
    rng = np.random.default_rng([seed, 1])
    batches = NUM_TRAIN // batch_size
    rows = [rng.permutation(NUM_TRAIN)[: batches * batch_size] for _ in range(epochs)]
    return jnp.asarray(np.reshape(rows, (epochs, batches, batch_size)))


class MLP(nn.Module):
    """64-256-256-10 with ReLU."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of a batch of images of shape (batch, 64)."""
        x = images
        for width in (256, 256):
            x = nn.relu(nn.Dense(width, kernel_init=nn.initializers.he_normal())(x))
        return nn.Dense(NUM_CLASSES, kernel_init=nn.initializers.he_normal())(x)


class Conv(nn.Module):
    """A 3 x 3 convolution with a padding of 1, as nine shifted slices and one product of matrices.

    XLA's own convolution is very slow on a CPU inside of `lax.scan`, where an epoch runs; on an
    accelerator write `nn.Conv(features, (3, 3), strides, padding=1)`, whose params are the same.
    """

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """From (batch, height, width, channels) to (batch, height / stride, width / stride, features)."""
        _, height, width, channels = x.shape
        kernel = self.param("kernel", nn.initializers.he_normal(), (3, 3, channels, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        slices = [
            padded[:, i : i + height : self.stride, j : j + width : self.stride]
            for i in range(3)
            for j in range(3)
        ]
        return jnp.concatenate(slices, axis=-1) @ kernel.reshape(-1, self.features) + bias


class CNN(nn.Module):
    """Two convolutions, of 16 and 32 features, and a hidden layer of 128 units."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of a batch of images of shape (batch, 64)."""
        x = images.reshape(-1, 8, 8, 1)
        x = nn.relu(Conv(16)(x))
        x = nn.relu(Conv(32, stride=2)(x))
        x = x.reshape(len(x), -1)
        x = nn.relu(nn.Dense(128, kernel_init=nn.initializers.he_normal())(x))
        return nn.Dense(NUM_CLASSES, kernel_init=nn.initializers.he_normal())(x)


MODELS = {"mlp": MLP, "cnn": CNN}


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over a batch."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


@functools.partial(jax.jit, static_argnums=0)
def initial_params(model: nn.Module, seed: int) -> optax.Params:
    """The params that a seed gives a model."""
    return model.init(jax.random.key(seed), jnp.zeros((1, 64)))["params"]


def make_train_step(
    model: nn.Module, variant: optax_sam.SharpnessAwareTransformation | None, **options: Any
) -> Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, jax.Array]]:
    """One step of a stock `TrainState`: plain, if the variant is None, or sharpness-aware.

    Options are those of `sam_value_and_grad`; images and labels are the arguments 1 and 2 of the loss.
    """
    # In two parts, for variants that look at the outputs of the network; all others take it as it is.
    loss_fn = optax_sam.CompositeLoss(
        lambda params, images: model.apply({"params": params}, images), cross_entropy
    )

    def plain_step(state: TrainState, images: jax.Array, labels: jax.Array) -> tuple[TrainState, jax.Array]:
        loss, grads = jax.value_and_grad(loss_fn)(state.params, images, labels)
        return state.apply_gradients(grads=grads), loss

    def sam_step(state: TrainState, images: jax.Array, labels: jax.Array) -> tuple[TrainState, jax.Array]:
        value_and_grad = optax_sam.sam_value_and_grad(loss_fn, variant, **options)
        loss, grads = value_and_grad(state.params, images, labels, state=state.opt_state)
        return state.apply_gradients(grads=grads), loss

    return plain_step if variant is None else sam_step


class Arm(NamedTuple):
    """One way to train, to be compared with others.

    Attributes:
      name: What the tables call it.
      variant: The bare variant for `sam_value_and_grad`; None for plain gradients.
      tx: The optimizer that contains it.
      options: Further options of `sam_value_and_grad`.
    """

    name: str
    variant: optax_sam.SharpnessAwareTransformation | None
    tx: optax.GradientTransformation
    options: dict[str, Any] | None = None


class Curves(NamedTuple):
    """What was measured after every epoch; all of shape (seeds, epochs).

    Attributes:
      test: Accuracy on the test images.
      train: Accuracy on the training images, by the labels given.
      memorised: Share of the wrong labels that the network reproduces.
      seconds: Time that the epoch took, without compilation and without these measurements.
    """

    test: np.ndarray
    train: np.ndarray
    memorised: np.ndarray
    seconds: np.ndarray


@functools.partial(jax.jit, static_argnums=0)
def _measure(model: nn.Module, params: optax.Params, data: Digits) -> tuple[jax.Array, jax.Array, jax.Array]:
    right = jnp.argmax(model.apply({"params": params}, data.test_images), axis=-1) == data.test_labels
    fitted = jnp.argmax(model.apply({"params": params}, data.images), axis=-1) == data.labels
    memorised = jnp.sum(fitted & data.flipped) / jnp.maximum(jnp.sum(data.flipped), 1)
    return jnp.mean(right), jnp.mean(fitted), memorised


class _Trainer:
    """One arm, and the compiled program that trains it for an epoch."""

    def __init__(self, model: nn.Module, arm: Arm) -> None:
        self.model, self.tx = model, arm.tx
        train_step = make_train_step(model, arm.variant, **(arm.options or {}))

        @jax.jit
        def train_epoch(state: TrainState, data: Digits, order: jax.Array) -> tuple[TrainState, jax.Array]:
            def step(state: TrainState, rows: jax.Array) -> tuple[TrainState, jax.Array]:
                return train_step(state, data.images[rows], data.labels[rows])

            state, losses = jax.lax.scan(step, state, order)
            return state, jnp.mean(losses)

        self.train_epoch = train_epoch

    def init(self, seed: int) -> TrainState:
        """The same params for every arm of a seed."""
        params = initial_params(self.model, seed)
        return TrainState.create(apply_fn=self.model.apply, params=params, tx=self.tx)

    def timed_epoch(self, state: TrainState, data: Digits, order: jax.Array) -> tuple[TrainState, list[Any]]:
        """Trains for an epoch, then measures: test, train, memorised, seconds."""
        start = time.perf_counter()
        state, _ = jax.block_until_ready(self.train_epoch(state, data, order))
        seconds = time.perf_counter() - start
        return state, [*map(float, _measure(self.model, state.params, data)), seconds]


def train(
    arms: Sequence[Arm],
    seeds: Sequence[int],
    *,
    model: str = "mlp",
    label_noise: float = 0.4,
    epochs: int = 100,
    batch_size: int = 50,
    progress: bool = True,
) -> dict[str, Curves]:
    """Trains all arms on all seeds.

    Within a seed all arms have the same split, wrong labels, initial params and order of batches, and
    they take turns, an epoch each, so that whatever else the machine does slows all of them alike.

    Args:
      arms: What to compare.
      seeds: The seeds.
      model: "mlp" or "cnn".
      label_noise: The fraction of training labels to make wrong.
      epochs: How often to go through the training images.
      batch_size: Images in a batch.
      progress: Whether to show a progress bar, on a terminal.

    Returns:
      The curves of each arm, by its name.
    """
    trainers = [_Trainer(MODELS[model](), arm) for arm in arms]
    rows = np.zeros((len(arms), len(Curves._fields), len(seeds), epochs))
    hidden = None if progress else True  # None: where there is no terminal.
    with tqdm(total=len(seeds) * epochs, unit="epoch", dynamic_ncols=True, disable=hidden) as bar:
        bar.set_description("compiling")
        data, order = load(seeds[0], label_noise), batch_order(seeds[0], epochs, batch_size)
        for trainer in trainers:
            trainer.timed_epoch(trainer.init(seeds[0]), data, order[0])

        for s, seed in enumerate(seeds):
            bar.set_description(f"seed {seed}")
            data, order = load(seed, label_noise), batch_order(seed, epochs, batch_size)
            states = [trainer.init(seed) for trainer in trainers]
            for epoch in range(epochs):
                for a, trainer in enumerate(trainers):
                    states[a], rows[a, :, s, epoch] = trainer.timed_epoch(states[a], data, order[epoch])
                # The first arms are enough for one line.
                bar.set_postfix_str(
                    ", ".join(
                        f"{arm.name} test {row[0, s, epoch]:.1%} train {row[1, s, epoch]:.1%}"
                        for arm, row in zip(arms[:2], rows, strict=False)
                    ),
                    refresh=False,
                )
                bar.update()
    return {arm.name: Curves(*row) for arm, row in zip(arms, rows, strict=True)}


def stack(trees: Iterable[Any]) -> Any:
    """Pytrees of the same shapes as one, with a new first axis for `jax.vmap`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def train_at_once(
    arm: Arm,
    seeds: Sequence[int],
    data: Digits,
    *,
    model: str = "mlp",
    epochs: int = 100,
    batch_size: int = 50,
    after_epoch: Callable[[], object] = lambda: None,
) -> tuple[optax.Params, Curves]:
    """Trains one arm on many splits at once, in one vmapped program; otherwise as `train` does it.

    Args:
      arm: How to train.
      seeds: The seeds of the initial params and of the order of batches, one for each split.
      data: The splits, stacked.
      model: "mlp" or "cnn".
      epochs: How often to go through the training images.
      batch_size: Images in a batch.
      after_epoch: Called after every epoch, for a progress bar.

    Returns:
      The final params, stacked, and the curves, with a row for each split; the seconds are those of all
      splits together.
    """
    trainer = _Trainer(MODELS[model](), arm)
    train_epoch = jax.jit(jax.vmap(trainer.train_epoch))
    measure = jax.jit(jax.vmap(functools.partial(_measure, trainer.model)))
    states = stack(trainer.init(seed) for seed in seeds)
    order = jnp.stack([batch_order(seed, epochs, batch_size) for seed in seeds], axis=1)
    rows = np.zeros((len(Curves._fields), len(seeds), epochs))
    for epoch in range(epochs):
        start = time.perf_counter()
        states, _ = jax.block_until_ready(train_epoch(states, data, order[epoch]))
        rows[:3, :, epoch] = measure(states.params, data)
        rows[3, :, epoch] = time.perf_counter() - start
        after_epoch()
    return states.params, Curves(*rows)
