"""``strokes``: ten classes of polylines, drawn by this file, with one knob for how hard they are.

An image is one of ten fixed skeletons, turned, scaled, sheared, shifted and jittered, drawn by a
pen of some width beneath stray strokes and noise. Every draw comes from a named stream of its own,
so that a higher difficulty gives the same images, only harder, and the pixels are made by steps
that IEEE 754 rounds exactly, so that they are the same on every machine.
"""

import contextlib
import os
import secrets
from pathlib import Path

import torch
from torch import Tensor

from dst import checkpoint
from dst.data.dataset import DataOptions, Source, Split
from dst.seeding import generator
from growth.errors import InputError

# Part of the cache's name: raise it whenever a pixel changes.
VERSION = 1
SIZE = 28
TRAIN, TEST = 8000, 2000
# Beyond it next to nothing can be told apart, and at 4 a shape could shrink to a point.
HARDEST = 3

# Ten skeletons of five vertices (x, y) each, y downwards, in units of the image, from its middle.
SKELETONS = torch.tensor(
    [
        [(-0.34, -0.36), (0.34, -0.36), (-0.34, 0.36), (0.34, 0.36), (0.34, 0.08)],
        [(0.31, -0.39), (-0.31, -0.39), (-0.31, 0.00), (0.31, 0.00), (0.06, 0.42)],
        [(-0.35, 0.35), (-0.20, -0.39), (0.00, 0.17), (0.20, -0.39), (0.35, 0.35)],
        [(-0.35, -0.35), (-0.20, 0.39), (0.00, -0.17), (0.20, 0.39), (0.35, -0.35)],
        [(0.11, 0.39), (0.11, -0.39), (-0.34, 0.11), (0.36, 0.11), (0.36, -0.11)],
        [(0.00, -0.42), (0.39, 0.00), (0.00, 0.42), (-0.39, 0.00), (0.00, -0.42)],
        [(0.28, -0.39), (-0.28, -0.39), (-0.28, 0.39), (0.28, 0.39), (0.28, 0.03)],
        [(-0.28, -0.39), (-0.28, 0.39), (-0.28, 0.03), (0.28, 0.03), (0.28, 0.39)],
        [(-0.34, -0.39), (0.34, 0.39), (0.00, 0.00), (0.34, -0.39), (-0.34, 0.39)],
        [(-0.35, -0.39), (0.35, -0.39), (0.00, -0.39), (0.00, 0.39), (0.28, 0.39)],
    ],
    dtype=torch.float64,
)

# What difficulty 1 draws; all but the pen and the reach is multiplied by the difficulty.
ROTATION, SCALE, SHEAR, SHIFT = 0.35, 0.25, 0.3, 0.12  # uniform, up to so much either way
JITTER, NOISE = 0.05, 0.125  # standard deviations: of a vertex, of a pixel
STRAY, STRAY_REACH = 3, 0.12  # strokes; uniform, from one end to the other, either way
PEN = (0.035, 0.055)  # from the middle of a stroke to half its ink, in units of the image


def strokes(options: DataOptions) -> Source:
    """8000 training and 2000 test images of 28 px, ten classes, kept in ``data_dir``/strokes.

    No augmentation is usual: the images are turned and shifted as they are made.
    """
    if not 0 <= options.difficulty <= HARDEST:
        raise InputError(
            f"difficulty {options.difficulty} is impossible: give 0 (clean shapes) to {HARDEST}"
        )
    # What cannot be read is made again, and what cannot be written is made every time.
    name = f"v{VERSION}-difficulty-{options.difficulty}.safetensors"
    path = options.data_dir / "strokes" / name
    tensors = _read(path, options.difficulty)
    if tensors is None:
        tensors = {}
        for part, count in (("train", TRAIN), ("test", TEST)):
            images, labels = draw(part, count, options.difficulty)
            tensors[f"{part}/images"], tensors[f"{part}/labels"] = images, labels
        _write(path, tensors, options.difficulty)
    train, test = (Split(tensors[f"{p}/images"], tensors[f"{p}/labels"]) for p in ("train", "test"))
    return Source(train, test, val_size=1000, classes=10, augment="none")


def draw(part: str, count: int, difficulty: float) -> tuple[Tensor, Tensor]:
    """(count, 1, 28, 28) uint8 images and (count,) int64 labels of ``part``, train or test."""
    labels = torch.arange(count) % len(SKELETONS)
    lines = torch.cat([_shapes(part, labels, difficulty), _stray(part, count, difficulty)], 1)
    pen = _uniform(f"{part}.pen", (count, 1, 1), *PEN).float()
    noise = generator(0, f"strokes.{part}.noise", 0)
    chunks = []
    # The distances of a chunk's pixels from its lines fit a core's cache.
    for some, width in zip(lines.float().split(100), pen.split(100), strict=True):
        ink = (1.5 - _distances(some) / width).clamp_(0, 1)
        ink += difficulty * NOISE * _normal(ink.shape, noise)
        chunks.append((ink.clamp_(0, 1) * 255).round_().to(torch.uint8))
    return torch.cat(chunks).unsqueeze(1), labels


