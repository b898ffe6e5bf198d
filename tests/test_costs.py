"""Which way a product is computed, and how a search is chosen."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dst import SparseConv2d, SparseLinear
from dst.computing import how_computed
from triton_kernels import calibrate, calibrate_steps, constants, costs, shipped
from triton_kernels.forms import linear_form

needs_numba = pytest.mark.skipif(not find_spec("numba"), reason="numba is not installed")
# Of a machine made up for the tests: every form, blocks of any side.
SPARSE, DENSE, HALF = (0.02, 1000.0, 4.0, 1e6), (0.005, 8.0, 2.0, 10.0, 5e5), (0.05, 8, 2, 10, 5e5)
FORMS = ("csr", "csr_cpu", "blocks", "blocks_cpu", "blocks_tiles", "conv_cpu")
SCATTERED = [
    f"{how} {kind}" for how in ("scattered", "scattered_cpu") for kind in ("linear", "conv")
]
# Faster of many rows, slower of few.
BY_LOOPS = (0.004, 10.0, 2.0, 10.0, 9e5)
KNOWN: dict[str, constants.Sides] = {
    **{form: {1: SPARSE} for form in FORMS},
    "blocks_cpu": {2: SPARSE, 16: (0.01, *SPARSE[1:])},
    **{f"{form} half": {1: (1.5,)} for form in FORMS},
    **{form: {1: DENSE} for form in SCATTERED},
    costs.LOOPS: {1: BY_LOOPS},
    **{f"{form} half": {1: HALF} for form in SCATTERED},
}


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` goes by KNOWN."""
    monkeypatch.setattr(constants, "on_cpu", lambda: constants.OnCpu(KNOWN, True))


def _layer(density: float, **changes: Any) -> costs.Layer:
    """2048 x 2048 in blocks of 32, 256 rows, on the CPU."""
    layer = costs.Layer(2048, 2048, 1, (32, 32), 0, 256, 256, 4, "cpu")._replace(**changes)
    return layer._replace(alive=round(density * layer.size))


@pytest.mark.parametrize(
    ("density", "changes", "expected"),
    [
        (0.1, {}, "sparse"),
        (0.9, {"block": (16, 16)}, "dense"),
        (0.05, {"block": (128, 128)}, "sparse"),
        (0.002, {"block": (1, 1)}, "sparse"),
        (0.9, {"block": (1, 1), "rows": 4096, "padded": 4096}, "dense"),
        (0.02, {"block": (1, 1), "taps": 9, "n_in": 9 * 256}, "dense"),  # there is no such product
        (0.05, {"taps": 9, "n_in": 9 * 256}, "sparse"),
        (0.2, {"n_out": 64, "n_in": 64}, "dense"),  # too little to save
        (0.05, {"device": "cuda"}, "sparse"),
        (0.2, {"device": "cuda"}, "dense"),
        (0.05, {"device": "cuda", "block": (1, 1)}, "dense"),
        (0.001, {"device": "cuda", "block": (1, 1)}, "sparse"),
    ],
)
@pytest.mark.usefixtures("known")
def test_choice(density: float, changes: dict[str, Any], expected: str) -> None:
    assert costs.choose(_layer(density, **changes)) == expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_weight_of_16_gb_is_never_scattered(device: str) -> None:
    layer = _layer(0.9, n_out=65536, n_in=65536, block=(1, 1), device=device)
    assert costs.choose(layer) == "sparse"


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("block", [(1, 1), (16, 16), (32, 64), (128, 128)])
def test_break_even_is_where_the_choice_changes(block: tuple[int, int]) -> None:
    layer = _layer(0.1, block=block)
    density = costs.break_even(layer)
    assert 0 < density <= 1
    alive = round(density * layer.size)
    assert costs.choose(layer._replace(alive=alive)) == "sparse"
    assert density == 1 or costs.choose(layer._replace(alive=alive + 1)) == "dense"


