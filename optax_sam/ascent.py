r"""Ascent rules: from a gradient to the perturbation that is added to params.

Every rule is a function :math:`(g, \rho, w) \mapsto \epsilon` of pytrees and can be the `ascent=` of
any variant; rules that take a rule combine. A plain function of the same three arguments is a rule
too. Norms are global over the leaves, computed in float32 or better; the perturbation comes in
float32 or better. A zero gradient gives a zero perturbation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam import _checks, _tree

Ascent = Callable[[optax.Updates, Any, optax.Params], optax.Updates]
"""`(gradient, rho, params) -> perturbation`."""

Mask = Any | Callable[[optax.Params], Any]
"""A pytree of booleans (or of arrays of zeros and ones), a prefix of params, or a function of params
that returns one."""


class AscentRule(NamedTuple):
    """An ascent rule that also measures perturbations in its own norm.

    Attributes:
      perturb: `(gradient, rho, params) -> perturbation`; calling the rule calls it.
      length: `(perturbation, params) -> length`, shape=(): the norm in which one step has length
        rho, which multi-step ascent needs for its projection; None if the rule has no such norm.
    """

    perturb: Ascent
    length: Callable[[optax.Updates, optax.Params], jax.Array] | None = None

    def __call__(self, gradient: optax.Updates, rho: Any = None, params: Any = None) -> optax.Updates:
        """The perturbation of the rule."""
        if rho is None:
            msg = (
                "An ascent rule is called with (gradient, rho, params), got one argument. Under "
                "`optax.inject_hyperparams`, which takes it for a schedule, name it in the static arguments, "
                '`static_args=("ascent",)`.'
            )
            raise TypeError(msg)
        return self.perturb(gradient, rho, params)


def resolve(rule: Ascent | None, name: str = "ascent") -> Ascent:
    """The rule that an argument stands for, checked before anything is traced.

    Args:
      rule: What was passed: a rule, or None for `normalized()`.
      name: The argument's name, for the message.

    Returns:
      The rule.

    Raises:
      TypeError: If it cannot be called with a gradient, a radius and params.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> perturbation = optax_sam.ascent.resolve(None)(jnp.array([3.0, 4.0]), 0.1, None)
      >>> print([f"{x:.3f}" for x in perturbation])
      ['0.060', '0.080']
    """
    if rule is None:
        return normalized()
    right = (
        f"`{name}` must be an ascent rule, such as `optax_sam.ascent.normalized()`, or a function of "
        "(gradient, rho, params), got "
    )
    if not callable(rule):
        msg = f"{right}{rule!r} of type {type(rule).__name__}."
        raise TypeError(msg)
    try:
        signature = inspect.signature(rule)
    except ValueError:  # Some built-in functions do not tell what they take.
        return rule
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        called = getattr(rule, "__name__", repr(rule))
        msg = (
            f"{right}`{called}`, which takes ({', '.join(signature.parameters)}). Is it to be called, "
            f"`{called}(...)`?"
        )
        raise TypeError(msg) from error
    return rule


def _other_axes(x: jax.Array, output_axis: int) -> tuple[int, ...]:
    """The axes of a leaf but for that which counts its outputs; none of a vector or a scalar."""
    if x.ndim < 2:
        return ()
    if not -x.ndim <= output_axis < x.ndim:
        msg = (
            f"`output_axis` is {output_axis}, but a leaf has shape {x.shape}. Name an axis that all leaves "
            "of two or more axes have: -1 in Flax and Haiku, 0 in layouts taken over from PyTorch."
        )
        raise ValueError(msg)
    return tuple(a for a in range(x.ndim) if a != output_axis % x.ndim)


def size_of(w: jax.Array, granularity: str, output_axis: int) -> jax.Array:
    """The size of weights: of each entry, of the leaf, or of each filter. A vector has one entry a filter."""
    if granularity == "elementwise":
        return jnp.abs(w)
    if granularity == "leaf":
        return _tree.norm(w)
    # In units of the largest weight, whose square may leave the range of floats.
    axes = _other_axes(w, output_axis)
    largest = jnp.max(jnp.abs(w), axis=axes, keepdims=True, initial=0.0)
    unit = jnp.where(largest > 0.0, largest, jnp.ones_like(largest))
    return unit * _tree.root(jnp.sum(jnp.square(w / unit), axis=axes, keepdims=True))


def _length(rule: Ascent) -> Callable[[optax.Updates, optax.Params], jax.Array] | None:
    return getattr(rule, "length", None)


def normalized(ord: float = 2.0, eps: float = 1e-12) -> AscentRule:
    r"""SAM's own rule: a step of length rho in the dual direction of the gradient.

    .. math::
      \epsilon = \rho \frac{g}{\|g\|_2 + \mathrm{eps}} \;(p = 2), \quad
      \epsilon = \rho\,\mathrm{sign}(g) \;(p = \infty), \quad
      \epsilon = \rho\,\mathrm{sign}(g) \left(\frac{|g|}{\|g\|_q + \mathrm{eps}}\right)^{q - 1},
      \; \tfrac1p + \tfrac1q = 1

    Args:
      ord: The norm p in which the perturbation has length rho, in (1, inf].
      eps: Added to the norm of the gradient; >= 0.

    Returns:
      The rule.

    Raises:
      ValueError: If `ord` or `eps` is out of its range.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> perturbation = optax_sam.ascent.normalized()(jnp.array([3.0, 4.0]), 0.1, None)
      >>> print([f"{x:.3f}" for x in perturbation])
      ['0.060', '0.080']

    References:
      Foret et al., `Sharpness-Aware Minimization <https://arxiv.org/abs/2010.01412>`_, ICLR 2021,
      equation 2; with `eps`, which the equation lacks.
    """
    if ord != jnp.inf:
        _checks.number("ord", ord, low=1.0, above=True)
    _checks.number("eps", eps, low=0.0)
    dual = 1.0 if ord == jnp.inf else ord / (ord - 1.0)

    def perturb(gradient: optax.Updates, rho: Any, params: optax.Params) -> optax.Updates:
        del params
        gradient = _tree.upcast(gradient)
        if dual == 1.0:  # Also of a finite order that is very large.
            return jax.tree.map(lambda g: rho * jnp.sign(g), gradient)
        length = _tree.norm(gradient, dual) + eps
        # A zero gradient with eps = 0 as well: the perturbation is zero, not NaN.
        length = jnp.where(length == 0.0, jnp.ones_like(length), length)
        if ord == 2.0:
            return _tree.rescale(gradient, rho, length)
        return jax.tree.map(
            lambda g: rho * jnp.sign(g) * _tree.root(jnp.abs(g) / length, 1.0 / (dual - 1.0)), gradient
        )

    def length(perturbation: optax.Updates, params: optax.Params) -> jax.Array:
        del params
        return _tree.norm(perturbation, ord)

    return AscentRule(perturb, length)


def unnormalized() -> AscentRule:
    r"""A step proportional to the gradient (USAM).

    .. math:: \epsilon = \rho\, g

    Its length follows the gradient's: the radius shrinks on the way to a minimum. Not invariant to a
    scaling of the loss, so that rho has to be tuned anew.

    Returns:
      The rule.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> perturbation = optax_sam.ascent.unnormalized()(jnp.array([10.0, 1.0]), 0.01, None)
      >>> print([f"{x:.3f}" for x in perturbation])
      ['0.100', '0.010']

    References:
      Andriushchenko and Flammarion, `Towards Understanding Sharpness-Aware Minimization
      <https://arxiv.org/abs/2206.06232>`_, ICML 2022.
    """

    def perturb(gradient: optax.Updates, rho: Any, params: optax.Params) -> optax.Updates:
        del params
        return jax.tree.map(lambda g: rho * g, _tree.upcast(gradient))

    return AscentRule(perturb)


def _broadcast(mask: Mask, params: optax.Params) -> Any:
    """The mask as a pytree of the structure of params."""
    tree = mask(params) if callable(mask) else mask
    _checks.mask("mask", tree)
    try:
        full = jax.tree.map(lambda m, subtree: jax.tree.map(lambda _: m, subtree), tree, params)
    except (TypeError, ValueError) as error:
        found = _checks.difference(tree, params, "params have", prefix=True)
        msg = (
            "`mask` must be a pytree of booleans with the structure of params or of their upper levels, or a "
            f"function of params that returns one, got {found}."
        )
        raise ValueError(msg) from error
    of_leaves = jax.tree_util.tree_leaves_with_path(full)
    if (
        mask is not False
        and of_leaves
        and all(isinstance(m, bool | np.bool_) and not m for _, m in of_leaves)
    ):
        msg = (
            "`mask` selects nothing: it is False for all params, whose paths are like "
            f"{jax.tree_util.keystr(of_leaves[0][0]) or '(), the only leaf'}."
        )
        raise ValueError(msg)
    return full


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

        return jax.tree.map(scale, _tree.upcast(params), _broadcast(mask, params))

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

    return AscentRule(perturb)


def layerwise(eps: float = 1e-12) -> AscentRule:
    r"""Each leaf moves in proportion to its own norm (Look-LayerSAM), for very large batches.

    .. math:: \epsilon_l = \rho \|w_l\|_2 \frac{g_l}{\|g_l\|_2 + \mathrm{eps}}

    Args:
      eps: Added to the norm of each leaf's gradient; >= 0.

    Returns:
      The rule.

    Raises:
      ValueError: If `eps` is negative.

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
    step = normalized(2.0, eps)

    def perturb(gradient: optax.Updates, rho: Any, params: optax.Params) -> optax.Updates:
        def move(g: jax.Array, w: jax.Array) -> jax.Array:
            size = _tree.norm(w)
            return jax.tree.map(lambda e: size * e, step(g, rho, w))

        return jax.tree.map(move, gradient, params)

    return AscentRule(perturb)


