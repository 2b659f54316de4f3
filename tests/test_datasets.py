import gzip
import hashlib
import io
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from msif_lib.study.data import datasets
from msif_lib.study.data.datasets import DataFileError, load_images, two_stages

REAL_DATA = os.environ.get("MSIF_DATA")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """An empty data folder and an empty cache."""
    data, cache = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    monkeypatch.setenv("MSIF_DATA", str(data))
    monkeypatch.setenv("MSIF_CACHE", str(cache))
    return data, cache


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@pytest.fixture
def mnist(folders, monkeypatch):
    """Tiny files in MNIST's place, with their md5s."""
    raw = folders[0] / "MNIST" / "raw"
    raw.mkdir(parents=True)
    sums = {}
    for part, count in (("train", 30), ("t10k", 10)):
        labels = bytes(index % 10 for index in range(count))
        contents = {
            f"{part}-images-idx3-ubyte": b"\0\0\x08\x03"
            + b"".join(n.to_bytes(4, "big") for n in (count, 28, 28))
            + bytes(index % 251 for index in range(count * 784)),
            f"{part}-labels-idx1-ubyte": b"\0\0\x08\x01" + count.to_bytes(4, "big") + labels,
        }
        for name, content in contents.items():
            zipped = gzip.compress(content)
            (raw / f"{name}.gz").write_bytes(zipped)
            sums[name] = (md5(zipped), md5(content))
    monkeypatch.setattr(datasets, "MNIST_MD5", sums)
    return raw


@pytest.fixture
def cifar10(folders, monkeypatch):
    """A tiny archive in CIFAR-10's place, with its md5s."""
    folder = folders[0] / "cifar10"
    folder.mkdir()
    sums = {}
    with tarfile.open(folder / datasets.CIFAR10_ARCHIVE, "w:xz") as tar:
        for number, name in enumerate(datasets.CIFAR10_MEMBER_MD5):
            content = b"".join(
                bytes([label]) + bytes([number + label]) * 3072 for label in range(10)
            )
            sums[name] = md5(content)
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    meta = pickle.dumps({"label_names": [f"class {n}" for n in range(10)]}, protocol=2)
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(datasets, "CIFAR10_MEMBER_MD5", sums)
    monkeypatch.setattr(datasets, "CIFAR10_META_MD5", md5(meta))
    # torchvision checks the class names by its own md5.
    loader = datasets.import_torchvision("torchvision.datasets").CIFAR10
    monkeypatch.setattr(loader, "meta", {**loader.meta, "md5": md5(meta)})
    return folder


def test_digits_are_divided_by_class_and_normalised():
    images = load_images("digits")
    assert images.image_shape == (1, 8, 8)
    assert (len(images.train_pixels), len(images.test_pixels)) == (1437, 360)
    assert images.test_targets.bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    assert abs(images.train_inputs.mean()) < 1e-5
    assert abs(images.train_inputs.std() - 1) < 1e-5
    pictures = images.pictures(images.test_pixels)
    assert pictures.shape == (360, 8, 8, 1)
    assert 0 <= pictures.min() <= pictures.max() <= 1
    assert torch.equal(images.train_pixels, load_images("digits").train_pixels)


def test_two_stages_take_the_papers_classes_and_count_labels_from_zero():
    data = two_stages(pretrain_size=100, finetune_size=150, test_size=60, seed=2)
    assert data.pretrain_classes == (0, 1, 2, 3)
    assert data.finetune_classes == (4, 5, 6, 7, 8, 9)
    assert data.pretrain[0].dtype == torch.float64
    assert data.pretrain[0].shape == (100, 1, 8, 8)
    assert data.finetune[1].unique().tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(data.finetune[1] + 4, data.finetune_original)
    counts = data.pretrain[1].bincount()
    assert counts.max() - counts.min() <= 1
    pixels = data.images.train_pixels[data.pretrain_indices]
    assert torch.equal(data.images.normalise(pixels, torch.float64), data.pretrain[0])
    assert torch.equal(data.images.test_targets[data.test_indices], data.test_original)


def test_labels_follow_the_order_in_which_classes_are_named():
    data = two_stages(pretrain_classes=(7, 1), finetune_classes=(3, 2))
    assert (data.pretrain[1] == (data.pretrain_original == 1)).all()
    assert (data.finetune[1] == (data.finetune_original == 2)).all()


