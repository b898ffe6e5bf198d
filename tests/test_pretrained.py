"""Weights from a local file: what is read, what is left out, and what is refused."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dst.models import build
from dst.pretrained import load_weights
from growth import InputError


def network(classes: int = 4, name: str = "mlp-8-6", size: int = 8) -> nn.Module:
    return build(name, in_channels=1, image_size=size, classes=classes)


def same(model: nn.Module, other: nn.Module, but: str = "-") -> bool:
    own, others = model.state_dict(), other.state_dict()
    return all(torch.equal(own[n], others[n]) for n in own if not n.startswith(but))


@pytest.mark.parametrize("how", ["torch", "nested", "parallel", "safetensors"])
def test_every_kind_of_file(tmp_path: Path, how: str) -> None:
    source, model = network(), network()
    state, path = source.state_dict(), tmp_path / "weights.pt"
    if how == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(state, path)
    else:
        kinds = {
            "torch": state,
            "nested": {"epoch": 3, "state_dict": state},
            "parallel": {f"module.{n}": t for n, t in state.items()},
        }
        torch.save(kinds[how], path)
    load_weights(model, path)
    assert same(model, source)


def test_a_classifier_of_other_classes_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, model = network(classes=9), network()
    before = {n: t.clone() for n, t in model.state_dict().items() if n.startswith("7.")}
    torch.save(source.state_dict(), tmp_path / "w.pt")
    with caplog.at_level(logging.WARNING, logger="dst"):
        load_weights(model, tmp_path / "w.pt")
    assert same(model, source, but="7.") and len(before) == 2
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())
    assert "the classifier 7 of" in caplog.text and "other classes" in caplog.text


def test_positions_of_another_image_size(tmp_path: Path) -> None:
    source, model = network(name="vit-narrow", size=16), network(name="vit-narrow", size=32)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert same(model, source, but="encoder.pos_embedding")
    old, new = (m.get_parameter("encoder.pos_embedding") for m in (source, model))
    assert new.shape[1] == 65 and torch.equal(old[:, 0], new[:, 0])
    # The corners of the square of patches are where they were.
    torch.testing.assert_close(new[:, [1, 8, 57, 64]], old[:, [1, 4, 13, 16]])


class Foreign:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("this must never be said",))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read the weights"),
        (b"not weights at all", "holds no weights, or is damaged"),
        (b"", "holds no weights, or is damaged"),
        (pickle.dumps(Foreign()), "holds no weights, or is damaged"),
        ([1, 2], "is no state dict"),
        ({"1.weight": 3}, "is no state dict"),
        ({"fc.weight": torch.zeros(2)}, "of another network: missing 1.weight, 1.bias"),
    ],
)
def test_refusals(
    tmp_path: Path, content: object, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, model = tmp_path / "w.pt", network()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError) as refused:
        load_weights(model, path)
    assert words in str(refused.value) and "\n" not in str(refused.value)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert "never be said" not in capsys.readouterr().out


def test_a_damaged_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(network().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match="holds no weights, or is damaged"):
        load_weights(network(), path)


def test_another_width_is_named(tmp_path: Path) -> None:
    torch.save(network(name="mlp-9-6").state_dict(), tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"missing 1.weight \(another shape\)"):
        load_weights(network(), tmp_path / "w.pt")
