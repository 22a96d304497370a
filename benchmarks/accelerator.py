"""Everything that wants a GPU, in one command of at most eight minutes.

    python benchmarks/accelerator.py
    python benchmarks/accelerator.py --quick

On the first device that JAX finds, in this order, printing as it goes, so that a run that is cut off leaves
what it has measured: every variant against its oracle in float32; the steps of a ResNet-50 and of a
transformer of 100 million params, in bfloat16 and some in float32, by the library, by hand, and in its cheap
forms; where the time of a step of SAM goes; the digits. Tables, JSON and a picture stand in the folder.

A part that would begin after `--minutes` is left out, and said to be.
"""

import concurrent.futures
import contextlib
import gzip
import inspect
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import by_hand
import networks
import timing
from step_cost import matmul_rate

import optax_sam

# Of each program what share of the steps is like which step of a training.
EACH = {1: 1.0}
PROGRAMS: dict[str, tuple[Callable[[], Any], dict[str, Any], dict[int, float], float]] = {
    # Name: variant, options of `sam_value_and_grad`, kinds of steps, gradients a step.
    "sam": (lambda: optax_sam.sam(0.05), {}, EACH, 2.0),
    "asam": (lambda: optax_sam.asam(0.1), {}, EACH, 2.0),
    "gsam": (lambda: optax_sam.gsam(0.05), {}, EACH, 2.0),
    "looksam, k = 5": (lambda: optax_sam.looksam(0.1, 5), {}, {0: 0.2, 1: 0.8}, 1.2),
    "every 5th step": (
        lambda: optax_sam.gated(optax_sam.sam(0.05), optax_sam.gates.every(5)),
        {},
        {0: 0.2, 1: 0.8},
        1.2,
    ),
    "weight_noise": (lambda: optax_sam.weight_noise(0.01), {}, EACH, 1.0),
    "msam": (lambda: optax_sam.msam(by_hand.BASE, 0.3), {}, EACH, 1.0),
    "ascent on 1/4": (lambda: optax_sam.sam(0.05), {"ascent_examples": 0.25}, EACH, 1.25),
    "ascent in bfloat16": (lambda: optax_sam.sam(0.05), {"ascent_dtype": jnp.bfloat16}, EACH, 2.0),
}


class Report:
    """What was found so far, on disk after every line.

    Attributes:
      found: The numbers, by part.
    """

    def __init__(self, folder: Path, minutes: float) -> None:
        """Begins the clock."""
        self.folder, self.end, self.found = folder, time.monotonic() + 60 * minutes, {}

    def add(self, part: str, name: str, value: Any, line: str) -> None:
        """Keeps a number and prints its line."""
        self.found.setdefault(part, {})[name] = value
        (self.folder / "accelerator.json").write_text(json.dumps(self.found, indent=1))
        print(line, flush=True)

    def begins(self, part: str) -> bool:
        """Whether there is time for another part."""
        fits = time.monotonic() < self.end
        print(f"\n=== {part}{'' if fits else ': left out, the time is over'}", flush=True)
        return fits


class Program(NamedTuple):
    """A compiled step, with what it took to compile and what it needs."""

    compiled: Any
    arguments: tuple[Any, ...]
    seconds: float
    megabytes: float


def compiled_at_once(steps: dict[str, tuple[Any, tuple[Any, ...]]]) -> dict[str, Program]:
    """Compiles all steps, with their arguments, side by side: the compiler works on one core for each."""

    def compile_one(item: tuple[Any, tuple[Any, ...]]) -> Program:
        step, arguments = item
        begin = time.perf_counter()
        compiled = jax.jit(step).lower(*arguments).compile()
        seconds = time.perf_counter() - begin
        return Program(compiled, arguments, seconds, timing.temporary_bytes(compiled) / 1e6)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(steps, pool.map(compile_one, steps.values()), strict=True))


