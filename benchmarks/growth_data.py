"""Vectors to measure searches on: drawn ones of any width, and recordings of trained networks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

import growth
from growth.conv_pairs import ConvPairs

BATCH = 128
# Of a drawn gradient, beside the noise.
RANK, NOISE = 32, 0.5
# Standard deviation of the logarithm of a neuron's norm.
SKEWS = {"synth": 1.0, "synth-flat": 0.5}

# Recorded networks, their epochs, and which layers. Widths from 144 x 16 to 2048 x 2048.
NETWORKS = {
    "mlp": ("mlp-2048-2048", 2, ("1", "4")),
    "wrn": ("wrn-10-1", 2, ("group1.0.conv2", "group2.0.conv2", "group3.0.conv2")),
}
# Of WideResNet-28-5: 320 -> 320 channels, 3 x 3, on maps of 8 x 8.
LARGEST_CONV = (320, 320, 8)


def load(source: str, parts: Iterable[int | str]) -> dict[int | str, growth.Pairs]:
    """The vectors of each part: a width of ``synth``, ``synth-flat``, ``iid``, a layer of a
    network, or the one convolution of ``conv``."""
    if source in NETWORKS:
        return recorded(source)
    if source == "conv":
        return {part: convolution() for part in parts}
    return {part: growth.LinearPairs(*drawn(source, int(part))) for part in parts}


def small(source: str) -> growth.Pairs:
    """Something of the same kind, searched in no time."""
    if source in ("wrn", "conv"):
        generator = torch.Generator().manual_seed(0)
        x, dz = (torch.randn(8, 32, 8, 8, generator=generator) for _ in range(2))
        return ConvPairs(x, dz, (3, 3), padding=(1, 1))
    return growth.LinearPairs(*drawn("synth", 1024, 64))


def drawn(source: str, n: int, batch: int = BATCH, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x: (batch, n), dz: (batch, n). ``iid``: Gaussian. Others: of rank 32 and noise, as trained
    networks have it, x behind a ReLU, with log-normal norms of the neurons."""
    generator = torch.Generator().manual_seed(seed)
    if source == "iid":
        x = torch.randn(batch, n, generator=generator)
        return x, torch.randn(batch, n, generator=generator)
    x = _structured(n, batch, generator).relu_() * _norms(n, SKEWS[source], generator)
    return x, _structured(n, batch, generator) * _norms(n, SKEWS[source], generator)


def _structured(n: int, batch: int, generator: torch.Generator) -> Tensor:
    codes = torch.randn(batch, RANK, generator=generator)
    found = codes @ torch.randn(RANK, n, generator=generator) / RANK**0.5
    return found.add_(torch.randn(batch, n, generator=generator), alpha=NOISE)


def _norms(n: int, skew: float, generator: torch.Generator) -> Tensor:
    return torch.exp(skew * torch.randn(n, generator=generator))


def convolution(seed: int = 0) -> ConvPairs:
    n_in, n_out, size = LARGEST_CONV
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, n_in, size, size, generator=generator).relu_()
    dz = torch.randn(BATCH, n_out, size, size, generator=generator)
    return ConvPairs(x, dz, (3, 3), padding=(1, 1))


def recorded(source: str) -> dict[int | str, growth.Pairs]:
    """Layers of a network after a short training on mnist-5k, from one batch."""
    # Not at the top: recordings alone need them.
    from dst.data import load as load_images
    from dst.data import train_loader
    from dst.models import build

    name, epochs, layers = NETWORKS[source]
    torch.manual_seed(0)
    data = load_images("mnist-5k", data_dir="data")
    model = build(
        name, in_channels=data.in_channels, image_size=data.image_size, classes=data.classes
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    recorder = growth.Recorder(model, layers)
    for epoch in range(epochs + 1):
        batches = train_loader(
            data.train,
            data,
            batch=BATCH,
            epoch=epoch,
            start=0,
            seed=0,
            augment="none",
            workers=0,
        )
        if epoch == epochs:
            recorder.start()
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            if epoch == epochs:
                break
            optimizer.step()
    recorder.stop()
    return dict(recorder.records())
