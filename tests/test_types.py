"""What a type checker infers of a user's script, and what it flags there; what `help` shows."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import quick

import optax_sam

# `# is: T` says what type the last name of the line has, `# flagged` that the checker must complain.
SCRIPT = """
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.training.dynamic_scale import DynamicScale
from flax.training.train_state import TrainState

import optax_sam


def loss_fn(params: optax.Params, batch: jax.Array) -> jax.Array:
    del params
    return jnp.mean(batch)


def loss_with_aux(params: optax.Params, batch: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    return loss_fn(params, batch), {"accuracy": batch}


def loss_of_any(params: Any, batch: Any) -> Any:
    return params, batch


params: optax.Params = {"w": jnp.ones(3)}
batch = jnp.ones((2, 3))
sam = optax_sam.sam(rho=0.05, steps=2, step_mode="split")
sam  # is: SharpnessAwareTransformation
tx = optax.chain(optax_sam.sam(), optax.sgd(0.1))
tx  # is: GradientTransformationExtraArgs
opt_state = tx.init(params)

# The plain door.
value_and_grad = optax_sam.sam_value_and_grad(loss_fn, sam)
value_and_grad  # is: SAMValueAndGrad[tuple[Array, SAMGradients]]
output = value_and_grad(params, batch, state=opt_state, loss_scale=2.0)
output  # is: tuple[Array, SAMGradients]
value, grads = output
updates, opt_state = tx.update(grads, opt_state, params)
params = optax.apply_updates(params, updates)
aux = optax_sam.sam_value_and_grad(loss_with_aux, sam, has_aux=True)(params, batch, state=opt_state)
aux  # is: tuple[tuple[Array, dict[str, Array]], SAMGradients]
positional = optax_sam.sam_value_and_grad(loss_with_aux, sam, 0, True)(params, batch, state=opt_state)
positional  # is: tuple[tuple[Array, dict[str, Array]], SAMGradients]
of_any = optax_sam.sam_value_and_grad(loss_of_any, sam, has_aux=True)(params, batch, state=opt_state)
of_any  # is: tuple[tuple[Array, Any], SAMGradients]
metrics = optax_sam.sam_value_and_grad(loss_fn, sam, return_metrics=True)(params, batch, state=opt_state)
metrics  # is: tuple[Array, SAMGradients, SAMMetrics]
both = optax_sam.sam_value_and_grad(
    loss_with_aux, sam, has_aux=True, return_metrics=True, num_shards=2, shard_mode="loop", batch_argnums=1
)(params, batch, state=opt_state)
both  # is: tuple[tuple[Array, dict[str, Array]], SAMGradients, SAMMetrics]
train_state = TrainState.create(apply_fn=loss_fn, params=params, tx=tx)
_, grads = value_and_grad(train_state.params, batch, state=train_state.opt_state)
train_state = train_state.apply_gradients(grads=grads)
train_state  # is: TrainState

# Flax.
model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)


def model_loss(model: nnx.Linear, x: jax.Array) -> jax.Array:
    return jnp.mean(model(x))


nnx_output = optax_sam.nnx.sam_value_and_grad(model_loss, sam)(model, batch, state=optimizer)
nnx_output  # is: tuple[Array, SAMGradients]
optimizer.update(model, nnx_output[1])
nnx_metrics = optax_sam.nnx.sam_value_and_grad(model_loss, sam, return_metrics=True, microbatch_size=1)
nnx_metrics  # is: SAMValueAndGrad[tuple[Array, SAMGradients, SAMMetrics]]
scaled = optax_sam.linen.dynamic_scale_value_and_grad(DynamicScale(), loss_with_aux, sam, has_aux=True)
scaled_output = scaled(params, batch, state=opt_state)
scaled_output  # is: tuple[DynamicScale, Array, tuple[Array, dict[str, Array]], SAMGradients]

# Equinox.
mlp = eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0))