@pytest.mark.usefixtures("known")
def test_a_layer_decides_by_its_first_training_input_and_when_its_density_changes() -> None:
    layer = SparseLinear(512, 512, block=(32, 32), density=0.05)
    assert layer.compute == "auto" and layer.chosen is None
    with torch.no_grad():
        layer(torch.randn(1, 512))
    layer.eval()(torch.randn(1, 512))
    assert layer.chosen is None
    layer.train()(torch.randn(256, 512))
    first = layer.chosen
    assert first is not None and first[1:] == (layer.topology.alive, 256, 256)
    assert first.way == costs.choose(layer.cost(256, 256))
    layer(torch.randn(1, 512))
    assert layer.chosen is first
    dense = SparseLinear(512, 512, block=(32, 32), density=0.9)
    dense.chosen = first  # as if it had been decided when few blocks were alive
    dense(torch.randn(256, 512))
    assert dense.chosen.way == "dense" and dense.chosen.alive == dense.topology.alive
    asked = SparseLinear(512, 512, block=(32, 32), density=0.9, compute="sparse")
    asked(torch.randn(256, 512))
    assert asked.chosen is None


@pytest.mark.parametrize("size", [128, 256])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.usefixtures("known")
def test_choosing_leaves_a_compiled_layer_whole(training: bool, size: int) -> None:
    """Of a larger weight, there is more to choose from."""
    layer = SparseLinear(size, size, block=(16, 16), density=0.2).train(training)
    more = bool(find_spec("numba")) and size == 256
    assert len(costs.dense_works(layer.cost(64, 64))) == 1 + more
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for rows in (64, 65, 3):
        x = torch.randn(rows, size)
        torch.testing.assert_close(compiled(x), layer(x))
    assert (layer.chosen is not None) == training
    torch.compiler.reset()


def test_a_convolution_counts_what_its_sparse_product_drops() -> None:
    layer = SparseConv2d(64, 64, 3, stride=2, padding=1, density=0.1, block=(16, 16))
    layer(torch.randn(4, 64, 9, 8))
    # Phases of 6 x 5 positions of a padded image of 11 x 10; 5 x 4 of them are outputs.
    assert layer.chosen is not None and layer.chosen[2:] == (4 * 5 * 4, 4 * 6 * 5)


def test_in_words() -> None:
    layers = {
        "first": SparseLinear(256, 256, density=0.05, block=(32, 32)),
        "second": SparseLinear(256, 256, density=0.05, compute="dense"),
    }
    for layer in layers.values():
        layer(torch.randn(64, 256))
    origin, first, second = how_computed(layers)
    assert origin == "auto goes by the times of another machine: python -m " + (
        "triton_kernels.calibrate measures this one"
    )
    assert first.startswith("first: ") and "(break-even " in first and "64 rows" in first
    assert second == "second: dense products, as asked for"


def test_what_a_step_does() -> None:
    """Counted by hand."""
    layer = costs.Layer(300, 500, 1, (20, 50), 7, 40, 40, 4, "cpu")
    (sparse,) = costs.sparse_work(layer)
    assert sparse[1:] == (20, (6 * 7 * 1000 * 40, 7, 40 * 800, 1))
    assert sparse.form == linear_form(torch.empty(0), (20, 50)).name
    dense = costs.dense_work(layer)
    assert dense[1:] == (1, (6 * 40 * 300 * 500, 300 * 500, 0, 0, 1))
    assert dense.form.endswith(" linear")
    singles = costs.dense_work(layer._replace(block=(1, 1)))
    assert singles.parts[3] == 7
    large = costs.dense_work(layer._replace(n_out=4096, n_in=2048))
    assert large.parts[2] == 4096 * 2048 - (4 << 20)
    # A convolution: the input has its channels once, whatever the number of taps.
    conv = layer._replace(taps=5, padded=60, rows=40)
    assert costs.dense_work(conv).form.endswith(" conv")
    assert all(work.parts[2] == 60 * (100 + 300) for work in costs.sparse_work(conv))
    assert costs.sparse_work(conv._replace(block=(1, 1))) == []