def centralize(tree: Any, output_axis: int = -1) -> Any:
    """Gradient centralization: leaves of two or more axes lose their mean over all but the output axis.

    Args:
      tree: A pytree of arrays.
      output_axis: The axis that is not averaged over: -1 in Flax and Haiku, 0 in layouts taken over
        from PyTorch.

    Returns:
      The centralized tree; vectors and scalars as they came.

    Raises:
      TypeError, ValueError: If `output_axis` is no integer, or no axis of a leaf.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> optax_sam.ascent.centralize(jnp.array([[1.0, 2.0], [3.0, 6.0]]))
      Array([[-1., -2.],
             [ 1.,  2.]], dtype=float32)

    References:
      Yong et al., `Gradient Centralization <https://arxiv.org/abs/2004.01461>`_, ECCV 2020.
    """
    _checks.number("output_axis", output_axis, integer=True)

    def subtract_mean(x: jax.Array) -> jax.Array:
        return x - jnp.mean(x, axis=_other_axes(x, output_axis), keepdims=True) if x.ndim > 1 else x

    return jax.tree.map(subtract_mean, tree)


def centralized(
    rule: Ascent | None = None, *, output_axis: int = -1, legacy_norm: bool = False
) -> AscentRule:
    r"""Applies another rule to the centralized gradient.

    .. math:: \epsilon = \mathrm{rule}(\mathrm{GC}(g), \rho, w)

    Args:
      rule: The rule; None for `normalized()`.
      output_axis: The axis of a leaf that is not averaged over; see `centralize`.
      legacy_norm: Centralize after the rule instead of before, as a widespread PyTorch port does: the
        perturbation is then shorter than rho.

    Returns:
      The rule.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> gradient = jnp.array([[1.0, 2.0], [3.0, 6.0]])
      >>> perturbation = optax_sam.ascent.centralized()(gradient, 0.1, None)
      >>> print([f"{x:.3f}" for x in perturbation.ravel()])
      ['-0.032', '-0.063', '0.032', '0.063']

    References:
      Hassan et al., `GCSAM <https://arxiv.org/abs/2501.11584>`_, IEEE Access 2025.
    """
    _checks.number("output_axis", output_axis, integer=True)
    inner = resolve(rule, "rule")

    def perturb(gradient: optax.Updates, rho: Any, params: optax.Params) -> optax.Updates:
        if legacy_norm:
            return centralize(inner(gradient, rho, params), output_axis)
        return inner(centralize(_tree.upcast(gradient), output_axis), rho, params)

    return AscentRule(perturb, _length(inner))


