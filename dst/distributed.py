"""Workers that agree: signed sums before any absolute value, one topology everywhere."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dst.topology import Change
from growth import Pairs


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def ignore_topology(model: nn.Module) -> None:
    """Call before wrapping a model by DistributedDataParallel, which would broadcast the topology's
    buffers at every forward; workers agree on them by themselves, and an update replaces them."""
    names = [
        name
        for name, _ in model.named_buffers()
        if name.startswith("topology.") or ".topology." in name
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def same_buffers(model: nn.Module) -> None:
    """Give every worker the first one's, such as the statistics of batch normalisation."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def same_keys(keys: Tensor) -> Tensor:
    """What the first worker chose, on every worker."""
    if world_size() == 1:
        return keys
    count = torch.tensor(keys.numel(), device=keys.device)
    dist.broadcast(count, 0)
    chosen = keys.contiguous() if rank() == 0 else keys.new_empty(int(count))
    dist.broadcast(chosen, 0)
    return chosen


class ReducedPairs(Pairs):
    """The vectors of a layer over the batches of all workers, as if they had been one.

    The loss is the mean over each worker's batch, and gradients are averaged over workers; so dz
    is divided by their number here. Products are summed, signed, before anyone takes an absolute
    value: the mean of |g| is another thing than |mean g|. Every worker must make the same calls.
    """

    def __init__(self, own: Pairs) -> None:
        self.own = own
        self.n_in, self.n_out, self.taps = own.n_in, own.n_out, own.taps
        self.samples = own.samples * world_size()

    @property
    def device(self) -> torch.device:
        return self.own.device

    def is_finite(self) -> bool:
        return everywhere(self.own.is_finite(), self.device)

    @property
    def has_vectors(self) -> bool:
        return self.own.has_vectors

    def products(self, start: int, stop: int) -> Tensor:
        return self._mean(self.own.products(start, stop))

    def products_at(self, row: Tensor, col: Tensor) -> Tensor:
        return self._mean(self.own.products_at(row, col))

    def times(self, matrix: Tensor) -> Tensor:
        return self._mean(self.own.times(matrix))

    def transposed_times(self, matrix: Tensor) -> Tensor:
        return self._mean(self.own.transposed_times(matrix))

    def pooled(self) -> Pairs:
        pooled = self.own.pooled()
        return self if pooled is self.own else ReducedPairs(pooled)

    def _mean(self, own: Tensor) -> Tensor:
        """Over the workers, of what is linear in dz."""
        total = own.contiguous()
        dist.all_reduce(total)
        return total.div_(world_size())

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The chunks of every worker in turn, broadcast by it."""
        for source in range(world_size()):
            if source == rank():
                for x, dz in self.own.chunks():
                    yield self._send(x, dz, source)
                self._announce(0, torch.float32, source)
            else:
                while (received := self._receive(source)) is not None:
                    yield received

    def _announce(self, length: int, dtype: torch.dtype, source: int) -> None:
        header = torch.tensor([length, dtype == torch.float64], device=self.device)
        dist.broadcast(header, source)

    def _send(self, x: Tensor, dz: Tensor, source: int) -> tuple[Tensor, Tensor]:
        x, dz = x.contiguous(), (dz / world_size()).contiguous()
        self._announce(x.shape[0], x.dtype, source)
        dist.broadcast(x, source)
        dist.broadcast(dz, source)
        return x, dz

    def _receive(self, source: int) -> tuple[Tensor, Tensor] | None:
        header = torch.zeros(2, dtype=torch.int64, device=self.device)
        dist.broadcast(header, source)
        length, double = header.tolist()
        if length == 0:
            return None
        dtype = torch.float64 if double else torch.float32
        x = torch.empty(length, self.n_in, dtype=dtype, device=self.device)
        dz = torch.empty(length, self.n_out, dtype=dtype, device=self.device)
        dist.broadcast(x, source)
        dist.broadcast(dz, source)
        return x, dz


def everywhere(condition: bool, device: torch.device) -> bool:
    """Whether the condition holds on every worker."""
    if world_size() == 1:
        return condition
    flag = torch.tensor(int(condition), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def check_agreement(changes: Mapping[str, Change], device: torch.device) -> None:
    """Raise RuntimeError unless every worker is about to make the same changes."""
    if world_size() == 1:
        return
    crc = 0
    for name, change in changes.items():
        crc = zlib.crc32(name.encode(), crc)
        for keys in (change.dropped, change.grown):
            crc = zlib.crc32(keys.cpu().numpy().tobytes(), crc)
        # Workers that searched in different ways would wait for each other at the next update.
        for part, search in change.searches.items():
            crc = zlib.crc32(f"{part} {search.choice}".encode(), crc)
    own = torch.tensor([crc], dtype=torch.int64, device=device)
    everyone = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(everyone, own)
    if any(int(other) != crc for other in everyone):
        raise RuntimeError(
            "workers disagree on the topology update: their weights, seeds or versions differ; "
            "start every worker from the same checkpoint"
        )
