"""What SAM does to the landscape: SGD and SAM side by side, in numbers and in one picture.

    python examples/landscape.py

Trains a small network on scikit-learn's handwritten digits twice for each seed, with SGD and with SAM, alike
in everything else (data, initial params, order of batches), and measures both solutions on the training set:
the eigenvalues of the Hessian, its trace, worst-case and average sharpness. Prints a table of means and
deviations over the seeds, and draws the landscapes around the two solutions of the first seed.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import reporting
from digits import MLP, Digits, batch_order, cross_entropy, load
from flax.training.train_state import TrainState
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from reporting import number
from tqdm import tqdm

import optax_sam
from optax_sam import landscape, sharpness

COLOURS = {"SGD": reporting.GREY, "SAM": reporting.RED}
BATCH_SIZE = 50
MODEL = MLP()


def loss_fn(params: optax.Params, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The training loss: the same function trains and is measured."""
    images, labels = batch
    return cross_entropy(MODEL.apply({"params": params}, images), labels)


def train(rho: jax.Array, params: optax.Params, data: Digits, order: jax.Array) -> optax.Params:
    """Trains with SAM; a radius of 0 is SGD, and the same compiled program serves both."""
    sam = optax_sam.sam(rho)
    steps = order.shape[0] * order.shape[1]
    tx = optax.chain(sam, optax.sgd(optax.cosine_decay_schedule(0.01, steps), momentum=0.9))
    value_and_grad = optax_sam.sam_value_and_grad(loss_fn, sam)

    def train_step(state: TrainState, rows: jax.Array) -> tuple[TrainState, None]:
        batch = data.images[rows], data.labels[rows]
        _, grads = value_and_grad(state.params, batch, state=state.opt_state)
        return state.apply_gradients(grads=grads), None

    state = TrainState.create(apply_fn=MODEL.apply, params=params, tx=tx)
    return jax.lax.scan(train_step, state, order.reshape(steps, -1))[0].params


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
        "test accuracy, %": 100 * jnp.mean(guesses == data.test_labels),
        "training loss": loss_fn(params, batch),
        "lambda 1": top.values[0],
        "lambda 1 / lambda 5": top.ratio(5),
        "trace": trace.mean,
        "worst-case sharpness, rho 0.5": worst,
        "average sharpness, rho 0.02": average.mean,
    }
    return {name: float(value) for name, value in measured.items()}


def figure(solutions: dict[str, optax.Params], data: Digits, size: int, matvecs: int | None) -> Figure:
    """The two landscapes with the same contours, the sharpest directions, and the two spectra."""
    batch = data.images, data.labels
    picture = Figure(figsize=(8.6, 7.6), layout="constrained")
    grid = picture.subplots(2, 2)
    draw_planes(grid[0], solutions, batch, size)
    draw_lines(grid[1, 0], solutions, batch, matvecs)
    draw_spectra(grid[1, 1], solutions, batch, matvecs)
    return picture


def draw_planes(panels: Sequence[Axes], solutions: dict[str, optax.Params], batch: Any, size: int) -> None:
    """The loss around both, along the same random directions, scaled to the filters of each."""
    grid = np.linspace(-1.0, 1.0, size)
    planes = {
        name: landscape.plane(loss_fn, params, batch, x=grid, key=1, progress=False)
        for name, params in solutions.items()
    }
    lowest = min(plane.losses.min() for plane in planes.values())
    largest = max(plane.losses.max() for plane in planes.values())
    levels = np.geomspace(lowest, largest, 16)
    for axes, (name, plane) in zip(panels, planes.items(), strict=True):
        landscape.plot_contour(plane, axes, levels=levels, colorbar=name == "SAM")
        axes.set(xticks=(-1, 0, 1), yticks=(-1, 0, 1), box_aspect=1)
        axes.set_title(f"{name}: training loss", loc="left", fontsize=11, color=COLOURS[name])


def draw_lines(axes: Axes, solutions: dict[str, optax.Params], batch: Any, matvecs: int | None) -> None:
    """The loss along the sharpest direction of each."""
    ends, positions = {}, np.linspace(-2.0, 2.0, 41)
    for name, params in solutions.items():
        # Five, as in `measure`: the program is compiled already.
        sharpest, *_ = landscape.eigenvector_directions(
            loss_fn, params, batch, k=5, num_matvecs=matvecs, progress=False
        )
        _, losses = landscape.line(loss_fn, params, batch, sharpest, positions=positions, progress=False)
        # An eigenvector has no sign of its own: the steeper side to the right.
        losses = losses if losses[-1] >= losses[0] else losses[::-1]
        axes.plot(positions, losses, color=COLOURS[name], linewidth=2)
        ends[name] = positions[-1], losses[-1], COLOURS[name]
    reporting.style(axes, title="Along the sharpest direction", xlabel="distance", ylabel="training loss")
    reporting.label_ends(axes, ends)


