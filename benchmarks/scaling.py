"""What the library itself costs, without gradients: by the number of params, and of the leaves they lie in.

    python benchmarks/scaling.py

The gradients are given; what is timed is the norm, the perturbed point, the direction and the memory. A
floor is measured in the same run: the bytes that the rule must read and write at the least, at the rate at
which this machine adds one to as many numbers, in as many leaves. Compile times are those of the processor.
"""

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import by_hand
import jax
import jax.numpy as jnp
import timing

import optax_sam
from optax_sam._loss import Loss, Pass, Peers

# The variant, and how often a rule must at the least read or write something of the size of the params: SAM
# reads the gradient for its norm, reads it again with the params, and writes the point.
VARIANTS = {
    "sam": (optax_sam.sam(0.05), 4),
    "asam": (optax_sam.asam(0.5), 5),
    "gsam": (optax_sam.gsam(0.05, 0.4), 9),
    "wsam": (optax_sam.wsam(0.05, 0.9), 7),
    "saner": (optax_sam.saner(0.05, 0.5), 7),
    "async_sam, perturbed": (optax_sam.async_sam(0.05, reuse="perturbed"), 6),
}


def own_part(variant: Any) -> Any:
    """All that the library does in a step, from params, two gradients and state to point and direction."""

    def step(params: Any, clean: Any, perturbed: Any, state: Any) -> Any:
        given, points = iter((clean, perturbed)), []

        def pass_at(point: Any, _: Any) -> Pass:
            points.append(point)
            return Pass(jnp.zeros(()), next(given))

        evaluation = variant.evaluate(Loss(params, pass_at, pass_at, Peers()), state)
        direction, state = variant.update(evaluation.gradients, state, params)
        return points[-1], direction, state

    return step


def sam_by_hand(params: Any, clean: Any, perturbed: Any, state: Any) -> Any:
    """SAM's, in three lines of JAX."""
    return by_hand.climb(params, clean), perturbed, state


