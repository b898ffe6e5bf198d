"""Counting: layers by hand, and the published formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dst
from dst.flops import LayerCost, layer_costs, training_cost


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
    cost = training_cost(
        {"layer": LayerCost(sparse, dense)},
        images=batch * (interval + 1),
        skipped_images=batch,
        search_flops=2 * dense * batch,
    )
    f_s, f_d = 2 * sparse, 2 * dense
    expected = (3 * f_s * interval + 2 * f_s + f_d) / (interval + 1)
    assert cost.flops / (batch * (interval + 1)) == pytest.approx(expected)
    assert cost.dense_flops == 3 * f_d * batch * (interval + 1)


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
