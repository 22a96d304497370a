"""Fine-tuning with few labels: SGD and Adam, without and with SAM, on all params, adapters or the head.

    python examples/finetune.py

A network is pretrained on the digits 0 to 4 of scikit-learn's data set. Then it learns the digits 5 to 9 from
5, 10 or 20 labelled images of each. One predicate on the path of a leaf says what is trained; the same mask
tells SAM what to perturb, and Optax what to freeze:

    sam = optax_sam.sam(rho, ascent=optax_sam.ascent.masked(trained))
    tx = optax.chain(sam, optax.selective_transform(optax.adam(1e-3), freeze_mask=frozen))
"""

import argparse
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import reporting
from digits import cross_entropy, initial_params, pixels, stack
from flax.training.train_state import TrainState
from matplotlib.figure import Figure
from tqdm import tqdm

import optax_sam

NUM_CLASSES = 5  # In the first task, and in the second.
MOST_LABELS = 20
BATCH_SIZE = 20
ADAPTER_WIDTH = 16

# The layers that are trained, by the beginnings of their names.
TRAINED = {"all": ("hidden", "head"), "adapters": ("adapter", "head"), "head": ("head",)}

BASES = {"momentum": lambda rate: optax.sgd(rate, momentum=0.9), "adam": optax.adam}


class Choice(NamedTuple):
    """What was chosen on the seeds 0 to 4: the rate that suits the base optimizer alone, then the radius.

    Attributes:
      rate: The learning rate to begin with; a cosine takes it to 0.
      rho: The radius of SAM.
    """

    rate: float
    rho: float


CHOICES = {
    ("all", "momentum"): Choice(0.01, 0.5),
    ("all", "adam"): Choice(0.003, 0.1),
    ("adapters", "momentum"): Choice(0.03, 2.0),
    ("adapters", "adam"): Choice(0.003, 0.02),  # No radius was better than none.
    ("head", "momentum"): Choice(0.01, 1.0),
    ("head", "adam"): Choice(0.01, 0.5),
}


class Network(nn.Module):
    """64-256-256-5 with ReLU, and an adapter behind each hidden layer that does nothing to begin with."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of a batch of images of shape (batch, 64)."""
        x = images
        for i in range(2):
            x = nn.relu(nn.Dense(256, kernel_init=nn.initializers.he_normal(), name=f"hidden_{i}")(x))
            inner = nn.relu(nn.Dense(ADAPTER_WIDTH, name=f"adapter_down_{i}")(x))
            x += nn.Dense(x.shape[-1], kernel_init=nn.initializers.zeros, name=f"adapter_up_{i}")(inner)
        return nn.Dense(NUM_CLASSES, name="head")(x)


NETWORK = Network()


class Task(NamedTuple):
    """A classification task.

    Attributes:
      images: Training images, of the second task as many as may be labelled, class by class in turn.
      labels: Their classes, from 0 to 4.
      test_images: Other images of the same classes.
      test_labels: Their classes.
    """

    images: jax.Array
    labels: jax.Array
    test_images: jax.Array
    test_labels: jax.Array


def tasks(seed: int) -> tuple[Task, Task]:
    """The digits 0 to 4, and the digits 5 to 9; standardised by the training images of the former."""
    images, labels = pixels(np.random.default_rng(seed))
    old = labels < NUM_CLASSES
    mean, std = images[old].mean(axis=0), images[old].std()
    images = ((images - mean) / std).astype(np.float32)

    first = Task(images[old][100:], labels[old][100:], images[old][:100], labels[old][:100])
    new = [np.flatnonzero(labels == NUM_CLASSES + c) for c in range(NUM_CLASSES)]
    train = np.array([rows[:MOST_LABELS] for rows in new]).T.ravel()  # 5, 6, 7, 8, 9, 5, 6, ...
    test = np.concatenate([rows[MOST_LABELS:] for rows in new])
    second = Task(images[train], labels[train] - NUM_CLASSES, images[test], labels[test] - NUM_CLASSES)
    return jax.tree.map(jnp.asarray, (first, second))