def against_oracles(report: Report, count: int | None) -> None:
    """The trajectory of every variant in float32, against plain numpy in float64."""
    import oracles
    import table
    import test_papers

    batches = jnp.asarray(oracles.batches(), jnp.float32)
    start = jax.tree.map(lambda x: x.astype(jnp.float32), test_papers.tree(oracles.first_params()))
    # Noise is drawn in float64 there, and in other numbers here.
    rows = [r for r in table.ROWS if "noise" not in inspect.signature(oracles.ORACLES[r.name]).parameters]
    programs = compiled_at_once({r.name: (test_papers.walk(r), (start, batches)) for r in rows[:count]})
    for row in rows[:count]:
        points = np.asarray(programs[row.name].compiled(start, batches)[0])
        expected = oracles.trajectory(oracles.ORACLES[row.name], whole_optimizer=row.whole_optimizer)[0]
        distance = float(np.max(np.abs(points - expected) / (1 + np.abs(expected))))
        report.add("oracles", row.name, distance, f"{row.name:28} {distance:.1e}")


def at_step(program: Program, number: int) -> Program:
    """The same program in a later step: the number of the step is a leaf of the state."""
    params, state, *rest = program.arguments
    state = optax.tree.set(state, step=jnp.asarray(number, jnp.int32))
    return program._replace(arguments=(params, state, *rest))


def measure(kinds: dict[int, float], program: Program, plain: Program, rounds: int) -> dict[str, float]:
    """The mean time of a step over its kinds, in turns with the plain step."""
    calls = {"plain": timing.call(plain.compiled, *plain.arguments)}
    for number in kinds:
        of_kind = at_step(program, number) if len(kinds) > 1 else program
        calls[str(number)] = timing.call(program.compiled, *of_kind.arguments)
    times = timing.interleaved(calls, rounds=rounds)
    mean = [
        sum(share * times[str(number)][i] for number, share in kinds.items())
        for i in range(len(times["plain"]))
    ]
    ratio = timing.ratio({"mean": mean, "plain": times["plain"]}, "mean", "plain")
    return {"seconds": statistics.median(mean), "ratio": ratio.median, "low": ratio.low, "high": ratio.high}


COLUMNS = (
    "program",
    "compile, s",
    "step, ms",
    "to plain (quartiles)",
    "gradients",
    "of matrix rate",
    "MB",
)


def steps(
    report: Report, part: str, problem: networks.Problem, rate: float, rounds: int, names: Sequence[str]
) -> None:
    """Compiles, times and prints the programs of a network, each in rounds with the plain step."""
    memory = by_hand.hand_state(problem.params, False)
    by_rule = problem.params, memory, problem.stats, problem.batch
    wanted = {
        "plain": (by_hand.hand_step(problem.loss, by_hand.plain), by_rule),
        "sam, by hand": (by_hand.hand_step(problem.loss, by_hand.sam), by_rule),
    }
    for name in names:
        make, options, _, _ = PROGRAMS[name]
        variant = make()
        options = {**options, "batch_argnums": 2} if options else {}
        whole = variant if variant.is_optimizer else None
        step, tx = by_hand.step_of_variant(problem.loss, variant, whole, **options)
        wanted[name] = step, (problem.params, tx.init(problem.params), problem.stats, problem.batch)
    programs = compiled_at_once(wanted)
    plain = programs["plain"]
    print(" | ".join(COLUMNS), flush=True)
    for name, program in programs.items():
        if time.monotonic() > report.end:
            print(f"{name}: left out, the time is over", flush=True)
            continue
        _, _, kinds, gradients = PROGRAMS.get(name, (None, {}, EACH, 1.0 if name == "plain" else 2.0))
        found = measure(kinds, program, plain, rounds)
        share = timing.flops(plain.compiled) * gradients / found["seconds"] / rate
        quartiles = f"{found['low']:.3f}-{found['high']:.3f}"
        row = {**found, "gradients": gradients, "share": share, "compile": program.seconds}
        line = (
            f"{name} | {program.seconds:.1f} | {1e3 * found['seconds']:.2f} | {found['ratio']:.3f} "
            f"({quartiles}) | {gradients:g} | {share:.2f} | {program.megabytes:.0f}"
        )
        report.add(part, name, {**row, "megabytes": program.megabytes}, line)


