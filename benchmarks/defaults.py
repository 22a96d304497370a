"""Which settings are safe: every variant at its default and around it, against plain training.

    python benchmarks/defaults.py
    python benchmarks/defaults.py --variants wsam looksam
    python benchmarks/defaults.py --warm-up 0.3 --variants sam asam --networks cnn --output results/warm_up
    python benchmarks/defaults.py --tables

Scikit-learn's digits as they come, brightness from 0 to 1, with 30 % of the training labels wrong and, for
defaults, with clean labels too; three networks with two learning rates each, constant and without a warm-up.
A setting is safe if in every such cell its test accuracy after the last epoch is no more than 5 points below
that of plain training, and no seed has collapsed, which means below 20 % (chance is 10 %). The difference is
paired, the mean over seeds, and a standard error is allowed for.

All runs of a variant on a network are one compiled program, whose arguments are learning rates, labels, seeds
and settings. Results go to `defaults.json`, where those of variants that are not measured again stay.
"""

import inspect
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import digits
import reporting
import timing

import optax_sam

MARGIN, COLLAPSE = 5.0, 20.0
# They have no base optimizer, and are compared with themselves at radius 0.
OWN_PLAIN = ("bsam", "sam_sps")
LABELS = {"wrong": 0.3, "clean": 0.0}
BATCH_SIZE = 50


# Data and networks.


def load(seed: int, label_noise: float) -> digits.Digits:
    """The digits of the examples, their brightness as it is instead of centred and scaled."""
    data = digits.load(seed, label_noise)
    images, _ = digits.pixels(np.random.default_rng(seed))
    images = jnp.asarray(images, jnp.float32)
    return data._replace(images=images[: digits.NUM_TRAIN], test_images=images[digits.NUM_TRAIN :])


class MLP(nn.Module):
    """64-256-256-10."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Logits."""
        del train
        x = images.reshape(len(images), -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(256)(x))
        return nn.Dense(10)(x)


class CNN(nn.Module):
    """Two convolutions of 3 x 3 with BatchNorm and pooling, 16 and 32 channels."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Logits."""
        x = images.reshape(-1, 8, 8, 1)
        for channels in (16, 32):
            count, side = x.shape[:2]
            # As a product of patches: XLA's convolution is ten times as slow inside a loop on a CPU.
            padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            shifted = [padded[:, i : i + side, j : j + side] for i in range(3) for j in range(3)]
            x = nn.Dense(channels, use_bias=False)(jnp.concatenate(shifted, axis=-1))
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            x = x.reshape(count, side // 2, 2, side // 2, 2, channels).max(axis=(2, 4))
        return nn.Dense(10)(x.reshape(len(x), -1))


class ViT(nn.Module):
    """Two blocks of width 32 with two heads, on four patches of 4 x 4."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Logits."""
        del train
        patches = images.reshape(-1, 2, 4, 2, 4).transpose(0, 1, 3, 2, 4).reshape(-1, 4, 16)
        x = nn.Dense(32)(patches) + self.param("positions", nn.initializers.normal(0.02), (4, 32))
        for _ in range(2):
            x += nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
            x += nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x))))
        return nn.Dense(10)(nn.LayerNorm()(x).mean(axis=1))


class Recipe(NamedTuple):
    """A network and how it is trained.

    Attributes:
      network: The network.
      optimizer: From a learning rate to the base optimizer.
      rates: Learning rates of the base optimizer.
      bsam_rates: Those of `bsam`.
      labels: Sets of labels, and how many of them are wrong.
      load: From a seed and that number to the data.
    """

    network: nn.Module
    optimizer: Callable[[Any], optax.GradientTransformation]
    rates: tuple[float, ...]
    bsam_rates: tuple[float, ...]
    labels: Mapping[str, float] = LABELS
    load: Callable[[int, float], digits.Digits] = load


def momentum(rate: Any) -> optax.GradientTransformation:
    """SGD with momentum 0.9."""
    return optax.sgd(rate, momentum=0.9)


