"""The examples on wrong labels, fine-tuning, attacks, clients and an own variant: they do what they say."""

import functools
import json

import adversarial
import custom_variant
import digits
import digits_recipes
import federated
import finetune
import jax
import jax.numpy as jnp
import label_noise
import landscape
import numpy as np
import optax
import pytest
import quick
import reporting
from matplotlib.figure import Figure

import optax_sam

pytestmark = pytest.mark.full  # The examples are run once, with the newest versions.


@pytest.mark.parametrize(
    ("program", "printed"),
    [
        ("label_noise", ["wrong labels:", "sam, rho 0.7", "momentum, tuned L2 0.02"]),
        ("finetune", ["all, momentum, 5", "head, momentum, 5"]),
        ("adversarial", ["clean", "FGSM, eps 0.05", "PGD, eps 0.05"]),
        ("federated", ["alpha 0.05, last round", "alpha 100, last round"]),
        ("custom_variant", ["momentum", "stable_sam, rho ", "sam, rho 0.85"]),
    ],
)
def test_quick_run_as_a_user_starts_it(program, printed, tmp_path):
    done = quick.program(f"examples/{program}.py", "--quick", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for words in printed:
        assert f"\n{words}" in done.stdout
    assert not done.stderr  # No bar, where nobody watches.
    tmp_path /= "quick"
    assert (tmp_path / f"{program}.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / f"{program}.json").read_text(encoding="utf-8"))
    assert report["options"]["seeds"] == 2
    assert report["versions"]["optax_sam"] == optax_sam.__version__
    assert report["meaning"] == "smoke test, not a result"
    assert f"\n{report['meaning']}\n" in done.stdout


def test_quick_run_of_the_landscape(tmp_path):
    done = quick.program("examples/landscape.py", "--quick", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert "\nsmoke test, not a result\n" in done.stdout
    assert "\nlambda 1 " in done.stdout
    for name in ("landscape.png", "landscape.json"):
        assert (tmp_path / "quick" / name).stat().st_size > 500


@pytest.mark.parametrize("program", [label_noise, finetune, adversarial, federated, custom_variant])
def test_help_and_bad_options(program, capsys):
    for options, code in ((["--help"], 0), (["--seeds", "0"], 2)):
        with pytest.raises(SystemExit) as stopped:
            program.main(options)
        assert stopped.value.code == code
    printed = capsys.readouterr()
    assert all(option in printed.out for option in ("--seeds", "--output", "--quick"))
    assert program.__doc__.strip() in printed.out
    assert "argument --seeds: must be an integer >= 1, got '0'" in printed.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rho", "0"], "argument --rho: must be a number > 0, got '0'"),
        (["--size", "1"], "argument --size: must be an integer >= 2, got 1"),
        (["--output", "/dev/null/x"], "argument --output: cannot make the folder '/dev/null/x'"),
    ],
)
def test_the_landscape_checks_its_options_before_it_trains(options, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        landscape.main(["--output", str(tmp_path), *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_comparisons_are_paired():
    report = reporting.compare({"here": {"base": np.array([1.0, 9.0]), "sam": np.array([2.0, 8.5])}})
    gain = report["here"]["sam"]["gain"]
    assert (gain["values"], gain["worst"], gain["wins"]) == ([1.0, -0.5], -0.5, 1)
    assert gain["mean"] == pytest.approx(0.25)
    assert gain["sd"] == pytest.approx(1.5 / 2**0.5)
    assert reporting.standard_errors(gain) == pytest.approx(0.25 / 0.75)
    assert "+0.2 ± 1.1" in reporting.comparison_table(report, "accuracy")
    assert "1 of 2" in reporting.comparison_table(report, "accuracy")


@pytest.mark.parametrize(
    ("gains", "word"),
    [
        # By the tables 12.71 standard errors are needed with two seeds, 4.30 with three, 2.78 with five.
        ([1.0, 1.0], "unclear"),  # No spread to compare with.
        ([0.4, 0.7 - 0.3], "unclear"),  # Nor with one of rounding.
        ([1.0, 0.9], "better"),  # 19
        ([1.0, 0.8], "unclear"),  # 9
        ([1.2, 2.0, 2.8], "better"),  # 4.33
        ([1.0, 2.0, 3.0], "unclear"),  # 3.46
        ([0.1, 0.2, 3.0], "unclear"),  # 1.2
        ([5.0, 5.1, 4.9, 5.0, -0.1], "better"),  # 3.9
        ([1.0, 1.0, 0.0], "unclear"),
        ([0.0, 0.0], "unclear"),
        ([50.0], "unclear"),  # One seed cannot tell.
    ],
)
@pytest.mark.parametrize("lower_is_better", [False, True])
def test_the_rule_of_what_helps(gains, word, lower_is_better):
    for sign in (1, -1):
        gain = reporting.gain_over(
            sign * np.array(gains), np.zeros(len(gains)), lower_is_better=lower_is_better
        )
        better = (sign > 0) != lower_is_better
        opposite = {"better": "worse", "unclear": "unclear"}
        assert reporting.judge(gain) == (word if better else opposite[word])
        assert gain["worst"] == (sign * min(gains) if better else sign * max(gains))


def test_finetune_groups_by_the_rule():
    gains = {"a": [1.2, 2.0, 2.8], "b": [-1.2, -2.0, -2.8], "c": [5.0, 5.0, -0.1]}
    rows = {name: {"with SAM": {"gain": reporting.gain_over(v, np.zeros(3))}} for name, v in gains.items()}
    assert finetune.meaning(rows) == (
        "SAM better (paired t-test, 5 %): a (+2.0).\nWorse: b (-2.0).\nNot clearly different: c (+3.3)."
    )


def test_a_band_is_the_mean_and_the_range():
    axes = Figure().subplots()
    reporting.band(axes, [1, 2], np.array([[0.0, 4.0], [2.0, 8.0]]), reporting.RED)
    (line,), (area,) = axes.lines, axes.collections
    np.testing.assert_array_equal(line.get_xydata(), [[1, 1], [2, 6]])
    assert line.get_color() == reporting.RED
    bounds = area.get_paths()[0].vertices
    assert {tuple(corner) for corner in bounds.tolist()} == {(1, 0), (1, 2), (2, 4), (2, 8)}


# Wrong labels.


def test_training_at_once_is_training_one_by_one():
    setting = digits_recipes.Setting("momentum", None, 0.0, steps=4)
    arm = digits_recipes.variant_arm("sam", 0.7, setting)
    kept = {"epochs": 2, "batch_size": 500}
    data = digits.stack(digits.load(5, noise) for noise in (0.2, 0.6))
    np.testing.assert_array_equal(data.flipped.sum(axis=1), [200, 600])
    _, together = digits.train_at_once(arm, [5, 5], data, **kept)
    alone = digits.train([arm], [5], label_noise=0.6, progress=False, **kept)[arm.name]
    for name in ("test", "train", "memorised"):
        # Two programs round differently, and an image may then fall on the other side.
        np.testing.assert_allclose(getattr(together, name)[1], getattr(alone, name)[0], atol=0.006)
    assert not np.array_equal(together.train[0], together.train[1])


# Fine-tuning.


@functools.cache
def _program(mode):
    return jax.jit(
        functools.partial(
            finetune.fit, layers=finetune.TRAINED[mode], base=finetune.BASES["momentum"], rate=0.1
        )
    )


def _finetuned(mode, rho):
    _, task = finetune.tasks(3)
    params = digits.initial_params(finetune.NETWORK, 0)
    order = finetune.batches(3, 25, 4, 20)
    return params, _program(mode)(params, jnp.asarray(rho), task, order)[0], task, order


@pytest.mark.parametrize(
    ("mode", "moving"), [("all", {"hidden", "head"}), ("adapters", {"adapter", "head"}), ("head", {"head"})]
)
def test_frozen_params_stay_bit_for_bit(mode, moving):
    before, after, _, _ = _finetuned(mode, 0.1)
    moved = {
        name.split("_")[0]
        for name in before
        if any(not np.array_equal(before[name][w], after[name][w]) for w in before[name])
    }
    assert moved == moving


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_training_of_the_head_by_hand(rho):
    """A radius of 0 is the base optimizer; what is frozen is not perturbed and does not count in the norm."""
    params, after, task, order = _finetuned("head", rho)
    head, rate = params["head"], optax.cosine_decay_schedule(0.1, 4)

    @jax.jit
    @jax.grad
    def gradient(head, rows):
        output = finetune.NETWORK.apply({"params": {**params, "head": head}}, task.images[rows])
        return digits.cross_entropy(output, task.labels[rows])

    velocity = jax.tree.map(jnp.zeros_like, head)
    for step, rows in enumerate(order):
        clean = gradient(head, rows)
        perturbed = gradient(optax.tree.add_scale(head, rho / optax.tree.norm(clean), clean), rows)
        velocity = optax.tree.add_scale(perturbed, 0.9, velocity)
        head = optax.tree.add_scale(head, -rate(step), velocity)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5), after["head"], head)


def test_tasks_share_no_image_and_labels_come_in_turn():
    first, second = finetune.tasks(4)
    images = np.concatenate([part for task in (first, second) for part in (task.images, task.test_images)])
    assert len(images) == 1797
    whole, labels = digits.pixels(np.random.default_rng(4))
    assert len(np.unique(images, axis=0)) == len(np.unique(whole, axis=0))
    assert len(first.images) + len(first.test_images) == np.sum(labels < 5)
    assert second.images.shape == (100, 64)
    for n in (5, 10, 20):
        np.testing.assert_array_equal(np.bincount(second.labels[: 5 * n]), [n] * 5)
    order = finetune.batches(4, 25, 10, 20)
    np.testing.assert_array_equal(np.bincount(order.ravel(), minlength=25), [8] * 25)


# Attacks.


def test_attacks_stay_in_their_ball_and_raise_the_loss():
    images, labels = digits.pixels(np.random.default_rng(0))
    scaling = digits.scale(images)
    images, labels = jnp.float32(images[:100]), jnp.asarray(labels[:100])
    params = digits.initial_params(adversarial.MODEL, 0)

    @jax.jit
    def loss(images):
        return digits.cross_entropy(adversarial.logits(params, scaling, images), labels)

    for eps in (0.02, 0.1):
        attacked = {
            "fgsm": adversarial.fgsm(loss, images, eps),
            "pgd": adversarial.pgd(loss, images, eps, jax.random.key(1), 10),
        }
        for result in attacked.values():
            assert float(jnp.max(jnp.abs(result - images))) <= eps * (1 + 1e-5)
            assert 0.0 <= float(result.min()) <= float(result.max()) <= 1.0
        assert float(loss(images)) < float(loss(attacked["fgsm"])) < float(loss(attacked["pgd"]))
    assert jnp.array_equal(adversarial.pgd(loss, images, 0.0, jax.random.key(1), 2), images)


def test_the_attacked_network_is_the_trained_one():
    """It sees pixels from 0 to 1, and was trained on standardised ones."""
    data = digits.load(6, 0.0)
    images, _ = digits.pixels(np.random.default_rng(6))
    params = digits.initial_params(adversarial.MODEL, 0)
    scaled = adversarial.logits(params, digits.scale(images), jnp.float32(images[1000:]))
    expected = adversarial.MODEL.apply({"params": params}, data.test_images)
    np.testing.assert_allclose(scaled, expected, rtol=1e-4, atol=1e-4)


# Clients.


@pytest.mark.parametrize("alpha", [0.01, 0.5, 1000.0])
def test_dirichlet_split_is_a_partition(alpha):
    labels = np.asarray(digits.load(0, 0.0).labels)
    parts = federated.dirichlet_split(labels, 10, alpha, np.random.default_rng(1))
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(1000))
    counts = np.array([np.bincount(labels[part], minlength=10) for part in parts])
    if alpha == 1000.0:
        assert np.all(np.abs(counts - np.bincount(labels) / 10) < 3)
    if alpha == 0.01:  # Nearly all images of most digits are with one client.
        assert np.median(counts.max(axis=0) / np.bincount(labels)) > 0.9
    parts.append(np.array([], int))  # A client without images is possible.
    plan = federated.plan(parts, 3, 2, np.random.default_rng(2))
    assert plan.shape == (3, 11, 2, federated.BATCH_SIZE)
    for client, part in enumerate(parts[:-1]):
        assert set(plan[:, client].ravel()) <= set(part)


def test_a_round_is_local_steps_from_the_same_params_and_their_weighted_mean(monkeypatch):
    """By hand, client by client; traced once for all clients, rounds and weights."""
    traces, cross_entropy = [], digits.cross_entropy
    monkeypatch.setattr(digits, "cross_entropy", lambda *args: (traces.append(1), cross_entropy(*args))[1])
    data, arm = digits.load(0, 0.0), federated.arms(0.2)[1]
    params = digits.initial_params(federated.MODEL, 0)
    program = jax.jit(functools.partial(federated.federated_round, arm))

    @jax.jit
    @jax.grad
    def gradient(params, rows):
        logits = federated.MODEL.apply({"params": params}, data.images[rows])
        return cross_entropy(logits, data.labels[rows])

    def by_hand(params, batches):
        for rows in batches:
            clean = gradient(params, rows)
            perturbed = gradient(optax.tree.add_scale(params, 0.2 / optax.tree.norm(clean), clean), rows)
            params = optax.tree.add_scale(params, -federated.LEARNING_RATE, perturbed)
        return params

    rng = np.random.default_rng(0)
    for weights in ([0.2, 0.3, 0.5], [1.0, 0.0, 0.0]):
        rows = jnp.asarray(rng.integers(0, 1000, (3, 2, federated.BATCH_SIZE)))
        result, accuracy = program(params, data, rows, jnp.asarray(weights))
        assert 0.0 <= float(accuracy) <= 1.0
        ends = [by_hand(params, batches) for batches in rows]
        expected = jax.tree.map(lambda *x, c=weights: sum(a * b for a, b in zip(c, x, strict=True)), *ends)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), result, expected)
    assert len(traces) == 1


# A variant of one's own.


def test_stable_sam_on_worked_numbers():
    """SAM's direction in the length of the clean gradient, and nothing at a zero gradient."""
    variant = custom_variant.stable_sam(0.1)
    with jax.enable_x64(True):
        for start, expected in (([1.0, 1.0], [10.0077448218, 0.919262520881]), ([0.0, 0.0], [0.0, 0.0])):
            params = jnp.array(start)
            value_and_grad = optax_sam.sam_value_and_grad(lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2, variant)
            _, grads = value_and_grad(params, state=variant.init(params))
            direction, _ = variant.update(grads, variant.init(params), params)
            np.testing.assert_allclose(direction, expected, rtol=1e-10)


def test_the_file_of_a_variant_is_short():
    assert len((quick.ROOT / "examples" / "custom_variant.py").read_text(encoding="utf-8").splitlines()) <= 60
