"""Recording (x, dz) of layers while a model trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growth.conv_pairs import ConvPairs
from growth.errors import InputError
from growth.pairs import JoinedPairs, LinearPairs, Pairs


class Recorder:
    """Captures activations and output gradients of linear layers and convolutions.

    Works on ``nn.Linear``, ``nn.Conv2d`` and any module with ``records_as`` set to ``"linear"`` or
    ``"conv2d"``; the latter has ``kernel_size``, ``stride``, ``padding``, ``dilation`` (pairs) and
    ``pad(x)`` for what ``padding`` cannot express. While it is stopped it has no hook in the model,
    and costs nothing. Each call of a layer that takes part in a backward pass is one recording; all
    recordings since the last ``clear`` are joined, as if they had been one batch.

    model: where the layers are; a module wrapped by ``torch.compile`` is looked through, but its
    compiled forward does not see hooks: run the eager module while recording.
    layers: names of the layers to record; all supported ones by default.
    loss_scale: returns the factor by which the loss is scaled (``GradScaler.get_scale``); recorded
    gradients are divided by it, in float32.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[str] | None = None,
        *,
        loss_scale: Callable[[], float] | None = None,
    ) -> None:
        model = getattr(model, "_orig_mod", model)
        modules = dict(model.named_modules())
        names = [n for n, m in modules.items() if _kind(m)] if layers is None else list(layers)
        for name in names:
            if name not in modules:
                raise InputError(f"no layer {name!r} to record in {type(model).__name__}")
            if _kind(modules[name]) is None:
                raise InputError(
                    f"layer {name!r} is a {type(modules[name]).__name__}: only linear layers and "
                    "convolutions without groups are recorded"
                )
        self._modules = {name: modules[name] for name in names}
        self._loss_scale = loss_scale
        self._hooks: list[Any] = []
        self._parts: dict[str, list[Pairs]] = {name: [] for name in names}

    @property
    def recording(self) -> bool:
        return bool(self._hooks)

    @property
    def empty(self) -> bool:
        return not any(self._parts.values())

    def start(self) -> None:
        """Begin to record; what was recorded before is kept."""
        if not self._hooks:
            for name, module in self._modules.items():
                hook = self._forward_hook(name)
                self._hooks.append(module.register_forward_hook(hook, with_kwargs=True))

    def stop(self) -> None:
        """Take the hooks out of the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def clear(self) -> None:
        for parts in self._parts.values():
            parts.clear()

    def records(self) -> dict[str, Pairs]:
        """The vectors of every layer that was recorded, by name."""
        return {
            name: parts[0] if len(parts) == 1 else JoinedPairs(parts)
            for name, parts in self._parts.items()
            if parts
        }

    def _forward_hook(self, name: str) -> Callable[..., None]:
        def capture(
            module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor
        ) -> None:
            if not output.requires_grad or not torch.is_grad_enabled():
                return
            x = (inputs[0] if inputs else next(iter(named.values()))).detach()
            # The closure lives in the graph: a forward without a backward leaves nothing behind.
            output.register_hook(lambda dz: self._add(name, module, x, dz.detach()))

        return capture

    def _add(self, name: str, module: nn.Module, x: Tensor, dz: Tensor) -> None:
        scale = 1.0 if self._loss_scale is None else 1.0 / self._loss_scale()
        self._parts[name].append(_pairs(module, x, dz, scale))

    def __getitem__(self, name: str) -> Pairs:
        parts = self._parts[name]
        if not parts:
            raise InputError(
                f"layer {name!r} was not recorded: no backward pass went through it while the "
                "recorder was started (a compiled forward does not see the recorder)"
            )
        return parts[0] if len(parts) == 1 else JoinedPairs(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)


def _kind(module: nn.Module) -> str | None:
    """How a module is recorded: as "linear", as "conv2d", or not at all."""
    kind = getattr(module, "records_as", None)
    if isinstance(kind, str):
        return kind
    if isinstance(module, nn.Conv2d):
        return "conv2d" if module.groups == 1 else None
    return "linear" if isinstance(module, nn.Linear) else None


def _pairs(module: Any, x: Tensor, dz: Tensor, scale: float) -> Pairs:
    if _kind(module) == "linear":
        if x.dim() == 1:
            x, dz = x[None], dz[None]
        return LinearPairs(x, dz, scale)
    if x.dim() == 3:
        x, dz = x[None], dz[None]
    padding = module.padding
    if not isinstance(module, nn.Conv2d):
        x = module.pad(x)
    elif isinstance(padding, str) or module.padding_mode != "zeros":
        # nn.Conv2d keeps the padding of all four sides, for "same" with an even kernel.
        sides = module._reversed_padding_repeated_twice
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x, padding = F.pad(x, sides, mode=mode), (0, 0)
    return ConvPairs(x, dz, module.kernel_size, module.stride, padding, module.dilation, scale)


@contextmanager
def record(
    model: nn.Module,
    layers: Iterable[str] | None = None,
    *,
    loss_scale: Callable[[], float] | None = None,
) -> Iterator[Recorder]:
    """Record (x, dz) of the layers of ``model`` inside the ``with`` block.

    with growth.record(model) as records:
        criterion(model(x), y).backward()
    new = growth.Exact()(records["fc1"], count=100, active=keys)
    """
    recorder = Recorder(model, layers, loss_scale=loss_scale)
    recorder.start()
    try:
        yield recorder
    finally:
        recorder.stop()
