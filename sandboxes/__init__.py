"""Where untrusted code runs."""

from __future__ import annotations

# A bare `import sandboxes` from the repository's root would load a second copy of every class.
if __name__ != "agentgym.sandboxes":
    raise ImportError("import agentgym.sandboxes, not sandboxes: its folder is mapped")

import inspect
from typing import Any

from agentgym import plugins
from agentgym.errors import UsageError
from agentgym.sandboxes.base import Backend as Backend
from agentgym.sandboxes.base import ExecResult as ExecResult
from agentgym.sandboxes.base import Mount as Mount
from agentgym.sandboxes.base import PathRefused as PathRefused
from agentgym.sandboxes.base import Process as Process
from agentgym.sandboxes.base import Sandbox as Sandbox
from agentgym.sandboxes.base import SandboxEnded as SandboxEnded
from agentgym.sandboxes.base import SandboxSpec as SandboxSpec
from agentgym.sandboxes.base import Snapshot as Snapshot
from agentgym.sandboxes.pool import SandboxPool as SandboxPool

BACKENDS = {
    "bubblewrap": "agentgym.sandboxes.bubblewrap:BubblewrapBackend",
    "docker": "agentgym.sandboxes.docker:DockerBackend",
    "process": "agentgym.sandboxes.process:ProcessBackend",
    "remote": "agentgym.sandboxes.remote:RemoteBackend",
}


def make_backend(name: str = "bubblewrap", **options: Any) -> Backend:
    """The sandbox backend called ``name``.

    Args:
        name: One of :data:`BACKENDS`; one that an installed package declares in the group
            ``agentgym.sandboxes``; or an import path ``package.module:name``.
        options: Of that backend.

    Raises:
        UnknownName: There is no such backend.
        MissingDependency: What it needs is not installed.
        UsageError: It refuses to start so.
    """
    backend = plugins.find("sandboxes", name, BACKENDS, "sandbox backend")
    takes = inspect.signature(backend)
    try:
        takes.bind(**options)
    except TypeError as error:
        raise UsageError(
            f"the options of the sandbox backend {name!r} are not right: {error}",
            hint=f"it takes {', '.join(takes.parameters) or 'none'}",
        ) from error
    made: Backend = backend(**options)
    return made