RECIPES = {
    "mlp": Recipe(MLP(), momentum, (0.02, 0.1), (0.05, 0.2)),
    "cnn": Recipe(CNN(), momentum, (0.05, 0.2), (0.05, 0.2)),
    "vit": Recipe(ViT(), optax.adamw, (0.001, 0.005), (0.05, 0.2)),
}


# Variants.


class Case(NamedTuple):
    """A constructor and the settings that are tried.

    Attributes:
      constructor: The public constructor.
      settings: Its arguments, by name.
      fixed: Arguments that decide what is compiled.
      kind: What the constructor takes first: nothing, "base" for a base optimizer, "base and rate" for its
        learning rate too, "rate" for that alone, "rate and examples" for the number of examples too.
      none: What an argument is whose default is None.
    """

    constructor: Callable[..., Any]
    settings: list[dict[str, float]]
    fixed: Mapping[str, Any] = {}
    kind: str = ""
    none: Mapping[str, float] = {}

    def make(self, base: optax.GradientTransformation, rate: Any, settings: Mapping[str, Any]) -> Any:
        """The variant."""
        first = {
            "": (),
            "base": (base,),
            "base and rate": (base, rate),
            "rate": (rate,),
            "rate and examples": (rate, digits.NUM_TRAIN),
        }
        return self.constructor(*first[self.kind], **self.fixed, **settings)

    def default(self) -> dict[str, float]:
        """The defaults of the arguments that are tried."""
        parameters = inspect.signature(self.constructor).parameters
        defaults = {name: parameters[name].default for name in self.settings[0]}
        return {name: self.none[name] if value is None else value for name, value in defaults.items()}


