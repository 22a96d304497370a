"""What SAM does to the landscape: SGD and SAM side by side, in numbers and in one picture.

Trains a small network on scikit-learn's handwritten digits twice per seed, with SGD and with SAM, alike
in everything else (data, initial params, order of batches), and measures both solutions on the training
set: the eigenvalues of the Hessian, its trace, worst-case and average sharpness. Prints a table of means
and deviations over the seeds and draws the landscapes around the two solutions of the first seed.

    python examples/landscape.py             # about a minute on two cores
    python examples/landscape.py --quick     # a small run, to see that all works
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
import reporting
from digits import MLP, Digits, batch_order, cross_entropy, load
from flax.training.train_state import TrainState
from matplotlib.figure import Figure
from reporting import number
from tqdm import tqdm

import optax_sam
from optax_sam import landscape, sharpness

mpl.use("Agg")  # A file, no window.
import matplotlib.pyplot as plt

COLORS = {"SGD": "#d1495b", "SAM": "#00798c"}
BATCH_SIZE = 50
MODEL = MLP()


def loss_fn(params: optax.Params, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The training loss: the same function trains and is measured."""
    images, labels = batch
    return cross_entropy(MODEL.apply({"params": params}, images), labels)


class Run(NamedTuple):
    """A training run.

    Attributes:
      params: The params at its end.
      path: The params after every epoch, along a first axis.
      metrics: The means over every epoch of `optax_sam.SAMMetrics`.
    """

    params: optax.Params
    path: optax.Params
    metrics: optax_sam.SAMMetrics


def train(rho: jax.Array, params: optax.Params, data: Digits, order: jax.Array) -> Run:
    """Trains with SAM; a radius of 0 is SGD, and the same compiled program serves both."""
    sam = optax_sam.sam(rho)
    steps = order.shape[0] * order.shape[1]
    tx = optax.chain(sam, optax.sgd(optax.cosine_decay_schedule(0.01, steps), momentum=0.9))
    value_and_grad = optax_sam.sam_value_and_grad(loss_fn, sam, return_metrics=True)

    def train_step(state: TrainState, rows: jax.Array) -> tuple[TrainState, optax_sam.SAMMetrics]:
        batch = data.images[rows], data.labels[rows]
        _, grads, metrics = value_and_grad(state.params, batch, state=state.opt_state)
        return state.apply_gradients(grads=grads), metrics

    def train_epoch(state: TrainState, rows: jax.Array) -> tuple[TrainState, Any]:
        state, metrics = jax.lax.scan(train_step, state, rows)
        return state, (state.params, jax.tree.map(jnp.mean, metrics))

    state = TrainState.create(apply_fn=MODEL.apply, params=params, tx=tx)
    state, (path, metrics) = jax.lax.scan(train_epoch, state, order)
    return Run(state.params, path, metrics)


def measure(params: optax.Params, data: Digits, samples: int, matvecs: int | None = None) -> dict[str, float]:
    """One row of the table: everything on the training set, but for the test accuracy."""
    batch = data.images, data.labels
    guesses = jnp.argmax(MODEL.apply({"params": params}, data.test_images), axis=-1)
    # The bars would cross the one of `main`.
    top = sharpness.top_eigenpairs(loss_fn, params, batch, k=5, num_matvecs=matvecs, progress=False)
    trace = sharpness.hessian_trace(loss_fn, params, batch, num_samples=samples, progress=False)
    worst = sharpness.worst_case_sharpness(loss_fn, params, batch, 0.5, progress=False)
    average = sharpness.average_sharpness(loss_fn, params, batch, 0.02, num_samples=samples, progress=False)
    measured = {
        "test accuracy [%]": 100 * jnp.mean(guesses == data.test_labels),
        "training loss": loss_fn(params, batch),
        "lambda 1": top.values[0],
        "lambda 1 / lambda 5": top.ratio(5),
        "trace": trace.mean,
        "worst-case sharpness, rho 0.5": worst,
        "average sharpness, rho 0.02": average.mean,
    }
    return {name: float(value) for name, value in measured.items()}


