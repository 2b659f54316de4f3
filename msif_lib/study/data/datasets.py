"""The data sets of the study, checked file by file, and their division into two stages.

``digits`` comes with scikit-learn. ``mnist`` and ``cifar10`` come from the folder named by the
environment variable ``MSIF_DATA``, or are downloaded by torchvision where it is not set. What has
to be unpacked goes to ``MSIF_CACHE`` (``~/.cache/msif`` by default). The first folder may be
read-only; it holds

- ``MNIST/raw/`` with the four original ``.gz`` files;
- ``cifar10/`` with ``cifar-10-batches-bin.tar.xz``, the six files of the binary version of
  CIFAR-10 in a folder ``cifar-10-batches-bin/``, and ``batches.meta`` of the Python version.

The cache keeps the files of the original authors, unpacked: arrays of bytes, and the pickle of
CIFAR-10's class names. Every file is read once, and what was read is verified by its published md5
before anything is made of it, at every loading. A copy in the cache that passes is used as it
stands; one that does not is made anew.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import math
import os
import pickle
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from msif_lib.study.data.torchvision_cpu import import_torchvision
from msif_lib.study.own import is_own, own_function

T = TypeVar("T")

NAMES = ("digits", "mnist", "cifar10")

# The paper's classes: digits 0-3, then 4-9; bird and frog, then the other eight.
DEFAULT_CLASSES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "digits": ((0, 1, 2, 3), (4, 5, 6, 7, 8, 9)),
    "mnist": ((0, 1, 2, 3), (4, 5, 6, 7, 8, 9)),
    "cifar10": ((2, 6), (0, 1, 3, 4, 5, 7, 8, 9)),
}

# md5 of the .gz file, md5 of its content.
MNIST_MD5 = {
    "train-images-idx3-ubyte": (
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "6bbc9ace898e44ae57da46a324031adb",
    ),
    "train-labels-idx1-ubyte": (
        "d53e105ee54ea40749a09fcbcd1e9432",
        "a25bea736e30d166cdddb491f175f624",
    ),
    "t10k-images-idx3-ubyte": (
        "9fb629c4189551a2d022fa330f9573f3",
        "2646ac647ad5339dbf082846283269ea",
    ),
    "t10k-labels-idx1-ubyte": (
        "ec29112dd5afa0611ce80d1b7f02629c",
        "27ae3e4e09519cfbb04c329615203637",
    ),
}

CIFAR10_ARCHIVE = "cifar-10-batches-bin.tar.xz"
CIFAR10_MEMBER_MD5 = {
    "data_batch_1": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
_CIFAR10_FOLDER, _CIFAR10_META = "cifar-10-batches-bin", "batches.meta"
CIFAR10_META_MD5 = "5ff9c542aee3614f3951f8cda6e48888"

_HOW = {
    "mnist": "copy the four original .gz files of MNIST into MNIST/raw/ of the folder MSIF_DATA",
    "cifar10": (
        f"put {CIFAR10_ARCHIVE} (the six .bin files of the official binary version of CIFAR-10, "
        "packed as one folder cifar-10-batches-bin) and batches.meta of the official Python "
        "version into cifar10/ of the folder MSIF_DATA"
    ),
}


class DataFileError(RuntimeError):
    """A data file is missing, broken or half-downloaded; the message says how to get it."""


@dataclass(frozen=True)
class ImageData:
    """A data set of images with a division into training and test set.

    Attributes
    ----------
    name : str
        One of ``NAMES``.
    train_pixels, test_pixels : Tensor
        Images as stored, uint8, shape (N, channels, height, width).
    train_targets, test_targets : Tensor
        Class numbers, int64, shape (N,).
    class_names : tuple of str
        Name of each class.
    white : int
        The largest value of a pixel.
    mean, std : tuple of float
        Per channel, of pixels divided by `white`, over the training set.
    source : str
        Where the images come from, in words.
    """

    name: str
    train_pixels: Tensor
    train_targets: Tensor
    test_pixels: Tensor
    test_targets: Tensor
    class_names: tuple[str, ...]
    white: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.train_pixels.shape[1:]
        return channels, height, width

    @property
    def train_inputs(self) -> Tensor:
        """All training images, normalised, float32, shape (N, channels, height, width)."""
        return self.normalise(self.train_pixels)

    @property
    def test_inputs(self) -> Tensor:
        """All test images, normalised, float32, shape (N, channels, height, width)."""
        return self.normalise(self.test_pixels)

    def normalise(self, pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Centre and scale images: (pixels / white - mean) / std, channel by channel.

        Parameters
        ----------
        pixels : Tensor
            Images as stored, shape (B, channels, height, width).
        dtype : torch.dtype
            Of the result.

        Returns
        -------
        Tensor
            Same shape.
        """
        mean = torch.tensor(self.mean, dtype=dtype)[:, None, None]
        std = torch.tensor(self.std, dtype=dtype)[:, None, None]
        return (pixels.to(dtype) / self.white - mean) / std

    def pictures(self, pixels: Tensor) -> Tensor:
        """Images as matplotlib shows them.

        Parameters
        ----------
        pixels : Tensor
            Images as stored, shape (B, channels, height, width).

        Returns
        -------
        Tensor
            Values in [0, 1], shape (B, height, width, channels).
        """
        return (pixels.float() / self.white).permute(0, 2, 3, 1)


