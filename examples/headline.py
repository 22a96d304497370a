"""The first picture of the README: what SAM is for, in three panels.

    python examples/headline.py

Wrong labels: the runs of `train_digits.py`. Weights in few bits, and what is forgotten when a network learns
a second task: those of `quantize.py` and `forgetting.py`, for the MLP on MNIST. In a panel, networks, data,
batches and seeds are the same, and only the optimizer differs. Numbers were chosen on other seeds, as those
programs say.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import digits
import forgetting
import numpy as np
import quantize
import reporting
from digits_recipes import Setting, base_arm, tuned_l2_arm, variant_arm
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from reporting import BLUE, GREY, RED
from tqdm import tqdm

SHOWN = ("AdamW", "tuned decay", "SAM")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, draws, and returns the numbers that the titles name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    counts = {"epochs": (100, 2, "passes over wrong labels"), "seeds": (8, 2)}
    reporting.common_options(parser, "results/headline", **counts)
    options = reporting.finish(parser, argv)

    wrong = wrong_labels(options)
    common = ["--data", "mnist", "--model", "mlp", "--seeds", str(options.seeds)]
    common += ["--output", str(options.output), *(["--quick"] if options.quick else [])]
    few = quantize.parse(common)
    other = forgetting.parse([*common, "--task", "mirrored"])
    with tqdm(total=2 * options.seeds * len(quantize.RUNS), unit="run", disable=None) as bar:
        bits = quantize.measure("mnist", "mlp", few, bar)
        paths = forgetting.measure("mnist", "mlp", other, bar)["mirrored"]

    old = {name: [forgetting.old_at(path, 80) for path in paths[name]] for name in SHOWN}
    report = {
        "40 % of the labels wrong": {name: values[:, -1] for name, values in wrong.items()},
        "2 bits": {name: bits[name][:, list(quantize.BITS).index("2 bits")] for name in SHOWN},
        "old task at 80 % of the new": {name: np.array(values) for name, values in old.items()},
    }
    report = reporting.compare(report)
    for title, arms in report.items():
        shown = (
            f"{name} {row['mean']:.1f}" + (f" ({reporting.interval(row['gain'])})" if "gain" in row else "")
            for name, row in arms.items()
        )
        print(f"{title}: {', '.join(shown)}")
    picture = Figure(figsize=(13.5, 4.1), layout="constrained")
    axes = picture.subplots(1, 3)
    draw_wrong(axes[0], wrong)
    quantize.draw(axes[1], {name: bits[name][:, :5] for name in SHOWN})
    forgetting.draw(axes[2], {name: paths[name] for name in SHOWN})
    titles = (
        "40 % of the training labels wrong",
        "weights rounded after training",
        "fine-tuned to another task",
    )
    for each, title, arms in zip(axes, titles, report.values(), strict=True):
        base, _, sam = (row["mean"] for row in arms.values())
        each.set_title(f"{title}:\n{base:.0f} %, with SAM {sam:.0f} %", loc="left", fontweight="bold")
    axes[0].set(xlabel="epoch (digits, MLP, momentum SGD)", ylabel="test accuracy, % (axis cut)")
    axes[1].set(xlabel="weights (MNIST, MLP, AdamW)", ylabel="test accuracy, % (axis cut)")
    axes[2].set(
        xlabel="accuracy on the new task, % (MNIST, mirrored)", ylabel="on the old task, % (axis cut)"
    )
    picture.supxlabel(
        f"Means over {options.seeds} paired seeds; bars: 95 % interval of the mean. On the right the title "
        "reads the curves at 80 %.",
        fontsize=9,
        color="#555555",
    )
    reporting.save(options, "headline", picture, {"panels": report})
    return report


def wrong_labels(options: argparse.Namespace) -> dict[str, np.ndarray]:
    """Test accuracy over the epochs. shape=(seeds, epochs)."""
    setting = Setting("momentum", None, 0.0, options.epochs * (digits.NUM_TRAIN // 50))
    arms = [base_arm(setting), tuned_l2_arm(setting.steps), variant_arm("sam", 0.7, setting)]
    curves = digits.train(arms, reporting.seeds_of(options), epochs=options.epochs)
    names = ("momentum", "tuned L2", "SAM")
    return {name: 100 * curve.test for name, curve in zip(names, curves.values(), strict=True)}


def draw_wrong(axes: Axes, wrong: dict[str, np.ndarray]) -> None:
    """The curves, with intervals at a few epochs."""
    ends = {}
    for (name, values), colour in zip(wrong.items(), (GREY, BLUE, RED), strict=True):
        epochs = np.arange(1, values.shape[1] + 1)
        axes.plot(epochs, values.mean(axis=0), color=colour, linewidth=1.8)
        some = slice(len(epochs) // 10 + 2 * len(ends), None, max(1, len(epochs) // 6))
        axes.errorbar(
            epochs[some],
            values.mean(axis=0)[some],
            reporting.half_width(values)[some],
            fmt="none",
            ecolor=colour,
            capsize=2,
        )
        ends[name] = epochs[-1], values[:, -1].mean(), colour
    late = np.array([values.mean(axis=0)[values.shape[1] // 20 :] for values in wrong.values()])
    reporting.style(axes, ylim=(late.min() - 3, late.max() + 2))
    reporting.label_ends(axes, ends)


if __name__ == "__main__":
    main()
