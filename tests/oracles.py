"""What the papers say, in plain numpy and float64: one function a rule, written from the papers alone.

Params are one flat vector here, so that a global norm is a norm; where a rule looks at leaves, it takes
the slices of `LEAVES`, the order in which JAX flattens the params of the loss.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

SHAPES = {"bias": (4,), "kernel": (3, 4), "scale": ()}
LEAVES = (slice(0, 4), slice(4, 16), slice(16, 17))
SIZE = 17
SCALES = np.concatenate([np.full(4, 1.5), np.full(12, 2.5), [0.5]])  # A multiplier for each leaf.


def first_params() -> np.ndarray:
    """Where every trajectory begins."""
    return np.random.default_rng(20).normal(size=SIZE)


def batches() -> np.ndarray:
    """The batches of six steps: three different ones, twice."""
    examples = np.random.default_rng(21).normal(size=(3, 8, 3))
    return np.concatenate([examples, examples])


def loss(w: np.ndarray, x: np.ndarray) -> Any:
    """Neither quadratic nor separable. Analytic, so that the complex step differentiates it."""
    bias, kernel, scale = w[:4], w[4:16].reshape(3, 4), w[16]
    residual = scale * np.tanh(x @ kernel + bias).sum(axis=1) - np.sin(x.sum(axis=1))
    return np.mean(residual**2 / 2 + residual**3 / 20)


def gradient(w: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The gradient of `loss`, derived by hand."""
    bias, kernel, scale = w[:4], w[4:16].reshape(3, 4), w[16]
    hidden = np.tanh(x @ kernel + bias)
    residual = scale * hidden.sum(axis=1) - np.sin(x.sum(axis=1))
    outer = (residual + 3 * residual**2 / 20) / len(x)
    inner = outer[:, None] * scale * (1 - hidden**2)
    return np.concatenate([inner.sum(axis=0), (x.T @ inner).ravel(), [outer @ hidden.sum(axis=1)]])


