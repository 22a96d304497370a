"""A residual network with batch norm on CIFAR-10 or CIFAR-100, with SGD and with SAM in front of it.

    python examples/cifar_resnet.py
    python examples/cifar_resnet.py --data folder/with/cifar-10-python.tar.gz

On an accelerator with data this is a ResNet-18 of full width, 200 epochs, in bfloat16 on float32 params. On
a CPU, or without `--data`, width and epochs are smaller, and the first lines say so. No package has CIFAR's
images: without `--data` those of MNIST stand in for them, halved in height and width. The batch is spread
over all devices. A run that was interrupted continues when the same command is given again. Metrics go into
`metrics.jsonl` of each run, and to TensorBoard where that is installed.
"""

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import image_data
import jax
import jax.numpy as jnp
import multi_host
import numpy as np
import optax
import orbax.checkpoint as ocp
import reporting
import training
from flax.training.train_state import TrainState
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from reporting import number

import optax_sam

VARIANTS = ("sam", "asam", "gsam", "wsam", "looksam")
# What must not change when a run continues.
SETTINGS = (
    *("data", "dataset", "train_size", "width", "blocks", "dtype", "epochs", "batch_size"),
    *("arms", "rho", "rho_schedule", "perturbation", "learning_rate", "weight_decay", "mixup"),
    *("label_smoothing", "ema_decay"),
)
# What a run consists of.
FILES = ("settings.json", *(f"{arm}-seed[0-9]*" for arm in ("sgd", *VARIANTS)), "cifar_resnet.*")

_SMALL = {"width": 8, "blocks": [1, 1, 1, 1], "epochs": 30, "batch_size": 64, "seeds": 3}
_FULL = {"width": 64, "blocks": [2, 2, 2, 2], "epochs": 200, "batch_size": 128, "seeds": 3}
_QUICK = {"width": 4, "blocks": [1, 1], "epochs": 2, "batch_size": 64, "seeds": 2}
FORMS = {
    "": _SMALL,
    "on an accelerator with --data": _FULL,
    "with --quick": {**_QUICK, "train_size": 192},
}


# The network.


