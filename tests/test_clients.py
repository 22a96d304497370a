"""Other people's programs: with the lines of `docs/guides/clients.md` they take SAM's steps."""

import functools
import pathlib
import re
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import clients
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import tiers
from flax import nnx
from flax.training import train_state
from flax.training.dynamic_scale import DynamicScale
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

import optax_sam

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "guides" / "clients.md"
RHO = 0.1

Lines = list[tuple[str, str]]


def lines_of_the_page() -> dict[str, Lines]:
    """What each section takes out and puts in, in pairs."""
    found: dict[str, Lines] = {}
    for title, body in re.findall(
        r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL
    ):
        (diff,) = re.findall(r"^```diff\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)
        found[title] = [
            tuple("\n".join(line[1:] for line in hunk.splitlines() if line[0] == sign) for sign in "-+")
            for hunk in diff.split("\n\n")
        ]
    return found


LINES = lines_of_the_page()
IMAGENET = "Flax Linen: ImageNet under pmap, with a dynamic scale"


def changed(program: str, lines: Lines) -> str:
    """The program with some of its lines replaced, at whatever depth they stand."""
    for old, new in lines:
        pattern = r"\n".join(r"(?:\1)" * bool(i) + re.escape(x) for i, x in enumerate(old.splitlines()))
        found = re.findall(rf"^( *){pattern}$", program, re.MULTILINE)
        assert len(found) == 1, old
        program = re.sub(
            rf"^( *){pattern}$", lambda m, new=new: textwrap.indent(new, m[1]), program, flags=re.MULTILINE
        )
    return program


class Client(NamedTuple):
    """A program, and how SAM is written into it by hand.

    Attributes:
      program: Its text.
      by_hand: What stands for the transformation that takes the gradient.
      is_batched_by_rho: Whether a `vmap` over radii makes other matrix products, with other rounding.
    """

    program: str
    by_hand: Lines
    is_batched_by_rho: bool = False


VALUE_AND_GRAD = ("jax.value_and_grad(", "by_hand(jax.value_and_grad)(")
EQUINOX = ("eqx.filter_value_and_grad(", "by_hand(eqx.filter_value_and_grad)(")
DECORATED = ("@eqx.filter_value_and_grad", "@by_hand(eqx.filter_value_and_grad)")

CLIENTS = {
    "Flax NNX: MNIST": Client(clients.NNX_MNIST, [("nnx.value_and_grad(", "by_hand_nnx(")]),
    "Flax: Gemma": Client(clients.GEMMA, [VALUE_AND_GRAD]),
    "Flax Linen: BatchNorm and dropout": Client(clients.LINEN_BATCH_NORM, [VALUE_AND_GRAD]),
    "nanodo: sharded params, donated state": Client(clients.NANODO, [VALUE_AND_GRAD]),
    "Haiku": Client(clients.HAIKU, [VALUE_AND_GRAD]),
    "PPO: many seeds and radii at once": Client(clients.PPO, [VALUE_AND_GRAD], is_batched_by_rho=True),
    "numpyro: SVI": Client(clients.SVI_PROGRAM, [("= optax.adam(", "= svi_by_hand(optax.adam)(")]),
    "Equinox: MNIST": Client(clients.EQUINOX_MNIST, [EQUINOX]),
    "Equinox: RNN": Client(clients.EQUINOX_RNN, [DECORATED]),
    "Equinox: BatchNorm and SpectralNorm": Client(
        clients.EQUINOX_BATCH_NORM,
        [("grads, state = eqx.filter_grad(", "(_, state), grads = by_hand(eqx.filter_value_and_grad)(")],
    ),
    "Equinox: a frozen layer": Client(clients.EQUINOX_FROZEN, [DECORATED]),
    "Equinox: parallel training": Client(clients.EQUINOX_PARALLEL, [EQUINOX]),
    "Equinox: fine-tuning BERT": Client(clients.EQUINOX_BERT, [DECORATED]),
}  # fmt: skip


def scale(gradient: Any) -> jax.Array:
    return RHO / jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))


