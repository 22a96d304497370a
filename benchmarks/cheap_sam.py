"""What SAM's gain costs, and how much of it cheaper forms of SAM keep.

    python benchmarks/cheap_sam.py
    python benchmarks/cheap_sam.py --tune

Quality: scikit-learn's digits with 40 % wrong labels, as in `examples/train_digits.py`, on seeds from 100
on; each method with a radius of its own, chosen with `--tune` on the seeds 0 to 4. Cost: a step's time as a
multiple of plain SGD's, once on that network, whose arithmetic on params counts as much as its gradients,
and once on a batch so large that gradients dominate.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import by_hand
import networks
import reporting
import timing
from digits import NUM_TRAIN, Arm, train
from digits_recipes import Setting, base_arm

import optax_sam

FIRST_SEED, BATCH_SIZE = 100, 50
PARTS = {"batch_argnums": (1, 2)}


class Method(NamedTuple):
    """A way to train.

    Attributes:
      make: From radius and base optimizer to the variant.
      rho: The radius that was chosen.
      radii: Those it was chosen from.
      gradients: Gradient evaluations a step, of the whole batch.
      whole: Whether the variant is a whole optimizer.
      options: Of `sam_value_and_grad`; `batch_argnums` is added.
    """

    make: Callable[..., Any]
    rho: float
    radii: tuple[float, ...]
    gradients: float
    whole: bool = False
    options: dict[str, Any] | None = None

    def arm(self, name: str, rho: float, setting: Setting) -> Arm:
        """For the digits."""
        variant = self.make(rho, setting.optimizer)
        tx = variant if self.whole else optax.chain(variant, setting.optimizer)
        return Arm(name, variant, tx, {**self.options, **PARTS} if self.options else None)


RADII = (0.35, 0.5, 0.7, 0.85, 1.0, 1.4)
# The gradient of a few examples is mostly noise, and of a longer step along it little points upwards.
LONG = (0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6)


def _sam(rho: float, radii: Sequence[float], gradients: float, **options: Any) -> Method:
    return Method(lambda rho, _: optax_sam.sam(rho), rho, tuple(radii), gradients, options=options)


def _looksam(rho: float, k: int) -> Method:
    return Method(lambda rho, _: optax_sam.looksam(rho, k, 0.7), rho, RADII, 1 + 1 / k)


def _async_sam(rho: float, reuse: str, gradients: float) -> Method:
    return Method(lambda rho, _: optax_sam.async_sam(rho, reuse=reuse), rho, LONG, gradients)


METHODS = {
    "sam": _sam(0.85, RADII, 2.0),
    "sam, bfloat16 ascent": _sam(0.85, RADII, 2.0, ascent_dtype=jnp.bfloat16),
    "sam, ascent on 1/2": _sam(1.4, LONG, 1.5, ascent_examples=0.5),
    "sam, ascent on 1/5": _sam(2.0, LONG, 1.2, ascent_examples=0.2),
    "sam, ascent on 1/10": _sam(2.8, LONG, 1.1, ascent_examples=0.1),
    "looksam, k = 5": _looksam(1.4, 5),
    "looksam, k = 20": _looksam(0.5, 20),
    "looksam, k = 50": _looksam(0.5, 50),
    "async_sam": _async_sam(4.0, "clean", 2.0),
    "async_sam, perturbed": _async_sam(1.4, "perturbed", 1.0),
    "msam": Method(lambda rho, base: optax_sam.msam(base, rho), 4.0, (*LONG, 8.0), 1.0, whole=True),
}


def tune(seeds: int, epochs: int, names: Sequence[str]) -> None:
    """Final accuracy for every radius, on the first seeds."""
    setting = Setting("momentum", None, 0.0, epochs * (NUM_TRAIN // BATCH_SIZE))
    for name in names:
        method = METHODS[name]
        arms = [method.arm(f"{rho:g}", rho, setting) for rho in method.radii]
        curves = train(arms, range(seeds), epochs=epochs, batch_size=BATCH_SIZE, progress=False)
        found = {arm: 100 * curve.test[:, -1].mean() for arm, curve in curves.items()}
        print(f"{name}: " + ", ".join(f"{rho} {value:.1f}" for rho, value in found.items()), flush=True)


def quality(names: Sequence[str], seeds: int, epochs: int) -> tuple[dict[str, Any], dict[str, timing.Spread]]:
    """Curves of all methods and of plain momentum, and the times of their epochs in units of its."""
    setting = Setting("momentum", None, 0.0, epochs * (NUM_TRAIN // BATCH_SIZE))
    arms = [base_arm(setting)._replace(name="sgd")]
    arms += [METHODS[name].arm(name, METHODS[name].rho, setting) for name in names]
    numbers = range(FIRST_SEED, FIRST_SEED + seeds)
    curves = train(arms, numbers, epochs=epochs, batch_size=BATCH_SIZE, progress=sys.stderr.isatty())
    times = {name: curve.seconds.ravel().tolist() for name, curve in curves.items()}
    return curves, {name: timing.ratio(times, name, "sgd") for name in curves}


def cost(names: Sequence[str], network: str, size: str, rounds: int) -> dict[str, timing.Spread]:
    """Times of a step on a batch where gradients dominate, in units of plain SGD's; LookSAM's on average."""
    problem = networks.make(network, size)
    step, tx = by_hand.hand_step(problem.loss, by_hand.plain), None
    state = by_hand.hand_state(problem.params, False)
    calls = {"sgd": timing.call(jax.jit(step), problem.params, state, problem.stats, problem.batch)}
    period: dict[str, int] = {}
    for name in names:
        method = METHODS[name]
        variant = method.make(method.rho, by_hand.BASE)
        options = {**method.options, "batch_argnums": 2} if method.options else {}
        step, tx = by_hand.step_of_variant(
            problem.loss, variant, variant if method.whole else None, **options
        )
        jitted, state = jax.jit(step), tx.init(problem.params)
        # From the second step on: the first of a memory is a special one.
        after = jax.block_until_ready(jitted(problem.params, state, problem.stats, problem.batch)[1])
        if name.startswith("looksam"):
            period[name] = int(name.split()[-1])
            arguments = problem.params, state, problem.stats, problem.batch
            calls[f"{name}, refresh"] = timing.call(jitted, *arguments)
        calls[name] = timing.call(jitted, problem.params, after, problem.stats, problem.batch)
    times = timing.interleaved(calls, rounds=rounds)
    for name, k in period.items():
        pairs = zip(times[name], times[f"{name}, refresh"], strict=True)
        times[name] = [((k - 1) * reuse + refresh) / k for reuse, refresh in pairs]
    return {name: timing.ratio(times, name, "sgd") for name in ("sgd", *names)}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table, draws the figure and returns the numbers."""
    parser = timing.parser(__doc__, "results/cheap_sam")
    parser.add_argument("--seeds", type=timing.count(), default=10, help="default: %(default)s")
    parser.add_argument("--epochs", type=timing.count(), default=100, help="default: %(default)s")
    parser.add_argument("--network", choices=networks.SIZES, default="mlp", help="default: %(default)s")
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
    if options.tune:
        tune(*((1, 2) if options.quick else (5, options.epochs)), options.methods)
        return {}
    if "sam" not in options.methods:
        parser.error("argument --methods: must hold sam, with which the others are compared")
    size, rounds = "heavy", 15
    if options.quick:
        options.seeds, options.epochs, size, rounds = 1, 2, "quick", 2
    curves, small = quality(options.methods, options.seeds, options.epochs)
    large = cost(options.methods, options.network, size, rounds)
    report = summarize(curves, small, large)
    words = [] if options.quick else [meaning(report)]
    print(headline(options), table(report), *words, sep="\n\n")
    timing.save(figure(report), options, "cheap_sam")
    return report


