"""Golden figures of the RigL paper's setting: sizes of the networks, and what ERK makes of them.

Evci et al., "Rigging the Lottery", ICML 2020, arXiv:1911.11134. On the meta device: shapes only.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from dst import density_table, model_density, sparsify
from dst.distributions import erdos_renyi_kernel
from dst.flops import layer_costs
from dst.models import build

DENSITIES = (0.2, 0.1, 0.05, 0.02)


class Published(NamedTuple):
    """Weights of convolutions and linear layers without biases, their multiply-accumulates for one
    image, and the share of these left by ERK at each of DENSITIES."""

    image_size: int
    classes: int
    weights: int
    macs: float
    ratios: tuple[float, ...]


PUBLISHED = {
    "wrn-22-2": Published(32, 10, 1_076_912, 157.73e6, (0.352, 0.174, 0.088, 0.035)),
    "wrn-16-8": Published(32, 10, 10_954_160, 1548.1e6, (0.328, 0.165, 0.083, 0.034)),
    "wrn-28-10": Published(32, 10, 36_461_232, 5243.3e6, (0.340, 0.169, 0.085, 0.034)),
    "resnet50": Published(224, 1000, 25_502_912, 4089.2e6, (0.414, 0.242, 0.122, 0.049)),
}


def _layers(name: str) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Weight shapes, and multiply-accumulates for one image, of every layer."""
    size, classes, *_ = PUBLISHED[name]
    with torch.device("meta"):
        model = build(name, in_channels=3, image_size=size, classes=classes)
        costs = layer_costs(model, torch.empty(1, 3, size, size))
    shapes = {row.name: row.shape for row in density_table(model)}
    return shapes, {name: cost.dense for name, cost in costs.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_and_erk_costs(name: str) -> None:
    published = PUBLISHED[name]
    shapes, macs = _layers(name)
    weights = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    assert sum(weights.values()) == published.weights
    assert sum(macs.values()) == pytest.approx(published.macs, rel=3e-5)
    for density, ratio in zip(DENSITIES, published.ratios, strict=True):
        densities = erdos_renyi_kernel(shapes, {}, density)
        alive = sum(densities[layer] * size for layer, size in weights.items())
        assert alive == pytest.approx(density * published.weights)
        cost = sum(densities[layer] * count for layer, count in macs.items())
        # As exact as three digits are.
        assert cost / sum(macs.values()) == pytest.approx(ratio, abs=0.0005)


SHORTCUTS = [f"group{group}.0.shortcut" for group in (1, 2, 3)]


@pytest.mark.parametrize(
    ("density", "epsilon", "dense"),
    [
        (0.20, 75.61, {"stem", *SHORTCUTS, "fc"}),
        (0.10, 35.94, {"stem", *SHORTCUTS[:2], "fc"}),
        (0.05, 17.35, {"stem", *SHORTCUTS[:1], "fc"}),
        (0.02, 6.76, set()),
    ],
)
def test_erk_of_wrn_22_2(density: float, epsilon: float, dense: set[str]) -> None:
    shapes, _ = _layers("wrn-22-2")
    densities = erdos_renyi_kernel(shapes, {}, density)
    assert {name for name, share in densities.items() if share == 1.0} == dense
    for name in densities.keys() - dense:
        raw = sum(shapes[name]) / torch.Size(shapes[name]).numel()
        # The published figures were taken from whole numbers of weights.
        assert densities[name] / raw == pytest.approx(epsilon, abs=0.01)


def test_sparsify_gives_a_network_these_densities() -> None:
    model = build("wrn-22-2", in_channels=3, image_size=32, classes=10)
    sparsify(model, density=0.2, distribution="erk")
    dense = {row.name for row in density_table(model) if row.block is None}
    assert dense == {"stem", *SHORTCUTS, "fc"}
    assert model_density(model) == pytest.approx(0.2, abs=1e-5)
    costs = layer_costs(model, torch.zeros(1, 3, 32, 32)).values()
    ratio = sum(cost.sparse for cost in costs) / sum(cost.dense for cost in costs)
    assert ratio == pytest.approx(0.352, abs=0.0005)
