"""The base image of container sandboxes, made from Debian's packages without a registry.

Invariants: the image is named after its recipe, so a changed recipe is another image; its archive lies in
the cache whole or not at all, and processes that want it at the same time make it once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from filelock import FileLock

from agentgym import paths
from agentgym.errors import MissingDependency, SandboxFailed

HERE = Path(__file__).parent
PACKAGES = HERE / "packages.txt"
PROFILE = HERE / "seccomp.json"
SUITE = "bookworm"
MIRROR = "http://deb.debian.org/debian"
REPOSITORY = "agentgym/base"
BUILD_SECONDS = 900.0

# What nobody reads inside.
_LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/info/*", "/usr/share/locale/*")


def packages() -> list[str]:
    """Debian packages of the base image, beside the essential ones."""
    return PACKAGES.read_text(encoding="utf-8").split()


def tag() -> str:
    """The base image's name, ``repository:tag``."""
    recipe = "\n".join([SUITE, MIRROR, *packages(), *_LEFT_OUT])
    return f"{REPOSITORY}:{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def archive() -> Path:
    """The root file system as a tar archive in the cache; made if it is not there (half a minute).

    ``mmdebstrap`` checks the signatures of what it fetches.

    Raises:
        MissingDependency: ``mmdebstrap`` is not installed.
        SandboxFailed: It cannot be made here: no root and no user namespaces, or no mirror.
    """
    place = paths.cache_dir("images") / f"{tag().replace('/', '-').replace(':', '-')}.tar"
    with FileLock(f"{place}.lock", timeout=BUILD_SECONDS):
        if not place.exists():
            program = shutil.which("mmdebstrap")
            if program is None:
                missing = MissingDependency("mmdebstrap")
                missing.hint = f"apt-get install mmdebstrap; or docker build --tag {tag()} {HERE}"
                raise missing
            with paths.atomic_write(place) as made:
                _bootstrap(program, made)
    return place


def load(client: Any, name: str | None = None) -> str:
    """Give a daemon the base image, if it has none.

    Args:
        client: ``docker.APIClient``.
        name: What to call it; default: :func:`tag`.

    Returns:
        Its name.

    Raises:
        MissingDependency, SandboxFailed: As :func:`archive`.
    """
    import docker.errors

    name = name or tag()
    try:
        client.inspect_image(name)
    except docker.errors.ImageNotFound:
        repository, _, version = name.rpartition(":")
        client.import_image_from_file(str(archive()), repository=repository, tag=version)
        try:
            client.inspect_image(name)
        except docker.errors.ImageNotFound:
            # Podman leaves the tag out.
            client.tag(f"{repository}:latest", repository, version)
    return name


def _bootstrap(program: str, target: Path) -> None:
    left_out = [f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT]
    command = [
        program, "--quiet", "--format=tar", "--variant=minbase", f"--include={','.join(packages())}",
        "--dpkgopt=force-unsafe-io", *left_out, SUITE, str(target), MIRROR,
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=BUILD_SECONDS,
            env={**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"},
        )
    except subprocess.TimeoutExpired as error:
        raise SandboxFailed(f"the base image was not made within {BUILD_SECONDS:g} s") from error
    if done.returncode:
        last = done.stdout.decode(errors="replace").strip().splitlines()[-5:]
        raise SandboxFailed(
            f"mmdebstrap could not make the base image: {' | '.join(last)}",
            hint=f"see that {MIRROR} can be reached; or docker build --tag {tag()} {HERE}",
        )
