"""Rules that perturb some leaves, or some entries, only."""

from __future__ import annotations

from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import optax

from optax_sam import _checks, _tree
from optax_sam.ascent._rule import (
    Ascent,
    AscentRule,
    Mask,
    at_step,
    follow,
    length_of,
    mask_over_leaves,
    resolve,
)


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
        return jax.tree.map(
            lambda x, m: jnp.where(m, x, jnp.zeros_like(x)), tree, mask_over_leaves(mask, params)
        )

    def perturb(gradient: optax.Updates, rho: Any, params: optax.Params) -> optax.Updates:
        if norm == "selected":
            gradient = select(gradient, params)
        # Also afterwards: a rule may move what has no gradient.
        return select(inner(gradient, rho, params), params)

    return AscentRule(perturb, length_of(inner), follow(inner, lambda rule: masked(mask, rule, norm=norm)))


def random_mask(keep: float, key: Any = None, rule: Ascent | None = None) -> AscentRule:
    r"""Perturbs a random part of the entries, another one in every step (the stochastic weights of ESAM).

    .. math:: \epsilon = \frac{1}{\beta}\, m \odot \mathrm{rule}(g, \rho, w), \quad
      m \sim \mathrm{Bernoulli}(\beta)

    On average over masks that is the perturbation of the rule; its length is about
    :math:`\rho / \sqrt{\beta}`. The perturbed gradient is computed whole, so that no time is saved.

    Args:
      keep: The probability :math:`\beta` that an entry is perturbed, in (0, 1]; 1 recovers the rule.
      key: The seed of the masks, an integer or a random key, typed or raw; None for 0. The mask of a step
        depends on key and step alone, and is the same for all devices and shards.
      rule: The rule; None for `normalized()`.

    Returns:
      The rule. Called by itself it draws the mask of step 0; variants ask `at_step` for the others.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> rule, gradient = optax_sam.ascent.random_mask(0.5), jnp.ones(10_000)
      >>> perturbation = rule(gradient, 0.1, gradient)
      >>> print(f"{jnp.mean(perturbation != 0):.1f} {jnp.max(perturbation):.4f}")
      0.5 0.0020

    References:
      Du et al., `Efficient Sharpness-Aware Minimization <https://arxiv.org/abs/2110.03141>`_, ICLR 2022; the
      authors' code draws whole tensors, and takes the norm over these.
    """
    _checks.number("keep", keep, low=0.0, high=1.0, above=True)
    seed = _checks.key("key", 0 if key is None else key)
    inner = resolve(rule, "rule")

    def of_step(step: jax.Array | int) -> AscentRule:
        of_inner = at_step(inner, step)

        def perturb(gradient: optax.Updates, rho: Any, params: optax.Params) -> optax.Updates:
            whole = of_inner(gradient, rho, params)
            draws = optax.tree.random_like(jax.random.fold_in(seed, step), whole, jax.random.uniform)
            return jax.tree.map(lambda e, x: jnp.where(x < keep, e / keep, jnp.zeros_like(e)), whole, draws)

        return AscentRule(perturb)

    return AscentRule(of_step(0).perturb, None, of_step)


def zscore(quantile: float = 0.95, rule: Ascent | None = None, *, per_leaf: bool = False) -> AscentRule:
    r"""Climbs along the entries that stand out in their layer (ZSharp).

    .. math::
      \epsilon = \mathrm{rule}(m \odot g, \rho, w), \quad
      m_i = \left[\, |z_i| > \mathrm{quantile}_q(|z|) \,\right], \quad
      z = \frac{g_l - \mathrm{mean}(g_l)}{\mathrm{std}(g_l)}

    Leaves of one axis or none keep all of their entries.

    Args:
      quantile: The fraction q of the entries of a leaf that is left out, in [0, 1). Finding it sorts every
        leaf, which is slow for large ones on a CPU.
      rule: The rule that receives what is kept; None for `normalized()`.
      per_leaf: False: one norm over all that is kept, as in the paper. True: every filtered leaf has a ball
        of its own, and leaves of which nothing is kept, or that have no filter, move as without it, as in
        the authors' code.

    Returns:
      The rule.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> gradient = jnp.array([[10.0, 1.0], [0.0, -3.0]])
      >>> perturbation = optax_sam.ascent.zscore(0.5)(gradient, 0.1, gradient)
      >>> print([f"{x:.3f}" for x in perturbation.ravel()])
      ['0.096', '0.000', '0.000', '-0.029']

    References:
      Yun, `Sharpness-Aware Minimization with Z-Score Gradient Filtering <https://arxiv.org/abs/2505.02369>`_,
      NeurIPS-OPT 2025, after a summary of the paper, and the authors' code for `per_leaf`.
    """
    _checks.number("quantile", quantile, low=0.0, high=1.0, below=True)
    inner = resolve(rule, "rule")

    def stands_out(g: jax.Array) -> jax.Array:
        # The standard deviation divides both sides of the comparison.
        deviation = jnp.abs(g - jnp.mean(g))
        return jnp.where(deviation > jnp.quantile(deviation, quantile), g, jnp.zeros_like(g))

    def is_filtered(g: jax.Array) -> bool:
        return g.ndim > 1 and g.size > 1

    def perturb(gradient: optax.Updates, rho: Any, params: optax.Params) -> optax.Updates:
        gradient = _tree.upcast(gradient)
        kept = jax.tree.map(lambda g: stands_out(g) if is_filtered(g) else g, gradient)
        if not per_leaf:
            return inner(kept, rho, params)
        whole = inner(gradient, rho, params)

        def choose(e: jax.Array, g: jax.Array, w: jax.Array) -> jax.Array:
            if not is_filtered(g):
                return e
            return jnp.where(jnp.any(g != 0.0), cast("jax.Array", inner(g, rho, w)), e)

        return jax.tree.map(choose, whole, kept, params)

    def remake(rule: Ascent) -> Ascent:
        return zscore(quantile, rule, per_leaf=per_leaf)

    return AscentRule(perturb, None if per_leaf else length_of(inner), follow(inner, remake))
