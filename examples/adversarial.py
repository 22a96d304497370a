"""Adversarial attacks on networks that were trained on clean digits, by SGD, by SAM, and by SGD with L2.

    python examples/adversarial.py

Nobody saw an attacked image in training. The attacker knows the network and moves every pixel by at most eps,
where black is 0 and white is 1: FGSM in one step, PGD in 40 steps from a random start (Madry et al. 2018,
https://arxiv.org/abs/1706.06083). That SAM alone helps against it was seen by Wei et al. 2023
(https://arxiv.org/abs/2305.05392). The radius and the L2 penalty are those that were best on clean images, on
the seeds 0 to 4.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import reporting
from digits import MLP, NUM_TRAIN, cross_entropy, load, pixels, scale, stack, train_at_once
from digits_recipes import Setting, base_arm, variant_arm
from matplotlib.figure import Figure
from tqdm import tqdm

BATCH_SIZE = 50
MODEL = MLP()
Loss = Callable[[jax.Array], jax.Array]


def into_ball(images: jax.Array, center: jax.Array, eps: jax.Array) -> jax.Array:
    """The nearest images that differ from the center by at most eps in every pixel, and are images."""
    return jnp.clip(jnp.clip(images, center - eps, center + eps), 0.0, 1.0)


def fgsm(loss: Loss, images: jax.Array, eps: jax.Array) -> jax.Array:
    """One step of eps along the sign of the gradient."""
    return into_ball(images + eps * jnp.sign(jax.grad(loss)(images)), images, eps)


def pgd(loss: Loss, images: jax.Array, eps: jax.Array, key: jax.Array, steps: int = 40) -> jax.Array:
    """Many steps along the sign of the gradient, each followed by a projection; from a random start."""

    def step(_: int, attacked: jax.Array) -> jax.Array:
        ahead = attacked + 2.5 * eps / steps * jnp.sign(jax.grad(loss)(attacked))
        return into_ball(ahead, images, eps)

    start = images + eps * jax.random.uniform(key, images.shape, images.dtype, -1.0, 1.0)
    return jax.lax.fori_loop(0, steps, step, into_ball(start, images, eps))


def logits(params: optax.Params, scaling: tuple[jax.Array, jax.Array], images: jax.Array) -> jax.Array:
    """The network on pixels from 0 to 1: it was trained on standardised ones."""
    mean, std = scaling
    return MODEL.apply({"params": params}, (images - mean) / std)


def accuracies(
    params: optax.Params,
    scaling: tuple[jax.Array, jax.Array],
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    *,
    radii: Sequence[float],
    steps: int,
) -> dict[str, jax.Array]:
    """Accuracy under both attacks, for each eps; one compiled program for all of them."""

    def loss(images: jax.Array) -> jax.Array:
        return cross_entropy(logits(params, scaling, images), labels)

    def accuracy(images: jax.Array) -> jax.Array:
        return jnp.mean(jnp.argmax(logits(params, scaling, images), axis=-1) == labels)

    def at(eps: jax.Array) -> dict[str, jax.Array]:
        return {
            "FGSM": accuracy(fgsm(loss, images, eps)),
            "PGD": accuracy(pgd(loss, images, eps, key, steps)),
        }

    return jax.lax.map(at, jnp.asarray(radii))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, attacks, reports and returns the numbers of the report."""
    options = parse(argv)
    seeds, radii = reporting.seeds_of(options), [0.0, *options.eps]
    setting = Setting("momentum", None, 0.0, options.epochs * (NUM_TRAIN // BATCH_SIZE))
    decay = dataclasses.replace(setting, weight_decay=options.weight_decay)
    arms = [base_arm(setting), *(variant_arm("sam", rho, setting) for rho in options.rho), base_arm(decay)]
    data = stack(load(seed, label_noise=0.0) for seed in seeds)
    raw = [pixels(np.random.default_rng(seed))[0] for seed in seeds]
    scaling = tuple(map(jnp.asarray, map(np.float32, zip(*map(scale, raw), strict=True))))
    images = jnp.asarray(np.float32([image[NUM_TRAIN:] for image in raw]))
    keys = stack(jax.random.key(seed) for seed in seeds)
    attack = jax.jit(jax.vmap(functools.partial(accuracies, radii=radii, steps=options.steps)))

    print(headline(options))
    values: dict[str, dict[str, np.ndarray]] = {}
    with tqdm(total=len(arms) * (options.epochs + 1), unit="epoch", dynamic_ncols=True, disable=None) as bar:
        for arm in arms:
            bar.set_description(arm.name)
            params, _ = train_at_once(
                arm, seeds, data, epochs=options.epochs, batch_size=BATCH_SIZE, after_epoch=bar.update
            )
            bar.set_description(f"attacking {arm.name}")
            for name, found in attack(params, scaling, images, data.test_labels, keys).items():
                for eps, row in zip(radii, 100 * np.asarray(found).T, strict=True):
                    values.setdefault(f"{name}, eps {eps:g}" if eps else "clean", {})[arm.name] = row
            bar.update()

    report = {"rows": reporting.compare(values)}
    report["meaning"] = reporting.conclude(options, meaning(report["rows"], arms[0].name))
    print(text_of(report), report["meaning"], sep="\n\n")
    reporting.save(options, "adversarial", figure(report["rows"], radii), report)
    return report


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of this program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--eps",
        type=reporting.number(float, 0, 1, above=True),
        nargs="+",
        default=[0.025, 0.05, 0.075, 0.1, 0.15],
        metavar="EPS",
        help="how far pixels move, of a range of 1 (default: 0.025 0.05 0.075 0.1 0.15)",
    )
    parser.add_argument(
        "--rho",
        type=reporting.number(float, 0, above=True),
        nargs="+",
        default=[0.5],
        metavar="RHO",
        help="radii of SAM (default: 0.5)",
    )
    parser.add_argument(
        "--weight-decay",
        type=reporting.number(float, 0, above=True),
        default=0.005,
        help="L2 of the run to compare with (default: %(default)s)",
    )
    reporting.common_options(
        parser, "results/adversarial", epochs=(60, 2), seeds=(5, 2), steps=(40, 3, "steps of PGD")
    )
    return reporting.finish(parser, argv)


def headline(options: argparse.Namespace) -> str:
    """What is going to be trained."""
    return (
        f"{NUM_TRAIN} clean images of scikit-learn's digits, pixels from 0 to 1; mlp, {options.epochs} "
        f"epochs; 797 others attacked,\nby PGD in {options.steps} steps; "
        f"mean ± standard deviation over {options.seeds} paired seeds."
    )


def meaning(rows: dict[str, Any], base: str) -> str:
    """What each radius did, on clean images and on average over the attacks."""
    sentences = []
    for name in next(iter(rows.values())):
        if name == base:
            continue
        attacked = [row for setting, row in rows.items() if setting != "clean"]
        mean, plain = (np.mean([row[arm]["values"] for row in attacked], axis=0) for arm in (name, base))
        unit = "points of accuracy on attacked images (mean over all attacks)"
        sentences.append(
            f"{reporting.verdict(name, base, reporting.gain_over(mean, plain), unit)}; "
            f"{rows['clean'][name]['gain']['mean']:+.1f} on clean images."
        )
    return "\n".join(sentences)


def text_of(content: dict[str, Any]) -> str:
    """The tables as RESULTS.md has them, from what is in the JSON."""
    return reporting.comparison_table(content["rows"], "test accuracy, %")


def figure(rows: dict[str, Any], radii: Sequence[float]) -> Figure:
    """Gains over the first arm against eps, a panel for each attack."""
    base, *others = rows["clean"]
    picture = Figure(figsize=(10, 3.9), layout="constrained")
    shades = (reporting.RED, reporting.BLUE, reporting.GOLD, reporting.GREEN)
    for axes, attack in zip(picture.subplots(1, 2, sharey=True), ("FGSM", "PGD"), strict=True):
        settings = ["clean", *(f"{attack}, eps {eps:g}" for eps in radii[1:])]
        ends = {}
        for i, name in enumerate(others):
            gains = np.array([rows[setting][name]["gain"]["values"] for setting in settings]).T
            x = np.arange(len(radii)) + 0.06 * i
            reporting.line_with_interval(axes, x, gains, shades[i % len(shades)])
            ends[name] = x[-1], gains[:, -1].mean(), shades[i % len(shades)]
        axes.axhline(0, color=reporting.GREY, linewidth=1)
        reporting.style(axes, title=attack, xlabel=f"eps, of a pixel range of 1 (below: {base} reaches)")
        reached = [rows[setting][base]["mean"] for setting in settings]
        names = [f"{eps:g}\n{accuracy:.0f} %" for eps, accuracy in zip(radii, reached, strict=True)]
        axes.set_xticks(range(len(radii)), names)
    reporting.label_ends(axes, ends)
    picture.axes[0].set_ylabel(f"accuracy above {base}, points")
    seeds = len(rows["clean"][base]["values"])
    attacked = [row for setting, row in rows.items() if setting != "clean"]
    means = [np.mean([row[name]["mean"] for row in attacked]) for name in (base, others[0])]
    reporting.head(
        picture,
        f"Accuracy on attacked images: {means[0]:.0f} % by {base}, {means[1]:.0f} % by {others[0]}",
        f"Title: mean over all attacks. Below: mean of {seeds} paired differences, bars: its 95 % interval.",
    )
    return picture


if __name__ == "__main__":
    main()
