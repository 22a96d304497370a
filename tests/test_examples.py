"""The digits examples: they run, they compare fairly, and what they claim is true."""

import json
from pathlib import Path

import compare_variants
import digits
import digits_recipes
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
import table
import train_digits

import optax_sam

pytestmark = pytest.mark.full  # The examples are run once, with the newest versions.

SETTING = digits_recipes.Setting("momentum", None, 0.0, steps=20)


def _arm(name, setting=SETTING):
    return digits_recipes.variant_arm(name, digits_recipes.RECIPES[name].rho, setting)


def test_quick_run_as_a_user_starts_it(tmp_path):
    done = quick.program("examples/train_digits.py", "--quick", "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    for line in (
        "momentum  ",
        "sam, rho 0.7  ",
        "momentum, tuned L2 0.02  ",
        "sam 0.5, tuned L2 0.01  ",
        "smoke test, not a result\n",
    ):
        assert f"\n{line}" in done.stdout
    assert max(map(len, done.stdout.split("Written")[0].splitlines())) <= 80
    assert "does better" not in done.stdout
    assert not done.stderr  # No bar, where nobody watches.
    out = tmp_path / "out" / "quick"
    assert (out / "train_digits.png").read_bytes().startswith(b"\x89PNG")

    report = json.loads((out / "train_digits.json").read_text(encoding="utf-8"))
    assert report["options"]["seeds"] == 2
    assert report["versions"]["optax_sam"] == optax_sam.__version__
    assert list(report["arms"]) == list(report["curves"])
    for name, row in report["arms"].items():
        assert np.shape(report["curves"][name]["test"]) == (2, 10)
        final = 100 * np.array(report["curves"][name]["test"])[:, -1]
        np.testing.assert_allclose(row["final"]["values"], final, atol=1e-2)
        assert f"{row['final']['mean']:.1f} ± {row['final']['sd']:.1f}" in done.stdout


def test_comparison(tmp_path, capsys, monkeypatch):
    # Two will do for the report; every variant is trained in the test of gradient evaluations.
    assert compare_variants.RECIPES is digits_recipes.RECIPES
    some = {name: digits_recipes.RECIPES[name] for name in ("sam", "ire")}
    monkeypatch.setattr(compare_variants, "RECIPES", some)
    options = ["--epochs", "1", "--seeds", "1", "--batch-size", "500", "--output", str(tmp_path)]
    report = compare_variants.main(options)
    printed = capsys.readouterr().out
    assert len(report["arms"]) == 4
    for name, row in report["arms"].items():
        assert f"\n{name}  " in printed
        assert np.isfinite(row["final"]["mean"])
    assert "Final accuracy worse than sam, rho 0.7 on every seed: " in printed
    assert (tmp_path / "compare_variants.png").stat().st_size > 10_000
    assert (
        json.loads((tmp_path / "compare_variants.json").read_text(encoding="utf-8"))["arms"] == report["arms"]
    )


def test_comparison_leaves_out_what_needs_momentum(tmp_path, capsys, monkeypatch):
    some = {name: digits_recipes.RECIPES[name] for name in ("sam", "msam")}
    monkeypatch.setattr(compare_variants, "RECIPES", some)
    options = ["--epochs", "1", "--seeds", "1", "--batch-size", "500", "--base-optimizer", "sgd"]
    report = compare_variants.main([*options, "--output", str(tmp_path)])
    assert list(report["arms"]) == ["sgd", "sam, rho 0.7", "momentum, tuned L2 0.02"]
    assert "Left out: msam, which needs a base optimizer with momentum.\n" in capsys.readouterr().out


