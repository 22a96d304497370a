"""Which radius: what every one of a grid gives, where training collapses, and how far off a default is.

    python benchmarks/radius.py
    python benchmarks/radius.py --networks mlp --variants sam asam
    python benchmarks/radius.py --tables

Scikit-learn's digits, the networks and the learning rates of `defaults.py`, clean labels and 30 % wrong ones,
and a small transformer that predicts the next byte of Python's documentation. A cell is a network, a learning
rate and a set of labels. Of every cell and radius the test accuracy after the last epoch is compared with
that of plain training, paired by seeds. A radius collapses where a seed ends below 20 %; the most frequent
byte alone is 17 % of the text.

It runs in parts: what is in `radius.json` already is not measured again. The file is written after every
variant of every network, so that an interrupted run goes on where it was.
"""

import itertools
import json
import pydoc_data.topics
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import defaults
import digits
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing
from defaults import COLLAPSE, Case, Recipe, Trainer

import optax_sam

# Text.

CONTEXT, PIECES = 16, 1500


class Transformer(nn.Module):
    """Predicts the next byte: two causal blocks of width 32 with two heads."""

    @nn.compact
    def __call__(self, tokens: jax.Array, *, train: bool) -> jax.Array:
        """Logits of shape (batch, length, 128)."""
        del train
        x = nn.Embed(128, 32)(tokens) + self.param("positions", nn.initializers.normal(0.02), (CONTEXT, 32))
        mask = nn.make_causal_mask(tokens)
        for _ in range(2):
            x += nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=mask)
            x += nn.Dense(32)(nn.gelu(nn.Dense(128)(nn.LayerNorm()(x))))
        return nn.Dense(128)(nn.LayerNorm()(x))


def load_text(seed: int, wrong: float) -> digits.Digits:
    """Python's documentation, the same for all seeds; `images` are bytes, `labels` the bytes that follow."""
    del seed, wrong
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[topic] for topic in sorted(topics)).encode("ascii", "replace")
    pieces = np.frombuffer(text, np.uint8)[: PIECES * (CONTEXT + 1)].reshape(PIECES, -1).astype(np.int32)
    held_out = np.arange(PIECES) // 30 % 3 == 2
    train, test = jnp.asarray(pieces[~held_out][: digits.NUM_TRAIN]), jnp.asarray(pieces[held_out])
    right = jnp.zeros(len(train), bool)
    return digits.Digits(train[:, :-1], train[:, 1:], right, test[:, :-1], test[:, 1:])


RECIPES = {
    **defaults.RECIPES,
    "text": Recipe(Transformer(), optax.adamw, (0.003, 0.01), (), {"clean": 0.0}, load_text),
}


# Variants.


POINT, SAFE, FALL = 1.0, 2.0, 5.0


class Arm(NamedTuple):
    """A variant, and the radii that are tried.

    Attributes:
      case: How it is made.
      radii: The grid.
      start: The radius that the docs say to begin with.
      warm_up: Fraction of the steps in which the radius grows from 0.
    """

    case: Case
    radii: tuple[float, ...]
    start: float
    warm_up: float = 0.0


def _arm(constructor: Any, radii: tuple[float, ...], start: float, warm_up: float = 0.0, **fixed: Any) -> Arm:
    return Arm(Case(constructor, [{"rho": rho} for rho in radii], fixed), radii, start, warm_up)


USUAL = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8)
ARMS = {
    "sam": _arm(optax_sam.sam, USUAL, 0.05),
    "sam, warm-up": _arm(optax_sam.sam, USUAL, 0.1, warm_up=0.3),
    "asam": _arm(optax_sam.asam, (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0), 0.1),
    "gsam": _arm(optax_sam.gsam, USUAL, 0.05),
    "layerwise": _arm(
        optax_sam.sam, (0.0025, 0.005, 0.01, 0.02, 0.04), 0.005, ascent=optax_sam.ascent.layerwise()
    ),
    "matrix": _arm(optax_sam.sam, USUAL, 0.05, ascent=optax_sam.ascent.matrix("nuclear")),
    "looksam": _arm(optax_sam.looksam, USUAL, 0.1),
}


