"""A small language model after training: its weights in few bits, and fine-tuned on another text.

    python examples/transformer_after.py
    python examples/transformer_after.py --tune

The transformer of `transformer_lm.py` learns Python's reference documentation, with AdamW and with SAM before
it. Then its weights are rounded as in `quantize.py`, and it is fine-tuned, with plain AdamW for both, on the
source of Python's module `argparse`; the documentation is not read again. What it has kept is measured in
bits per byte of documentation held out, less is better, and read off where both networks first need the same
bits per byte of source held out.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import quantize
import reporting
import transformer_lm
from flax import nnx
from matplotlib.figure import Figure
from reporting import GREY, RED, number
from tqdm import tqdm

ARMS = {"adamw": GREY, "sam": RED}
BITS = (8, 4, 3)
GRID = (0.1, 0.2, 0.4)
EVERY = 5
"""Steps of fine-tuning between two measurements."""


@functools.partial(nnx.jit, static_argnames="bits")
def score(model: transformer_lm.Transformer, tokens: jax.Array, bits: int | None) -> jax.Array:
    """Bits per byte, with the weights of every index of the last axis in so many bits."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    params = params if bits is None else quantize.rounded(params, bits)
    return transformer_lm.bits_per_byte(nnx.merge(graph, params, rest), tokens, True)


class Bench:
    """The network with one optimizer, and what is done to it afterwards."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        """Cuts both texts and makes the programs."""
        self.options = options
        self.first = transformer_lm.Trainer(name, options, transformer_lm.load(None, options.size)[1])
        second = Path(argparse.__file__).read_bytes()[: options.size]
        self.second = transformer_lm.Trainer("adamw", options, second)
        self.tune = transformer_lm.make_step(None)

    def run(self, seed: int, tick: Callable[[], Any] = lambda: None) -> tuple[list[float], list[list[float]]]:
        """Trains: bits per byte with the weights as they are and in few bits, and the fine-tuning's path."""
        state, _ = self.first.start(seed)
        for epoch in range(self.options.epochs):
            state = self.first.train(state, seed, epoch, tick)
        model = state[0]
        few = [float(score(model, self.first.test, bits)) for bits in (None, *BITS)]
        return few, self.path(model, seed)

    def path(self, model: transformer_lm.Transformer, seed: int) -> list[list[float]]:
        """Fine-tunes: bits per byte of the old text and of the new, every few steps."""
        optimizer = nnx.Optimizer(model, optax.adamw(self.options.tuning_rate), wrt=nnx.Param)
        tokens, length = self.second.train_tokens, self.second.length
        pieces = tokens[: self.second.pieces * length].reshape(-1, length)
        rng, path = np.random.default_rng([seed, 4]), []
        for step in range(self.options.steps + 1):
            if step % EVERY == 0:
                path.append([float(score(model, text.test, None)) for text in (self.first, self.second)])
            self.tune(model, optimizer, pieces[rng.integers(len(pieces), size=self.options.batch_size)])
        return path


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, rounds, fine-tunes, reports and returns the numbers of the report."""
    options = parse(argv)
    if options.tune:
        return {"rho": tune(options)}
    benches = {name: Bench(name, options) for name in ARMS}
    few: dict[str, list[list[float]]] = {name: [] for name in ARMS}
    paths: dict[str, list[list[list[float]]]] = {name: [] for name in ARMS}
    steps = sum(bench.first.steps_per_epoch for bench in benches.values()) * options.epochs
    with tqdm(total=options.seeds * steps, unit="step", disable=None) as bar:
        for seed in reporting.seeds_of(options):
            for name, bench in benches.items():
                rounded, path = bench.run(seed, bar.update)
                few[name].append(rounded)
                paths[name].append(path)
    return conclude(few, paths, options)


def conclude(few: dict[str, Any], paths: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Prints and saves what the runs of all seeds have given, and returns the numbers of the report."""
    rounded = {name: np.array(rows) for name, rows in few.items()}
    forgotten = {name: np.array(rows) for name, rows in paths.items()}
    report = summarize(rounded, forgotten)
    words = reporting.conclude(options, meaning(report))
    curves = {name: np.round(path, 4).tolist() for name, path in forgotten.items()}
    content = {"report": report, "meaning": words, "paths": curves}
    print(
        f"Bits per byte of text held out, less is better; mean ± standard deviation over {options.seeds} "
        f"paired seeds.\n\n{text_of(content)}\n\n{words}"
    )
    reporting.save(options, "transformer_after", figure(rounded, forgotten, options), content)
    return report


def tune(options: argparse.Namespace) -> float:
    """Prints what every radius gives on the seeds 0 and 1, and returns the best with weights in 4 bits."""
    scores: dict[float, float] = {}
    for rho in (0.0, *GRID):
        options.rho = rho
        bench = Bench("sam" if rho else "adamw", options)
        few, paths = zip(*(bench.run(seed) for seed in range(2)), strict=True)
        means = np.mean(few, axis=0)
        scores[rho] = means[1 + BITS.index(4)]
        titles = ("as trained", *(f"{bits} bits" for bits in BITS), "after fine-tuning: old text", "new text")
        values = (*means, *np.mean(paths, axis=0)[-1])
        shown = ", ".join(f"{title} {value:.3f}" for title, value in zip(titles, values, strict=True))
        print(f"rho {rho:g}: {shown}", flush=True)
    best = min(GRID, key=scores.__getitem__)
    print(f"taken: {best:g}")
    return best