@needs_numba
def test_who_multiplies_by_a_scattered_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops, where they are measured to be faster than the BLAS, and can."""
    many, few = (_layer(0.5, block=(8, 8), rows=rows, padded=rows) for rows in (1024, 64))
    can: list[dict[str, Any]] = [
        *({"block": (128, 32)}, {"block": (3, 2)}, {"block": (1, 1)}, {"n_in": 2056}),
        *({"n_out": 8192}, {"n_out": 2080}, {"n_out": 1 << 15, "n_in": 1 << 15}),
    ]
    cannot: list[dict[str, Any]] = [
        *({"itemsize": 2}, {"itemsize": 8}),
        *({"pointwise": True}, {"n_out": 64, "n_in": 512}, {"n_out": 70, "n_in": 9000}),
        *(
            {"n_out": 65536, "n_in": 17},
            {"n_out": 256, "n_in": 1 << 20},
            {"block": (1, 1), "alive": 2048 * 2048},
        ),
    ]
    known = dict(KNOWN)
    monkeypatch.setattr(constants, "on_cpu", lambda: constants.OnCpu(known, True))
    assert costs.dense_work(many).form == costs.LOOPS
    assert costs.dense_work(few).form == "scattered_cpu linear"
    for changes in can:
        assert costs.dense_work(many._replace(**changes)).form == costs.LOOPS
    for changes in cannot:
        assert costs.dense_work(many._replace(**changes)).form != costs.LOOPS
    # All alive, single weights are not scattered; anything less, and convolutions, are.
    full = many._replace(block=(1, 1), alive=2048 * 2048)
    assert costs.dense_work(full).parts == (6 * 1024 * 2048 * 2048, 0, 0, 0, 1)
    assert all(costs.dense_work(full._replace(alive=2048 * 2048 - 1)).parts[1:4:2])
    assert all(costs.dense_work(full._replace(pointwise=True)).parts[1:4:2])
    assert costs.dense_work(full._replace(n_in=16, n_out=16, alive=256)).parts[1] == 256
    del known[costs.LOOPS]
    assert costs.dense_work(many).form == "scattered_cpu linear"


@pytest.mark.usefixtures("known")
def test_precisions() -> None:
    single = _layer(0.1)
    sparse, dense = costs.sparse_step_ns(single), costs.dense_step_ns(single)
    double = single._replace(itemsize=8)
    assert costs.sparse_step_ns(double) == 2 * sparse
    # Half as many entries fit into a cache.
    beyond = 2048**2 - (2 << 20)
    assert costs.dense_step_ns(double) == pytest.approx(2 * (dense + 2 * beyond))
    half = single._replace(itemsize=2)
    converted = 3 * (256 * 4096 + single.alive * 32**2)
    assert costs.sparse_step_ns(half) == pytest.approx(sparse + 1.5 * converted)
    assert costs.dense_step_ns(half) == pytest.approx(dense + 0.045 * 6 * 256 * 2048**2)


@pytest.mark.usefixtures("known")
def test_blocks_between_two_sides_are_taken_for_the_smaller() -> None:
    table = KNOWN["blocks_cpu"]
    for side, each in (
        (1, table[2]),
        (2, table[2]),
        (15, table[2]),
        (16, table[16]),
        (99, table[16]),
    ):
        parts = (1e9, 0.0, 0.0, 0.0)
        assert costs.ns_of([costs.Work("blocks_cpu", side, parts)], KNOWN) == 1e9 * each[0]


# What a machine was measured to be.


def test_all_forms_can_be_told_from_what_is_measured() -> None:
    """For each there are enough layers, and there are constants for what cannot run here."""
    found: dict[tuple[str, int], list[tuple[float, ...]]] = {}
    for sample in calibrate_steps.samples():
        layer = sample.layer()
        works = costs.sparse_work(layer)[:1] if layer.itemsize == 4 else []
        for work in [*works, *(costs.dense_works(layer) if sample.dense else [])]:
            found.setdefault((work.form, work.side), []).append(work.parts)
    for (form, _), parts in found.items():
        matrix = np.array(parts)
        matrix = matrix[:, matrix.any(0)]
        matrix /= np.linalg.norm(matrix, axis=1, keepdims=True) * 1.0
        matrix /= np.linalg.norm(matrix, axis=0)
        assert np.linalg.matrix_rank(matrix, tol=1e-6) == matrix.shape[1]
        for forms in shipped.NS.values():
            # Of one maker's processors it may not have been measured yet.
            if form in forms or form != costs.LOOPS:
                assert {len(each) for each in forms[form].values()} == {len(parts[0])}
    assert all({*forms, costs.LOOPS} == set(KNOWN) for forms in shipped.NS.values())
    assert set(shipped.MACHINES) == set(shipped.NS)


def test_least_squares_that_are_not_negative() -> None:
    """By what makes a minimum: no way down, and none but up from zero."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        parts = generator.lognormal(0, 2, (9, 4)) * [1e9, 1e3, 1e6, 1]
        ns = generator.lognormal(12, 1, 9)
        x = np.array(calibrate.least(parts, ns, ns))
        matrix = parts / ns[:, None]
        slope = matrix.T @ (matrix @ x - 1) / np.linalg.norm(matrix, axis=0)
        assert (x >= 0).all()
        assert np.abs(slope[x > 0]).max(initial=0) < 5e-3 and slope[x == 0].min(initial=0) > -5e-3
    exact = generator.uniform(1, 2, (6, 3))
    found = calibrate.least(exact, exact @ [3, 0, 2], exact[:, 0])
    assert found == pytest.approx((3, 0, 2), abs=1e-9)
    # What is never counted costs nothing.
    assert calibrate.least([[2, 0], [4, 0]], np.array([6.0, 12.0]), np.ones(2)) == (3, 0)


