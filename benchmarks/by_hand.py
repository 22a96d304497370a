"""The rules of the variants as one would write them for a single training script, to compare costs with.

A rule is `(grad, params, memory, step, trace) -> (output, direction, memory)`, where `grad(params)`
gives `((value, aux), gradient)` and trace is the base optimizer's momentum. No options, no dtypes, and no
guards but those of `hand_step`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_sam

RHO = 0.05
Rule = Callable[..., tuple[Any, Any, Any]]


def norm(tree: Any) -> jax.Array:
    """The global 2-norm, without a guard."""
    return jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree)))


def keep_finite(new: Any, old: Any) -> Any:
    """The new numbers, and the old ones in place of infinities and NaN."""
    return jax.tree.map(lambda x, y: jnp.where(jnp.isfinite(x), x, y), new, old)


def dot(a: Any, b: Any) -> jax.Array:
    """The inner product."""
    return sum(jnp.sum(x * y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def climb(params: Any, gradient: Any, rho: float = RHO) -> Any:
    """The perturbed point of SAM."""
    scale = rho / (norm(gradient) + 1e-12)
    return jax.tree.map(lambda w, g: w + scale * g, params, gradient)


def plain(grad: Any, params: Any, memory: Any, step: Any, trace: Any) -> Any:
    """No SAM."""
    del step, trace
    return *grad(params), memory


def sam(grad: Any, params: Any, memory: Any, step: Any, trace: Any) -> Any:
    """SAM."""
    del step, trace
    output, g = grad(params)
    return output, grad(climb(params, g))[1], memory


def asam(grad: Any, params: Any, memory: Any, step: Any, trace: Any) -> Any:
    """ASAM."""
    del step, trace
    output, g = grad(params)
    scaled = jax.tree.map(lambda w, g: (jnp.abs(w) + 0.01) * g, params, g)
    scale = RHO / (norm(scaled) + 1e-12)
    point = jax.tree.map(lambda w, s: w + scale * (jnp.abs(w) + 0.01) * s, params, scaled)
    return output, grad(point)[1], memory


def gsam(grad: Any, params: Any, memory: Any, step: Any, trace: Any) -> Any:
    """GSAM with alpha = 0.4."""
    del step, trace
    output, g = grad(params)
    p = grad(climb(params, g))[1]
    along = dot(g, p) / dot(p, p)
    return output, jax.tree.map(lambda g, p: p - 0.4 * (g - along * p), g, p), memory


def wsam(grad: Any, params: Any, memory: Any, step: Any, trace: Any) -> Any:
    """WSAM with gamma = 0.9."""
    del step, trace
    output, g = grad(params)
    return output, jax.tree.map(lambda g, p: g + 9 * (p - g), g, grad(climb(params, g))[1]), memory


def saner(grad: Any, params: Any, memory: Any, step: Any, trace: Any) -> Any:
    """SANER with half of what SAM shrinks."""
    del step, trace
    output, g = grad(params)
    p = grad(climb(params, g))[1]
    return (
        output,
        jax.tree.map(lambda g, p: jnp.where((p / g > 0) & (p / g < 1), 0.5 * p, p), g, p),
        memory,
    )


def extragradient(grad: Any, params: Any, memory: Any, step: Any, trace: Any) -> Any:
    """The sum of the gradient here and the one ahead."""
    del step, trace
    output, g = grad(params)
    p = grad(jax.tree.map(lambda w, g: w - RHO * g, params, g))[1]
    return output, jax.tree.map(jnp.add, g, p), memory


def hessian_sam(grad: Any, params: Any, memory: Any, step: Any, trace: Any) -> Any:
    """The gradient and a Hessian-vector product, in one pass of forward over reverse mode."""
    del step, trace
    output, g = grad(params)
    scale = 1 / norm(g)
    unit = jax.tree.map(lambda g: scale * g, g)
    product = jax.jvp(lambda w: grad(w)[1], (params,), (unit,))[1]
    return output, jax.tree.map(lambda g, h: g + RHO * h, g, product), memory


def looksam(grad: Any, params: Any, memory: Any, step: Any, trace: Any) -> Any:
    """LookSAM with k = 5 and alpha = 0.7."""
    del trace
    output, g = grad(params)

    def refresh() -> Any:
        p = grad(climb(params, g))[1]
        along = dot(g, p) / dot(g, g)
        return p, jax.tree.map(lambda g, p: p - along * g, g, p)

    def reuse() -> Any:
        scale = 0.7 * norm(g) / (norm(memory) + 1e-8)
        return jax.tree.map(lambda g, m: g + scale * m, g, memory), memory

    return output, *jax.lax.cond(step % 5 == 0, refresh, reuse)


def async_sam(grad: Any, params: Any, memory: Any, step: Any, trace: Any) -> Any:
    """AsyncSAM with a delay of one step."""
    del trace
    output, g = grad(params)
    along = jax.tree.map(lambda m, g: jnp.where(step == 0, g, m), memory, g)
    return output, grad(climb(params, along))[1], g


def async_sam_perturbed(grad: Any, params: Any, memory: Any, step: Any, trace: Any) -> Any:
    """The same in one gradient."""
    del step, trace
    output, g = grad(climb(params, memory))
    return output, g, g


def msam(grad: Any, params: Any, memory: Any, step: Any, trace: Any) -> Any:
    """Momentum-SAM."""
    del step
    return *grad(climb(params, trace, -RHO)), memory


# Name: the rule by hand, whether it needs a memory, and the library's.
BASE = optax.sgd(0.01, momentum=0.9)
RULES: dict[str, tuple[Rule, bool, Any]] = {
    "sgd": (plain, False, None),
    "sam": (sam, False, optax_sam.sam(RHO)),
    "asam": (asam, False, optax_sam.asam(RHO)),
    "gsam": (gsam, False, optax_sam.gsam(RHO, 0.4)),
    "wsam": (wsam, False, optax_sam.wsam(RHO, 0.9)),
    "saner": (saner, False, optax_sam.saner(RHO, 0.5)),
    "extragradient": (extragradient, False, optax_sam.extragradient(RHO, weights=(1.0, 1.0))),
    "hessian_sam": (hessian_sam, False, optax_sam.hessian_sam(RHO)),
    "looksam": (looksam, True, optax_sam.looksam(RHO, 5, 0.7)),
    "async_sam": (async_sam, True, optax_sam.async_sam(RHO)),
    "async_sam, perturbed": (async_sam_perturbed, True, optax_sam.async_sam(RHO, reuse="perturbed")),
    "msam": (msam, False, optax_sam.msam(BASE, RHO)),
}


def hand_step(loss: Any, rule: Rule, guarded: bool = False) -> Any:
    """A training step of a rule: `(params, state, stats, batch) -> (params, state, stats, value)`.

    Guarded, it keeps a promise that the library makes: what a rule remembers stays finite.
    """

    def step(params: Any, state: Any, stats: Any, batch: Any) -> Any:
        base, memory, number = state
        grad = jax.value_and_grad(loss, has_aux=True)
        (value, stats), direction, new = rule(
            lambda w: grad(w, stats, batch), params, memory, number, base[0].trace
        )
        updates, new_base = BASE.update(direction, base, params)
        if guarded:
            new = keep_finite(new, memory)
            new_base = keep_finite(new_base, base) if rule is msam else new_base  # Which it remembers.
        return optax.apply_updates(params, updates), (new_base, new, number + 1), stats, value

    return step


def hand_state(params: Any, remembers: bool) -> Any:
    """What goes into the first of these steps."""
    return BASE.init(params), optax.tree.zeros_like(params) if remembers else (), jnp.zeros((), jnp.int32)


def optimizer(variant: Any) -> Any:
    """The variant's chain; of a whole optimizer itself."""
    return variant if variant is RULES["msam"][2] else optax.chain(variant, BASE)