class Block(nn.Module):
    """Two convolutions, and a way around them."""

    features: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """From (batch, height, width, channels) to (batch, height / stride, width / stride, features)."""
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        y = nn.relu(norm()(conv(self.features, (3, 3), self.stride, padding=1)(x)))
        y = norm(scale_init=nn.initializers.zeros)(conv(self.features, (3, 3), padding=1)(y))
        if x.shape != y.shape:
            x = norm()(conv(self.features, (1, 1), self.stride)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """The residual network for small images; blocks (2, 2, 2, 2) and width 64 make a ResNet-18."""

    num_classes: int
    blocks: Sequence[int]
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Logits, in float32, of images of shape (batch, height, width, channels)."""
        x = images.astype(self.dtype)
        x = nn.Conv(self.width, (3, 3), padding=1, use_bias=False, dtype=self.dtype)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype)(x))
        for stage, count in enumerate(self.blocks):
            for i in range(count):
                x = Block(self.width * 2**stage, 2 if stage > 0 and i == 0 else 1, self.dtype)(x, train)
        return nn.Dense(self.num_classes)(jnp.mean(x, axis=(1, 2)).astype(jnp.float32))


class State(TrainState):
    """With the running statistics of batch norm, and the averages of both over the steps."""

    batch_stats: Any
    ema: Any

    @property
    def arrays(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        names = ("step", "params", "opt_state", "batch_stats", "ema")
        return {name: getattr(self, name) for name in names}


@functools.partial(jax.jit, static_argnums=(0, 1))
def init(model: ResNet, shape: Sequence[int], seed: int) -> Any:
    """Params and statistics to begin with; compiled once for all arms and seeds."""
    return model.init(jax.random.key(seed), jnp.zeros(shape), train=False)


# What happens to the images.


def augment(key: jax.Array, images: jax.Array, mirror: bool = True) -> jax.Array:
    """Shifts each image by up to an eighth of its size, and mirrors half of them, but for digits."""
    count, size, _, channels = images.shape
    pad = size // 8
    shift_key, flip_key = jax.random.split(key)
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect")
    corners = jax.random.randint(shift_key, (count, 2), 0, 2 * pad + 1)
    cut = jax.vmap(lambda x, at: jax.lax.dynamic_slice(x, (*at, 0), (size, size, channels)))
    images = cut(padded, corners)
    if not mirror:
        return images
    mirrored = jax.random.bernoulli(flip_key, 0.5, (count, 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def mix(weight: Any, images: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mixup: weighted means of pairs of images, and of their targets."""
    # The batch is shuffled: its reverse is as good a partner as any.
    return tuple(weight * x + (1 - weight) * x[::-1] for x in (images, targets))


# Training.


class Trainer(training.Trainer):
    """The network with one optimizer, on all devices."""

    def __init__(self, name: str, options: argparse.Namespace, source: image_data.Source) -> None:
        """Chooses the optimizer by its name: "sgd", or that of a variant."""
        self.name, self.options, self.source = name, options, source
        self.steps_per_epoch = training.steps_per_epoch(source.train_size, options.batch_size)
        self.model = ResNet(
            source.num_classes, tuple(options.blocks), options.width, jnp.dtype(options.dtype)
        )
        self.learning_rate, self.variant, self.tx = make_optimizer(name, options, self.steps_per_epoch)

        mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
        self.copied, self.spread = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
        if options.batch_size % mesh.size:
            msg = f"--batch-size must be a multiple of the {mesh.size} devices, got {options.batch_size}"
            raise ValueError(msg)
        self.step = jax.jit(self._step, out_shardings=self.copied, donate_argnums=0)
        self.logits = jax.jit(self._logits)

    def _loss(
        self, params: Any, batch_stats: Any, batch: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, Any]:
        images, targets = batch
        logits, new = self.model.apply(
            {"params": params, "batch_stats": batch_stats}, images, train=True, mutable=["batch_stats"]
        )
        return jnp.mean(optax.softmax_cross_entropy(logits, targets)), new["batch_stats"]

    def _step(
        self, state: State, seed: int, weight: float, images: jax.Array, labels: jax.Array, scaling: Any
    ) -> tuple[State, dict[str, jax.Array]]:
        # By seed and step alone: a run that continues draws what it would have drawn.
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        classes = jax.nn.one_hot(labels, self.source.num_classes)
        targets = optax.smooth_labels(classes, self.options.label_smoothing)
        images = augment(key, standardise(images, scaling), mirror=self.options.data is not None)
        batch = mix(weight, images, targets)

        if self.variant is None:
            value_and_grad = jax.value_and_grad(self._loss, has_aux=True)
            (loss, batch_stats), grads = value_and_grad(state.params, state.batch_stats, batch)
            log = {"loss": loss}
        else:
            # Per device: each has a perturbation from its own part of the batch (m-sharpness), and batch norm
            # then sees that part too. Under `jit` this is said as the number of parts.
            alone = self.options.perturbation == "per-device"
            shards = {"num_shards": jax.device_count(), "batch_argnums": 2} if alone else {}
            value_and_grad = optax_sam.sam_value_and_grad(
                self._loss, self.variant, has_aux=True, return_metrics=True, **shards
            )
            (loss, batch_stats), grads, metrics = value_and_grad(
                state.params, state.batch_stats, batch, state=state.opt_state
            )
            log = {"loss": loss, "sharpness": metrics.sharpness, "rho": metrics.rho}
        state = state.apply_gradients(grads=grads, batch_stats=batch_stats)
        # Early on the average forgets fast, else the initial params would stay in it for long.
        decay = jnp.minimum(self.options.ema_decay, (1 + state.step) / (10 + state.step))
        now = {"params": state.params, "batch_stats": state.batch_stats}
        log["learning_rate"] = self.learning_rate(state.step - 1)
        return state.replace(ema=optax.incremental_update(now, state.ema, 1 - decay)), log

    def _logits(self, variables: Any, images: jax.Array, scaling: Any) -> jax.Array:
        return self.model.apply(variables, standardise(images, scaling), train=False)

    def start(self, seed: int) -> tuple[Any, list[dict[str, float]]]:
        """The same params for every arm of a seed, or the last checkpoint."""
        self.data = self.source.split(seed)
        images = self.data.images.astype(np.float32)
        self.scaling = images.mean(axis=(0, 1, 2)), images.std(axis=(0, 1, 2))

        variables = init(self.model, (1, *images.shape[1:]), seed)
        state = State.create(apply_fn=None, tx=self.tx, ema=None, **variables)
        # The average begins as a copy: two names of one buffer could not both be donated to the step.
        state = state.replace(ema=jax.tree.map(jnp.copy, variables))
        # No weak types: what a checkpoint gives back has none, and shall run in the same program.
        state = jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.asarray(x).dtype), state)
        state = jax.device_put(state, self.copied)
        folder = (self.options.output / f"{self.name}-seed{seed}").absolute()
        self.log = Log(folder)
        self.manager = ocp.CheckpointManager(
            folder / "checkpoints",
            options=ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False),
        )
        history: list[dict[str, float]] = []
        if (last := self.manager.latest_step()) is not None:
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state.arrays)
            kept = self.manager.restore(
                last,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(like), history=ocp.args.JsonRestore()),
            )
            state, history = state.replace(**kept.state), kept.history["epochs"]
        self.log.rewrite(history)
        return state, history

    def train(self, state: Any, seed: int, epoch: int, tick: Callable[[], Any]) -> Any:
        """An epoch."""
        logs, alpha = [], self.options.mixup
        rng = np.random.default_rng([seed, epoch, 4])
        for rows in training.batches(len(self.data.images), self.options.batch_size, seed, epoch):
            weight = rng.beta(alpha, alpha) if alpha else 1.0
            batch = jax.device_put((self.data.images[rows], self.data.labels[rows]), self.spread)
            state, log = self.step(state, seed, weight, *batch, self.scaling)
            logs.append(log)
            if jax.default_backend() == "cpu":
                # Several steps under way at once are known to stall CPU processes with several devices.
                jax.block_until_ready(log)
            tick()
        logs = jax.device_get(logs)
        self.epoch_log = {name: float(np.mean([log[name] for log in logs])) for name in logs[0]}
        return state

    def measure(self, state: Any, seed: int) -> dict[str, float]:
        """Accuracies on the test set, with and without averaging, and on training images as they are."""
        del seed
        now = {"params": state.params, "batch_stats": state.batch_stats}
        size = 1000 // jax.device_count() * jax.device_count()

        def accuracy(variables: Any, images: np.ndarray, labels: np.ndarray) -> float:
            def logits(images: np.ndarray) -> jax.Array:
                return self.logits(variables, jax.device_put(images, self.spread), self.scaling)

            return training.accuracy(logits, images, labels, size)

        return {
            "test": accuracy(now, self.data.test_images, self.data.test_labels),
            "test_ema": accuracy(state.ema, self.data.test_images, self.data.test_labels),
            "train": accuracy(now, self.data.images[:5000], self.data.labels[:5000]),
            **self.epoch_log,
        }

    def keep(self, state: Any, seed: int, history: list[dict[str, float]]) -> None:
        """Logs the epoch, and makes a checkpoint."""
        del seed
        self.log.add(len(history), history[-1])
        if len(history) % self.options.save_every == 0 or len(history) == self.options.epochs:
            self.manager.save(
                len(history),
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state.arrays), history=ocp.args.JsonSave({"epochs": history})
                ),
            )


