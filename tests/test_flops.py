"""Counting: layers by hand, and the published formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dst
import train
from dst.flops import (
    LayerCost,
    dense_training_flops,
    forward_macs,
    layer_costs,
    training_flops,
)
from dst.training import run


def test_multiply_accumulates_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10)
    )
    costs = layer_costs(model, torch.zeros(1, 3, 8, 8))
    assert costs == {"0": LayerCost(16 * 8 * 27, 16 * 8 * 27), "3": LayerCost(1280, 1280)}
    model = dst.sparsify(model, density=0.5, skip=())
    costs = layer_costs(model, torch.zeros(1, 3, 8, 8))
    assert costs == {"0": LayerCost(16 * 108, 16 * 216), "3": LayerCost(640, 1280)}
    assert model.training and not model[0]._forward_hooks


def test_a_layer_called_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(self.fc(x))

    assert layer_costs(Twice(), torch.zeros(1, 4))["fc"] == LayerCost(32, 32)


def test_training_follows_the_rigl_paper():
    """(3 f_S dT + 2 f_S + f_D) / (dT + 1) an image, over a cycle of dT + 1 steps."""
    sparse, dense, interval, batch = 100, 1000, 99, 64
    images = batch * (interval + 1)
    flops = training_flops(6 * sparse * images, 2 * sparse * batch, 2 * dense * batch)
    f_s, f_d = 2 * sparse, 2 * dense
    expected = (3 * f_s * interval + 2 * f_s + f_d) / (interval + 1)
    assert flops / images == pytest.approx(expected)
    assert dense_training_flops(dense * images) == 3 * f_d * images


def test_momentum_counts_what_the_rigl_paper_does_for_snfs():
    """2 f_S + f_D an image, from what the updater reports."""
    torch.manual_seed(0)
    model = dst.sparsify(
        nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.Flatten(), nn.Linear(96, 4)),
        density=0.25,
        skip=(),
    )
    costs = layer_costs(model, torch.zeros(1, 2, 4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = dst.METHODS["snfs"].build(dst.UpdateSchedule(5, 100, 0.5), 0)
    updater = dst.TopologyUpdater(model, optimizer, method)
    for _ in range(4):
        model(torch.randn(3, 2, 4, 4)).sum().backward()
        updater.step()
    f_s = 2 * sum(cost.sparse for cost in costs.values())
    f_d = 2 * sum(cost.dense for cost in costs.values())
    flops = training_flops(12 * 3 * f_s, 0, updater.observed_flops)
    assert flops == 12 * (2 * f_s + f_d)


def test_forward_macs_at_another_density():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(128, 10))
    costs = layer_costs(model, torch.zeros(1, 3, 4, 4))
    assert forward_macs(costs, {"0": 0.5, "2": 0.25}) == 16 * 108 + 320


def test_an_exact_search_counts_one_dense_gradient():
    layer = dst.SparseLinear(6, 4, density=0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    updater = dst.TopologyUpdater(
        nn.Sequential(layer), optimizer, dst.rigl(dst.UpdateSchedule(1, 9, 0.3))
    )
    updater._recorder.start()
    layer(torch.randn(5, 6)).sum().backward()
    updater.step()
    assert updater.last.flops == 2 * 5 * 6 * 4


def test_a_replaced_step_that_is_observed_counts_its_gradient_once(tmp_path):
    """2 f_S and a dense gradient, whether the optimizer steps or not."""
    flags = ["--method=snfs", "--data=digits", "--model=mlp-16", "--epochs=1", "--density=0.2"]
    flags += ["--redistribute=none", "--update-interval=4", f"--out={tmp_path}"]
    stepped, replaced = (
        run(train.parse([*flags, f"--update-skips-step={skips}"])) for skips in (False, True)
    )
    assert stepped.training_flops == replaced.training_flops
    images, f_s, f_d = 20 * 64, stepped.inference_flops, stepped.dense_inference_flops
    # Observed until the last update before the end: 16 of 20 steps.
    assert stepped.training_flops == images * (16 * (2 * f_s + f_d) + 4 * 3 * f_s) // 20
