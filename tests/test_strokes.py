"""The drawn data set: its pixels, its knob and its cache."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train
from dst.config import check
from dst.data import Dataset, load
from dst.data import drawn as module
from dst.data.drawn import draw
from growth.errors import InputError


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRAIN", 1100)
    monkeypatch.setattr(module, "TEST", 40)


def _load(folder: Path, **options: float) -> Dataset:
    return load("strokes", data_dir=folder, **options)  # type: ignore[arg-type]


def _images(data: Dataset) -> Tensor:
    assert isinstance(data.train.images, Tensor) and isinstance(data.test.images, Tensor)
    return torch.cat([data.train.images, data.test.images])


def test_pixels_are_the_same_everywhere() -> None:
    """A change of these figures changes every result on strokes: raise VERSION."""
    images, labels = draw("train", 50, 1.0)
    assert images.shape == (50, 1, 28, 28) and images.dtype == torch.uint8
    assert labels.tolist() == 5 * list(range(10))
    weights = torch.arange(784) % 97
    sums = (images[:4].flatten(1).long() * weights).sum(1)
    assert sums.tolist() == [2706666, 2574403, 3559309, 2879599]
    assert torch.equal(images, draw("train", 50, 1.0)[0])
    assert not torch.equal(images, draw("test", 50, 1.0)[0])


def test_pixels_depend_on_no_random_state_and_no_number_of_threads() -> None:
    first = draw("test", 120, 1.0)[0]
    torch.manual_seed(5)
    torch.set_num_threads(2)
    try:
        assert torch.equal(first, draw("test", 120, 1.0)[0])
    finally:
        torch.set_num_threads(1)


def test_clean_shapes_differ_by_the_pen_alone() -> None:
    images, labels = draw("train", 60, 0.0)
    ink = (images > 127).flatten(1).float()
    assert images[:, :, ::27, ::27].max() == 0  # no noise, no stray strokes in the corners
    # Overlap over union: large within a class, small between any two.
    both = ink @ ink.T
    overlap = both / (ink.sum(1)[:, None] + ink.sum(1) - both)
    same = labels[:, None] == labels
    assert overlap[same].min() > 0.6
    assert overlap[~same].max() < 0.6


def test_everything_grows_with_the_difficulty() -> None:
    levels = [0.0, 0.5, 1.0, 1.5, 2.0]
    images = [draw("train", 400, level)[0].float() for level in levels]
    clean = images[0]
    # The corner pixels see no shape, so that what is there is noise and stray strokes.
    corners = [float(image[:, :, ::27, ::27].mean()) for image in images]
    changed = [float((image - clean).abs().mean()) for image in images]
    assert corners == sorted(corners) and corners[0] == 0
    assert changed == sorted(changed)
    assert all(b > 1.05 * a for a, b in itertools.pairwise(changed))


def test_noise_has_its_deviation(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = module._normal((200_000,), torch.Generator().manual_seed(0))
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    assert float(noise.std()) == pytest.approx(1, abs=0.01)
    assert float((noise.abs() < 1).float().mean()) == pytest.approx(0.683, abs=0.02)


@pytest.mark.parametrize(("difficulty", "strokes"), [(0.0, 0), (0.5, 1.5), (1.0, 3), (2.5, 7.5)])
def test_stray_strokes_on_average(difficulty: float, strokes: float) -> None:
    stray = module._stray("train", 2000, difficulty)
    shown = (stray[:, :, 0, 0] <= 1).sum(1).double()
    assert float(shown.mean()) == pytest.approx(strokes, abs=0.05)
    assert shown.max() - shown.min() <= 1


def test_distances_are_those_to_the_nearest_point_of_a_line() -> None:
    lines = torch.rand(5, 3, 2, 2)
    lines[0, 0, 1] = lines[0, 0, 0]  # a line without a length is a point
    found = module._distances(lines)
    share = torch.linspace(0, 1, 2001).view(-1, 1)
    for image in range(5):
        starts, ends = lines[image, :, 0], lines[image, :, 1]
        points = torch.cat([a + share * (b - a) for a, b in zip(starts, ends, strict=True)])
        centre = (torch.tensor([[11, 3], [0, 27]]) + 0.5) / 28  # (y, x)
        nearest = torch.cdist(centre.flip(1), points).amin(1)
        assert found[image, [11, 0], [3, 27]].tolist() == pytest.approx(nearest.tolist(), abs=1e-3)


def test_splits(tmp_path: Path) -> None:
    data = _load(tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (7000, 1000, 2000)
    assert torch.bincount(data.test.labels).tolist() == [200] * 10
    assert torch.bincount(data.val.labels).tolist() == [100] * 10
    assert (data.classes, data.in_channels, data.image_size, data.augment) == (10, 1, 28, "none")
    assert [path.name for path in (tmp_path / "strokes").iterdir()] == [
        "v1-difficulty-1.0.safetensors"
    ]


def test_the_cache_is_read_and_keeps_what_was_drawn(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _load(tmp_path, difficulty=0.25)
    monkeypatch.setattr(module, "draw", lambda *_: pytest.fail("drawn again"))
    again = _load(tmp_path, difficulty=0.25)
    assert torch.equal(_images(first), _images(again))
    assert torch.equal(first.train.labels, again.train.labels)


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty", "other", "folder"])
def test_a_damaged_or_foreign_cache_is_made_anew(small: None, tmp_path: Path, damage: str) -> None:
    first = _load(tmp_path)
    (path,) = (tmp_path / "strokes").iterdir()
    raw = path.read_bytes()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage == "other":
        _load(tmp_path, difficulty=2.0)
        os.replace(path.with_name("v1-difficulty-2.0.safetensors"), path)
    else:
        path.write_bytes(
            {
                "cut": raw[:-9],
                "flipped": raw[:-5000] + bytes(byte ^ 1 for byte in raw[-5000:]),
                "text": b"not at all",
                "empty": b"",
            }[damage]
        )
    again = _load(tmp_path)
    assert torch.equal(_images(first), _images(again))
    if damage != "folder":
        assert module._read(path, 1.0) is not None
    assert list((tmp_path / "strokes").iterdir()) == [path]


def test_a_folder_that_cannot_be_written_to_keeps_nothing(small: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    data = _load(tmp_path / "file")
    assert torch.equal(_images(data), _images(_load(tmp_path)))


def test_two_that_draw_at_the_same_time(small: None, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: _images(_load(tmp_path)), range(8)))
    assert all(torch.equal(images, loaded[0]) for images in loaded)
    assert len(list((tmp_path / "strokes").iterdir())) == 1


@pytest.mark.parametrize("difficulty", [-0.1, 3.1, float("nan"), float("inf")])
def test_impossible_difficulties_are_refused(difficulty: float, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"difficulty {difficulty}"):
        _load(tmp_path, difficulty=difficulty)
    with pytest.raises(InputError, match=f"data-difficulty {difficulty} must be at least 0"):
        check(train.parse(["--data=strokes", f"--data-difficulty={difficulty}"]))