def draw(runs: dict[str, Run], data: Digits, path: Path, size: int, matvecs: int | None = None) -> None:
    """Draws the two landscapes on the same scales, the sharpest directions, and the two spectra."""
    batch = data.images, data.labels
    figure = plt.figure(figsize=(11.5, 6.8), layout="constrained")
    cells = figure.add_gridspec(2, 3, width_ratios=(1, 1, 0.85))

    # One key: the directions of both are the same random numbers, scaled to the filters of each.
    grid = np.linspace(-1.0, 1.0, size)
    planes = {
        name: landscape.plane(loss_fn, run.params, batch, x=grid, key=1, progress=False)
        for name, run in runs.items()
    }
    lowest = min(plane.losses.min() for plane in planes.values())
    largest = float(max(plane.losses.max() for plane in planes.values()))
    levels = np.geomspace(lowest, largest, 16)
    for i, (name, plane) in enumerate(planes.items()):
        surface = figure.add_subplot(cells[0, i], projection="3d")
        landscape.plot_surface(plane, surface, largest=largest)
        surface.set_title(name, color=COLORS[name], fontweight="bold", fontsize=14)
        surface.view_init(elev=24, azim=-55)
        surface.set_box_aspect(None, zoom=1.1)
        surface.set(xlabel="", ylabel="", zlabel="loss", xticks=(-1, 0, 1), yticks=(-1, 0, 1))
        contour = figure.add_subplot(cells[1, i], box_aspect=1)
        landscape.plot_contour(plane, contour, levels=levels, colorbar=name == "SAM")
        contour.set(xticks=(-1, 0, 1), yticks=(-1, 0, 1))

    along = figure.add_subplot(cells[0, 2])
    along.set_prop_cycle(color=COLORS.values())
    lines = {}
    for name, run in runs.items():
        # Five, as in `measure`: the program is compiled already.
        sharpest, *_ = landscape.eigenvector_directions(
            loss_fn, run.params, batch, k=5, num_matvecs=matvecs, progress=False
        )
        # An eigenvector has no sign of its own: the steeper side to the right.
        line = landscape.line(
            loss_fn, run.params, batch, sharpest, positions=np.linspace(-2.0, 2.0, 41), progress=False
        )
        lines[name] = line if line.losses[-1] >= line.losses[0] else line._replace(losses=line.losses[::-1])
    landscape.plot_line(lines, along)
    along.set(title="along the sharpest direction", xlabel="distance", ylabel="training loss")

    spectrum = figure.add_subplot(cells[1, 2])
    densities = {
        name: sharpness.spectral_density(
            loss_fn, run.params, batch, num_probes=2, num_matvecs=matvecs or 60, progress=False
        )
        for name, run in runs.items()
    }
    widest = float(max(density.nodes.max() for density in densities.values()))
    eigenvalues = np.linspace(-0.05 * widest, 1.05 * widest, 600)
    for name, density in densities.items():
        _, curve = density.smooth(eigenvalues, bandwidth=0.01 * widest)
        spectrum.semilogy(eigenvalues, curve, color=COLORS[name], label=name)
        spectrum.fill_between(eigenvalues, curve, 1e-9, color=COLORS[name], alpha=0.25, linewidth=0)
    spectrum.set(
        title="spectrum of the Hessian", xlabel="eigenvalue", ylabel="density", ylim=(1e-5 / widest, None)
    )
    spectrum.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Means and deviations over the seeds, in Markdown, and what SAM has of SGD's."""
    lines = [
        f"| {'':<29} | {'SGD':>17} | {'SAM':>17} | SAM / SGD |",
        f"|:{'-' * 30}|{'-' * 18}:|{'-' * 18}:|----------:|",
    ]
    for name in rows["SGD"][0]:
        values = {arm: np.array([row[name] for row in rows[arm]]) for arm in rows}
        cells = [
            f"{v.mean():.3g}" + (f" ± {v.std(ddof=1):.2g}" if len(v) > 1 else "") for v in values.values()
        ]
        ratio = values["SAM"].mean() / values["SGD"].mean()
        lines.append(f"| {name:<29} | {cells[0]:>17} | {cells[1]:>17} | {ratio:>9.2f} |")
    return "\n".join(lines)


