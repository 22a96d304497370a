"""What the examples on images and text share: paired runs that take turns, their table and their curves."""

import abc
import argparse
import contextlib
import itertools
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import reporting
from matplotlib.figure import Figure
from reporting import (
    BLUE,
    GOLD,
    GREEN,
    GREY,
    RED,
    VIOLET,
    align,
    gain_over,
    make_folder,
    number,
    show,
    spread,
    style,
)
from tqdm import tqdm

COLOURS = (GREY, RED, BLUE, GREEN, GOLD, VIOLET)
Curves = dict[str, dict[str, np.ndarray]]
"""Of each arm, by its name: of each metric, its values after every epoch. shape=(seeds, epochs)"""


# Options.


Forms = Mapping[str, Mapping[str, Any]]
"""What stands in for options left out, by the condition under which it does; the first needs none."""


def defaults(name: str, forms: Forms) -> str:
    """For the help of an option: what stands in for it."""

    def shown(form: Mapping[str, Any]) -> str:
        value = form.get(name, "all")
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)

    values = {when: shown(form) for when, form in forms.items()}
    usual, *_ = values.values()
    return f"default: {usual}" + "".join(f", {when}: {x}" for when, x in values.items() if x != usual)


def run_options(parser: argparse.ArgumentParser, output: str, forms: Forms) -> None:
    """The options of every program that compares runs; `fill` puts in what stands in for those left out."""
    add = parser.add_argument
    for name, what in (
        ("epochs", "how often to go through the training set"),
        ("batch_size", "examples in a step"),
        ("seeds", "how many paired runs"),
    ):
        add(f"--{name.replace('_', '-')}", type=number(int, 1), help=f"{what} ({defaults(name, forms)})")
    add("--first-seed", type=number(int, 0), default=100, help="default: %(default)s")
    add("--output", type=Path, default=Path(output), help="folder for all results (default: %(default)s)")
    reporting.add_quick(parser)


@contextlib.contextmanager
def complaints(parser: argparse.ArgumentParser) -> Iterator[None]:
    """What goes wrong with the data is said as what goes wrong with options: in a line, without a trace."""
    try:
        yield
    except (OSError, ValueError, ImportError, pickle.UnpicklingError) as error:
        parser.error(str(error))


def fill(
    parser: argparse.ArgumentParser, options: argparse.Namespace, form: Mapping[str, Any]
) -> argparse.Namespace:
    """Fills in what the user left open, and makes the output folder before anything is trained."""
    for name, value in form.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    make_folder(parser, options)
    return options


# Runs.


class Trainer(abc.ABC):
    """One way to train, to be compared with others: a program fills in the methods.

    Attributes:
      name: What the tables call it.
      steps_per_epoch: How many steps `train` takes.
    """

    name: str
    steps_per_epoch: int

    @abc.abstractmethod
    def start(self, seed: int) -> tuple[Any, list[dict[str, float]]]:
        """The state to begin with, and what was measured in the epochs that are behind it already."""

    @abc.abstractmethod
    def train(self, state: Any, seed: int, epoch: int, tick: Callable[[], Any]) -> Any:
        """The state after an epoch; calls `tick` after every step."""

    @abc.abstractmethod
    def measure(self, state: Any, seed: int) -> dict[str, float]:
        """What the tables and figures show."""

    def keep(self, state: Any, seed: int, history: list[dict[str, float]]) -> None:
        """Called after every epoch, with all measurements so far: the place to log and to save."""
        del state, seed, history  # Not every program keeps something.


def compare(trainers: Sequence[Trainer], seeds: Sequence[int], epochs: int) -> Curves:
    """Trains all on all seeds.

    They take turns, an epoch each, so that whatever else the machine does slows all of them alike.

    Args:
      trainers: What to compare. Of a seed all should have the same data, initial params and batches.
      seeds: The seeds.
      epochs: How many epochs a run has.

    Returns:
      The metrics of `Trainer.measure`, and "seconds": what an epoch took, compiling included.
    """
    histories: dict[str, list[list[dict[str, float]]]] = {trainer.name: [] for trainer in trainers}
    total = len(seeds) * epochs * sum(trainer.steps_per_epoch for trainer in trainers)
    with tqdm(total=total, unit="step", dynamic_ncols=True, disable=None) as bar:
        for seed in seeds:
            starts = [trainer.start(seed) for trainer in trainers]
            states = [state for state, _ in starts]
            for trainer, (_, history) in zip(trainers, starts, strict=True):
                histories[trainer.name].append(history)
                if history:
                    bar.write(f"{trainer.name}, seed {seed}: continues after epoch {len(history)}")
                bar.update(len(history) * trainer.steps_per_epoch)
            for epoch in range(epochs):
                for i, trainer in enumerate(trainers):
                    history = histories[trainer.name][-1]
                    if epoch < len(history):
                        continue
                    bar.set_description(f"seed {seed}, epoch {epoch + 1}, {trainer.name}")
                    begin = time.perf_counter()
                    states[i] = trainer.train(states[i], seed, epoch, bar.update)
                    seconds = time.perf_counter() - begin
                    history.append({**trainer.measure(states[i], seed), "seconds": seconds})
                    trainer.keep(states[i], seed, history)
                    metric, value = next(iter(history[-1].items()))
                    bar.set_postfix_str(f"{trainer.name}: {metric} {value:.4g}", refresh=False)
    return {
        name: {metric: np.array([[row[metric] for row in run] for run in runs]) for metric in runs[0][0]}
        for name, runs in histories.items()
    }


