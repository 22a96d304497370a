"""The defaults are those that docs/tuning.md names and that benchmarks/defaults.py measures."""

import inspect
import pathlib
import re

import defaults
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import table

import optax_sam

TUNING = (pathlib.Path(__file__).resolve().parent.parent / "docs" / "tuning.md").read_text(encoding="utf-8")
# `| `wsam` | rho 0.05, gamma 0.6 | ...`, in the table of defaults.
ROWS = {
    name: {key: float(value) for key, value in (pair.split() for pair in values.split(", "))}
    for name, values in re.findall(r"^\| `(\w+)` \| ((?:\w+ [\d.]+(?:, )?)+) \|", TUNING, re.MULTILINE)
}


def test_every_constructor_with_a_radius_has_a_row():
    names = {row.constructor.__name__ for row in table.ROWS} | {"shifted_msam", "functional_sam"}
    assert ROWS.keys() == {name for name in names if hasattr(optax_sam, name)}  # Gated rows are of the table.


@pytest.mark.parametrize("name", ROWS)
def test_default_is_the_one_that_is_documented(name):
    parameters = inspect.signature(getattr(optax_sam, name)).parameters
    for key, value in ROWS[name].items():
        if parameters[key].default is not None:
            assert parameters[key].default == value


def test_gamma_that_none_stands_for():
    params = jnp.zeros(2)
    pair = optax_sam.SAMGradients(jnp.array([1.0, 2.0]), jnp.array([3.0, -1.0]))
    makers = {
        "wsam": optax_sam.wsam,
        "decoupled_wsam": lambda **more: optax_sam.decoupled_wsam(optax.sgd(0.1), 0.1, **more),
    }
    for name, make in makers.items():
        gamma = ROWS[name]["gamma"]
        assert gamma == defaults.CASES[name].none["gamma"]
        directions = [v.update(pair, v.init(params), params)[0] for v in (make(), make(gamma=gamma))]
        np.testing.assert_array_equal(*directions)


@pytest.mark.parametrize("name", defaults.CASES)
def test_default_is_measured(name):
    case = defaults.CASES[name]
    assert case.default() in case.settings
    assert ROWS[case.constructor.__name__].items() >= case.default().items()


def test_rule_of_what_is_safe():
    def row(variant, accuracy, labels="wrong", rho=0.05):
        cell = {"network": "mlp", "rate": 0.1, "labels": labels, "accuracy": accuracy}
        settings = {} if variant == "plain" else {"rho": rho}
        return {"variant": variant, "settings": settings, **cell}

    plain = [row("plain", [80.0, 82.0]), row("plain", [95.0, 97.0], "clean")]
    good = [row("sam", [78.0, 80.0]), row("sam", [95.0, 96.0], "clean")]
    weak = [row("sam", [70.0, 72.0], rho=0.2)]
    fallen = [row("gcsam", [99.0, 10.0])]
    # No base optimizer: compared with itself at radius 0.
    alone = [row("sam_sps", [60.0, 62.0], rho=0.0), row("sam_sps", [61.0, 61.0], rho=0.1)]
    report = defaults.summarize([*plain, *good, *weak, *fallen, *alone])
    assert [entry["safe"] for entry in report] == [True, False, False, True]
    assert [entry["collapsed"] for entry in report] == [0, 0, 1, 0]
    assert [entry["default"] for entry in report] == [True, False, True, True]
    assert report[0]["clean labels"] == [-0.5]
    assert "-10.0" in defaults.table(report)


@pytest.mark.full
def test_quick_form(tmp_path, capsys):
    options = ["--quick", "--output", str(tmp_path), "--networks", "mlp", "--variants", "sam"]
    report = defaults.main(options)
    printed = capsys.readouterr().out
    assert "smoke test, not a result" in printed
    assert printed.count("\n|") > 3
    assert (tmp_path / "quick" / "defaults.json").exists()
    assert not (tmp_path / "defaults.json").exists()
    assert report == defaults.main([*options, "--tables"])
    with pytest.raises(SystemExit):
        defaults.main(["--tables", "--output", str(tmp_path)])
    assert "argument --tables: no results at" in capsys.readouterr().err