def level_of(paths: dict[str, np.ndarray]) -> float:
    """The least bits per byte of the new text that every run reaches."""
    return float(max(path[:, 1].min() for rows in paths.values() for path in rows))


def old_at(path: np.ndarray, level: float) -> float:
    """Bits per byte of the old text where those of the new first fall to a level, on a straight line."""
    old, new = path.T
    i = int(np.flatnonzero(new <= level)[0])
    if i == 0:
        return float(old[0])
    part = (level - new[i - 1]) / (new[i] - new[i - 1])
    return float(old[i - 1] + part * (old[i] - old[i - 1]))


def summarize(rounded: dict[str, np.ndarray], paths: dict[str, np.ndarray]) -> dict[str, Any]:
    """The rows of the table: as trained, what rounding adds, what fine-tuning adds at the same level."""
    level = level_of(paths)
    values = {"as trained": {name: rows[:, 0] for name, rows in rounded.items()}}
    for i, bits in enumerate(BITS, 1):
        values[f"{bits} bits add"] = {name: rows[:, i] - rows[:, 0] for name, rows in rounded.items()}
    values[f"fine-tuning to {level:.2f} adds"] = {
        name: np.array([old_at(path, level) - path[0, 0] for path in rows]) for name, rows in paths.items()
    }
    return reporting.compare(values, lower_is_better=True)


def meaning(report: dict[str, Any]) -> str:
    """What a paired t-test says, in a line for each row."""
    return "\n".join(
        f"{title}: {reporting.verdict('sam', 'adamw', row['sam']['gain'], 'bits per byte', '.3f')}."
        for title, row in report.items()
    )


def text_of(content: dict[str, Any]) -> str:
    """The tables as RESULTS.md has them, from what is in the JSON."""
    return reporting.comparison_table(content["report"], "", ".3f")


def figure(
    rounded: dict[str, np.ndarray], paths: dict[str, np.ndarray], options: argparse.Namespace
) -> Figure:
    """Bits per byte against bits of weights; those of the old text against those of the new."""
    picture = Figure(figsize=(10, 3.9), layout="constrained")
    left, right = picture.subplots(1, 2)
    ends = {}
    for name, rows in rounded.items():
        reporting.line_with_interval(left, np.arange(rows.shape[1]), rows, ARMS[name])
        ends[name] = rows.shape[1] - 1, rows[:, -1].mean(), ARMS[name]
    left.set_xticks(range(1 + len(BITS)), ["float", *(f"{bits} bits" for bits in BITS)])
    reporting.style(left, title="Weights rounded after training", ylabel="bits per byte (axis cut)")
    reporting.label_ends(left, ends)
    level = level_of(paths)
    start = max(level, min(path[0, 1] for rows in paths.values() for path in rows))
    levels, ends = np.linspace(start, level, 8), {}
    for name, rows in paths.items():
        values = np.array([[old_at(path, each) for each in levels] for path in rows])
        reporting.line_with_interval(right, levels, values, ARMS[name])
        ends[name] = level, values[:, -1].mean(), ARMS[name]
    reporting.style(
        right,
        title="Fine-tuned on another text",
        xlabel="new text, bits per byte (falling)",
        ylabel="old text, bits per byte (axis cut)",
    )
    right.invert_xaxis()
    reporting.label_ends(right, ends)
    plain, sam = (np.mean(rows[:, -1] - rows[:, 0]) for rows in rounded.values())
    reporting.head(
        picture,
        f"A small transformer in {BITS[-1]} bits: AdamW loses {plain:.2f} bits per byte, SAM {sam:.2f}",
        f"Text held out, less is better. Mean over {options.seeds} paired seeds; bars: its 95 % interval.",
    )
    return picture


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options: some of them those of `transformer_lm.py`, whose defaults stand for the others."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--rho", type=number(float, 0), default=0.1, help="radius (default: %(default)s)")
    add("--tune", action="store_true", help="try every radius of a grid on the seeds 0 and 1 instead")
    add("--tuning-rate", type=number(float, 0, above=True), default=1e-3, help="default: %(default)s")
    counts = {"seeds": (3, 2), "epochs": (70, 2, "passes over the text")}
    reporting.common_options(
        parser, "results/transformer_after", **counts, steps=(100, 10, "steps of fine-tuning")
    )
    options = reporting.finish(parser, argv)
    usual = transformer_lm.make_parser().parse_args([])
    form = transformer_lm.FORMS["with --quick" if options.quick else ""]
    for name, value in {**vars(usual), **form}.items():
        if name not in options:
            setattr(options, name, value)
    return options


if __name__ == "__main__":
    main()
