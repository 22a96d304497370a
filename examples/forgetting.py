"""What a network keeps of its task when it is fine-tuned to another one.

    python examples/forgetting.py
    python examples/forgetting.py --data digits --task classes

The networks of `quantize.py`, trained on the same images with the same optimizers and the numbers chosen
there, are fine-tuned with plain Adam, the same for all of them; images of the first task are not seen again.
The averages of weights, which hardly differ from the last ones, are left out. The second task: the images
mirrored, or turned by 90 degrees, with the same classes; or, after training on the classes 0 to 4, the
classes 5 to 9.

A network that learns slowly forgets slowly too. So the accuracy on the old task is read off where that on the
new one first reaches the same level for all.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import quantize
import reporting
import small_images
from matplotlib.figure import Figure
from quantize import ARMS, BATCH, CHOSEN, RUNS
from reporting import number
from tqdm import tqdm

TASKS = ("mirrored", "rotated", "classes")
LEVELS = (70, 80, 90)
"""Accuracies on the new task, in percent, at which the old one is looked at."""
EVERY = 5
"""Steps of fine-tuning between two measurements."""
TEST_SIZE = 500
"""Images of each task that a measurement looks at, at most."""
SHOWN = [name for name, arm in ARMS.items() if not arm.averaged]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, fine-tunes, reports and returns the numbers of the report."""
    options = parse(argv)
    settings = [(data, model) for data in options.data for model in options.model]
    paths: dict[str, dict[str, np.ndarray]] = {}
    total = len(settings) * options.seeds * len(RUNS) * (1 + ("classes" in options.task))
    with tqdm(total=total, unit="run", dynamic_ncols=True, disable=None) as bar:
        for data, model in settings:
            bar.set_description(f"{data}, {model}")
            for task, arms in measure(data, model, options, bar).items():
                paths[f"{data}, {model}, {task}"] = arms
    report = {setting: summarize(arms) for setting, arms in paths.items()}
    print(
        f"Fine-tuned for {options.steps} steps; mean over {options.seeds} paired seeds. Accuracy on the old "
        f"task in percent: before, and\nwhere the new one first reaches a level; gain: over AdamW there, "
        f"± half its 95 % interval."
    )
    words = reporting.conclude(options, meaning(report))
    print("", text_of({"settings": report}), "", words, sep="\n")
    curves = {
        setting: {arm: np.round(path, 2).tolist() for arm, path in arms.items()}
        for setting, arms in paths.items()
    }
    reporting.save(
        options, "forgetting", figure(paths, options), {"settings": report, "meaning": words, "paths": curves}
    )
    return report


# The tasks.


def second_task(task: str, data: small_images.Data) -> tuple[small_images.Data, small_images.Data]:
    """The old task and the new one, of as many images for every seed."""
    if task == "classes":
        return of_classes(data, 0), of_classes(data, 5)

    def changed(images: jax.Array) -> jax.Array:
        return images[:, :, ::-1] if task == "mirrored" else jnp.rot90(images, axes=(1, 2))

    return data, data._replace(images=changed(data.images), test_images=changed(data.test_images))