def batches(seed: int, images: int, steps: int, batch_size: int) -> jax.Array:
    """Which images are in the batch of each step; all come once before one comes again."""
    rng = np.random.default_rng([seed, images])
    rows = [rng.permutation(images) for _ in range(-(-steps * batch_size // images))]
    return jnp.asarray(np.concatenate(rows)[: steps * batch_size].reshape(steps, batch_size))


def of_layers(names: tuple[str, ...], params: optax.Params) -> Any:
    """Which leaves belong to layers whose names begin so."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key.startswith(names), params)


def fit(
    params: optax.Params,
    rho: jax.Array,
    task: Task,
    order: jax.Array,
    *,
    layers: tuple[str, ...],
    base: Callable[[optax.Schedule], optax.GradientTransformation],
    rate: float,
) -> tuple[optax.Params, jax.Array]:
    """Trains some layers with SAM; a radius of 0 is the base optimizer, and one program serves both.

    Returns:
      The params, and the accuracy on the test images.
    """
    trained = of_layers(layers, params)
    # `selective_transform` takes trees only: a function would freeze everything, without a word.
    frozen = jax.tree.map(operator.not_, trained)
    sam = optax_sam.sam(rho, ascent=optax_sam.ascent.masked(trained))
    optimizer = base(optax.cosine_decay_schedule(rate, len(order)))
    tx = optax.chain(sam, optax.selective_transform(optimizer, freeze_mask=frozen))

    def loss_fn(params: optax.Params, images: jax.Array, labels: jax.Array) -> jax.Array:
        return cross_entropy(NETWORK.apply({"params": params}, images), labels)

    value_and_grad = optax_sam.sam_value_and_grad(loss_fn, sam)

    def train_step(state: TrainState, rows: jax.Array) -> tuple[TrainState, None]:
        _, grads = value_and_grad(state.params, task.images[rows], task.labels[rows], state=state.opt_state)
        return state.apply_gradients(grads=grads), None

    state = TrainState.create(apply_fn=NETWORK.apply, params=params, tx=tx)
    state, _ = jax.lax.scan(train_step, state, order)
    guesses = jnp.argmax(NETWORK.apply({"params": state.params}, task.test_images), axis=-1)
    return state.params, jnp.mean(guesses == task.test_labels)


def pretrain(seeds: Sequence[int], epochs: int) -> tuple[optax.Params, Task, jax.Array]:
    """Pretrains on the first task, a network for each seed, and puts a new head on each.

    Returns:
      The params to start fine-tuning from, the second task, and the accuracies on the first; stacked.
    """
    first, second = (stack(task) for task in zip(*map(tasks, seeds), strict=True))
    images = first.images.shape[1]
    order = stack(batches(seed, images, epochs * images // 50, 50) for seed in seeds)
    params = stack(initial_params(NETWORK, seed) for seed in seeds)
    train = functools.partial(fit, layers=TRAINED["all"], base=BASES["momentum"], rate=0.01)
    params, accuracy = jax.jit(jax.vmap(train))(params, jnp.zeros(len(seeds)), first, order)
    fresh = stack(initial_params(NETWORK, 1000 + seed) for seed in seeds)
    return {**params, "head": fresh["head"]}, second, accuracy


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains everything, reports and returns the numbers of the report."""
    options = parse(argv)
    seeds = reporting.seeds_of(options)
    values: dict[str, dict[str, np.ndarray]] = {}
    with tqdm(
        total=1 + len(TRAINED) * len(options.bases) * len(options.labels),
        unit="part",
        dynamic_ncols=True,
        disable=None,
    ) as bar:
        bar.set_description("pretraining")
        start, task, before = pretrain(seeds, epochs=2 if options.quick else 20)
        bar.update()
        for name, layers in TRAINED.items():
            for base in options.bases:
                rate, rho = CHOICES[name, base]
                train = functools.partial(fit, layers=layers, base=BASES[base], rate=rate)
                # Over the seeds, and over both radii, with which everything else is the same.
                program = jax.jit(
                    jax.vmap(jax.vmap(train, in_axes=(None, 0, None, None)), in_axes=(0, None, 0, 0))
                )
                for labels in options.labels:
                    bar.set_description(f"{name}, {base}, {labels} labels of each")
                    order = stack(batches(s, NUM_CLASSES * labels, options.steps, BATCH_SIZE) for s in seeds)
                    _, accuracy = program(start, jnp.array([0.0, rho]), task, order)
                    plain, sharp = 100 * np.asarray(accuracy).T
                    values[f"{name}, {base}, {labels}"] = {"base optimizer": plain, "with SAM": sharp}
                    bar.update()

    report = {"pretraining": reporting.spread(100 * np.asarray(before)), "rows": reporting.compare(values)}
    report["meaning"] = reporting.conclude(options, meaning(report["rows"]))
    print(headline(options, report), text_of(report), sep="\n")
    print(f"\n{report['meaning']}")
    reporting.save(options, "finetune", figure(report["rows"], options), report)
    return report


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of this program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--labels",
        type=reporting.number(int, 1, MOST_LABELS),
        nargs="+",
        default=[5, 10, 20],
        metavar="N",
        help="labelled images of each class (default: 5 10 20)",
    )
    add("--bases", choices=BASES, nargs="+", help="base optimizers (default: all, with --quick: momentum)")
    reporting.common_options(
        parser, "results/finetune", steps=(300, 10, "steps of fine-tuning"), seeds=(10, 2)
    )
    options = reporting.finish(parser, argv)
    options.bases = options.bases or (["momentum"] if options.quick else list(BASES))
    return options


def headline(options: argparse.Namespace, report: dict[str, Any]) -> str:
    """What was trained."""
    return (
        "Scikit-learn's digits: pretrained on 0 to 4 (test accuracy there "
        f"{reporting.show(report['pretraining'])} %), fine-tuned on 5 to 9 for {options.steps} steps.\n"
        f"Mean ± standard deviation over {options.seeds} paired seeds. "
        "Rows: what is trained, base optimizer, labels of each class."
    )


def meaning(rows: dict[str, Any]) -> str:
    """Where SAM helps, and where it does not."""
    groups: dict[str, list[str]] = {"better": [], "worse": [], "unclear": []}
    for setting, row in rows.items():
        gain = row["with SAM"]["gain"]
        groups[reporting.judge(gain)].append(f"{setting} ({gain['mean']:+.1f})")
    titles = {
        "better": "SAM better (paired t-test, 5 %)",
        "worse": "Worse",
        "unclear": "Not clearly different",
    }
    return "\n".join(f"{title}: {'; '.join(groups[key]) or 'nowhere'}." for key, title in titles.items())


def text_of(content: dict[str, Any]) -> str:
    """The tables as RESULTS.md has them, from what is in the JSON."""
    return reporting.comparison_table(content["rows"], "test accuracy, %")


def figure(rows: dict[str, Any], options: argparse.Namespace) -> Figure:
    """The paired gain by the number of labels; a panel for each choice of layers."""
    picture = Figure(figsize=(3.1 * len(TRAINED), 3.7), layout="constrained")
    panels = picture.subplots(1, len(TRAINED), sharey=True, squeeze=False)[0]
    colours = dict(zip(options.bases, (reporting.RED, reporting.GOLD), strict=False))
    for name, axes in zip(TRAINED, panels, strict=True):
        for base, shift in zip(options.bases, (-0.12, 0.12), strict=False):
            for i, labels in enumerate(options.labels):
                gain = rows[f"{name}, {base}, {labels}"]["with SAM"]["gain"]
                half = float(reporting.half_width(np.array(gain["values"])))
                axes.errorbar(
                    i + shift,
                    gain["mean"],
                    None if np.isnan(half) else half,
                    fmt="o",
                    color=colours[base],
                    markerfacecolor="white" if reporting.judge(gain) == "unclear" else colours[base],
                    capsize=3,
                )
        axes.axhline(0.0, color=reporting.GREY, linewidth=1)
        reporting.style(axes, title=f"trained: {name}", xlabel="labels of each class")
        axes.set_xticks(range(len(options.labels)), options.labels)
        axes.set_xlim(-0.5, len(options.labels) - 0.5)
    for base, y in zip(options.bases, (0.97, 0.9), strict=False):
        words = f"SAM before {base}"
        panels[-1].text(
            0.98, y, words, color=colours[base], ha="right", va="top", transform=panels[-1].transAxes
        )
    panels[0].set_ylabel("gain of SAM, points of test accuracy")
    judged = [reporting.judge(row["with SAM"]["gain"]) for row in rows.values()]
    reporting.head(
        picture,
        f"Fine-tuning with few labels: SAM is clearly better in {judged.count('better')} of {len(judged)} "
        f"cases, worse in {judged.count('worse')}",
        f"Mean over {options.seeds} paired seeds, bars: its 95 % interval. "
        "Filled: clear by a paired t-test at 5 %; open: not.",
    )
    return picture


if __name__ == "__main__":
    main()
