"""The installation script: what stops it is named, with the command that helps."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "install.py"


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "VENV_PYTHON", Path(sys.executable))
    monkeypatch.setattr(module, "STAMP", tmp_path / "stamp.json")
    return module


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("ERROR: Could not install: [Errno 28] No space left on device", "the disk filled up"),
        (
            "Retrying after NewConnectionError\nERROR: … spacy (from versions: none)\n"
            "ERROR: No matching distribution found for spacy",
            "cannot be reached",
        ),
        ("ERROR: No matching distribution found for torch==2.13.0+cpu", "no index has torch==2.13.0+cpu"),
        ("error: command 'cc' failed", "failed: building"),
    ],
)
def test_a_failure_names_its_cause(install: ModuleType, log: str, words: str) -> None:
    failure = install.explain("building", log)
    assert words in failure.message and failure.hint


def test_a_failing_command_shows_its_output(install: ModuleType) -> None:
    with pytest.raises(install.Failure) as caught:
        install.run("saying no", [sys.executable, "-c", "print('no'); raise SystemExit(3)"])
    assert caught.value.log.strip() == "no"


def test_without_root_the_exact_command_is_named(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(install.shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(install.Failure) as caught:
        install.apt_install(["python3.12-venv"], "there is no venv module")
    assert "sudo apt-get install -y --no-install-recommends python3.12-venv" in caught.value.hint


def test_a_finished_installation_is_recognised_until_its_inputs_change(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = install.fingerprint("cpu")
    assert install.read_stamp() == {}
    install.STAMP.write_text(install.json.dumps(wanted))
    assert install.read_stamp() == wanted
    monkeypatch.setenv("AGENTGYM_TORCH", "cpu")
    monkeypatch.setattr(install, "pip", lambda *a: pytest.fail("nothing is to be installed"))
    install.install()
    assert install.fingerprint("cuda") != wanted


def test_cuda_packages_beside_a_cpu_torch_are_refused(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"torch": "2.13.0+cpu", "nvidia-nccl-cu13": "2.28.9", "torchvision": "0.28.0"}
    monkeypatch.setattr(install, "installed", lambda: found)
    with pytest.raises(install.Failure) as caught:
        install.verify("cpu")
    assert "uninstall -y nvidia-nccl-cu13 torchvision" in caught.value.hint


def test_the_environment_under_test_keeps_the_rule(install: ModuleType) -> None:
    found = install.installed()
    if "+cpu" not in found.get("torch", ""):
        pytest.skip("needs a CPU build of torch")
    assert not [name for name in found if install.NOT_WITH_CPU_TORCH.fullmatch(name)]


def test_a_wrong_setting_is_an_error_and_not_a_traceback() -> None:
    env = {**os.environ, "AGENTGYM_TORCH": "rocm"}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "AGENTGYM_TORCH is 'rocm'" in done.stderr and "Traceback" not in done.stderr


def test_packages_are_installed_for_markers_that_tests_carry(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "tests").mkdir()
    table = SCRIPT.with_name("system-packages.txt").read_text()
    (tmp_path / "scripts" / "system-packages.txt").write_text(table)
    (tmp_path / "tests" / "test_page.py").write_text("@pytest.mark.browser\ndef test_page(): ...\n")
    wanted: list[list[str]] = []
    monkeypatch.setattr(install, "ROOT", tmp_path)
    monkeypatch.setattr(install.shutil, "which", lambda name: None)
    monkeypatch.setattr(install, "apt_install", lambda packages, why: wanted.append(packages))
    install.install_system_packages()
    assert wanted == [["chromium"]]


def test_every_marker_of_the_table_is_declared(pytestconfig: pytest.Config) -> None:
    declared = {line.partition(":")[0] for line in pytestconfig.getini("markers")}
    lines = SCRIPT.with_name("system-packages.txt").read_text().splitlines()
    assert {line.split()[0] for line in lines if line and not line.startswith("#")} <= declared


def test_a_test_whose_program_is_missing_skips_and_says_which(tmp_path: Path) -> None:
    """In a copy of the repository's root, where no program is on PATH."""
    root = SCRIPT.parent.parent
    (tmp_path / "scripts").mkdir()
    for name in ("conftest.py", "scripts/system-packages.txt"):
        (tmp_path / name).write_text((root / name).read_text())
    (tmp_path / "test_page.py").write_text("import pytest\n@pytest.mark.browser\ndef test_page(): ...\n")
    command = [sys.executable, "-m", "pytest", "-ra", "-p", "no:cacheprovider", "-c", "/dev/null"]
    env = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(
        [*command, "--rootdir", ".", "."], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert "SKIPPED [1] test_page.py" in done.stdout and "apt-get install chromium" in done.stdout
    assert "1 skipped" in done.stdout.splitlines()[-1]
