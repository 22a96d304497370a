"""What it would save to compile the network once for both passes of SAM.

    python benchmarks/compilation.py

A step of SAM holds the network twice, and the compiler works on both copies. Three ways to write the same
step by hand, on a transformer of twelve layers and a ResNet of eight blocks: the gradient function called
twice ("inline", what the library does), the same function under its own `jax.jit` ("nested jit"), and a
`jax.lax.scan` over the two passes ("scan"). Compile time is of the processor, in turns, the median counts;
run time is paired; memory is the compiler's count.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import by_hand
import jax
import jax.numpy as jnp
import networks
import optax
import timing

RHO = 0.05
NETWORKS = {
    "transformer": (lambda: networks.Transformer(12, 128, 256), 64, 256, 8),
    "resnet": (lambda: networks.ResNet((2, 2, 2, 2), 16, 10), (32, 32, 3), 10, 32),
}
QUICK = {"transformer": (lambda: networks.Transformer(1, 16, 32), 8, 32, 2)}


def inline(grad: Any, params: Any) -> tuple[Any, Any]:
    """The network twice in one program."""
    out, gradient = grad(params)
    return out, grad(by_hand.climb(params, gradient, RHO))[1]


def nested_jit(grad: Any, params: Any) -> tuple[Any, Any]:
    """One function of its own, called twice."""
    return inline(jax.jit(grad), params)


def scan(grad: Any, params: Any) -> tuple[Any, Any]:
    """A loop of two turns, whose body holds the network once."""

    def turn(carry: Any, is_first: jax.Array) -> tuple[Any, Any]:
        point, out, _ = carry
        new, gradient = grad(point)
        out = jax.tree.map(lambda x, y: jnp.where(is_first, x, y), new, out)
        return (by_hand.climb(params, gradient, RHO), out, gradient), None

    like = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grad, params))
    (_, out, gradient), _ = jax.lax.scan(turn, (params, *like), jnp.array([True, False]))
    return out, gradient


WAYS: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "inline": inline,
    "nested jit": nested_jit,
    "scan": scan,
}


def step_of(problem: networks.Problem, way: Callable[[Any, Any], tuple[Any, Any]]) -> Any:
    """A training step: `(params, state, stats, batch) -> (params, state, stats, value)`."""

    def step(params: Any, state: Any, stats: Any, batch: Any) -> Any:
        grad = jax.value_and_grad(lambda w: problem.loss(w, stats, batch), has_aux=True)
        (value, stats), gradient = way(grad, params)
        updates, state = by_hand.BASE.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, stats, value

    return step


def main(argv: Sequence[str] | None = None) -> dict[str, list[list[str]]]:
    """Measures, prints a table for each network, draws the figure and returns the tables."""
    parser = timing.parser(__doc__, "results/compilation")
    parser.add_argument(
        "--repeats", type=timing.count(), default=5, help="of compiling (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=timing.count(), default=15, help="of timing (default: %(default)s)")
    options = timing.parse(parser, argv)
    if options.quick:
        options.repeats, options.rounds = 1, 2
    tables, shown = {}, {}
    columns = ["way", "compile, s", "of inline's", "temporary, MB", "step, ms", "of inline's (quartiles)"]
    for name, (build, shape, classes, examples) in (QUICK if options.quick else NETWORKS).items():
        problem = networks.of(build(), name == "transformer", shape, classes, examples)
        tables[name] = rows_of(problem, options.repeats, options.rounds)
        shown[f"{name}, {problem.size:,} params:"] = tables[name]
    content = {"columns": columns, "tables": shown}
    print(f"\n{text_of(content)}")
    timing.save(figure(tables), options, "compilation", content)
    return tables


def rows_of(problem: networks.Problem, repeats: int, rounds: int) -> list[list[str]]:
    """The table of a network."""
    arguments = problem.params, by_hand.BASE.init(problem.params), problem.stats, problem.batch
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    compiled: dict[str, Any] = {}
    for _ in range(repeats):
        for way, function in WAYS.items():
            jax.clear_caches()
            begin = time.process_time()
            compiled[way] = jax.jit(step_of(problem, function)).lower(*arguments).compile()
            seconds[way].append(time.process_time() - begin)
    times = timing.interleaved(
        {way: timing.call(program, *arguments) for way, program in compiled.items()}, rounds=rounds
    )
    rows = []
    for way, program in compiled.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[way], seconds["inline"], strict=True))
        rows.append(
            [
                way,
                f"{statistics.median(seconds[way]):.2f}",
                f"{ratio:.2f}",
                f"{timing.temporary_bytes(program) / 1e6:.1f}",
                f"{1e3 * statistics.median(times[way]):.1f}",
                f"{timing.ratio(times, way, 'inline'):.2f}",
            ]
        )
    return rows


text_of = timing.tables_of


def figure(tables: dict[str, list[list[str]]]) -> Any:
    """Compile time over run time, both in units of the inline form's."""
    picture = timing.figure_class()(figsize=(5, 4), layout="constrained")
    axes = picture.subplots()
    for marker, (name, rows) in zip("os", tables.items(), strict=False):
        for way, _, compile_ratio, _, _, run_ratio in rows:
            x, y = float(run_ratio.split()[0]), float(compile_ratio)
            axes.plot(x, y, marker, color="#1f5fa8")
            axes.annotate(f"{name}, {way}", (x, y), xytext=(5, 3), textcoords="offset points", fontsize=8)
    axes.set(xlabel="time of a step, of inline's", ylabel="compile time, of inline's")
    timing.tidy(axes)
    return picture


if __name__ == "__main__":
    main()
