"""A training run that may be killed at any moment: started again, it goes on from its last checkpoint.

`python interrupted.py DIRECTORY STEPS` prints a line after each saved step, and writes everything that
it holds at the end to `DIRECTORY/end.npz`. BatchNorm, dropout, schedules of the radius and of the
learning rate, LookSAM's memory and Adam's moments must all survive.
"""

import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState

import optax_sam


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, momentum=0.9)(nn.tanh(nn.Dense(8)(x)))
        return nn.Dense(1)(nn.Dropout(0.5, deterministic=False)(x))[..., 0]


class State(TrainState):
    batch_stats: dict
    key: jax.Array


LOOKSAM = optax_sam.looksam(rho=optax.linear_schedule(0.0, 0.2, 20), k=3)
NETWORK = Network()


def loss_fn(params, batch_stats, x, y, key):
    variables = {"params": params, "batch_stats": batch_stats}
    output, new = NETWORK.apply(variables, x, rngs={"dropout": key}, mutable=["batch_stats"])
    return jnp.mean((output - y) ** 2), new["batch_stats"]


@jax.jit
def train_step(state):
    data_key, dropout_key = jax.random.split(jax.random.fold_in(state.key, state.step))
    x = jax.random.normal(data_key, (16, 3))
    value_and_grad = optax_sam.sam_value_and_grad(loss_fn, LOOKSAM, has_aux=True)
    (_, batch_stats), grads = value_and_grad(
        state.params, state.batch_stats, x, jnp.sin(x.sum(axis=-1)), dropout_key, state=state.opt_state
    )
    return state.apply_gradients(grads=grads, batch_stats=batch_stats)


def main(directory, steps):
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = NETWORK.init(keys, jnp.ones((16, 3)))
    state = State.create(
        apply_fn=NETWORK.apply,
        params=variables["params"],
        tx=optax.chain(LOOKSAM, optax.adamw(optax.cosine_decay_schedule(0.05, steps))),
        batch_stats=variables["batch_stats"],
        key=jax.random.key(2),
    )
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager(directory / "checkpoints", options=options) as manager:
        if manager.latest_step() is not None:
            state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
        print("from", int(state.step), flush=True)
        while state.step < steps:
            state = train_step(state)
            manager.save(int(state.step), args=ocp.args.StandardSave(state))
            print(int(state.step), flush=True)
    leaves = jax.tree.leaves(state.replace(key=jax.random.key_data(state.key)))
    np.savez(directory / "end.npz", *map(np.asarray, leaves))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]))
