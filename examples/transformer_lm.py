"""A small language model on text that every Python brings, with AdamW, with GSAM and with LookSAM.

    python examples/transformer_lm.py
    python examples/transformer_lm.py --text some.txt

A decoder-only transformer in Flax NNX reads bytes and predicts the next. The text is the reference
documentation that `help()` shows, and of that only the beginning, read many times over; every third
block of 1000 bytes is held out.
"""

import argparse
import functools
import pydoc_data.topics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import reporting
import training
from flax import nnx
from reporting import number

import optax_sam

VOCABULARY = 256  # Bytes.

_FULL = {"context": 64, "width": 64, "layers": 2, "epochs": 70, "batch_size": 16, "seeds": 3}
_QUICK = {"context": 16, "width": 16, "layers": 1, "epochs": 2, "batch_size": 32, "seeds": 2}
FORMS = {
    "": {**_FULL, "size": 15_000, "sample": 300},
    "with --quick": {**_QUICK, "size": 6_000, "sample": 20},
}


# The network.


class Block(nnx.Module):
    """Attention to what came before, and a layer of its own for each position."""

    def __init__(self, width: int, heads: int, dropout: float, *, rngs: nnx.Rngs) -> None:
        """Makes the params."""
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.hidden = nnx.Linear(width, 4 * width, rngs=rngs)
        self.output = nnx.Linear(4 * width, width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array, deterministic: bool) -> jax.Array:
        """From and to shape (batch, length, width)."""
        x += self.dropout(self.attention(self.norms[0](x), mask=mask), deterministic=deterministic)
        hidden = nnx.gelu(self.hidden(self.norms[1](x)))
        return x + self.dropout(self.output(hidden), deterministic=deterministic)


