"""Federated learning on clients whose labels differ: FedAvg and FedSAM.

    python examples/federated.py

In every round each client starts from the server's params, takes a few local steps on its own images, and the
server averages the params, weighted by how many images a client has. FedAvg (McMahan et al. 2017,
https://arxiv.org/abs/1602.05629) takes SGD steps, FedSAM (Qu et al. 2022, https://arxiv.org/abs/2206.02618;
Caldarola et al. 2022, https://arxiv.org/abs/2203.11834) SAM steps. Who has which digits is drawn from
Dirichlet(alpha): a small alpha gives each client a few digits only, a large one gives all of them all.
"""

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import reporting
from digits import MLP, NUM_CLASSES, Arm, Digits, initial_params, load, make_train_step, stack
from flax.training.train_state import TrainState
from matplotlib.figure import Figure
from tqdm import tqdm

import optax_sam

BATCH_SIZE = 20
MODEL = MLP()

# The rate suits FedAvg best, and the radius FedSAM at that rate, on seeds that are not reported.
LEARNING_RATE = 0.3
RHO = 0.4


def dirichlet_split(
    labels: np.ndarray, clients: int, alpha: float, rng: np.random.Generator
) -> list[np.ndarray]:
    """Deals the images out, digit by digit, in proportions drawn from Dirichlet(alpha); a partition."""
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for digit in range(NUM_CLASSES):
        rows = rng.permutation(np.flatnonzero(labels == digit))
        shares = rng.dirichlet(np.full(clients, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(rows)).astype(int)
        for part, piece in zip(parts, np.split(rows, cuts), strict=True):
            part.append(piece)
    return [np.concatenate(part) for part in parts]


def plan(parts: Sequence[np.ndarray], rounds: int, steps: int, rng: np.random.Generator) -> np.ndarray:
    """Which images each client takes in each local step: (rounds, clients, steps, batch).

    Clients draw with replacement, so that all take the same number of steps, however few images they
    have; one without any takes some image, and its weight in the average is 0.
    """
    draws = [rng.choice(part if len(part) else [0], (rounds, steps, BATCH_SIZE)) for part in parts]
    return np.stack(draws, axis=1)


def local_training(arm: Arm, params: optax.Params, data: Digits, rows: jax.Array) -> optax.Params:
    """The local steps of one client. Its optimizer begins anew: nothing but params crosses the network."""
    train_step = make_train_step(MODEL, arm.variant)

    def step(state: TrainState, batch: jax.Array) -> tuple[TrainState, None]:
        return train_step(state, data.images[batch], data.labels[batch])[0], None

    state = TrainState.create(apply_fn=MODEL.apply, params=params, tx=arm.tx)
    return jax.lax.scan(step, state, rows)[0].params


def average(params: optax.Params, weights: jax.Array) -> optax.Params:
    """The server's step: the weighted mean over the first axis."""
    return jax.tree.map(lambda w: jnp.tensordot(weights, w, axes=1), params)


def federated_round(
    arm: Arm, params: optax.Params, data: Digits, rows: jax.Array, weights: jax.Array
) -> tuple[optax.Params, jax.Array]:
    """One round: all clients at once, then the average and its accuracy on the test images."""
    local = jax.vmap(functools.partial(local_training, arm), in_axes=(None, None, 0))(params, data, rows)
    params = average(local, weights)
    right = jnp.argmax(MODEL.apply({"params": params}, data.test_images), axis=-1) == data.test_labels
    return params, jnp.mean(right)


def arms(rho: float) -> list[Arm]:
    """FedAvg, and FedSAM."""
    sam, base = optax_sam.sam(rho), optax.sgd(LEARNING_RATE)
    return [Arm("FedAvg", None, base), Arm("FedSAM", sam, optax.chain(sam, base))]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, reports and returns the numbers of the report."""
    options = parse(argv)
    seeds, (rounds, steps) = reporting.seeds_of(options), (options.rounds, options.steps)
    data = stack(load(seed, label_noise=0.0) for seed in seeds)
    start = stack(initial_params(MODEL, seed) for seed in seeds)
    programs = {
        # Over the seeds; the round, and within it the clients, are one program for every alpha.
        arm.name: jax.jit(jax.vmap(functools.partial(federated_round, arm)))
        for arm in arms(options.rho)
    }

    print(headline(options))
    curves: dict[float, dict[str, np.ndarray]] = {}
    digits_of_a_client = {}
    with tqdm(total=len(options.alpha) * rounds, unit="round", dynamic_ncols=True, disable=None) as bar:
        for alpha in options.alpha:
            bar.set_description(f"alpha {alpha:g}")
            rows, weights, digits = [], [], []
            for seed, labels in zip(seeds, np.asarray(data.labels), strict=True):
                rng = np.random.default_rng([seed, 2])
                parts = dirichlet_split(labels, options.clients, alpha, rng)
                weights.append(np.array([len(part) for part in parts]) / len(labels))
                rows.append(plan(parts, rounds, steps, rng))
                digits += [len(set(labels[part])) for part in parts]
            digits_of_a_client[f"{alpha:g}"] = float(np.mean(digits))
            order, shares = jnp.asarray(np.stack(rows, axis=1)), jnp.asarray(np.float32(weights))

            curves[alpha] = {name: np.zeros((len(seeds), rounds)) for name in programs}
            params = dict.fromkeys(programs, start)
            for r in range(rounds):
                for name, program in programs.items():
                    params[name], accuracy = program(params[name], data, order[r], shares)
                    curves[alpha][name][:, r] = 100 * np.asarray(accuracy)
                bar.update()

    rows = {}
    for alpha, named in curves.items():
        rows[f"alpha {alpha:g}, last round"] = {name: v[:, -1] for name, v in named.items()}
        # One round of a heterogeneous run says little: they swing.
        rows[f"alpha {alpha:g}, mean of the last quarter"] = {
            name: v[:, -max(1, rounds // 4) :].mean(axis=1) for name, v in named.items()
        }
    report = {"digits_of_a_client": digits_of_a_client, "rows": reporting.compare(rows)}
    words = "\n".join(
        f"{setting}: {reporting.verdict('FedSAM', 'FedAvg', row['FedSAM']['gain'], 'points of accuracy')}."
        for setting, row in report["rows"].items()
    )
    report["meaning"] = reporting.conclude(options, words)
    print(text_of(report), report["meaning"], sep="\n\n")
    report["curves"] = {
        f"{alpha:g}": {name: v.round(3).tolist() for name, v in named.items()}
        for alpha, named in curves.items()
    }
    reporting.save(options, "federated", figure(curves, digits_of_a_client), report)
    return report


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of this program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    positive = reporting.number(float, 0, above=True)
    parser.add_argument(
        "--alpha",
        type=positive,
        nargs="+",
        default=[0.05, 0.3, 100.0],
        metavar="ALPHA",
        help="how even the digits are spread over the clients (default: 0.05 0.3 100)",
    )
    parser.add_argument("--rho", type=positive, default=RHO, help="radius of SAM (default: %(default)s)")
    reporting.common_options(
        parser,
        "results/federated",
        clients=(10, 4, "clients"),
        rounds=(20, 2, "rounds of averaging"),
        steps=(50, 2, "steps of a client in a round"),
        seeds=(5, 2),
    )
    return reporting.finish(parser, argv)


def headline(options: argparse.Namespace) -> str:
    """What is going to be trained."""
    return (
        f"Scikit-learn's digits, 1000 training images on {options.clients} clients; mlp, {options.rounds} "
        f"rounds of {options.steps} local steps;\nrho {options.rho:g}; "
        f"mean ± standard deviation over {options.seeds} paired seeds."
    )


def text_of(content: dict[str, Any]) -> str:
    """The tables as RESULTS.md has them, from what is in the JSON."""
    return reporting.comparison_table(content["rows"], "test accuracy, %")


def figure(curves: dict[float, dict[str, np.ndarray]], digits: dict[str, float]) -> Figure:
    """Accuracy round by round, and below it the difference; a column for each alpha."""
    picture = Figure(figsize=(0.8 + 3.1 * len(curves), 5), layout="constrained")
    grid = picture.subplots(2, len(curves), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 2))
    means, limits, last = [], [-0.5, 0.5], []
    for (upper, lower), (alpha, named) in zip(grid.T, curves.items(), strict=True):
        ends = {}
        for (name, values), colour in zip(named.items(), (reporting.GREY, reporting.RED), strict=True):
            rounds, mean = np.arange(1, values.shape[1] + 1), values.mean(axis=0)
            upper.plot(rounds, mean, color=colour, linewidth=2)
            ends[name] = rounds[-1], mean[-1], colour
            means.append(mean)
        reporting.style(upper, title=f"alpha {alpha:g}: {digits[f'{alpha:g}']:.1f} digits a client")
        gains = named["FedSAM"] - named["FedAvg"]
        reporting.line_with_interval(lower, rounds, gains, reporting.RED)
        lower.axhline(0, color=reporting.GREY, linewidth=1)
        reporting.style(lower, xlabel="round")
        lower.xaxis.get_major_locator().set_params(integer=True)
        mean, half = gains.mean(axis=0), np.nan_to_num(reporting.half_width(gains))
        last.append(f"{mean[-1]:+.1f}")
        limits += [*(mean - half)[len(rounds) // 4 :], *(mean + half)[len(rounds) // 4 :]]
    # Of the first rounds no more than is seen of the rest.
    low, high = min(mean[-1] for mean in means) - 4, max(mean.max() for mean in means) + 0.5
    grid[0, 0].set(ylabel="test accuracy, % (axis cut)", ylim=(low, high))
    grid[1, 0].set(
        ylabel="FedSAM above FedAvg,\npoints (axis cut)", ylim=(1.1 * min(limits), 1.1 * max(limits))
    )
    reporting.label_ends(upper, ends)
    reporting.head(
        picture,
        f"From uneven to even clients: FedSAM {', '.join(last)} points after the last round",
        f"Mean over {len(gains)} paired seeds; bars: 95 % interval of the mean difference.",
    )
    return picture


if __name__ == "__main__":
    main()
