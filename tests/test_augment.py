"""Augmentation: what it does to images, and that it draws from its generator alone."""

import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as transform

from dst.data import AUGMENTATIONS, horizontal_flip, random_crop
from dst.data.augment import colour_jitter, random_rotation
from dst.data.crops import AREA, RATIO, box_draws, random_box, random_resized_crops, resize
from dst.seeding import generator


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_random_crop_equals_a_loop_over_the_images(padding: int) -> None:
    images = torch.randint(1, 256, (40, 3, 5, 7), dtype=torch.uint8)
    cropped = random_crop(images, padding, generator(0, "x", 0))
    offsets = torch.randint(2 * padding + 1, (2, 40), generator=generator(0, "x", 0))
    for image, crop, top, left in zip(images, cropped, *offsets.tolist(), strict=True):
        expected = torch.zeros_like(image)
        for y in range(5):
            for x in range(7):
                from_y, from_x = y + top - padding, x + left - padding
                if 0 <= from_y < 5 and 0 <= from_x < 7:
                    expected[:, y, x] = image[:, from_y, from_x]
        assert torch.equal(crop, expected)
    assert cropped.is_contiguous() and cropped.dtype == torch.uint8
    assert offsets.min() == 0 and offsets.max() == 2 * padding


def test_flip_mirrors_about_half_of_the_images() -> None:
    images = torch.randint(256, (400, 1, 3, 5), dtype=torch.uint8)
    flipped = horizontal_flip(images, generator(0, "x", 0))
    mirrored = (flipped == images.flip(3)).all((1, 2, 3))
    kept = (flipped == images).all((1, 2, 3))
    assert (mirrored | kept).all()
    assert 160 <= int(mirrored.sum()) <= 240  # 4 standard deviations


def test_named_augmentations() -> None:
    images = torch.full((500, 1, 12, 12), 9, dtype=torch.uint8)

    def border(name: str) -> int:
        """The most rows of padding that came in at the top."""
        augmented = AUGMENTATIONS[name].change(images, generator(0, "x", 0))
        return int((augmented[:, 0, :, 6] == 0).cumprod(1).sum(1).max())

    assert [border(name) for name in ("none", "shift", "crop-flip")] == [0, 2, 4]
    gradient = torch.arange(1, 33, dtype=torch.uint8).expand(500, 1, 32, 32)

    def any_flipped(name: str) -> bool:
        row = AUGMENTATIONS[name].change(gradient, generator(0, "x", 0))[:, 0, 16].int()
        return bool((row[:, 16] < row[:, 15]).any())

    assert [any_flipped(name) for name in ("none", "shift", "crop-flip")] == [False, False, True]


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_augmentation_keeps_shape_and_dtype_and_draws_from_its_generator(
    name: str, channels: int
) -> None:
    images = torch.randint(256, (6, channels, 14, 10), dtype=torch.uint8)
    before, state = images.clone(), torch.get_rng_state()
    change = AUGMENTATIONS[name].change
    first = change(images, generator(0, "x", 0))
    assert first.shape == images.shape and first.dtype == torch.uint8
    assert torch.equal(first, change(images, generator(0, "x", 0)))
    assert torch.equal(first, change(images, generator(0, "x", 1))) == (name == "none")
    assert torch.equal(images, before) and torch.equal(torch.get_rng_state(), state)


def test_rotation_is_torchvisions() -> None:
    images = torch.nn.functional.interpolate(torch.rand(20, 3, 4, 4), (24, 32), mode="bicubic")
    images = (images.clamp(0, 1) * 255).to(torch.uint8)
    turned = random_rotation(images, 30, generator(0, "x", 0))
    angles = 60 * torch.rand(20, generator=generator(0, "x", 0)) - 30
    for image, result, angle in zip(images, turned, angles.tolist(), strict=True):
        expected = transform.rotate(
            image, -angle, interpolation=transform.InterpolationMode.BILINEAR
        )
        # Only at the edge does torchvision fade to black in another way.
        inside = slice(None), slice(8, -8), slice(10, -10)
        assert (result[inside].int() - expected[inside].int()).abs().max() <= 1
        assert (result.float() - expected.float()).abs().mean() < 4
    corners = turned[:, :, ::23, ::31]
    assert (corners == 0).any() and angles.abs().max() > 20