@dataclass(frozen=True)
class TwoStageData:
    """Pretraining set, finetuning set and finetuning test set of one data set of images.

    Labels of each stage count from 0 in the order in which its classes were named.

    Attributes
    ----------
    name : str
        Name of the data set.
    pretrain, finetune, test : tuple of Tensor
        (inputs, labels), in the paper's letters (Z, y), (X, y) and (X_test, y_test). Inputs are
        normalised, shape (N, channels, height, width); labels have shape (N,).
    pretrain_original, finetune_original, test_original : Tensor
        Class numbers in the data set, shape (N,).
    pretrain_indices, finetune_indices : Tensor
        Positions in the training set of `images`, shape (N,).
    test_indices : Tensor
        Positions in the test set of `images`, shape (N,).
    pretrain_classes, finetune_classes : tuple of int
        Classes of each stage.
    images : ImageData
        The data set.
    """

    name: str
    pretrain: tuple[Tensor, Tensor]
    finetune: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    pretrain_original: Tensor
    finetune_original: Tensor
    test_original: Tensor
    pretrain_indices: Tensor
    finetune_indices: Tensor
    test_indices: Tensor
    pretrain_classes: tuple[int, ...]
    finetune_classes: tuple[int, ...]
    images: ImageData


def cache_folder() -> Path:
    """Folder for unpacked and downloaded files: ``MSIF_CACHE``, by default ``~/.cache/msif``.

    Returns
    -------
    Path
        The folder, which need not exist.
    """
    return Path(os.environ.get("MSIF_CACHE") or "~/.cache/msif").expanduser()


def data_folder() -> Path | None:
    """Folder of original data files, ``MSIF_DATA``.

    Returns
    -------
    Path or None
        The folder, or None where the variable is not set.

    Raises
    ------
    DataFileError
        If the variable names no folder.
    """
    value = os.environ.get("MSIF_DATA")
    if not value:
        return None
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise DataFileError(
            f"MSIF_DATA names {folder}, which is not a folder; set it to the folder that holds "
            "MNIST/ and cifar10/, or unset it to download"
        )
    return folder


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _check(content: bytes, md5: str, what: str, how: str) -> bytes:
    """Return `content` if its md5 is right."""
    found = _md5(content)
    if found != md5:
        raise DataFileError(
            f"{what} is broken or half-downloaded: {len(content)} bytes with md5 {found}, "
            f"expected md5 {md5}; {how}"
        )
    return content