def measure(trainer: Trainer, network: str, name: str) -> list[dict[str, Any]]:
    """A row for each cell of a network: the accuracy of all seeds at each radius, of plain training at 0."""
    arm = ARMS.get(name)
    radii = arm.radii if arm else (0.0,)
    cells = [(labels, rate) for labels in trainer.recipe.labels for rate in trainer.recipe.rates]
    runs = [
        {
            "rate": rate,
            "labels": list(trainer.recipe.labels).index(labels),
            "seed": seed,
            "settings": {"rho": rho} if arm else {},
        }
        for labels, rate in cells
        for rho in radii
        for seed in range(trainer.seeds)
    ]
    ends = trainer.train(arm.case if arm else None, runs)
    accuracy = np.reshape([end["accuracy"] for end in ends], (len(cells), len(radii), -1)).round(2).tolist()
    return [
        {
            "variant": name,
            "network": network,
            "rate": rate,
            "labels": labels,
            "accuracy": {f"{rho:g}": of_seeds for rho, of_seeds in zip(radii, of_cell, strict=True)},
        }
        for (labels, rate), of_cell in zip(cells, accuracy, strict=True)
    ]


# Report.


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each variant and cell: gains by radius, and where a collapse begins."""
    plain = {place(row): np.array(row["accuracy"]["0"]) for row in rows if row["variant"] == "plain"}
    report = []
    for row in rows:
        if row["variant"] == "plain":
            continue
        base = plain[place(row)]
        accuracy = {float(rho): np.array(ends) for rho, ends in row["accuracy"].items()}
        gains = {rho: float(np.mean(ends - base)) for rho, ends in accuracy.items()}
        collapsed = [rho for rho, ends in accuracy.items() if min(ends) < COLLAPSE <= min(base)]
        report.append(
            {
                "variant": row["variant"],
                "network": row["network"],
                "rate": row["rate"],
                "labels": row["labels"],
                "plain": float(np.mean(base)),
                "gains": gains,
                "collapses from": min(collapsed) if collapsed else None,
            }
        )
    return report


def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The cell of a row."""
    return row["network"], row["rate"], row["labels"]


def table(report: Sequence[Mapping[str, Any]]) -> str:
    """Every cell of every variant."""
    lines = [
        [
            row["variant"],
            row["network"],
            f"{row['rate']:g}",
            row["labels"],
            f"{row['plain']:.1f}",
            ", ".join(f"{rho:g}: {gain:+.1f}" for rho, gain in row["gains"].items()),
            "" if row["collapses from"] is None else f"{row['collapses from']:g}",
        ]
        for row in report
    ]
    columns = ["variant", "network", "rate", "labels", "plain, %", "rho: gain in points", "collapses from"]
    return timing.markdown(columns, lines)


def advice(report: Sequence[Mapping[str, Any]]) -> str:
    """Of every variant and network: the best radius for all cells, and up to where it is safe."""
    lines = []
    for name, rows in by("variant", report).items():
        found = {
            network: f"{best_of(some):g}; " + (f"to {safe[-1]:g}" if (safe := safe_of(some)) else "none safe")
            for network, some in by("network", rows).items()
        }
        falls = [(rho, row["network"]) for row in rows for rho, gain in row["gains"].items() if gain < -FALL]
        first = min(falls, default=(None, ""))[0]
        where = ", ".join(network for network in RECIPES if (first, network) in falls)
        cells = [found.get(network, "") for network in RECIPES]
        lines.append([name, *cells, f"{first:g} ({where})" if falls else ""])
    return timing.markdown(["variant", *RECIPES, f"{FALL:g} points lost from"], lines)