@pytest.mark.parametrize("channels", [1, 3])
def test_colour_jitter_is_torchvisions_in_that_order(channels: int) -> None:
    images = torch.randint(256, (8, channels, 9, 9), dtype=torch.uint8)
    found = colour_jitter(images, 0.4, generator(0, "x", 0))
    draws = torch.rand(3, 8, generator=generator(0, "x", 0))
    factors = (0.6 + 0.8 * draws).T.tolist()
    for image, result, (bright, contrast, saturated) in zip(images, found, factors, strict=True):
        expected = transform.adjust_brightness(image / 255, bright)
        expected = transform.adjust_contrast(expected, contrast)
        if channels == 3:
            expected = transform.adjust_saturation(expected, saturated)
        assert (result - 255 * expected).abs().max() < 1


def test_colour_jitter_of_strength_0_changes_nothing() -> None:
    images = torch.randint(256, (8, 3, 9, 9), dtype=torch.uint8)
    assert torch.equal(colour_jitter(images, 0, generator(0, "x", 0)), images)


def test_mam_turns_shifts_and_mirrors() -> None:
    images = torch.full((300, 3, 32, 32), 200, dtype=torch.uint8)
    images[:, :, :, 16:] = 100
    changed = AUGMENTATIONS["mam"].change(images, generator(0, "x", 0)).float().mean(1)
    left, right = changed[:, 16, 10], changed[:, 16, 22]
    assert 100 <= int((left < right).sum()) <= 200  # mirrored, about half
    rows = (changed[:, :, 16] > 0).float()
    assert ((rows[:, :4].sum(1) == 0).any()) and ((rows[:, -4:].sum(1) == 0).any())  # 4 px away
    assert changed[:, 16, 16].unique().numel() > 100  # brightness
    still = AUGMENTATIONS["mam-imagenet"].change(images, generator(0, "x", 0))
    assert (still > 0).all()  # neither turned nor shifted


def test_resize_is_antialiased_and_leaves_alone_what_fits() -> None:
    images = torch.randint(256, (3, 1, 28, 28), dtype=torch.uint8)
    assert resize(images, 28) is images
    assert resize(images, 56).shape == (3, 1, 56, 56) and resize(images, 56).dtype == torch.uint8
    # Every pixel of the large image counts in the small one.
    stripes = torch.tensor([0, 0, 0, 240], dtype=torch.uint8).repeat(28).expand(1, 1, 112, 112)
    assert (resize(stripes, 28)[..., 1:-1] == 60).all()


def test_random_boxes_fit_and_have_the_documented_sizes() -> None:
    draws = box_draws(2000, generator(0, "x", 0))
    boxes = torch.tensor([random_box(100, 140, own) for own in draws])
    top, left, height, width = boxes.T
    assert int(top.min()) >= 0 and int((top + height).max()) == 100
    assert int(left.min()) >= 0 and int((left + width).max()) == 140
    share, ratio = height * width / 14000, width / height
    assert 0.078 <= float(share.min()) < 0.1 and 0.9 < float(share.max()) <= 1
    usual = torch.tensor(
        [
            RandomResizedCrop.get_params(torch.empty(3, 100, 140), [*AREA], [*RATIO])
            for _ in range(2000)
        ]
    )
    areas = usual[:, 2] * usual[:, 3] / 14000
    assert float(share.mean()) == pytest.approx(float(areas.mean()), abs=0.03)
    assert float(share.std()) == pytest.approx(float(areas.std()), abs=0.03)
    assert 0.7 <= float(ratio.min()) < 0.78 and 1.3 < float(ratio.max()) <= 1.4
    # Where no box of the right shape fits, the largest one in the middle.
    thin = torch.ones(10, 4)
    assert random_box(100, 10, thin) == (43, 0, 13, 10)
    assert random_box(10, 100, thin) == (0, 43, 10, 13)


def test_random_resized_crops_show_a_part_at_full_size() -> None:
    ramp = torch.arange(64, dtype=torch.uint8).expand(50, 1, 64, 64)
    draws = box_draws(50, generator(0, "x", 0))
    crops = random_resized_crops(ramp, 16, draws)
    assert crops.shape == (50, 1, 16, 16)
    for crop, own in zip(crops, draws, strict=True):
        _, left, _, width = random_box(64, 64, own)
        assert abs(int(crop.min()) - left) <= 3 and abs(int(crop.max()) - (left + width - 1)) <= 3
