"""Two workers under ``torchrun`` against one process with the same global batch.

``torchrun`` runs this very file once for all tests: ``_worker`` writes what each worker found.
"""

import dataclasses
import datetime
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dst import (
    METHODS,
    DropGrow,
    InputError,
    SparseLinear,
    TopologyUpdater,
    UpdateSchedule,
    rigl,
    sparse_layers,
    sparsify,
)
from dst.distributed import (
    ReducedPairs,
    check_agreement,
    everywhere,
    rank,
    same_buffers,
    same_keys,
    world_size,
)
from dst.drop import magnitude
from dst.pruning import measure, pruned_layers
from dst.topology import Change, Search
from growth import ConvPairs, Exact, JoinedPairs, LinearPairs, Pairs, Random, Subblock

WORLD = 2
TRAINED = ("rigl", "set", "similarity", "snfs")
STEPS, GLOBAL_BATCH = 20, 8  # an update at every second step

# name -> what a worker or the single process ended with
State = dict[str, Any]


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.fc1 = nn.Linear(6 * 16, 12)
        self.fc2 = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(F.relu(self.conv(x)).flatten(1))))


def _net() -> nn.Module:
    torch.manual_seed(1)
    return sparsify(_Net().double(), density=0.4, skip=(), seed=3)


def _shard(step: int) -> tuple[Tensor, Tensor]:
    """This worker's part of the global batch of a step."""
    random = torch.Generator().manual_seed(step)
    x = torch.randn(GLOBAL_BATCH, 2, 6, 6, dtype=torch.float64, generator=random)
    y = torch.randint(4, (GLOBAL_BATCH,), generator=random)
    return x.chunk(world_size())[rank()], y.chunk(world_size())[rank()]


def _found(model: nn.Module) -> State:
    state: State = {f"{n}/keys": la.topology.keys() for n, la in sparse_layers(model).items()}
    state |= {f"{n}/slots": la.topology.slots for n, la in sparse_layers(model).items()}
    return state | {n: p.detach() for n, p in model.named_parameters()}


def _audited() -> State:
    """Recall and mass of a strategy that misses some, over the vectors of all workers."""
    model = _net()
    method = dataclasses.replace(rigl(UpdateSchedule(1, 9, 0.4)), growth=Subblock(0.4))
    network = DistributedDataParallel(model) if world_size() > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = TopologyUpdater(model, optimizer, method, audit=1)
    x, y = _shard(0)
    F.cross_entropy(network(x), y).backward()
    updater.step()
    assert updater.audited is not None
    return {name: [q.recall, q.mass] for name, q in updater.audited.quality.items()}


def _train(name: str) -> State:
    model = _net()
    method = METHODS[name].build(UpdateSchedule(2, 2 * STEPS, 0.4), 0)
    network = DistributedDataParallel(model) if world_size() > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    updater = TopologyUpdater(model, optimizer, method)
    updates = 0
    for step in range(STEPS):
        x, y = _shard(step)
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        if not updater.step():
            optimizer.step()
        updated = updater.last is not None and updater.last.step == step + 1
        updates += updated
        if world_size() > 1 and updated and updater.last.resized:
            network = DistributedDataParallel(model)
    return {**_found(model), "updates": updates}


def _opposite_signs() -> list[int]:
    """One alive weight of three is dropped, and one grown: gradients of the workers are 1, ±5, 2
    (column 1 cancels), so that the mean of |g| would choose column 1 and |mean g| column 2."""
    model = nn.Sequential(SparseLinear(3, 1, bias=False, keys=torch.tensor([0]))).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = DropGrow(UpdateSchedule(1, 9, 1.0, "constant"), magnitude, Exact())
    updater = TopologyUpdater(model, optimizer, method)
    network = DistributedDataParallel(model)
    sign = 1 if rank() == 0 else -1
    network(torch.tensor([[1.0, 5.0 * sign, 2.0]], dtype=torch.float64)).sum().backward()
    updater.step()
    return model[0].topology.keys().tolist()


