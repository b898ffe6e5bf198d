"""What is installed and what an import drags in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("dst", "growth", "triton_kernels")
# Imported only where they are used, as none of them exists everywhere.
OPTIONAL = ("faiss", "nmslib", "numba", "timm", "triton", "wandb")
# pip matches platform tags literally, so each manylinux up to torch's own is named.
PLATFORMS = [
    f"manylinux{version}_x86_64"
    for version in [*(f"_2_{minor}" for minor in range(28, 4, -1)), "2014", "2010", "1"]
]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240
    )


def pip_resolves(requirements: list[str], target: Path, *options: str) -> tuple[bool, str, Path]:
    """Resolve without installing: (it worked, what pip said, pip's report)."""
    report = target / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
    command += ["--disable-pip-version-check", "--use-feature=fast-deps", "--quiet"]
    command += ["--target", str(target / "site"), "--report", str(report)]
    command += ["--only-binary=:all:", *options, *requirements]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode == 0, done.stdout + done.stderr, report


@pytest.fixture(scope="module")
def package_index(tmp_path_factory: pytest.TempPathFactory) -> None:
    target = tmp_path_factory.mktemp("probe")
    found, _, _ = pip_resolves(["iniconfig"], target, "--no-deps", "--retries=0", "--timeout=20")
    if not found:
        pytest.skip("pip reaches no package index")


def test_packages_and_extras(project: dict[str, Any]) -> None:
    assert project["project"]["name"] == "sparsegrow"
    assert project["project"]["requires-python"] == ">=3.10"
    found = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {name.rstrip("*") for name in found} == set(PACKAGES)
    extras = project["project"]["optional-dependencies"]
    assert set(extras) == {"cpu", "gpu", "timm", "wandb", "data", "dev"}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_of_code_is_a_package(package: str) -> None:
    folders = {path.parent for path in (ROOT / package).rglob("*.py")}
    assert ROOT / package in folders
    missing = [
        str(folder.relative_to(ROOT))
        for folder in sorted(folders)
        if not (folder / "__init__.py").is_file()
    ]
    assert not missing, f"left out of the wheel for want of an __init__.py: {missing}"


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_without_optional_libraries(package: str) -> None:
    done = run_python(
        f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r})); import {package}"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_no_optional_library(package: str) -> None:
    # torch may import some of them itself; only what the package adds is ours.
    done = run_python(
        "import sys, torch, torchvision; before = set(sys.modules)\n"
        f"import {package}\n"
        f"print(*[name for name in {OPTIONAL!r} if name in set(sys.modules) - before])"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_growth_and_kernels_do_not_import_upwards() -> None:
    done = run_python(
        "import sys, triton_kernels\n"
        "assert not {'growth', 'dst'} & set(sys.modules)\n"
        "import growth\n"
        "assert 'dst' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(sys.platform != "linux", reason="pip reads sys_platform from this machine")
@pytest.mark.parametrize("extra", ["cpu", "gpu"])
@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_wheels_exist(
    python: str, extra: str, project: dict[str, Any], package_index: None, tmp_path: Path
) -> None:
    # Environment markers are those of the Python that runs this; tags and Requires-Python are not.
    requirements = project["project"]["dependencies"]
    requirements = requirements + project["project"]["optional-dependencies"][extra]
    options = [f"--python-version={python}", "--implementation=cp"]
    options += [f"--platform={platform}" for platform in PLATFORMS]
    resolved, said, report = pip_resolves(requirements, tmp_path, *options)
    assert resolved, said[-4000:]
    installs = json.loads(report.read_text(encoding="utf-8"))["install"]
    names = {package["metadata"]["name"].lower() for package in installs}
    assert {"torch", "nmslib", "numba", f"faiss-{extra}"} <= names
