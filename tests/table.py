"""The one table of variants. Generic tests run over every row and choose by its fields, never by name."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_sam


@dataclasses.dataclass(frozen=True, eq=False)  # A row is itself: what it compiles to can be kept.
class Row:
    """One configuration of a public constructor."""

    name: str
    constructor: Callable[..., Any]
    kwargs: dict[str, Any]
    # A whole optimizer returns updates; the others return a direction for `optax.sgd` and its like.
    whole_optimizer: bool = False
    # Gradient evaluations in the steps 0, 1, 2, ... of one period.
    evaluations: tuple[int, ...] = (2,)
    # Whether the data decide instead: then a step makes any of these numbers of evaluations.
    evaluates_by_data: bool = False
    # What is remembered, in copies of params.
    memory_copies: int = 0
    # What is remembered besides, in scalars.
    memory_scalars: int = 0
    # Whether rho = 0 gives the base optimizer, or in place of it what.
    base_at_zero: bool = True
    # Arguments that `optax.inject_hyperparams` must leave alone: they decide the shape of the program.
    static_args: tuple[str, ...] = ()
    # The name of the radius.
    radius: str = "rho"
    # Arithmetic beyond the gradients, in operations per parameter: at most so much.
    algebra: int = 25
    # Whether the direction scales with the loss.
    scale_invariant: bool = True
    # Whether the perturbation divides by a norm of this step's gradient.
    divides_by_norm: bool = True
    # Whether the first pass is at params, and not at a random point nearby.
    clean_at_params: bool = True
    # Whether it needs values of the loss, which a user's `grad_fn` does not give.
    needs_values: bool = False
    # Whether it takes Hessian-vector products, each of which costs almost two gradients.
    product: bool = False

    @functools.cached_property
    def capabilities(self) -> frozenset[tuple[str, Any]]:
        """What tests may depend on: without `--full` they take the fewest rows that show everything."""
        fields = ("whole_optimizer", "base_at_zero", "scale_invariant", "divides_by_norm", "clean_at_params")
        return frozenset(
            {
                *((name, getattr(self, name)) for name in fields),
                *((name, getattr(self, name)) for name in ("skips", "compares", "product")),
                ("ascent only", self.make().ascent_only),
                ("remembers", self.memory_copies > 0),
                ("remembers scalars", self.memory_scalars > 0),
                ("evaluations", min(3, max(self.evaluations))),
                ("evaluates by data", self.evaluates_by_data),
                ("contains an optimizer", "base_optimizer" in self.kwargs),
            }
        )

    @functools.cached_property
    def kinds(self) -> frozenset[str]:
        """What tests of doors and of faults depend on, in short."""
        kinds = {
            "a whole optimizer": self.whole_optimizer,
            "remembers": self.memory_copies > 0,
            "skips": self.skips,
        }
        return frozenset(kind for kind, shown in kinds.items() if shown) or frozenset({"plain"})

    @property
    def skips(self) -> bool:
        """Whether some steps cost less than others."""
        return len(self.evaluations) > 1

    @functools.cached_property
    def compares(self) -> bool:
        """Whether the direction is made of both gradients."""
        return self.make().compares

    def make(self, **overrides: Any) -> Any:
        """The variant of this row, with some arguments replaced."""
        return self.constructor(**{**self.kwargs, **overrides})

    def train_step(
        self, fun: Any = None, *, base: optax.GradientTransformation | None = None, **options: Any
    ) -> tuple[Any, Any]:
        """The step that a user writes, with the loss of this module or another, and the optimizer."""
        variant, tx = self.optimizer(base)
        value_and_grad = optax_sam.sam_value_and_grad(loss if fun is None else fun, variant, **options)

        def step(params: Any, state: Any, batch: Any) -> Any:
            value, grads = value_and_grad(params, batch, state=state)[:2]
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        return step, tx

    def optimizer(
        self, base: optax.GradientTransformation | None = None, **overrides: Any
    ) -> tuple[Any, Any]:
        """The variant, and the optimizer that contains it."""
        variant = self.make(**overrides)
        if self.whole_optimizer:
            return variant, variant
        return variant, optax.chain(variant, optax.sgd(0.01, momentum=0.9) if base is None else base)


def _row(
    name: str, constructor: Callable[..., Any], *, kwargs: dict[str, Any] | None = None, **fields: Any
) -> Row:
    return Row(name, constructor, kwargs or {}, **fields)


_ASCENT, _GATES = optax_sam.ascent, optax_sam.gates


def gated_sam(rho: Any = 0.1) -> Any:
    """SAM every third step."""
    return optax_sam.gated(optax_sam.sam(rho), _GATES.every(3))


def gated_looksam(rho: Any = 0.1) -> Any:
    """LookSAM every second step, with a period of two: every fourth step takes a second gradient."""
    return optax_sam.gated(optax_sam.looksam(rho, k=2, alpha=0.7), _GATES.every(2))


def gated_friendly_sam(rho: Any = 0.1) -> Any:
    """F-SAM in two of three steps: its memory begins and rests."""
    gate = _GATES.every(3) | _GATES.Gate(lambda now, memory: (now.step % 3 == 1, memory))
    return optax_sam.gated(optax_sam.friendly_sam(rho, sigma=0.8, decay=0.7), gate)


def gated_decoupled_wsam(rho: Any = 0.1) -> Any:
    """A whole optimizer every second step."""
    variant = optax_sam.decoupled_wsam(optax.sgd(0.01, momentum=0.9), 0.01, rho=rho, gamma=0.6)
    return optax_sam.gated(variant, _GATES.every(2))


ROWS = (
    _row("sam", optax_sam.sam, kwargs={"rho": 0.1}),
    _row(
        "sam_inf",
        optax_sam.sam,
        kwargs={"rho": 0.01, "ascent": _ASCENT.normalized(jnp.inf)},
        divides_by_norm=False,
        static_args=("ascent",),
    ),
    _row(
        "sam_pgd",
        optax_sam.sam,
        algebra=36,
        kwargs={"rho": 0.1, "steps": 3},
        static_args=("steps",),
        evaluations=(4,),
    ),
    _row(
        "sam_split",
        optax_sam.sam,
        kwargs={"rho": 0.1, "steps": 2, "step_mode": "split"},
        static_args=("steps",),
        evaluations=(3,),
    ),
    _row(
        "sam_free",
        optax_sam.sam,
        kwargs={"rho": 0.1, "steps": 2, "step_mode": "free"},
        static_args=("steps",),
        evaluations=(3,),
    ),
    _row(
        "usam",
        optax_sam.sam,
        kwargs={"rho": 0.01, "ascent": _ASCENT.unnormalized()},
        divides_by_norm=False,
        static_args=("ascent",),
        scale_invariant=False,
    ),
    _row("asam", optax_sam.asam, kwargs={"rho": 0.5}),
    _row(
        "sam_awp",
        optax_sam.sam,
        kwargs={"rho": 0.1, "ascent": _ASCENT.bounded(_ASCENT.layerwise(1e-6, 1e-6), 0.05)},
        divides_by_norm=False,  # Leaf by leaf, as do those that follow.
        static_args=("ascent",),
    ),
    _row(
        "sam_spectral",
        optax_sam.sam,
        algebra=20_000,  # 27 products of matrices as large as the largest.
        kwargs={"rho": 0.1, "ascent": _ASCENT.matrix("spectral")},
        divides_by_norm=False,
        static_args=("ascent",),
    ),
    _row(
        "sam_nuclear",
        optax_sam.sam,
        algebra=200,
        kwargs={"rho": 0.1, "ascent": _ASCENT.matrix("nuclear", iterations=40)},
        divides_by_norm=False,
        static_args=("ascent",),
    ),
    _row(
        "sam_zscore",
        optax_sam.sam,
        algebra=40,
        kwargs={"rho": 0.1, "ascent": _ASCENT.zscore(0.5)},
        divides_by_norm=False,
        static_args=("ascent",),
    ),
    _row(
        "sam_zscore_per_leaf",
        optax_sam.sam,
        algebra=40,
        kwargs={"rho": 0.1, "ascent": _ASCENT.zscore(0.5, per_leaf=True)},
        divides_by_norm=False,
        static_args=("ascent",),
    ),
    _row(
        "sam_scaled",
        optax_sam.sam,
        kwargs={
            "rho": 0.1,
            "ascent": _ASCENT.scaled(lambda params: jax.tree.map(lambda w: w.ndim + 0.5, params)),
        },
        static_args=("ascent",),
    ),
    _row(
        "sam_random_mask",
        optax_sam.sam,
        algebra=125,
        kwargs={"rho": 0.1, "ascent": _ASCENT.random_mask(0.6, 5)},
        static_args=("ascent",),
    ),
    _row("gcsam", optax_sam.gcsam, kwargs={"rho": 0.1}, base_at_zero=False),
    _row("gcsam_ascent_only", optax_sam.gcsam, kwargs={"rho": 0.1, "centralize_descent": False}),
    _row("gsam", optax_sam.gsam, kwargs={"rho": 0.1, "alpha": 0.4}),
    _row("gsam_clean", optax_sam.gsam, kwargs={"rho": 0.1, "alpha": 0.4, "objective": "clean"}),
    _row("wsam", optax_sam.wsam, kwargs={"rho": 0.1, "gamma": 0.8}),
    _row("gnp", optax_sam.gnp, kwargs={"rho": 0.1, "alpha": 0.7}),
    _row(
        "gnp_normalized",
        optax_sam.gnp,
        kwargs={"rho": 0.1, "alpha": 0.7, "normalize_clean": True},
        base_at_zero=False,
    ),
    _row(
        "unified_sam",
        optax_sam.unified_sam,
        kwargs={"rho": 0.02, "mix": 0.7},
        divides_by_norm=False,
        scale_invariant=False,
    ),
    _row(
        "le_sam",
        optax_sam.le_sam,
        kwargs={"loss_rise": 0.1, "rho_max": 0.15},
        radius="loss_rise",
        scale_invariant=False,
    ),
    _row("stable_sam", optax_sam.stable_sam, kwargs={"rho": 0.1}),
    _row("xsam", optax_sam.xsam, kwargs={"rho": 0.1, "alpha": 1.5}),
    _row(
        "sagm",
        optax_sam.wsam,
        kwargs={"rho": 0.05, "alpha": 0.5, "ascent": _ASCENT.extrapolated(0.001)},
        static_args=("ascent",),
        base_at_zero=False,
        scale_invariant=False,
    ),
    _row(
        "decoupled_wsam",
        optax_sam.decoupled_wsam,
        kwargs={
            "base_optimizer": optax.sgd(0.01, momentum=0.9),
            "learning_rate": 0.01,
            "rho": 0.1,
            "gamma": 0.6,
        },
        whole_optimizer=True,
        memory_copies=1,
    ),
    _row(
        "bsam",
        optax_sam.bsam,
        algebra=125,
        kwargs={"learning_rate": 0.1, "num_data": 100, "rho": 0.05, "key": 3},
        whole_optimizer=True,
        memory_copies=2,
        base_at_zero=False,
        divides_by_norm=False,
        static_args=("key",),
        scale_invariant=False,
        clean_at_params=False,
    ),
    _row("gated_sam", gated_sam, kwargs={"rho": 0.1}, evaluations=(2, 1, 1), memory_scalars=1),
    _row(
        "gated_looksam",
        gated_looksam,
        algebra=40,
        kwargs={"rho": 0.1},
        evaluations=(2, 1, 1, 1),
        memory_copies=1,
        memory_scalars=2,
    ),
    _row(
        "gated_friendly_sam",
        gated_friendly_sam,
        kwargs={"rho": 0.1},
        evaluations=(2, 2, 1),
        memory_copies=1,
        memory_scalars=1,
    ),
    _row(
        "gated_decoupled_wsam",
        gated_decoupled_wsam,
        kwargs={"rho": 0.1},
        whole_optimizer=True,
        evaluations=(2, 1),
        memory_copies=1,
        memory_scalars=1,
    ),
    _row(
        "ae_sam",
        optax_sam.ae_sam,
        kwargs={"rho": 0.1, "threshold": 0.2, "decay": 0.6},
        evaluations=(1, 2),
        evaluates_by_data=True,
        memory_scalars=3,
    ),
    _row(
        "weight_noise",
        optax_sam.weight_noise,
        algebra=125,
        kwargs={"scale": 0.1, "key": 3},
        evaluations=(1,),
        radius="scale",
        divides_by_norm=False,
        static_args=("key", "mix", "output_axis"),
        clean_at_params=False,
    ),
    _row(
        "weight_noise_mixed",
        optax_sam.weight_noise,
        algebra=125,
        kwargs={"scale": 0.1, "mix": 0.4, "key": 4},
        radius="scale",
        divides_by_norm=False,
        static_args=("key", "mix", "output_axis"),
    ),
    _row(
        "looksam",
        optax_sam.looksam,
        algebra=30,
        kwargs={"rho": 0.1, "k": 4, "alpha": 0.7},
        evaluations=(2, 1, 1, 1),
        memory_copies=1,
        memory_scalars=1,
    ),
    _row(
        "looksam_per_leaf",
        optax_sam.looksam,
        algebra=30,
        kwargs={"rho": 0.1, "k": 2, "alpha": 0.7, "per_leaf": True},
        evaluations=(2, 1),
        memory_copies=1,
        memory_scalars=3,
        divides_by_norm=False,  # Leaf by leaf, in its correction.
    ),
    _row(
        "friendly_sam",
        optax_sam.friendly_sam,
        kwargs={"rho": 0.1, "sigma": 0.8, "decay": 0.7},
        memory_copies=1,
    ),
    _row("vasso", optax_sam.vasso, kwargs={"rho": 0.1, "theta": 0.4}, memory_copies=1),
    _row("async_sam", optax_sam.async_sam, kwargs={"rho": 0.1}, divides_by_norm=False, memory_copies=1),
    _row(
        "async_sam_perturbed",
        optax_sam.async_sam,
        divides_by_norm=False,
        kwargs={"rho": 0.1, "reuse": "perturbed"},
        evaluations=(1,),
        memory_copies=1,
    ),
    _row("cr_sam", optax_sam.cr_sam, kwargs={"rho": 0.1, "gamma": 0.2, "beta": 0.1}, evaluations=(3,)),
    _row(
        "eigen_sam",
        optax_sam.eigen_sam,
        kwargs={"rho": 0.1, "alpha": 0.3, "every": 2, "iterations": 3, "key": 5},
        evaluations=(5, 2),
        product=True,
        memory_copies=1,
        static_args=("iterations", "key"),
        algebra=20_000,  # A product costs almost two gradients, and counts as one.
    ),
    _row(
        "ssam_f",
        optax_sam.ssam_f,
        kwargs={"rho": 0.1, "sparsity": 0.4, "every": 2},
        memory_copies=2,
        algebra=60,
    ),
    _row(
        "ssam_d",
        optax_sam.ssam_d,
        kwargs={"rho": 0.1, "sparsity": 0.4, "every": 2, "drop": 0.35, "key": 5},
        memory_copies=1,
        static_args=("key",),
        algebra=200,
    ),
    _row(
        "sampa",
        optax_sam.sampa,
        kwargs={"learning_rate": 0.05, "rho": 0.1, "mix": 0.3},
        memory_copies=1,
        base_at_zero=False,
        divides_by_norm=False,
        clean_at_params=False,
    ),
    _row(
        "preconditioned_sam",
        optax_sam.preconditioned_sam,
        kwargs={"rho": 0.1, "power": 0.4, "decay": 0.9},
        memory_copies=1,
    ),
    _row(
        "sam_sps",
        optax_sam.sam_sps,
        kwargs={"rho": 0.1, "max_learning_rate": 0.2, "weight_decay": 0.01},
        whole_optimizer=True,
        base_at_zero=False,
        needs_values=True,
    ),
    _row(
        "lookbehind",
        optax_sam.lookbehind,
        algebra=40,
        kwargs={"base_optimizer": optax.sgd(0.01, momentum=0.9), "rho": 0.1, "k": 3, "alpha": 0.5},
        static_args=("k",),
        whole_optimizer=True,
        evaluations=(4,),
        memory_copies=1,
        base_at_zero=False,
    ),
    _row(
        "lookbehind_adaptive",
        optax_sam.lookbehind,
        algebra=40,
        kwargs={"base_optimizer": optax.sgd(0.01, momentum=0.9), "rho": 0.1, "k": 2, "alpha": "adaptive"},
        static_args=("k", "alpha"),
        whole_optimizer=True,
        evaluations=(3,),
        memory_copies=1,
        base_at_zero=False,
    ),
    _row(
        "msam",
        optax_sam.msam,
        divides_by_norm=False,
        kwargs={"base_optimizer": optax.sgd(0.01, momentum=0.9), "rho": 0.1},
        whole_optimizer=True,
        evaluations=(1,),
        memory_copies=1,
    ),
    _row(
        "msam_along_update",
        optax_sam.msam,
        algebra=40,
        divides_by_norm=False,
        kwargs={"base_optimizer": optax.sgd(0.01, momentum=0.9), "rho": 0.1, "along": "update"},
        whole_optimizer=True,
        evaluations=(1,),
        memory_copies=2,
    ),
    _row(
        "same",
        optax_sam.same,
        algebra=30,
        kwargs={"rho": 0.1, "gains": (2.0, 0.5, 1.5, 0.0), "clean_gains": (0.0, 0.5, 0.0, 1.0)},
    ),
    _row("custom_same", optax_sam.custom_same, algebra=30, kwargs={"rho": 0.1, "condition": 2.0}),
    _row("saner", optax_sam.saner, algebra=30, kwargs={"rho": 0.1, "keep": 0.5}),
    # One gradient and one Hessian-vector product: the loss is entered twice.
    _row("hessian_sam", optax_sam.hessian_sam, kwargs={"rho": 0.1}, product=True),
    _row(
        "hessian_sam_raw",
        optax_sam.hessian_sam,
        kwargs={"rho": 0.1, "normalize": False},
        scale_invariant=False,
        product=True,
    ),
    _row(
        "hessian_sam_difference",
        optax_sam.hessian_sam,
        kwargs={"rho": 0.1, "difference": 0.01},
    ),
    _row(
        "extragradient",
        optax_sam.extragradient,
        kwargs={"step_size": 0.01, "weights": (1.0, 1.0)},
        base_at_zero=False,
        radius="step_size",
        divides_by_norm=False,
        scale_invariant=False,
    ),
    _row(
        "extragradient_ahead",
        optax_sam.extragradient,
        kwargs={"step_size": 0.01, "weights": (0.0, 1.0)},
        radius="step_size",
        divides_by_norm=False,
        scale_invariant=False,
    ),
)


def first(**fields: Any) -> Row:
    """The first row that has these fields; without any, SAM as it was first."""
    return next(row for row in ROWS if all(getattr(row, name) == value for name, value in fields.items()))


# One row of each public constructor, for tests of what its options do not touch.
VARIANTS = tuple(
    {row.constructor: row for row in reversed(ROWS) if row.constructor.__module__ != __name__}.values()
)


def params(dtype: Any = jnp.float32, seed: int = 0) -> dict[str, Any]:
    """Params of several leaves and ranks."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "layer": {
            "kernel": jax.random.normal(keys[0], (3, 4), jnp.float32).astype(dtype),
            "bias": jax.random.normal(keys[1], (4,), jnp.float32).astype(dtype),
        },
        "scale": jax.random.normal(keys[2], (), jnp.float32).astype(dtype),
    }


