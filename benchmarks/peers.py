"""SAM by this library, by `optax.contrib.sam`, and by `pytorch_optimizer`, on the same network.

    python benchmarks/peers.py
    pip install torch pytorch_optimizer   # For the last one; without them it is left out.

What a library adds is told by its own base optimizer: a step of SAM as a multiple of its step of SGD with
momentum, in the same framework, with the same threads. All programs take turns.
"""

import importlib.util
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import by_hand
import jax
import networks
import numpy as np
import timing


def in_jax(batch_size: int | None, size: str) -> dict[str, Callable[[], Any]]:
    """Steps of SGD, of SAM by hand, by this library, and by Optax in both of its modes."""
    from step_cost import two_calls

    problem = networks.make("mlp", size, batch_size=batch_size)

    def ready(step: Any, state: Any) -> Any:
        arguments = problem.params, state, problem.stats, problem.batch
        return jax.jit(step).lower(*arguments).compile(), arguments

    result: dict[str, Callable[[], Any]] = {}
    for name, rule in (("jax, sgd", "sgd"), ("jax, sam by hand", "sam")):
        function, remembers, _ = by_hand.RULES[rule]
        state = by_hand.hand_state(problem.params, remembers)
        compiled, arguments = ready(by_hand.hand_step(problem.loss, function), state)
        result[name] = timing.call(compiled, *arguments)
    step, tx = by_hand.step_of_variant(problem.loss, by_hand.RULES["sam"][2])
    compiled, arguments = ready(step, tx.init(problem.params))
    result["optax_sam, sam"] = timing.call(compiled, *arguments)
    for mode, opaque in (("opaque", True), ("transparent", False)):
        step, state, calls = by_hand.optax_step(problem.loss, problem.params, opaque=opaque)
        compiled, arguments = ready(step, state)
        call = timing.call(compiled, *arguments) if calls == 1 else two_calls(compiled, arguments)
        result[f"optax.contrib.sam, {mode}"] = call
    return result


def in_torch(batch_size: int | None, size: str) -> dict[str, Callable[[], Any]]:
    """Steps of SGD and of SAM in PyTorch, if it is installed; the same network with the same weights."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("pytorch_optimizer") is None:
        print("PyTorch and pytorch_optimizer are not both installed: left out.")
        return {}
    import pytorch_optimizer
    import torch

    problem = networks.make("mlp", size, batch_size=batch_size)
    inputs, labels = (torch.tensor(np.asarray(x)) for x in problem.batch)
    labels = labels.long()

    def network() -> Any:
        layers: list[Any] = []
        for name in sorted(problem.params):
            kernel, bias = (np.array(problem.params[name][leaf]) for leaf in ("kernel", "bias"))
            linear = torch.nn.Linear(*kernel.shape)
            linear.weight.data, linear.bias.data = torch.tensor(kernel.T.copy()), torch.tensor(bias)
            layers += [linear, torch.nn.ReLU()]
        return torch.nn.Sequential(*layers[:-1])

    def sgd_step(model: Any, optimizer: Any) -> Callable[[], Any]:
        def step() -> None:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()

        return step

    def sam_step(model: Any, optimizer: Any) -> Callable[[], Any]:
        def step() -> None:
            torch.nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.first_step(zero_grad=True)
            torch.nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.second_step(zero_grad=True)

        return step

    # A rate of nothing: what is timed must not wander off while it is repeated thousands of times.
    how = {"lr": 0.0, "momentum": 0.9}
    first, second = network(), network()
    plain = torch.optim.SGD(first.parameters(), **how)
    sam = pytorch_optimizer.SAM(second.parameters(), torch.optim.SGD, rho=by_hand.RHO, **how)
    return {"torch, sgd": sgd_step(first, plain), "pytorch_optimizer, SAM": sam_step(second, sam)}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table, draws the figure and returns the numbers."""
    parser = timing.parser(__doc__, "results/peers")
    count = timing.count()
    parser.add_argument("--batch-size", type=count, nargs="+", default=[128, 1024], help="default: 128 1024")
    parser.add_argument("--rounds", type=count, default=31, help="of timing (default: %(default)s)")
    options = timing.parse(parser, argv)
    size = "small"
    if options.quick:
        options.batch_size, options.rounds, size = [16], 2, "quick"
    print(timing.machine("torch", "pytorch_optimizer").split(";")[1].strip())
    report: dict[str, Any] = {}
    rows = []
    for batch_size in options.batch_size:
        calls = in_jax(batch_size, size) | in_torch(batch_size, size)
        times = timing.interleaved(calls, rounds=options.rounds)
        for name in calls:
            base = "torch, sgd" if "torch" in name else "jax, sgd"
            against = timing.ratio(times, "optax_sam, sam", name)
            row = {
                "seconds": statistics.median(times[name]),
                "base": timing.ratio(times, name, base),
                "ours": against,
            }
            report[f"{name}, {batch_size}"] = row
            cells = [name, f"{batch_size}", f"{1e3 * row['seconds']:.3f}", f"{row['base']:.2f}"]
            rows.append([*cells, "" if "sgd" in name else f"{against:.2f}"])
    columns = ["step", "batch", "ms", "time (its sgd = 1)", "optax_sam's time (this = 1)"]
    content = {"columns": columns, "tables": {"MLP 64-256-256-10, float32:": rows}}
    print(f"\n{text_of(content)}")
    timing.save(figure(report), options, "peers", content)
    return report


text_of = timing.tables_of


def figure(report: dict[str, Any]) -> Any:
    """What SAM costs in each library, in steps of its own SGD."""
    rows = {name: row["base"] for name, row in report.items() if "sgd" not in name}
    picture = timing.figure_class()(figsize=(7, 0.8 + 0.35 * len(rows)), layout="constrained")
    axes = picture.subplots()
    for height, (name, ratio) in enumerate(rows.items()):
        error = [[max(0.0, ratio.median - ratio.low)], [max(0.0, ratio.high - ratio.median)]]
        colour = "#c8102e" if name.startswith("optax_sam") else "#7f7f7f"
        axes.errorbar(ratio.median, height, xerr=error, fmt="o", color=colour, capsize=3)
    axes.set(
        yticks=range(len(rows)), yticklabels=list(rows), xlabel="a step of SAM, in steps of its library's SGD"
    )
    timing.tidy(axes)
    return picture


if __name__ == "__main__":
    main()
