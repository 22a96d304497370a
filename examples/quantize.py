"""Weights in a few bits: what is left of a network when its weights are rounded after training.

    python examples/quantize.py
    python examples/quantize.py --data mnist --model cnn
    python examples/quantize.py --tune

An MLP and a CNN learn 1000 digits or 1000 images of MNIST, all labels right, with AdamW and its usual
learning rate of 0.001. Then the weights of every output channel are rounded to evenly spaced values around
0: 127, 7, 3 or 1 of them on each side for 8, 4, 3 or 2 bits, the outermost at the channel's largest weight.
In "clipped", 2 bits too, the outermost is where the squared error of the channel is least. No data is looked
at, nothing is trained afterwards, and biases stay. Only the optimizer differs between the rows.

Radii, weight decays and the decay of the average were chosen with `--tune`, on the seeds 0 to 2: the best in
2 bits of those that cost at most half a point of AdamW's accuracy before rounding.
"""

import argparse
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import reporting
import small_images
from matplotlib.figure import Figure
from reporting import BLUE, GOLD, GREEN, GREY, RED, VIOLET, number
from tqdm import tqdm

import optax_sam

BITS = {"float": None, "8 bits": 8, "4 bits": 4, "3 bits": 3, "2 bits": 2, "clipped": 2}
BATCH = 50


class Arm(NamedTuple):
    """A row of the table.

    Attributes:
      run: Which run it looks at: one of `RUNS`.
      averaged: Whether at the average of its weights, or at the last.
      gradients: Gradient evaluations a step.
      colour: Of its line.
    """

    run: str
    averaged: bool
    gradients: float
    colour: str


ARMS = {
    "AdamW": Arm("AdamW", False, 1, GREY),
    "EMA": Arm("AdamW", True, 1, VIOLET),
    "tuned decay": Arm("tuned decay", False, 1, BLUE),
    "SAM": Arm("SAM", False, 2, RED),
    "SAM + EMA": Arm("SAM", True, 2, GOLD),
    "every 5th": Arm("every 5th", False, 1.2, GREEN),
}
RUNS = ("AdamW", "tuned decay", "SAM", "every 5th")