def hessian_times(grad: Any, w: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The Hessian-vector product by the complex step, which subtracts nothing: exact to rounding."""
    return np.imag(grad(w + 1e-30j * v)) / 1e-30


def unit(v: np.ndarray) -> np.ndarray:
    """The dual direction of the 2-norm."""
    return v / (np.linalg.norm(v) + 1e-12)


def centralize(v: np.ndarray) -> np.ndarray:
    """Yong et al.: matrices lose the mean over their inputs, the first axis here."""
    kernel = v[4:16].reshape(3, 4)
    return np.concatenate([v[:4], (kernel - kernel.mean(axis=0)).ravel(), v[16:]])


# A rule is (grad, w, t, memory) -> (direction, memory); that of a whole optimizer returns what is added to w.


def sam(grad: Any, w: Any, t: int, memory: Any, *, rho: float, direction: Any = unit) -> Any:
    """Foret et al., equations 2 and 3; with another dual direction, its relatives."""
    del t
    return grad(w + rho * direction(grad(w))), memory


def several_steps(
    grad: Any, w: Any, t: int, memory: Any, *, rho: float, n: int, stride: float, ball: bool
) -> Any:
    """Foret et al., appendix C.6: steps of length stride, projected to the ball or not."""
    del t
    e = np.zeros_like(w)
    for _ in range(n):
        e = e + stride * unit(grad(w + e))
        if ball and np.linalg.norm(e) > rho:
            e = rho * e / np.linalg.norm(e)
    return grad(w + e), memory


def asam(grad: Any, w: Any, t: int, memory: Any, *, rho: float, eta: float) -> Any:
    """Kwon et al.: the ball in coordinates divided by T = |w| + eta."""
    del t
    size = np.abs(w) + eta
    g = grad(w)
    return grad(w + rho * size**2 * g / np.linalg.norm(size * g)), memory


def matrices(v: np.ndarray, change: Any, otherwise: Any = unit) -> np.ndarray:
    """A change of the kernel, and another of what is no matrix."""
    return np.concatenate([otherwise(v[:4]), change(v[4:16].reshape(3, 4)).ravel(), otherwise(v[16:])])


def awp(g: np.ndarray, w: np.ndarray, *, rho: float, bound: float) -> np.ndarray:
    """Adversarial weight perturbation as used on Kaggle: as long as each leaf, and then clipped."""
    parts = [rho * (np.linalg.norm(w[i]) + 1e-6) * g[i] / (np.linalg.norm(g[i]) + 1e-6) for i in LEAVES]
    return np.clip(np.concatenate(parts), -bound * np.abs(w), bound * np.abs(w))


def singular(count: int | None) -> Any:
    """The product of the first so many pairs of singular vectors."""

    def change(kernel: np.ndarray) -> np.ndarray:
        left, _, right = np.linalg.svd(kernel, full_matrices=False)
        return left[:, :count] @ right[:count]

    return change


def zscore(kernel: np.ndarray, q: float) -> np.ndarray:
    """Yun: what stands out by its z-score; torch divides by n - 1 in the standard deviation."""
    z = np.abs((kernel - kernel.mean()) / (kernel.std(ddof=1) + 1e-12))
    return kernel * (z > np.quantile(z, q))


def filtered(g: np.ndarray, *, q: float, per_leaf: bool) -> np.ndarray:
    """One norm over what is kept (the paper), or the kernel's own and otherwise that of all (the code)."""
    if not per_leaf:
        return unit(matrices(g, lambda kernel: zscore(kernel, q), lambda v: v))
    return matrices(g, lambda kernel: unit(zscore(kernel, q)), lambda v: v / np.linalg.norm(g))


def perturbed(grad: Any, w: Any, t: int, memory: Any, *, rule: Any) -> Any:
    """SAM with a perturbation that depends on the weights."""
    del t
    return grad(w + rule(grad(w), w)), memory


def random_mask(grad: Any, w: Any, t: int, memory: Any, *, draws: Any, rho: float, keep: float) -> Any:
    """Du et al., stochastic weight perturbation: entries drawn in every step, divided by their chance."""
    return grad(w + rho / keep * (draws[t] < keep) * unit(grad(w))), memory


def gcsam(grad: Any, w: Any, t: int, memory: Any, *, rho: float, descent: bool) -> Any:
    """Hassan et al.: centralized before the norm is taken, and again in the descent."""
    del t
    g_p = grad(w + rho * unit(centralize(grad(w))))
    return (centralize(g_p) if descent else g_p), memory


def gsam(grad: Any, w: Any, t: int, memory: Any, *, rho: float, alpha: float) -> Any:
    """Zhuang et al., algorithm 1: minus the part of the clean gradient orthogonal to the perturbed one."""
    del t
    g = grad(w)
    g_p = grad(w + rho * unit(g))
    return g_p - alpha * (g - (g @ g_p) / (g_p @ g_p) * g_p), memory


def gsam_clean(grad: Any, w: Any, t: int, memory: Any, *, rho: float, alpha: float) -> Any:
    """The other objective of Zhuang et al.'s code: the roles swapped, the sign turned."""
    del t
    g = grad(w)
    g_p = grad(w + rho * unit(g))
    return g + alpha * (g_p - (g @ g_p) / (g @ g) * g), memory


def wsam(grad: Any, w: Any, t: int, memory: Any, *, rho: float, gamma: float) -> Any:
    """Yue et al., coupled: L + gamma / (1 - gamma) (L_p - L)."""
    del t
    g = grad(w)
    g_p = grad(w + rho * unit(g))
    return (1 - 2 * gamma) / (1 - gamma) * g + gamma / (1 - gamma) * g_p, memory


def decoupled_wsam(
    grad: Any, w: Any, t: int, memory: Any, *, rho: float, gamma: float, rate: float, momentum: float
) -> Any:
    """Yue et al., decoupled: momentum sees the clean gradient alone."""
    g = grad(w)
    g_p = grad(w + rho * unit(g))
    velocity = g if t == 0 else momentum * memory + g
    return -rate * velocity - rate * gamma / (1 - gamma) * (g_p - g), velocity


def gnp(grad: Any, w: Any, t: int, memory: Any, *, rho: float, alpha: float, normalize: bool) -> Any:
    """Zhao et al., equation for the approximated gradient; their code divides the clean one by its norm."""
    del t
    g = grad(w)
    return (1 - alpha) * (unit(g) if normalize else g) + alpha * grad(w + rho * unit(g)), memory


def le_sam(grad: Any, w: Any, t: int, memory: Any, *, rise: float, rho_max: float) -> Any:
    """Wang, Liu et al.: a fixed rise of the linear model of the loss, within a largest radius."""
    del t
    g = grad(w)
    return grad(w + min(rise / np.linalg.norm(g), rho_max) * unit(g)), memory


def stable_sam(grad: Any, w: Any, t: int, memory: Any, *, rho: float) -> Any:
    """Tan et al.: the direction of the perturbed gradient, the length of the clean one."""
    del t
    g = grad(w)
    return np.linalg.norm(g) * unit(grad(w + rho * unit(g))), memory


def xsam(grad: Any, w: Any, t: int, memory: Any, *, rho: float, alpha: float) -> Any:
    """Chen and Zhou: spherical interpolation, in the length of the perturbed gradient."""
    del t
    g = grad(w)
    g_p = grad(w + rho * unit(g))
    angle = np.arccos(unit(g) @ unit(g_p))
    arc = np.sin((1 - alpha) * angle) * unit(g) + np.sin(alpha * angle) * unit(g_p)
    return np.linalg.norm(g_p) * arc / np.sin(angle), memory


def sagm(grad: Any, w: Any, t: int, memory: Any, *, rho: float, alpha: float) -> Any:
    """Wang et al.: SAM from an extrapolated point, the mean of both gradients."""
    del t
    g = grad(w)
    return (g + grad(w + (rho / np.linalg.norm(g) - alpha) * g)) / 2, memory


def bsam(grad: Any, w: Any, t: int, memory: Any, *, noise: Any, rho: float, rate: float, n: int) -> Any:
    """Moellenhoff and Khan, in the order of their code: the step divides by the old precision."""
    b1, b2, delta, damping = 0.9, 0.999, 1e-4, 0.1
    m, s = (np.zeros(SIZE), np.ones(SIZE)) if memory is None else np.split(memory, 2)
    g = grad(w + noise[t] / np.sqrt(n * s))
    g_p = grad(w + rho * g / s)
    m = b1 * m + (1 - b1) * (g_p + delta * w)
    new_s = b2 * s + (1 - b2) * (np.sqrt(s) * np.abs(g) + damping + delta)
    return -rate * m / s, np.concatenate([m, new_s])


def looksam(grad: Any, w: Any, t: int, memory: Any, *, rho: float, k: int, alpha: float, parts: Any) -> Any:
    """Liu et al.: SAM every k steps, in between the part of it that was orthogonal to the clean gradient."""
    g = grad(w)
    if t % k == 0:
        g_p = grad(w + rho * unit(g))
        kept = [g_p[i] - (g_p[i] @ g[i]) / (g[i] @ g[i]) * g[i] for i in parts]
        return g_p, np.concatenate([*kept, [np.linalg.norm(v) for v in kept]])
    g_v = memory[:SIZE]  # After which its norms are kept.
    reused = [alpha * np.linalg.norm(g[i]) / (np.linalg.norm(g_v[i]) + 1e-8) * g_v[i] for i in parts]
    return g + np.concatenate(reused), memory


def same(
    grad: Any, w: Any, t: int, memory: Any, *, rho: float, gains: Any, clean_gains: Any = (0.0,) * 4
) -> Any:
    """Luong's notes: gains on the coordinates whose ratio r is > 1, in (0, 1), < -1, in (-1, 0)."""
    del t
    g = grad(w)
    g_p = grad(w + rho * unit(g))
    kind = checkpoint(g_p / g)
    return np.asarray(gains)[kind] * g_p + np.asarray(clean_gains)[kind] * g, memory


def friendly_sam(grad: Any, w: Any, t: int, memory: Any, *, rho: float, sigma: float, decay: float) -> Any:
    """Li, Zhou et al.: up along what the average of the steps before does not explain."""
    g = grad(w)
    if t == 0:
        return grad(w + rho * unit(g)), g
    return grad(w + rho * unit(g - sigma * memory)), decay * memory + (1 - decay) * g


def vasso(grad: Any, w: Any, t: int, memory: Any, *, rho: float, theta: float) -> Any:
    """Li and Giannakis: up along the average, the new gradient included."""
    g = grad(w)
    average = g if t == 0 else (1 - theta) * memory + theta * g
    return grad(w + rho * unit(average)), average


def async_sam(grad: Any, w: Any, t: int, memory: Any, *, rho: float) -> Any:
    """Jo et al., a delay of one step: up along the clean gradient of the step before."""
    g = grad(w)
    return grad(w + rho * unit(g if t == 0 else memory)), g


def one_gradient(grad: Any, w: Any, t: int, memory: Any, *, rho: float) -> Any:
    """The same with the perturbed gradient of the step before, and nothing at first."""
    g = grad(w if t == 0 else w + rho * unit(memory))
    return g, g


def cr_sam(grad: Any, w: Any, t: int, memory: Any, *, rho: float, gamma: float, beta: float) -> Any:
    """Wu, Luo et al., as their code has it: the differences of the gradients on both sides."""
    del t
    g = grad(w)
    up, down = grad(w + rho * unit(g)), grad(w - rho * unit(g))
    return up + gamma * (up + down - 2 * g) + beta * (up - down), memory


def eigen_sam(
    grad: Any, w: Any, t: int, memory: Any, *, start: Any, rho: float, alpha: float, every: int, n: int
) -> Any:
    """Luo et al.: towards the first eigenvector of the Hessian, by power iterations every few steps."""
    v = start if t == 0 else memory
    if t % every == 0:
        for _ in range(n):
            v = unit(hessian_times(grad, w, v))
    g = grad(w)
    e = unit(g) + alpha * np.sign(g @ v) * (v - (unit(g) @ v) * unit(g))
    return grad(w + rho * e), v


def ssam_f(grad: Any, w: Any, t: int, memory: Any, *, rho: float, sparsity: float, every: int) -> Any:
    """Mi et al., algorithm 2, with the gradients of batches: the largest of the summed squares."""
    mask, squares = (np.zeros_like(w),) * 2 if t == 0 else np.split(memory, 2)
    g = grad(w)
    direction = grad(w + rho * mask * unit(g))
    squares = squares + g**2
    if t % every == 0:
        mask, squares = squares >= np.sort(squares)[round(sparsity * SIZE)], np.zeros_like(w)
    return direction, np.concatenate([mask, squares])


def ssam_d(
    grad: Any,
    w: Any,
    t: int,
    memory: Any,
    *,
    draws: Any,
    rho: float,
    sparsity: float,
    every: int,
    drop: float,
) -> Any:
    """Mi et al., algorithm 3: the smallest gradients leave the mask, and as many others are drawn."""
    mask = np.zeros_like(w) if t == 0 else memory
    g = grad(w)
    direction = grad(w + rho * mask * unit(g))
    if t % every == 0:
        live = SIZE - round(sparsity * SIZE)
        inside, outside = np.flatnonzero(mask), np.flatnonzero(mask == 0)
        kept = inside[np.argsort(-np.abs(g[inside]))][: live - int(drop * live)]
        drawn = outside[np.argsort(draws[t][outside])][: live - len(kept)]
        mask = np.isin(np.arange(SIZE), [*kept, *drawn]).astype(float)
    return direction, mask


def sampa(grad: Any, w: Any, t: int, memory: Any, *, rho: float, rate: float, mix: float) -> Any:
    """Xie et al.: perturbed along the gradient at the auxiliary point, which a descent step follows."""
    m = np.zeros_like(w) if t == 0 else memory
    ahead = grad(w - rate * m)
    return (1 - mix) * grad(w + rho * unit(m)) + mix * ahead, ahead


def preconditioned_sam(
    grad: Any, w: Any, t: int, memory: Any, *, rho: float, power: float, decay: float
) -> Any:
    """Singh et al.: up along the gradient as Adam scales it, by the second moment that Adam would have."""
    nu, g = np.zeros_like(w) if t == 0 else memory, grad(w)
    g_p = grad(w + rho * unit(g / (nu**power + 1e-8)))
    return g_p, decay * nu + (1 - decay) * g_p**2


def sam_sps(
    grad: Any, w: Any, t: int, memory: Any, *, loss: Any, rho: float, most: float, decay: float
) -> Any:
    """Oikonomou and Loizou: Polyak's step size at the perturbed point."""
    del t
    e = rho * unit(grad(w))
    g_p = grad(w + e)
    rate = np.clip((loss(w + e) - g_p @ e) / (g_p @ g_p), 0.0, most)
    return -rate * (g_p + decay * w), memory


def lookbehind(
    grad: Any, w: Any, t: int, memory: Any, *, rho: float, k: int, alpha: Any, rate: float, momentum: float
) -> Any:
    """Mordido et al., algorithm 1: up from point to point, down by momentum, and a part of the way back."""
    velocity = np.zeros_like(w) if t == 0 else memory
    p, fast = w, [w]
    for _ in range(k):
        p = p + rho * unit(grad(p))
        velocity = momentum * velocity + grad(p)
        fast.append(fast[-1] - rate * velocity)
    first, way = fast[1] - w, fast[-1] - w
    if alpha == "adaptive":
        cosines = [first[i] @ way[i] / np.linalg.norm(first[i]) / np.linalg.norm(way[i]) for i in LEAVES]
        alpha = np.repeat([(c + 1) / 2 for c in cosines], [4, 12, 1])
    return alpha * way, velocity


def msam(grad: Any, w: Any, t: int, memory: Any, *, rho: float, rate: float, momentum: float) -> Any:
    """Becker et al., equations of algorithm 1: down along the momentum, which is zero at first."""
    velocity = np.zeros_like(w) if t == 0 else memory
    velocity = momentum * velocity + grad(w - rho * unit(velocity))
    return -rate * velocity, velocity


def msam_along_update(
    grad: Any, w: Any, t: int, memory: Any, *, rho: float, rate: float, momentum: float
) -> Any:
    """The point further along the last update, here that of momentum."""
    velocity, update = (np.zeros_like(w),) * 2 if t == 0 else np.split(memory, 2)
    velocity = momentum * velocity + grad(w + rho * unit(update))
    return -rate * velocity, np.concatenate([velocity, -rate * velocity])


def gated(grad: Any, w: Any, t: int, memory: Any, *, rule: Any, is_open: Any, shut: Any = None) -> Any:
    """A rule in its open steps, which it counts; elsewhere the gradient, or what an optimizer makes of it."""
    count, inner = (0, None) if t == 0 else (int(memory[-1]), memory[:-1])
    if is_open(t):
        direction, inner = rule(grad, w, count, inner if count else None)
        return direction, np.append([] if inner is None else inner, count + 1)
    direction, inner = (grad(w), inner) if shut is None else shut(grad, w, t, inner)
    return direction, np.append(inner, count)


def momentum_sgd(grad: Any, w: Any, t: int, memory: Any, *, rate: float, momentum: float) -> Any:
    """Heavy ball."""
    velocity = momentum * (0.0 if t == 0 else memory) + grad(w)
    return -rate * velocity, velocity


def ae_sam(grad: Any, w: Any, t: int, memory: Any, *, rho: float, threshold: float, decay: float) -> Any:
    """Jiang et al.: SAM where the squared norm is large for its moving mean and deviation."""
    mean, variance, count = (0.0, 0.0, 0) if t == 0 else memory
    g = grad(w)
    mean = decay * mean + (1 - decay) * g @ g
    variance = decay * variance + (1 - decay) * (g @ g - mean) ** 2
    is_open = g @ g >= mean + threshold * np.sqrt(variance)
    direction = grad(w + rho * unit(g)) if is_open else g
    return direction, np.array([mean, variance, count + is_open])


def weight_noise(grad: Any, w: Any, t: int, memory: Any, *, noise: Any, scale: float, mix: float) -> Any:
    """Li et al.: noise of each output's weights by their norm, and of a vector or scalar by its own."""
    bias, kernel = w[:4], w[4:16].reshape(3, 4)
    columns = np.broadcast_to(np.linalg.norm(kernel, axis=0), (3, 4)).ravel()
    sizes = np.concatenate([np.full(4, np.linalg.norm(bias)), columns, np.abs(w[16:])])
    clean = grad(w) if mix < 1 else 0.0
    return mix * grad(w + scale * sizes * noise[t]) + (1 - mix) * clean, memory


def checkpoint(r: np.ndarray) -> np.ndarray:
    """The class, from 0, of ratios that are neither 0 nor of size 1."""
    return np.select([r > 1, (r > 0) & (r < 1), r < -1, (r < 0) & (r > -1)], [0, 1, 2, 3], default=99)


def hessian_sam(grad: Any, w: Any, t: int, memory: Any, *, rho: float, direction: Any = unit) -> Any:
    """The gradient of L + rho |grad L|; without the norm, of L + rho/2 |grad L|^2."""
    del t
    g = grad(w)
    return g + rho * hessian_times(grad, w, direction(g)), memory


def gradient_norm_penalty(grad: Any, w: Any, t: int, memory: Any, *, rho: float, r: float) -> Any:
    """Zhao et al.: the same penalty with a finite difference of length r, alpha = rho / r."""
    del t
    g = grad(w)
    alpha = rho / r
    return (1 - alpha) * g + alpha * grad(w + r * unit(g)), memory


def extragradient(grad: Any, w: Any, t: int, memory: Any, *, step: float, here: float, ahead: float) -> Any:
    """The gradient here and the one where a descent step leads."""
    del t
    g = grad(w)
    return here * g + ahead * grad(w - step * g), memory


ORACLES: dict[str, Callable[..., Any]] = {
    "sam": functools.partial(sam, rho=0.1),
    "sam_inf": functools.partial(sam, rho=0.01, direction=np.sign),
    "sam_pgd": functools.partial(several_steps, rho=0.1, n=3, stride=0.1, ball=True),
    "sam_split": functools.partial(several_steps, rho=0.1, n=2, stride=0.05, ball=False),
    "sam_free": functools.partial(several_steps, rho=0.1, n=2, stride=0.1, ball=False),
    "usam": functools.partial(sam, rho=0.01, direction=lambda g: g),
    "sam_awp": functools.partial(perturbed, rule=functools.partial(awp, rho=0.1, bound=0.05)),
    "sam_spectral": functools.partial(sam, rho=0.1, direction=lambda g: matrices(g, singular(None))),
    "sam_nuclear": functools.partial(sam, rho=0.1, direction=lambda g: matrices(g, singular(1))),
    "sam_zscore": functools.partial(
        sam, rho=0.1, direction=functools.partial(filtered, q=0.5, per_leaf=False)
    ),
    "sam_zscore_per_leaf": functools.partial(
        sam, rho=0.1, direction=functools.partial(filtered, q=0.5, per_leaf=True)
    ),
    "sam_scaled": functools.partial(sam, rho=0.1, direction=lambda g: SCALES * unit(SCALES * g)),
    "sam_random_mask": functools.partial(random_mask, rho=0.1, keep=0.6),
    "asam": functools.partial(asam, rho=0.5, eta=0.01),
    "gcsam": functools.partial(gcsam, rho=0.1, descent=True),
    "gcsam_ascent_only": functools.partial(gcsam, rho=0.1, descent=False),
    "gsam": functools.partial(gsam, rho=0.1, alpha=0.4),
    "gsam_clean": functools.partial(gsam_clean, rho=0.1, alpha=0.4),
    "wsam": functools.partial(wsam, rho=0.1, gamma=0.8),
    "gnp": functools.partial(gnp, rho=0.1, alpha=0.7, normalize=False),
    "gnp_normalized": functools.partial(gnp, rho=0.1, alpha=0.7, normalize=True),
    "unified_sam": functools.partial(sam, rho=0.02, direction=lambda g: 0.3 * g + 0.7 * unit(g)),
    "le_sam": functools.partial(le_sam, rise=0.1, rho_max=0.15),
    "stable_sam": functools.partial(stable_sam, rho=0.1),
    "xsam": functools.partial(xsam, rho=0.1, alpha=1.5),
    "sagm": functools.partial(sagm, rho=0.05, alpha=0.001),
    "decoupled_wsam": functools.partial(decoupled_wsam, rho=0.1, gamma=0.6, rate=0.01, momentum=0.9),
    "bsam": functools.partial(bsam, rho=0.05, rate=0.1, n=100),
    "looksam": functools.partial(looksam, rho=0.1, k=4, alpha=0.7, parts=(slice(None),)),
    "looksam_per_leaf": functools.partial(looksam, rho=0.1, k=2, alpha=0.7, parts=LEAVES),
    "friendly_sam": functools.partial(friendly_sam, rho=0.1, sigma=0.8, decay=0.7),
    "vasso": functools.partial(vasso, rho=0.1, theta=0.4),
    "async_sam": functools.partial(async_sam, rho=0.1),
    "async_sam_perturbed": functools.partial(one_gradient, rho=0.1),
    "cr_sam": functools.partial(cr_sam, rho=0.1, gamma=0.2, beta=0.1),
    "eigen_sam": functools.partial(eigen_sam, rho=0.1, alpha=0.3, every=2, n=3),
    "ssam_f": functools.partial(ssam_f, rho=0.1, sparsity=0.4, every=2),
    "ssam_d": functools.partial(ssam_d, rho=0.1, sparsity=0.4, every=2, drop=0.35),
    "sampa": functools.partial(sampa, rho=0.1, rate=0.05, mix=0.3),
    "preconditioned_sam": functools.partial(preconditioned_sam, rho=0.1, power=0.4, decay=0.9),
    "sam_sps": functools.partial(sam_sps, rho=0.1, most=0.2, decay=0.01),
    "lookbehind": functools.partial(lookbehind, rho=0.1, k=3, alpha=0.5, rate=0.01, momentum=0.9),
    "lookbehind_adaptive": functools.partial(
        lookbehind, rho=0.1, k=2, alpha="adaptive", rate=0.01, momentum=0.9
    ),
    "msam": functools.partial(msam, rho=0.1, rate=0.01, momentum=0.9),
    "msam_along_update": functools.partial(msam_along_update, rho=0.1, rate=0.01, momentum=0.9),
    "gated_sam": functools.partial(gated, rule=functools.partial(sam, rho=0.1), is_open=lambda t: t % 3 == 0),
    "gated_looksam": functools.partial(
        gated,
        rule=functools.partial(looksam, rho=0.1, k=2, alpha=0.7, parts=(slice(None),)),
        is_open=lambda t: t % 2 == 0,
    ),
    "gated_friendly_sam": functools.partial(
        gated,
        rule=functools.partial(friendly_sam, rho=0.1, sigma=0.8, decay=0.7),
        is_open=lambda t: t % 3 < 2,
    ),
    "gated_decoupled_wsam": functools.partial(
        gated,
        rule=functools.partial(decoupled_wsam, rho=0.1, gamma=0.6, rate=0.01, momentum=0.9),
        is_open=lambda t: t % 2 == 0,
        shut=functools.partial(momentum_sgd, rate=0.01, momentum=0.9),
    ),
    "ae_sam": functools.partial(ae_sam, rho=0.1, threshold=0.2, decay=0.6),
    "weight_noise": functools.partial(weight_noise, scale=0.1, mix=1.0),
    "weight_noise_mixed": functools.partial(weight_noise, scale=0.1, mix=0.4),
    "same": functools.partial(same, rho=0.1, gains=(2.0, 0.5, 1.5, 0.0), clean_gains=(0.0, 0.5, 0.0, 1.0)),
    "custom_same": functools.partial(same, rho=0.1, gains=(2.0, 1.0, 0.5, 2.0)),
    "saner": functools.partial(same, rho=0.1, gains=(1.0, 0.5, 1.0, 1.0)),
    "hessian_sam": functools.partial(hessian_sam, rho=0.1),
    "hessian_sam_raw": functools.partial(hessian_sam, rho=0.1, direction=lambda g: g),
    "hessian_sam_difference": functools.partial(gradient_norm_penalty, rho=0.1, r=0.01),
    "extragradient": functools.partial(extragradient, step=0.01, here=1.0, ahead=1.0),
    "extragradient_ahead": functools.partial(extragradient, step=0.01, here=0.0, ahead=1.0),
}


def trajectory(rule: Any, *, whole_optimizer: bool) -> tuple[np.ndarray, list[Any], list[Any]]:
    """Params, memory and the loss where the first gradient was taken, after every step.

    A direction goes through heavy-ball momentum first.
    """
    w, velocity, memory = first_params(), np.zeros(SIZE), None
    points, memories, losses = [], [], []
    needs_loss = "loss" in inspect.signature(rule).parameters
    for t, x in enumerate(batches()):
        visited: list[np.ndarray] = []

        def grad(point: np.ndarray, x: Any = x, visited: Any = visited) -> np.ndarray:
            visited.append(point)
            return gradient(point, x)

        more = {"loss": functools.partial(loss, x=x)} if needs_loss else {}
        direction, memory = rule(grad, w, t, memory, **more)
        losses.append(loss(visited[0], x))
        velocity = 0.9 * velocity + direction
        w = w + direction if whole_optimizer else w - 0.1 * velocity
        points.append(w)
        memories.append(memory)
    return np.array(points), memories, losses
