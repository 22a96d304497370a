"""The main example: digits with wrong labels, trained without and with sharpness-aware minimization.

    python examples/train_digits.py
    python examples/train_digits.py --variant asam --base-optimizer adam
    python examples/train_digits.py --help

Three lines make a training step sharpness-aware:

    variant = optax_sam.sam(0.7)
    tx = optax.chain(variant, optax.sgd(0.01, momentum=0.9))
    value_and_grad = optax_sam.sam_value_and_grad(loss_fn, variant)

The first two are in `digits_recipes.py`, with all other variants; the third is in the training step, in
`digits.py`. What is here is the comparison: paired runs, a table, a figure and a sentence.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import reporting
from digits import MODELS, NUM_TRAIN, Arm, Curves, train
from digits_recipes import BASES, RECIPES, Setting, base_arm, sam_and_l2_arm, tuned_l2_arm, variant_arm
from matplotlib.figure import Figure
from reporting import align, gain_over, number, show, spread


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, reports and returns the numbers of the report."""
    options = parse(argv)
    steps = options.epochs * (NUM_TRAIN // options.batch_size)
    setting = Setting(options.base_optimizer, options.learning_rate, options.weight_decay, steps)
    base = base_arm(setting)
    variant = variant_arm(options.variant, options.rho, setting)
    tuned, both = tuned_l2_arm(steps), sam_and_l2_arm(steps, options.model)

    return train_and_report(
        [base, variant, tuned, both],
        options,
        "train_digits",
        lambda report: meaning(report, variant.name, tuned.name, both.name),
    )


def train_and_report(
    arms: Sequence[Arm], options: argparse.Namespace, name: str, meaning: Callable[[dict[str, Any]], str]
) -> dict[str, Any]:
    """Trains the arms, the base first; prints, draws and saves what came out, with a sentence on it."""
    print(headline(options))
    curves = run(arms, options)
    report = summarize(curves, arms[0].name)
    report["meaning"] = reporting.conclude(options, meaning(report))
    print(table(report), report["meaning"], sep="\n\n")
    reporting.save(options, name, figure(curves, options), {**report, "curves": lines_of(curves)})
    return report


def run(arms: Sequence[Arm], options: argparse.Namespace) -> dict[str, Curves]:
    """Trains the arms as the options say."""
    return train(
        arms,
        reporting.seeds_of(options),
        model=options.model,
        label_noise=options.label_noise,
        epochs=options.epochs,
        batch_size=options.batch_size,
    )


# Options.


def shared_options(parser: argparse.ArgumentParser, output: str, seeds: int, epochs: int = 100) -> None:
    """The options of all comparisons of optimizers on digits with wrong labels."""
    rates = ", ".join(f"{name} {base.learning_rate:g}" for name, base in BASES.items())
    add = parser.add_argument
    add("--base-optimizer", choices=BASES, default="momentum", help="default: %(default)s")
    add("--learning-rate", type=number(float, 0, above=True), help=f"to begin with; defaults: {rates}")
    add(
        "--weight-decay",
        type=number(float, 0),
        default=0.0,
        help="L2, added after the variant; of adamw, decoupled (default: %(default)s)",
    )
    add(
        "--label-noise",
        type=number(float, 0, 1),
        default=0.4,
        help="fraction of the training labels to make wrong (default: %(default)s)",
    )
    add("--batch-size", type=number(int, 1, NUM_TRAIN), default=50, help="default: %(default)s")
    add("--model", choices=MODELS, default="mlp", help="default: %(default)s")
    reporting.common_options(parser, output, epochs=(epochs, 10), seeds=(seeds, 2))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of this program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    radii = ", ".join(f"{name} {recipe.rho:g}" for name, recipe in RECIPES.items() if recipe.rho is not None)
    parser.add_argument(
        "--variant", choices=RECIPES, default="sam", metavar="NAME", help=f"one of {', '.join(RECIPES)}"
    )
    parser.add_argument(
        "--rho",
        type=number(float, 0),
        help=f"the radius (of extragradient, the step size); defaults, a third of it for the CNN: {radii}",
    )
    shared_options(parser, output="results/train_digits", seeds=5)
    options = reporting.finish(parser, argv)
    if not RECIPES[options.variant].suits(options.base_optimizer):
        others = ", ".join(base for base in BASES if RECIPES[options.variant].suits(base))
        parser.error(
            f"argument --base-optimizer: {options.variant} needs a base optimizer with momentum, got "
            f"{options.base_optimizer!r}; choose from {others}"
        )
    if options.rho is None:
        options.rho = default_rho(options.variant, options.model)
    elif RECIPES[options.variant].rho is None:
        parser.error(f"argument --rho: {options.variant} has no radius")
    return options


def default_rho(variant: str, model: str) -> float | None:
    """A radius that suits; the CNN fails to learn with those of the MLP."""
    rho = RECIPES[variant].rho
    return rho if rho is None or model == "mlp" else round(0.3 * rho, 3)


def headline(options: argparse.Namespace) -> str:
    """What is going to be trained."""
    return (
        f"{NUM_TRAIN} images of digits, {options.label_noise:.0%} of their labels wrong; {options.model}, "
        f"{options.epochs} epochs;\nmean ± standard deviation over {options.seeds} paired seeds."
    )


# Report.


def accuracies(curve: Curves, base: Curves) -> dict[str, Any]:
    """What was reached, in percent; gains are paired, seed by seed."""
    best, final = 100 * curve.test.max(axis=1), 100 * curve.test[:, -1]
    return {
        "best": spread(best),
        "final": spread(final),
        "memorised": spread(100 * curve.memorised[:, -1]),
        "gain_best": spread(best - 100 * base.test.max(axis=1)),
        "gain_final": gain_over(final, 100 * base.test[:, -1]),
    }


def summarize(curves: dict[str, Curves], base: str) -> dict[str, Any]:
    """The numbers of the table, in percent and seconds."""
    rows = {}
    for name, curve in curves.items():
        rows[name] = {
            **accuracies(curve, curves[base]),
            "seconds_per_run": float(curve.seconds.sum(axis=1).mean()),
            # The arms take turns: the median of the ratios does not mind what else the machine does.
            "cost_ratio": float(np.median(curve.seconds / curves[base].seconds)),
        }
    return {"base": base, "arms": rows}


def table(report: dict[str, Any]) -> str:
    """The report as text, for a terminal of 80 columns: mean and standard deviation over the seeds."""
    lines = [
        ("accuracy, %", "best test", "final test", "wrong labels", "gain of", "time"),
        ("", "", "", "memorised", "final", ""),
    ]
    for name, row in report["arms"].items():
        lines.append(
            (
                name,
                show(row["best"]),
                show(row["final"]),
                show(row["memorised"]),
                "" if name == report["base"] else show(row["gain_final"], "+.1f"),
                f"{row['cost_ratio']:.1f}",
            )
        )
    return align(lines)


def text_of(content: dict[str, Any]) -> str:
    """The tables as RESULTS.md has them, from what is in the JSON."""
    return table(content)


def meaning(report: dict[str, Any], variant: str, tuned: str, both: str | None = None) -> str:
    """What the table says, whichever way it came out."""
    base, rows = report["base"], report["arms"]
    gain = rows[variant]["gain_final"]
    to_tuned = rows[variant]["final"]["mean"] - rows[tuned]["final"]["mean"]
    side = "better" if to_tuned > 0 else "worse"
    words = (
        f"With the recipe otherwise unchanged, {reporting.verdict(variant, base, gain)}, at "
        f"{rows[variant]['cost_ratio']:.1f} times the time. "
        f"It is {abs(to_tuned):.1f} points {side} than {tuned} (no SAM; tuned to 40 % noise)."
    )
    if both is None:
        return words
    values, base_values = rows[both]["final"]["values"], rows[tuned]["final"]["values"]
    return f"{words}\nTogether: {reporting.verdict(both, tuned, gain_over(values, base_values))}."


def figure(curves: dict[str, Curves], options: argparse.Namespace) -> Figure:
    """Learning curves: what the network knows, and what it memorised."""
    picture = Figure(figsize=(10, 4), layout="constrained")
    panels = picture.subplots(1, 2)
    epochs = np.arange(1, options.epochs + 1)
    colours = (reporting.GREY, reporting.RED, reporting.BLUE, reporting.GOLD)
    for axes, metric in zip(panels, ("test", "memorised"), strict=True):
        ends = {}
        for (name, curve), colour in zip(curves.items(), colours, strict=False):
            values = 100 * getattr(curve, metric)
            reporting.band(axes, epochs, values, colour)
            ends[name] = epochs[-1], values[:, -1].mean(), colour
        reporting.style(axes, xlabel="epoch", xlim=(1, max(2, options.epochs)))
        if metric == "test":
            reporting.label_ends(axes, ends)
    panels[0].set_ylabel("accuracy on clean test images, % (axis cut)")
    panels[1].set_ylabel("wrong labels memorised, %")
    finals = [f"{100 * curve.test[:, -1].mean():.0f} % by {name}" for name, curve in curves.items()]
    reporting.head(
        picture,
        f"{100 * options.label_noise:.0f} % wrong labels: {', '.join(finals[:2])}",
        f"Digits, {options.model}. Mean over {options.seeds} paired seeds; bands: the range of the seeds.",
    )
    return picture


def lines_of(curves: dict[str, Curves]) -> dict[str, Any]:
    """The curves, as they go on disk."""
    return {
        arm: {field: np.round(v, 5).tolist() for field, v in curve._asdict().items()}
        for arm, curve in curves.items()
    }


if __name__ == "__main__":
    main()