def idle_share(folder: Path) -> tuple[float, float] | None:
    """Of a profile: what part of the time the device did nothing, and the longest such gap in microseconds.

    None where the profile shows no device, as on a CPU.
    """
    (path,) = sorted(folder.rglob("*.trace.json.gz"))[-1:] or [None]
    if path is None:
        return None
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    named = [e for e in events if e.get("name") == "process_name"]
    devices = {e["pid"] for e in named if "/device:" in e["args"]["name"] and "CPU" not in e["args"]["name"]}
    spans = sorted(
        (e["ts"], e["ts"] + e["dur"]) for e in events if e.get("ph") == "X" and e["pid"] in devices
    )
    if not spans:
        return None
    reached, gaps = spans[0][1], [0.0]
    for begin, end in spans:
        gaps.append(max(0.0, begin - reached))
        reached = max(reached, end)
    return sum(gaps) / (reached - spans[0][0]), max(gaps)


def profile(report: Report, problem: networks.Problem) -> None:
    """Traces five steps of SAM, and says whether the device waits between the two passes."""
    step, tx = by_hand.step_of_variant(problem.loss, optax_sam.sam(0.05))
    step, folder = jax.jit(step), report.folder / "trace"
    params, state, stats = problem.params, tx.init(problem.params), problem.stats
    for traced in (False, True):
        with jax.profiler.trace(str(folder)) if traced else contextlib.nullcontext():
            for _ in range(5):
                params, state, stats, _ = step(params, state, stats, problem.batch)
            jax.block_until_ready(params)
    found = idle_share(folder)
    if found is None:
        print(f"The profile in {folder} shows no device but the CPU.", flush=True)
        return
    idle, longest = found
    line = f"Idle for {100 * idle:.1f} % of five steps, at most {longest:.0f} microseconds; profile: {folder}"
    report.add("profile", "sam", {"idle": idle, "longest_microseconds": longest}, line)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the parts for which there is time, and returns the numbers."""
    parser = timing.parser(__doc__, "results/accelerator")
    parser.add_argument("--minutes", type=float, default=7.0, help="default: %(default)s")
    options = timing.parse(parser, argv)
    report = Report(options.output, options.minutes)
    if report.begins("Every variant against its oracle, float32: largest relative distance"):
        with jax.default_matmul_precision("highest"):
            against_oracles(report, 3 if options.quick else None)
    size, rounds = ("quick", 2) if options.quick else ("large", 9)
    for dtype, names in (("bfloat16", list(PROGRAMS)), ("float32", ["sam", "every 5th step"])):
        for network in ("transformer",) if options.quick else ("transformer", "cnn"):
            if report.begins(f"{network}, {dtype}; programs compile side by side"):
                rate = 1e11 if options.quick else matmul_rate(dtype)
                problem = networks.make(network, size, jnp.dtype(dtype))
                few = names[-2:] if options.quick else names
                steps(report, f"{network}, {dtype}", problem, rate, rounds, few)
    if report.begins("Where the time of a step goes"):
        profile(report, networks.make("transformer", size, jnp.bfloat16))
    if report.begins("The digits"):
        import train_digits

        short = ["--quick"] if options.quick else ["--seeds", "2"]
        train_digits.main([*short, "--output", str(options.output / "digits")])
    timing.save(figure(report.found), options, "accelerator", report.found)
    return report.found


def figure(found: dict[str, Any]) -> Any:
    """The time of a step over the gradients that it takes, a panel for each network."""
    parts = [part for part in found if "," in part] or ["nothing"]
    picture = timing.figure_class()(figsize=(3.6 * len(parts), 4), layout="constrained")
    for axes, part in zip(picture.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        axes.plot([1, 2], [1, 2], color="#7f7f7f", linewidth=0.8, linestyle="--")
        for name, row in found.get(part, {}).items():
            error = [[row["ratio"] - row["low"]], [row["high"] - row["ratio"]]]
            axes.errorbar(row["gradients"], row["ratio"], yerr=error, fmt="o", color="#1f5fa8", capsize=3)
            place = (row["gradients"], row["ratio"])
            axes.annotate(name, place, xytext=(5, 3), textcoords="offset points", fontsize=7)
        axes.set(title=part, xlabel="gradients a step", ylabel="time, as a multiple of the plain step's")
        timing.tidy(axes)
    return picture


if __name__ == "__main__":
    main()
