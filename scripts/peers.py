"""Create build/peers and install into it what benchmarks/update.py measures AgentGym against: TRL.

Invariant: the stamp is written last. TRL wants a newer transformers than AgentGym is tested with, hence the
environment of its own; torch is the same build, so that both sides compute with the same kernels.
"""

from __future__ import annotations

import re
import subprocess
import sys

import install

TRL = "trl==1.16.0"
VENV = install.ROOT / "build" / "peers"
STAMP = VENV / "agentgym-peers.txt"


def main() -> int:
    """Bring build/peers up to date; return the exit status."""
    variant = install.torch_variant()
    constraints = (install.ROOT / "constraints" / f"{variant}.txt").read_text()
    pin = re.search(r"^torch==(\S+)$", constraints, re.MULTILINE)
    torch = pin.group(1) if pin else ""
    wanted = f"{TRL} torch=={torch} {sys.version}"
    if STAMP.exists() and STAMP.read_text() == wanted:
        return 0
    # The functions of the installation, for another environment.
    install.VENV, install.VENV_PYTHON = VENV, VENV / "bin" / "python"
    try:
        install.run("creating build/peers", [sys.executable, "-m", "venv", "--clear", str(VENV)])
        if variant == "cpu":
            install.install_cpu_torch(torch)
        install.pip(TRL, "install", TRL, *([f"torch=={torch}"] if torch else []))
        install.verify(variant)
    except install.Failure as failure:
        print("\n".join(failure.log.rstrip().splitlines()[-15:]), file=sys.stderr)
        print(f"peers: {failure.message}\n  hint: {failure.hint}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, subprocess.SubprocessError) as error:
        print(f"peers: {error or 'interrupted'}; the same command starts again", file=sys.stderr)
        return 130
    STAMP.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