def masked(
    mask: Mask, rule: Ascent | None = None, *, norm: Literal["selected", "all"] = "selected"
) -> AscentRule:
    """Perturbs some of the leaves, or some of the entries, only.

    Args:
      mask: What to perturb: a pytree of booleans (or of arrays of zeros and ones), a prefix of
        params, or a function of params that returns one.
      rule: The rule; None for `normalized()`.
      norm: "selected": the norm is over what is selected, and the perturbation has length rho
        (SAM-ON). "all": the norm is over everything, and the perturbation is shorter (sparse SAM).

    Returns:
      The rule.

    Raises:
      TypeError, ValueError: If `mask` is none or selects nothing, or `norm` is neither "selected" nor "all".

    Examples:
      Only what a path predicate selects:

      >>> import jax, jax.numpy as jnp, optax_sam
      >>> def of_norm_layers(params):
      ...     return jax.tree_util.tree_map_with_path(lambda path, _: "scale" in str(path), params)
      >>> rule = optax_sam.ascent.masked(of_norm_layers)
      >>> gradient = {"kernel": jnp.array([10.0]), "scale": jnp.array([1.0])}
      >>> perturbation = rule(gradient, 0.1, gradient)
      >>> print({name: f"{e[0]:.1f}" for name, e in perturbation.items()})
      {'kernel': '0.0', 'scale': '0.1'}

    References:
      Mueller et al., `Normalization Layers Are All That Sharpness-Aware Minimization Needs
      <https://arxiv.org/abs/2306.04226>`_, NeurIPS 2023 ("selected"); Mi et al., `Make
      Sharpness-Aware Minimization Stronger <https://arxiv.org/abs/2210.05177>`_, NeurIPS 2022 ("all").
    """
    _checks.choice("norm", norm, ("selected", "all"))
    _checks.mask("mask", mask)
    inner = resolve(rule, "rule")

    def select(tree: Any, params: optax.Params) -> Any:
        return jax.tree.map(lambda x, m: jnp.where(m, x, jnp.zeros_like(x)), tree, _broadcast(mask, params))

    def perturb(gradient: optax.Updates, rho: Any, params: optax.Params) -> optax.Updates:
        if norm == "selected":
            gradient = select(gradient, params)
        # Also afterwards: a rule may move what has no gradient.
        return select(inner(gradient, rho, params), params)

    return AscentRule(perturb, _length(inner))


