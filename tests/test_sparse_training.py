"""Networks that train through the sparse products as they do through the dense ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dst import sparsify
from dst.models import build


def _losses(name: str, density: float, compute: str, batch: int, steps: int) -> list[float]:
    torch.manual_seed(0)
    model = build(name, in_channels=3, image_size=32, classes=10)
    sparsify(model, density=density, block=(16, 16), compute=compute, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        images = torch.randn(batch, 3, 32, 32, generator=generator)
        labels = torch.randint(10, (batch,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("name", "density"),
    [("wrn-10-2", 0.3), pytest.param("wrn-28-10", 0.1, marks=pytest.mark.slow)],
)
def test_sparse_and_dense_products_train_alike(name: str, density: float) -> None:
    sparse, dense = (_losses(name, density, compute, 4, 3) for compute in ("sparse", "dense"))
    assert sparse == pytest.approx(dense, rel=1e-3)
    assert len(set(sparse)) == 3
