"""Images that stay on disk until a batch needs them."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dst.data.crops import random_box
from growth.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

# The usual evaluation: the shorter side becomes 256/224 of the size, then the middle is cut out.
MARGIN = 256 / 224


class ImageFiles:
    """Files that PIL reads, as colour images; a million of them take some 50 MB.

    ``paths`` are relative to ``root``. An array of bytes, and no list, because loader processes
    share its memory: to count references to a string is to write, and written pages are copied.
    """

    def __init__(self, root: Path, paths: Sequence[str] | np.ndarray) -> None:
        self.root = root
        if not isinstance(paths, np.ndarray):
            paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, indices: Tensor | slice) -> "ImageFiles":
        """Those at ``indices``, (m,) int64 or bool; still on disk."""
        which = indices if isinstance(indices, slice) else indices.numpy()
        return ImageFiles(self.root, self.paths[which])

    def centre_crops(self, size: int) -> Tensor:
        """The middle of each: (n, 3, size, size) uint8."""
        from torchvision.transforms import functional as transform

        def middle(image: "Image", index: int) -> "Image":
            resized = transform.resize(image, [int(size * MARGIN)])
            return transform.center_crop(resized, [size])

        return self._decode(size, middle)

    def random_crops(self, size: int, draws: Tensor) -> Tensor:
        """A random part of each: (n, 3, size, size) uint8. draws: (n, 10, 4), of box_draws."""
        from torchvision.transforms import functional as transform

        def part(image: "Image", index: int) -> "Image":
            box = random_box(image.height, image.width, draws[index])
            return transform.resized_crop(image, *box, [size, size])

        return self._decode(size, part)

    def _decode(self, size: int, cut: Callable[["Image", int], "Image"]) -> Tensor:
        """Raises InputError for a file that is no image, or is damaged."""
        from PIL import Image

        images = torch.empty(len(self), 3, size, size, dtype=torch.uint8)
        for index, name in enumerate(self.paths):
            path = self.root / os.fsdecode(name)
            try:
                with Image.open(path) as file:
                    image = _eight_bits(file).convert("RGB")
            # A damaged PNG is a SyntaxError or a ValueError, a bomb has its own.
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise InputError(
                    f"the image {path} cannot be read ({error}): restore or remove it"
                ) from None
            images[index] = torch.from_numpy(np.array(cut(image, index))).permute(2, 0, 1)
        return images


def _eight_bits(image: "Image") -> "Image":
    """Grey images of 16 bits as such of 8: PIL's own conversion clips them to white."""
    from PIL import Image

    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