def _measured() -> Iterator[calibrate_steps.Step]:
    """Layers on a machine that takes just as long as KNOWN says."""
    for sample in calibrate_steps.samples():
        layer = sample.layer()
        dense = ("dense", "loops")[: len(costs.dense_works(layer))] if sample.dense else ()
        for way in ("sparse", *dense):
            step = calibrate_steps.Step(layer, way, lambda: None, [])
            if calibrate.work_of(step):
                step.seconds.append(costs.ns_of(calibrate.work_of(step), KNOWN) / 1e9)
                yield step


def test_the_fit_finds_what_was_there() -> None:
    steps = [*_measured()]
    for step in steps:
        step.seconds.append(2 * step.seconds[0])  # the machine was busy
    found = calibrate.fit(steps)
    for form, sides in found.items():
        for side, each in sides.items():
            right = KNOWN[form][max((s for s in KNOWN[form] if s <= side), default=2)]
            # The part that no layer here has.
            right = tuple(a if b else 0 for a, b in zip(right, each, strict=True))
            assert each == pytest.approx(right, rel=0.02) and each[0] > 0
    *lines, choices = calibrate.told(steps, found)
    assert len(lines) == 2 + len({line.rsplit(maxsplit=3)[0] for line in lines[1:-1]})
    assert lines[-1].split()[:3] == ["all", "0.00", "0.00"]
    both = {step.layer for step in steps if step.way == "dense" and len(calibrate.work_of(step))}
    singles = sum(layer.taps > 1 and layer.block == (1, 1) for layer in both)
    assert choices.startswith(
        f"auto would take a slower way than another in 0 of {len(both) - singles} layers"
    )


def test_choices_that_lose_are_told() -> None:
    layer = _layer(0.1)
    steps = [
        calibrate_steps.Step(layer, way, lambda: None, [seconds])
        for way, seconds in (("sparse", 3.0), ("dense", 2.0))
    ]
    assert costs.ns_of(costs.sparse_work(layer), KNOWN) < costs.ns_of(
        [costs.dense_work(layer)], KNOWN
    )
    *_, choices = calibrate.told(steps, KNOWN)
    assert choices.endswith("in 1 of 1 layers, and lose at most 50 %")


def test_a_random_layout() -> None:
    layer = costs.Layer(50, 90, 3, (8, 16), 11, 4, 4, 4, "cpu")
    layout = calibrate_steps.layout_of(layer)
    assert layout[6:] == (50, 3, 30)
    rows = [(r, int(c), int(s)) for r in range(7) for c, s in _entries(layout[:3], r)]
    columns = [(int(r), c, int(s)) for c in range(6) for r, s in _entries(layout[3:6], c)]
    assert rows == sorted(rows) and sorted(columns) == rows and len(rows) == 11
    assert sorted(slot for *_, slot in rows) == list(range(11))


def _entries(order: Any, i: int) -> list[tuple[Any, Any]]:
    offsets, index, slots = order
    part = slice(int(offsets[i]), int(offsets[i + 1]))
    return list(zip(index[part], slots[part], strict=True))


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("SPARSEGROW_CACHE", str(tmp_path / "own"))
    return tmp_path / "own"


