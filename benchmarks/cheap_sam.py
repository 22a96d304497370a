"""What SAM's gain costs, and how much of it cheaper forms of SAM keep.

    python benchmarks/cheap_sam.py
    python benchmarks/cheap_sam.py --tasks digits
    python benchmarks/cheap_sam.py --tune

Three tasks: digits with wrong labels; MNIST with right ones, after the weights were rounded to 2 bits; a
small transformer on text, after rounding to 3. Each method has a radius of its own for each task, chosen
with `--tune` on the seeds 0 and 1; what is reported comes from the seeds from 100 on. Cost: the gradients
of a step, and its time as a multiple of plain momentum's on a batch so large that gradients dominate.

A `--tune` keeps every run in `tune.json` and goes on where it was cut off.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import by_hand
import networks
import reporting
import timing
from cheap_tasks import METHODS, TASKS, make_run
from tqdm import tqdm

FIRST_SEED, TUNING_SEEDS = 100, 2

# One scale of radii for all: SAM's own, and longer ones for those that climb seldom or on few examples.
SHORT = (0.1, 0.2, 0.4, 0.7, 1.0, 1.4)
LONG = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
RADII = {
    "plain": (0.0,),
    "sam": SHORT,
    "first half": SHORT,
    "last third": (0.2, 0.7, 1.4, 2.8),
    "ae_sam": (0.2, 0.4, 0.7, 1.4, 2.8),
    "looksam, k = 5": SHORT,
    "every 2nd of looksam, k = 5": (0.4, 1.0, 2.0, 4.0, 8.0),
    "weight_noise": (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.12),
    "async_sam, perturbed": (0.2, 0.5, 0.7, 1.0, 1.4),
    "msam": (0.5, 1.0, 2.0, 4.0, 6.0),
    "msam along updates": (0.5, 1.0, 2.0, 4.0),
}

# What `--tune` found best; some methods were tried on the first task only.
CHOSEN: dict[str, dict[str, float]] = {
    "digits": {
        "plain": 0.0,
        "sam": 0.7,
        "every 5th step": 8.0,
        "every 10th step": 16.0,
        "every 20th step": 16.0,
        "every 5th, ascent on 1/4": 8.0,
        "a random fifth": 8.0,
        "first half": 1.0,
        "last third": 1.4,
        "ae_sam": 2.8,
        "looksam, k = 5": 1.4,
        "every 2nd of looksam, k = 5": 8.0,
        "ascent on 1/5": 2.0,
        "weight_noise": 0.06,
        "async_sam, perturbed": 1.0,
        "msam": 4.0,
        "msam along updates": 4.0,
    },
    "mnist": {
        "plain": 0.0,
        "sam": 0.4,
        "every 5th step": 2.0,
        "every 10th step": 2.0,
        "every 5th, ascent on 1/4": 2.0,
        "looksam, k = 5": 1.0,
        "ascent on 1/5": 1.0,
        "weight_noise": 0.04,
        "async_sam, perturbed": 0.5,
        "msam": 2.0,
        "msam along updates": 4.0,
    },
    "text": {
        "plain": 0.0,
        "sam": 0.2,
        "every 5th step": 0.5,
        "every 10th step": 1.0,
        "every 5th, ascent on 1/4": 0.5,
        "looksam, k = 5": 0.1,
        "ascent on 1/5": 0.5,
        "weight_noise": 0.01,
        "async_sam, perturbed": 0.2,
        "msam": 0.5,
        "msam along updates": 2.0,
    },
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the tables, draws the figure and returns the numbers."""
    options = parse(argv)
    if options.tune:
        return tune(options)
    radii = CHOSEN if not options.quick else {task: dict.fromkeys(METHODS, 0.1) for task in TASKS}
    report = {}
    times = cost(options.methods, options.quick)
    for task in options.tasks:
        scores = measure(task, options, radii[task])
        report[task] = summarize(scores, times, radii[task])
        print(f"{task}: done", flush=True)
    words = reporting.conclude(options, meaning(report))
    content = {"seeds": options.seeds, "epochs": options.epochs, "tasks": report, "meaning": words}
    print(f"\n{text_of(content)}\n\n{words}")
    timing.save(figure(report), options, "cheap_sam", content)
    return report


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, with what the user left open."""
    parser = timing.parser(__doc__, "results/cheap_sam")
    parser.add_argument("--seeds", type=timing.count(), default=10, help="default: %(default)s")
    parser.add_argument("--epochs", type=timing.count(), help="default: those of each task")
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=timing.some_of(TASKS)
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="METHOD",
        help=timing.some_of(METHODS),
    )
    parser.add_argument("--tune", action="store_true", help="try radii on other seeds, and stop")
    options = timing.parse(parser, argv)
    if not options.tune and not {"plain", "sam"} <= set(options.methods):
        parser.error("argument --methods: must hold plain and sam, with which the others are compared")
    if options.quick:
        options.seeds, options.epochs = 2, 1
    return options


def tune(options: argparse.Namespace) -> dict[str, Any]:
    """The mean score of every radius, on the first seeds; prints the best of each method."""
    path = options.output / "tune.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in options.tasks:
        best = {}
        for method in options.methods:
            radii = RADII.get(method, LONG)[: 2 if options.quick else None]
            run = make_run(TASKS[name], METHODS[method], options.epochs or TASKS[name].epochs)
            for rho in radii:
                key = f"{name}, {method}, {rho:g}"
                if key not in found:
                    found[key] = [run(seed, rho) for seed in range(1 if options.quick else TUNING_SEEDS)]
                    path.write_text(json.dumps(found, indent=1))
            means = {rho: float(np.mean(found[f"{name}, {method}, {rho:g}"])) for rho in radii}
            best[method] = max(means, key=lambda rho: means[rho] if math.isfinite(means[rho]) else -math.inf)
            line = ", ".join(f"{rho:g}: {x:.3f}" for rho, x in means.items())
            print(f"{name}, {method}: {line}", flush=True)
        print(f"{name}: {best}", flush=True)
    return found


def measure(name: str, options: argparse.Namespace, radii: dict[str, float]) -> dict[str, np.ndarray]:
    """The scores of all methods that have a radius, seed by seed."""
    task, chosen = TASKS[name], [method for method in options.methods if method in radii]
    runs = {m: make_run(task, METHODS[m], options.epochs or task.epochs) for m in chosen}
    scores: dict[str, list[float]] = {method: [] for method in runs}
    with tqdm(total=options.seeds * len(runs), unit="run", dynamic_ncols=True, disable=None) as bar:
        for seed in range(FIRST_SEED, FIRST_SEED + options.seeds):
            for method, run in runs.items():
                bar.set_description(f"{name}, seed {seed}, {method}")
                scores[method].append(run(seed, radii[method]))
                bar.update()
    return {method: np.array(values) for method, values in scores.items()}


def cost(methods: Sequence[str], quick: bool) -> dict[str, timing.Spread]:
    """Times of a step where gradients dominate, in units of the plain step's, on average over a period."""
    problem = networks.make("mlp", "quick" if quick else "heavy")
    calls: dict[str, Any] = {}
    shares: dict[str, dict[str, float]] = {}
    step, state = (
        jax.jit(by_hand.hand_step(problem.loss, by_hand.plain)),
        by_hand.hand_state(problem.params, False),
    )
    calls["plain"] = timing.call(step, problem.params, state, problem.stats, problem.batch)
    for name in methods:
        method = METHODS[name]
        if method.make is None or not method.kinds:
            continue
        variant = method.make(0.1, by_hand.BASE, 100)
        options = {**method.options, "batch_argnums": 2} if method.options else {}
        whole = variant if variant.is_optimizer else None
        step, tx = by_hand.step_of_variant(problem.loss, variant, whole, **options)
        step, state, shares[name] = jax.jit(step), tx.init(problem.params), {}
        for number in range(max(method.kinds) + 1):
            arguments = problem.params, state, problem.stats, problem.batch
            if number in method.kinds:
                calls[f"{name}, {number}"] = timing.call(step, *arguments)
                shares[name][f"{name}, {number}"] = method.kinds[number]
            state = jax.block_until_ready(step(*arguments)[1])
    times = timing.interleaved(calls, rounds=2 if quick else 15)
    for name, parts in shares.items():
        times[name] = [
            sum(share * times[part][i] for part, share in parts.items()) for i in range(len(times["plain"]))
        ]
    return {name: timing.ratio(times, name, "plain") for name in ("plain", *shares)}


