"""What a run holds survives: in Orbax, in flax.serialization, and a SIGKILL at any step."""

import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import chex
import flax.serialization
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import quick
import table
import tiers

import optax_sam


def trained(row: table.Row) -> Any:
    """An optimizer, params and its state after two steps."""
    variant, tx = row.optimizer()
    params = table.params()
    state = tx.init(params)
    for i in range(2):
        _, grads = optax_sam.sam_value_and_grad(table.loss, variant)(params, table.batch(seed=i), state=state)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return tx, params, state


@pytest.mark.parametrize("row", table.ROWS, ids=lambda row: row.name)
def test_flax_serialization(row: table.Row) -> None:
    tx, params, state = trained(row)
    empty = tx.init(params)
    for restored in (
        flax.serialization.from_state_dict(empty, flax.serialization.to_state_dict(state)),
        flax.serialization.from_bytes(empty, flax.serialization.to_bytes(state)),
    ):
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        chex.assert_trees_all_equal(restored, state)
        chex.assert_trees_all_equal_dtypes(restored, state)


@pytest.mark.by_tier
def test_orbax(tmp_path: Path) -> None:
    """The states of all variants in one checkpoint; with a concrete and with an abstract target."""
    made = {row.name: trained(row) for row in tiers.some(table.ROWS)}
    states = {name: state for name, (_, _, state) in made.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", states)
        checkpointer.wait_until_finished()
        empty = {name: tx.init(params) for name, (tx, params, _) in made.items()}
        for target in (empty, jax.tree.map(ocp.utils.to_shape_dtype_struct, empty)):
            restored = checkpointer.restore(tmp_path / "states", target)
            assert jax.tree.structure(restored) == jax.tree.structure(states)
            chex.assert_trees_all_equal(restored, states)
            chex.assert_trees_all_equal_dtypes(restored, states)


@pytest.mark.full
def test_killed_and_continued(tmp_path: Path) -> None:
    """A real process, killed twice at random moments, ends bit for bit like an undisturbed one."""
    steps, seed = 24, random.randrange(2**32)
    chance = random.Random(seed)
    environment = quick.environment(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache"))

    def run(name: str, last: int | None = None) -> int:
        """Trains until done, or kills a while after the step `last`. Returns where the run began."""
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        script = [sys.executable, "-W", "error", str(quick.ROOT / "tests" / "interrupted.py")]
        with (
            (directory / "errors").open("a") as errors,
            subprocess.Popen(
                [*script, str(directory), str(steps)],
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
                env=environment,
            ) as process,
        ):
            lines = iter(process.stdout)
            begin = int(next(lines, "from -1").removeprefix("from "))
            for line in lines:
                if last is not None and int(line) >= last:
                    break
            if last is not None:
                time.sleep(
                    chance.uniform(0.0, 0.05)
                )  # Somewhere in a step or in the writing of a checkpoint.
                process.kill()
        assert process.returncode == (0 if last is None else -9), (directory / "errors").read_text()
        return begin

    assert run("undisturbed") == 0
    kills = sorted(chance.sample(range(1, steps - 4), 2))
    begins = [run("killed", last) for last in kills]
    begins.append(run("killed"))
    for begin, last in zip(begins, [0, *kills], strict=True):
        assert last - 1 <= begin < steps, f"seed {seed}"  # The step that was being written may be lost.
    with np.load(tmp_path / "undisturbed" / "end.npz") as a, np.load(tmp_path / "killed" / "end.npz") as b:
        assert a.files == b.files
        for name in a.files:
            np.testing.assert_array_equal(a[name], b[name], err_msg=f"seed {seed}")
