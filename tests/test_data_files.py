"""Data sets read from files: small ones, written here in the official formats."""

import gzip
import hashlib
import os
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision import transforms

import train
from dst import checkpoint
from dst.data import DATASETS, Batch, DataOptions, Dataset, eval_batches, load, train_loader
from dst.errors import StoppedError
from dst.models import build
from dst.recipes.session import CHECKPOINT
from dst.training import run
from growth.errors import InputError

# --- CIFAR --------------------------------------------------------------------------------------


class TinyCifar:
    """A folder like the official archive's, with few images, that torchvision takes for it."""

    def __init__(self, name: str, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.cifar = {
            "cifar10": torchvision.datasets.CIFAR10,
            "cifar100": torchvision.datasets.CIFAR100,
        }[name]
        self.root, self.folder = root, root / self.cifar.base_folder
        self.classes = 10 if name == "cifar10" else 100
        self.label_key = "labels" if name == "cifar10" else "fine_labels"
        self.folder.mkdir()
        self.random = np.random.default_rng(0)
        train = ["data_batch_1", "data_batch_2"] if name == "cifar10" else ["train"]
        test = "test_batch" if name == "cifar10" else "test"
        self.images: dict[str, np.ndarray] = {}
        self.labels: dict[str, list[int]] = {}
        patch.setattr(self.cifar, "train_list", [[file, self.write(file, 200)] for file in train])
        patch.setattr(self.cifar, "test_list", [[test, self.write(test, 100)]])
        meta = {**self.cifar.meta}
        meta["md5"] = self._pickle(
            meta["filename"], {meta["key"]: [str(label) for label in range(self.classes)]}
        )
        patch.setattr(self.cifar, "meta", meta)

    def write(self, file: str, count: int) -> str:
        """md5 of the file. Rows are red, green and blue planes of 1024 bytes, as published."""
        self.images[file] = self.random.integers(0, 256, (count, 3072), dtype=np.uint8)
        self.labels[file] = [label % self.classes for label in range(count)]
        self.random.shuffle(self.labels[file])
        entry = {"data": self.images[file], self.label_key: self.labels[file]}
        return self._pickle(file, entry)

    def _pickle(self, file: str, content: object) -> str:
        raw = pickle.dumps(content, protocol=2)
        (self.folder / file).write_bytes(raw)
        return _md5(raw)


def _md5(raw: bytes) -> str:
    return hashlib.md5(raw, usedforsecurity=False).hexdigest()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_from_the_official_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = TinyCifar(name, tmp_path, monkeypatch)
    test_file = tiny.cifar.test_list[0][0]
    data = load(name, data_dir=tmp_path, val_size=100)
    # The test split is the official one, in its order and with its planes.
    official = torch.from_numpy(tiny.images[test_file]).reshape(-1, 3, 32, 32)
    assert torch.equal(data.test.images, official)
    assert data.test.labels.tolist() == tiny.labels[test_file]
    total = sum(len(tiny.labels[file]) for file, _ in tiny.cifar.train_list)
    assert (len(data.train), len(data.val)) == (total - 100, 100)
    assert torch.bincount(data.val.labels).tolist() == [100 // tiny.classes] * tiny.classes
    # Each training image kept its own label, and none was lost or doubled.
    expected = {
        image.tobytes(): label
        for file, _ in tiny.cifar.train_list
        for image, label in zip(tiny.images[file], tiny.labels[file], strict=True)
    }
    found = {
        image.numpy().tobytes(): int(label)
        for split in (data.train, data.val)
        for image, label in zip(split.images, split.labels, strict=True)
    }
    assert found == expected
    assert data.augment == "crop-flip"
    assert data.classes == tiny.classes
    assert data.mean.shape == data.std.shape == (3,)


def test_cifar_holds_out_5000_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TinyCifar("cifar10", tmp_path, monkeypatch)
    assert DATASETS["cifar10"](DataOptions(tmp_path)).val_size == 5000
    assert len(load("cifar10", data_dir=tmp_path, val_size=0).train) == 400
    with pytest.raises(InputError, match=r"val_size 5000 .*400 images"):
        load("cifar10", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "folder", "archive", "md5"),
    [
        ("cifar10", "cifar-10-batches-py", "cifar-10-python", "c58f30108f718f92721af3b95e74349a"),
        ("cifar100", "cifar-100-python", "cifar-100-python", "eb9058c3a382ffc7106e4002c42a8d85"),
    ],
)
def test_missing_cifar_folder_says_what_to_type(
    name: str, folder: str, archive: str, md5: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        load(name, data_dir=tmp_path / "my data")
    said = str(caught.value).splitlines()
    assert len(said) == 10
    assert said[0].endswith(f"{tmp_path / 'my data' / folder} does not exist")
    assert "--download" in said[1]
    assert said[2] == f"  mkdir -p '{tmp_path}/my data' && cd '{tmp_path}/my data'"
    url = f"https://www.cs.toronto.edu/~kriz/{archive}.tar.gz"
    assert said[3] == f"  curl -LO {url}" and said[4].endswith(f"wget {url}")
    assert said[5] == f'  echo "{md5}  {archive}.tar.gz" | md5sum -c'
    assert said[6] == f"  tar -xzf {archive}.tar.gz"
    assert ("test_batch" if name == "cifar10" else "meta") in said[8].split()
    assert "--data-dir" in said[9]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("which", ["train", "test", "meta"])
def test_truncated_cifar_file_is_refused(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = TinyCifar("cifar10", tmp_path, monkeypatch)
    file = {
        "train": tiny.cifar.train_list[1][0],
        "test": tiny.cifar.test_list[0][0],
        "meta": tiny.cifar.meta["filename"],
    }[which]
    path = tiny.folder / file
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InputError, match=r"missing or damaged files\n.*--download") as caught:
        load("cifar10", data_dir=tmp_path)
    assert str(tiny.folder) in str(caught.value)


def test_failed_download_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", fail)
    with pytest.raises(InputError, match=r"could not be downloaded.*no route to host") as caught:
        load("cifar10", data_dir=tmp_path, download=True)
    assert str(tmp_path / "cifar-10-batches-py") in str(caught.value)


# --- MNIST and EMNIST, in the official idx format -----------------------------------------------


def _idx(array: np.ndarray) -> bytes:
    """The idx format: two zeros, the type (8: uint8), how many sizes, the sizes, the bytes."""
    header = bytes([0, 0, 8, array.ndim])
    return header + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


def _write_idx(
    folder: Path, images: str, labels: str, count: int, classes: int, first: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Random images, and the labels ``first``, ``first`` + 1, ... in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    targets = (first + np.arange(count) % classes).astype(np.uint8)
    (folder / images).write_bytes(_idx(pixels))
    (folder / labels).write_bytes(_idx(targets))
    return pixels, targets


def _mnist(root: Path) -> tuple[np.ndarray, np.ndarray]:
    """An MNIST of 60 and 20 images; returns the test ones."""
    folder = root / "MNIST" / "raw"
    _write_idx(folder, "train-images-idx3-ubyte", "train-labels-idx1-ubyte", 60, 10)
    return _write_idx(folder, "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", 20, 10)


def _emnist(root: Path, split: str, classes: int, first: int) -> tuple[np.ndarray, np.ndarray]:
    folder = root / "EMNIST" / "raw"
    for part, count in (("train", 3 * classes), ("test", 2 * classes)):
        names = (f"emnist-{split}-{part}-{what}-ubyte" for what in ("images-idx3", "labels-idx1"))
        written = _write_idx(folder, *names, count, classes, first)
    return written


def test_mnist_is_read_from_the_official_files(tmp_path: Path) -> None:
    pixels, targets = _mnist(tmp_path)
    data = load("mnist", data_dir=tmp_path, val_size=10)
    assert torch.equal(data.test.images, torch.from_numpy(pixels).unsqueeze(1))
    assert data.test.labels.tolist() == targets.tolist()
    assert (len(data.train), len(data.val)) == (50, 10)
    assert (data.classes, data.in_channels, data.image_size) == (10, 1, 28)
    assert (data.mean.item(), data.std.item()) == pytest.approx((0.1307, 0.3081))
    assert data.augment == "shift"


@pytest.mark.parametrize(("split", "classes", "first"), [("balanced", 47, 0), ("letters", 26, 1)])
def test_emnist_is_upright_and_counts_from_0(
    split: str, classes: int, first: int, tmp_path: Path
) -> None:
    pixels, targets = _emnist(tmp_path, split, classes, first)
    data = load(f"emnist-{split}", data_dir=tmp_path, val_size=0)
    # In the files, an image's columns come one after the other.
    assert torch.equal(data.test.images[:, 0], torch.from_numpy(pixels).transpose(1, 2))
    assert data.test.labels.tolist() == (targets - first).tolist()
    assert set(data.train.labels.tolist()) == set(range(classes))
    assert data.classes == classes
    whole = data.train.images.double() / 255
    assert data.mean.item() == pytest.approx(whole.mean().item())
    assert data.std.item() == pytest.approx(whole.std(correction=0).item())


def test_mnist_is_unpacked_from_the_official_archives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a download leaves behind; with the archives there already, nothing is fetched."""
    pixels, _ = _mnist(tmp_path)
    folder, resources = tmp_path / "MNIST" / "raw", []
    for path in list(folder.iterdir()):
        packed = gzip.compress(path.read_bytes())
        path.with_name(f"{path.name}.gz").write_bytes(packed)
        path.unlink()
        resources.append((f"{path.name}.gz", _md5(packed)))
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    data = load("mnist", data_dir=tmp_path, download=True, val_size=0)
    assert torch.equal(data.test.images[:, 0], torch.from_numpy(pixels))


def test_emnist_is_unpacked_from_the_official_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, _ = _emnist(tmp_path, "letters", 26, 1)
    folder = tmp_path / "EMNIST" / "raw"
    with zipfile.ZipFile(folder / "gzip.zip", "w") as archive:
        for path in folder.glob("*ubyte"):
            archive.writestr(f"gzip/{path.name}.gz", gzip.compress(path.read_bytes()))
            path.unlink()
    md5 = _md5((folder / "gzip.zip").read_bytes())
    monkeypatch.setattr(torchvision.datasets.EMNIST, "md5", md5)
    data = load("emnist-letters", data_dir=tmp_path, download=True, val_size=0)
    assert torch.equal(data.test.images[:, 0], torch.from_numpy(pixels).transpose(1, 2))


@pytest.mark.parametrize("name", ["mnist", "emnist-balanced", "emnist-letters"])
def test_missing_mnist_folder_is_named(name: str, tmp_path: Path) -> None:
    kind = "MNIST" if name == "mnist" else "EMNIST"
    with pytest.raises(InputError) as caught:
        load(name, data_dir=tmp_path)
    said = str(caught.value)
    assert f"{tmp_path / kind / 'raw'} does not exist" in said
    assert "--download" in said and "--data-dir" in said and "\n" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "text", "fewer labels"])
def test_damaged_mnist_files_are_refused(damage: str, tmp_path: Path) -> None:
    _mnist(tmp_path)
    folder = tmp_path / "MNIST" / "raw"
    images, labels = folder / "t10k-images-idx3-ubyte", folder / "t10k-labels-idx1-ubyte"
    if damage == "missing":
        labels.unlink()
    elif damage == "fewer labels":
        labels.write_bytes(_idx(np.zeros(19, dtype=np.uint8)))
    else:
        raw = {"cut": images.read_bytes()[:-7], "empty": b"", "text": b"<html>404</html>"}[damage]
        images.write_bytes(raw)
    with pytest.raises(InputError, match=r"MNIST.*missing or damaged files.*--download") as caught:
        load("mnist", data_dir=tmp_path, val_size=0)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_labels_beyond_the_classes_are_refused(tmp_path: Path) -> None:
    _mnist(tmp_path)
    labels = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    count = len(load("mnist", data_dir=tmp_path, val_size=0).test)
    labels.write_bytes(_idx(np.full(count, 77, dtype=np.uint8)))
    with pytest.raises(InputError, match="mnist has a label 77, but 10 classes"):
        load("mnist", data_dir=tmp_path, val_size=0)


# --- folders of image files ---------------------------------------------------------------------


def _photo(seed: int, height: int, width: int) -> np.ndarray:
    """Smooth and colourful, so that JPEG changes it little: (height, width, 3) uint8."""
    coarse = torch.rand(1, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return (smooth[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def _folder(root: Path, parts: tuple[str, ...] = ("train", "val"), each: int = 6) -> Path:
    """Two classes of JPEGs of several shapes."""
    for number, (part, name) in enumerate((p, c) for p in parts for c in ("cat", "dog")):
        (root / part / name).mkdir(parents=True)
        for i in range(each):
            photo = _photo(100 * number + i, 30 + 5 * i, 90 - 4 * i)
            Image.fromarray(photo).save(root / part / name / f"{i}.JPEG", quality=95)
    return root


def test_imagenet_is_read_from_its_folder(tmp_path: Path) -> None:
    _folder(tmp_path / "imagenet", each=20)
    data = load("imagenet", data_dir=tmp_path)
    # A tenth of train/ is held out; val/ is the test split, as in the literature.
    assert (len(data.train), len(data.val), len(data.test)) == (36, 4, 40)
    assert torch.bincount(data.val.labels).tolist() == [2, 2]
    assert (data.classes, data.in_channels, data.image_size) == (2, 3, 224)
    assert data.augment == "resized-crop-flip"
    assert data.mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert data.std.tolist() == pytest.approx([0.229, 0.224, 0.225])
    assert data.test.labels.tolist() == [0] * 20 + [1] * 20


def test_evaluation_sees_what_torchvision_shows(tmp_path: Path) -> None:
    data = load("folder", data_dir=_folder(tmp_path), image_size=28)
    batches = list(eval_batches(data.test, data, 5))
    assert [len(labels) for _, labels in batches] == [5, 5, 2]
    usual = transforms.Compose(
        [
            transforms.Resize(32),
            transforms.CenterCrop(28),
            transforms.ToTensor(),
            transforms.Normalize(data.mean, data.std),
        ]
    )
    expected = torchvision.datasets.ImageFolder(tmp_path / "val", usual)
    images = torch.stack([image for image, _ in expected])
    torch.testing.assert_close(torch.cat([images for images, _ in batches]), images)
    assert torch.cat([labels for _, labels in batches]).tolist() == expected.targets


def _train(data: Dataset, **changes: object) -> list[Batch]:
    options: dict[str, object] = {
        "batch": 4,
        "epoch": 0,
        "start": 0,
        "seed": 0,
        "augment": data.augment,
        "workers": 0,
    }
    return list(train_loader(data.train, data, **{**options, **changes}))  # type: ignore[arg-type]


def _equal(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


@pytest.mark.parametrize("augment", ["none", "resized-crop-flip", "mam-imagenet"])
def test_file_batches_do_not_depend_on_workers_start_or_ranks(augment: str, tmp_path: Path) -> None:
    data = load("folder", data_dir=_folder(tmp_path), image_size=16, val_size=0)
    whole = _train(data, augment=augment)
    assert [images.shape for images, _ in whole] == [(4, 3, 16, 16)] * 3
    assert _equal(_train(data, augment=augment, workers=2), whole)
    assert _equal(_train(data, augment=augment, start=1), whole[1:])
    ranks = [_train(data, augment=augment, rank=rank, world=2) for rank in (0, 1)]
    joined = [
        (torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))
        for parts in zip(*ranks, strict=True)
    ]
    assert _equal(joined, whole)
    assert not _equal(_train(data, augment=augment, epoch=1), whole)
    if augment != "none":
        # The same images in the same order, augmented otherwise.
        first = _train(data, augment=augment, batch=12)[0][0]
        assert not torch.equal(first.sum((1, 2, 3)).sort().values, _sums(data))


def _sums(data: Dataset) -> Tensor:
    return _train(data, augment="none", batch=12)[0][0].sum((1, 2, 3)).sort().values


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named_in_one_line(workers: int, tmp_path: Path) -> None:
    _folder(tmp_path)
    data = load("folder", data_dir=tmp_path, image_size=16, val_size=0)
    for part in ("train", "val"):
        path = tmp_path / part / "dog" / "3.JPEG"
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(InputError) as caught:
            if part == "train":
                _train(data, workers=workers)
            else:
                list(eval_batches(data.test, data, 4, workers=workers))
        assert f"the image {path} cannot be read" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("raw", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_a_file_that_is_no_image_is_named(raw: bytes, tmp_path: Path) -> None:
    _folder(tmp_path)
    path = tmp_path / "val" / "cat" / "a.png"
    path.write_bytes(raw)
    data = load("folder", data_dir=tmp_path, image_size=16)
    with pytest.raises(InputError, match=f"the image {path} cannot be read"):
        list(eval_batches(data.test, data, 100))


def test_every_kind_of_image_becomes_colour(tmp_path: Path) -> None:
    _folder(tmp_path)
    folder, photo = tmp_path / "val" / "dog", Image.fromarray(_photo(0, 40, 40))
    for mode, name in (("L", "l.jpg"), ("CMYK", "c.jpeg"), ("P", "p.png"), ("RGBA", "a.PNG")):
        for path in folder.iterdir():
            path.unlink()
        photo.convert(mode).save(folder / name)
        data = load("folder", data_dir=tmp_path, image_size=28)
        (image,) = data.test.images[data.test.labels == 1].centre_crops(28).float()
        expected = photo.convert("L").convert("RGB") if mode == "L" else photo
        centre = torch.tensor(np.array(expected.resize((32, 32)))).permute(2, 0, 1)[:, 2:30, 2:30]
        assert (image - centre).abs().mean() < 12  # of 255: a palette has few colours


def test_grey_images_of_16_bits_keep_their_brightness(tmp_path: Path) -> None:
    _folder(tmp_path)
    for path in (tmp_path / "val" / "dog").iterdir():
        path.unlink()
    pixels = np.full((40, 40), 20_000, dtype=np.uint16)
    Image.fromarray(pixels).save(tmp_path / "val" / "dog" / "deep.png")
    data = load("folder", data_dir=tmp_path, image_size=28)
    (image,) = data.test.images[data.test.labels == 1].centre_crops(28)
    assert image.unique().tolist() == [20_000 // 257]


def test_names_of_files_in_any_encoding(tmp_path: Path) -> None:
    _folder(tmp_path)
    first = tmp_path / "val" / "dog" / "0.JPEG"
    first.rename(first.with_name("blüte \u2603.jpeg"))
    raw = os.fsencode(tmp_path / "val" / "dog")
    os.rename(raw + b"/1.JPEG", raw + b"/\xff\xfe.jpg")
    data = load("folder", data_dir=tmp_path, image_size=16)
    assert len(data.test) == 12
    assert sum(len(labels) for _, labels in eval_batches(data.test, data, 5)) == 12


@pytest.mark.parametrize("name", ["folder", "imagenet", "mnist", "cifar10", "strokes"])
def test_a_folder_that_may_not_be_entered(name: str, tmp_path: Path) -> None:
    """As for any user but the superuser, who may enter everything."""
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o000)
    user = os.geteuid()
    os.chmod(tmp_path, 0o755)
    try:
        if user == 0:
            os.seteuid(65534)
        if os.access(locked, os.X_OK, effective_ids=True):
            pytest.skip("this system lets everyone in")
        if name == "strokes":
            assert len(load(name, data_dir=locked, difficulty=0).test) == 2000
        else:
            with pytest.raises(InputError):
                load(name, data_dir=locked)
    finally:
        os.seteuid(user)


def test_three_parts_of_a_folder(tmp_path: Path) -> None:
    _folder(tmp_path, ("train", "val", "test"))
    (tmp_path / "test" / "cat" / "0.JPEG").unlink()
    (tmp_path / "val" / "cat" / "0.JPEG").unlink()
    (tmp_path / "val" / "cat" / "1.JPEG").unlink()
    data = load("folder", data_dir=tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (12, 10, 11)
    with pytest.raises(InputError, match=r"val_size 3 .*brings its own"):
        load("folder", data_dir=tmp_path, val_size=3)


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"{tmp_path} has no images.*train/ and val/.*--data-dir"):
        load("folder", data_dir=tmp_path)
    with pytest.raises(InputError, match=r"imagenet has no images.*image-net\.org"):
        load("imagenet", data_dir=tmp_path)
    _folder(tmp_path, ("train",))
    with pytest.raises(InputError, match="has train/, but must have"):
        load("folder", data_dir=tmp_path)
    (tmp_path / "val").mkdir()
    with pytest.raises(InputError, match=rf"{tmp_path / 'val'} has no classes"):
        load("folder", data_dir=tmp_path)
    for name in ("cat", "dgo"):
        (tmp_path / "val" / name).mkdir()
        Image.fromarray(_photo(0, 9, 9)).save(tmp_path / "val" / name / "a.png")
    with pytest.raises(InputError, match=r"the same classes, but only one of them has dgo"):
        load("folder", data_dir=tmp_path)
    (tmp_path / "val" / "dgo").rename(tmp_path / "val" / "dog")
    assert len(load("folder", data_dir=tmp_path).test) == 2
    (tmp_path / "val" / "dog" / "a.png").unlink()
    with pytest.raises(InputError, match=rf"{tmp_path / 'val' / 'dog'} has no image"):
        load("folder", data_dir=tmp_path)


def test_training_on_files_resumes_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    _folder(tmp_path / "data", each=10)
    flags = [
        "--data=folder",
        f"--data-dir={tmp_path / 'data'}",
        "--image-size=8",
        "--val-size=4",
        "--batch=4",
        "--epochs=2",
        "--model=mlp-8",
        "--density=0.5",
        "--checkpoint-interval=3",
        "--threads=1",
        "--wandb=off",
        f"--out={tmp_path}",
        "--device=cpu",
    ]
    run(train.parse([*flags, "--name=whole"]))
    saves = []

    def save(path: Path, *rest: object) -> None:
        original(path, *rest)
        saves.append(path)
        if len(saves) == 2:
            raise KeyboardInterrupt

    original = checkpoint.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        with pytest.raises(StoppedError):
            run(train.parse([*flags, "--name=two"]))
    run(train.parse([f"--resume={tmp_path / 'two'}", "--workers=1"]))
    one, two = (checkpoint.load(tmp_path / name / CHECKPOINT)[0] for name in ("whole", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_damaged_image_ends_the_program_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _folder(tmp_path)
    (tmp_path / "train" / "cat" / "2.JPEG").write_bytes(b"\xff\xd8\xff")
    flags = ["--data=folder", f"--data-dir={tmp_path}", "--image-size=8", "--batch=4"]
    flags += ["--model=mlp-8", "--workers=1", "--val-size=0", f"--out={tmp_path}", "--wandb=off"]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--threads=1"])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("train.py: the image ") and said.count("\n") == 1
    assert "2.JPEG cannot be read" in said


# --- The MAM recipe on both ----------------------------------------------------------------------


def test_mam_on_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thesis' preset, from AlexNet's weights, less its length."""
    (tmp_path / "data").mkdir()
    TinyCifar("cifar10", tmp_path / "data", monkeypatch)
    network = build("alexnet-narrow", in_channels=3, image_size=32, classes=10)
    torch.save(network.state_dict(), tmp_path / "alexnet.pt")
    flags = ["--preset=mam-alexnet", "--model=alexnet-narrow", f"--weights={tmp_path}/alexnet.pt"]
    flags += ["--data=cifar10", f"--data-dir={tmp_path}/data", "--val-size=60", "--batch=64"]
    flags += ["--epochs=2", "--vanish-epochs=1", "--finetune-epochs=1", f"--out={tmp_path}"]
    summary = run(train.parse([*flags, "--name=run"]))
    hidden = 64 * 36 * 512 + 512 * 512
    convolutions = sum(p.numel() for n, p in network.named_parameters() if p.dim() == 4)
    assert summary.weights == round(0.002 * hidden) + convolutions + 512 * 10


def test_mam_on_imagenet(tmp_path: Path) -> None:
    _folder(tmp_path / "imagenet", each=10)
    flags = ["--preset=mam-vit", "--model=vit-narrow", "--data=imagenet", f"--data-dir={tmp_path}"]
    flags += ["--image-size=32", "--val-size=4", "--batch=8", "--mam-layers=*.mlp.0"]
    flags += ["--epochs=1", "--vanish-epochs=0.5", f"--out={tmp_path}", "--name=run"]
    summary = run(train.parse(flags))
    pruned = 4 * 64 * 256
    assert summary.dense_weights - summary.weights == pruned - round(0.0007 * pruned)
