"""The first picture of the README: what SAM is for, in three panels.

    python examples/train_digits.py
    python examples/quantize.py
    python examples/forgetting.py
    python examples/headline.py --figure images/headline.png

Nothing is trained here: it draws what the first three have written. Wrong labels, from `train_digits.py`;
weights in few bits, and what is forgotten when a network learns a second task, from `quantize.py` and
`forgetting.py`, for the MLP on MNIST. In a panel only the optimizer differs.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import forgetting
import numpy as np
import quantize
import reporting
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from reporting import BLUE, GOLD, GREY, RED

SETTING = "mnist, mlp"
TASK = "mirrored"
LEVEL = 80
ARMS = ("AdamW", "tuned decay", "SAM")
WRONG = ("momentum", "SAM", "tuned L2", "SAM + tuned L2")
"""The arms of `train_digits.py`, in its order."""
PROGRAMS = ("train_digits", "quantize", "forgetting")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Reads, draws, and returns the numbers that the titles name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add, here = parser.add_argument, "default: %(default)s"
    add("--results", type=Path, default=Path("results"), help=f"where the others wrote ({here})")
    add("--figure", type=Path, default=Path("results/headline.png"), help=f"the picture ({here})")
    options = parser.parse_args(argv)
    found = {name: read(parser, options.results / name / f"{name}.json", name) for name in PROGRAMS}
    if not options.figure.parent.is_dir():
        parser.error(f"argument --figure: there is no folder {str(options.figure.parent)!r}")

    curves = found["train_digits"]["curves"].values()
    wrong = {name: 100 * np.array(curve["test"]) for name, curve in zip(WRONG, curves, strict=True)}
    rows = found["quantize"]["settings"][SETTING]
    few = {
        name: np.array([rows[name]["accuracy"][bits]["values"] for bits in quantize.BITS]).T for name in ARMS
    }
    paths = {name: np.array(found["forgetting"]["paths"][f"{SETTING}, {TASK}"][name]) for name in ARMS}
    column = list(quantize.BITS).index("2 bits")
    kept = {name: np.array([forgetting.old_at(path, LEVEL) for path in each]) for name, each in paths.items()}
    report = reporting.compare(
        {
            "wrong labels": {name: values[:, -1] for name, values in wrong.items()},
            "2 bits": {name: values[:, column] for name, values in few.items()},
            f"old task where the new one reaches {LEVEL} %": kept,
        }
    )
    for title, arms in report.items():
        shown = [f"{name} {reporting.show(row)}" for name, row in arms.items()]
        print(f"{title}: {', '.join(shown)}")
    figure(wrong, {name: values[:, : column + 1] for name, values in few.items()}, paths, report).savefig(
        options.figure, dpi=200
    )
    print(f"Written: {options.figure}")
    return report


def read(parser: argparse.ArgumentParser, path: Path, name: str) -> dict[str, Any]:
    """What a program has written."""
    if not path.is_file():
        parser.error(f"argument --results: no {path}; run `python examples/{name}.py` first")
    return json.loads(path.read_text(encoding="utf-8"))


def figure(
    wrong: Mapping[str, np.ndarray],
    few: Mapping[str, np.ndarray],
    paths: Mapping[str, np.ndarray],
    report: Mapping[str, Any],
) -> Figure:
    """The three panels; each title names what the plain optimizer reaches, and what SAM does."""
    picture = Figure(figsize=(12, 4.1), layout="constrained")
    axes = picture.subplots(1, 3)
    draw_wrong(axes[0], wrong)
    quantize.draw(axes[1], dict(few))
    forgetting.draw(axes[2], dict(paths))
    axes[0].set(xlabel="epoch (digits, MLP, momentum SGD)", ylabel="test accuracy, % (axis cut)")
    axes[1].set(xlabel="weights (MNIST, MLP, AdamW)", ylabel="test accuracy, % (axis cut)")
    axes[2].set(xlabel="new task: accuracy, % (MNIST mirrored, MLP, AdamW)", ylabel="old task, % (axis cut)")
    titles = ("40 % of the labels wrong", "Weights rounded to 2 bits", "Old task after a new one")
    for each, title, arms in zip(axes, titles, report.values(), strict=True):
        plain, *_ = arms.values()
        words = f"{title}:\n{plain['mean']:.0f} %, with SAM {arms['SAM']['mean']:.0f} %"
        each.set_title(words, loc="left", fontweight="bold", fontsize=11)
    seeds = [len(next(iter(arms.values()))["values"]) for arms in report.values()]
    picture.supxlabel(
        "Only the optimizer differs. Means over {}, {} and {} paired seeds; bars: 95 % interval of the "
        "mean. The title on the right reads the curves at {} %.".format(*seeds, LEVEL),
        fontsize=9,
        color="#555555",
    )
    return picture


def draw_wrong(axes: Axes, wrong: Mapping[str, np.ndarray]) -> None:
    """Accuracy over the epochs, with intervals at a few of them."""
    ends = {}
    for (name, values), colour in zip(wrong.items(), (GREY, RED, BLUE, GOLD), strict=True):
        mean, epochs = values.mean(axis=0), np.arange(1, values.shape[1] + 1)
        axes.plot(epochs, mean, color=colour, linewidth=1.8)
        some = np.arange(len(epochs) // 8 + 2 * len(ends), len(epochs), max(1, len(epochs) // 6))
        axes.errorbar(
            epochs[some],
            mean[some],
            reporting.half_width(values)[some],
            fmt="none",
            ecolor=colour,
            capsize=2,
        )
        ends[name] = epochs[-1], mean[-1], colour
    late = np.array([values.mean(axis=0)[values.shape[1] // 20 :] for values in wrong.values()])
    reporting.style(axes, ylim=(late.min() - 5, late.max() + 2))
    reporting.label_ends(axes, ends)


if __name__ == "__main__":
    main()