def mlp_loss(model: eqx.nn.MLP, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y = jax.vmap(model)(x)
    return jnp.mean(y), y


eqx_value_and_grad = optax_sam.equinox.sam_value_and_grad(mlp_loss, sam, has_aux=True)
eqx_output = eqx.filter_jit(eqx_value_and_grad)(mlp, batch, state=opt_state)
eqx_output  # is: tuple[tuple[Array, Array], SAMGradients]
updates, opt_state = tx.update(eqx_output[1], opt_state, eqx.filter(mlp, eqx.is_inexact_array))


# What users write themselves.
def climb(gradient: optax.Updates, rho: Any, params: optax.Params) -> optax.Updates:
    del rho, params
    return gradient


ascent: optax_sam.Ascent = climb
optax_sam.gsam(0.1, ascent=ascent)
optax_sam.sam(optax.linear_schedule(0.0, 0.1, 10))


def always(state: optax_sam.SAMState) -> jax.Array:
    return state.step >= 0


when: optax_sam.When = always


def train(value_and_grad: optax_sam.SAMValueAndGrad[tuple[jax.Array, optax_sam.SAMGradients]]) -> None:
    value, grads = value_and_grad(params, batch, state=opt_state)
    value  # is: Array
    grads  # is: SAMGradients


train(value_and_grad)
optax_sam.sharpness_aware(0.1, climb, when=when)

# Mistakes.
value_and_grad(params, batch)  # flagged
nnx_metrics(model, batch)  # flagged
scaled(params, batch)  # flagged
eqx_value_and_grad(mlp, batch)  # flagged
optax_sam.equinox.sam_value_and_grad(mlp_loss, sam, argnums=0)  # flagged
optax_sam.sam_value_and_grad(loss_fn, tx)  # flagged
optax_sam.sam_value_and_grad(loss_fn, sam, has_aux=True)  # flagged
optax_sam.sam_value_and_grad(loss_fn, sam, num_shard=2)  # flagged
optax_sam.sam_value_and_grad(loss_fn, sam, perturbation="nonsense")  # flagged
optax_sam.sam_value_and_grad(loss_fn, sam, shard_mode="nonsense")  # flagged
optax_sam.nnx.sam_value_and_grad(model_loss, sam, perturbation="nonsense")  # flagged
optax_sam.linen.dynamic_scale_value_and_grad(DynamicScale(), loss_fn, sam, num_shard=2)  # flagged
optax_sam.sam(step_mode="nonsense")  # flagged
optax_sam.sam(roh=0.1)  # flagged
optax_sam.gsam(objective="nonsense")  # flagged
optax_sam.async_sam(reuse="nonsense")  # flagged
optax_sam.ascent.adaptive(granularity="nonsense")  # flagged
optax_sam.ascent.masked(True, norm="nonsense")  # flagged
optax_sam.weight_noise(per="nonsense")  # flagged
"""

# Strict as this project is: JAX and Flax leave some types unknown, and Optax has no marks.
STRICT = {
    "typeCheckingMode": "strict",
    "reportMissingTypeStubs": False,
    "reportUnknownArgumentType": False,
    "reportUnknownMemberType": False,
    "reportUnknownVariableType": False,
}


def check(folder: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What pyright says about the script, with `reveal_type` where the script says what a type is."""
    revealing = re.sub(r"^( *)(\w+)  (# is: .*)$", r"\1reveal_type(\2)  \3", SCRIPT, flags=re.MULTILINE)
    (folder / "script.py").write_text(revealing, encoding="utf-8")
    config = {"include": ["script.py"], "extraPaths": [str(quick.ROOT)], **settings}
    (folder / "pyrightconfig.json").write_text(json.dumps(config), encoding="utf-8")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    found = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", check=False)
    assert found.returncode in (0, 1), found.stdout + found.stderr
    return json.loads(found.stdout)["generalDiagnostics"]


@pytest.mark.full
@pytest.mark.parametrize("settings", [{"typeCheckingMode": "basic"}, STRICT], ids=["basic", "strict"])
def test_a_script_of_a_user(settings: dict[str, Any], tmp_path: Path) -> None:
    revealed: dict[int, str] = {}
    flagged: dict[int, str] = {}
    for entry in check(tmp_path, settings):
        line = entry["range"]["start"]["line"]
        if entry["severity"] == "information":
            revealed[line] = re.findall('"([^"]*)"', entry["message"])[-1]
        else:
            flagged.setdefault(line, entry["message"])
    lines = dict(enumerate(SCRIPT.splitlines()))
    types = {i: line.split("# is: ")[1] for i, line in lines.items() if "# is: " in line}
    assert {lines[i]: revealed.get(i) for i in types} == {lines[i]: types[i] for i in types}
    wrong = {i for i, line in lines.items() if "# flagged" in line}
    unexpected = {lines[i]: flagged[i] for i in flagged.keys() - wrong}
    assert not unexpected
    missed = [lines[i] for i in wrong - flagged.keys()]
    assert not missed


def public_functions(module: ModuleType) -> dict[str, Any]:
    functions = inspect.getmembers(module, inspect.isfunction)
    own = [x for name, x in functions if name[0] != "_" and x.__module__.startswith(module.__name__)]
    return {f"{module.__name__}.{x.__name__}": x for x in own}


def test_help_begins_with_a_signature_that_one_can_read() -> None:
    modules = [
        optax_sam,
        *(x for name, x in inspect.getmembers(optax_sam, inspect.ismodule) if name[0] != "_"),
    ]
    for name, function in {k: v for m in modules for k, v in public_functions(m).items()}.items():
        signature = inspect.signature(function)
        annotations = [signature.return_annotation, *(x.annotation for x in signature.parameters.values())]
        advice = f"{name}: write `from __future__ import annotations` in its file"
        assert all(isinstance(x, str) for x in annotations), advice  # As written, aliases by their names.
        assert len(str(signature)) < 700, f"{name}: {signature}"
    assert "(rho: 'optax.ScalarOrSchedule' = 0.05, " in str(inspect.signature(optax_sam.gsam))