def loss(params: Any, batch: Any) -> jax.Array:
    """A loss that is neither quadratic nor separable, and that sees every leaf; the mean over a batch."""
    hidden = jnp.tanh(batch @ params["layer"]["kernel"] + params["layer"]["bias"])
    return jnp.mean(jnp.sum(jnp.exp(0.3 * hidden) * params["scale"], axis=-1) ** 2)


def batch(size: int = 8, dtype: Any = jnp.float32, seed: int = 1) -> jax.Array:
    """Examples for `loss`."""
    return jax.random.normal(jax.random.key(seed), (size, 3), jnp.float32).astype(dtype)


def deciding_alike(fun: Any, params: Any, parts: Any) -> type[optax_sam.Loss]:
    """A `Loss` for one part after the other, whose `mean` knows the squared norms of all clean gradients."""

    def squared_norm(part: Any) -> jax.Array:
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(fun)(params, part)))

    told = jnp.mean(jax.lax.map(squared_norm, parts))

    class Alike(optax_sam.Loss):
        def mean(self, x: Any) -> jax.Array:
            del x
            return told

    return Alike


def train(step: Any, tx: Any, steps: int) -> Any:
    """Params, state and value after some steps, each on a batch of its own."""
    current, value = params(), None
    state = tx.init(current)
    for i in range(steps):
        current, state, value = step(current, state, batch(seed=i))
    return current, state, value


def words_of_a_pair(words: str) -> str:
    """What an error of JAX says about a pair where a tree like params was wanted.

    JAX prints the type, which holds the advice. JAX 0.8 prints the pair itself, or just "named tuple".
    """
    try:
        jax.tree.map(lambda x, y: x, {"a": 1}, optax_sam.SAMGradients(1, 2))
    except ValueError as error:
        if "two gradients" in str(error):
            return words
    return r"SAMGradients|named tuple"