def _read(path: Path, md5: str, how: str) -> bytes:
    """Content of a file whose md5 is right."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataFileError(f"{path} cannot be read ({error.strerror}); {how}") from error
    return _check(content, md5, str(path), how)


def _cached(name: str, make: Callable[[Path], None], read: Callable[[Path], T]) -> T:
    """What `read` finds in the cache; where a file is missing or broken there, `make` it anew.

    Readers see the whole folder or none, and a broken one that stood there is replaced. `read`
    raises `DataFileError` where a file is not as published.
    """
    target = cache_folder() / name
    try:
        return read(target)
    except DataFileError:
        pass
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    except OSError as error:
        raise DataFileError(
            f"{target} cannot be written ({error.strerror}); set MSIF_CACHE to a writable folder"
        ) from error
    try:
        new = work / "new"
        new.mkdir()
        make(new)
        found = read(new)
        with suppress(FileNotFoundError):
            target.rename(work / "old")
        new.rename(target)
        return found
    except OSError as error:
        # Another process may have put the same files there in the meantime.
        try:
            return read(target)
        except DataFileError:
            raise DataFileError(
                f"{target} cannot be written ({error.strerror}); check that the disk is not full, "
                "or set MSIF_CACHE to another folder"
            ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(loader: Callable[..., Any], name: str, root: Path) -> None:
    """Let torchvision download into `root`."""
    try:
        loader(root, download=True)
    except (OSError, RuntimeError) as error:
        raise DataFileError(
            f"{name} could not be downloaded ({error}); try again, or {_HOW[name]}"
        ) from error


def _idx(content: bytes) -> np.ndarray:
    """The array of bytes in a file of MNIST's format: a magic number, the sizes, the bytes."""
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 * (1 + dimensions)).reshape(shape)


def _read_mnist(root: Path) -> dict[str, np.ndarray]:
    """The verified arrays of the unpacked files in `root`, by name."""
    raw = root / "MNIST" / "raw"
    return {
        name: _idx(_read(raw / name, unzipped, _HOW["mnist"]))
        for name, (_, unzipped) in MNIST_MD5.items()
    }


def _make_mnist(folder: Path) -> None:
    """Unpack MNIST into a folder, from ``MSIF_DATA`` or a download."""
    data = data_folder()
    if data is None:
        _download(import_torchvision("torchvision.datasets").MNIST, "mnist", folder)
        return
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, (zipped, _) in MNIST_MD5.items():
        path = data / "MNIST" / "raw" / f"{name}.gz"
        (raw / name).write_bytes(gzip.decompress(_read(path, zipped, _HOW["mnist"])))


def _load_mnist() -> ImageData:
    files = _cached("mnist", _make_mnist, _read_mnist)

    def images(name: str) -> Tensor:
        return torch.tensor(files[f"{name}-images-idx3-ubyte"])[:, None]

    def targets(name: str) -> Tensor:
        return torch.tensor(files[f"{name}-labels-idx1-ubyte"]).long()

    return ImageData(
        name="mnist",
        train_pixels=images("train"),
        train_targets=targets("train"),
        test_pixels=images("t10k"),
        test_targets=targets("t10k"),
        class_names=tuple(str(digit) for digit in range(10)),
        white=255,
        mean=(0.1307,),
        std=(0.3081,),
        source="MNIST (LeCun, Cortes and Burges), 28 x 28 grey, its own training and test set",
    )


def _read_cifar10(root: Path) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The verified records in `root`, one row an image, by file; and the names of the classes."""
    folder, how = root / _CIFAR10_FOLDER, _HOW["cifar10"]
    records = {
        name: np.frombuffer(_read(folder / f"{name}.bin", md5, how), np.uint8).reshape(-1, 3073)
        for name, md5 in CIFAR10_MEMBER_MD5.items()
    }
    return records, _class_names(_read(folder / _CIFAR10_META, CIFAR10_META_MD5, how))


def _class_names(verified: bytes) -> tuple[str, ...]:
    """What CIFAR-10's pickle of class names says; its md5 has been found to be right."""
    return tuple(pickle.loads(verified, encoding="latin1")["label_names"])


