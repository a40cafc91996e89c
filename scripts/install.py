"""Create .venv and install AgentGym into it, with nothing but Python's standard library.

Invariant: the stamp is written last, after everything was installed and checked, so an interrupted
installation goes on when it is called again and a finished one costs a fraction of a second.

    python3 scripts/install.py           the virtual environment (make demo, make test)
    python3 scripts/install.py system    Debian packages that some tests need; never fails

Without an NVIDIA GPU torch comes first, as a CPU build, so that no CUDA package follows. AGENTGYM_TORCH=cpu
or =cuda overrides what was detected.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "agentgym-installed.json"
EXTRAS = "text,search,sql,apis,code,docker,mcp,serve,bridges,train,bench,dev"
PYTHONS = ((3, 11), (3, 12), (3, 13))
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
FREE_BYTES = {"cpu": 4 * 10**9, "cuda": 20 * 10**9}
NOT_WITH_CPU_TORCH = re.compile(r"nvidia-.*|triton|pytorch-triton.*|torchvision|torchaudio|torchcodec")
NETWORK = re.compile(
    r"NewConnectionError|NameResolutionError|name resolution|ConnectTimeout|Read timed out|ProxyError"
    r"|Network is unreachable|Connection (refused|reset|broken|aborted)|SSLError|HTTP error 5\d\d"
)


class Failure(Exception):
    """What stopped the installation, and what to do next."""

    def __init__(self, message: str, hint: str, log: str = "") -> None:
        super().__init__(message)
        self.message, self.hint, self.log = message, hint, log


def say(text: str) -> None:
    """Print a progress line."""
    print(f"install: {text}", flush=True)


def run(title: str, command: list[str], env: dict[str, str] | None = None) -> None:
    """Run ``command`` quietly; a line every 20 s shows that it lives.

    Raises:
        Failure: It ended with an error; the cause is named where it can be told.
    """
    say(title)
    started = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=ROOT
        )
        while process.poll() is None:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                say(f"  … {time.monotonic() - started:.0f} s")
        if process.returncode:
            log.seek(0)
            raise explain(title, log.read())


def explain(title: str, log: str) -> Failure:
    """The failure behind a command's output."""
    if "No space left on device" in log:
        return Failure(
            f"the disk filled up: {title}", f"free some space under {ROOT} and in {tempfile.gettempdir()}"
        )
    missing = re.search(r"No matching distribution found for (\S+)", log)
    if NETWORK.search(log) and (missing is None or "from versions: none" in log):
        return Failure(
            f"the package index cannot be reached: {title}",
            "check the network (https_proxy, PIP_INDEX_URL, PIP_FIND_LINKS), then run the same command again",
            log,
        )
    if missing:
        version = "{}.{}.{}".format(*sys.version_info)
        return Failure(
            f"no index has {missing.group(1)} for Python {version} on {os.uname().machine}",
            "try another interpreter, for example: make PYTHON=python3.11 test",
            log,
        )
    return Failure(f"failed: {title}", "the lines above are the end of its output", log)


def as_root(command: list[str]) -> str:
    """``command`` as a person would type it."""
    return " ".join(command if os.geteuid() == 0 else ["sudo", *command])


def apt_install(packages: list[str], why: str) -> None:
    """Install Debian packages.

    Raises:
        Failure: There is no apt, or this is not root; the command to run is named.
    """
    command = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    if shutil.which("apt-get") is None:
        raise Failure(
            f"{why}, and this system has no apt-get", f"install the equivalent of: {' '.join(packages)}"
        )
    if os.geteuid() != 0:
        raise Failure(why, f"{as_root(['apt-get', 'update'])} && {as_root(command)}")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    run("apt-get update", ["apt-get", "update", "-qq"], env)
    run(f"apt-get install {' '.join(packages)} ({why})", command, env)