def test_comparison_tries_radii_on_other_seeds(capsys, tmp_path):
    options = ["--tune", "--variants", "gnp", "--epochs", "2", "--batch-size", "100"]
    found = compare_variants.main([*options, "--output", str(tmp_path)])
    assert {name: list(radii) for name, radii in found.items()} == {
        "sam": [0.49, 0.7, 0.98],
        "gnp": [0.7, 1.0, 1.4],
    }
    arm = _arm("gnp")  # With its radius, 1, and as many steps.
    (curve,) = digits.train([arm], range(5), epochs=2, batch_size=100, progress=False).values()
    assert found["gnp"][1.0] == pytest.approx(100 * curve.test[:, -1].mean(), abs=0.1)
    assert f"gnp, rho 0.7: {found['gnp'][0.7]:.1f}, 1: {found['gnp'][1.0]:.1f}, " in capsys.readouterr().out


@pytest.mark.parametrize("name", digits_recipes.RECIPES)
def test_gradient_evaluations_are_as_the_table_says(name, monkeypatch):
    calls = []

    def counted(logits, labels):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    monkeypatch.setattr(digits, "cross_entropy", counted)
    arm, recipe = _arm(name), digits_recipes.RECIPES[name]
    data = digits.load(0, 0.4)
    trainer = digits._Trainer(digits.MLP(), arm)
    state, _ = trainer.train_epoch(trainer.init(0), data, digits.batch_order(0, 1, 100)[0])
    jax.block_until_ready(state)
    jax.effects_barrier()
    assert int(state.step) == 10
    assert all(bool(jnp.all(jnp.isfinite(w))) for w in jax.tree.leaves(state.params))
    if any(row.evaluates_by_data for row in table.ROWS if row.constructor.__name__ == name):
        assert 10 < len(calls) < 20
    else:
        assert len(calls) == round(10 * (recipe.gradients + recipe.products))


def test_compiled_once_for_all_epochs_and_seeds(monkeypatch):
    traces, loss = [], digits.cross_entropy
    monkeypatch.setattr(digits, "cross_entropy", lambda *args: (traces.append(1), loss(*args))[1])
    arms = [digits_recipes.base_arm(SETTING), _arm("sam")]
    for trainer in [digits._Trainer(digits.MLP(), arm) for arm in arms]:
        traces.clear()
        for seed in (0, 1):
            state, data = trainer.init(seed), digits.load(seed, 0.4)
            for rows in digits.batch_order(seed, 3, 100):
                state, _ = trainer.timed_epoch(state, data, rows)
        assert len(traces) == 1


def test_arms_of_a_seed_are_paired():
    arms = [digits_recipes.base_arm(SETTING), _arm("sam"), digits_recipes.base_arm(SETTING)]
    states = [digits._Trainer(digits.MLP(), arm).init(3).params for arm in arms]
    for state in states[1:]:
        jax.tree.map(np.testing.assert_array_equal, states[0], state)
    # The same arm twice, with another in between, gives the same run; other seeds give other runs.
    twice = [arms[0], arms[1], arms[2]._replace(name="again")]
    curves = digits.train(twice, [3, 4], epochs=2, progress=False)
    np.testing.assert_array_equal(curves["momentum"].test, curves["again"].test)
    assert not np.array_equal(curves["momentum"].test[0], curves["momentum"].test[1])
    assert not np.array_equal(curves["momentum"].test, curves[arms[1].name].test)


@pytest.mark.parametrize("noise", [0.0, 0.1234, 0.4, 1.0])
def test_exactly_so_many_labels_are_wrong(noise):
    clean, noisy = digits.load(7, 0.0), digits.load(7, noise)
    wrong = noisy.labels != clean.labels
    assert int(jnp.sum(wrong)) == round(1000 * noise)
    np.testing.assert_array_equal(noisy.flipped, wrong)
    np.testing.assert_array_equal(noisy.images, clean.images)
    np.testing.assert_array_equal(noisy.test_labels, clean.test_labels)
    assert noisy.images.shape == (1000, 64)
    assert noisy.test_images.shape == (797, 64)
    assert set(np.unique(noisy.labels)) == set(range(10))
    np.testing.assert_allclose(jnp.mean(noisy.images, axis=0), 0.0, atol=1e-5)


