"""Running a model over the pruning set, so that the scores see what its layers see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dst.pruning.score import Call, Score
from growth import InputError

Batches = Iterable[tuple[Tensor, Tensor]]
Loss = Callable[..., Tensor]


def walk(model: nn.Module, scores: Mapping[str, Score], batches: Batches, loss: Loss) -> None:
    """Once over the batches, all layers together.

    scores: of one kind, by the layer's name. The model is in eval mode meanwhile, and its
    parameters get no gradient; afterwards all is as it was. Memory: that of a backward pass
    without the gradients of the weights.

    Raises InputError where there are no batches, or a layer takes no part.
    """
    # A compiled forward would not see the hooks.
    model = getattr(model, "_orig_mod", model)
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    seen = _Seen(scores)
    with _resting(model), seen.watching():
        samples = 0
        for inputs, labels in batches:
            if not len(inputs):
                continue
            seen.start(len(inputs))
            outputs = model(inputs.to(device))
            if seen.anchor is not None:
                _backward(loss(outputs, labels.to(device), reduction="sum"), seen.anchor, scores)
            seen.finish()
            samples += len(inputs)
    if samples == 0:
        raise InputError("batches hold no sample: give the batches of a pruning set")
    missed = [name for name in scores if name not in seen.reached]
    if missed:
        raise InputError(
            f"no batch reached the layers {', '.join(missed)}, which so have no score: leave them "
            "out of layers"
        )
    for score in scores.values():
        score.samples += samples


def _backward(total: Tensor, anchor: Tensor, scores: Mapping[str, Score]) -> None:
    if not total.requires_grad:
        raise InputError(f"the loss does not depend on the layers {', '.join(scores)}")
    torch.autograd.grad(total, anchor, allow_unused=True)


class _Seen:
    """What the layers see of a batch, handed to their scores as soon as it is complete.

    anchor: what all recorded outputs are made to depend on, so that gradients flow although no
    parameter wants one; None where none are needed.
    """

    def __init__(self, scores: Mapping[str, Score]) -> None:
        self.scores, self.reached = scores, set[str]()
        gradients = any(score.needs == "gradients" for score in scores.values())
        self.anchor = torch.zeros((), requires_grad=True) if gradients else None
        self._uses: Counter[str] = Counter()
        self._calls: dict[str, list[Call]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = [
            score.weights.layer.register_forward_hook(self._hook(name), with_kwargs=True)
            for name, score in self.scores.items()
        ]
        try:
            with torch.set_grad_enabled(self.anchor is not None):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def start(self, samples: int) -> None:
        self._samples = samples
        self._uses.clear()

    def finish(self) -> None:
        """Uses of a layer that the loss does not depend on are not waited for."""
        for name in list(self._calls):
            self._hand_over(name)

    def _hook(self, name: str) -> Callable[..., Tensor]:
        def take(module: nn.Module, args: tuple[Any, ...], named: Any, output: Tensor) -> Tensor:
            x = (args[0] if args else next(iter(named.values()))).detach()
            self._uses[name] += 1
            if self.anchor is None:
                self._add(name, x, None, output.dtype)
                return output
            if x.dim() < 2 or len(x) != self._samples:
                raise InputError(
                    f"layer {name!r} gets an input of shape {tuple(x.shape)} for {self._samples} "
                    "samples, whose gradients cannot be told apart unless they come first: leave "
                    "it out of layers, or choose a score without gradients"
                )
            return _Tap.apply(output, self.anchor, x, lambda dz: self._add(name, x, dz, dz.dtype))

        return take

    def _add(self, name: str, x: Tensor, dz: Tensor | None, dtype: torch.dtype) -> None:
        samples = len(x) if x.dim() > 1 else 1
        if dz is not None:
            dz = dz.reshape(samples, -1, dz.shape[-1])
        calls = self._calls.setdefault(name, [])
        calls.append(Call(x.reshape(samples, -1, x.shape[-1]), dz, dtype))
        if dz is None or len(calls) == self._uses[name]:
            self._hand_over(name)

    def _hand_over(self, name: str) -> None:
        calls = self._calls.pop(name)
        self.reached.add(name)
        # Sums are in single precision, whatever the model runs in.
        with torch.no_grad(), torch.autocast(calls[0].x.device.type, enabled=False):
            self.scores[name].add(calls)


class _Tap(torch.autograd.Function):
    """The identity, which shows the gradient that passes through it, and notices where x was
    overwritten since."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, anchor: Tensor, x: Tensor, show: Callable[[Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.show = show
        return output.clone()  # what follows may overwrite it, which it may not do to a view

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, None, None, None]:
        _ = ctx.saved_tensors
        ctx.show(dz)
        return dz, None, None, None


@contextmanager
def _resting(model: nn.Module) -> Iterator[None]:
    """In eval mode, so that samples are independent of each other and of chance, and without
    gradients of the parameters, which nobody wants."""
    training = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval()
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter, want in wanted.items():
            parameter.requires_grad_(want)
