"""The examples on what SAM is for: rounding, the two tasks, paired runs, and what is claimed of them."""

import json

import flax.linen as nn
import forgetting
import headline
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quantize
import quick
import reporting
import small_images
import vit_small_data
from matplotlib.figure import Figure

import optax_sam

pytestmark = pytest.mark.full  # The examples are run once, with the newest versions.

# Rounding.


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, 4, 5)) * rng.uniform(0.1, 10, 5)
    kernel[..., 2] = 0
    return {"kernel": kernel.astype(np.float32), "bias": rng.normal(size=5).astype(np.float32)}


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_rounding_is_to_the_nearest_of_so_many_values(weights, bits):
    few = quantize.rounded(weights, bits)
    np.testing.assert_array_equal(few["bias"], weights["bias"])
    for channel in (0, 1, 3, 4):
        w = weights["kernel"][..., channel].astype(np.float64).ravel()
        step = np.abs(w).max() / (2 ** (bits - 1) - 1)
        values = step * np.arange(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1))
        nearest = values[np.argmin(np.abs(w[:, None] - values), axis=1)]
        np.testing.assert_allclose(few["kernel"][..., channel].ravel(), nearest, rtol=1e-5, atol=1e-6)
    assert not np.any(few["kernel"][..., 2])  # And not NaN.


def test_clipping_rounds_with_a_smaller_error(weights):
    few, clipped = (np.asarray(quantize.rounded(weights, 2, clip)["kernel"]) for clip in (False, True))
    kernel = weights["kernel"]
    error, smaller = (np.sum((x - kernel) ** 2, axis=(0, 1, 2)) for x in (few, clipped))
    assert np.all(smaller <= error)
    assert np.all(smaller[[0, 1, 3, 4]] < 0.9 * error[[0, 1, 3, 4]])
    assert all(len(np.unique(np.abs(clipped[..., channel]))) == 2 for channel in (0, 1, 3, 4))
    assert not np.any(clipped[..., 2])


# Data and runs.


@pytest.mark.parametrize(("name", "side", "others"), [("digits", 8, 797), ("mnist", 28, 4000)])
def test_splits(name, side, others):
    data = small_images.load(name, 3, 1000)
    assert data.images.shape == (1000, side, side)
    assert data.test_images.shape == (others, side, side)
    images = np.asarray(data.images, np.float64)  # The sum of so many squares in float32 is rounded.
    assert np.mean(images) == pytest.approx(0, abs=1e-5)
    assert np.std(images) == pytest.approx(1, abs=1e-5)
    assert set(np.unique(data.test_labels)) == set(range(10))
    assert not np.array_equal(data.labels, small_images.load(name, 4, 1000).labels)


class Linear(nn.Module):
    """The smallest network that serves."""

    @nn.compact
    def __call__(self, images):
        return nn.Dense(10)(images.reshape(len(images), -1))


def test_a_run_is_its_steps_and_their_average():
    model, data = Linear(), small_images.load("digits", 0, 100)
    order = small_images.batch_order(0, 100, 1, 50)
    params = small_images.init(model, data.images, 0)
    run = small_images.make_run(model, lambda rate: (None, optax.sgd(rate)))
    last, averaged = run(params, data, order, 0.9, 0.5)

    # Softmax regression in plain numpy.
    images, labels = np.asarray(data.images, np.float64).reshape(100, -1), np.asarray(data.labels)
    w = np.asarray(params["Dense_0"]["kernel"], np.float64)
    b, seen = np.zeros(10), []
    for rows in np.asarray(order):
        logits = images[rows] @ w + b
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        error = (p / p.sum(axis=1, keepdims=True) - np.eye(10)[labels[rows]]) / len(rows)
        w, b = w - 0.5 * images[rows].T @ error, b - 0.5 * error.sum(axis=0)
        seen.append(w)
    np.testing.assert_allclose(last["Dense_0"]["kernel"], w, atol=1e-5)
    np.testing.assert_allclose(last["Dense_0"]["bias"], b, atol=1e-5)
    mean = (0.9 * seen[0] + seen[1]) / 1.9
    np.testing.assert_allclose(averaged["Dense_0"]["kernel"], mean, atol=1e-5)


def test_every_run_begins_alike_and_differs_by_its_optimizer():
    bench = quantize.Bench("mlp", 100, 1)
    assert set(bench.runs) == set(quantize.RUNS) == {arm.run for arm in quantize.ARMS.values()}
    for chosen in quantize.CHOSEN.values():
        assert set(chosen) == set(quantize.GRIDS)
        assert all(value in quantize.GRIDS[name] for name, value in chosen.items())
    data = small_images.load("digits", 0, 100)
    plain, sam, none = (
        bench.train(data, 0, *run).last for run in (("AdamW", 0.0), ("SAM", 0.0, 0.4), ("SAM", 0.0, 0.0))
    )
    gap = [float(optax.tree.norm(optax.tree.sub(x, plain)) / optax.tree.norm(plain)) for x in (sam, none)]
    assert gap[0] > 1e-3 > 1e-5 > gap[1]