def share_of_gain(scores: dict[str, np.ndarray], method: str) -> tuple[float, float]:
    """What part of SAM's mean gain a method has, and the standard error of that over seeds, in percent.

    The ratio of the mean gains, since a seed on which SAM gains little would rule a mean of ratios; its error
    by the delta method.
    """
    gain, of_sam = scores[method] - scores["plain"], scores["sam"] - scores["plain"]
    share = gain.mean() / (of_sam.mean() or math.nan)
    if len(gain) < 2:
        return 100 * share, math.nan
    error = np.std(gain - share * of_sam, ddof=1) / math.sqrt(len(gain))
    return 100 * share, 100 * float(error / abs(of_sam.mean()))


def summarize(
    scores: dict[str, np.ndarray], times: dict[str, timing.Spread], radii: dict[str, float]
) -> dict[str, Any]:
    """The row of each method."""
    report = {}
    for method, values in scores.items():
        share, error = share_of_gain(scores, method)
        report[method] = {
            "rho": radii[method],
            "gradients": METHODS[method].gradients,
            "score": reporting.spread(values),
            "gain": reporting.gain_over(values, scores["plain"]),
            "share": share,
            "error": error,
            "time": times.get(method),
        }
    return report


def text_of(content: dict[str, Any]) -> str:
    """The tables as RESULTS.md has them, from what is in the JSON."""
    tables = []
    for name, report in content["tasks"].items():
        task, seeds = TASKS[name], content["seeds"]
        tables.append(f"{task.title}; {content['epochs'] or task.epochs} epochs, {seeds} paired seeds:")
        tables.append(table(report, task.unit))
    return "\n\n".join(tables)