def tree(size: int, leaves: int, seed: int) -> list[jax.Array]:
    """Params of one size, in leaves of one length."""
    key = jax.random.key(seed)
    return list(jnp.split(jax.random.normal(key, (max(1, size // leaves) * leaves,)), leaves))


def measure(size: int, leaves: int, names: Sequence[str], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds, the floor's, and compile times, for each of the rules."""
    params, clean, perturbed = (tree(size, leaves, seed) for seed in range(3))
    size = sum(x.size for x in params)
    calls, seconds, compile_seconds = {}, {}, {}
    steps = {"by hand": (sam_by_hand, ())}
    steps |= {name: (own_part(VARIANTS[name][0]), VARIANTS[name][0].init(params)) for name in names}
    for name, (step, state) in steps.items():
        jax.clear_caches()
        begin = time.process_time()
        compiled = jax.jit(step).lower(params, clean, perturbed, state).compile()
        compile_seconds[name] = time.process_time() - begin
        calls[name] = timing.call(compiled, params, clean, perturbed, state)
    calls["copy"] = timing.call(jax.jit(lambda xs: [x + 1 for x in xs]), params)
    times = timing.interleaved(calls, rounds=rounds)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    rate = 2 * 4 * size / seconds["copy"]
    return {
        name: {
            "size": size,
            "leaves": leaves,
            "seconds": seconds[name],
            "floor": statistics.median(
                (VARIANTS[name][1] if name in VARIANTS else 4) / 2 * copy / mine
                for copy, mine in zip(times["copy"], times[name], strict=True)
            ),
            "rate": rate,
            "compile": compile_seconds[name],
        }
        for name in steps
    }


def exponent(found: Sequence[dict[str, float]], over: str, of: str) -> float:
    """By which power something grows between the two largest sizes; NaN where there is but one."""
    first, last = found[-2:] if len(found) > 1 else found * 2
    if first[over] == last[over]:
        return math.nan
    return math.log(last[of] / first[of]) / math.log(last[over] / first[over])


def rows_of(found: Sequence[dict[str, dict[str, float]]]) -> list[list[str]]:
    """The table."""
    rows = []
    for one in found:
        for name, row in one.items():
            rows.append(
                [
                    name,
                    f"{row['size']:.0e}",
                    f"{row['leaves']}",
                    f"{1e3 * row['seconds']:.3f}",
                    f"{row['floor']:.2f}",
                    f"{row['rate'] / 1e9:.1f}",
                    f"{row['compile']:.2f}",
                ]
            )
    return rows


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints both tables and the exponents, draws the figure and returns the numbers."""
    parser = timing.parser(__doc__, "results/scaling")
    add, count = parser.add_argument, timing.count()
    powers = [10**n for n in range(4, 9)]
    add("--sizes", type=timing.count(10), nargs="+", default=powers, help="of params (default: 10^4 to 10^8)")
    numbers = [10, 100, 1000, 5000]
    add("--leaves", type=count, nargs="+", default=numbers, help="of a million params (default: %(default)s)")
    add(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        metavar="NAME",
        help=timing.some_of(VARIANTS),
    )
    add("--rounds", type=count, default=11, help="of timing (default: %(default)s)")
    options = timing.parse(parser, argv)
    if options.quick:
        options.sizes, options.leaves, options.rounds = [1000, 10_000], [5, 20], 2
    options.sizes, options.leaves = sorted(set(options.sizes)), sorted(set(options.leaves))
    columns = ["rule", "params", "leaves", "ms", "floor / time", "floor, GB/s", "compile, CPU s"]

    by_size = [measure(size, 10, options.variants, options.rounds) for size in options.sizes]
    print(f"{len(by_size)} sizes: done", flush=True)
    # Variants that have no pass of their own are enough for the leaves.
    few = [name for name in ("sam", "gsam") if name in options.variants]
    by_leaves = [measure(10**6, leaves, few, options.rounds) for leaves in options.leaves]
    tables = {"By the number of params:": rows_of(by_size), "By the number of leaves:": rows_of(by_leaves)}
    content = {"columns": columns, "tables": tables}
    print(f"\n{text_of(content)}")

    report = (
        {name: exponent([one[name] for one in by_size], "size", "seconds") for name in by_size[0]},
        {name: exponent([one[name] for one in by_leaves], "leaves", "compile") for name in by_leaves[0]},
    )
    words = ("Time grows with the params", "Compile time with the leaves")
    for growth, what in zip(report, () if options.quick else words, strict=not options.quick):
        powers = ", ".join(f"{name} {power:.2f}" for name, power in growth.items())
        print(f"\n{what}, between the two largest numbers, to the power of: {powers}.")
    timing.save(figure(by_size, by_leaves), options, "scaling", content)
    return {"by_size": by_size, "by_leaves": by_leaves, "exponents": report}


text_of = timing.tables_of


def figure(by_size: Any, by_leaves: Any) -> Any:
    """Time over params, compile time over leaves."""
    picture = timing.figure_class()(figsize=(10, 4), layout="constrained")
    left, right = picture.subplots(1, 2)
    colours = {name: f"C{i}" for i, name in enumerate(by_size[0])}
    for axes, found, over, of in (
        (left, by_size, "size", "seconds"),
        (right, by_leaves, "leaves", "compile"),
    ):
        for name in found[0]:
            sizes, values = ([one[name][key] for one in found] for key in (over, of))
            axes.loglog(sizes, values, "o-", color=colours[name], label=name)
        axes.legend(frameon=False, fontsize=8)
        timing.tidy(axes)
    left.set(xlabel="params", ylabel="seconds", title="the library's own part of a step, 10 leaves")
    right.set(xlabel="leaves", ylabel="CPU seconds", title="compiling it, a million params")
    return picture


if __name__ == "__main__":
    main()
