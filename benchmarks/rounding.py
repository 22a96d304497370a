"""How far rounding alone moves the result of a training.

    python benchmarks/rounding.py

The plain trainings of `defaults.py`, each from several starts whose weights differ by one rounding: every
weight is multiplied by 1 + 2^-23 or 1 - 2^-23, at random. Data, order of batches and program are the same.
So does another machine, or another program for the same rule, differ; what a seed's results differ by here
cannot be told from rounding there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import defaults
import jax
import jax.numpy as jnp
import numpy as np
import timing


def nudged(starts: Any, key: jax.Array) -> Any:
    """Weights moved by one rounding, up or down."""
    eps = float(jnp.finfo(jnp.float32).eps)

    def nudge(x: jax.Array) -> jax.Array:
        return x * (1 + eps * jax.random.rademacher(key, x.shape, x.dtype))

    return jax.tree.map(nudge, starts)


def measure(network: str, starts: int, seeds: int, epochs: int) -> list[dict[str, Any]]:
    """A row for each learning rate and set of labels: final accuracies by start and seed, in percent."""
    trainer = defaults.Trainer(defaults.RECIPES[network], seeds, epochs)
    first, found = trainer.starts, []
    for number in range(starts):
        trainer.starts = nudged(first, jax.random.key(number)) if number else first
        found.append(defaults.measure(trainer, network, "plain"))
    return [
        {
            "network": network,
            "rate": rows[0]["rate"],
            "labels": rows[0]["labels"],
            "accuracy": [row["accuracy"] for row in rows],
        }
        for rows in zip(*found, strict=True)
    ]


def text_of(content: Mapping[str, Any]) -> str:
    """The table as RESULTS.md has it, from what is in the JSON."""
    columns = [
        "network",
        "learning rate",
        "labels",
        "test accuracy, %",
        "range over starts, points",
        "largest",
    ]
    lines = []
    for row in content["rows"]:
        accuracy = np.array(row["accuracy"])
        ranges = np.ptp(accuracy, axis=0)
        cells = [row["network"], f"{row['rate']:g}", row["labels"], f"{accuracy.mean():.1f}"]
        lines.append([*cells, f"{ranges.mean():.1f}", f"{ranges.max():.1f}"])
    return timing.markdown(columns, lines)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, prints the table and writes the numbers."""
    parser = timing.parser(__doc__, "results/rounding")
    parser.add_argument("--starts", type=timing.count(2), default=5, help="default: %(default)s")
    parser.add_argument("--seeds", type=timing.count(), default=3, help="default: %(default)s")
    parser.add_argument("--epochs", type=timing.count(), default=12, help="default: %(default)s")
    options = timing.parse(parser, argv)
    if options.quick:
        options.starts, options.seeds, options.epochs = 2, 1, 1
    content: dict[str, Any] = {"starts": options.starts, "epochs": options.epochs, "rows": []}
    for network in defaults.RECIPES:
        content["rows"] += measure(network, options.starts, options.seeds, options.epochs)
        print(f"{network}: done", flush=True)
    print(f"\n{text_of(content)}")
    timing.write(options, "rounding", content)
    return content


if __name__ == "__main__":
    main()