def summarize(curves: Any, small: Any, large: Any) -> dict[str, Any]:
    """Final accuracies in percent, and the share of SAM's gain, seed by seed."""
    final = {name: 100 * curve.test[:, -1] for name, curve in curves.items()}
    gain = final["sam"] - final["sgd"]
    report = {}
    for name in curves:
        report[name] = {
            "gradients": METHODS[name].gradients if name in METHODS else 1.0,
            "rho": METHODS[name].rho if name in METHODS else None,
            "final": reporting.spread(final[name]),
            "worst": float((final[name] - final["sgd"]).min()),
            # Of the mean gains: a seed on which SAM gains little would rule a mean of ratios.
            "share": float((final[name] - final["sgd"]).mean() / (gain.mean() or np.nan)),
            "shares": ((final[name] - final["sgd"]) / np.where(gain == 0, np.nan, gain)).tolist(),
            "small": small[name],
            "large": large[name],
        }
    return report


def headline(options: argparse.Namespace) -> str:
    """What was measured."""
    return (
        f"Digits, 40 % wrong labels, {options.epochs} epochs, {options.seeds} paired seeds; times are "
        f"multiples of SGD's, median (quartiles), on the digits' MLP with batches of {BATCH_SIZE} and on a "
        f"{options.network} where gradients dominate."
    )


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    columns = [
        "method",
        "rho",
        "gradients a step",
        "final accuracy, %",
        "gain, worst seed",
        "of SAM's gain, %",
    ]
    columns += ["spread over seeds", "time, digits", "time, large batch"]
    rows = []
    for name, row in report.items():
        shares = timing.spread([100 * x for x in row["shares"]])
        is_base = row["rho"] is None
        rows.append(
            [
                name,
                "" if is_base else f"{row['rho']:g}",
                f"{row['gradients']:g}",
                reporting.show(row["final"]),
                "" if is_base else f"{row['worst']:+.1f}",
                "" if is_base else f"{100 * row['share']:.0f}",
                "" if is_base else f"{shares.low:.0f}-{shares.high:.0f}",
                f"{row['small']:.2f}",
                f"{row['large']:.2f}",
            ]
        )
    return timing.markdown(columns, rows)