def _make_cifar10(folder: Path) -> None:
    """Unpack the binary version of CIFAR-10 into a folder, from ``MSIF_DATA`` or a download."""
    out = folder / _CIFAR10_FOLDER
    out.mkdir()
    data = data_folder()
    if data is None:
        _download_cifar10(folder, out)
    else:
        _unpack_cifar10(data / "cifar10", out)


def _download_cifar10(folder: Path, out: Path) -> None:
    """Let torchvision download the Python version, and write what it read as the binary one."""
    loader = import_torchvision("torchvision.datasets").CIFAR10
    # It compares the files with their published md5s before it unpickles any.
    _download(loader, "cifar10", folder)
    python = folder / loader.base_folder
    (out / _CIFAR10_META).write_bytes((python / _CIFAR10_META).read_bytes())
    for name, md5 in [*loader.train_list, *loader.test_list]:
        batch = pickle.loads(_read(python / name, md5, _HOW["cifar10"]), encoding="latin1")
        labels = np.asarray(batch["labels"], np.uint8)[:, None]
        records = np.concatenate([labels, batch["data"]], axis=1)
        (out / f"{name}.bin").write_bytes(records.tobytes())
    shutil.rmtree(python)
    (folder / loader.filename).unlink(missing_ok=True)


def _unpack_cifar10(data: Path, out: Path) -> None:
    """Take the class names and the six files of the archive from `data` to `out`."""
    how = _HOW["cifar10"]
    meta = _read(data / _CIFAR10_META, CIFAR10_META_MD5, how)
    (out / _CIFAR10_META).write_bytes(meta)
    archive = data / CIFAR10_ARCHIVE
    try:
        with tarfile.open(archive, "r:*") as tar:
            members = {member.name.rsplit("/", 1)[-1]: member for member in tar}
            for name, md5 in CIFAR10_MEMBER_MD5.items():
                file = tar.extractfile(members[f"{name}.bin"])
                content = b"" if file is None else file.read()
                _check(content, md5, f"{name}.bin in {archive}", how)
                (out / f"{name}.bin").write_bytes(content)
    except KeyError as error:
        raise DataFileError(f"{archive} holds no file {error.args[0]}; {how}") from error
    except FileNotFoundError as error:
        raise DataFileError(f"{archive} is missing; {how}") from error
    except (tarfile.TarError, EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataFileError(f"{archive} is broken or half-downloaded ({error}); {how}") from error


def _load_cifar10() -> ImageData:
    records, names = _cached("cifar10", _make_cifar10, _read_cifar10)

    def part(training: bool) -> tuple[Tensor, Tensor]:
        rows = [rows for name, rows in records.items() if (name != "test_batch") == training]
        # One record: a label, then the pixels of each channel.
        found = torch.from_numpy(np.concatenate(rows))
        return found[:, 1:].reshape(-1, 3, 32, 32).contiguous(), found[:, 0].long()

    (train_pixels, train_targets), (test_pixels, test_targets) = part(True), part(False)
    return ImageData(
        name="cifar10",
        train_pixels=train_pixels,
        train_targets=train_targets,
        test_pixels=test_pixels,
        test_targets=test_targets,
        class_names=names,
        white=255,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        source="CIFAR-10 (Krizhevsky 2009), 32 x 32 colour, its own training and test set",
    )


def _load_digits() -> ImageData:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    targets = torch.from_numpy(digits.target).long()
    train, test = train_test_split(
        np.arange(len(targets)), test_size=0.2, stratify=digits.target, random_state=0
    )
    pixels = torch.from_numpy(digits.images.astype(np.uint8))[:, None]
    scaled = pixels[train].double() / 16
    return ImageData(
        name="digits",
        train_pixels=pixels[train],
        train_targets=targets[train],
        test_pixels=pixels[test],
        test_targets=targets[test],
        class_names=tuple(str(digit) for digit in range(10)),
        white=16,
        mean=(float(scaled.mean()),),
        std=(float(scaled.std()),),
        source=(
            "scikit-learn's bundled digits (Alpaydin and Kaynak, UCI repository), 1,797 scans, "
            "8 x 8 grey; a fifth of each class, drawn with seed 0, is the test set"
        ),
    )


_LOADERS: dict[str, Callable[[], ImageData]] = {
    "digits": _load_digits,
    "mnist": _load_mnist,
    "cifar10": _load_cifar10,
}


def load_images(name: str) -> ImageData:
    """Load a data set of images.

    ``digits`` has no division of its own: a fifth of each class, drawn once with seed 0, is its
    test set (1,437 training and 360 test images), the same on every call. The other two keep their
    own test set of 10,000 images. Images are normalised with the mean and the standard deviation
    of the training set, one pair a channel (see `ImageData.normalise`).

    Parameters
    ----------
    name : {"digits", "mnist", "cifar10"} or "module:function"
        The data set. A function of the user's takes nothing and returns four arrays or tensors:
        training images of shape (N, channels, height, width), their class numbers (N,) from 0, and
        the same two of the test set.

    Returns
    -------
    ImageData
        The images.

    Raises
    ------
    ValueError
        If there is no data set of that name, or the user's function gives something else.
    DataFileError
        If a file is missing, broken or half-downloaded, could not be downloaded, or the cache
        cannot be written.
    """
    if is_own(name):
        return _load_own(name)
    if name not in _LOADERS:
        raise ValueError(f"dataset must be one of {NAMES}, got {name!r}")
    return _LOADERS[name]()


def _load_own(name: str) -> ImageData:
    """Load the user's images: four arrays, with mean and deviation of the training set."""
    made = own_function("dataset", name)()
    try:
        pixels, targets, test_pixels, test_targets = map(torch.as_tensor, made)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"dataset = {name!r} must return training images, their class numbers, test images "
            f"and their class numbers ({error})"
        ) from error
    for images, labels in ((pixels, targets), (test_pixels, test_targets)):
        if images.ndim != 4 or labels.shape != images.shape[:1] or not len(labels):
            raise ValueError(
                f"dataset = {name!r} must return images of shape (N, channels, height, width) "
                f"and class numbers (N,), got {tuple(images.shape)} and {tuple(labels.shape)}"
            )
        if labels.is_floating_point() or labels.min() < 0:
            raise ValueError(f"dataset = {name!r}: class numbers must be integers from 0")
    white = max(1, math.ceil(pixels.max()))
    scaled = pixels.double() / white
    return ImageData(
        name=name,
        train_pixels=pixels,
        train_targets=targets.long(),
        test_pixels=test_pixels,
        test_targets=test_targets.long(),
        class_names=tuple(str(number) for number in range(int(targets.max()) + 1)),
        white=white,
        mean=tuple(scaled.mean((0, 2, 3)).tolist()),
        # A channel of one value is only centred.
        std=tuple(value or 1.0 for value in scaled.std((0, 2, 3)).tolist()),
        source=f"the user's own, {name}",
    )