def test_where_figures_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSEGROW_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert constants.folder() == Path("/one")
    monkeypatch.delenv("SPARSEGROW_CACHE")
    assert constants.folder() == Path("/two/sparsegrow")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert constants.folder() == tmp_path / ".cache" / "sparsegrow"


def test_choices_go_by_what_was_measured_here(cache: Path) -> None:
    """For this number of threads alone."""
    layer, before = _layer(0.05), constants.on_cpu().ns
    assert not constants.on_cpu().own and costs.choose(layer) == "sparse"
    form = costs.sparse_work(layer)[0].form
    slow = {32: (1e3, 0.0, 0.0, 0.0)}
    path = constants.write(constants.cpu(torch.get_num_threads()), {"ns": {form: slow}})
    assert path.parent == cache and [*cache.iterdir()] == [path]
    own = constants.on_cpu()
    assert own.own and own.ns[form] == slow and own.ns[f"{form} half"] == before[f"{form} half"]
    assert costs.choose(layer) == "dense" and costs.break_even(layer) < 0.001
    assert next(how_computed({"fc": _trained()})) == (
        "auto goes by times that were measured on this machine"
    )
    torch.set_num_threads(2)
    assert not constants.on_cpu().own and costs.choose(layer) == "sparse"


def _trained() -> SparseLinear:
    layer = SparseLinear(64, 64, density=0.5, block=(32, 32))
    layer(torch.randn(2, 64))
    return layer


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:40],
        lambda text: "[]",
        lambda text: text.replace('"threads": 1', '"threads": 3'),
        lambda text: text.replace("csr_cpu", "abacus"),
        lambda text: text.replace("0.25", "-0.25"),
        lambda text: text.replace("0.25", "NaN"),
        lambda text: text.replace("0.25", '"0.25"'),
        lambda text: text.replace("0.25,", ""),
        lambda text: text.replace('"ns"', '"ms"'),
        lambda text: "\x80",
    ],
)
def test_a_damaged_or_foreign_file_is_ignored_with_one_warning(damage: Any, cache: Path) -> None:
    machine, shipped = constants.cpu(torch.get_num_threads()), constants.on_cpu()
    path = constants.write(machine, {"ns": {"csr_cpu": {1: (0.25, 1.0, 1.0, 1.0)}}})
    assert constants.on_cpu().own
    before = path.read_text()
    assert damage(before) != before
    path.write_bytes(damage(before).encode("latin-1"))
    constants._on_cpu.cache_clear()
    with pytest.warns(UserWarning, match="holds no figures of this machine") as warned:
        choices = [costs.choose(_layer(density)) for density in (0.01, 0.1, 0.9)]
    assert len(warned) == 1 and str(path) in str(warned[0].message)
    assert constants.on_cpu() == shipped and not shipped.own and "sparse" in choices