def fisher(eta: float = 1.0, eps: float = 1e-12) -> AscentRule:
    r"""A step of length rho in the metric of the diagonal Fisher information (Fisher SAM).

    .. math::
      \epsilon = \rho \frac{F^{-1} g}{\sqrt{g^\top F^{-1} g + \mathrm{eps}}}, \quad F = 1 + \eta\, g^2,
      \quad \epsilon^\top F \epsilon = \rho^2

    Args:
      eta: Weight of the Fisher information against the identity; >= 0; 0 recovers `normalized`. Not
        invariant to a scaling of the loss.
      eps: Added under the root; >= 0.

    Returns:
      The rule.

    Raises:
      ValueError: If an argument is negative.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> perturbation = optax_sam.ascent.fisher()(jnp.array([10.0, 1.0]), 0.1, None)
      >>> print([f"{x:.4f}" for x in perturbation])
      ['0.0081', '0.0410']

    References:
      Kim et al., `Fisher SAM <https://arxiv.org/abs/2206.04920>`_, ICML 2022.
    """
    _checks.number("eta", eta, low=0.0)
    _checks.number("eps", eps, low=0.0)

    def perturb(gradient: optax.Updates, rho: Any, params: optax.Params) -> optax.Updates:
        del params
        gradient = _tree.upcast(gradient)

        def solve(g: jax.Array) -> jax.Array:
            # F^-1 g as 1 / (1/g + eta g): g^2 would overflow long before g does.
            safe = jnp.where(g == 0.0, jnp.ones_like(g), g)
            return jnp.where(g == 0.0, g, 1.0 / (1.0 / safe + eta * safe))

        solved = jax.tree.map(solve, gradient)
        roots = jax.tree.map(lambda g, x: jnp.sqrt(jnp.abs(g)) * jnp.sqrt(jnp.abs(x)), gradient, solved)
        length = jnp.hypot(_tree.norm(roots), eps**0.5)
        length = jnp.where(length == 0.0, jnp.ones_like(length), length)
        return _tree.rescale(solved, rho, length)

    return AscentRule(perturb)


def extrapolated(step_size: float, rule: Ascent | None = None) -> AscentRule:
    r"""Ascends from the point that a descent step would reach (EG-SAM, SAGM).

    .. math:: \epsilon = \mathrm{rule}(g, \rho, w) - \gamma\, g

    Args:
      step_size: The length :math:`\gamma` of the descent step, in gradients; >= 0; 0 recovers `rule`.
        EG-SAM takes the learning rate; SAGM a coefficient of its own, and the mean of both gradients:
        `wsam(alpha=0.5, ascent=extrapolated(...))`.
      rule: The rule; None for `normalized()`.

    Returns:
      The rule.

    Raises:
      ValueError: If `step_size` is negative.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> perturbation = optax_sam.ascent.extrapolated(0.05)(jnp.array([10.0, 1.0]), 0.1, None)
      >>> print([f"{x:.4f}" for x in perturbation])
      ['-0.4005', '-0.0400']

    References:
      Yu et al., `Improving Sharpness-Aware Minimization by Lookahead
      <https://proceedings.mlr.press/v235/yu24q.html>`_, ICML 2024; Wang et al., `Sharpness-Aware
      Gradient Matching <https://arxiv.org/abs/2303.10353>`_, CVPR 2023.
    """
    _checks.number("step_size", step_size, low=0.0)
    inner = resolve(rule, "rule")

    def perturb(gradient: optax.Updates, rho: Any, params: optax.Params) -> optax.Updates:
        up = inner(gradient, rho, params)
        return jax.tree.map(lambda e, g: e - step_size * g, up, _tree.upcast(gradient))

    return AscentRule(perturb)
