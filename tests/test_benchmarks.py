"""The benchmarks run in their shortest form and count what they say; how long things take is not tested."""

import gzip
import json
import math
import re
from pathlib import Path

import accelerator
import by_hand
import cheap_sam
import counts
import defaults
import jax
import jax.numpy as jnp
import numpy as np
import peers
import pod_collectives
import pytest
import quick
import rounding
import scaling
import step_cost
import tiers
import timing

PROGRAMS = {
    cheap_sam: ["--methods", "plain", "sam", "every 5th step", "--tasks", "digits"],
    peers: [],
    scaling: ["--variants", "sam"],
    step_cost: ["--networks", "mlp", "--variants", "sam"],
}


@pytest.mark.full
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda module: module.__name__)
def test_quick_form(program, tmp_path, capsys):
    report = program.main(["--quick", "--output", str(tmp_path), *PROGRAMS[program]])
    printed = capsys.readouterr().out
    assert report
    assert f"jax {jax.__version__}" in printed
    assert "CPU cores" in printed
    assert printed.count("\n|") > 3
    assert "\nsmoke test, not a result\n" in printed
    assert (tmp_path / "quick" / f"{program.__name__}.png").stat().st_size > 1000
    content = json.loads((tmp_path / "quick" / f"{program.__name__}.json").read_text())
    assert f"\n{program.text_of(content)}\n" in printed


@pytest.mark.full
def test_quick_form_of_the_collectives(tmp_path):
    done = quick.program("benchmarks/pod_collectives.py", "--quick", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "quick" / "pod_collectives.json").read_text())
    ((title, rows),) = content["tables"].items()
    assert title == "8 devices, data 4 x model 2; over data, params are replicated:"
    assert [row[0] for row in rows] == list(pod_collectives.METHODS)
    assert f"\n{pod_collectives.text_of(content)}\n" in done.stdout
    assert "\nsmoke test, not a result\n" in done.stdout


@pytest.mark.full
def test_quick_form_of_the_accelerators():
    done = quick.program("benchmarks/accelerator.py", "--quick")
    assert done.returncode == 0, done.stderr
    parts = re.findall(r"^=== (.*)$", done.stdout, re.MULTILINE)
    assert len(parts) == 5
    assert not any("left out" in part for part in parts)
    assert re.search(r"^sam +\d\.\de-\d\d$", done.stdout, re.MULTILINE)
    assert re.search(r"^sam, by hand \| [\d.]+ \| [\d.]+ \| ", done.stdout, re.MULTILINE)
    assert "shows no device but the CPU" in done.stdout
    assert "\nsmoke test, not a result\n" in done.stdout


def test_gaps_of_a_profile(tmp_path):
    """Two kernels that overlap, a gap of 30, and a third; what the host does does not count."""
    events = [
        {"name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}},
        {"name": "process_name", "pid": 2, "args": {"name": "/host:CPU"}},
        {"ph": "X", "pid": 1, "ts": 0, "dur": 50},
        {"ph": "X", "pid": 1, "ts": 40, "dur": 30},
        {"ph": "X", "pid": 1, "ts": 100, "dur": 50},
        {"ph": "X", "pid": 2, "ts": 70, "dur": 30},
    ]
    path = tmp_path / "plugins" / "host.trace.json.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    assert accelerator.idle_share(tmp_path) == (30 / 150, 30)
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events[1:2]}).encode()))
    assert accelerator.idle_share(tmp_path) is None


@pytest.mark.full
def test_quick_form_of_the_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(counts, "NETWORKS", ("mlp",))
    counts.main(["--quick", "--output", str(tmp_path), "--variants", "vasso"])
    content = counts.main(["--quick", "--output", str(tmp_path), "--variants", "sam"])
    assert list(content["gradients"]) == ["sam", "vasso"]
    sam, vasso, sgd = (content["networks"]["mlp"][name] for name in ("sam", "vasso", "sgd"))
    assert 1.9 < sam["flops"] / sgd["flops"] < 2.2
    assert sam["state"] - sgd["state"] == 4  # The radius; both count their steps.
    assert 1.9 < vasso["state"] / sgd["state"] < 2.1
    assert json.loads((tmp_path / "quick" / "counts.json").read_text()) == content


