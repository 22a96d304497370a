"""What a training step costs: every variant, the same written by hand in plain JAX, and `optax.contrib.sam`.

    python benchmarks/step_cost.py
    python benchmarks/step_cost.py --networks transformer --size large --dtype bfloat16
    python benchmarks/step_cost.py --devices 8

FLOPs and temporary memory are the compiler's own count (of a conditional, that of its larger branch); memory
of the step that overwrites params and state, as training does: else temporaries also lie in what the step
returns, and are not counted. Times are paired: all programs take turns, and a ratio is that of one round.
The rules by hand are what one would write in a script; with `--guarded` they take any finite gradient and
keep their memory finite, as the library's do.
With `--devices` the batch is spread over so many (on a CPU simulated) devices, with global and with local
perturbation. On a GPU the rate of arithmetic is given as a share of what a large product of matrices reaches
on the same card, and `--trace` writes a profile.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


def options_of(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The options, before JAX starts and the number of devices is fixed."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--devices", default="1")
    devices = early.parse_known_args(argv)[0].devices  # Checked below, with the rest.
    if devices.isdecimal() and int(devices) > 1 and "jax" not in sys.modules:
        flag = f"--xla_force_host_platform_device_count={devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    import by_hand
    import networks
    import timing

    parser = timing.parser(__doc__, "results/step_cost")
    add = parser.add_argument
    variants = [name for name in by_hand.RULES if name != "sgd"]
    add("--networks", nargs="+", choices=networks.SIZES, default=list(networks.SIZES), help="default: all")
    add("--variants", nargs="+", choices=variants, metavar="NAME", help=timing.some_of(variants))
    add("--size", choices=("small", "heavy", "large"), default="small", help="default: %(default)s")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of activations (default: float32)",
    )
    add("--batch-size", type=timing.count(), help="examples, instead of what the size says")
    add("--devices", type=timing.count(), default=1, help="to spread the batch over (default: 1)")
    counted = "of timing; 0 compiles and counts only (default: %(default)s)"
    add("--rounds", type=timing.count(0), default=15, help=counted)
    median = "of which the median counts (default: %(default)s)"
    add("--first-calls", type=timing.count(), default=3, help=median)
    add("--guarded", action="store_true", help="rules by hand that promise what the library's do")
    add("--trace", type=Path, metavar="DIR", help="write a profile of each program's step")
    options = timing.parse(parser, argv)
    if options.quick:
        options.rounds, options.first_calls, options.size = min(2, options.rounds), 1, "quick"
    if options.devices > 1:
        import jax

        if options.guarded:
            parser.error("argument --guarded: the rules by hand run on one device only")
        if len(jax.devices()) < options.devices:
            parser.error(f"argument --devices: {options.devices}, but there are {len(jax.devices())}")
        # In the short form each device has the whole batch of the network.
        sizes = [networks.SIZES[name][options.size][3] for name in options.networks if not options.quick]
        for size in sizes if options.batch_size is None else [options.batch_size]:
            if size % options.devices:
                parser.error(
                    f"argument --devices: the batch of {size} must be a multiple of the {options.devices} "
                    "devices; --batch-size sets it"
                )
    return parser, options


class Program(NamedTuple):
    """A compiled step.

    Attributes:
      compiled: The step.
      arguments: What it is called with.
      seconds: What each of its first calls waits for: tracing, lowering and compiling.
      temporaries: Bytes of temporary memory, where it overwrites params and state.
    """

    compiled: Any
    arguments: tuple[Any, ...]
    seconds: list[float]
    temporaries: int


def programs(
    problem: Any, variants: Sequence[str], devices: int, first_calls: int = 1, guarded: bool = False
) -> dict[str, Program]:
    """The steps by their names in the table."""
    import by_hand
    import jax
    import optax
    import timing
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    steps: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    spread, same = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def add(name: str, step: Any, state: Any, mapped: bool = False) -> None:
        arguments = problem.params, state, problem.stats, problem.batch
        if devices > 1:
            arguments = (*jax.device_put(arguments[:3], same), jax.device_put(arguments[3], spread))
        if mapped:
            step = jax.shard_map(
                step,
                mesh=mesh,
                in_specs=(P(), P(), P(), P("data")),
                out_specs=P(),
                check_vma=False,
            )
        steps[name] = step, arguments

    for name in ("sgd", *variants):
        rule, remembers, variant = by_hand.RULES[name]
        by_hand_name = name if variant is None else f"{name}, by hand"
        if devices == 1 or variant is None:
            step = by_hand.hand_step(problem.loss, rule, guarded)
            add(by_hand_name, step, by_hand.hand_state(problem.params, remembers))
        if variant is None:
            continue
        kinds: dict[str, dict[str, Any]] = {"": {}}
        if devices > 1:
            local = {"axis_name": "data", "perturbation": "local"}
            kinds = {", global": {"axis_name": "data"}, ", local": local}
        for kind, how in kinds.items():
            step, tx = by_hand.step_of_variant(problem.loss, variant, **how)
            state = tx.init(problem.params)
            add(name + kind, step, state, mapped=bool(how))
    if devices == 1 and "sam" in variants:
        for kind, opaque in (("opaque", True), ("transparent", False)):
            step, state, _ = by_hand.optax_step(problem.loss, problem.params, opaque=opaque)
            add(f"optax.contrib.sam, {kind}", step, state)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    compiled: dict[str, Any] = {}
    for _ in range(first_calls):  # In turns: what slows the machine for a while slows all of them.
        for name, (step, arguments) in steps.items():
            jax.clear_caches()
            # Of the processor, not of the clock: on a shared machine others would be counted too.
            begin = time.process_time()
            compiled[name] = jax.jit(step).lower(*arguments).compile()
            seconds[name].append(time.process_time() - begin)
    result: dict[str, Program] = {}
    for name, (step, arguments) in steps.items():
        overwriting = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
        result[name] = Program(compiled[name], arguments, seconds[name], timing.temporary_bytes(overwriting))
        if name.startswith("looksam") and not name.endswith("by hand"):
            # The count of steps is a number in the state: the same program.
            params, state, *rest = arguments
            later = optax.tree.set(state, step=1 + optax.tree.get(state, "step"))
            result[f"{name}, reuse"] = result[name]._replace(arguments=(params, later, *rest))
    return result


def two_calls(compiled: Any, arguments: Any) -> Any:
    """What the transparent mode of `optax.contrib.sam` takes for a step: two steps of the loop."""
    import jax

    def call() -> None:
        params, state, stats, batch = arguments
        for _ in range(2):
            params, state, stats, _ = compiled(params, state, stats, batch)
        jax.block_until_ready(params)

    return call


def matmul_rate(dtype: str) -> float:
    """FLOPs per second of a large product of matrices."""
    import jax
    import jax.numpy as jnp
    import timing

    size = 8192
    x = jnp.ones((size, size), dtype)
    times = timing.interleaved({"product": timing.call(jax.jit(jnp.matmul), x, x)}, rounds=9)
    return 2 * size**3 / statistics.median(times["product"])


def rows_of(found: dict[str, Program], rounds: int, rate: float | None) -> list[list[str]]:
    """The table of a network."""
    import timing

    calls = {
        name: two_calls(program.compiled, program.arguments)
        if name.endswith("transparent")
        else timing.call(program.compiled, *program.arguments)
        for name, program in found.items()
    }
    times = timing.interleaved(calls, rounds=rounds) if rounds else {}
    plain = timing.flops(found["sgd"].compiled)
    rows = []
    for name, (compiled, _, seconds, temporaries) in found.items():
        twice = 2 if name.endswith("transparent") else 1
        partner = name.split(",")[0] if name.startswith("optax") else name
        partner = {"optax.contrib.sam": "sam, by hand"}.get(
            partner, f"{name.removesuffix(', reuse')}, by hand"
        )
        partner = partner if partner in found and partner != name else None
        counted = "" if name.endswith("reuse") else f"{twice * timing.flops(compiled) / plain:.3f}"
        memory, first = f"{temporaries / 1e6:.2f}", f"{statistics.median(seconds):.2f}"
        if partner and not name.endswith("reuse"):
            memory += f" ({temporaries / found[partner].temporaries:.2f})"
            ratios = [a / b for a, b in zip(seconds, found[partner].seconds, strict=True)]
            first += f" ({statistics.median(ratios):.2f})"
        row = [name, counted, memory, first]
        if times:
            row += [f"{1e3 * statistics.median(times[name]):.2f}", f"{timing.ratio(times, name, 'sgd'):.2f}"]
            against = partner if partner and not name.endswith("reuse") else None
            row += [f"{timing.ratio(times, name, against):.2f}" if against else ""]
        if times and rate:
            row.append(f"{twice * timing.flops(compiled) / statistics.median(times[name]) / rate:.2f}")
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> dict[str, list[list[str]]]:
    """Measures, prints a table for each network, draws the figure and returns the tables."""
    _, options = options_of(argv)
    import by_hand
    import jax
    import networks
    import timing

    variants = options.variants or [name for name in by_hand.RULES if name != "sgd"]
    on_gpu = jax.default_backend() == "gpu"
    rate = matmul_rate(options.dtype) if on_gpu and options.rounds else None
    if rate:
        print(f"A product of matrices in {options.dtype}: {rate / 1e12:.1f} TFLOP/s.")
    columns = ["step", "FLOPs, in gradients", "temporary MB (by hand = 1)", "first call, CPU s (by hand = 1)"]
    columns += ["ms", "time (sgd = 1)", "time (by hand = 1)"] if options.rounds else []
    columns += ["of the matmul rate"] if rate else []
    guards = "; rules by hand with guards" if options.guarded else ""
    tables: dict[str, list[list[str]]] = {}
    content: dict[str, Any] = {"columns": columns, "tables": {}}
    for name in options.networks:
        examples = options.batch_size
        if options.devices > 1 and examples is None:
            examples = networks.SIZES[name][options.size][3] * (options.devices if options.quick else 1)
        problem = networks.make(name, options.size, jax.numpy.dtype(options.dtype), examples)
        found = programs(problem, variants, options.devices, options.first_calls, options.guarded)
        tables[name] = rows_of(found, options.rounds, rate)
        first = jax.tree.leaves(problem.batch)[0]
        title = f"{name}, {problem.size} params, inputs {first.shape}, {options.dtype}{guards}:"
        content["tables"][title] = tables[name]
        print(f"\n{title}\n\n{timing.markdown(columns, tables[name])}", flush=True)
        if options.trace:
            for step, program in found.items():
                with jax.profiler.trace(str(options.trace / name / step.replace(", ", "_"))):
                    jax.block_until_ready(program.compiled(*program.arguments))
    if options.rounds:
        timing.save(figure(tables, guards), options, "step_cost", content)
    elif options.quick:
        print(f"\n{timing.SMOKE}")
    return tables


def text_of(content: dict[str, Any]) -> str:
    """The tables as RESULTS.md has them, from what is in the JSON."""
    import timing

    return timing.tables_of(content)


def figure(tables: dict[str, list[list[str]]], guards: str = "") -> Any:
    """Times in units of SGD's."""
    import timing

    longest = max(map(len, tables.values()))
    picture = timing.figure_class()(figsize=(4.5 * len(tables), 1 + 0.3 * longest), layout="constrained")
    for axes, (name, rows) in zip(
        picture.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True
    ):
        values = [float(row[5].split()[0]) for row in rows]
        colours = [
            "#7f7f7f" if "hand" in r[0] or "optax" in r[0] or r[0] == "sgd" else "#c8102e" for r in rows
        ]
        axes.barh(range(len(rows)), values, color=colours)
        axes.set(
            yticks=range(len(rows)),
            yticklabels=[row[0] for row in rows],
            xlabel="time (sgd = 1)",
            title=f"{name}{guards}".replace("; ", "\n"),  # One line would be cut off.
        )
        axes.invert_yaxis()
        timing.tidy(axes)
    return picture


if __name__ == "__main__":
    main()