def steps_per_epoch(size: int, batch_size: int) -> int:
    """How many batches `batches` yields."""
    if batch_size > size:
        msg = f"--batch-size must be at most the size of the training set, {size}, got {batch_size}"
        raise ValueError(msg)
    return size // batch_size


def batches(size: int, batch_size: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """Which examples are in which batch: by seed and epoch alone. A smaller last batch is dropped."""
    order = np.random.default_rng([seed, epoch]).permutation(size)
    for first in range(0, size - batch_size + 1, batch_size):
        yield order[first : first + batch_size]


def accuracy(
    logits: Callable[[np.ndarray], jax.Array], inputs: np.ndarray, labels: np.ndarray, batch_size: int
) -> float:
    """The share of right predictions, computed in batches of one size, so that there is one program."""
    right = 0
    for first in range(0, len(inputs), batch_size):
        rows = np.arange(first, first + batch_size)
        predicted = np.argmax(jax.device_get(logits(inputs[rows % len(inputs)])), axis=-1)
        right += np.sum((predicted == labels[rows % len(inputs)]) & (rows < len(inputs)))
    return float(right / len(inputs))


# Report.


class Column(NamedTuple):
    """A column of the table.

    Attributes:
      title: Its head.
      metric: What it shows.
      scale: The factor before it is shown: 100 for percent.
      best: Whether to show the best epoch instead of the last.
    """

    title: str
    metric: str
    scale: float = 100.0
    best: bool = False


def summarize(
    curves: Curves, base: str, columns: Sequence[Column], *, lower_is_better: bool = False
) -> dict[str, Any]:
    """The numbers of the table; gains over the base are paired, seed by seed, in the first column."""

    def pick(arm: str, column: Column) -> np.ndarray:
        values = column.scale * curves[arm][column.metric]
        if column.best:
            return values.min(axis=1) if lower_is_better else values.max(axis=1)
        return values[:, -1]

    rows = {}
    for name, curve in curves.items():
        gain = gain_over(pick(name, columns[0]), pick(base, columns[0]), lower_is_better=lower_is_better)
        rows[name] = {
            **{column.title: spread(pick(name, column)) for column in columns},
            "gain": gain,
            # The arms take turns: the median does not mind compiling, or what else the machine does.
            "time_ratio": float(np.median(curve["seconds"] / curves[base]["seconds"])),
        }
    return {"base": base, "columns": [column.title for column in columns], "arms": rows}


def table(report: dict[str, Any], form: str = ".1f") -> str:
    """The report as text: mean ± standard deviation over the seeds."""
    lines = [("", *report["columns"], "paired difference", "better on", "time ratio")]
    for name, row in report["arms"].items():
        gain = row["gain"]
        pair = (show(gain, f"+{form}"), f"{gain['wins']} of {len(gain['values'])}")
        lines.append(
            (
                name,
                *(show(row[title], form) for title in report["columns"]),
                *(("", "") if name == report["base"] else pair),
                f"{row['time_ratio']:.2f}",
            )
        )
    return align(lines)


def verdict(report: dict[str, Any], unit: str, form: str = ".1f") -> str:
    """A line for each arm on what the table says, whichever way it came out."""
    base, lines = report["base"], []
    for name, row in report["arms"].items():
        if name != base:
            says = reporting.verdict(name, base, row["gain"], unit, form)
            lines.append(f"{says}, at {row['time_ratio']:.1f} times the time.")
    return "\n".join(lines)


class Panel(NamedTuple):
    """A part of the figure.

    Attributes:
      title: Its title.
      metric: What it shows over the epochs.
      label: What stands at its vertical axis.
      scale: The factor before it is shown: 100 for percent.
    """

    title: str
    metric: str
    label: str
    scale: float = 100.0


def figure(curves: Curves, panels: Sequence[Panel], finding: str) -> Figure:
    """Learning curves: the mean over the seeds, and the range as a band."""
    picture = Figure(figsize=(5 * len(panels), 3.9), layout="constrained")
    for axes, panel in zip(picture.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        late, ends = [], {}
        for colour, (name, curve) in zip(itertools.cycle(COLOURS), curves.items(), strict=False):
            values = panel.scale * curve[panel.metric]
            epochs = np.arange(1, values.shape[1] + 1)
            late.append(values[:, len(epochs) // 6 :])
            reporting.band(axes, epochs, values, colour)
            ends[name] = epochs[-1], values[:, -1].mean(), colour
        # The beginning is steep and tells nobody apart: it may leave the picture.
        low, high = np.min(late), np.max(late)
        margin = 0.05 * (high - low) or 1.0
        limits, label = (low - margin, high + margin), f"{panel.label} (axis cut)"
        style(axes, title=panel.title, xlabel="epoch", ylabel=label, ylim=limits)
        axes.xaxis.get_major_locator().set_params(integer=True)
        reporting.label_ends(axes, ends)
    seeds = len(next(iter(curves.values()))[panels[0].metric])
    reporting.head(picture, finding, f"Mean over {seeds} paired seeds; bands: the range of the seeds.")
    return picture


def finding(report: dict[str, Any], form: str = ".1f") -> str:
    """What all arms reach in the first column of the table."""
    title = report["columns"][0]
    return ", ".join(f"{name} {row[title]['mean']:{form}}" for name, row in report["arms"].items())


def save(
    options: argparse.Namespace, report: dict[str, Any], curves: Curves, picture: Figure, name: str
) -> None:
    """Writes the figure, and all numbers with what they were made from."""
    lines = {
        arm: {metric: np.round(v, 5).tolist() for metric, v in curve.items()} for arm, curve in curves.items()
    }
    reporting.save(options, name, picture, {**report, "curves": lines})