@pytest.mark.parametrize("text", ["", "vendor_id\t: {maker}\nmodel name\t: One\n"])
@pytest.mark.parametrize("maker", [*shipped.NS, "Another"])
def test_shipped_figures_are_those_of_the_maker(
    maker: str, text: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one's where there are none, or nobody says who it is."""
    monkeypatch.setattr(Path, "read_text", lambda path, **how: text.format(maker=maker))
    constants._cpuinfo.cache_clear()
    constants._on_cpu.cache_clear()
    try:
        known = maker if text and maker in shipped.NS else "GenuineIntel"
        assert constants.on_cpu() == constants.OnCpu(shipped.NS[known], False)
        assert constants.maker() == (maker if text else "")
    finally:
        constants._cpuinfo.cache_clear()
        constants._on_cpu.cache_clear()


def test_a_gpu_that_was_measured(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _layer(0.2, device="cuda")
    assert costs.choose(layer) == "dense" and constants.on_gpu().break_even == constants.BREAK_EVEN
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    constants.write(constants.gpu("another GPU"), {"break_even": {32: 0.9}})
    assert costs.choose(layer) == "dense" and not constants.on_gpu().own
    constants.write(constants.gpu("a GPU"), {"break_even": {32: 0.3}})
    assert costs.choose(layer) == "sparse" and constants.on_gpu().own
    assert costs.choose(_layer(0.2, device="cuda", block=(16, 16))) == "dense"


def test_where_a_gain_ends() -> None:
    densities = (0.1, 0.2, 0.4)
    assert calibrate.crossing(densities, [-1.0]) == 0
    assert calibrate.crossing(densities, [3.0, -1.0]) == pytest.approx(0.175)
    assert calibrate.crossing(densities, [3.0, 1.0, 0.0]) == 0.4
    assert calibrate.crossing(densities, [3.0, 2.0, 1.0]) == 1


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that are measured in no time."""
    found = [
        calibrate_steps.Sample(calibrate_steps.Case(48, 64, batch, 0.5, size), side, dtype, True)
        for batch, side, dtype, size in (
            *((2, 16, torch.float32, 0), (9, 16, torch.float32, 0), (3, 8, torch.float32, 5)),
            *((2, 1, torch.float32, 3), (4, 16, torch.bfloat16, 0)),
        )
    ]
    monkeypatch.setattr(calibrate, "samples", lambda: iter(found))
    monkeypatch.setattr(calibrate, "QUICK_SECONDS", 0.0)


@pytest.mark.usefixtures("few")
def test_the_command(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calibrate.main(["--quick", "--threads", "1"])
    shown = capsys.readouterr().out
    (path,) = cache.iterdir()
    assert shown.endswith(f"written: {path}\n") and "break-even densities of 2048 x 2048" in shown
    assert constants.on_cpu().own
    found = json.loads(path.read_text())
    assert found["machine"] == constants.cpu(1)
    numbers = [n for sides in found["ns"].values() for each in sides.values() for n in each]
    assert all(math.isfinite(n) and n >= 0 for n in numbers) and max(numbers) > 0
    form = costs.sparse_work(_layer(0.1))[0].form
    assert {form, f"{form} half"} <= set(found["ns"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--without", "numba"], "--without is for --ship"),
        (["--ship", "--device", "cuda"], "--ship is for the CPU"),
        (["--threads", "0"], "--threads 0 must be at least 1"),
        (["--device", "cuda"], "there is no GPU"),
    ],
)
def test_commands_that_make_no_sense(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as raised:
        calibrate.main(arguments)
    assert raised.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("maker", ["GenuineIntel", "Another"])
def test_shipped_constants_can_be_written(maker: str, tmp_path: Path) -> None:
    """Of one maker, the others' as they are; a new one begins with those it had to take before."""
    machine = {"processor": "an abacus", "threads": 5, "torch": "2.6.0+cpu"}
    new = {"csr": {1: (1e-5, 3e6, 0.0, 7.5)}, "blocks_tiles": {16: SPARSE, 256: SPARSE}}
    path = calibrate.ship(tmp_path / "shipped.py", new, machine, maker)
    text = path.read_text()
    assert max(map(len, text.splitlines())) <= 100
    module: dict[str, Any] = {}
    exec(text, module)
    before = shipped.NS["GenuineIntel"]
    tiles = {**before["blocks_tiles"], **new["blocks_tiles"]}
    after = {**before, "csr": new["csr"], "blocks_tiles": tiles}
    assert module["NS"] == {**shipped.NS, maker: after}
    named = "an abacus, threads: 5, PyTorch 2.6.0"
    assert module["MACHINES"] == {**shipped.MACHINES, maker: named}


def test_what_is_shipped_is_what_would_be_written(tmp_path: Path) -> None:
    for maker, forms in shipped.NS.items():
        named, threads, version = shipped.MACHINES[maker].split(", ")
        machine = {"processor": named, "threads": threads.split()[1], "torch": version.split()[1]}
        path = calibrate.ship(tmp_path / "shipped.py", forms, machine, maker)
        assert path.read_text() == Path(shipped.__file__).read_text()


@pytest.mark.parametrize("maker", shipped.NS)
def test_shipped_choices_that_no_machine_would_dispute(
    maker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "on_cpu", lambda: constants.OnCpu(shipped.NS[maker], False))
    for side in (16, 32, 64, 128):
        assert costs.choose(_layer(0.02, block=(side, side))) == "sparse"
    assert costs.choose(_layer(0.9, block=(4, 4))) == "dense"
    # Those of AMD multiply single weights about as fast as the BLAS, however many are alive.
    assert costs.choose(_layer(1.0, block=(1, 1))) == "dense"
    assert costs.choose(_layer(1.0, block=(1, 1), rows=4096, padded=4096)) == "dense"
    if maker == "GenuineIntel":
        assert costs.choose(_layer(0.8, block=(1, 1), rows=4096, padded=4096)) == "dense"


# The searches of growth.


def test_a_bitmap_of_active_connections():
    """Few questions are searched, many are looked up, and a bitmap never takes much memory."""
    size = 1 << 24
    assert not costs.active_bitmap_pays(0, size, 10**9)
    assert not costs.active_bitmap_pays(1000, size, 100)
    assert costs.active_bitmap_pays(1000, size, 10**6)
    assert costs.active_bitmap_pays(1000, 8 * costs.LARGEST_BITMAP_BYTES, 10**9)
    assert not costs.active_bitmap_pays(1000, 8 * costs.LARGEST_BITMAP_BYTES + 8, 10**9)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((4096, 4096, 128), True),
        ((512, 512, 128), False),  # small
        ((1024, 1024, 256), True),
        ((1024, 1024, 257), False),  # a sorted copy of more than half of G
        ((64, 576, 50_000), False),  # a convolution
        ((65536, 8, 4), False),
    ],
)
def test_sorting_by_norm_pays(shape, expected):
    assert costs.scan_pays(*shape) == expected


