"""What is shipped is what git holds: nothing forgotten, nothing extra."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAPPED = ("environments", "sandboxes", "tools", "trainers")


def tracked() -> list[str]:
    """Files that git tracks and that are in the working tree."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


def pyproject() -> dict[str, dict[str, dict[str, dict[str, list[str]]]]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed() -> None:
    found = set()
    for room in ("agentgym", *MAPPED):
        for init in (ROOT / room).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT).parts
            if "templates" not in parts:  # what `agentgym new` writes out is data
                found.add(".".join(parts if parts[0] == "agentgym" else ("agentgym", *parts)))
    assert set(pyproject()["tool"]["setuptools"]["packages"]) == found


def test_all_is_every_extra_but_the_gpu_engines() -> None:
    extras = pyproject()["project"]["optional-dependencies"]
    (union,) = extras["all"]
    named = union.removeprefix("agentgym-llm[").removesuffix("]").split(",")
    assert set(named) == extras.keys() - {"all", "vllm", "ray"}


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_constraints_pin_what_the_metadata_asks_for(variant: str) -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints" / f"{variant}.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    project = pyproject()["project"]
    asked = [*project["dependencies"]]
    for name, requirements in project["optional-dependencies"].items():
        if name not in ("all", "ray") and (variant == "cuda" or name != "vllm"):
            asked += requirements
    for requirement in map(Requirement, asked):
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), f"{requirement} is pinned to {pin}"


def test_a_cpu_installation_gets_no_cuda_package() -> None:
    lines = (ROOT / "constraints" / "cpu.txt").read_text().splitlines()
    names = {line.split("==")[0] for line in lines}
    assert not {name for name in names if name.startswith(("nvidia", "triton", "torchvision", "torchaudio"))}
    assert any(line.startswith("torch==") and line.endswith("+cpu") for line in lines)


def test_sdist_and_wheel_hold_what_git_holds(tmp_path: Path) -> None:
    source = tmp_path / "source"
    files = tracked()
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist")]
    built = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]

    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    generated = {"PKG-INFO", "setup.cfg"}
    assert {m for m in members if not m.startswith("agentgym_llm.egg-info/")} - generated == set(files)

    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as wheel_file:
        shipped = {name for name in wheel_file.namelist() if not name.split("/")[0].endswith(".dist-info")}
    expected = {
        name if name.startswith("agentgym/") else f"agentgym/{name}"
        for name in files
        if name.startswith(("agentgym/", *(f"{room}/" for room in MAPPED)))
    }
    assert shipped == expected
    assert "agentgym/py.typed" in shipped

    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as wheel_file:
        wheel_file.extractall(site)
    code = "import agentgym, agentgym.environments, agentgym.trainers; print(agentgym.__file__)"
    # -I keeps the checkout off the path, -S the editable installation; dependencies come back by hand.
    path = [str(site), *(p for p in sys.path if p.endswith("site-packages"))]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site))