def text_of(content: dict[str, Any]) -> str:
    """The tables as RESULTS.md has them, from what is in the JSON."""
    return table(content["rows"])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked before anything is trained."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--rho", type=number(float, 0, above=True), default=0.5, help="radius of SAM (default: %(default)s)")
    add("--figure", type=Path, help="file of the picture (default: OUTPUT/landscape.png)")
    reporting.common_options(
        parser,
        "results/landscape",
        seeds=(3, 1, "how many seeds"),
        epochs=(100, 10),
        samples=(50, 5, "random samples of a measure, at least 2"),
        size=(31, 11, "points along a side of a plane, at least 2"),
    )
    options = reporting.finish(parser, argv)
    for name in ("samples", "size"):
        if getattr(options, name) < 2:
            parser.error(f"argument --{name}: must be an integer >= 2, got {getattr(options, name)}")
    if options.figure is None:
        options.figure = options.output / "landscape.png"
    if not options.figure.parent.is_dir():
        parser.error(f"argument --figure: there is no folder {str(options.figure.parent)!r}")
    if options.figure.is_dir():
        parser.error(f"argument --figure: must be a file, and {str(options.figure)!r} is a folder")
    if options.figure.suffix.removeprefix(".") not in Figure().canvas.get_supported_filetypes():
        name = options.figure.name
        parser.error(f"argument --figure: must end in .png, .pdf or another kind of picture, got {name!r}")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the experiment."""
    args = parse(argv)
    matvecs = 12 if args.quick else None  # Which the measures choose themselves.
    start = time.perf_counter()
    rows: dict[str, list[dict[str, float]]] = {"SGD": [], "SAM": []}
    first: dict[str, Run] = {}
    metrics: list[dict[str, list[float]]] = []
    jitted_train = jax.jit(train)
    with tqdm(total=4 * args.seeds + 1, unit="part", dynamic_ncols=True, disable=None) as bar:
        for seed in range(args.seeds):
            data, order = load(seed, label_noise=0.0), batch_order(seed, args.epochs, BATCH_SIZE)
            init = MODEL.init(jax.random.key(seed), data.images[:1])["params"]
            for name, rho in (("SGD", 0.0), ("SAM", args.rho)):
                bar.set_description(f"seed {seed}: training with {name}")
                run = jax.block_until_ready(jitted_train(jnp.asarray(rho), init, data, order))
                bar.update()
                bar.set_description(f"seed {seed}: measuring {name}")
                rows[name].append(measure(run.params, data, args.samples, matvecs))
                bar.update()
                if name == "SAM":
                    metrics.append({k: np.asarray(v).tolist() for k, v in run.metrics._asdict().items()})
                if seed == 0:
                    first[name] = run
        bar.set_description("drawing")
        draw(first, load(0, label_noise=0.0), args.figure, args.size, matvecs)
        bar.update()

    text = table(rows)
    print(text)
    if args.quick:
        print(f"\n{reporting.SMOKE}")
    report = {
        "arguments": {name: str(value) for name, value in vars(args).items() if name[0] != "_"},
        "rows": rows,
        "sam_metrics_per_epoch": metrics,
    }
    (args.output / "landscape.md").write_text(text + "\n")
    (args.output / "landscape.json").write_text(json.dumps(report, indent=1))
    print(f"{args.figure}, {args.output / 'landscape.md'} and .json; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