def warmed_up(settings: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The settings with a radius that grows linearly from 0 over so many steps."""
    return {
        name: partial(_grow, value, steps)
        if steps and name in ("rho", "step_size", "scale", "loss_rise")
        else value
        for name, value in settings.items()
    }


def _grow(rho: Any, steps: int, step: Any) -> Any:
    return rho * jnp.minimum(1.0, step / steps)


def radii(*values: float, name: str = "rho", **others: float) -> list[dict[str, float]]:
    """Settings that differ in the radius."""
    return [{name: value, **others} for value in values]


USUAL = radii(0.0125, 0.05, 0.2)
# With gamma 1/2 both are SAM.
WSAM = [
    *radii(0.05, 0.2, gamma=0.6),
    *radii(0.0125, 0.05, 0.2, gamma=0.65),
    *radii(0.0125, 0.02, 0.05, 0.2, gamma=0.8),
    *radii(0.0125, 0.05, 0.2, gamma=0.9),
]
DECOUPLED_WSAM = [
    *radii(0.05, 0.2, gamma=0.6),
    *radii(0.0125, 0.02, 0.05, gamma=0.8),
    *radii(0.05, gamma=0.9),
]
LOOKSAM = [
    *radii(0.1, 0.4, k=5, alpha=0.1),
    *radii(0.05, 0.1, k=5, alpha=0.3),
    *radii(0.1, k=5, alpha=0.7),
    *radii(0.1, k=10, alpha=0.1),
    *radii(0.1, k=10, alpha=0.3),
    *radii(0.025, 0.1, k=10, alpha=0.7),
    *radii(0.1, k=2, alpha=0.3),
    *radii(0.1, k=2, alpha=0.7),
]
LOOK_AHEAD = radii(0.0025, 0.01, 0.04, name="step_size")
GSAM = [*radii(0.0125, 0.05, 0.2, alpha=0.4), *radii(0.05, 0.2, alpha=0.1)]
CUSTOM_SAME = [
    *radii(0.0125, 0.05, 0.2, condition=2.0),
    *radii(0.05, condition=1.5),
    *radii(0.05, condition=1.25),
]

CASES = {
    "sam": Case(optax_sam.sam, radii(0.0125, 0.05, 0.1, 0.2)),
    "asam": Case(optax_sam.asam, radii(0.1, 0.125, 0.25, 0.5, 1.0, 2.0)),
    "gcsam": Case(optax_sam.gcsam, USUAL),
    "gsam": Case(optax_sam.gsam, GSAM),
    "wsam": Case(optax_sam.wsam, WSAM, none={"gamma": 0.6}),
    "decoupled_wsam": Case(
        optax_sam.decoupled_wsam, DECOUPLED_WSAM, kind="base and rate", none={"gamma": 0.8}
    ),
    "gnp": Case(optax_sam.gnp, radii(0.1, 0.4, alpha=0.8)),
    "unified_sam": Case(optax_sam.unified_sam, radii(0.05, 0.2, mix=0.5)),
    "le_sam": Case(optax_sam.le_sam, radii(0.05, 0.2, name="loss_rise", rho_max=0.1)),
    "stable_sam": Case(optax_sam.stable_sam, radii(0.05, 0.2)),
    "xsam": Case(optax_sam.xsam, radii(0.05, 0.2, alpha=1.5)),
    "functional_sam": Case(optax_sam.functional_sam, radii(0.05, 0.2)),
    "preconditioned_sam": Case(optax_sam.preconditioned_sam, radii(0.05, 0.2, power=0.5)),
    "cr_sam": Case(optax_sam.cr_sam, radii(0.05, 0.2, gamma=0.1, beta=0.01)),
    "eigen_sam": Case(optax_sam.eigen_sam, radii(0.05, 0.2, alpha=0.2)),
    "sampa": Case(optax_sam.sampa, radii(0.1, 0.4, mix=0.2), kind="rate"),
    "sam_sps": Case(optax_sam.sam_sps, radii(0.0, 0.025, 0.1, 0.4)),
    "looksam": Case(optax_sam.looksam, LOOKSAM),
    "async_sam": Case(optax_sam.async_sam, USUAL),
    "async_sam, perturbed": Case(optax_sam.async_sam, USUAL, {"reuse": "perturbed"}),
    "ae_sam": Case(optax_sam.ae_sam, radii(0.05, 0.2, threshold=0.0)),
    "weight_noise": Case(optax_sam.weight_noise, radii(0.01, 0.04, name="scale")),
    "friendly_sam": Case(optax_sam.friendly_sam, USUAL),
    "vasso": Case(optax_sam.vasso, USUAL),
    "msam": Case(optax_sam.msam, radii(0.075, 0.3, 1.2), kind="base"),
    "lookbehind": Case(optax_sam.lookbehind, radii(0.025, 0.05, 0.2, alpha=0.5), kind="base"),
    "ssam_f": Case(optax_sam.ssam_f, radii(0.05, 0.2, sparsity=0.5)),
    "ssam_d": Case(optax_sam.ssam_d, radii(0.05, 0.2, sparsity=0.5)),
    "shifted_msam": Case(optax_sam.shifted_msam, radii(0.3, 1.2), kind="base"),
    "same": Case(optax_sam.same, radii(0.05)),  # Its default gains are those of SAM.
    "custom_same": Case(optax_sam.custom_same, CUSTOM_SAME),
    "saner": Case(optax_sam.saner, USUAL),
    "hessian_sam": Case(optax_sam.hessian_sam, USUAL),
    "extragradient": Case(optax_sam.extragradient, LOOK_AHEAD),
    "extragradient, sum": Case(optax_sam.extragradient, LOOK_AHEAD, {"weights": (1.0, 1.0)}),
    "bsam": Case(optax_sam.bsam, radii(0.0, 0.0125, 0.05, 0.2), kind="rate and examples"),
}


# Training.


class Trainer:
    """Trains on one network; what does not depend on the variant is prepared once."""

    def __init__(self, recipe: Recipe, seeds: int, epochs: int, warm_up: float = 0.0) -> None:
        """Draws the data, the first params and the order of the batches of all seeds."""
        self.recipe = recipe
        self.seeds = seeds
        numbers = range(seeds)
        data = [recipe.load(seed, noise) for noise in recipe.labels.values() for seed in numbers]
        data = jax.tree.map(lambda *x: jnp.stack(x), *data)
        self.data = jax.tree.map(lambda x: x.reshape(len(recipe.labels), seeds, *x.shape[1:]), data)
        self.orders = jnp.stack(
            [digits.batch_order(seed, epochs, BATCH_SIZE).reshape(-1, BATCH_SIZE) for seed in numbers]
        )
        self.last = digits.NUM_TRAIN // BATCH_SIZE
        self.warm_up = round(warm_up * epochs * self.last)
        first = jax.jit(lambda key: recipe.network.init(key, self.data.images[0, 0, :1], train=True))
        starts = [first(jax.random.key(seed)) for seed in numbers]
        self.starts = jax.tree.map(lambda *x: jnp.stack(x), *starts)
        self.accuracy = jax.jit(jax.vmap(self._accuracy))

    def _accuracy(self, variables: Any, labels: jax.Array, seed: jax.Array) -> jax.Array:
        logits = self.recipe.network.apply(variables, self.data.test_images[labels, seed], train=False)
        return 100 * jnp.mean(jnp.argmax(logits, axis=-1) == self.data.test_labels[labels, seed])

    def _outputs(self, params: Any, inputs: tuple[Any, jax.Array]) -> tuple[jax.Array, Any]:
        stats, images = inputs
        variables = {"params": params, "batch_stats": stats}
        logits, new = self.recipe.network.apply(variables, images, train=True, mutable=["batch_stats"])
        return logits, new.get("batch_stats", {})

    def train(self, case: Case | None, runs: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
        """Trains all runs, each of which has a `rate`, `labels`, a `seed` and the variant's `settings`.

        Args:
          case: The variant, or None for plain training.
          runs: What to train.

        Returns:
          For each run the accuracy at the end, in percent, and the means of the metrics in the last epoch.
        """

        def one(run: Any, data: Any, starts: Any, orders: Any) -> tuple[Any, Any]:
            images, labels = data.images[run["labels"], run["seed"]], data.labels[run["labels"], run["seed"]]
            variables = jax.tree.map(lambda x: x[run["seed"]], starts)
            base = self.recipe.optimizer(run["rate"])
            # Plain training is SAM in a ball without extent.
            settings = warmed_up(run["settings"], self.warm_up)
            variant = optax_sam.sam(0.0) if case is None else case.make(base, run["rate"], settings)
            takes_pairs = isinstance(variant, optax_sam.SharpnessAwareTransformation)
            if takes_pairs:
                tx = variant if variant.is_optimizer else optax.chain(variant, base)
            else:  # `shifted_msam` takes plain gradients.
                plain = optax_sam.sam(0.0)
                variant, tx = plain, optax.chain(plain, variant)
            # In two parts, for `functional_sam`; all others take it as it is.
            loss = optax_sam.CompositeLoss(self._outputs, digits.cross_entropy, has_aux=True)
            value_and_grad = optax_sam.sam_value_and_grad(loss, variant, has_aux=True, return_metrics=True)

            def step(carry: Any, rows: jax.Array) -> tuple[Any, Any]:
                params, stats, state = carry
                inputs = stats, images[rows]
                (_, stats), grads, metrics = value_and_grad(params, inputs, labels[rows], state=state)
                updates, state = tx.update(grads, state, params)
                return (optax.apply_updates(params, updates), stats, state), metrics

            params, stats = variables["params"], variables.get("batch_stats", {})
            carry = params, stats, tx.init(params)
            (params, stats, state), metrics = jax.lax.scan(step, carry, orders[run["seed"]])
            if not takes_pairs:
                params = optax_sam.msam_eval_params(state, params)
            last = jax.tree.map(lambda x: jnp.nanmean(x[-self.last :]), metrics)
            variables = {"params": params, "batch_stats": stats} if stats else {"params": params}
            return variables, last

        stacked = jax.tree.map(lambda *x: jnp.asarray(x), *runs)
        # In a loop rather than in a batch: as fast on a core, and steps that skip a gradient skip it.
        program = jax.jit(lambda runs, *rest: jax.lax.map(lambda run: one(run, *rest), runs))
        variables, last = program(stacked, self.data, self.starts, self.orders)
        accuracy = np.asarray(self.accuracy(variables, stacked["labels"], stacked["seed"]))
        found = {name: np.asarray(getattr(last, name)) for name in ("loss", "sharpness", "cosine")}
        return [
            {"accuracy": float(accuracy[i]), **{name: float(x[i]) for name, x in found.items()}}
            for i in range(len(runs))
        ]


def measure(trainer: Trainer, network: str, name: str) -> list[dict[str, Any]]:
    """Rows of a variant, or of plain training, on a network: one for each setting, rate and set of labels."""
    case = CASES.get(name)
    # `sam_sps` has no learning rate: in place of it stands the largest that it takes.
    rates = {"bsam": trainer.recipe.bsam_rates, "sam_sps": (1.0,)}.get(name, trainer.recipe.rates)
    cells = [
        {"variant": name, "settings": setting, "network": network, "rate": rate, "labels": labels}
        for setting in (case.settings if case else [{}])
        for labels in (LABELS if is_default(name, setting) else ["wrong"])
        for rate in rates
    ]
    runs = [
        {
            "rate": cell["rate"],
            "labels": list(LABELS).index(cell["labels"]),
            "seed": seed,
            "settings": {key: float(value) for key, value in cell["settings"].items()},
        }
        for cell in cells
        for seed in range(trainer.seeds)
    ]
    ends = np.split(np.array(trainer.train(case, runs)), len(cells))
    return [
        {**cell, **{key: [round(end[key], 4) for end in of_seeds] for key in of_seeds[0]}}
        for cell, of_seeds in zip(cells, ends, strict=True)
    ]


def is_default(name: str, setting: Mapping[str, float]) -> bool:
    """Whether these are the variant's defaults, or plain training."""
    return name not in CASES or setting == CASES[name].default() or is_plain(name, setting)


def is_plain(name: str, setting: Mapping[str, float]) -> bool:
    """Whether this is what a setting is compared with."""
    return name == "plain" or (name in OWN_PLAIN and setting["rho"] == 0.0)


# Report.


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each setting of each variant: where it is worst, and where it collapses."""

    def cell(row: Mapping[str, Any]) -> tuple[Any, ...]:
        own = row["variant"] if row["variant"] in OWN_PLAIN else ""
        return own, row["network"], row["rate"], row["labels"]

    plain = {
        cell(row): np.array(row["accuracy"]) for row in rows if is_plain(row["variant"], row["settings"])
    }
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if not is_plain(row["variant"], row["settings"]):
            groups.setdefault((row["variant"], json.dumps(row["settings"])), []).append(row)
    report = []
    for (name, setting), members in groups.items():
        gains = [row["accuracy"] - plain[cell(row)] for row in members]
        errors = [np.std(gain, ddof=1) / len(gain) ** 0.5 if len(gain) > 1 else 0.0 for gain in gains]
        keeps_up = all(np.mean(gain) + error >= -MARGIN for gain, error in zip(gains, errors, strict=True))
        collapsed = sum(min(row["accuracy"]) < COLLAPSE for row in members)
        by_labels = {
            f"{labels} labels": [
                float(np.mean(gain))
                for row, gain in zip(members, gains, strict=True)
                if row["labels"] == labels
            ]
            for labels in LABELS
        }
        report.append(
            {
                "variant": name,
                "settings": json.loads(setting),
                "default": is_default(name, json.loads(setting)),
                "safe": keeps_up and not collapsed,
                "cells": len(members),
                "collapsed": collapsed,
                **by_labels,
            }
        )
    return report


def table(report: Sequence[Mapping[str, Any]]) -> str:
    """The report as text: test accuracy less that of plain training, in points."""
    columns = ["variant", "setting", "default", "wrong labels: mean", "worst cell", "clean: worst cell"]
    columns += ["cells with a collapse", "safe"]
    lines = []
    for row in report:
        wrong, clean = row["wrong labels"], row["clean labels"]
        lines.append(
            [
                row["variant"],
                ", ".join(f"{name} {value:g}" for name, value in row["settings"].items()),
                "yes" if row["default"] else "",
                f"{np.mean(wrong):+.1f}",
                f"{min(wrong):+.1f}",
                f"{min(clean):+.1f}" if clean else "",
                f"{row['collapsed']} of {row['cells']}",
                "yes" if row["safe"] else "no",
            ]
        )
    return timing.markdown(columns, lines)


def baselines(rows: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy of plain training in every cell."""
    lines = [
        [
            row["network"],
            f"{row['rate']:g}",
            row["labels"],
            f"{row['variant']}, rho 0"
            if row["variant"] in OWN_PLAIN
            else "momentum"
            if row["network"] != "vit"
            else "adamw",
            f"{np.mean(row['accuracy']):.1f}",
            f"{np.mean(row['loss']):.2f}",
        ]
        for row in rows
        if is_plain(row["variant"], row["settings"])
    ]
    columns = ["network", "learning rate", "labels", "optimizer", "test accuracy, %", "training loss"]
    return timing.markdown(columns, lines)


def collapses(rows: Sequence[Mapping[str, Any]]) -> str:
    """How collapsed runs look in the last epoch, against those that work."""
    lines = []
    for title, want in (("collapsed", True), ("others", False)):
        found = [
            [row[key][i] for key in ("loss", "sharpness", "cosine")]
            for row in rows
            for i, accuracy in enumerate(row["accuracy"])
            if row["variant"] != "plain" and row["labels"] == "wrong" and (accuracy < COLLAPSE) == want
        ]
        if found:
            low, middle, high = np.nanquantile(np.array(found, float), [0.1, 0.5, 0.9], axis=0)
            cells = [f"{m:.2f} ({a:.2f} to {b:.2f})" for a, m, b in zip(low, middle, high, strict=True)]
            lines.append([title, str(len(found)), *cells])
    return timing.markdown(["runs", "count", "loss", "sharpness", "cosine"], lines)


def text_of(content: Mapping[str, Any]) -> str:
    """The tables as RESULTS.md has them, from what is in the JSON."""
    rows = content["rows"]
    return "\n\n".join(
        [
            "Plain training:",
            baselines(rows),
            'All settings; the column "default" says whether the row has the default arguments:',
            table(summarize(rows)),
            "Collapsed runs in the last epoch, median (10 % to 90 %):",
            collapses(rows),
        ]
    )


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measures, prints the tables, writes all numbers and returns the report."""
    parser = timing.parser(__doc__, "results/defaults")
    parser.add_argument("--tables", action="store_true", help="print the tables of an earlier run, and stop")
    parser.add_argument("--seeds", type=timing.count(), default=3, help="default: %(default)s")
    parser.add_argument("--epochs", type=timing.count(), default=12, help="default: %(default)s")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=CASES,
        default=list(CASES),
        metavar="VARIANT",
        help=timing.some_of(CASES),
    )
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=RECIPES,
        default=list(RECIPES),
        metavar="NETWORK",
        help=timing.some_of(RECIPES),
    )
    parser.add_argument(
        "--warm-up",
        type=reporting.number(float, 0, 1),
        default=0.0,
        help="fraction of the steps in which the radius grows from 0 (default: %(default)s)",
    )
    options = timing.parse(parser, argv)
    if options.quick:
        print("smoke test, not a result")
        options.seeds, options.epochs = 1, 1
    path = options.output / "defaults.json"
    if options.tables:
        if not path.exists():
            parser.error(f"argument --tables: no results at {str(path)!r}")
        found = json.loads(path.read_text())
        print(text_of(found))
        return summarize(found["rows"])
    begin = time.perf_counter()
    trainers = {
        name: Trainer(RECIPES[name], options.seeds, options.epochs, options.warm_up)
        for name in options.networks
    }
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    for variant in ("plain", *options.variants):
        kept = [row for row in kept if row["variant"] != variant or row["network"] not in trainers]
        for name, trainer in trainers.items():
            kept += measure(trainer, name, variant)
        print(f"{variant}: done after {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
        order = ["plain", *CASES]
        kept.sort(key=lambda row: (order.index(row["variant"]), list(RECIPES).index(row["network"])))
        content = {"machine": timing.machine(), "epochs": options.epochs, "rows": kept}
        path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{text_of({'rows': kept})}\n\nWritten: {path}")
    return summarize(kept)


if __name__ == "__main__":
    main()