def of_classes(data: small_images.Data, first: int) -> small_images.Data:
    """The images of five classes: of every ten images four for training, and four for the test."""

    def some(images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = np.flatnonzero((labels >= first) & (labels < first + 5))[: int(0.4 * len(labels))]
        return images[rows], labels[rows]

    train, test = some(data.images, data.labels), some(data.test_images, data.test_labels)
    return small_images.Data(*train, *test)


# Fine-tuning.


class FineTuning:
    """Plain Adam on the second task; one program for all seeds, tasks and networks to begin with."""

    def __init__(self, network: Any, steps: int, learning_rate: float) -> None:
        """Makes the program."""
        self.network, self.steps = network, steps
        tx = optax.adam(learning_rate)

        def both(params: optax.Params, old: small_images.Data, new: small_images.Data) -> jax.Array:
            return jnp.stack(
                [
                    small_images.accuracy(
                        network, params, task.test_images[:TEST_SIZE], task.test_labels[:TEST_SIZE]
                    )
                    for task in (old, new)
                ]
            )

        @jax.jit
        def run(
            params: optax.Params, old: small_images.Data, new: small_images.Data, order: jax.Array
        ) -> jax.Array:
            def step(carry: Any, rows: jax.Array) -> Any:
                params, state = carry
                gradient = jax.grad(small_images.loss, argnums=1)(
                    network, params, new.images[rows], new.labels[rows]
                )
                updates, state = tx.update(gradient, state, params)
                return (optax.apply_updates(params, updates), state), None

            def some_steps(carry: Any, rows: jax.Array) -> Any:
                accuracies = both(carry[0], old, new)
                carry, _ = jax.lax.scan(step, carry, rows)
                return carry, accuracies

            carry, path = jax.lax.scan(some_steps, (params, tx.init(params)), order)
            return jnp.concatenate([path, both(carry[0], old, new)[None]])

        self.run = run

    def path(
        self, params: optax.Params, old: small_images.Data, new: small_images.Data, seed: int
    ) -> np.ndarray:
        """Accuracy on the old and on the new task, before, and after every few steps. shape=(points, 2)."""
        rng = np.random.default_rng([seed, 3])
        shape = (self.steps // EVERY, EVERY, BATCH)
        count = self.steps * BATCH
        passes = -(-count // len(new.images))
        rows = np.concatenate([rng.permutation(len(new.images)) for _ in range(passes)])[:count]
        return np.asarray(self.run(params, old, new, jnp.asarray(rows.reshape(shape))))


def measure(
    data: str, model: str, options: argparse.Namespace, bar: tqdm
) -> dict[str, dict[str, np.ndarray]]:
    """Of every task and arm the paths. shape=(seeds, points, 2)."""
    paths: dict[str, dict[str, list[np.ndarray]]] = {
        task: {name: [] for name in SHOWN} for task in options.task
    }
    groups = [
        [task for task in options.task if task != "classes"],
        ["classes"] if "classes" in options.task else [],
    ]
    for group in filter(None, groups):
        bench = None
        for seed in reporting.seeds_of(options):
            split = small_images.load(data, seed, options.train_size)
            tasks = {task: second_task(task, split) for task in group}
            first, _ = tasks[group[0]]
            if bench is None:
                bench = quantize.Bench(model, len(first.images), options.epochs)
                tuning = FineTuning(bench.network, options.steps, options.learning_rate)
            networks = bench.train_all(first, seed, CHOSEN[data, model], bar)
            for task, (old, new) in tasks.items():
                for name in SHOWN:
                    paths[task][name].append(tuning.path(networks[name], old, new, seed))
    return {task: {name: np.array(rows) for name, rows in arms.items()} for task, arms in paths.items()}


# Report.


def old_at(path: np.ndarray, level: float) -> float:
    """Accuracy on the old task where that on the new one first reaches a level; NaN if it never does.

    Between two measurements both are taken to change in a straight line.
    """
    old, new = path.T
    reached = np.flatnonzero(new >= level)
    if not len(reached):
        return np.nan
    i = reached[0]
    if i == 0:
        return float(old[0])
    part = (level - new[i - 1]) / (new[i] - new[i - 1])
    return float(old[i - 1] + part * (old[i] - old[i - 1]))


def summarize(arms: dict[str, np.ndarray]) -> dict[str, Any]:
    """The numbers of the table; a level that not every run of an arm reaches is left out there."""
    before = {name: paths[:, 0, 0] for name, paths in arms.items()}
    at = {
        level: {name: np.array([old_at(path, level) for path in paths]) for name, paths in arms.items()}
        for level in LEVELS
    }
    report: dict[str, Any] = {}
    for name in arms:
        row: dict[str, Any] = {
            "before": reporting.spread(before[name]),
            "at": {},
            "gain": {},
            "SAM ahead": {},
        }
        for level, values in at.items():
            if np.all(np.isfinite(values[name])):
                row["at"][str(level)] = reporting.spread(values[name])
                for what, gain in (
                    ("gain", values[name] - values["AdamW"]),
                    ("SAM ahead", values["SAM"] - values[name]),
                ):
                    if np.all(np.isfinite(gain)):
                        row[what][str(level)] = reporting.gain_over(gain, np.zeros(len(gain)))
        report[name] = row
    return report


def table(setting: str, rows: dict[str, Any]) -> str:
    """A setting as text."""
    heads = [cell for level in LEVELS for cell in (f"at {level}", "gain")]
    lines = [(setting, "before", *heads)]
    for name, row in rows.items():
        cells = [f"{row['before']['mean']:.1f}"]
        for level in map(str, LEVELS):
            at, gain = row["at"].get(level), row["gain"].get(level)
            cells.append("-" if at is None else f"{at['mean']:.1f}")
            cells.append("" if name == "AdamW" or gain is None else reporting.interval(gain))
        lines.append((name, *cells))
    return reporting.align(lines)


def text_of(content: dict[str, Any]) -> str:
    """The tables as RESULTS.md has them, from what is in the JSON."""
    return "\n\n".join(table(setting, rows) for setting, rows in content["settings"].items())


def meaning(report: dict[str, Any]) -> str:
    """What a paired t-test at 5 % says of SAM, in words; of the other arms at the lowest level."""
    lines = []
    for setting, rows in report.items():
        gains = {f"at {level}": gain for level, gain in rows["SAM"]["gain"].items()}
        lines.append(f"{setting}, SAM against AdamW: {judged(gains)}")
        level = str(LEVELS[0])
        ahead = {
            name: row["SAM ahead"][level]
            for name, row in rows.items()
            if name not in ("AdamW", "SAM") and level in row["SAM ahead"]
        }
        lines.append(f"{setting}, SAM at {level} against the others: {judged(ahead)}")
    return "\n".join(lines)


def judged(gains: dict[str, Any]) -> str:
    """The gains by what the test says of them."""
    says: dict[str, list[str]] = {"better": [], "worse": [], "unclear": []}
    for name, gain in gains.items():
        says[reporting.judge(gain)].append(f"{name} {reporting.interval(gain)}")
    return quantize.in_words(says) if gains else "a level was not reached."


def figure(paths: dict[str, dict[str, np.ndarray]], options: argparse.Namespace) -> Figure:
    """Accuracy on the old task against accuracy on the new one."""
    tasks = len(options.task)
    rows = len(paths) // tasks
    picture = Figure(figsize=(0.6 + 4.8 * tasks, 0.9 + 3.2 * rows), layout="constrained")
    grid = picture.subplots(rows, tasks, squeeze=False)
    for axes, (setting, arms) in zip(grid.flat, paths.items(), strict=True):
        data, model, task = setting.split(", ")
        draw(axes, arms)
        axes.set_title(f"{quantize.TITLES[data]}, {quantize.TITLES[model]}: {task}", loc="left", fontsize=11)
    reporting.head(
        picture,
        "What is left of the old task when a network learns a new one",
        f"Mean over {options.seeds} paired seeds; bars: its 95 % interval.",
    )
    return picture


def draw(axes: Any, arms: dict[str, np.ndarray]) -> None:
    """The lines of a setting: levels that all arms reach on all seeds."""
    reached = min(path[:, 1].max() for paths in arms.values() for path in paths)
    start = max(path[0, 1] for paths in arms.values() for path in paths)
    levels = np.linspace(start, reached, 8) if reached > start else np.array([start])
    ends = {}
    for name, paths in arms.items():
        values = np.array([[old_at(path, level) for level in levels] for path in paths])
        x = levels + 0.15 * (len(ends) - (len(arms) - 1) / 2)
        reporting.line_with_interval(axes, x, values, ARMS[name].colour)
        ends[name] = x[-1], values[:, -1].mean(), ARMS[name].colour
    reporting.style(axes, xlabel="new task: accuracy, %", ylabel="old task: accuracy, % (axis cut)")
    reporting.label_ends(axes, ends)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of this program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--data", nargs="+", choices=("digits", "mnist"), default=["digits", "mnist"], help="default: both")
    add("--model", nargs="+", choices=("mlp", "cnn"), default=["mlp", "cnn"], help="default: both")
    add(
        "--task",
        nargs="+",
        choices=TASKS,
        default=["mirrored", "rotated"],
        help="the new task (default: mirrored rotated)",
    )
    add(
        "--learning-rate",
        type=number(float, 0, above=True),
        default=3e-4,
        help="of the fine-tuning (default: %(default)s)",
    )
    add(
        "--train-size",
        type=number(int, 125, 1700),
        default=1000,
        help="images to train on (default: %(default)s)",
    )
    reporting.common_options(
        parser, "results/forgetting", seeds=(8, 2), epochs=(30, 2), steps=(100, 10, "steps of fine-tuning")
    )
    options = reporting.finish(parser, argv)
    if options.steps % EVERY:
        parser.error(f"argument --steps: must be a multiple of {EVERY}, got {options.steps}")
    return options


if __name__ == "__main__":
    main()