def test_low_rank_needs_samples_and_few_candidates():
    assert costs.lowrank_pays(4096, 4096, 128, 16, 10_000)
    assert not costs.lowrank_pays(4096, 4096, 31, 16, 10_000)
    assert not costs.lowrank_pays(4096, 4096, 128, 16, int(0.05 * 4096**2))
    assert not costs.lowrank_pays(512, 512, 128, 16, 1000)


def test_gram_matrices_pay_for_short_batches_and_large_blocks():
    """About where the batch is shorter than twice the block's area, by the measurements."""
    assert costs.gram_pays(8192, 8192, 128, (32, 32))
    assert not costs.gram_pays(8192, 8192, 128, (4, 4))
    assert not costs.gram_pays(8192, 8192, 2048, (32, 32))
    assert not costs.gram_pays(128, 128, 16, (32, 32))


@pytest.mark.parametrize("samples", [128, 512, 600, 1000, 1200])
@pytest.mark.parametrize("n", [1024, 4096, 8192, 16384])
def test_gram_matrices_are_never_as_large_as_the_gradient(n, samples):
    floats = samples * (samples + 1) // 2 * n // 32
    if costs.gram_pays(n, n, samples, (32, 32)):
        assert floats <= max(8 << 20, n * n // 2)


def test_times_grow_with_what_is_computed():
    times = [costs.scan_ns(4096, 4096, 128, share, 10_000) for share in (0, 0.1, 1)]
    assert times[0] < times[1] < times[2]
    assert costs.scan_ns(4096, 4096, 16, 1, 10_000) < times[2]
    assert costs.scan_ns(4096, 4096, 128, 0.1, 20_000) > times[1]
    assert times[2] == pytest.approx(costs.tiles_ns(4096, 4096, 128), rel=0.1)
    ranks = [costs.lowrank_ns(4096, 4096, 128, rank, 1 << 18, 20_000) for rank in (16, 32, 64)]
    assert ranks[0] < ranks[1] < ranks[2]


def test_a_layer_tells_of_autocast_and_of_one_tap() -> None:
    linear = SparseLinear(64, 64, density=0.5, block=(16, 16))
    conv = SparseConv2d(64, 64, 1, density=0.5, block=(16, 16))
    assert linear.cost(8, 8).itemsize == 4 and not linear.cost(8, 8).is_convolution
    assert conv.cost(8, 8).is_convolution and conv.cost(8, 8).taps == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert linear.cost(8, 8).itemsize == 2
        assert linear.double().cost(8, 8).itemsize == 8
    assert costs.dense_work(conv.cost(8, 8)).form != costs.dense_work(linear.cost(8, 8)).form