GRIDS = {
    "EMA": (0.9, 0.98, 0.99),
    "tuned decay": (0.1, 1.0, 3.0, 10.0),
    "SAM": (0.1, 0.2, 0.4, 0.6),
    "every 5th": (0.4, 0.8, 1.6, 3.2),
}
"""What `--tune` tries: decays of the average, weight decays, radii."""
CHOSEN = {
    ("digits", "mlp"): {"EMA": 0.98, "tuned decay": 3.0, "SAM": 0.4, "every 5th": 1.6},
    ("digits", "cnn"): {"EMA": 0.98, "tuned decay": 1.0, "SAM": 0.4, "every 5th": 0.8},
    ("mnist", "mlp"): {"EMA": 0.99, "tuned decay": 10.0, "SAM": 0.6, "every 5th": 1.6},
    ("mnist", "cnn"): {"EMA": 0.98, "tuned decay": 3.0, "SAM": 0.1, "every 5th": 1.6},
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, rounds, reports and returns the numbers of the report."""
    options = parse(argv)
    if options.tune:
        return {setting: tune(*setting, options) for setting in settings(options)}
    runs = len(settings(options)) * options.seeds * len(RUNS)
    accuracies = {}
    with tqdm(total=runs, unit="run", dynamic_ncols=True, disable=None) as bar:
        for data, model in settings(options):
            bar.set_description(f"{data}, {model}")
            accuracies[f"{data}, {model}"] = measure(data, model, options, bar)
    report = summarize(accuracies)
    print(
        f"Test accuracy in percent after training on {options.train_size} images for {options.epochs} epochs;"
        f"\nmean over {options.seeds} paired seeds. Gain: over AdamW, in 2 bits, ± half its 95 % interval."
    )
    words = reporting.conclude(options, meaning(report))
    print("", text_of({"settings": report}), "", words, sep="\n")
    reporting.save(options, "quantize", figure(accuracies, options), {"settings": report, "meaning": words})
    return report


def settings(options: argparse.Namespace) -> list[tuple[str, str]]:
    """The data sets and networks asked for."""
    return [(data, model) for data in options.data for model in options.model]


# Rounding.


@functools.partial(jax.jit, static_argnums=(1, 2))
def rounded(params: optax.Params, bits: int, clipped: bool = False) -> optax.Params:
    """The params with the weights of every output channel, the last axis, in so many bits.

    Leaves of one axis, biases and scales, stay.

    Args:
      params: The params.
      bits: A weight becomes an integer of absolute value up to `2 ** (bits - 1) - 1`, times a step.
      clipped: The step of a channel: whether so large that its largest weight is the largest value, or of
        32 parts of that, those of the least squared error.

    Returns:
      The values that the integers stand for.
    """
    levels = 2 ** (bits - 1) - 1

    def round_leaf(w: jax.Array) -> jax.Array:
        if w.ndim < 2:
            return w
        channel = tuple(range(w.ndim - 1))
        largest = jnp.max(jnp.abs(w), axis=channel, keepdims=True)
        largest = jnp.where(largest == 0, 1, largest)

        def at(part: jax.Array) -> jax.Array:
            step = part * largest / levels
            return step * jnp.clip(jnp.round(w / step), -levels, levels)

        if not clipped:
            return at(jnp.ones(()))
        parts = jnp.arange(1, 33) / 32
        errors = jax.lax.map(lambda part: jnp.sum((at(part) - w) ** 2, axis=channel, keepdims=True), parts)
        return at(parts[jnp.argmin(errors, axis=0)])

    return jax.tree.map(round_leaf, params)


def in_bits(params: optax.Params, column: str) -> optax.Params:
    """The params as the column of that name in `BITS` looks at them."""
    bits = BITS[column]
    return params if bits is None else rounded(params, bits, column == "clipped")


# Training.


class Bench:
    """A network and the programs that train it, one for each optimizer, with AdamW behind all of them."""

    def __init__(self, model: str, train_size: int, epochs: int) -> None:
        """Makes the programs."""
        self.network, self.epochs = small_images.MODELS[model](), epochs
        rate = optax.cosine_decay_schedule(1e-3, epochs * (train_size // BATCH))
        self.runs = {
            "AdamW": small_images.make_run(self.network, lambda: (None, optax.adamw(rate))),
            "tuned decay": small_images.make_run(
                self.network, lambda decay: (None, optax.adamw(rate, weight_decay=decay))
            ),
            "SAM": self.sharpness_aware(optax_sam.sam, rate),
            "every 5th": self.sharpness_aware(
                lambda rho: optax_sam.gated(optax_sam.sam(rho), optax_sam.gates.every(5)), rate
            ),
        }

    def sharpness_aware(self, make: Callable[[Any], Any], rate: optax.Schedule) -> small_images.Run:
        """The program of a variant before AdamW; its number is the radius."""

        def recipe(rho: Any) -> Any:
            variant = make(rho)
            return variant, optax.chain(variant, optax.adamw(rate))

        return small_images.make_run(self.network, recipe)

    def train(
        self, data: small_images.Data, seed: int, run: str, decay: float, *numbers: float
    ) -> small_images.Weights:
        """The weights at the end of a run, and their average with this decay."""
        order = small_images.batch_order(seed, len(data.images), self.epochs, BATCH)
        params = small_images.init(self.network, data.images, seed)
        return self.runs[run](params, data, order, decay, *numbers)

    def train_all(
        self, data: small_images.Data, seed: int, chosen: dict[str, float], bar: tqdm
    ) -> dict[str, optax.Params]:
        """The weights of every arm."""
        weights = {}
        for run in RUNS:
            numbers = [chosen[run]] if run in chosen else []
            weights[run] = self.train(data, seed, run, chosen["EMA"], *numbers)
            bar.update()
        return {
            name: weights[arm.run].averaged if arm.averaged else weights[arm.run].last
            for name, arm in ARMS.items()
        }

    def accuracies(
        self, params: optax.Params, data: small_images.Data, columns: Iterable[str] = BITS
    ) -> list[float]:
        """On the test images, with as many bits as the columns say."""
        few = (in_bits(params, column) for column in columns)
        return [
            float(small_images.accuracy(self.network, w, data.test_images, data.test_labels)) for w in few
        ]


def measure(data: str, model: str, options: argparse.Namespace, bar: tqdm) -> dict[str, np.ndarray]:
    """Of every arm the accuracies. shape=(seeds, columns)."""
    bench = Bench(model, options.train_size, options.epochs)
    accuracies = {name: [] for name in ARMS}
    for seed in reporting.seeds_of(options):
        split = small_images.load(data, seed, options.train_size)
        for name, params in bench.train_all(split, seed, CHOSEN[data, model], bar).items():
            accuracies[name].append(bench.accuracies(params, split))
    return {name: np.array(rows) for name, rows in accuracies.items()}


def tune(data: str, model: str, options: argparse.Namespace) -> dict[str, float]:
    """Prints what every number of `GRIDS` gives on the seeds 0 to 2, and returns the best."""
    bench, best, least = Bench(model, options.train_size, options.epochs), {}, 0.0
    splits = [small_images.load(data, seed, options.train_size) for seed in range(3)]
    print(f"{data}, {model}: accuracy before rounding and in 2 bits, mean over the seeds 0 to 2", flush=True)
    for name, grid in {"AdamW": (None,), **GRIDS}.items():
        scores = {}
        for value in grid:
            rows = []
            for seed, split in enumerate(splits):
                if name == "AdamW":
                    params = bench.train(split, seed, name, 0.0).last
                elif name == "EMA":
                    params = bench.train(split, seed, "AdamW", value).averaged
                else:
                    params = bench.train(split, seed, name, 0.0, value).last
                rows.append(bench.accuracies(params, split, ("float", "2 bits")))
            scores[value] = np.mean(rows, axis=0)
        shown = ", ".join(
            f"{'' if value is None else f'{value:g}: '}{a:.1f} {b:.1f}" for value, (a, b) in scores.items()
        )
        if name == "AdamW":
            least = scores[None][0] - 0.5
        else:
            allowed = [value for value in grid if scores[value][0] >= least] or grid
            best[name] = max(allowed, key=lambda value, scores=scores: scores[value][1])
            shown += f"; taken: {best[name]:g}"
        print(f"  {name:14} {shown}", flush=True)
    return best


# Report.


def summarize(accuracies: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """The numbers of the table; gains are paired, seed by seed: over AdamW, and of SAM over each arm."""
    report: dict[str, Any] = {}
    for setting, arms in accuracies.items():
        report[setting] = {}
        for name, values in arms.items():
            columns = dict(zip(BITS, values.T, strict=True))
            base, sam = (dict(zip(BITS, arms[arm].T, strict=True)) for arm in ("AdamW", "SAM"))
            report[setting][name] = {
                "accuracy": {bits: reporting.spread(columns[bits]) for bits in BITS},
                "gain": {bits: reporting.gain_over(columns[bits], base[bits]) for bits in BITS},
                "SAM ahead": {bits: reporting.gain_over(sam[bits], columns[bits]) for bits in BITS},
            }
    return report


def table(setting: str, rows: dict[str, Any]) -> str:
    """A setting as text."""
    lines = [(setting, "cost", *BITS, "gain")]
    for name, row in rows.items():
        means = [f"{row['accuracy'][bits]['mean']:.1f}" for bits in BITS]
        gain = "" if name == "AdamW" else reporting.interval(row["gain"]["2 bits"])
        lines.append((name, f"{ARMS[name].gradients:g}", *means, gain))
    return reporting.align(lines)


def text_of(content: dict[str, Any]) -> str:
    """The tables as RESULTS.md has them, from what is in the JSON."""
    return "\n\n".join(table(setting, rows) for setting, rows in content["settings"].items())


def meaning(report: dict[str, Any]) -> str:
    """What a paired t-test at 5 % says of SAM, in words."""
    lines = []
    for setting, rows in report.items():
        says: dict[str, list[str]] = {"better": [], "worse": [], "unclear": []}
        for bits in BITS:
            gain = rows["SAM"]["gain"][bits]
            says[reporting.judge(gain)].append(f"{bits} {reporting.interval(gain)}")
        lines.append(f"{setting}, SAM against AdamW: {in_words(says)}")
        says = {"better": [], "worse": [], "unclear": []}
        for name in rows:
            if name not in ("AdamW", "SAM"):
                gain = rows[name]["SAM ahead"]["2 bits"]
                says[reporting.judge(gain)].append(f"{name} {reporting.interval(gain)}")
        lines.append(f"{setting}, SAM in 2 bits against the others: {in_words(says)}")
    return "\n".join(lines)


def in_words(says: dict[str, list[str]]) -> str:
    """The cases by what the test says of them."""
    return "; ".join(f"{word}: {', '.join(cases)}" for word, cases in says.items() if cases) + "."


TITLES = {"digits": "Digits", "mnist": "MNIST", "mlp": "MLP", "cnn": "CNN"}


def figure(accuracies: dict[str, dict[str, np.ndarray]], options: argparse.Namespace) -> Figure:
    """Accuracy against bits."""
    rows, columns = len(options.data), len(options.model)
    picture = Figure(figsize=(0.6 + 5 * columns, 0.9 + 3.4 * rows), layout="constrained")
    grid = picture.subplots(rows, columns, squeeze=False)
    for axes, (setting, arms) in zip(grid.flat, accuracies.items(), strict=True):
        draw(axes, arms)
        data, model = setting.split(", ")
        axes.set_title(f"{TITLES[data]}, {TITLES[model]}", loc="left", fontsize=11)
        axes.set_ylabel("test accuracy, % (axis cut)")
    column = list(BITS).index("2 bits")
    means = (np.mean([arms[name][:, column] for arms in accuracies.values()]) for name in ("AdamW", "SAM"))
    reporting.head(
        picture,
        "Weights rounded to 2 bits after training: AdamW keeps {:.0f} %, SAM {:.0f} %".format(*means),
        f"Mean over {options.seeds} paired seeds; bars: its 95 % interval. Title: mean over all panels.",
    )
    return picture


def draw(axes: Any, arms: dict[str, np.ndarray]) -> None:
    """The lines of a setting."""
    ends = {}
    for name, values in arms.items():
        # Side by side, so that no bar covers another.
        x = np.arange(values.shape[1]) + 0.06 * (len(ends) - (len(arms) - 1) / 2)
        lines = len(BITS) - 1
        reporting.line_with_interval(axes, x[:lines], values[:, :lines], ARMS[name].colour)
        # Two bits too, and so no further point of the line.
        reporting.line_with_interval(axes, x[lines:], values[:, lines:], ARMS[name].colour, line="")
        ends[name] = x[-1], values[:, -1].mean(), ARMS[name].colour
    reporting.style(axes)
    ticks = [name.replace("clipped", "2 bits,\nclipped") for name in BITS][: values.shape[1]]
    axes.set_xticks(range(len(ticks)), ticks)
    reporting.label_ends(axes, ends)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of this program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--data", nargs="+", choices=("digits", "mnist"), default=["digits", "mnist"], help="default: both")
    add("--model", nargs="+", choices=("mlp", "cnn"), default=["mlp", "cnn"], help="default: both")
    what = "images to train on"
    add("--train-size", type=number(int, BATCH, 1700), default=1000, help=f"{what} (default: %(default)s)")
    add("--tune", action="store_true", help="try every number of the grids on the seeds 0 to 2 instead")
    reporting.common_options(parser, "results/quantize", seeds=(8, 2), epochs=(30, 2))
    return reporting.finish(parser, argv)


if __name__ == "__main__":
    main()