def _shapes(part: str, labels: Tensor, difficulty: float) -> Tensor:
    """The four lines of each image's skeleton: (n, 4, 2 ends, 2)."""
    n = len(labels)
    jitter = _normal((n, 5, 2), generator(0, f"strokes.{part}.jitter", 0))
    x, y = (SKELETONS[labels] + difficulty * JITTER * jitter).unbind(2)

    def up_to(name: str, most: float) -> Tensor:
        return difficulty * _uniform(f"{part}.{name}", (n, 1), -most, most)

    angle, scale, shear = up_to("rotation", ROTATION), up_to("scale", SCALE), up_to("shear", SHEAR)
    x, y = (1 + scale) * (x + shear * y), (1 + scale) * y
    x, y = angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y
    x, y = x + 0.5 + up_to("shift-x", SHIFT), y + 0.5 + up_to("shift-y", SHIFT)
    points = torch.stack([x, y], 2)
    return torch.stack([points[:, :-1], points[:, 1:]], 2)


def _stray(part: str, count: int, difficulty: float) -> Tensor:
    """Stray strokes, 3 x difficulty an image on average: (count, slots, 2 ends, 2)."""
    slots = int(-(-STRAY * difficulty // 1))
    strokes = []
    for slot in range(slots):
        start = _uniform(f"{part}.stray-start", (count, 2), 0, 1, slot)
        step = _uniform(f"{part}.stray-step", (count, 2), -STRAY_REACH, STRAY_REACH, slot)
        # The last slot is used by the share of the images that gives that average.
        shown = _uniform(f"{part}.stray-shown", (count, 1), 0, 1, slot) < STRAY * difficulty - slot
        # Far outside of the image it leaves no ink.
        start = torch.where(shown, start, 9.0)
        strokes.append(torch.stack([start, start + step], 1))
    return torch.stack(strokes, 1) if strokes else torch.empty(count, 0, 2, 2, dtype=torch.float64)


def _distances(lines: Tensor) -> Tensor:
    """(n, 28, 28): from each pixel to the nearest of its image's ``lines`` (n, lines, 2 ends, 2).

    One rounded operation at a time (no matrix product, no fused multiply-add).
    """
    x = ((torch.arange(SIZE) + 0.5) / SIZE).view(1, 1, 1, SIZE)
    y = x.transpose(2, 3)
    start, along = lines[:, :, 0], lines[:, :, 1] - lines[:, :, 0]
    (x0, y0), (dx, dy) = (tensor[..., None, None].unbind(2) for tensor in (start, along))
    length = (dx * dx + dy * dy).clamp_(min=1e-12)
    # How far along its line, 0 to 1, the point lies that is nearest to the pixel.
    share = ((x - x0) * (dx / length) + (y - y0) * (dy / length)).clamp_(0, 1)
    off_x, off_y = share * dx, share.mul_(dy)
    off_x = off_x.neg_().add_(x - x0)
    off_y = off_y.neg_().add_(y - y0)
    return off_x.mul_(off_x).add_(off_y.mul_(off_y)).amin(1).sqrt_()


def _uniform(name: str, shape: tuple[int, ...], low: float, high: float, step: int = 0) -> Tensor:
    """float64, from the stream strokes.``name``."""
    random = torch.rand(shape, generator=generator(0, f"strokes.{name}", step), dtype=torch.float64)
    return low + (high - low) * random


def _normal(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Of mean 0 and deviation 1, float32: the sum of four random bytes, which is near to normal.

    ``torch.randn`` takes logarithms and cosines, which machines round in their own ways.
    """
    word = torch.randint(2**32, shape, generator=random)
    total = (word & 255) + (word >> 8 & 255) + (word >> 16 & 255) + (word >> 24)
    return (total - 510) / (4 * (256**2 - 1) / 12) ** 0.5


def _read(path: Path, difficulty: float) -> dict[str, Tensor] | None:
    """What :func:`_write` wrote there; None for a file that is missing, damaged or foreign."""
    try:
        tensors, state = checkpoint.load(path)
    except InputError:
        return None
    return tensors if state == _state(difficulty) else None


def _write(path: Path, tensors: dict[str, Tensor], difficulty: float) -> None:
    """Keep ``tensors`` if the folder can be written to. Processes may write at the same time."""
    own = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(own, tensors, _state(difficulty))
        os.replace(own, path)
    except OSError:
        with contextlib.suppress(OSError):
            own.unlink()


def _state(difficulty: float) -> dict[str, object]:
    return {"data": "strokes", "version": VERSION, "difficulty": difficulty}