@pytest.mark.full
def test_quick_form_of_rounding(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(defaults, "RECIPES", {"mlp": defaults.RECIPES["mlp"]})
    content = rounding.main(["--quick", "--output", str(tmp_path)])
    assert [(row["rate"], row["labels"]) for row in content["rows"]] == [
        (rate, labels) for labels in ("wrong", "clean") for rate in (0.02, 0.1)
    ]
    assert {np.shape(row["accuracy"]) for row in content["rows"]} == {(2, 1)}
    assert f"\n{rounding.text_of(content)}\n" in capsys.readouterr().out


def test_a_weight_is_moved_by_one_rounding():
    weights = jnp.array([1.0, -3.0, 0.1, 1e-3])
    moved = rounding.nudged({"w": weights}, jax.random.key(0))["w"]
    assert np.all(np.asarray(moved) != np.asarray(weights))
    np.testing.assert_allclose(moved, weights, rtol=2.5e-7, atol=0)


@pytest.mark.full
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


@pytest.mark.parametrize(
    ("program", "options", "message"),
    [
        (cheap_sam, ["--seeds", "0"], "argument --seeds: must be an integer >= 1, got '0'"),
        (cheap_sam, ["--epochs", "x"], "argument --epochs: must be an integer >= 1, got 'x'"),
        (cheap_sam, ["--methods", "msam"], "argument --methods: must hold plain and sam, with which"),
        (peers, ["--batch-size", "16", "0"], "argument --batch-size: must be an integer >= 1, got '0'"),
        (scaling, ["--sizes", "-5"], "argument --sizes: must be an integer >= 10, got '-5'"),
        (scaling, ["--leaves", "0"], "argument --leaves: must be an integer >= 1, got '0'"),
        (step_cost, ["--devices", "0"], "argument --devices: must be an integer >= 1, got '0'"),
        (step_cost, ["--devices", "x"], "argument --devices: must be an integer >= 1, got 'x'"),
        (
            step_cost,
            ["--devices", "8", "--guarded"],
            "argument --guarded: the rules by hand run on one device",
        ),
        (step_cost, ["--first-calls", "0"], "argument --first-calls: must be an integer >= 1, got '0'"),
        (step_cost, ["--rounds", "-1"], "argument --rounds: must be an integer >= 0, got '-1'"),
        (
            step_cost,
            ["--devices", "8", "--batch-size", "12"],
            "argument --devices: the batch of 12 must be a multiple of the 8 devices; --batch-size sets it",
        ),
    ],
)
def test_bad_options(program, options, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        program.main(["--quick", "--output", str(tmp_path), *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "names"),
    [
        (cheap_sam, "some of plain, sam, 'every 5th step', "),
        (scaling, "some of sam, asam, "),
        (step_cost, "some of sam, asam, "),
    ],
)
def test_help_lists_the_names(program, names, capsys):
    with pytest.raises(SystemExit):
        program.main(["--help"])
    assert names in " ".join(capsys.readouterr().out.split())


def test_the_share_of_a_gain_and_its_error():
    """By hand: the gains are (20, 19, 21) for SAM and (10, 10, 10) for the other."""
    scores = {"plain": [70.0, 72.0, 74.0], "sam": [90.0, 91.0, 95.0], "other": [80.0, 82.0, 84.0]}
    scores = {name: np.array(values) for name, values in scores.items()}
    assert cheap_sam.share_of_gain(scores, "sam") == (100.0, 0.0)
    share, error = cheap_sam.share_of_gain(scores, "other")
    assert share == pytest.approx(50.0)
    # The residuals 10 - (20, 19, 21) / 2 deviate by 0.5.
    assert error == pytest.approx(100 * 0.5 / math.sqrt(3) / 20)
    radii = {"plain": 0.0, "sam": 0.5, "other": 2.0}
    names = {"plain": "plain", "sam": "sam", "every 5th step": "other"}
    report = cheap_sam.summarize(
        {name: scores[of] for name, of in names.items()},
        {"plain": timing.spread([1.0])},
        {name: radii[of] for name, of in names.items()},
    )
    table = cheap_sam.table(report, "%")
    assert " 72.0 ± 2.0 |" in table
    assert " 92.0 ± 2.6 |" in table
    assert "every 5th step keeps 50 ± 1 % of SAM's gain" in cheap_sam.meaning({"task": report})


def test_growth_between_equal_sizes_is_not_a_number():
    rows = [{"size": 10, "seconds": 1.0}, {"size": 10, "seconds": 2.0}, {"size": 20, "seconds": 8.0}]
    assert scaling.exponent(rows[1:], "size", "seconds") == 2.0
    assert math.isnan(scaling.exponent(rows[:2], "size", "seconds"))
    assert math.isnan(scaling.exponent(rows[:1], "size", "seconds"))


def test_pairs_of_times():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = timing.interleaved(calls, rounds=3, seconds=0.0)
    assert order == [*"aabb", *"ab", *"ba", *"ab"]
    assert [len(values) for values in times.values()] == [3, 3]
    assert timing.ratio({"a": [2.0, 6.0, 4.0], "b": [1.0, 2.0, 1.0]}, "a", "b") == (3.0, 2.5, 3.5)
    assert f"{timing.spread([1.0, 2.0, 3.0]):.1f}" == "2.0 (1.5-2.5)"


@pytest.mark.parametrize("guarded", tiers.later([False, True], [False]))
def test_handwritten_rules_are_those_of_the_library(guarded):
    """What costs are compared with computes the same: params and loss of three steps."""

    def loss(params, stats, batch):
        return jnp.mean(jnp.sin(3 * batch @ params["w"])) + 0.1 * jnp.sum(params["w"] ** 4), stats

    def walk(params, batch, name):
        rule, remembers, variant = by_hand.RULES[name]
        step, tx = by_hand.step_of_variant(loss, variant)
        ours, theirs = (params, tx.init(params), ()), (params, by_hand.hand_state(params, remembers), ())
        for _ in range(3):
            *ours, value = step(*ours, batch)
            *theirs, expected = by_hand.hand_step(loss, rule, guarded)(*theirs, batch)
        return (ours[0]["w"], value), (theirs[0]["w"], expected)

    def run(params, batch):
        return {name: walk(params, batch, name) for name in by_hand.RULES if name != "sgd"}

    params = {"w": jnp.array([[0.5, -1.0], [1.5, 0.3], [-0.2, 0.7]])}
    ends = jax.jit(run)(params, jnp.eye(3))
    for name, (ours, theirs) in ends.items():
        for x, y in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6, err_msg=name)
    assert len({np.asarray(w).tobytes() for (w, _), _ in ends.values()}) == len(ends)  # Each its own rule.


@pytest.mark.full
def test_step_cost_against_guarded_rules(tmp_path, capsys):
    options = ["--quick", "--rounds", "0", "--networks", "mlp", "--variants", "async_sam, perturbed"]
    tables = [step_cost.main([*options, *how, "--output", str(tmp_path)]) for how in ([], ["--guarded"])]
    assert capsys.readouterr().out.count("rules by hand with guards") == 1
    plain, guarded = (dict(zip([row[0] for row in t["mlp"]], t["mlp"], strict=True)) for t in tables)
    assert plain.keys() == guarded.keys() == {"sgd", "async_sam, perturbed, by hand", "async_sam, perturbed"}
    # The library's is the same program, by hand the guards are operations more.
    name = "async_sam, perturbed"
    assert plain[name][1] == guarded[name][1]
    assert float(plain[f"{name}, by hand"][1]) < float(guarded[f"{name}, by hand"][1])


@pytest.mark.parametrize(
    "name", [name for name, (_, remembers, _) in by_hand.RULES.items() if remembers] + ["msam"]
)
def test_what_a_guarded_rule_remembers_stays_finite(name):
    def loss(params, stats, batch):
        return jnp.sum(params**2 * batch), stats

    rule, remembers, _ = by_hand.RULES[name]
    params = jnp.ones(3)
    ends = []
    for guarded in (False, True):
        state = by_hand.hand_state(params, remembers)
        step = jax.jit(by_hand.hand_step(loss, rule, guarded))
        _, (base, memory, _), _, _ = step(params, state, (), jnp.array([1.0, jnp.nan, 2.0]))
        ends.append(jnp.all(jnp.isfinite(memory if remembers else base[0].trace)))
    assert ends == [False, True]