def test_wrong_labels_are_spread_over_the_other_classes():
    shifts = np.concatenate(
        [(digits.load(s, 1.0).labels - digits.load(s, 0.0).labels) % 10 for s in range(5)]
    )
    counts = np.bincount(shifts, minlength=10)
    assert counts[0] == 0
    # 5000 draws from nine classes: 556 expected of each, with a standard deviation of 22.
    assert np.all(np.abs(counts[1:] - 5000 / 9) < 5 * 22.2)


def test_every_image_comes_once_in_an_epoch():
    order = digits.batch_order(2, 3, 50)
    assert order.shape == (3, 20, 50)
    for epoch in order:
        np.testing.assert_array_equal(np.sort(epoch.ravel()), np.arange(1000))
    assert digits.batch_order(2, 1, 300).shape == (1, 3, 300)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [7, 8])
def test_convolution_is_that_of_lax(stride, size):
    x = jax.random.normal(jax.random.key(0), (2, size, size, 3))
    layer = digits.Conv(5, stride)
    params = layer.init(jax.random.key(1), x)
    params = jax.tree.map(lambda w: w + 0.1, params)
    expected = jax.lax.conv_general_dilated(
        x,
        params["params"]["kernel"],
        (stride, stride),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )
    result = layer.apply(params, x)
    np.testing.assert_allclose(result, expected + params["params"]["bias"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", digits_recipes.BASES)
def test_base_optimizers_learn_with_sam_and_l2(base):
    setting = digits_recipes.Setting(base, None, 1e-3, steps=200)
    arm = _arm("sam", setting)
    curves = digits.train([arm], [0], label_noise=0.0, epochs=10, progress=False)
    assert curves[arm.name].test[0, -1] > 0.9


def test_l2_is_added_after_the_variant():
    """The step with decay differs from the one without by the decay alone: it is not perturbed."""
    data = digits.load(0, 0.4)
    directions = []
    for decay in (0.0, 0.1):
        setting = digits_recipes.Setting("sgd", 1.0, decay, steps=10)
        trainer = digits._Trainer(digits.MLP(), _arm("sam", setting))
        before = trainer.init(0)
        after, _ = trainer.train_epoch(before, data, jnp.arange(50)[None])
        directions.append(jax.tree.map(jnp.subtract, before.params, after.params))
    jax.tree.map(
        lambda plain, decayed, w: np.testing.assert_allclose(decayed, plain + 0.1 * w, atol=1e-5),
        *directions,
        before.params,
    )


def test_cnn_learns_with_the_radius_meant_for_it(tmp_path):
    options = train_digits.parse(["--model", "cnn", "--output", str(tmp_path)])
    setting = digits_recipes.Setting("momentum", None, 0.0, steps=60)
    arm = digits_recipes.variant_arm("sam", options.rho, setting)
    curves = digits.train([arm], [0], model="cnn", label_noise=0.0, epochs=3, progress=False)
    assert curves["sam, rho 0.21"].test[0, -1] > 0.85


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variant", "sma"], "argument --variant: invalid choice: 'sma' (choose from"),
        (["--base-optimizer", "lamb"], "argument --base-optimizer: invalid choice: 'lamb' (choose from"),
        (["--model", "vit"], "argument --model: invalid choice: 'vit' (choose from"),
        (["--rho", "-1"], "argument --rho: must be a number >= 0, got '-1'"),
        (["--rho", "nan"], "argument --rho: must be a number >= 0, got 'nan'"),
        (["--rho", "inf"], "argument --rho: must be a number >= 0, got 'inf'"),
        (["--variant", "ire", "--rho", "0.1"], "argument --rho: ire has no radius"),
        (
            ["--variant", "msam", "--base-optimizer", "sgd"],
            "argument --base-optimizer: msam needs a base optimizer with momentum, got 'sgd'; choose from "
            "momentum, nesterov, adam, adamw",
        ),
        (["--learning-rate", "0"], "argument --learning-rate: must be a number > 0, got '0'"),
        (["--weight-decay", "x"], "argument --weight-decay: must be a number >= 0, got 'x'"),
        (["--label-noise", "1.4"], "argument --label-noise: must be a number from 0 to 1, got '1.4'"),
        (["--epochs", "0"], "argument --epochs: must be an integer >= 1, got '0'"),
        (["--seeds", "2.5"], "argument --seeds: must be an integer >= 1, got '2.5'"),
        (["--batch-size", "1001"], "argument --batch-size: must be an integer from 1 to 1000, got '1001'"),
        (["--output", str(Path(__file__))], "argument --output: cannot make the folder"),
        (["--rate", "1"], "unrecognized arguments: --rate 1"),
    ],
)
def test_bad_options(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_digits.main(options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("program", [train_digits, compare_variants])
def test_help_names_every_option(program, capsys):
    with pytest.raises(SystemExit) as stopped:
        program.main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for option in ("base-optimizer", "learning-rate", "weight-decay", "label-noise", "epochs", "seeds"):
        assert f"--{option} " in printed
    for option in ("--batch-size", "--model", "--output", "--quick"):
        assert option in printed
    assert program.__doc__.strip() in printed


def _report(gains, tuned=80.0):
    finals = {
        "momentum": [70.0] * len(gains),
        "sam": [70.0 + g for g in gains],
        "tuned": [tuned] * len(gains),
    }
    curves = {
        name: digits.Curves(*(np.array(values)[:, None] / 100 for _ in digits.Curves._fields))
        for name, values in finals.items()
    }
    return train_digits.summarize(curves, "momentum")


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        (
            [12.0, 14.0],
            "sam does better than momentum: +13.0 ± 1.4 points of final accuracy, "
            "better on 2 and worse on 0 of 2 seeds, at ",
        ),
        (
            [4.0, -2.0],
            "sam is not clearly different from momentum: +1.0 ± 4.2 points of final accuracy, better",
        ),
        (
            [-4.0, -3.5],
            "sam does worse than momentum: -3.8 ± 0.4 points of final accuracy, better on 0 and worse",
        ),
        ([0.0, 0.0], "sam is not clearly different from momentum: +0.0 ± 0.0 points"),
        ([12.0], "sam cannot be told from momentum by one seed: +12.0 points of final accuracy, at "),
    ],
)
def test_the_sentence_says_what_came_out(gains, words):
    assert words in train_digits.meaning(_report(gains), "sam", "tuned")


@pytest.mark.parametrize(
    ("tuned", "words"), [(95.0, "13.0 points worse than"), (75.0, "7.0 points better than")]
)
def test_the_sentence_compares_with_tuned_l2(tuned, words):
    assert words in train_digits.meaning(_report([12.0, 12.0], tuned), "sam", "tuned")


def test_the_sentence_on_both_together():
    report = _report([12.0, 14.0], tuned=81.0)
    words = train_digits.meaning(report, "sam", "tuned", "sam")
    assert words.endswith(
        "Together: sam is not clearly different from tuned: +2.0 ± 1.4 points of final "
        "accuracy, better on 2 and worse on 0 of 2 seeds."
    )


def test_claim_sam_resists_wrong_labels(tmp_path):
    """The main job on two of its five seeds: 12 points of final accuracy, more than 5 on each seed."""
    options = ("--seeds", "2", "--output", str(tmp_path))
    # Compiled as users do: this one runs for longer than it compiles.
    done = quick.program("examples/train_digits.py", *options, XLA_FLAGS="")
    assert done.returncode == 0, done.stderr
    assert "\nWith the recipe otherwise unchanged, sam, rho 0.7 does better than momentum: " in done.stdout
    report = json.loads((tmp_path / "train_digits.json").read_text(encoding="utf-8"))
    gain = report["arms"]["sam, rho 0.7"]["gain_final"]
    assert gain["mean"] >= 12
    assert gain["worst"] > 5
    both = report["arms"]["sam 0.5, tuned L2 0.01"]
    assert both["gain_final"]["mean"] > gain["mean"]
    assert report["arms"]["sam, rho 0.7"]["gain_best"]["mean"] >= 2.5
