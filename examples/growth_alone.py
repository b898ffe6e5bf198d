"""``growth`` by itself, on a plain PyTorch layer: which missing connections would help the most?

python examples/growth_alone.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import growth

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(100, 200), torch.nn.ReLU(), torch.nn.Linear(200, 10))
x, y = torch.randn(128, 100), torch.randint(10, (128,))

with growth.record(model) as records:
    torch.nn.functional.cross_entropy(model(x), y).backward()

# Say that the even columns of the first layer are alive; ask for five more connections.
row, col = torch.meshgrid(torch.arange(200), torch.arange(0, 100, 2), indexing="ij")
active = (row * 100 + col).flatten()
found = growth.Exact()(records["0"], 5, active)
for i, j, score in zip(found.row.tolist(), found.col.tolist(), found.score.tolist(), strict=True):
    print(f"input {j:2d} -> neuron {i:3d}: |gradient| {score:.5f}")
    assert abs(abs(model[0].weight.grad[i, j].item()) - score) < 1e-6