def _draw(
    available: np.ndarray,
    targets: np.ndarray,
    classes: Sequence[int],
    size: int | None,
    argument: str,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draw `size` of the `available` positions, each class in proportion, in random order."""
    pools = [available[targets[available] == label] for label in classes]
    total = sum(len(pool) for pool in pools)
    size = total if size is None else size
    if size > total:
        raise ValueError(
            f"{argument} asks for {size} examples of the classes {tuple(classes)}, "
            f"but there are only {total}"
        )
    if size < len(classes):
        raise ValueError(f"{argument} is {size}, fewer than its {len(classes)} classes")
    shares = np.array([len(pool) * size / total for pool in pools])
    counts = np.floor(shares).astype(int)
    # The largest remainders take what rounding down left over.
    counts[np.argsort(counts - shares, kind="stable")[: size - counts.sum()]] += 1
    chosen = [rng.permutation(pool)[:count] for pool, count in zip(pools, counts, strict=True)]
    return rng.permutation(np.concatenate(chosen))


def two_stages(
    name: str = "digits",
    pretrain_classes: Sequence[int] | None = None,
    finetune_classes: Sequence[int] | None = None,
    pretrain_size: int | None = None,
    finetune_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> TwoStageData:
    """Divide a data set into a pretraining task and a finetuning task.

    Each set is drawn at random with every class in proportion. The classes of the two stages may
    overlap; an image is never in both. The test set has the classes of finetuning and is drawn
    from the test set of the data.

    Parameters
    ----------
    name : {"digits", "mnist", "cifar10"} or "module:function"
        The data set, as for `load_images`.
    pretrain_classes, finetune_classes : sequence of int, optional
        Classes of each stage. By default the paper's: digits 0-3, then 4-9; on CIFAR-10 bird and
        frog, then the other eight. Of the user's own data the first half, then the others.
    pretrain_size, finetune_size, test_size : int, optional
        Number of examples; by default all that there are.
    seed : int
        Seed of the draw.
    dtype : torch.dtype
        Of the inputs.

    Returns
    -------
    TwoStageData
        The three sets.

    Raises
    ------
    ValueError
        If a class does not exist or is named twice, or a size asks for more examples than exist
        or for fewer than one a class.
    DataFileError
        As `load_images`.
    """
    images = load_images(name)
    half = len(images.class_names) // 2
    classes = range(len(images.class_names))
    defaults = DEFAULT_CLASSES.get(name, (tuple(classes[:half]), tuple(classes[half:])))
    pretrain_labels = tuple(defaults[0] if pretrain_classes is None else pretrain_classes)
    finetune_labels = tuple(defaults[1] if finetune_classes is None else finetune_classes)
    for argument, labels in (
        ("pretrain_classes", pretrain_labels),
        ("finetune_classes", finetune_labels),
    ):
        if len(labels) < 2 or len(set(labels)) < len(labels):
            raise ValueError(f"{argument} must be at least two different classes, got {labels}")
        if not set(labels) <= set(range(len(images.class_names))):
            raise ValueError(
                f"{argument} must lie in 0..{len(images.class_names) - 1}, got {labels}"
            )

    rng = np.random.default_rng(seed)
    train_targets, test_targets = images.train_targets.numpy(), images.test_targets.numpy()
    everything = np.arange(len(train_targets))
    pretrain = _draw(
        everything, train_targets, pretrain_labels, pretrain_size, "pretrain_size", rng
    )
    rest = np.setdiff1d(everything, pretrain)
    finetune = _draw(rest, train_targets, finetune_labels, finetune_size, "finetune_size", rng)
    test = _draw(
        np.arange(len(test_targets)), test_targets, finetune_labels, test_size, "test_size", rng
    )

    def stage(
        positions: np.ndarray, pixels: Tensor, targets: Tensor, labels: tuple[int, ...]
    ) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        indices = torch.from_numpy(positions)
        original = targets[indices]
        renumbered = torch.tensor([labels.index(int(label)) for label in original])
        return (images.normalise(pixels[indices], dtype), renumbered), original, indices

    z, z_original, z_indices = stage(
        pretrain, images.train_pixels, images.train_targets, pretrain_labels
    )
    x, x_original, x_indices = stage(
        finetune, images.train_pixels, images.train_targets, finetune_labels
    )
    t, t_original, t_indices = stage(test, images.test_pixels, images.test_targets, finetune_labels)
    return TwoStageData(
        name=name,
        pretrain=z,
        finetune=x,
        test=t,
        pretrain_original=z_original,
        finetune_original=x_original,
        test_original=t_original,
        pretrain_indices=z_indices,
        finetune_indices=x_indices,
        test_indices=t_indices,
        pretrain_classes=pretrain_labels,
        finetune_classes=finetune_labels,
        images=images,
    )
