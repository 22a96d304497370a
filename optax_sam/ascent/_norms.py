"""Balls in which the perturbation has length rho: p-norms, the Fisher metric, norms of matrices."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from optax_sam import _checks, _tree
from optax_sam.ascent._rule import AscentRule


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
        solved = jax.tree.map(lambda g: g / (1.0 + eta * jnp.square(g)), gradient)
        length = _tree.root(_tree.dot(gradient, solved) + eps)
        length = jnp.where(length == 0.0, jnp.ones_like(length), length)
        return _tree.rescale(solved, rho, length)

    return AscentRule(perturb)


def matrix(norm: Literal["spectral", "nuclear"], *, iterations: int = 10) -> AscentRule:
    r"""Each leaf takes a step of length rho in a norm of matrices, in the dual direction of its gradient.

    With the singular value decomposition :math:`g_l = U S V^\top`, leaf by leaf:

    .. math::
      \epsilon_l = \rho\, U V^\top \;(\text{spectral, the geometry of Muon}), \quad
      \epsilon_l = \rho\, u_1 v_1^\top \;(\text{nuclear, of rank one: nu-SAM})

    A leaf of more than two axes is a matrix whose columns are counted by its last axis. Vectors and scalars
    take a step of length rho in the 2-norm.

    Args:
      norm: "spectral" or "nuclear".
      iterations: Power iterations of "nuclear", >= 1; they begin anew in every step. The paper goes on from
        the vector of the step before and needs one. "spectral" takes five iterations of Muon's polynomial and
        four of one that converges: singular values below a thousandth of the largest come out smaller.

    Returns:
      The rule. "nuclear" costs a few products of a matrix and a vector, "spectral" 27 of two matrices.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> gradient = jnp.array([[10.0, 1.0], [0.0, -3.0]])
      >>> for norm in ("spectral", "nuclear"):
      ...     perturbation = optax_sam.ascent.matrix(norm)(gradient, 0.1, gradient)
      ...     print([f"{x:.3f}" for x in perturbation.ravel()])
      ['0.100', '0.008', '0.008', '-0.100']
      ['0.099', '0.011', '-0.003', '-0.000']

    References:
      Pethick et al., `nu-SAM <https://openreview.net/forum?id=V6ia5hWIMD>`_, TMLR 2025, after its abstract;
      that each leaf has a ball of its own is an assumption. Jordan et al., `Muon
      <https://kellerjordan.github.io/posts/muon/>`_, 2024, for the first polynomial.
    """
    _checks.choice("norm", norm, ("spectral", "nuclear"))
    _checks.static_integer("iterations", iterations, low=1)

    def dual(g: jax.Array) -> jax.Array:
        if g.ndim < 2 or g.size == 0:
            return _tree.unit(g)
        rows = g.reshape(-1, g.shape[-1])
        found = _orthogonalized(rows) if norm == "spectral" else _rank_one(rows, iterations)
        return found.reshape(g.shape)

    def perturb(gradient: optax.Updates, rho: Any, params: optax.Params) -> optax.Updates:
        del params
        return jax.tree.map(lambda g: rho * dual(g), _tree.upcast(gradient))

    return AscentRule(perturb)


_TO_ONE = (*[(3.4445, -4.7750, 2.0315)] * 5, *[(1.875, -1.25, 0.375)] * 4)
"""a, b, c of odd polynomials a s + b s^3 + c s^5, which take singular values up to one to one."""


def _orthogonalized(g: jax.Array) -> jax.Array:
    """The matrix with its singular values replaced by one, and zeros kept."""
    x = _tree.unit(g if g.shape[0] <= g.shape[1] else g.T)
    for a, b, c in _TO_ONE:
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x if g.shape[0] <= g.shape[1] else x.T


def _rank_one(g: jax.Array, iterations: int) -> jax.Array:
    """The product of the first pair of singular vectors."""
    v = jax.random.normal(jax.random.key(0), g.shape[1:], g.dtype)
    u = _tree.unit(g @ v)
    for _ in range(iterations):
        v = _tree.unit(u @ g)
        u = _tree.unit(g @ v)
    return u[:, None] * v
