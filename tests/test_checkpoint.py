"""Checkpoint files: round trip, damage, and a disk that is full."""

from __future__ import annotations

import errno
import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from dst import checkpoint
from growth import InputError

TENSORS = {
    "a": torch.randn(7, 3),
    "b": torch.arange(5, dtype=torch.int32),
    "half": torch.randn(4).bfloat16(),
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, dtype=torch.int64),
}
STATE = {"step": 3, "loss": 0.1 + 0.2, "nested": {"x": [1, 2]}}


def test_round_trip_is_bit_exact(tmp_path):
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, TENSORS, STATE)
    tensors, state = checkpoint.load(path)
    assert state == STATE and set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_tensors_that_share_memory_are_saved(tmp_path):
    base = torch.randn(6)
    checkpoint.save(tmp_path / "c", {"all": base, "part": base[2:]}, {})
    assert torch.equal(checkpoint.load(tmp_path / "c")[0]["part"], base[2:])


@pytest.mark.parametrize("where", ["tensor", "state", "header length"])
def test_a_flipped_bit_is_noticed(tmp_path, where):
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, TENSORS, STATE)
    data = bytearray(path.read_bytes())
    header = struct.unpack("<Q", data[:8])[0]
    at = {
        "tensor": 8 + header + 1,
        "state": data.index(b"0.30000000000000004") + 5,
        "header length": 1,
    }[where]
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        checkpoint.load(path)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, TENSORS, STATE)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="truncated"):
        checkpoint.load(path)


def test_foreign_files_are_refused(tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "foreign")
    with pytest.raises(InputError, match="not a checkpoint of this version"):
        checkpoint.load(tmp_path / "foreign")
    (tmp_path / "text").write_text(json.dumps(STATE) * 10)
    with pytest.raises(InputError, match="not one at all"):
        checkpoint.load(tmp_path / "text")
    torch.save({"a": 1}, tmp_path / "pickle")
    with pytest.raises(InputError, match="not one at all"):
        checkpoint.load(tmp_path / "pickle")
    with pytest.raises(InputError, match="no checkpoint"):
        checkpoint.load(tmp_path / "missing")


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, TENSORS, STATE)
    before = path.read_bytes()

    def full(tensors, target, metadata):
        target.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, {"a": torch.zeros(3)}, {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizer_round_trip(kind):
    def build():
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        return model, kind(model.parameters(), lr=0.1)

    model, optimizer = build()
    for _ in range(3):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    tensors, rest = checkpoint.split_optimizer(optimizer)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    twin, other = build()
    twin.load_state_dict(model.state_dict())
    checkpoint.join_optimizer(other, tensors, json.loads(json.dumps(rest)))
    for m, o in ((model, optimizer), (twin, other)):
        o.zero_grad()
        m(torch.ones(2, 4)).square().sum().backward()
        o.step()
    assert torch.equal(model.weight, twin.weight)


def test_an_optimizer_of_another_shape_is_refused():
    one = torch.optim.SGD(torch.nn.Linear(4, 3).parameters(), lr=0.1)
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(InputError, match="does not fit"):
        checkpoint.join_optimizer(other, *checkpoint.split_optimizer(one))