def meaning(report: dict[str, Any]) -> str:
    """The two questions: all of the gain at a quarter more than SGD, most of it for nothing."""

    def best(limit: float) -> str:
        affordable = {n: r for n, r in report.items() if r["rho"] and r["large"].median <= limit}
        if not affordable:
            return f"At no more than {limit:g} times SGD: none."
        name = max(affordable, key=lambda n: affordable[n]["share"])
        row = affordable[name]
        return (
            f"At no more than {limit:g} times SGD: {name} keeps {100 * row['share']:.0f} % of SAM's gain "
            f"at {row['large'].median:.2f} times."
        )

    return "\n".join(best(limit) for limit in (1.03, 1.25, 1.6))


def figure(report: dict[str, Any]) -> Any:
    """What is kept of the gain over what it costs."""
    picture = timing.figure_class()(figsize=(8, 4.5), layout="constrained")
    axes = picture.subplots()
    for name, row in report.items():
        x, y = row["large"], 100 * row["share"]
        error = [[max(0.0, x.median - x.low)], [max(0.0, x.high - x.median)]]
        marker = "os^DvP*X<>hp"[len(axes.containers) % 12]
        axes.errorbar(x.median, y, xerr=error, fmt=marker, capsize=3, alpha=0.8, label=name)
    axes.set(
        xlabel="time of a step, as a multiple of SGD's, where gradients dominate",
        ylabel="share of SAM's gain, %",
        title="Digits with 40 % wrong labels: what cheaper forms of SAM keep",
    )
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    timing.tidy(axes)
    return picture


if __name__ == "__main__":
    main()
