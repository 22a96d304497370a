"""What an ascent rule is, the rule of SAM, and what rules share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

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
    """An ascent rule that also measures perturbations in its own norm, or that changes from step to step.

    Attributes:
      perturb: `(gradient, rho, params) -> perturbation`; calling the rule calls it.
      length: `(perturbation, params) -> length`, shape=(): the norm in which one step has length
        rho, which multi-step ascent needs for its projection; None if the rule has no such norm.
      of_step: `step -> rule`, of a rule that is another in every step; None if it is always the same.
        Variants ask `at_step` for it; `perturb` is the rule of step 0.
    """

    perturb: Ascent
    length: Callable[[optax.Updates, optax.Params], jax.Array] | None = None
    of_step: Callable[[jax.Array | int], Ascent] | None = None

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


def other_axes(x: jax.Array, output_axis: int) -> tuple[int, ...]:
    """All axes of a leaf except the one that counts its outputs. A vector or a scalar has none."""
    if x.ndim < 2:
        return ()
    if not -x.ndim <= output_axis < x.ndim:
        msg = (
            f"`output_axis` is {output_axis}, but a leaf has shape {x.shape}. Name an axis that all leaves "
            "of two or more axes have: -1 in Flax and Haiku, 0 in layouts taken over from PyTorch."
        )
        raise ValueError(msg)
    return tuple(a for a in range(x.ndim) if a != output_axis % x.ndim)


def length_of(rule: Ascent) -> Callable[[optax.Updates, optax.Params], jax.Array] | None:
    """How a rule measures perturbations, if it does."""
    return getattr(rule, "length", None)


def at_step(rule: Ascent, step: jax.Array | int) -> Ascent:
    """The rule as it is at a step: what a variant calls, so that random rules draw anew.

    Args:
      rule: The rule.
      step: The step of the variant, `state.step`.

    Returns:
      The rule itself, unless it is another in every step, as `random_mask` is.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> rule, gradient = optax_sam.ascent.random_mask(0.5), jnp.ones(6)
      >>> for step in range(2):
      ...     perturbation = optax_sam.ascent.at_step(rule, step)(gradient, 0.1, gradient)
      ...     print([bool(e) for e in perturbation])
      [True, False, True, False, True, True]
      [False, True, True, True, True, False]
    """
    of_step = getattr(rule, "of_step", None)
    return rule if of_step is None else of_step(step)


def follow(inner: Ascent, make: Callable[[Ascent], Ascent]) -> Callable[[jax.Array | int], Ascent] | None:
    """The `of_step` of a rule around another: None if that one never changes."""
    if getattr(inner, "of_step", None) is None:
        return None
    return lambda step: make(at_step(inner, step))


def over_leaves(name: str, value: Any, params: optax.Params, leaves: str = "booleans") -> Any:
    """A prefix of params, or a function of params that returns one, in the structure of params."""
    tree = value(params) if callable(value) else value
    try:
        return jax.tree.map(lambda m, subtree: jax.tree.map(lambda _: m, subtree), tree, params)
    except (TypeError, ValueError) as error:
        found = _checks.difference(tree, params, "params have", prefix=True)
        msg = (
            f"`{name}` must be a pytree of {leaves} with the structure of params or of their upper levels, "
            f"or a function of params that returns one, got {found}."
        )
        raise ValueError(msg) from error


def mask_over_leaves(mask: Mask, params: optax.Params) -> Any:
    """The mask as a pytree of the structure of params."""
    tree = mask(params) if callable(mask) else mask
    _checks.mask("mask", tree)
    full = over_leaves("mask", tree, params)
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
