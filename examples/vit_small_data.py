"""Networks without convolutions, little data, labels all right: what SAM adds to AdamW.

    python examples/vit_small_data.py
    python examples/vit_small_data.py --train-size 4000 --seeds 3

A vision transformer, an MLP-Mixer and a CNN, with about 50,000 params each, learn 1000 images of MNIST with
AdamW. Nothing but the optimizer differs between the two columns. After Chen, Hsieh and Gong, `When Vision
Transformers Outperform ResNets without Pre-training or Strong Data Augmentations
<https://arxiv.org/abs/2106.01548>`_, ICLR 2022.

Learning rate and radius were chosen for the vision transformer, on seed 0; the other two have the same.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import reporting
import small_images
from digits import Conv
from matplotlib.figure import Figure
from reporting import GREY, RED, number
from small_images import he_normal
from tqdm import tqdm

import optax_sam

BATCH = 50
LEARNING_RATE = 3e-3
GRID = (0.05, 0.1, 0.2)
RADII = {"vit": 0.1, "mixer": 0.1, "cnn": 0.1}
TITLES = {"vit": "ViT", "mixer": "MLP-Mixer", "cnn": "CNN"}


# The networks.


def patches(images: jax.Array, width: int = 7) -> jax.Array:
    """Squares of the images as rows. shape=(batch, patches, width ** 2)."""
    batch, side, _ = images.shape
    count = side // width
    squares = images.reshape(batch, count, width, count, width).swapaxes(2, 3)
    return squares.reshape(batch, count**2, width**2)


class ViT(nn.Module):
    """A vision transformer: two layers of width 48, four heads, the mean over the patches at the end."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of images of shape (batch, 28, 28)."""
        x = nn.Dense(48)(patches(images))
        x += self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
        for _ in range(2):
            x += nn.MultiHeadAttention(4)(nn.LayerNorm()(x))
            x += nn.Dense(48)(nn.gelu(nn.Dense(192 - 48)(nn.LayerNorm()(x))))
        return nn.Dense(10)(nn.LayerNorm()(x).mean(axis=1))


class Mixer(nn.Module):
    """An MLP-Mixer: two layers of width 64, which mix the patches, then the features."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of images of shape (batch, 28, 28)."""
        x = nn.Dense(64)(patches(images))
        for _ in range(2):
            y = nn.LayerNorm()(x).swapaxes(1, 2)
            x += nn.Dense(x.shape[1])(nn.gelu(nn.Dense(64)(y))).swapaxes(1, 2)
            x += nn.Dense(64)(nn.gelu(nn.Dense(160)(nn.LayerNorm()(x))))
        return nn.Dense(10)(nn.LayerNorm()(x).mean(axis=1))


class CNN(nn.Module):
    """Three convolutions, each of which halves the sides, and the mean over what is left."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of images of shape (batch, 28, 28)."""
        x = images[..., None]
        for features in (24, 48, 88):
            x = nn.relu(Conv(features, stride=2)(x))
        return nn.Dense(10, kernel_init=he_normal)(x.mean(axis=(1, 2)))


NETWORKS = {"vit": ViT, "mixer": Mixer, "cnn": CNN}


# Training.


