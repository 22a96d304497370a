"""The optimizers of the digits examples: base optimizers, and every variant with a radius that suits.

A variant goes in front of the base optimizer, and that is all:

    variant = optax_sam.sam(0.7)
    tx = optax.chain(variant, base_optimizer)
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import optax
from digits import NUM_TRAIN, Arm

import optax_sam


class Base(NamedTuple):
    """A base optimizer.

    Attributes:
      make: From a learning rate to the optimizer.
      learning_rate: What is used if none is asked for.
      decoupled: Makes it from a learning rate and a weight decay of its own, instead of L2 before it.
    """

    make: Callable[[Any], optax.GradientTransformation]
    learning_rate: float
    decoupled: Callable[[Any, float], optax.GradientTransformation] | None = None


BASES = {
    "sgd": Base(optax.sgd, 0.1),
    "momentum": Base(lambda rate: optax.sgd(rate, momentum=0.9), 0.01),
    "nesterov": Base(lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True), 0.01),
    "adam": Base(optax.adam, 3e-4),
    "adamw": Base(optax.adam, 3e-4, lambda rate, decay: optax.adamw(rate, weight_decay=decay)),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all arms of a comparison share.

    Attributes:
      base: The name of the base optimizer.
      peak: The learning rate to begin with, or None for that of the base optimizer; a cosine takes it to 0.
      weight_decay: L2 (of adamw: decoupled weight decay).
      steps: How many steps a run has.
    """

    base: str
    peak: float | None
    weight_decay: float
    steps: int

    @property
    def learning_rate(self) -> optax.Schedule:
        """The cosine."""
        peak = BASES[self.base].learning_rate if self.peak is None else self.peak
        return optax.cosine_decay_schedule(peak, self.steps)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The base optimizer. L2 is added here, after the variant: it is not to be perturbed."""
        base = BASES[self.base]
        if base.decoupled is not None:
            return base.decoupled(self.learning_rate, self.weight_decay)
        if self.weight_decay:
            return optax.chain(optax.add_decayed_weights(self.weight_decay), base.make(self.learning_rate))
        return base.make(self.learning_rate)


Pair = tuple[optax_sam.SharpnessAwareTransformation | None, optax.GradientTransformation]


class Recipe(NamedTuple):
    """A variant, ready for the digits.

    Attributes:
      build: From radius and setting to the variant and the optimizer that contains it.
      rho: A radius that suits the MLP and 40 % label noise; None for a method that has none.
      gradients: Gradient evaluations a step.
      products: Hessian-vector products a step, each worth about two gradients.
      radius: What the tables call the radius.
      momentum: Whether the base optimizer must keep one.
    """

    build: Callable[[Any, Setting], Pair]
    rho: float | None
    gradients: float = 2.0
    products: float = 0
    radius: str = "rho"
    momentum: bool = False

    @property
    def cost(self) -> float:
        """Gradient evaluations a step, products included."""
        return self.gradients + 2 * self.products

    def suits(self, base: str) -> bool:
        """Whether it can be had with this base optimizer."""
        return not (self.momentum and base == "sgd")


def _before_base(make: Callable[[float], optax_sam.SharpnessAwareTransformation]) -> Any:
    def build(rho: float, setting: Setting) -> Pair:
        variant = make(rho)
        return variant, optax.chain(variant, setting.optimizer)

    return build


def _decoupled_wsam(rho: float, setting: Setting) -> Pair:
    # A whole optimizer: it holds the base optimizer, nothing comes after it. The sharpness term bypasses
    # momentum, which multiplies steps by 10 in the long run: hence a larger gamma than that of `wsam`.
    variant = optax_sam.decoupled_wsam(setting.optimizer, setting.learning_rate, rho, gamma=0.9)
    return variant, variant


def _bsam(rho: float, setting: Setting) -> Pair:
    # A whole optimizer: momentum, preconditioner and the scale of learning rates are its own.
    peak = 0.03 if setting.peak is None else setting.peak
    variant = optax_sam.bsam(
        optax.cosine_decay_schedule(peak, setting.steps),
        NUM_TRAIN,
        rho=rho,
        weight_decay=setting.weight_decay or 1e-4,
    )
    return variant, variant


def _sampa(rho: float, setting: Setting) -> Pair:
    # It looks ahead by a step of the base optimizer, whose learning rate it must know.
    variant = optax_sam.sampa(setting.learning_rate, rho)
    return variant, optax.chain(variant, setting.optimizer)


def _sam_sps(rho: float, setting: Setting) -> Pair:
    # A whole optimizer: no learning rate, no momentum.
    variant = optax_sam.sam_sps(rho, weight_decay=setting.weight_decay)
    return variant, variant


def _lookbehind(rho: float, setting: Setting) -> Pair:
    # A whole optimizer, whose base optimizer makes k steps in each: its schedule counts these.
    k = 2
    longer = dataclasses.replace(setting, steps=k * setting.steps)
    variant = optax_sam.lookbehind(longer.optimizer, rho, k=k, alpha=0.5)
    return variant, variant


def _msam(rho: float, setting: Setting) -> Pair:
    # A whole optimizer: it reads the momentum of the base optimizer, which therefore must have one.
    variant = optax_sam.msam(setting.optimizer, rho)
    return variant, variant


def _ire(rho: None, setting: Setting) -> Pair:
    del rho
    # Wraps any optimizer and needs no second gradient.
    return None, optax_sam.ire(setting.optimizer)


def _ire_sam(rho: float, setting: Setting) -> Pair:
    variant = optax_sam.sam(rho)
    return variant, optax_sam.ire(optax.chain(variant, setting.optimizer))


RECIPES = {
    "sam": Recipe(_before_base(optax_sam.sam), 0.7),
    "sam_multistep": Recipe(_before_base(lambda rho: optax_sam.sam(rho, steps=2)), 0.7, gradients=3),
    "usam": Recipe(_before_base(lambda rho: optax_sam.sam(rho, ascent=optax_sam.ascent.unnormalized())), 1.0),
    "asam": Recipe(_before_base(optax_sam.asam), 6.0),
    "gcsam": Recipe(_before_base(optax_sam.gcsam), 1.0),
    "gsam": Recipe(_before_base(lambda rho: optax_sam.gsam(rho, alpha=0.1)), 0.7),
    "wsam": Recipe(_before_base(lambda rho: optax_sam.wsam(rho, gamma=0.8)), 0.2),
    "decoupled_wsam": Recipe(_decoupled_wsam, 0.7),
    "bsam": Recipe(_bsam, 0.5),
    "gnp": Recipe(_before_base(optax_sam.gnp), 1.0),
    "unified_sam": Recipe(_before_base(lambda rho: optax_sam.unified_sam(rho, mix=0.5)), 0.85),
    "le_sam": Recipe(_before_base(lambda rise: optax_sam.le_sam(rise, rho_max=2.0)), 0.7, radius="rise"),
    "stable_sam": Recipe(_before_base(optax_sam.stable_sam), 0.85),
    "xsam": Recipe(_before_base(optax_sam.xsam), 0.5),
    "functional_sam": Recipe(_before_base(optax_sam.functional_sam), 0.85),
    "preconditioned_sam": Recipe(_before_base(optax_sam.preconditioned_sam), 1.4),
    "eigen_sam": Recipe(_before_base(lambda rho: optax_sam.eigen_sam(rho, every=10)), 0.7, products=0.5),
    "cr_sam": Recipe(_before_base(optax_sam.cr_sam), 0.85, gradients=3),
    "sampa": Recipe(_sampa, 4.0),
    "sam_sps": Recipe(_sam_sps, 0.35),
    "ssam_f": Recipe(_before_base(lambda rho: optax_sam.ssam_f(rho, every=20)), 1.0),
    "ssam_d": Recipe(_before_base(lambda rho: optax_sam.ssam_d(rho, every=20)), 1.4),
    "lookbehind": Recipe(_lookbehind, 0.5, gradients=3),
    "looksam": Recipe(_before_base(lambda rho: optax_sam.looksam(rho, k=5, alpha=0.7)), 0.5, gradients=1.2),
    "ae_sam": Recipe(_before_base(optax_sam.ae_sam), 0.7, gradients=1.5),
    "weight_noise": Recipe(_before_base(optax_sam.weight_noise), 0.04, gradients=1, radius="scale"),
    "friendly_sam": Recipe(_before_base(optax_sam.friendly_sam), 0.85),
    "vasso": Recipe(_before_base(optax_sam.vasso), 0.85),
    "async_sam": Recipe(_before_base(optax_sam.async_sam), 4.0),
    "async_sam_perturbed": Recipe(
        _before_base(lambda rho: optax_sam.async_sam(rho, reuse="perturbed")), 1.4, gradients=1
    ),
    "msam": Recipe(_msam, 4.0, gradients=1, momentum=True),
    "same": Recipe(_before_base(lambda rho: optax_sam.same(rho, gains=(1.0, 1.0, 2.0, 2.0))), 0.7),
    "custom_same": Recipe(_before_base(lambda rho: optax_sam.custom_same(rho, condition=2.0)), 0.7),
    "saner": Recipe(_before_base(optax_sam.saner), 0.5),
    "hessian_sam": Recipe(_before_base(optax_sam.hessian_sam), 1.0, gradients=1, products=1),
    "extragradient": Recipe(
        _before_base(lambda step: optax_sam.extragradient(step, weights=(1.0, 1.0))), 0.01, radius="step"
    ),
    "ire": Recipe(_ire, None, gradients=1),
    "ire_sam": Recipe(_ire_sam, 0.7),
}


def base_arm(setting: Setting) -> Arm:
    """The base optimizer alone."""
    decay = f", decay {setting.weight_decay:g}" if setting.weight_decay else ""
    return Arm(setting.base + decay, None, setting.optimizer)


def tuned_l2_arm(steps: int) -> Arm:
    """What SAM must be compared with too: no SAM, but the weight decay that suits 40 % label noise."""
    return Arm("momentum, tuned L2 0.02", None, Setting("momentum", None, 0.02, steps).optimizer)


def sam_and_l2_arm(steps: int, model: str = "mlp") -> Arm:
    """Both: SAM, and after it a weight decay; each smaller than alone, tuned to 40 % label noise."""
    rho, setting = 0.5 if model == "mlp" else 0.15, Setting("momentum", None, 0.01, steps)
    return Arm(f"sam {rho:g}, tuned L2 0.01", *RECIPES["sam"].build(rho, setting))


def variant_arm(name: str, rho: float | None, setting: Setting) -> Arm:
    """A variant with its base optimizer."""
    recipe = RECIPES[name]
    return Arm(name if rho is None else f"{name}, {recipe.radius} {rho:g}", *recipe.build(rho, setting))