def _message(action: Any) -> str:
    try:
        action()
    except (RuntimeError, InputError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _other_weights() -> None:
    model = _net()
    if rank() == 1:
        with torch.no_grad():
            model.fc1.values.mul_(torch.linspace(-1, 1, model.fc1.values.numel()).view(-1, 1, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = TopologyUpdater(model, optimizer, rigl(UpdateSchedule(1, 9, 0.4)))
    x, y = _shard(0)
    F.cross_entropy(model(x), y).backward()  # no wrapper: it would broadcast the weights
    updater.step()


def _other_seed() -> None:
    model = _net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = DropGrow(UpdateSchedule(1, 9, 0.4), magnitude, Random(), seed=rank())
    updater = TopologyUpdater(model, optimizer, method)
    x, y = _shard(0)
    F.cross_entropy(model(x), y).backward()
    updater.step()


def _one_overflows() -> State:
    """Only the second worker's gradient is infinite, before anything was reduced."""
    model = _net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = TopologyUpdater(model, optimizer, rigl(UpdateSchedule(1, 9, 0.4)))
    before = _found(model)
    x, y = _shard(0)
    (F.cross_entropy(model(x), y) * (1.0 if rank() == 0 else float("inf"))).backward()
    updater.step()
    same = all(torch.equal(before[k], v) for k, v in _found(model).items())
    return {"skipped": updater.skipped, "same": same}


def _parts(worker: int) -> Pairs:
    """The first worker recorded three micro-batches, of float64, and the second one a single."""
    random = torch.Generator().manual_seed(worker)
    sizes = (3, 2, 4) if worker == 0 else (5,)
    return JoinedPairs(
        [
            LinearPairs(
                torch.randn(n, 7, dtype=torch.float64, generator=random),
                torch.randn(n, 6, dtype=torch.float64, generator=random),
            )
            for n in sizes
        ]
    )


def _maps(worker: int) -> Pairs:
    random = torch.Generator().manual_seed(worker)
    x, dz = torch.randn(2, 2, 8, 8, generator=random), torch.randn(2, 3, 6, 6, generator=random)
    return ConvPairs(x, dz, (3, 3))


def _reduced() -> State:
    pairs = ReducedPairs(_parts(rank()))
    of_x, of_dz = pairs.squared_norms()
    found: State = {
        "rows": pairs.products(1, 4),
        "x": torch.cat([x for x, _ in pairs.chunks()]),
        "dz": torch.cat([dz for _, dz in pairs.chunks()]),
        "chunks": len(list(pairs.chunks())),
        "of_x": of_x,
        "of_dz": of_dz,
    }
    half = LinearPairs(torch.ones(rank() + 1, 2).half(), torch.ones(rank() + 1, 3).half(), 0.5)
    row, col = torch.tensor([0, 2, 2, 5]), torch.tensor([6, 0, 3, 1])
    found["single"] = pairs.products_at(row, col)
    found["many"] = pairs.products_at(
        torch.arange(6).repeat_interleave(7), torch.arange(7).repeat(6)
    )
    found["times"] = pairs.times(torch.arange(14.0, dtype=torch.float64).view(7, 2))
    found["transposed"] = pairs.transposed_times(torch.arange(12.0, dtype=torch.float64).view(6, 2))
    narrowed = pairs.narrowed(torch.tensor([1, 4]), torch.tensor([0, 5, 6]))
    found["narrowed"] = narrowed.products(0, 2)
    found["pooled"] = ReducedPairs(_maps(rank())).pooled().products(0, 3)
    found["half"] = torch.cat([dz for _, dz in ReducedPairs(half).chunks()])
    active = torch.tensor([0, 5, 9, 17, 30])
    for metric in ("abs-ip", "ip", "l2"):
        chosen = Exact(metric)(pairs, 6, active)
        found[f"exact {metric}"] = chosen.row * 7 + chosen.col
    try:
        from growth import Faiss

        for metric in ("abs-ip", "ip", "l2"):
            chosen = Faiss(1.0, metric)(pairs, 6, active)
            found[f"faiss {metric}"] = chosen.row * 7 + chosen.col
    except ImportError:
        pass
    return found


def _agreement() -> list[str]:
    keys = [torch.tensor([1, 2]), torch.tensor([1, 3])]
    same = {"a": Change(keys[0], keys[1])}
    dropped = {"a": Change(keys[rank()], keys[1])}
    grown = {"a": Change(keys[0], keys[rank()])}
    swapped = {"a": Change(keys[rank()], keys[1 - rank()])}
    way = Search({}, "one" if rank() == 0 else "other")
    decided = {"a": Change(keys[0], keys[1], 0, {"a": way})}
    device = torch.device("cpu")
    return [
        _message(lambda c=change: check_agreement(c, device))
        for change in (same, dropped, grown, swapped, decided)
    ]


def _pruned() -> State:
    """By scores that differ from worker to worker, after statistics that do."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 20), nn.BatchNorm1d(20), nn.Linear(20, 12))
    torch.manual_seed(rank())
    model(torch.randn(16, 9))
    same_buffers(model)
    with torch.no_grad():
        model[0].weight += 0.1 * torch.randn(20, 9)
    own = measure(model, score="magnitude", layers=["0", "2"])
    replaced = pruned_layers(own, keep=0.3)
    alone = torch.cat([layer.topology.keys() for layer in replaced.values()])
    agreed = pruned_layers(own, keep=0.3, agree=same_keys)
    keys = [layer.topology.keys() for layer in agreed.values()]
    return {"alone": alone, "agreed": keys, "mean": model[1].running_mean}


def _worker(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    torch.set_num_threads(1)
    results: State = {name: _train(name) for name in TRAINED}
    results["opposite signs"] = _opposite_signs()
    results["other weights"] = _message(_other_weights)
    results["other seed"] = _message(_other_seed)
    results["overflow"] = _one_overflows()
    results["reduced"] = _reduced()
    results["agreement"] = _agreement()
    results["audited"] = _audited()
    results["pruned"] = _pruned()
    device = torch.device("cpu")
    results["everywhere"] = [
        everywhere(condition, device) for condition in (True, rank() == 0, False)
    ]
    torch.save(results, folder / f"{rank()}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> list[State]:
    """What every worker found; they are started once."""
    folder = tmp_path_factory.mktemp("workers")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={WORLD}", __file__, str(folder)]
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{worker}.pt", weights_only=True) for worker in range(WORLD)]


def _identical(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_identical(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_identical, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("name", TRAINED)
def test_two_workers_train_as_one_process(name: str, workers: list[State]) -> None:
    alone = _train(name)
    first = {f"{n}/keys": la.topology.keys() for n, la in sparse_layers(_net()).items()}
    for worker in workers:
        assert worker[name]["updates"] == alone["updates"] == 10
        for key, expected in alone.items():
            if key.endswith(("/keys", "/slots")):
                assert torch.equal(worker[name][key], expected), key
            elif isinstance(expected, Tensor):
                torch.testing.assert_close(worker[name][key], expected, rtol=1e-9, atol=1e-9)
    assert all(not torch.equal(alone[key], keys) for key, keys in first.items())


@pytest.mark.parametrize("name", TRAINED)
def test_workers_are_identical_bit_for_bit(name: str, workers: list[State]) -> None:
    assert _identical(workers[0][name], workers[1][name])


def test_signed_gradients_are_averaged_before_the_absolute_value(workers: list[State]) -> None:
    assert [worker["opposite signs"] for worker in workers] == [[2], [2]]


@pytest.mark.parametrize("what", ["other weights", "other seed"])
def test_workers_that_differ_are_told(what: str, workers: list[State]) -> None:
    for worker in workers:
        assert worker[what].startswith("RuntimeError: workers disagree on the topology update")


def test_an_overflow_on_one_worker_skips_the_update_of_all(workers: list[State]) -> None:
    assert [worker["overflow"] for worker in workers] == [{"skipped": 1, "same": True}] * WORLD


def test_agreement_sees_which_keys_are_dropped_and_which_grown(workers: list[State]) -> None:
    for worker in workers:
        same, *others = worker["agreement"]
        assert same == "no error"
        assert len(others) == 4 and all(other.startswith("RuntimeError") for other in others)


def test_everywhere_holds_where_all_workers_say_so(workers: list[State]) -> None:
    assert [worker["everywhere"] for worker in workers] == [[True, False, False]] * WORLD


def test_vectors_of_unequal_numbers_of_chunks_are_joined(workers: list[State]) -> None:
    parts = [_parts(worker) for worker in range(WORLD)]
    x = torch.cat([x for part in parts for x, _ in part.chunks()])
    dz = torch.cat([dz for part in parts for _, dz in part.chunks()]) / WORLD
    gradient = dz.T @ x
    for worker in workers:
        found = worker["reduced"]
        assert found["chunks"] == 4
        assert torch.equal(found["x"], x) and torch.equal(found["dz"], dz)
        torch.testing.assert_close(found["rows"], gradient[1:4], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found["single"], gradient[[0, 2, 2, 5], [6, 0, 3, 1]])
        torch.testing.assert_close(found["many"], gradient.flatten())
        by = torch.arange(14.0, dtype=torch.float64)
        torch.testing.assert_close(found["times"], gradient @ by.view(7, 2))
        torch.testing.assert_close(found["transposed"], gradient.T @ by[:12].view(6, 2))
        torch.testing.assert_close(found["narrowed"], gradient[[1, 4]][:, [0, 5, 6]])
        pooled = sum(_maps(w).pooled().products(0, 3) for w in range(WORLD)) / WORLD
        torch.testing.assert_close(found["pooled"], pooled)
        assert not torch.allclose(
            pooled, sum(_maps(w).products(0, 3) for w in range(WORLD)) / WORLD
        )
        torch.testing.assert_close(found["of_x"], x.square().sum(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found["of_dz"], dz.square().sum(0), rtol=1e-12, atol=1e-12)
        # Half precision is unscaled in float32 on its own worker.
        assert torch.equal(found["half"], torch.full((3, 3), 0.5 / WORLD))


@pytest.mark.parametrize("metric", ["abs-ip", "ip", "l2"])
@pytest.mark.parametrize("strategy", ["exact", "faiss"])
def test_strategies_search_the_vectors_of_all_workers(
    strategy: str, metric: str, workers: list[State]
) -> None:
    if strategy == "faiss":
        pytest.importorskip("faiss", reason="the extra 'cpu' brings faiss")
    parts = [_parts(worker) for worker in range(WORLD)]
    x = torch.cat([x for part in parts for x, _ in part.chunks()])
    dz = torch.cat([dz for part in parts for _, dz in part.chunks()]) / WORLD
    scores = dz.T @ x
    if metric == "abs-ip":
        scores = scores.abs()
    elif metric == "l2":
        scores = -(dz.T[:, None, :] - x.T[None, :, :]).square().sum(2)
    scores = scores.flatten()
    scores[[0, 5, 9, 17, 30]] = -torch.inf
    expected = scores.topk(6).indices.sort().values
    for worker in workers:
        assert torch.equal(worker["reduced"][f"{strategy} {metric}"], expected)


def test_workers_prune_alike(workers: list[State]) -> None:
    first, second = (worker["pruned"] for worker in workers)
    assert torch.equal(first["mean"], second["mean"])
    assert not torch.equal(first["alone"], second["alone"])
    assert _identical(first["agreed"], second["agreed"])
    assert torch.equal(first["alone"][: len(first["agreed"][0])], first["agreed"][0])


def test_an_audit_is_of_the_vectors_of_all_workers(workers: list[State]) -> None:
    alone = _audited()
    assert min(recall for recall, _ in alone.values()) < 1
    for worker in workers:
        assert worker["audited"] == {name: pytest.approx(found) for name, found in alone.items()}


def test_one_process_is_a_world_of_its_own() -> None:
    assert world_size() == 1 and rank() == 0
    device = torch.device("cpu")
    assert everywhere(True, device) and not everywhere(False, device)
    check_agreement({"a": Change(torch.tensor([1]), torch.tensor([2]))}, device)


if __name__ == "__main__":
    _worker(Path(sys.argv[1]))