def draw_spectra(axes: Axes, solutions: dict[str, optax.Params], batch: Any, matvecs: int | None) -> None:
    """The densities of the eigenvalues."""
    densities = {
        name: sharpness.spectral_density(
            loss_fn, params, batch, num_probes=2, num_matvecs=matvecs or 60, progress=False
        )
        for name, params in solutions.items()
    }
    widest = max(density.nodes.max() for density in densities.values())
    eigenvalues = np.linspace(-0.05 * widest, 1.05 * widest, 600)
    for name, density in densities.items():
        _, curve = density.smooth(eigenvalues, bandwidth=0.01 * widest)
        axes.semilogy(eigenvalues, curve, color=COLOURS[name])
        axes.fill_between(eigenvalues, curve, 1e-9, color=COLOURS[name], alpha=0.25, linewidth=0)
        place = density.nodes.max(), 0.03 / widest
        side = "right" if density.nodes.max() > widest / 2 else "left"
        axes.annotate(f"{name}: largest\n{density.nodes.max():.2g}", place, color=COLOURS[name], ha=side)
    axes.set_ylim(1e-5 / widest, None)
    title, label = "Spectrum of the Hessian", "density (axis cut)"
    reporting.style(axes, title=title, xlabel="eigenvalue", ylabel=label)


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Means and deviations over the seeds, and what SAM has of SGD's."""
    lines = [("", *rows, "SAM / SGD")]
    for name, values in by_measure(rows).items():
        cells = [
            f"{v.mean():#.3g}" + (f" ± {v.std(ddof=1):#.2g}" if len(v) > 1 else "") for v in values.values()
        ]
        lines.append((name, *cells, f"{values['SAM'].mean() / values['SGD'].mean():.2f}"))
    return reporting.align(lines)


def meaning(rows: dict[str, list[dict[str, float]]]) -> str:
    """Which measures a paired t-test tells apart."""
    groups: dict[str, list[str]] = {"worse": [], "better": [], "unclear": []}
    for name, values in by_measure(rows).items():
        groups[reporting.judge(reporting.gain_over(values["SAM"], values["SGD"]))].append(name)
    titles = {"worse": "Smaller with SAM (paired t-test, 5 %)", "better": "Larger", "unclear": "Not clear"}
    return "\n".join(f"{title}: {'; '.join(groups[key]) or 'none'}." for key, title in titles.items())


def by_measure(rows: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, np.ndarray]]:
    """Of every measure, the values of both by seed."""
    return {
        name: {arm: np.array([row[name] for row in each]) for arm, each in rows.items()}
        for name in rows["SGD"][0]
    }


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
    reporting.common_options(
        parser,
        "results/landscape",
        seeds=(5, 1),
        epochs=(100, 10),
        samples=(50, 5, "random samples of a measure, at least 2"),
        size=(31, 11, "points along a side of a plane, at least 2"),
    )
    options = reporting.finish(parser, argv)
    for name in ("samples", "size"):
        if getattr(options, name) < 2:
            parser.error(f"argument --{name}: must be an integer >= 2, got {getattr(options, name)}")
    return options


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, measures, reports and returns the numbers of the report."""
    options = parse(argv)
    matvecs = 12 if options.quick else None  # Which the measures choose themselves.
    rows: dict[str, list[dict[str, float]]] = {"SGD": [], "SAM": []}
    first: dict[str, optax.Params] = {}
    seeds = reporting.seeds_of(options)
    jitted_train = jax.jit(train)
    with tqdm(total=4 * len(seeds) + 1, unit="part", dynamic_ncols=True, disable=None) as bar:
        for seed in seeds:
            data, order = load(seed, label_noise=0.0), batch_order(seed, options.epochs, BATCH_SIZE)
            init = MODEL.init(jax.random.key(seed), data.images[:1])["params"]
            for name, rho in (("SGD", 0.0), ("SAM", options.rho)):
                bar.set_description(f"seed {seed}: training with {name}")
                params = jax.block_until_ready(jitted_train(jnp.asarray(rho), init, data, order))
                bar.update()
                bar.set_description(f"seed {seed}: measuring {name}")
                rows[name].append(measure(params, data, options.samples, matvecs))
                bar.update()
                if seed == seeds[0]:
                    first[name] = params
        bar.set_description("drawing")
        picture = figure(first, load(seeds[0], label_noise=0.0), options.size, matvecs)
        bar.update()
    largest = [f"{name} {values.mean():.2g}" for name, values in by_measure(rows)["lambda 1"].items()]
    reporting.head(
        picture,
        f"Largest eigenvalue of the Hessian: {', '.join(largest)}",
        f"Title: mean over {options.seeds} seeds. Pictures: seed {seeds[0]}; digits, MLP, SAM with rho "
        f"{options.rho:g}; planes along two random directions, scaled to the weights.",
    )
    words = reporting.conclude(options, meaning(rows))
    print(
        f"Scikit-learn's digits; mlp, {options.epochs} epochs, SAM with rho {options.rho:g}; "
        f"mean ± standard deviation over {options.seeds} paired seeds."
    )
    print(text_of({"rows": rows}), words, sep="\n\n")
    reporting.save(options, "landscape", picture, {"rows": rows, "meaning": words})
    return rows


if __name__ == "__main__":
    main()