def step_of_variant(loss: Any, variant: Any, tx: Any = None, **options: Any) -> tuple[Any, Any]:
    """The same step by the library, and the optimizer whose state goes into it."""
    value_and_grad = optax_sam.sam_value_and_grad(loss, variant, has_aux=True, **options)
    tx = optimizer(variant) if tx is None else tx

    def step(params: Any, state: Any, stats: Any, batch: Any) -> Any:
        (value, stats), grads = value_and_grad(params, stats, batch, state=state)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, stats, value

    return step, tx


def optax_step(loss: Any, params: Any, *, opaque: bool) -> tuple[Any, Any, int]:
    """The same step by `optax.contrib.sam`, its state, and how many calls make a step of SAM."""
    up = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    tx = optax.contrib.sam(BASE, up, sync_period=2, opaque_mode=opaque)
    grad = jax.value_and_grad(loss, has_aux=True)

    def step(params: Any, state: Any, stats: Any, batch: Any) -> Any:
        (value, new), gradient = grad(params, stats, batch)
        again = {"grad_fn": lambda w, _: grad(w, stats, batch)[1]} if opaque else {}
        updates, state = tx.update(gradient, state, params, **again)
        return optax.apply_updates(params, updates), state, new, value

    return step, tx.init(params), 1 if opaque else 2