class Transformer(nnx.Module):
    """Predicts the next byte at every position."""

    def __init__(
        self, *, context: int, width: int, heads: int, layers: int, dropout: float, rngs: nnx.Rngs
    ) -> None:
        """Makes the params."""
        self.bytes = nnx.Embed(VOCABULARY, width, rngs=rngs)
        self.positions = nnx.Embed(context, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, dropout, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.logits = nnx.Linear(width, VOCABULARY, rngs=rngs)

    def __call__(self, tokens: jax.Array, deterministic: bool) -> jax.Array:
        """From bytes of shape (batch, length) to logits of shape (batch, length, 256)."""
        x = self.bytes(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask, deterministic)
        return self.logits(self.norm(x))


def bits_per_byte(model: Transformer, tokens: jax.Array, deterministic: bool) -> jax.Array:
    """The loss: how many bits each byte after the first costs, if the model is used to compress."""
    logits = model(tokens[:, :-1], deterministic)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.mean(loss) / np.log(2)


# Training.


def make_step(variant: optax_sam.SharpnessAwareTransformation | None) -> Callable[..., jax.Array]:
    """One step: plain, if the variant is None, or sharpness-aware. It changes model and optimizer."""

    @nnx.jit
    def step(model: Transformer, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
        if variant is None:
            loss, grads = nnx.value_and_grad(bits_per_byte)(model, tokens, False)
            optimizer.update(model, grads)
            return loss

        # Both passes see the same counts of the random streams, and so drop the same units.
        value_and_grad = optax_sam.nnx.sam_value_and_grad(bits_per_byte, variant)
        loss, grads = value_and_grad(model, tokens, False, state=optimizer)
        optimizer.update(model, grads)
        return loss

    return step


def make_optimizer(
    name: str, options: argparse.Namespace, steps: int
) -> tuple[optax_sam.SharpnessAwareTransformation | None, optax.GradientTransformation]:
    """The variant, or None, and the optimizer that contains it."""
    warmup = max(1, steps // 10)
    learning_rate = optax.warmup_cosine_decay_schedule(0.0, options.learning_rate, warmup, steps)
    base = optax.adamw(learning_rate, weight_decay=options.weight_decay)
    # Early gradients point anywhere: no perturbation at first, the whole one after a fifth of the steps.
    rho = optax.linear_schedule(0.0, options.rho, max(1, steps // 5))
    variants = {
        "adamw": lambda: None,
        "sam": lambda: optax_sam.sam(rho),
        "gsam": lambda: optax_sam.gsam(rho, alpha=options.alpha),
        "looksam": lambda: optax_sam.looksam(rho, k=options.k, alpha=options.alpha),
    }
    variant = variants[name]()
    return variant, base if variant is None else optax.chain(variant, base)


class Trainer(training.Trainer):
    """The model with one optimizer."""

    def __init__(self, name: str, options: argparse.Namespace, text: bytes) -> None:
        """Chooses the optimizer by its name."""
        self.name, self.options = name, options
        tokens = np.frombuffer(text, np.uint8).astype(np.int32)
        held_out = np.arange(len(tokens)) // 1000 % 3 == 2
        self.train_tokens, test = tokens[~held_out], tokens[held_out]
        self.length = options.context + 1
        if len(self.train_tokens) < 2 * self.length or len(test) < self.length:
            msg = f"{len(text)} bytes of text are too few: --size or --text must give 3000 or more"
            raise ValueError(msg)
        # Every epoch cuts the text at other places, which costs it at most one piece.
        self.pieces = len(self.train_tokens) // self.length - 1
        self.steps_per_epoch = training.steps_per_epoch(self.pieces, options.batch_size)
        pieces = len(test) // self.length
        self.test = test[: pieces * self.length].reshape(pieces, self.length)
        self.variant, self.tx = make_optimizer(name, options, options.epochs * self.steps_per_epoch)
        sizes = {name: getattr(options, name) for name in ("context", "width", "heads", "layers", "dropout")}
        self.create = nnx.jit(lambda key: Transformer(**sizes, rngs=nnx.Rngs(key)))
        self.step = make_step(self.variant)
        self.score = nnx.jit(lambda model, tokens: bits_per_byte(model, tokens, True))

    def start(self, seed: int) -> tuple[Any, list[dict[str, float]]]:
        """The same params for every arm of a seed."""
        self.model = self.create(jax.random.key(seed))
        return (self.model, nnx.Optimizer(self.model, self.tx, wrt=nnx.Param)), []

    def train(self, state: Any, seed: int, epoch: int, tick: Callable[[], Any]) -> Any:
        """An epoch."""
        model, optimizer = state
        first = np.random.default_rng([seed, epoch, 1]).integers(self.length)
        pieces = self.train_tokens[first : first + self.pieces * self.length].reshape(-1, self.length)
        losses = []
        for rows in training.batches(self.pieces, self.options.batch_size, seed, epoch):
            losses.append(self.step(model, optimizer, pieces[rows]))
            tick()
        self.loss = float(np.mean(jax.device_get(losses)))
        return state

    def measure(self, state: Any, seed: int) -> dict[str, float]:
        """Bits per byte on the text held out, and those of the epoch, with dropout."""
        del seed
        return {"test": float(self.score(state[0], self.test)), "train": self.loss}


# Writing.


@nnx.jit
def following(
    model: Transformer, window: jax.Array, last: jax.Array, temperature: jax.Array, key: jax.Array
) -> jax.Array:
    """Draws the byte after position `last`, from where nothing is seen of what stands behind it."""
    return jax.random.categorical(key, model(window[None], True)[0, last] / temperature)


def sample(model: Transformer, prompt: str, count: int, context: int, seed: int, temperature: float) -> str:
    """Lets the model write on."""
    written = list(prompt.encode())
    for key in jax.random.split(jax.random.key(seed), count):
        seen = written[-context:]
        window = np.zeros(context, np.int32)
        window[: len(seen)] = seen
        written.append(int(following(model, window, len(seen) - 1, temperature, key)))
    return bytes(written).decode(errors="replace")


# The program.


def load(path: Path | None, size: int) -> tuple[str, bytes]:
    """What the text is, and its beginning."""
    if path is not None:
        name, text = str(path), path.read_bytes()
    else:
        topics = pydoc_data.topics.topics
        name = "the reference documentation in Python's `pydoc_data.topics`"
        text = "\n\n".join(topics[topic] for topic in sorted(topics)).encode()
    return f"{name}, the first {min(size, len(text))} of {len(text)} bytes", text[:size]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, reports, lets the models write, and returns the numbers of the report."""
    parser = make_parser()
    options = parse(parser, argv)
    with training.complaints(parser):
        name, text = load(options.text, options.size)
        trainers = [Trainer(arm, options, text) for arm in options.arms]
    first = trainers[0]
    print(
        f"Data: {name}; for training {len(first.train_tokens)}, for the test {first.test.size}.\n"
        f"Network: {options.layers} layers of width {options.width}, context {options.context}.",
        flush=True,
    )
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    curves = training.compare(trainers, seeds, options.epochs)

    columns = [
        training.Column("test, bits per byte", "test", 1.0),
        training.Column("its best epoch", "test", 1.0, best=True),
        training.Column("training", "train", 1.0),
    ]
    report = training.summarize(curves, options.arms[0], columns, lower_is_better=True)
    words = reporting.conclude(options, training.verdict(report, "bits per byte", ".3f"))
    heading = f"{options.epochs} epochs; mean ± standard deviation over {options.seeds} seeds; less is better"
    print(f"\n{heading}:\n{text_of(report)}\n\n{words}")
    for trainer in trainers:
        written = sample(trainer.model, options.prompt, options.sample, options.context, 0, 0.7)
        print(f"\n{trainer.name} writes:\n{written}")
    panels = [
        training.Panel("Text held out", "test", "bits per byte", 1.0),
        training.Panel("Training, with dropout", "train", "bits per byte", 1.0),
    ]
    title = (
        f"A text read {options.epochs} times, bits per byte on other text: {training.finding(report, '.2f')}"
    )
    picture = training.figure(curves, panels, title)
    training.save(options, {"from": name, **report, "meaning": words}, curves, picture, "transformer_lm")
    return report


def text_of(content: dict[str, Any]) -> str:
    """The tables as RESULTS.md has them, from what is in the JSON."""
    return training.table(content, ".3f")


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add, default = parser.add_argument, functools.partial(training.defaults, forms=FORMS)
    arms = ("adamw", "sam", "gsam", "looksam")
    add("--text", type=Path, help="a file to learn (default: Python's own documentation)")
    add("--size", type=number(int, 1), help=f"use only the first SIZE bytes ({default('size')})")
    add(
        "--arms",
        nargs="+",
        choices=arms,
        default=["adamw", "gsam", "looksam"],
        help="default: adamw gsam looksam",
    )
    add("--context", type=number(int, 2), help=f"how many bytes the model sees ({default('context')})")
    add("--width", type=number(int, 1), help=f"of the network ({default('width')})")
    add("--layers", type=number(int, 1), help=f"of the network ({default('layers')})")
    add("--heads", type=number(int, 1), default=4, help="of attention (default: %(default)s)")
    add("--dropout", type=number(float, 0, 1), default=0.1, help="default: %(default)s")
    add("--rho", type=number(float, 0), default=0.1, help="radius (default: %(default)s)")
    add("--alpha", type=number(float, 0), default=0.2, help="of GSAM and LookSAM (default: %(default)s)")
    add("--k", type=number(int, 1), default=5, help="of LookSAM (default: %(default)s)")
    add("--learning-rate", type=number(float, 0, above=True), default=1e-2, help="default: %(default)s")
    add("--weight-decay", type=number(float, 0), default=0.1, help="default: %(default)s")
    add("--prompt", default="The ", help="text that samples start with (default: %(default)r)")
    add("--sample", type=number(int, 0), help=f"how many bytes to write at the end ({default('sample')})")
    training.run_options(parser, "results/transformer_lm", FORMS)
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, with what the user left open."""
    options = parser.parse_args(argv)
    options = training.fill(parser, options, FORMS["with --quick" if options.quick else ""])
    if options.width % options.heads:
        parser.error(f"argument --width: must be a multiple of --heads {options.heads}, got {options.width}")
    if not options.prompt:
        parser.error("argument --prompt: must hold at least one character")
    return options


if __name__ == "__main__":
    main()