def by_hand(transform: Callable[..., Any]) -> Callable[..., Any]:
    """A transform such as `jax.value_and_grad` whose gradient is the one at the perturbed point."""

    def transformed(fun: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        value_and_grad = transform(fun, **options)

        def run(params: Any, *args: Any) -> Any:
            again = jax.tree.map(lambda x: x, args)  # An `eqx.nn.State` serves once.
            output, clean = value_and_grad(params, *args)
            size = scale(clean)
            moved = eqx.apply_updates(params, jax.tree.map(lambda g: size * g, clean))
            return output, value_and_grad(moved, *again)[1]

        return run

    return transformed


def by_hand_nnx(fun: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    value_and_grad = nnx.value_and_grad(fun, **options)

    def run(model: Any, rngs: Any, batch: Any) -> Any:
        twin, twin_rngs = nnx.clone((model, rngs))
        output, clean = value_and_grad(model, rngs, batch)
        size = scale(clean)
        nnx.update(twin, jax.tree.map(lambda w, g: w + size * g, nnx.state(twin, nnx.Param), clean))
        return output, value_and_grad(twin, twin_rngs, batch)[1]

    return run


def svi_by_hand(transform: Any) -> Any:
    return lambda *args: svi_optimizer(transform(*args))


def svi_optimizer(tx: Any) -> Any:
    optimizer = numpyro.optim.optax_to_numpyro(tx)

    def eval_and_update(fn: Any, state: Any, forward_mode_differentiation: bool = False) -> Any:
        del forward_mode_differentiation
        output, gradient = by_hand(jax.value_and_grad)(fn, has_aux=True)(optimizer.get_params(state))
        return output, optimizer.update(gradient, state, value=output[0])

    optimizer.eval_and_update = eval_and_update
    return optimizer


class ActorCritic(nn.Module):
    @nn.compact
    def __call__(self, obs: Any) -> Any:
        hidden = nn.tanh(nn.Dense(4)(obs))
        return nn.Dense(3)(hidden), nn.Dense(1)(hidden)[..., 0]


def batch(seed: int) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(seed))
    label = jnp.arange(8) % 3
    image = jax.random.normal(keys[1], (8, 6, 6, 1))
    return {"x": jax.random.normal(keys[0], (8, 3)), "image": image, "label": label}


def run(program: str, rho: float) -> tuple[list[Any], int]:
    """The arrays that the program leaves, and how often its loss was traced."""
    traces: list[int] = []
    names = {
        "Any": Any, "NamedTuple": NamedTuple, "functools": functools, "jax": jax, "jnp": jnp, "optax": optax,
        "nnx": nnx, "nn": nn, "train_state": train_state, "TrainState": train_state.TrainState,
        "eqx": eqx, "hk": hk,
        "numpyro": numpyro, "dist": dist, "SVI": SVI, "Trace_ELBO": Trace_ELBO, "AutoNormal": AutoNormal,
        "optax_sam": optax_sam, "sam": optax_sam.sam(rho), "ActorCritic": ActorCritic,
        "by_hand": by_hand, "by_hand_nnx": by_hand_nnx, "svi_by_hand": svi_by_hand,
        "learning_rate": 0.05, "momentum": 0.9, "radii": jnp.array([rho]), "traced": lambda: traces.append(1),
        "batches": [batch(seed) for seed in range(3)],
    }  # fmt: skip
    exec(compile(program, "client", "exec"), names)
    return jax.device_get(jax.tree.leaves(names["result"])), len(traces)


def test_the_page_and_the_programs_are_the_same() -> None:
    assert [*LINES] == [*CLIENTS, IMAGENET]


@pytest.mark.parametrize("name", tiers.later(CLIENTS, ["Flax NNX: MNIST"]))
def test_client(name: str) -> None:
    client = CLIENTS[name]
    sharp_program = changed(client.program, LINES[name])
    hand_program = client.program
    for old, new in client.by_hand:
        assert hand_program.count(old) == 1
        hand_program = hand_program.replace(old, new)

    plain, traces = run(client.program, 0.0)
    zero, _ = run(sharp_program, 0.0)
    if client.is_batched_by_rho:
        chex.assert_trees_all_close(zero, plain, rtol=1e-5, atol=1e-7)
    else:
        chex.assert_trees_all_equal(zero, plain)

    sharp, sharp_traces = run(sharp_program, RHO)
    hand, _ = run(hand_program, RHO)
    chex.assert_trees_all_close(sharp, hand, rtol=1e-4, atol=1e-5)
    assert sharp_traces == traces

    assert max(np.max(np.abs(a - b)) for a, b in zip(sharp, plain, strict=True)) > 1e-4


# On eight devices, in half precision.


class TinyResNet(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        y = nn.BatchNorm(use_running_average=not train, dtype=self.dtype)(nn.Dense(6, dtype=self.dtype)(x))
        return jnp.asarray(nn.Dense(3, dtype=self.dtype)(x + nn.relu(y)), jnp.float32)


@pytest.mark.full
@pytest.mark.parametrize("half_precision", [False, True])
def test_imagenet(half_precision: bool) -> None:
    """Linen, pmap over 8 devices, BatchNorm, dynamic scale, an L2 penalty in the loss."""
    images = jax.random.normal(jax.random.key(0), (8, 4, 6))
    labels = jnp.arange(32).reshape(8, 4) % 3

    def train(source: str, sam: Any) -> Any:
        names = {
            **globals(), "lax": jax.lax, "sam": sam, "images": images, "labels": labels,
            "network": TinyResNet(jnp.float16 if half_precision else jnp.float32),
            "dynamic_scale": DynamicScale() if half_precision else None,
        }  # fmt: skip
        exec(source, names)
        state = jax.device_get(names["state"])
        for leaf in jax.tree.leaves(state.params):
            np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
        return state, jax.device_get(names["loss"])

    sharp_program = changed(clients.IMAGENET, LINES[IMAGENET])
    plain, _ = train(clients.IMAGENET, None)
    zero, _ = train(sharp_program, optax_sam.sam(0.0))
    sharp, loss = train(sharp_program, optax_sam.sam(0.2))
    chex.assert_trees_all_close(
        (zero.params, zero.batch_stats), (plain.params, plain.batch_stats), rtol=0.01, atol=1e-3
    )
    assert np.all(np.isfinite(loss))
    kernels = [state.params["Dense_1"]["kernel"] for state in (plain, sharp)]
    assert np.max(np.abs(kernels[0] - kernels[1])) > 1e-3
    if half_precision:
        np.testing.assert_array_equal(zero.dynamic_scale.scale, plain.dynamic_scale.scale)
