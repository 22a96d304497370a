"""Variants on digits with 20, 40 and 60 % wrong labels: one table, one figure.

    python examples/label_noise.py
    python examples/label_noise.py --variants xsam sampa sam_sps

The radius of every variant, and the L2 penalty of the last row, were chosen for 40 % and stay what they are
at 20 and 60 %: what one knows of a data set is seldom how many of its labels are wrong. All seeds and all
noise levels of a variant are trained at once, in one vmapped program.
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import reporting
from digits import NUM_TRAIN, Arm, Curves, load, stack, train_at_once
from digits_recipes import RECIPES, Setting, base_arm, tuned_l2_arm, variant_arm
from matplotlib.figure import Figure
from tqdm import tqdm
from train_digits import accuracies, default_rho

BATCH_SIZE = 50
VARIANTS = (
    *("sam", "asam", "gsam", "wsam", "gnp", "stable_sam", "friendly_sam", "vasso", "bsam", "saner"),
    *("looksam", "ae_sam", "async_sam_perturbed", "msam", "weight_noise"),  # With fewer gradients a step.
)
"""Some of `RECIPES`: all of them are compared with 40 % in `compare_variants.py`."""
QUICK_VARIANTS = ("sam",)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains everything, reports and returns the numbers of the report."""
    options = parse(argv)
    noises, seeds = options.label_noise, reporting.seeds_of(options)
    setting = Setting("momentum", None, 0.0, options.epochs * (NUM_TRAIN // BATCH_SIZE))
    variants = [variant_arm(name, default_rho(name, "mlp"), setting) for name in options.variants]
    arms = [base_arm(setting), *variants, tuned_l2_arm(setting.steps)]
    data = stack(load(seed, noise) for noise in noises for seed in seeds)

    print(
        f"Scikit-learn's digits, {NUM_TRAIN} training images; mlp, {options.epochs} epochs; "
        f"mean ± standard deviation over {options.seeds} paired seeds."
    )
    with tqdm(total=len(arms) * options.epochs, unit="epoch", dynamic_ncols=True, disable=None) as bar:

        def train(arm: Arm) -> Curves:
            bar.set_description(arm.name)
            _, curves = train_at_once(
                arm,
                list(seeds) * len(noises),
                data,
                epochs=options.epochs,
                batch_size=BATCH_SIZE,
                after_epoch=bar.update,
            )
            return curves

        # Two variants at a time: on matrices as small as these one alone leaves a core idle.
        with ThreadPoolExecutor(max_workers=2) as pool:
            curves = dict(zip([arm.name for arm in arms], pool.map(train, arms), strict=True))

    report: dict[str, Any] = {"base": arms[0].name, "noises": {}}
    for i, noise in enumerate(noises):
        rows = slice(i * len(seeds), (i + 1) * len(seeds))
        level = {name: jax.tree.map(lambda v, rows=rows: v[rows], curve) for name, curve in curves.items()}
        report["noises"][f"{noise:.0%}"] = {
            name: accuracies(curve, level[arms[0].name]) for name, curve in level.items()
        }
    report["meaning"] = reporting.conclude(options, meaning(report, variants[0].name, arms[-1].name))
    print(table(report), report["meaning"], sep="\n\n")
    reporting.save(options, "label_noise", figure(report, variants[0].name, arms[-1].name), report)
    return report


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of this program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--label-noise",
        type=reporting.number(float, 0, 1),
        nargs="+",
        default=[0.2, 0.4, 0.6],
        metavar="FRACTION",
        help="fractions of the training labels to make wrong (default: 0.2 0.4 0.6)",
    )
    parser.add_argument(
        "--variants",
        choices=RECIPES,
        nargs="+",
        metavar="NAME",
        help=f"some of {', '.join(RECIPES)} "
        f"(default: {' '.join(VARIANTS)}, with --quick: {' '.join(QUICK_VARIANTS)})",
    )
    reporting.common_options(parser, "results/label_noise", epochs=(100, 2), seeds=(3, 2))
    options = reporting.finish(parser, argv)
    options.variants = options.variants or list(QUICK_VARIANTS if options.quick else VARIANTS)
    return options


def table(report: dict[str, Any]) -> str:
    """The report as text: best epoch, last epoch, and the paired gain of the last."""
    noises = report["noises"]
    lines = [
        ("wrong labels:", *(cell for noise in noises for cell in (noise, "", ""))),
        ("test accuracy, %", *("best", "final", "gain") * len(noises)),
    ]
    for name in next(iter(noises.values())):
        cells = []
        for level in noises.values():
            row = level[name]
            gain = "" if name == report["base"] else f"{row['gain_final']['mean']:+.1f}"
            cells += [f"{row['best']['mean']:.1f}", reporting.show(row["final"]), gain]
        lines.append((name, *cells))
    return reporting.align(lines)


def text_of(content: dict[str, Any]) -> str:
    """The tables as RESULTS.md has them, from what is in the JSON."""
    return table(content)


def meaning(report: dict[str, Any], first: str, tuned: str) -> str:
    """What came out of it for the first variant, and who did not help."""
    sentences = []
    for noise, level in report["noises"].items():
        gain = level[first]["gain_final"]
        to_tuned = level[first]["final"]["mean"] - level[tuned]["final"]["mean"]
        useless = [
            name
            for name, row in level.items()
            if name != report["base"] and row["gain_final"]["wins"] < len(gain["values"])
        ]
        sentences.append(
            f"{noise} wrong: {reporting.verdict(first, report['base'], gain)}; "
            f"{to_tuned:+.1f} against {tuned}. "
            f"Not better than {report['base']} on every seed: {'; '.join(useless) or 'none'}."
        )
    return "\n".join(sentences)


def figure(report: dict[str, Any], first: str, tuned: str) -> Figure:
    """The gain of everyone at every noise level, the largest on top."""
    noises, base = report["noises"], report["base"]
    gains = {
        name: [level[name]["gain_final"] for level in noises.values()]
        for name in next(iter(noises.values()))
        if name != base
    }
    names = sorted(gains, key=lambda name: -sum(gain["mean"] for gain in gains[name]))
    means = np.array([[gain["mean"] for gain in gains[name]] for name in names])
    shares = np.clip(means / np.abs(means).max(axis=0, where=means > 0, initial=1e-9), -1, 1)

    picture = Figure(figsize=(3.4 + 1.6 * len(noises), 1.5 + 0.24 * len(names)), layout="constrained")
    axes = picture.subplots()
    axes.imshow(shares, cmap="RdBu", vmin=-1.2, vmax=1.2, aspect="auto")
    for row, name in enumerate(names):
        for column, gain in enumerate(gains[name]):
            clear = reporting.judge(gain) != "unclear"
            axes.text(
                column,
                row,
                f"{gain['mean']:+.1f}" if clear else f"({gain['mean']:+.1f})",
                color="white" if abs(shares[row, column]) > 0.7 else "black",
                ha="center",
                va="center",
                fontsize=9,
            )
    levels = [noise.rstrip("%") for noise in noises]
    reached = [level[base]["final"]["mean"] for level in noises.values()]
    heads = [f"{x} % wrong\n{base}: {y:.1f} %" for x, y in zip(levels, reached, strict=True)]
    axes.set_xticks(range(len(heads)), heads)
    axes.set_yticks(range(len(names)), names)
    colours = {first: reporting.RED, tuned: reporting.BLUE}
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        if name in colours:
            label.set(color=colours[name], fontweight="bold")
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    much = ", ".join(f"{gain['mean']:+.0f}" for gain in gains[first])
    seeds = len(gains[first][0]["values"])
    reporting.head(
        picture,
        f"{', '.join(levels)} % wrong labels: {much} points by {first}",
        f"Gain over {base}, points of final test accuracy; mean over {seeds} paired seeds.\n"
        "In brackets: not clear by a paired t-test at 5 %. Colour: part of the column's largest gain.",
    )
    return picture


if __name__ == "__main__":
    main()
