"""What a training step of every variant costs, counted by the compiler: nothing is timed.

    python benchmarks/counts.py
    python benchmarks/counts.py --variants sam asam

FLOPs, temporary memory and optimizer state of the whole step, relative to the same step without SAM, which is
momentum SGD. Memory is that of a step that overwrites params and state. If a step can skip its second
gradient, the compiler counts the longer form; "gradients" is the mean over a period. Each variant has the
arguments of its first row in `tests/table.py`. With `--variants` the counts of all others stay in the file.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import by_hand
import jax
import networks
import table
import timing

NETWORKS = ("mlp", "transformer")
ROWS = sorted(table.VARIANTS, key=lambda row: row.name)


def count(step: Any, state: Any, problem: networks.Problem) -> dict[str, float]:
    """FLOPs, bytes of temporary memory, and bytes of the optimizer's state."""
    arguments = problem.params, state, problem.stats, problem.batch
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    return {
        "flops": timing.flops(compiled),
        "memory": timing.temporary_bytes(compiled),
        "state": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
    }


def measure(problem: networks.Problem, rows: Sequence[table.Row]) -> dict[str, dict[str, float]]:
    """The counts of plain training and of the variants."""
    plain = by_hand.hand_step(problem.loss, by_hand.plain), by_hand.hand_state(problem.params, False)
    found = {"sgd": count(*plain, problem)}
    for row in rows:
        variant, tx = row.optimizer(by_hand.BASE)
        step, _ = by_hand.step_of_variant(problem.loss, variant, tx)
        found[row.name] = count(step, tx.init(problem.params), problem)
    return found


def gradients(row: table.Row) -> str:
    """How many a step takes."""
    few, many = min(row.evaluations), max(row.evaluations)
    return f"{few} to {many}" if row.evaluates_by_data else f"{sum(row.evaluations) / len(row.evaluations):g}"


def text_of(content: Mapping[str, Any]) -> str:
    """The tables as RESULTS.md has them, from what is in the JSON."""
    counts = content["networks"]
    # A state is as many copies of params whatever the network: one column will do.
    shown = [(key, name) for key in ("flops", "memory") for name in counts] + [("state", next(iter(counts)))]
    columns = ["variant", "gradients", *(f"{key}, {name}" for key, name in shown)]
    lines = []
    for variant, each in content["gradients"].items():
        ratios = [counts[name][variant][key] / counts[name]["sgd"][key] for key, name in shown]
        lines.append([variant, each, *(f"{ratio:.2f}" for ratio in ratios)])
    return timing.markdown(columns, lines)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Counts, prints the table and writes the numbers."""
    parser, names = timing.parser(__doc__, "results/counts"), [row.name for row in ROWS]
    some = timing.some_of(names)
    parser.add_argument("--variants", nargs="+", choices=names, default=names, metavar="NAME", help=some)
    options = timing.parse(parser, argv)
    path, rows = options.output / "counts.json", [row for row in ROWS if row.name in options.variants]
    empty = {"gradients": {}, "networks": {name: {} for name in NETWORKS}}
    content = json.loads(path.read_text()) if path.exists() else empty
    content |= {"machine": timing.machine()}
    every = content["gradients"] | {row.name: gradients(row) for row in rows}
    content["gradients"] = dict(sorted(every.items()))
    for name, found in content["networks"].items():
        found |= measure(networks.make(name, "quick" if options.quick else "small"), rows)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{text_of(content)}\n\nWritten: {path}")
    if options.quick:
        print(timing.SMOKE)
    return content


if __name__ == "__main__":
    main()