# Two tasks.


def test_second_tasks():
    data = small_images.load("digits", 0, 1000)
    old, new = forgetting.second_task("mirrored", data)
    np.testing.assert_array_equal(new.images[:, :, ::-1], old.images)
    np.testing.assert_array_equal(new.test_labels, old.test_labels)
    old, new = forgetting.second_task("rotated", data)
    np.testing.assert_array_equal(new.test_images[0], np.rot90(old.test_images[0]))
    old, new = forgetting.second_task("classes", data)
    assert (len(old.images), len(new.images)) == (400, 400)
    assert set(np.unique(old.labels)) == set(np.unique(old.test_labels)) == set(range(5))
    assert set(np.unique(new.labels)) == set(np.unique(new.test_labels)) == set(range(5, 10))


def test_the_old_task_is_read_off_where_the_new_one_reaches_a_level():
    path = np.array([[98.0, 10.0], [90.0, 60.0], [80.0, 80.0], [85.0, 70.0], [60.0, 95.0]])
    assert forgetting.old_at(path, 5) == 98
    assert forgetting.old_at(path, 60) == pytest.approx(90)
    assert forgetting.old_at(path, 70) == pytest.approx(85)
    assert forgetting.old_at(path, 90) == pytest.approx(85 - 25 * 20 / 25)
    assert np.isnan(forgetting.old_at(path, 96))


def test_forgetting_leaves_out_what_was_not_reached():
    slow = np.array([[[98.0, 10.0], [90.0, 85.0]], [[98.0, 10.0], [90.0, 75.0]]])
    fast = np.array([[[98.0, 10.0], [80.0, 95.0]], [[97.0, 10.0], [82.0, 95.0]]])
    report = forgetting.summarize({"AdamW": fast, "SAM": slow})
    assert list(report["SAM"]["at"]) == ["70"]
    assert list(report["AdamW"]["at"]) == ["70", "80", "90"]
    before = [98 - 8 * 60 / 75, 98 - 8 * 60 / 65]
    assert report["SAM"]["at"]["70"]["values"] == pytest.approx(before, abs=1e-3)
    lines = forgetting.table("digits", report).splitlines()
    assert lines[-1].split()[-2:] == ["-", "-"]


def test_fine_tuning_measures_before_and_after():
    data = small_images.load("digits", 0, 100)
    old, new = forgetting.second_task("mirrored", data)
    tuning = forgetting.FineTuning(Linear(), 10, 0.01)
    params = small_images.init(Linear(), data.images, 0)
    path = tuning.path(params, old, new, 0)
    assert path.shape == (3, 2)
    for task, first in zip((old, new), path[0], strict=True):
        part = task.test_images[: forgetting.TEST_SIZE], task.test_labels[: forgetting.TEST_SIZE]
        assert float(small_images.accuracy(Linear(), params, *part)) == pytest.approx(first)
    assert path[2, 1] > path[1, 1] > path[0, 1]


# Patches.