def test_same_seed_same_draw():
    first, second, other = (two_stages(pretrain_size=50, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.pretrain_indices, second.pretrain_indices)
    assert not torch.equal(first.pretrain_indices, other.pretrain_indices)


def test_stages_of_overlapping_classes_share_no_image():
    data = two_stages(
        pretrain_classes=range(10), finetune_classes=range(5), pretrain_size=700, finetune_size=300
    )
    assert not set(data.pretrain_indices.tolist()) & set(data.finetune_indices.tolist())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrain_size": 10_000}, r"pretrain_size asks for 10000 .* there are only 576"),
        ({"finetune_size": 5}, "finetune_size is 5, fewer than its 6 classes"),
        ({"test_size": 500}, "test_size asks for 500"),
        ({"pretrain_classes": (1, 1)}, "pretrain_classes must be at least two different"),
        ({"finetune_classes": (3, 10)}, r"finetune_classes must lie in 0\.\.9"),
        ({"name": "letters"}, "dataset must be one of"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        two_stages(**arguments)


def test_mnist_is_read_and_cached(mnist, folders):
    images = load_images("mnist")
    assert images.image_shape == (1, 28, 28)
    assert images.train_targets.tolist() == [index % 10 for index in range(30)]
    assert [path.name for path in folders[1].iterdir()] == ["mnist"]
    # A verified copy needs the originals no more.
    (mnist / "train-images-idx3-ubyte.gz").unlink()
    assert torch.equal(load_images("mnist").train_pixels, images.train_pixels)


def test_broken_copy_in_the_cache_is_made_anew(mnist, folders):
    good = load_images("mnist")
    copy = folders[1] / "mnist" / "MNIST" / "raw" / "train-images-idx3-ubyte"
    copy.write_bytes(copy.read_bytes()[:-100])
    assert torch.equal(load_images("mnist").train_pixels, good.train_pixels)


def test_missing_mnist_file_is_named_with_its_place(mnist):
    (mnist / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataFileError, match=r"t10k-labels-idx1-ubyte\.gz cannot be .*MNIST/raw"):
        load_images("mnist")


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b half", b"x" * 5000])
def test_broken_mnist_file_is_named(mnist, folders, content):
    (mnist / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(
        DataFileError, match=rf"train-images-idx3-ubyte\.gz is broken.*{len(content)} bytes"
    ):
        load_images("mnist")
    assert not list(folders[1].iterdir())


def test_cifar10_is_read_and_cached(cifar10, folders):
    images = load_images("cifar10")
    assert images.image_shape == (3, 32, 32)
    assert len(images.train_pixels) == 50
    assert images.train_targets[:10].tolist() == list(range(10))
    assert images.train_pixels[13].unique().tolist() == [4]
    assert images.class_names[2] == "class 2"
    (cifar10 / datasets.CIFAR10_ARCHIVE).unlink()
    assert torch.equal(load_images("cifar10").test_pixels, images.test_pixels)
    copy = folders[1] / "cifar10" / "cifar-10-batches-bin" / "data_batch_3.bin"
    copy.write_bytes(copy.read_bytes()[:-100])
    with pytest.raises(DataFileError, match="is missing"):
        load_images("cifar10")


def test_missing_cifar10_file_is_named_with_its_place(cifar10):
    (cifar10 / "batches.meta").unlink()
    with pytest.raises(DataFileError, match=r"batches\.meta cannot be read.*into cifar10/"):
        load_images("cifar10")


class Planted:
    """Unpickled, it leaves a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


# Also where torchvision would look for what it made once.
PLACES = {
    "cifar10": [
        *(f"cifar-10-batches-bin/{name}.bin" for name in datasets.CIFAR10_MEMBER_MD5),
        *(f"cifar-10-batches-py/{name}" for name in datasets.CIFAR10_MEMBER_MD5),
        *(f"cifar-10-batches-{version}/batches.meta" for version in ("bin", "py")),
    ],
    "mnist": [
        *(f"MNIST/raw/{name}" for name in datasets.MNIST_MD5),
        "MNIST/processed/training.pt",
        "MNIST/processed/test.pt",
    ],
}


@pytest.mark.parametrize(
    ("name", "place"), [(name, place) for name, places in PLACES.items() for place in places]
)
@pytest.mark.parametrize("cached", [True, False])
def test_nothing_planted_in_the_cache_is_executed(mnist, cifar10, folders, name, place, cached):
    if cached:
        load_images(name)
    path, mark = folders[1] / name / place, folders[0] / "executed"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(Planted(mark)))
    images = load_images(name)
    assert not mark.exists()
    assert images.train_targets[:10].tolist() == list(range(10))
    # It would have been.
    pickle.loads(pickle.dumps(Planted(mark)))
    assert mark.exists()


@pytest.mark.parametrize("name", ["batches.meta", datasets.CIFAR10_ARCHIVE])
def test_nothing_planted_among_the_data_is_executed(cifar10, folders, name):
    mark = folders[0] / "executed"
    (cifar10 / name).write_bytes(pickle.dumps(Planted(mark)))
    with pytest.raises(DataFileError, match="is broken or half-downloaded"):
        load_images("cifar10")
    assert not mark.exists()


def test_downloaded_cifar10_is_kept_as_the_original_bytes(cifar10, folders, monkeypatch):
    """A download in torchvision's place: the Python version of the same images."""
    expected = load_images("cifar10")
    originals = {path.name: path.read_bytes() for path in (folders[1] / "cifar10").glob("*/*")}
    shutil.rmtree(folders[1])
    monkeypatch.delenv("MSIF_DATA")
    loader = datasets.import_torchvision("torchvision.datasets").CIFAR10
    files = {}
    for name in datasets.CIFAR10_MEMBER_MD5:
        records = np.frombuffer(originals[f"{name}.bin"], np.uint8).reshape(-1, 3073)
        batch = {"labels": records[:, 0].tolist(), "data": records[:, 1:]}
        files[name] = pickle.dumps(batch, protocol=2)
    lists = [[name, md5(content)] for name, content in files.items()]
    monkeypatch.setattr(loader, "train_list", lists[:5])
    monkeypatch.setattr(loader, "test_list", lists[5:])

    def download(self):
        folder = Path(self.root) / loader.base_folder
        folder.mkdir()
        for name, content in [*files.items(), ("batches.meta", originals["batches.meta"])]:
            (folder / name).write_bytes(content)

    monkeypatch.setattr(loader, "download", download)
    images = load_images("cifar10")
    assert torch.equal(images.train_pixels, expected.train_pixels)
    assert torch.equal(images.test_targets, expected.test_targets)
    kept = {path.name: path.read_bytes() for path in (folders[1] / "cifar10").glob("*/*")}
    assert kept == originals

    mark = folders[1] / "executed"
    files["data_batch_2"] = pickle.dumps(Planted(mark))
    shutil.rmtree(folders[1] / "cifar10")
    with pytest.raises(DataFileError, match="could not be downloaded"):
        load_images("cifar10")
    assert not mark.exists()


@pytest.mark.parametrize("share", [0, 0.5, 0.9])
def test_truncated_cifar10_archive_is_named(cifar10, folders, share):
    archive = cifar10 / datasets.CIFAR10_ARCHIVE
    content = archive.read_bytes()
    archive.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataFileError, match=r"cifar-10-batches-bin\.tar\.xz is broken"):
        load_images("cifar10")
    assert not list(folders[1].iterdir())


def test_wrong_cifar10_member_is_named(cifar10, monkeypatch):
    monkeypatch.setitem(datasets.CIFAR10_MEMBER_MD5, "data_batch_4", "0" * 32)
    with pytest.raises(DataFileError, match=r"data_batch_4\.bin in .* is broken"):
        load_images("cifar10")


def test_folder_that_does_not_exist_is_named(folders, monkeypatch):
    monkeypatch.setenv("MSIF_DATA", str(folders[0] / "nowhere"))
    with pytest.raises(DataFileError, match="which is not a folder"):
        load_images("mnist")


def test_cache_that_cannot_be_written_is_named(mnist, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MSIF_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataFileError, match="set MSIF_CACHE to a writable folder"):
        load_images("mnist")


def test_failed_download_is_named(folders, monkeypatch):
    monkeypatch.delenv("MSIF_DATA")
    loader = datasets.import_torchvision("torchvision.datasets").MNIST

    def no_network(self):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(loader, "download", no_network)
    with pytest.raises(DataFileError, match=r"could not be downloaded .*MNIST/raw/"):
        load_images("mnist")
    assert not list(folders[1].iterdir())


@pytest.mark.skipif(not REAL_DATA, reason="MSIF_DATA is not set")
def test_real_mnist():
    assert Path(REAL_DATA).is_dir()
    images = load_images("mnist")
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert images.train_targets.bincount().tolist() == counts
    scaled = images.train_pixels.double() / 255
    assert round(scaled.mean().item(), 4) == images.mean[0]
    assert round(scaled.std().item(), 4) == images.std[0]


@pytest.mark.skipif(not REAL_DATA, reason="MSIF_DATA is not set")
def test_real_cifar10():
    images = load_images("cifar10")
    assert images.train_targets.bincount().tolist() == [5000] * 10
    assert images.test_targets.bincount().tolist() == [1000] * 10
    assert images.class_names[2] == "bird"
    assert images.class_names[6] == "frog"
    means = (images.train_pixels.double() / 255).mean((0, 2, 3))
    assert [round(mean, 4) for mean in means.tolist()] == list(images.mean)
