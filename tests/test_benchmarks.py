"""The benchmarks run in their shortest form and count what they say; how long things take is not tested."""

from pathlib import Path

import by_hand
import cheap_sam
import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import scaling
import step_cost
import timing
from quick import QUICK

PROGRAMS = {
    cheap_sam: ["--methods", "sam"],
    peers: [],
    scaling: ["--variants", "sam"],
    step_cost: ["--networks", "mlp", "--variants", "sam"],
}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda module: module.__name__)
def test_quick_form(program, tmp_path, capsys):
    report = program.main(["--quick", "--output", str(tmp_path), *PROGRAMS[program]])
    printed = capsys.readouterr().out
    assert report
    assert f"jax {jax.__version__}" in printed
    assert "CPU cores" in printed
    assert printed.count("\n|") > 3
    assert (tmp_path / f"{program.__name__}.png").stat().st_size > 1000


def test_step_cost_on_devices(tmp_path):
    options = ["--quick", "--devices", "8", "--rounds", "0", "--networks", "mlp", "--variants", "sam"]
    (rows,) = step_cost.main([*options, "--output", str(tmp_path)]).values()
    assert [row[0] for row in rows] == ["sgd", "sam, global", "sam, local"]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda module: module.__name__)
def test_help_and_bad_output(program, capsys):
    with pytest.raises(SystemExit) as stopped:
        program.main(["--help"])
    assert stopped.value.code == 0
    assert "--quick" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        program.main(["--quick", "--output", str(Path(__file__))])
    assert "argument --output: cannot make the folder" in capsys.readouterr().err


def test_pairs_of_times():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = timing.interleaved(calls, rounds=3, seconds=0.0)
    assert order == [*"aabb", *"ab", *"ba", *"ab"]
    assert [len(values) for values in times.values()] == [3, 3]
    assert timing.ratio({"a": [2.0, 6.0, 4.0], "b": [1.0, 2.0, 1.0]}, "a", "b") == (3.0, 2.5, 3.5)
    assert f"{timing.spread([1.0, 2.0, 3.0]):.1f}" == "2.0 (1.5-2.5)"


def test_handwritten_rules_are_those_of_the_library():
    """What costs are compared with computes the same: params and loss of three steps."""

    def loss(params, stats, batch):
        return jnp.mean(jnp.sin(3 * batch @ params["w"])) + 0.1 * jnp.sum(params["w"] ** 4), stats

    def walk(params, batch, name):
        rule, remembers, variant = by_hand.RULES[name]
        step, tx = by_hand.step_of_variant(loss, variant)
        ours, theirs = (params, tx.init(params), ()), (params, by_hand.hand_state(params, remembers), ())
        for _ in range(3):
            *ours, value = step(*ours, batch)
            *theirs, expected = by_hand.hand_step(loss, rule)(*theirs, batch)
        return (ours[0]["w"], value), (theirs[0]["w"], expected)

    def run(params, batch):
        return {name: walk(params, batch, name) for name in by_hand.RULES if name != "sgd"}

    params = {"w": jnp.array([[0.5, -1.0], [1.5, 0.3], [-0.2, 0.7]])}
    ends = jax.jit(run, compiler_options=QUICK)(params, jnp.eye(3))
    for name, (ours, theirs) in ends.items():
        for x, y in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6, err_msg=name)
    assert len({np.asarray(w).tobytes() for (w, _), _ in ends.values()}) == len(ends)  # Each its own rule.