def table(report: dict[str, Any], unit: str) -> str:
    """The report as text."""
    form = ".1f" if unit == "%" else ".3f"
    columns = [
        "method",
        "radius",
        "gradients",
        f"score, {unit}",
        "gain, worst seed",
        "of SAM's gain, %",
        "time",
    ]
    rows = []
    for method, row in report.items():
        plain = method == "plain"
        rows.append(
            [
                method,
                "" if plain else f"{row['rho']:g}",
                "1 to 2" if row["gradients"] is None else f"{row['gradients']:.3g}",
                reporting.show(row["score"], form),
                "" if plain else f"{row['gain']['worst']:+{form}}",
                "" if plain else f"{row['share']:.0f} ± {row['error']:.0f}",
                "" if row["time"] is None else f"{row['time'][0]:.2f}",
            ]
        )
    return timing.markdown(columns, rows)


def meaning(report: dict[str, Any]) -> str:
    """What the tables say: at which price which share is kept, on one task and on all of them."""
    lines = []
    for limit in (1.05, 1.1, 1.2):
        kept = {
            method: min(rows[method]["share"] for rows in report.values())
            for method in set.intersection(*map(set, report.values()))
            if method not in ("plain", "sam") and (METHODS[method].gradients or 2.0) <= limit
        }
        if not kept:
            continue
        for task, rows in report.items():
            best = max(kept, key=lambda method: rows[method]["share"])
            row = rows[best]
            lines.append(
                f"{task}, at most {limit:g} gradients: {best} keeps {row['share']:.0f} ± "
                f"{row['error']:.0f} % of SAM's gain."
            )
        best = max(kept, key=lambda method: kept[method])
        lines.append(
            f"On all of these tasks, at most {limit:g} gradients: {best} keeps {kept[best]:.0f} % or more."
        )
    return "\n".join(lines)


def figure(report: dict[str, Any]) -> Any:
    """What is kept of the gain over what it costs, a panel for each task."""
    picture = timing.figure_class()(figsize=(4.2 * len(report), 4.4), layout="constrained")
    panels = picture.subplots(1, len(report), sharey=True, squeeze=False)[0]
    for axes, (task, rows) in zip(panels, report.items(), strict=True):
        for method, row in rows.items():
            if method == "plain":
                continue
            x, y = row["gradients"] or 1.5, row["share"]
            axes.errorbar(x, y, yerr=row["error"], fmt="o", color="#1f5fa8", capsize=3, alpha=0.8)
            axes.annotate(method, (x, y), xytext=(5, 3), textcoords="offset points", fontsize=7)
        axes.axhline(100, color="#7f7f7f", linewidth=0.8, linestyle="--")
        axes.set(title=task, xlabel="gradients a step", xlim=(0.95, 2.3))
        timing.tidy(axes)
    panels[0].set(ylabel="share of SAM's gain, % (± standard error)", ylim=(-20, 130))
    return picture


if __name__ == "__main__":
    main()