class Log:
    """Metrics of a run: a line of JSON for each epoch, and TensorBoard's files where it is installed."""

    def __init__(self, folder: Any) -> None:
        """Opens the log in a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        try:
            from tensorboard.summary import Writer
        except ImportError:
            self.writer = None
        else:
            self.writer = Writer(str(folder))

    def rewrite(self, history: Sequence[dict[str, float]]) -> None:
        """Forgets epochs that came after the checkpoint from which the run continues."""
        lines = [json.dumps({"epoch": i + 1, **row}) + "\n" for i, row in enumerate(history)]
        self.path.write_text("".join(lines), encoding="utf-8")

    def add(self, epoch: int, row: dict[str, float]) -> None:
        """An epoch."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"epoch": epoch, **row}) + "\n")
        if self.writer is not None:
            for name, value in row.items():
                self.writer.add_scalar(name, value, epoch)
            self.writer.flush()


def standardise(images: jax.Array, scaling: tuple[jax.Array, jax.Array]) -> jax.Array:
    """To mean 0 and deviation 1 in each channel."""
    mean, std = scaling
    return (images.astype(jnp.float32) - mean) / std


def make_optimizer(
    name: str, options: argparse.Namespace, steps_per_epoch: int
) -> tuple[optax.Schedule, optax_sam.SharpnessAwareTransformation | None, optax.GradientTransformation]:
    """The schedule of the learning rate, the variant or None, and the optimizer that contains it."""
    steps, peak, rho = options.epochs * steps_per_epoch, options.learning_rate, options.rho
    warmup = max(1, steps // 20)
    learning_rate = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps)
    base = optax.chain(
        optax.add_decayed_weights(options.weight_decay, mask=lambda w: jax.tree.map(lambda x: x.ndim > 1, w)),
        optax.sgd(learning_rate, momentum=0.9, nesterov=True),
    )
    if name == "sgd":
        return learning_rate, None, base
    radius = {
        "constant": rho,
        "warmup": optax.linear_schedule(0.0, rho, warmup),
        "learning-rate": optax_sam.schedules.rho_from_learning_rate(learning_rate, rho, lr_max=peak),
    }[options.rho_schedule]
    variant = getattr(optax_sam, name)(radius)
    return learning_rate, variant, optax.chain(variant, base)


