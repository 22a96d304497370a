"""The networks of the benchmarks: a perceptron, a convolutional network with BatchNorm, a transformer."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


class Problem(NamedTuple):
    """A network with a batch.

    Attributes:
      params: Its params.
      stats: Its running statistics, empty if it has none.
      batch: Inputs and labels.
      loss: `(params, stats, batch) -> (loss, new stats)`.
    """

    params: Any
    stats: Any
    batch: tuple[jax.Array, jax.Array]
    loss: Callable[..., tuple[jax.Array, Any]]

    @property
    def size(self) -> int:
        """How many params."""
        return sum(x.size for x in jax.tree.leaves(self.params))


class MLP(nn.Module):
    """64-256-256-10 and its like."""

    widths: Sequence[int]
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits."""
        for width in self.widths[:-1]:
            x = nn.relu(nn.Dense(width, dtype=self.dtype)(x))
        return nn.Dense(self.widths[-1], dtype=self.dtype)(x)


class ResNet(nn.Module):
    """Bottleneck blocks with BatchNorm; with (3, 4, 6, 3) of them and 64 features a ResNet-50."""

    blocks: Sequence[int]
    features: int
    classes: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits, with the statistics of the batch."""

        def conv(x: jax.Array, features: int, size: int, stride: int = 1) -> jax.Array:
            x = nn.Conv(features, (size, size), (stride, stride), use_bias=False, dtype=self.dtype)(x)
            return nn.BatchNorm(use_running_average=False, dtype=self.dtype)(x)

        x = nn.relu(conv(x, self.features, 3))
        for stage, count in enumerate(self.blocks):
            width = self.features * 2**stage
            for block in range(count):
                stride = 2 if block == 0 and stage > 0 else 1
                y = nn.relu(conv(x, width, 1))
                y = conv(nn.relu(conv(y, width, 3, stride)), 4 * width, 1)
                shortcut = x if x.shape == y.shape else conv(x, 4 * width, 1, stride)
                x = nn.relu(y + shortcut)
        return nn.Dense(self.classes, dtype=self.dtype)(jnp.mean(x, axis=(1, 2)))


class Transformer(nn.Module):
    """A decoder with a causal mask, LayerNorm before each half of a block."""

    layers: int
    width: int
    vocabulary: int
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of the next token at every position."""
        x = nn.Embed(self.vocabulary, self.width, dtype=self.dtype)(tokens)
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            y = nn.LayerNorm(dtype=self.dtype)(x)
            x += nn.MultiHeadDotProductAttention(max(1, self.width // 64), dtype=self.dtype)(y, mask=mask)
            y = nn.Dense(4 * self.width, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))
            x += nn.Dense(self.width, dtype=self.dtype)(nn.gelu(y))
        return nn.Dense(self.vocabulary, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))


# Network, shape of an input or number of tokens, classes, examples: small enough for two CPU cores, so
# large that gradients dominate, and as large as an accelerator deserves.
SIZES: dict[str, dict[str, tuple[Any, Any, int, int]]] = {
    "mlp": {
        "quick": (lambda d: MLP((32, 10), d), (64,), 10, 16),
        "small": (lambda d: MLP((256, 256, 10), d), (64,), 10, 128),
        "heavy": (lambda d: MLP((512, 512, 10), d), (64,), 10, 4096),
        "large": (lambda d: MLP((8192, 8192, 1000), d), (3072,), 1000, 8192),
    },
    "cnn": {
        "quick": (lambda d: ResNet((1,), 4, 10, d), (8, 8, 1), 10, 4),
        "small": (lambda d: ResNet((1, 1), 8, 10, d), (16, 16, 3), 10, 32),
        "heavy": (lambda d: ResNet((2, 2), 16, 10, d), (16, 16, 3), 10, 64),
        "large": (lambda d: ResNet((3, 4, 6, 3), 64, 1000, d), (112, 112, 3), 1000, 128),
    },
    "transformer": {
        "quick": (lambda d: Transformer(1, 16, 32, d), 8, 32, 2),
        "small": (lambda d: Transformer(2, 64, 128, d), 32, 128, 16),
        "heavy": (lambda d: Transformer(2, 128, 256, d), 64, 256, 32),
        "large": (lambda d: Transformer(12, 768, 16384, d), 512, 16384, 16),
    },
}


def make(name: str, size: str = "small", dtype: Any = jnp.float32, batch_size: int | None = None) -> Problem:
    """A network of `SIZES`, its params in float32, its activations in the dtype given."""
    build, shape, classes, examples = SIZES[name][size]
    return of(build(dtype), name == "transformer", shape, classes, batch_size or examples)


def of(network: nn.Module, reads_tokens: bool, shape: Any, classes: int, examples: int) -> Problem:
    """Any network, with random inputs of a shape, or so many random tokens."""
    keys = jax.random.split(jax.random.key(0), 3)
    if reads_tokens:
        inputs = jax.random.randint(keys[0], (examples, shape), 0, classes)
        labels = jnp.roll(inputs, -1, axis=1)
    else:
        inputs = jax.random.normal(keys[0], (examples, *shape))
        labels = jax.random.randint(keys[1], (examples,), 0, classes)
    variables = jax.jit(network.init)(keys[2], inputs[:1])
    stats = variables.get("batch_stats", {})

    def loss(params: Any, stats: Any, batch: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Any]:
        inputs, labels = batch
        logits, new = network.apply({"params": params, "batch_stats": stats}, inputs, mutable=["batch_stats"])
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
        return jnp.mean(entropy), new.get("batch_stats", {})

    return Problem(variables["params"], stats, (inputs, labels), loss)