def use_supported_python() -> None:
    """Hand over to a supported interpreter if this one is not.

    Raises:
        Failure: There is none on PATH.
    """
    if sys.version_info[:2] in PYTHONS:
        return
    have = "{}.{}".format(*sys.version_info)
    for major, minor in reversed(PYTHONS):
        found = shutil.which(f"python{major}.{minor}")
        # A pyenv shim is on PATH for versions that it then refuses to run.
        if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            say(f"python3 is {have}; using {found}")
            os.execv(found, [found, *sys.argv])
    raise Failure(
        f"Python {have} is not supported; AgentGym needs 3.11, 3.12 or 3.13",
        "install one of them and name it: make PYTHON=/path/to/python3.12 test",
    )


def torch_variant() -> str:
    """``cuda`` on a machine with an NVIDIA GPU, else ``cpu``."""
    asked = os.environ.get("AGENTGYM_TORCH", "")
    if asked in ("cpu", "cuda"):
        return asked
    if asked:
        raise Failure(f"AGENTGYM_TORCH is {asked!r}", "set it to cpu or cuda, or unset it")
    if glob.glob("/dev/nvidia[0-9]*"):
        return "cuda"
    smi = shutil.which("nvidia-smi")  # the only sign of a GPU under WSL
    listed = subprocess.run([smi, "-L"], capture_output=True, text=True).stdout if smi else ""
    return "cuda" if "GPU 0" in listed else "cpu"


def fingerprint(variant: str) -> dict[str, str]:
    """What an installation depends on."""
    digest = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", ROOT / "constraints" / f"{variant}.txt", Path(__file__)):
        digest.update(path.read_bytes())
    python = "{}.{}".format(*sys.version_info)
    return {"inputs": digest.hexdigest(), "python": python, "variant": variant, "root": str(ROOT)}


def read_stamp() -> dict[str, str]:
    """The fingerprint of the finished installation, or an empty one."""
    try:
        stamp: dict[str, str] = json.loads(STAMP.read_text())
        return stamp if VENV_PYTHON.exists() else {}
    except (OSError, ValueError):
        return {}