def starts(report: Sequence[Mapping[str, Any]]) -> str:
    """Of every variant: in how many cells its start value is within a point of the best radius."""
    lines = []
    for name, rows in by("variant", report).items():
        start, networks = ARMS[name].start, by("network", rows)
        chosen = sum(near(some, best_of(some)) for some in networks.values())
        gains = [row["gains"][start] for row in rows]
        lines.append(
            [
                name,
                f"{start:g}",
                *(
                    f"{near(networks[n], start)} of {len(networks[n])}" if n in networks else ""
                    for n in RECIPES
                ),
                f"{near(rows, start)} of {len(rows)}",
                f"{chosen} of {len(rows)}",
                f"{np.mean(gains):+.1f} ({min(gains):+.1f})",
            ]
        )
    columns = ["variant", "start", *RECIPES, "all", "best of the network", "start gains (worst cell)"]
    return timing.markdown(columns, lines)


def by(key: str, report: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows by what they have in common."""
    return {value: [row for row in report if row[key] == value] for value in {row[key]: 0 for row in report}}


def near(rows: Sequence[Mapping[str, Any]], rho: float) -> int:
    """In how many cells a radius is within a point of the best, which may be plain training."""
    return sum(max(0.0, *row["gains"].values()) - row["gains"][rho] <= POINT for row in rows)


def best_of(rows: Sequence[Mapping[str, Any]]) -> float:
    """Of the safe radii the one within a point of the best in most cells, or with the largest mean gain."""
    candidates = safe_of(rows) or list(rows[0]["gains"])
    return max(
        candidates, key=lambda rho: (near(rows, rho), float(np.mean([row["gains"][rho] for row in rows])))
    )


def safe_of(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Radii that, like all smaller ones, are in no cell more than two points below plain training."""

    def is_safe(rho: float) -> bool:
        return all(row["gains"][rho] >= -SAFE for row in rows)

    return list(itertools.takewhile(is_safe, sorted(rows[0]["gains"])))


def text_of(content: Mapping[str, Any]) -> str:
    """The tables as RESULTS.md has them, from what is in the JSON."""
    report = summarize(content["rows"])
    return f"{advice(report)}\n\n{starts(report)}\n\n{table(report)}"


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measures what is missing, prints the tables and returns the report."""
    parser = timing.parser(__doc__, "results/radius")
    parser.add_argument("--tables", action="store_true", help="print the tables of what is there, and stop")
    parser.add_argument("--seeds", type=timing.count(), default=2, help="default: %(default)s")
    parser.add_argument("--epochs", type=timing.count(), default=12, help="default: %(default)s")
    choice = partial(parser.add_argument, nargs="+")
    choice("--variants", choices=ARMS, default=list(ARMS), metavar="VARIANT", help=timing.some_of(ARMS))
    networks = list(RECIPES)
    choice("--networks", choices=networks, default=networks, metavar="NETWORK", help=timing.some_of(networks))
    options = timing.parse(parser, argv)
    if options.quick:
        print(timing.SMOKE)
        options.seeds, options.epochs = 1, 1
    path = options.output / "radius.json"
    setup = {"seeds": options.seeds, "epochs": options.epochs}
    kept = json.loads(path.read_text()) if path.exists() else {**setup, "rows": []}
    if {key: kept[key] for key in setup} != setup:
        parser.error(f"argument --output: {str(path)!r} was measured with other seeds or epochs")
    if options.tables:
        print(text_of(kept))
        return summarize(kept["rows"])
    begin, order = time.perf_counter(), ["plain", *ARMS]
    for network in options.networks:
        for variant in ("plain", *options.variants):
            if any((row["network"], row["variant"]) == (network, variant) for row in kept["rows"]):
                continue
            warm_up = ARMS[variant].warm_up if variant in ARMS else 0.0
            trainer = Trainer(RECIPES[network], options.seeds, options.epochs, warm_up)
            kept["rows"] += measure(trainer, network, variant)
            kept["rows"].sort(key=lambda row: (networks.index(row["network"]), order.index(row["variant"])))
            kept["machine"] = timing.machine()
            path.write_text(json.dumps(kept, indent=1) + "\n")
            seconds = time.perf_counter() - begin
            print(f"{network}, {variant}: done after {seconds:.0f} s", file=sys.stderr, flush=True)
    print(f"{text_of(kept)}\n\nWritten: {path}")
    return summarize(kept["rows"])


if __name__ == "__main__":
    main()
