"""Machine code that is kept for the next process."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

numba = pytest.importorskip("numba")

from triton_kernels import compiled_numba  # noqa: E402
from triton_kernels.compiled_numba import compiled  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def adds(number: int) -> Any:
    """A new one each time, as in a new process."""

    @compiled(number)
    def add(x):  # type: ignore[no-untyped-def]
        return x + number

    return add


def hits(kernel: Any) -> int:
    return sum(kernel.stats.cache_hits.values())


def test_it_is_found_again(folder: Path) -> None:
    first = adds(3)
    assert first(4) == 7 and hits(first) == 0
    assert list(folder.rglob("*.nbc"))
    second = adds(3)
    assert second(4) == 7 and hits(second) == 1
    assert second(0.5) == 3.5 and hits(second) == 1


def test_parameters_tell_functions_apart(folder: Path) -> None:
    assert adds(3)(4) == 7
    other = adds(5)
    assert other(4) == 9 and hits(other) == 0
    assert hits(adds(3)) == 0
    again = adds(3)
    assert again(4) == 7 and hits(again) == 1


def test_code_of_another_process_takes_no_name_that_is_in_use(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numba numbers functions in the order in which a process comes by them: two of one name and
    of different parameters may have the same number, where one is compiled and one is found."""
    from numba.core.bytecode import FunctionIdentity

    def number_from(start: int) -> None:
        monkeypatch.setattr(FunctionIdentity, "_unique_ids", itertools.count(start))

    number_from(10**6)
    assert adds(3)(4) == 7
    number_from(10**6)
    compiled_here, found = adds(5), adds(3)
    assert (compiled_here(4), found(4), hits(found)) == (9, 7, 1)
    names = [_code(kernel).fndesc.llvm_func_name for kernel in (compiled_here, found)]
    addresses = [
        _code(kernel).library.get_pointer_to_function(name)
        for kernel, name in zip((compiled_here, found), names, strict=True)
    ]
    assert len(set(names)) == 2 and len(set(addresses)) == 2


def _code(kernel: Any) -> Any:
    (code,) = kernel.overloads.values()
    return code


def test_other_sources_are_compiled_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert adds(3)(4) == 7
    assert compiled_numba._sources() == compiled_numba._IMPORTED
    with monkeypatch.context() as context:  # while this process runs: code and sources may differ
        context.setattr(compiled_numba, "_sources", lambda: "edited")
        for _ in range(2):
            edited = adds(3)
            assert edited(4) == 7 and hits(edited) == 0
    monkeypatch.setattr(compiled_numba, "_IMPORTED", "edited")
    monkeypatch.setattr(compiled_numba, "_sources", lambda: "edited")
    for known in (0, 1):
        edited = adds(3)
        assert edited(4) == 7 and hits(edited) == known


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: b"x" * len(data),
        lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    ],
)
def test_a_damaged_file_is_made_anew(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    assert adds(3)(4) == 7
    (file,) = folder.rglob("*.nbc")
    file.write_bytes(damage(file.read_bytes()))
    mended = adds(3)
    assert mended(4) == 7 and hits(mended) == 0
    again = adds(3)
    assert again(4) == 7 and hits(again) == 1


def test_kinds_of_arguments_have_files_of_their_own(folder: Path) -> None:
    first = adds(3)
    assert (first(4), first(0.5)) == (7, 3.5)
    assert len(list(folder.rglob("*.nbc"))) == 2
    again = adds(3)
    assert (again(0.5), again(4)) == (3.5, 7) and hits(again) == 2


def test_settings_of_numba_are_told_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert adds(3)(4) == 7
    monkeypatch.setattr(numba.config, "BOUNDSCHECK", 1)
    checked = adds(3)
    assert checked(4) == 7 and hits(checked) == 0


def test_a_cache_that_is_off(folder: Path) -> None:
    assert adds(3)(4) == 7
    kernel = adds(3)
    kernel._cache.disable()
    assert kernel(4) == 7 and hits(kernel) == 0


def test_without_a_place_to_keep_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "replace", fail)
    assert adds(3)(4) == 7
    assert not [file for file in folder.rglob("*") if file.is_file()]
    monkeypatch.setattr(compiled_numba, "_Cache", fail)
    assert adds(3)(4) == 7
