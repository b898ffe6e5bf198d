"""Sparse training in a loop of your own: two lines more than dense training.

python examples/own_loop.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from sklearn.datasets import load_digits

import dst

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 8 - 1, torch.tensor(labels)
order = torch.randperm(len(y))
train, test = order[:1500], order[1500:]

model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
model = dst.sparsify(model, density=0.05, distribution="erk")
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

# Every 20 steps until step 450, replace 30 % of the connections, falling to none by a cosine.
method = dst.rigl(dst.UpdateSchedule(interval=20, end=450, fraction=0.3))
updater = dst.TopologyUpdater(model, optimizer, method)

for _ in range(600):
    batch = train[torch.randint(len(train), (64,))]
    loss = torch.nn.functional.cross_entropy(model(x[batch]), y[batch])
    optimizer.zero_grad()
    loss.backward()
    if not updater.step():
        optimizer.step()

accuracy = (model(x[test]).argmax(1) == y[test]).float().mean()
print(f"test accuracy {accuracy:.3f} at density {dst.model_density(model):.3f}, ", end="")
print(f"{updater.explored_share():.1%} of all connections tried")
