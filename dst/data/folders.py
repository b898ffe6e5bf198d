"""ImageNet, and any other folder of image files with a folder a class.

torchvision lists the files. Images are decoded when a batch needs them, as colour images.
"""

import os
from pathlib import Path

import torch

from dst.data.dataset import DataOptions, Source, Split
from dst.data.image_files import ImageFiles
from growth.errors import InputError

# Of ImageNet's training images; for lack of better ones also of other photographs.
MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
IMAGE_SIZE = 224
# Validation images held out of train/: so many, but no more than a tenth.
VAL_SIZE, VAL_SHARE = 10_000, 10


def imagenet(options: DataOptions) -> Source:
    """``data_dir``/imagenet/train/<class>/*.JPEG; the official validation images, in val/, are the
    test split, as everywhere in the literature."""
    return _read(options.data_dir / "imagenet", "ImageNet must be asked for at image-net.org")


def folder(options: DataOptions) -> Source:
    """``data_dir`` itself holds train/<class>/ and test/<class>/, or val/<class>/, or all three.

    With all three, val/ is the validation split. With one of test/ and val/, that is the test
    split, and validation images are held out of train/.
    """
    return _read(options.data_dir, "name the folder that holds them by --data-dir")


def _read(root: Path, advice: str) -> Source:
    # Unlike Path.is_dir, False where the folder may not be entered.
    parts = {part: root / part for part in ("train", "val", "test") if os.path.isdir(root / part)}
    if "train" not in parts or len(parts) < 2:
        raise InputError(
            f"the folder {root} has {' and '.join(f'{part}/' for part in parts) or 'no images'}, "
            f"but must have train/ and val/ or test/, each with one folder of images a class: "
            f"{advice}"
        )
    splits: dict[str, Split] = {}
    classes: list[str] = []
    for part, path in parts.items():
        splits[part], found = _list(path)
        classes = classes or found
        if different := sorted(set(classes) ^ set(found)):
            raise InputError(
                f"{parts['train']} and {path} must have the same classes, but only one of them has "
                f"{different[0]}: name their folders alike"
            )
    train = splits.pop("train")
    return Source(
        train,
        test=splits.pop("test") if "test" in splits else splits.pop("val"),
        val=splits.get("val"),
        val_size=min(VAL_SIZE, len(train) // VAL_SHARE),
        classes=len(classes),
        augment="resized-crop-flip",
        mean_std=MEAN_STD,
        image_size=IMAGE_SIZE,
    )


def _list(path: Path) -> tuple[Split, list[str]]:
    """The images in the class folders of ``path``, and the classes' names in order."""
    from torchvision.datasets import ImageFolder

    try:
        # Empty classes are allowed here, so that the error names one and not a thousand.
        found = ImageFolder(path, allow_empty=True)
    except OSError as error:
        raise InputError(
            f"the folder {path} has no classes ({error}): put one folder of images a class there"
        ) from None
    labels = torch.tensor(found.targets, dtype=torch.int64)
    counts = torch.bincount(labels, minlength=len(found.classes))
    if empty := (counts == 0).nonzero().flatten().tolist():
        raise InputError(
            f"the folder {path / found.classes[empty[0]]} has no image in it: put JPEG or PNG "
            "files there, or remove it"
        )
    names = [str(Path(name).relative_to(path)) for name, _ in found.samples]
    return Split(ImageFiles(path, names), labels), found.classes
