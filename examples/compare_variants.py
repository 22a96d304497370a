"""All variants on the digits with wrong labels: one table, one figure.

    python examples/compare_variants.py
    python examples/compare_variants.py --epochs 100
    python examples/compare_variants.py --variants gnp xsam
    python examples/compare_variants.py --tune

Every variant has its base optimizer and a radius that was chosen for this data and 100 epochs, on other
seeds, from a few values. So this shows that the variants work and what they cost; it is no ranking of the
methods. With `--tune` it trains each variant on the seeds 0 to 4, with its radius and with 0.7 and 1.4 times
that.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import reporting
from digits import NUM_TRAIN, load, stack, train_at_once
from digits_recipes import RECIPES, Setting, base_arm, tuned_l2_arm, variant_arm
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from reporting import align, show
from train_digits import default_rho, headline, lines_of, run, shared_options, summarize

TUNING_SEEDS = range(5)
CAVEAT = (
    "Radii were chosen for 40 % noise, from a few values on other seeds; a point more or less says nothing.\n"
    "On a network this small, arithmetic on the params takes as long as gradients do: see both cost columns."
)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains everything, reports and returns the numbers of the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared_options(parser, output="results/compare_variants", seeds=3, epochs=60)
    parser.add_argument(
        "--variants",
        choices=RECIPES,
        nargs="+",
        default=list(RECIPES),
        metavar="NAME",
        help=f"some of {', '.join(RECIPES)} (default: all)",
    )
    parser.add_argument("--tune", action="store_true", help="try three radii on the seeds 0 to 4 instead")
    options = reporting.finish(parser, argv)
    setting = Setting(
        options.base_optimizer,
        options.learning_rate,
        options.weight_decay,
        options.epochs * (NUM_TRAIN // options.batch_size),
    )
    # All are compared with SAM.
    asked = {name: recipe for name, recipe in RECIPES.items() if name in ("sam", *options.variants)}
    recipes = {name: recipe for name, recipe in asked.items() if recipe.suits(options.base_optimizer)}
    if options.tune:
        return tune(list(recipes), setting, options)
    base, tuned = base_arm(setting), tuned_l2_arm(setting.steps)
    variants = [variant_arm(name, default_rho(name, options.model), setting) for name in recipes]
    costs = [recipe.cost for recipe in recipes.values()]

    print(headline(options))
    if left_out := ", ".join(name for name in asked if name not in recipes):
        print(f"Left out: {left_out}, which needs a base optimizer with momentum.")
    curves = run([base, *variants, tuned], options)
    report = summarize(curves, base.name)
    for arm, cost in zip([base, *variants, tuned], [1.0, *costs, 1.0], strict=True):
        report["arms"][arm.name]["gradients_per_step"] = cost
    sentences = reporting.conclude(options, meaning(report, sam=variants[0].name))
    print(table(report), sentences, CAVEAT, sep="\n\n")
    content = {**report, "meaning": sentences, "curves": lines_of(curves)}
    reporting.save(options, "compare_variants", figure(report, sam=variants[0].name), content)
    return report


def tune(
    names: Sequence[str], setting: Setting, options: argparse.Namespace
) -> dict[str, dict[float, float]]:
    """Prints and returns the final accuracy of every variant with three radii, in percent."""
    data = stack(load(seed, options.label_noise) for seed in TUNING_SEEDS)
    found: dict[str, dict[float, float]] = {}
    for name in names:
        rho = default_rho(name, options.model)
        if rho is None:
            continue
        found[name] = {}
        for radius in (float(f"{factor * rho:.2g}") for factor in (0.7, 1.0, 1.4)):
            _, curves = train_at_once(
                variant_arm(name, radius, setting),
                TUNING_SEEDS,
                data,
                model=options.model,
                epochs=options.epochs,
                batch_size=options.batch_size,
            )
            found[name][radius] = 100 * float(curves.test[:, -1].mean())
        words = ", ".join(f"{radius:g}: {accuracy:.1f}" for radius, accuracy in found[name].items())
        print(f"{name}, {RECIPES[name].radius} {words}", flush=True)
    return found


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [
        ("", "best test", "final test", "wrong labels", "gain of", "its worst", "time", "gradients"),
        ("", "accuracy, %", "accuracy, %", "memorised, %", "final", "seed", "ratio", "per step"),
    ]
    for name, row in report["arms"].items():
        gain = row["gain_final"]
        lines.append(
            (
                name,
                show(row["best"]),
                show(row["final"]),
                show(row["memorised"]),
                *(("", "") if name == report["base"] else (f"{gain['mean']:+.1f}", f"{gain['worst']:+.1f}")),
                f"{row['cost_ratio']:.2f}",
                f"{row['gradients_per_step']:g}",
            )
        )
    return align(lines)


def text_of(content: dict[str, Any]) -> str:
    """The tables as RESULTS.md has them, from what is in the JSON."""
    return table(content)


def meaning(report: dict[str, Any], sam: str) -> str:
    """Who does worse than SAM, who does better, and whom it did not help at all."""
    groups: dict[str, list[str]] = {"worse": [], "better": [], "not told apart": [], "useless": []}
    sam_final = np.array(report["arms"][sam]["final"]["values"])
    for name, row in report["arms"].items():
        if name in (sam, report["base"]):
            continue
        gap = np.array(row["final"]["values"]) - sam_final
        seeds = "better" if np.all(gap > 0) else "worse" if np.all(gap < 0) else "not told apart"
        groups[seeds].append(f"{name} ({gap.mean():+.1f})")
        if row["gain_final"]["worst"] <= 0:
            groups["useless"].append(f"{name} ({row['gain_final']['mean']:+.1f})")
    return "\n".join(
        f"{title}: {'; '.join(groups[key]) or 'none'}."
        for title, key in (
            (f"Final accuracy worse than {sam} on every seed", "worse"),
            (f"Better than {sam} on every seed", "better"),
            (f"Better than {sam} on some seeds and worse on others", "not told apart"),
            (f"Not better than {report['base']} on every seed", "useless"),
        )
    )


def figure(report: dict[str, Any], sam: str) -> Figure:
    """Best and final accuracy of everyone, in order."""
    rows = sorted(report["arms"].items(), key=lambda item: item[1]["final"]["mean"])
    picture = Figure(figsize=(8, 0.32 * len(rows) + 1.4), layout="constrained")
    axes = picture.subplots()
    dots(axes, dict(rows), {report["base"]: reporting.GREY, sam: reporting.RED})
    reporting.style(
        axes,
        xlabel="test accuracy, %: final (filled, ± standard deviation), best epoch (open)",
        yticks=range(len(rows)),
        yticklabels=[f"{name}   ×{row['gradients_per_step']:g}" for name, row in rows],
        title="Digits with wrong labels (× gradient evaluations per step)",
    )
    return picture


def dots(axes: Axes, rows: dict[str, dict[str, Any]], colours: dict[str, str]) -> None:
    """A line for each arm, from below: final accuracy filled, with its deviation, and best epoch open."""
    for height, (name, row) in enumerate(rows.items()):
        colour = colours.get(name, reporting.BLUE)
        best, final = row["best"]["mean"], row["final"]["mean"]
        axes.plot([final, best], [height, height], color=colour, alpha=0.35, linewidth=2)
        axes.plot(best, height, "o", color="white", markeredgecolor=colour)
        axes.errorbar(final, height, xerr=row["final"]["sd"] or 0.0, fmt="o", color=colour, capsize=3)


if __name__ == "__main__":
    main()