# The program.


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, reports and returns the numbers of the report."""
    parser = make_parser()
    options = parse(parser, argv)
    with training.complaints(parser):
        source = image_data.cifar(options.data, options.dataset, options.train_size)
        trainers = [Trainer(name, options, source) for name in options.arms]
    multi_host.prepare(options, SETTINGS, FILES)
    print(f"Data: {source.name}.")
    blocks, device = "-".join(map(str, options.blocks)), jax.devices()[0].device_kind
    print(
        f"Network: blocks {blocks} and width {options.width} (ResNet-18: 2-2-2-2, 64), in {options.dtype}.\n"
        f"{options.epochs} epochs on {jax.device_count()} x {device}, {options.perturbation} perturbation.",
        flush=True,
    )
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    curves = training.compare(trainers, seeds, options.epochs)

    columns = [
        training.Column("test accuracy, %", "test"),
        training.Column("of the EMA, %", "test_ema"),
        training.Column("training accuracy, %", "train"),
    ]
    names = [column.metric for column in columns]
    shown = {
        arm: {name: curve[name] for name in [*names, "loss", "seconds"]} for arm, curve in curves.items()
    }
    report = training.summarize(shown, options.arms[0], columns)
    words = reporting.conclude(options, training.verdict(report, "points of test accuracy"))
    heading = f"{options.epochs} epochs; mean ± standard deviation over {options.seeds} paired seeds"
    print(f"\n{heading}:\n{text_of(report)}\n\n{words}")
    panels = [
        training.Panel("Test set", "test", "accuracy, %"),
        training.Panel("Training images, as they are", "train", "accuracy, %"),
    ]
    data = options.dataset if options.data else "MNIST, 14 x 14"
    title = f"{data}, a residual network, test accuracy in percent: {training.finding(report)}"
    picture = training.figure(shown, panels, title)
    training.save(options, {"from": source.name, **report, "meaning": words}, shown, picture, "cifar_resnet")
    return report


def text_of(content: dict[str, Any]) -> str:
    """The tables as RESULTS.md has them, from what is in the JSON."""
    return training.table(content)


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add, default = parser.add_argument, functools.partial(training.defaults, forms=FORMS)
    add("--data", help="folder of the CIFAR archive or of its batches, the archive, or tfds, or huggingface")
    add("--dataset", choices=("cifar10", "cifar100"), default="cifar10", help="default: %(default)s")
    some = f"use only this many training images ({default('train_size')}; without --data: 1000)"
    add("--train-size", type=number(int, 1), help=some)
    add("--arms", nargs="+", choices=("sgd", *VARIANTS), default=["sgd", "sam"], help="default: sgd sam")
    add("--width", type=number(int, 1), help=f"channels of the first stage ({default('width')})")
    add("--blocks", type=number(int, 1), nargs="+", help=f"blocks of each stage ({default('blocks')})")
    dtype = "of the computation; params are float32 (default: bfloat16 on an accelerator, else float32)"
    add("--dtype", choices=("float32", "bfloat16"), help=dtype)
    add("--rho", type=number(float, 0), default=0.05, help="radius (default: %(default)s)")
    add(
        "--rho-schedule",
        choices=("constant", "warmup", "learning-rate"),
        default="warmup",
        help="the last lets the radius follow the learning rate (default: %(default)s)",
    )
    add(
        "--perturbation",
        choices=("per-device", "global"),
        default="per-device",
        help="whether each device perturbs by its own part of the batch (default: %(default)s)",
    )
    add("--learning-rate", type=number(float, 0, above=True), default=0.1, help="default: %(default)s")
    add("--weight-decay", type=number(float, 0), default=5e-4, help="default: %(default)s")
    add("--mixup", type=number(float, 0), default=0.2, help="0 for none (default: %(default)s)")
    add("--label-smoothing", type=number(float, 0, 1), default=0.1, help="default: %(default)s")
    add("--ema-decay", type=number(float, 0, 1), default=0.999, help="default: %(default)s")
    add("--save-every", type=number(int, 1), default=1, help="epochs between checkpoints (default: 1)")
    add(
        "--fresh",
        action="store_true",
        help="start anew instead of continuing: first deletes the run in --output, and nothing else in there",
    )
    training.run_options(parser, "results/cifar_resnet", FORMS)
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, with what the user left open."""
    options = parser.parse_args(argv)
    accelerator = jax.default_backend() != "cpu"
    full = accelerator and options.data
    form = FORMS["with --quick" if options.quick else "on an accelerator with --data" if full else ""]
    return training.fill(parser, options, {"dtype": "bfloat16" if accelerator else "float32", **form})


if __name__ == "__main__":
    main()