def venv_answer(code: str) -> str:
    """What the virtual environment's Python prints for ``code``; empty if it does not work."""
    try:
        done = subprocess.run([str(VENV_PYTHON), "-I", "-c", code], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def make_venv(wanted: dict[str, str], had: dict[str, str]) -> None:
    """Create .venv, or keep the one that is there if it fits."""
    usable = venv_answer("import pip, sys; print('{}.{}'.format(*sys.version_info))") == wanted["python"]
    moved = any(had.get(key, wanted[key]) != wanted[key] for key in ("variant", "root"))
    if usable and not moved:
        return
    free, needed = shutil.disk_usage(ROOT).free, FREE_BYTES[wanted["variant"]]
    if free < needed:
        raise Failure(
            f"{free / 1e9:.1f} GB free under {ROOT}; the installation needs {needed / 1e9:.0f} GB",
            "free some space, then run the same command again",
        )
    if subprocess.run([sys.executable, "-c", "import ensurepip, venv"], capture_output=True).returncode:
        package = "python{}.{}-venv".format(*sys.version_info)
        apt_install([package], f"Python's venv module comes in the package {package}")
    command = [sys.executable, "-m", "venv", "--clear", str(VENV)]
    run(f"creating .venv with Python {wanted['python']} ({sys.executable})", command)


def pip(title: str, *arguments: str) -> None:
    """Run the virtual environment's pip."""
    env = {
        k: v for k, v in os.environ.items() if k not in ("PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PYTHONPATH")
    }
    env["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    base = [str(VENV_PYTHON), "-m", "pip", "--no-input", "--retries", "3", "--timeout", "60"]
    run(title, [*base, *arguments], env)


def installed() -> dict[str, str]:
    """Versions in the virtual environment, by normalised name."""
    code = (
        "import json, re; from importlib.metadata import distributions as d; "
        "print(json.dumps({re.sub('[-_.]+', '-', x.metadata['Name']).lower(): x.version for x in d()}))"
    )
    found: dict[str, str] = json.loads(venv_answer(code) or "{}")
    return found


def install_cpu_torch(pin: str) -> None:
    """Install the CPU build of torch, without its dependencies: the next step resolves those.

    The pin names the ``+cpu`` build, which PyPI does not carry: an index that has none answers at once.

    Raises:
        Failure: Neither the configured index nor PyTorch's has it.
    """
    if installed().get("torch") == pin:
        return
    try:
        pip(f"torch {pin} from the configured index", "install", "--no-deps", f"torch=={pin}")
        return
    except Failure as failure:
        if "No matching distribution" not in failure.log:
            raise
    try:
        title = f"torch {pin} from {TORCH_CPU_INDEX}"
        pip(title, "install", "--no-deps", "--index-url", TORCH_CPU_INDEX, f"torch=={pin}")
    except Failure as failure:
        if "No matching distribution" not in failure.log:
            raise
        tag = "cp{}{}".format(*sys.version_info)
        raise Failure(
            f"no index that answers has torch {pin} for {tag} on {os.uname().machine}",
            f"check the network, or set PIP_FIND_LINKS to a folder that holds torch-{pin}-{tag}-….whl",
            failure.log,
        ) from None


def need_compiler() -> None:
    """Jericho, which plays TextWorld's games, has no wheel: a C compiler builds it."""
    if "jericho" in installed():
        return
    probe = ["cc", "-E", "-x", "c", "-"]
    try:
        done = subprocess.run(probe, input=b"#include <stdio.h>\n", capture_output=True)
        works = done.returncode == 0
    except OSError:
        works = False
    if not works:
        apt_install(["gcc", "libc6-dev"], "jericho (a dependency of TextWorld) is built by a C compiler")


def verify(variant: str) -> None:
    """Hold what was installed to the rules.

    Raises:
        Failure: A CUDA package came in beside the CPU build of torch, or versions do not fit together.
    """
    if variant == "cpu":
        wrong = sorted(name for name in installed() if NOT_WITH_CPU_TORCH.fullmatch(name))
        if wrong:
            raise Failure(
                f"packages for CUDA are installed beside the CPU build of torch: {', '.join(wrong)}",
                f".venv/bin/pip uninstall -y {' '.join(wrong)}",
            )
    pip("checking that the versions fit together", "check")


def install() -> None:
    """Bring .venv up to date; do nothing if it is."""
    use_supported_python()
    variant = torch_variant()
    wanted = fingerprint(variant)
    if read_stamp() == wanted:
        return
    started = time.monotonic()
    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build" / "install.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another installation is running; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        had = read_stamp()
        if had == wanted:
            return
        say(f"AgentGym ({variant} build of torch) into {VENV}; takes minutes the first time")
        make_venv(wanted, had)
        STAMP.unlink(missing_ok=True)
        constraints = f"constraints/{variant}.txt"
        if variant == "cpu":
            pin = re.search(r"^torch==(\S+)$", (ROOT / constraints).read_text(), re.MULTILINE)
            if pin is None:
                raise Failure(
                    f"{constraints} does not pin torch", "restore the file: git checkout constraints"
                )
            install_cpu_torch(pin.group(1))
        need_compiler()
        title = f"AgentGym and its dependencies ({EXTRAS})"
        pip(title, "install", "-c", constraints, "-e", f".[{EXTRAS}]")
        verify(variant)
        STAMP.write_text(json.dumps(wanted))
    say(f"done in {time.monotonic() - started:.0f} s")


def install_system_packages() -> None:
    """Install what scripts/system-packages.txt names for the markers that tests carry."""
    tests = "\n".join(path.read_text() for path in ROOT.glob("tests/**/*.py"))
    packages = []
    for line in (ROOT / "scripts" / "system-packages.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            marker, executable, package = line.split()[:3]
            if f"mark.{marker}" in tests and shutil.which(executable) is None:
                packages.append(package)
    if packages:
        apt_install(packages, "some tests need them")


def main() -> int:
    """Run the command; return the exit status."""
    system = sys.argv[1:] == ["system"]
    try:
        if system:
            install_system_packages()
        else:
            install()
    except KeyboardInterrupt:
        print("\ninstall: interrupted; the same command goes on where this stopped", file=sys.stderr)
        return 130
    except Failure as failure:
        if failure.log:
            print("\n".join(failure.log.rstrip().splitlines()[-15:]), file=sys.stderr)
        if system:
            print(
                f"install: {failure.message}; those tests will skip\n  hint: {failure.hint}", file=sys.stderr
            )
            return 0
        print(f"install: {failure.message}\n  hint: {failure.hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