class Bench:
    """A network and its two programs: AdamW, and SAM before it, whose number is the radius."""

    def __init__(self, network: str, train_size: int, epochs: int) -> None:
        """Makes the programs."""
        self.model, self.epochs = NETWORKS[network](), epochs
        rate = optax.cosine_decay_schedule(LEARNING_RATE, epochs * (train_size // BATCH))

        def sam(rho: Any) -> Any:
            variant = optax_sam.sam(rho)
            return variant, optax.chain(variant, optax.adamw(rate))

        self.plain = small_images.make_run(self.model, lambda: (None, optax.adamw(rate)))
        self.sam = small_images.make_run(self.model, sam)

    def accuracy(self, data: small_images.Data, seed: int, rho: float) -> float:
        """On the test images, in percent, after a run; without SAM if rho is 0."""
        order = small_images.batch_order(seed, len(data.images), self.epochs, BATCH)
        params = small_images.init(self.model, data.images, seed)
        run = self.sam if rho else self.plain
        weights = run(params, data, order, 0.0, *([rho] if rho else []))
        return float(small_images.accuracy(self.model, weights.last, data.test_images, data.test_labels))

    @property
    def size(self) -> int:
        """How many params."""
        shapes = jax.eval_shape(self.model.init, jax.random.key(0), jnp.zeros((1, 28, 28)))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, reports and returns the numbers of the report."""
    options = parse(argv)
    if options.tune:
        return {network: tune(network, options) for network in options.network}
    values: dict[str, dict[str, np.ndarray]] = {}
    with tqdm(total=2 * len(options.network) * options.seeds, unit="run", disable=None) as bar:
        for network in options.network:
            bar.set_description(network)
            bench = Bench(network, options.train_size, options.epochs)
            rows = []
            for seed in reporting.seeds_of(options):
                data = small_images.load("mnist", seed, options.train_size)
                row = []
                for rho in (0.0, RADII[network]):
                    row.append(bench.accuracy(data, seed, rho))
                    bar.update()
                rows.append(row)
            plain, sam = np.array(rows).T
            values[f"{TITLES[network]}, {bench.size} params"] = {"AdamW": plain, "with SAM": sam}
    report = reporting.compare(values)
    print(
        f"MNIST, {options.train_size} training images, {options.epochs} epochs, test accuracy in percent:\n"
        f"mean ± standard deviation over {options.seeds} paired seeds.\n"
    )
    words = reporting.conclude(options, meaning(report))
    content = {"networks": report, "radii": RADII, "meaning": words}
    print(text_of(content), words, sep="\n\n")
    reporting.save(options, "vit_small_data", figure(values, options), content)
    return report


def tune(network: str, options: argparse.Namespace) -> float:
    """Prints what every radius gives on seed 0, and returns the best."""
    bench = Bench(network, options.train_size, options.epochs)
    data = small_images.load("mnist", 0, options.train_size)
    scores = {rho: bench.accuracy(data, 0, rho) for rho in (0.0, *GRID)}
    best = max(GRID, key=scores.__getitem__)
    shown = ", ".join(f"{rho:g}: {score:.1f}" for rho, score in scores.items())
    print(f"{network}: {shown}; taken: {best:g}", flush=True)
    return best


def meaning(report: dict[str, Any]) -> str:
    """What a paired t-test says, in a line for each network."""
    return "\n".join(
        f"{name}: {reporting.verdict('SAM', 'AdamW', row['with SAM']['gain'], 'points')}."
        for name, row in report.items()
    )


def text_of(content: dict[str, Any]) -> str:
    """The tables as RESULTS.md has them, from what is in the JSON."""
    return reporting.comparison_table(content["networks"], "network")


def figure(values: dict[str, dict[str, np.ndarray]], options: argparse.Namespace) -> Figure:
    """Each network's two means, and every seed's gain."""
    picture = Figure(figsize=(8, 1.3 + 0.8 * len(values)), layout="constrained")
    left, right = picture.subplots(1, 2, sharey=True)
    for height, arms in enumerate(values.values()):
        plain, sam = (arms[name] for name in ("AdamW", "with SAM"))
        for accuracies, colour, shift in ((plain, GREY, -0.08), (sam, RED, 0.08)):
            half = reporting.half_width(accuracies) if options.seeds > 1 else None
            left.errorbar(accuracies.mean(), height + shift, xerr=half, fmt="o", color=colour, capsize=3)
        right.plot(sam - plain, np.full(options.seeds, height), "o", color=RED, alpha=0.5)
    plain, sam = next(iter(values.values())).values()
    left.annotate("AdamW", (plain.mean(), -0.2), color=GREY, ha="center", va="top")
    left.annotate("with SAM", (sam.mean(), 0.2), color=RED, ha="center", va="bottom")
    right.axvline(0, color=GREY, linewidth=1)
    heights = {"yticks": range(len(values)), "yticklabels": [name.replace(", ", "\n") for name in values]}
    limits = {"ylim": (-0.6, len(values) - 0.4)}
    reporting.style(left, xlabel="test accuracy, % (axis cut)", **heights, **limits)
    reporting.style(right, xlabel="gain of SAM, points", **limits)
    gains = ", ".join(
        f"{name.split(',')[0]} {(x['with SAM'] - x['AdamW']).mean():+.1f}" for name, x in values.items()
    )
    reporting.head(
        picture,
        f"{options.train_size} images of MNIST, gain of SAM in points: {gains}",
        f"{options.seeds} paired seeds. Left: the mean, bars: its 95 % interval. Right: a dot is a seed.",
    )
    return picture


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of this program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="default: vit mixer cnn")
    what = "images to train on; of 5000, the rest is for the test"
    add("--train-size", type=number(int, BATCH, 4000), default=1000, help=f"{what} (default: %(default)s)")
    add("--tune", action="store_true", help="try every radius of the grid on seed 0 instead")
    reporting.common_options(parser, "results/vit_small_data", seeds=(4, 2), epochs=(20, 1))
    return reporting.finish(parser, argv)


if __name__ == "__main__":
    main()
