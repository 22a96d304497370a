"""Rules that look at the size of the weights."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam import _checks, _tree
from optax_sam.ascent._rule import (
    Ascent,
    AscentRule,
    Mask,
    follow,
    mask_over_leaves,
    normalized,
    other_axes,
    over_leaves,
    resolve,
)


def size_of(w: jax.Array, granularity: str, output_axis: int) -> jax.Array:
    """The size of weights: of each entry, of the leaf, or of each filter. A vector has one entry a filter."""
    if granularity == "elementwise":
        return jnp.abs(w)
    if granularity == "leaf":
        return _tree.norm(w)
    return _tree.root(jnp.sum(jnp.square(w), axis=other_axes(w, output_axis), keepdims=True))


def adaptive(
    eta: float = 0.01,
    *,
    granularity: Literal["elementwise", "leaf", "filter"] = "elementwise",
    mask: Mask = True,
    output_axis: int = -1,
    ord: float = 2.0,
    eps: float = 1e-12,
) -> AscentRule:
    r"""The rule of ASAM: the neighbourhood scales with the weights.

    .. math::
      \epsilon = \rho\, T \frac{T g}{\|T g\|_2 + \mathrm{eps}}, \quad
      T = |w| + \eta \;\text{or}\; \|w_\mathrm{leaf}\|_2 + \eta \;\text{or}\; \|w_\mathrm{filter}\|_2 + \eta

    so that :math:`\|T^{-1}\epsilon\| = \rho`, whatever the scale of a layer.

    Args:
      eta: Added to the size of the weights, so that zeros can move; >= 0.
      granularity: What shares one T: "elementwise", "leaf", or "filter" (all entries of a leaf that
        feed one output).
      mask: Which leaves adapt: a pytree of booleans, a prefix of params, or a function of params
        that returns one. The others have T = 1 and count in the norm all the same. The published
        code adapts weights but not biases; here, all leaves unless told otherwise.
      output_axis: The axis of a leaf that counts its filters; -1 in Flax and Haiku, 0 in layouts
        taken over from PyTorch.
      ord: The norm p of the constraint, in (1, inf].
      eps: Added to the norm; >= 0.

    Returns:
      The rule.

    Raises:
      ValueError: If an argument is out of its range.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> rule = optax_sam.ascent.adaptive(eta=0.0)
      >>> perturbation = rule(jnp.array([20.0, -0.5]), 0.5, jnp.array([2.0, -0.5]))
      >>> print([f"{x:.4f}" for x in perturbation])
      ['1.0000', '-0.0016']

    References:
      Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, ICML 2021. `granularity="filter"` is
      of the paper, not of its code.
    """
    _checks.number("eta", eta, low=0.0)
    _checks.choice("granularity", granularity, ("elementwise", "leaf", "filter"))
    _checks.number("output_axis", output_axis, integer=True)
    _checks.mask("mask", mask)
    inner = normalized(ord, eps)

    def scales(params: optax.Params) -> optax.Params:
        def scale(w: jax.Array, adapts: Any) -> jax.Array:
            return jnp.where(adapts, size_of(w, granularity, output_axis) + eta, jnp.ones_like(w))

        return jax.tree.map(scale, _tree.upcast(params), mask_over_leaves(mask, params))

    def perturb(gradient: optax.Updates, rho: Any, params: optax.Params) -> optax.Updates:
        t = scales(params)
        scaled = jax.tree.map(jnp.multiply, t, _tree.upcast(gradient))
        return jax.tree.map(jnp.multiply, t, inner(scaled, rho, params))

    def length(perturbation: optax.Updates, params: optax.Params) -> jax.Array:
        def unscale(e: jax.Array, t: jax.Array) -> jax.Array:
            # T = 0 where a weight and eta are zero, and there the perturbation is zero too.
            return jnp.where(t == 0.0, jnp.zeros_like(e), e / jnp.where(t == 0.0, jnp.ones_like(t), t))

        return _tree.norm(jax.tree.map(unscale, perturbation, scales(params)), ord)

    return AscentRule(perturb, length)


def absolute(rule: Ascent | None = None) -> AscentRule:
    r"""Multiplies another rule's perturbation by the sizes of the weights.

    .. math:: \epsilon = |w| \odot \mathrm{rule}(g, \rho, w)

    This is what "adaptive" means in GSAM's algorithm 1 and code. It differs from ASAM
    (`adaptive`): the weights enter in the first power, and the length of the result is not rho.

    Args:
      rule: The rule to scale; None for `normalized()`.

    Returns:
      The rule.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> rule = optax_sam.ascent.absolute()
      >>> perturbation = rule(jnp.array([20.0, -0.5]), 0.5, jnp.array([2.0, -0.5]))
      >>> print([f"{x:.4f}" for x in perturbation])
      ['0.9997', '-0.0062']

    References:
      Zhuang et al., `Surrogate Gap Guided Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.08065>`_, ICLR 2022, algorithm 1.
    """
    inner = resolve(rule, "rule")

    def perturb(gradient: optax.Updates, rho: Any, params: optax.Params) -> optax.Updates:
        return jax.tree.map(lambda w, e: jnp.abs(w) * e, _tree.upcast(params), inner(gradient, rho, params))

    return AscentRule(perturb, None, follow(inner, absolute))


def layerwise(eps: float = 1e-12, eta: float = 0.0) -> AscentRule:
    r"""Each leaf moves in proportion to its own norm (Look-LayerSAM), for very large batches.

    .. math:: \epsilon_l = \rho\,(\|w_l\|_2 + \eta) \frac{g_l}{\|g_l\|_2 + \mathrm{eps}}

    Args:
      eps: Added to the norm of each leaf's gradient; >= 0.
      eta: Added to the norm of each leaf, so that a leaf of zeros can move; >= 0.

    Returns:
      The rule.

    Raises:
      ValueError: If an argument is negative.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> params = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([1.0])}
      >>> gradient = {"a": jnp.array([0.0, 2.0]), "b": jnp.array([7.0])}
      >>> perturbation = optax_sam.ascent.layerwise()(gradient, 0.1, params)
      >>> print({name: [f"{x:.2f}" for x in e] for name, e in perturbation.items()})
      {'a': ['0.00', '0.50'], 'b': ['0.10']}

    References:
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.02714>`_, CVPR 2022; the formula after a summary of it.
    """
    _checks.number("eta", eta, low=0.0)
    step = normalized(2.0, eps)

    def perturb(gradient: optax.Updates, rho: Any, params: optax.Params) -> optax.Updates:
        def move(g: jax.Array, w: jax.Array) -> jax.Array:
            size = _tree.norm(w) + eta
            return jax.tree.map(lambda e: size * e, step(g, rho, w))

        return jax.tree.map(move, gradient, params)

    return AscentRule(perturb)


def bounded(rule: Ascent | None, fraction: float) -> AscentRule:
    r"""Another rule's perturbation, of which no entry is larger than a fraction of its weight (AWP).

    .. math:: \epsilon = \mathrm{clip}(\mathrm{rule}(g, \rho, w),\; -\varphi |w|,\; \varphi |w|)

    The two forms of adversarial weight perturbation in use move the matrices only; `matrices` is
    `lambda params: jax.tree.map(lambda w: w.ndim > 1, params)`:

    - of its paper, without a bound: `sam(0.01, ascent=masked(matrices, layerwise()))`;
    - of solutions on Kaggle: `sam(0.1, ascent=masked(matrices, bounded(layerwise(1e-6, 1e-6), 0.01)))`.

    Args:
      rule: The rule to bound; None for `normalized()`.
      fraction: The fraction :math:`\varphi`, > 0. A weight that is zero does not move.

    Returns:
      The rule.

    Raises:
      TypeError, ValueError: If `rule` is none, or `fraction` is not above 0.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> rule = optax_sam.ascent.bounded(optax_sam.ascent.layerwise(), 0.05)
      >>> perturbation = rule(jnp.array([10.0, 1.0]), 0.1, jnp.array([1.0, 1.0]))
      >>> print([f"{x:.4f}" for x in perturbation])
      ['0.0500', '0.0141']

    References:
      Wu, Xia and Wang, `Adversarial Weight Perturbation Helps Robust Generalization
      <https://arxiv.org/abs/2004.05884>`_, NeurIPS 2020; the bound after public Kaggle solutions.
    """
    _checks.number("fraction", fraction, low=0.0, above=True)
    inner = resolve(rule, "rule")

    def perturb(gradient: optax.Updates, rho: Any, params: optax.Params) -> optax.Updates:
        def clip(e: jax.Array, w: jax.Array) -> jax.Array:
            return jnp.clip(e, -fraction * jnp.abs(w), fraction * jnp.abs(w))

        return jax.tree.map(clip, inner(gradient, rho, params), _tree.upcast(params))

    return AscentRule(perturb, None, follow(inner, lambda rule: bounded(rule, fraction)))


def scaled(multipliers: Any, rule: Ascent | None = None) -> AscentRule:
    r"""Weighs leaves against one another in the ball of another rule (mu-P\ :sup:`2`).

    .. math:: \epsilon = m \odot \mathrm{rule}(m \odot g, \rho, w)

    With `normalized()` this is :math:`\epsilon_l = \rho\, m_l^2 g_l / \|m \odot g\|_2`: a step of length rho
    in the norm :math:`\|\epsilon / m\|_2`. With one norm over all leaves SAM perturbs few of the layers of a
    wide network; multipliers that depend on the width let the same radius serve all widths.

    Args:
      multipliers: Numbers or arrays >= 0: a pytree, a prefix of params, or a function of params that returns
        one. 1 recovers the rule, 0 leaves what it multiplies where it is.
      rule: The rule; None for `normalized()`.

    Returns:
      The rule.

    Raises:
      TypeError, ValueError: If a multiplier is no number or negative, or the tree does not fit params.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> gradient = {"hidden": jnp.array([4.0]), "output": jnp.array([3.0])}
      >>> perturbation = optax_sam.ascent.scaled({"hidden": 2.0, "output": 2.0})(gradient, 0.1, gradient)
      >>> print({name: f"{e[0]:.2f}" for name, e in perturbation.items()})
      {'hidden': '0.16', 'output': '0.12'}

    References:
      Haas et al., `Effective Sharpness Aware Minimization Requires Layerwise Perturbation Scaling
      <https://arxiv.org/abs/2411.00075>`_, NeurIPS 2024, after its abstract: the mechanism; see the paper for
      the right exponents of the width.
    """
    inner = resolve(rule, "rule")
    if not callable(multipliers):
        _check_multipliers(multipliers)

    def multiply(tree: Any, params: optax.Params) -> Any:
        of_leaves = over_leaves("multipliers", multipliers, params, "numbers")
        _check_multipliers(of_leaves)
        return jax.tree.map(lambda x, m: x * m, _tree.upcast(tree), of_leaves)

    def perturb(gradient: optax.Updates, rho: Any, params: optax.Params) -> optax.Updates:
        return multiply(inner(multiply(gradient, params), rho, params), params)

    return AscentRule(perturb, None, follow(inner, lambda rule: scaled(multipliers, rule)))


def _check_multipliers(tree: Any) -> None:
    for leaf in jax.tree.leaves(tree):
        if not jnp.ndim(leaf) or not isinstance(leaf, jax.Array | np.ndarray):
            _checks.number("multipliers", leaf, low=0.0)
