"""bSAM: SAM as an optimal relaxation of Bayes (Möllenhoff and Khan, ICLR 2023)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam import _checks, _tree
from optax_sam._loss import Evaluation, Loss, SAMGradients, serializable
from optax_sam._state import SAMState, find_state
from optax_sam._variant import SharpnessAwareTransformation, constructor, sharpness_aware, value_at


@serializable
class BSAMMemory(NamedTuple):
    """What Bayesian SAM remembers.

    Attributes:
      momentum: Average of the perturbed gradients. A pytree like params, in float32 or better.
      precision: The precision s of the posterior, per weight and per example: its variance is
        1 / (num_data s). A pytree like params, in float32 or better.
    """

    momentum: optax.Updates
    precision: optax.Updates


def _deviate(key: jax.Array, precision: optax.Updates, num_data: Any) -> optax.Updates:
    r"""A draw from :math:`N(0, 1 / (N s))`."""
    if not isinstance(num_data, jax.Array):
        num_data = float(num_data)  # An integer may be larger than 32 bits.
    normal = optax.tree.random_like(key, precision, jax.random.normal)
    return jax.tree.map(lambda n, s: n / jnp.sqrt(num_data * s), normal, precision)


@constructor
def bsam(
    learning_rate: optax.ScalarOrSchedule,
    num_data: int,
    *,
    rho: optax.ScalarOrSchedule = 0.05,
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay: float = 1e-4,
    damping: float = 0.1,
    initial_precision: float = 1.0,
    key: int | jax.Array | None = None,
    update_precision_first: bool = False,
) -> SharpnessAwareTransformation:
    r"""Bayesian SAM: a whole optimizer, after which no other optimizer may come.

    Learns a Gaussian posterior over params together with its mean. The first gradient is taken at a
    sample of the posterior; the perturbation of the mean is scaled by the posterior's variance.

    .. math::
      \tilde w &= w + \frac{n}{\sqrt{N s}}, \; n \sim N(0, I), \quad g = \nabla L(\tilde w), \quad
      \epsilon = \rho \frac{g}{s}, \quad g_\epsilon = \nabla L(w + \epsilon) \\
      m &\leftarrow \beta_1 m + (1 - \beta_1)(g_\epsilon + \delta w), \quad
      w \leftarrow w - \eta \frac{m}{s}, \quad
      s \leftarrow \beta_2 s + (1 - \beta_2)\left(\sqrt{s}\,|g| + \gamma + \delta\right)

    .. warning::
      What it returns are updates, sign and learning rate included: `optax.chain(bsam(...),
      optax.adamw(...))` is wrong. `sam_value_and_grad` refuses it where the state shows another optimizer;
      a single link without a state, such as `optax.scale(-0.1)`, looks like a clip.

    Args:
      learning_rate: :math:`\eta`, >= 0, or a schedule of the step. The paper takes 0.25 to 1 with a warm-up
        and a cosine; constant, 0.05 and 0.2 were measured (docs/tuning.md).
      num_data: :math:`N`, the number of training examples, times the factor of data augmentation; >= 1.
        Under `optax.inject_hyperparams` name it in `static_args` if it is 2**31 or more.
      rho: Strength of the perturbation, >= 0, or a schedule of the step. Not comparable to SAM's: the
        perturbation is not normalized. 0.05 was safe in docs/tuning.md, 0.2 lost up to 11 points.
      b1: Decay of the momentum, in [0, 1).
      b2: Decay of the precision, in [0, 1).
      weight_decay: :math:`\delta`, the prior's precision divided by `num_data`; >= 0.
      damping: :math:`\gamma`, which bounds the precision from below; >= 0.
      initial_precision: The precision to begin with; > 0.
      key: The seed of the noise, an integer or a random key, typed or raw; None for 0. The noise of a
        step depends on key and step alone, so nothing random is in the state. Under
        `optax.inject_hyperparams` name it in `static_args`.
      update_precision_first: Update s before w uses it, as one reading of the paper's algorithm has it;
        the published code does not.

    Returns:
      A sharpness-aware transformation that is an optimizer. Two gradient evaluations a step, two copies
      of the params as state. The loss and aux reported are those at the sample. With several shards, or
      several devices with `perturbation="local"`, each draws its own noise, and s is updated with
      the mean of :math:`\sqrt{s} |g|` over them.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2
      >>> tx = optax_sam.bsam(0.1, num_data=1000, rho=0.01, key=0)
      >>> value_and_grad = optax_sam.sam_value_and_grad(loss, tx)
      >>> params = jnp.array([1.0, 1.0])
      >>> state = tx.init(params)
      >>> for _ in range(50):
      ...     _, grads = value_and_grad(params, state=state)
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(bool(jnp.all(jnp.abs(params) < 0.5)))
      True

    References:
      Möllenhoff and Khan, `SAM as an Optimal Relaxation of Bayes <https://arxiv.org/abs/2210.01620>`_,
      ICLR 2023, in the order of the authors' code. A port in wide use lacks the square root in the noise
      and differs in four more places.
    """
    _checks.scalar_or_schedule("learning_rate", learning_rate)
    _checks.number("num_data", num_data, low=1, integer=True)
    _checks.number("b1", b1, low=0.0, high=1.0, below=True)
    _checks.number("b2", b2, low=0.0, high=1.0, below=True)
    _checks.number("weight_decay", weight_decay, low=0.0)
    _checks.number("damping", damping, low=0.0)
    _checks.number("initial_precision", initial_precision, low=0.0, above=True)
    seed = _checks.key("key", 0 if key is None else key)

    def init_memory(params: optax.Params) -> BSAMMemory:
        zeros = _tree.zeros_like(params)
        return BSAMMemory(zeros, jax.tree.map(lambda z: z + initial_precision, zeros))

    def evaluate(loss: Loss, state: SAMState) -> Evaluation:
        precision = state.memory.precision
        own_key = loss.random_key(jax.random.fold_in(seed, state.step))
        noisy = loss.ascent(_deviate(own_key, precision, num_data))
        # The perturbation starts from the mean, not from the sample.
        perturbation = jax.tree.map(lambda g, s: state.rho * g / s, _tree.upcast(noisy.gradient), precision)
        return loss.pair(noisy, loss.at(perturbation), statistics=_curvature(noisy.gradient, precision))

    def descent(
        gradients: SAMGradients, state: SAMState, params: optax.Params | None
    ) -> tuple[optax.Updates, Any]:
        params = _checks.given_params("bsam", params)
        momentum, precision = state.memory
        statistics = gradients.statistics
        if statistics is None:  # Through the door without statistics: those of the one gradient.
            statistics = _curvature(gradients.clean, precision)
        momentum = jax.tree.map(
            lambda m, g, w: b1 * m + (1 - b1) * (g + weight_decay * w),
            momentum,
            gradients.perturbed,
            _tree.upcast(params),
        )
        new_precision = jax.tree.map(
            lambda s, c: b2 * s + (1 - b2) * (c + damping + weight_decay), precision, statistics
        )
        rate: Any = value_at(learning_rate, state.step)
        scale = new_precision if update_precision_first else precision
        updates = jax.tree.map(lambda m, s: -rate * m / s, momentum, scale)
        return updates, BSAMMemory(momentum, new_precision)

    return sharpness_aware(
        rho,
        None,
        descent,
        init_memory,
        evaluate=evaluate,
        compares=False,
        is_optimizer=True,
        has_plain_step=False,
    )


def _curvature(gradient: optax.Updates, precision: optax.Updates) -> optax.Updates:
    return jax.tree.map(lambda g, s: jnp.sqrt(s) * jnp.abs(g), _tree.upcast(gradient), precision)


def bsam_sample(key: jax.Array, params: optax.Params, state: optax.OptState, num_data: int) -> optax.Params:
    r"""Draws params from the posterior that `bsam` has learned, for averaged predictions.

    .. math:: w + \frac{n}{\sqrt{N s}}, \quad n \sim N(0, I)

    Args:
      key: A random key, typed or raw, or an integer seed.
      params: The mean: the params of training.
      state: The optimizer's state, which holds the precision.
      num_data: The same as that of `bsam`.

    Returns:
      Params of the same structure, shapes and dtypes. `jax.vmap` over keys draws many.

    Raises:
      ValueError: If the state is not that of `bsam`, or `num_data` is out of its range.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_sam
      >>> params = jnp.zeros(10_000)
      >>> state = optax_sam.bsam(0.1, num_data=100).init(params)
      >>> sample = optax_sam.bsam_sample(jax.random.key(0), params, state, num_data=100)
      >>> print(f"{jnp.std(sample):.2f}")
      0.10

    References:
      Möllenhoff and Khan, `SAM as an Optimal Relaxation of Bayes <https://arxiv.org/abs/2210.01620>`_,
      ICLR 2023.
    """
    _checks.number("num_data", num_data, low=1, integer=True)
    memory = find_state(state).memory
    if not isinstance(memory, BSAMMemory):
        msg = f"`state` must be the state of `optax_sam.bsam`, got memory of type {type(memory).__name__}."
        raise ValueError(msg)
    return _tree.displace(params, _deviate(_checks.key("key", key), memory.precision, num_data))