def test_patches_are_squares_of_the_image():
    images = jnp.arange(2 * 28 * 28).reshape(2, 28, 28)
    rows = vit_small_data.patches(images)
    assert rows.shape == (2, 16, 49)
    for i in range(16):
        top, left = 7 * (i // 4), 7 * (i % 4)
        np.testing.assert_array_equal(rows[1, i].reshape(7, 7), images[1, top : top + 7, left : left + 7])


def test_the_networks_are_of_one_size():
    sizes = [vit_small_data.Bench(name, 1000, 1).size for name in vit_small_data.NETWORKS]
    assert max(sizes) < 1.05 * min(sizes)
    assert set(vit_small_data.RADII) == set(vit_small_data.NETWORKS)


# Reports.


def test_intervals():
    gain = reporting.gain_over(np.array([1.0, 2.0, 3.0]), np.zeros(3))
    assert reporting.interval(gain, ".2f") == "+2.00 ± 2.48"  # 4.303 / sqrt(3)
    assert reporting.interval(reporting.gain_over(np.ones(1), np.zeros(1))) == "+1.0"
    np.testing.assert_allclose(reporting.half_width(np.array([[1.0, 5], [3.0, 5]])), [12.706, 0], rtol=1e-4)


def test_names_at_the_ends_of_curves_do_not_cover_each_other():
    axes = Figure().subplots()
    axes.set(ylim=(0, 100))
    ends = {
        name: (1.0, y, "black") for name, y in {"a": 50.0, "b": 50.5, "c": 99.0, "d": 99.5, "e": 20}.items()
    }
    reporting.label_ends(axes, ends, gap=0.1)
    places = {text.get_text(): text.get_position()[1] for text in axes.texts}
    heights = [places[name] for name in ("e", "a", "b", "c", "d")]
    assert np.all(np.diff(heights) >= 0.1 - 1e-9)
    assert max(heights) <= 1


def test_the_words_say_what_came_out():
    base = np.tile([[97.0, 97.0, 97.0, 96.0, 70.0, 90.0]], (3, 1))
    noise = np.array([[0.0], [1.0], [0.5]])
    arms = {name: base + noise for name in quantize.ARMS}
    arms["SAM"] = base + noise + np.array([0, 0, 0, 0, 20, -3]) + np.array([[0.1], [0.0], [-0.1]])
    report = quantize.summarize({"digits, mlp": arms})
    words = quantize.meaning(report)
    assert "against AdamW: better: 2 bits +20.0 ± 0.2; worse: clipped -3.0 ± 0.2; unclear: float" in words
    assert "in 2 bits against the others: better: EMA +20.0 ± 0.2, tuned decay +20.0" in words
    table = quantize.table("digits, mlp", report["digits, mlp"])
    assert max(map(len, table.splitlines())) <= 80


def _write(folder, name, content):
    (folder / name).mkdir()
    (folder / name / f"{name}.json").write_text(json.dumps(content))


def test_the_headline_draws_what_was_measured(tmp_path, capsys):
    options = ["--results", str(tmp_path), "--figure", str(tmp_path / "headline.png")]
    with pytest.raises(SystemExit):
        headline.main(options)
    assert "run `python examples/train_digits.py` first" in capsys.readouterr().err

    curves = {
        "momentum": 0.7,
        "sam, rho 0.7": 0.9,
        "momentum, tuned L2 0.02": 0.92,
        "sam 0.5, tuned L2": 0.93,
    }
    rising = np.linspace(-0.2, 0, 10)
    _write(
        tmp_path,
        "train_digits",
        {"curves": {name: {"test": [(rising + y).tolist()] * 2} for name, y in curves.items()}},
    )
    few = np.array([[97.0, 97, 97, 96, 70, 90], [97.0, 97, 97, 96, 72, 90]])
    arms = {name: few + shift for name, shift in {"AdamW": 0, "tuned decay": 1, "SAM": 2}.items()}
    report = {"settings": {"mnist, mlp": quantize.summarize({"": {**arms}})[""]}}
    _write(tmp_path, "quantize", report)
    path = [[98.0, 10.0], [90.0, 60.0], [80.0, 90.0]]
    _write(tmp_path, "forgetting", {"paths": {"mnist, mlp, mirrored": {name: [path] * 2 for name in arms}}})
    report = headline.main(options)
    assert report["wrong labels"]["SAM"]["gain"]["mean"] == pytest.approx(20)
    assert report["2 bits"]["SAM"]["mean"] == pytest.approx(73)
    assert report["old task where the new one reaches 80 %"]["SAM"]["mean"] == pytest.approx(
        90 - 10 * 20 / 30
    )
    assert (tmp_path / "headline.png").read_bytes().startswith(b"\x89PNG")
    assert "2 bits: AdamW 71.0 ± 1.4, tuned decay 72.0 ± 1.4, SAM 73.0 ± 1.4\n" in capsys.readouterr().out


PROGRAMS = {"quantize": quantize, "forgetting": forgetting, "vit_small_data": vit_small_data}


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_and_bad_options(name, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        PROGRAMS[name].main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert PROGRAMS[name].__doc__.strip() in printed
    for options, words in ((["--seeds", "0"], "argument --seeds: must be an integer >= 1, got '0'"),):
        with pytest.raises(SystemExit):
            PROGRAMS[name].main([*options, "--output", str(tmp_path)])
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", [*PROGRAMS, "transformer_after"])
def test_as_a_user_starts_it(name, tmp_path):
    small = {
        "vit_small_data": ["--network", "vit", "cnn", "--train-size", "100"],
        "transformer_after": ["--seeds", "1"],
    }
    some = small.get(name, ["--data", "digits", "--model", "mlp"])
    done = quick.program(f"examples/{name}.py", "--quick", *some, "--output", str(tmp_path), timeout=240)
    assert done.returncode == 0, done.stderr
    assert not done.stderr  # No bar, where nobody watches.
    assert "\nsmoke test, not a result\n" in done.stdout
    assert (tmp_path / "quick" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "quick" / f"{name}.json").read_text(encoding="utf-8"))
    assert report["versions"]["optax_sam"] == optax_sam.__version__
    if name == "quantize":
        row = report["settings"]["digits, mlp"]["SAM"]
        assert f"{row['accuracy']['2 bits']['mean']:.1f}" in done.stdout


def test_claim_sam_survives_few_bits():
    """Digits, MLP, three seeds: less is lost in 2 bits, and nothing before rounding."""
    bench, chosen = quantize.Bench("mlp", 1000, 30), quantize.CHOSEN["digits", "mlp"]
    gains = []
    for seed in range(100, 103):
        data = small_images.load("digits", seed, 1000)
        plain = bench.train(data, seed, "AdamW", 0.0).last
        sam = bench.train(data, seed, "SAM", 0.0, chosen["SAM"]).last
        accuracies = [bench.accuracies(params, data, ("float", "2 bits")) for params in (plain, sam)]
        gains.append(np.subtract(accuracies[1], accuracies[0]))
    before, after = np.mean(gains, axis=0)
    assert before > -0.5
    assert after > 2
