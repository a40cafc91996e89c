"""AgentGym: agentic language-model environments, tool use and training behind one Gymnasium interface.

Importing this package registers the built-in ids and imports no environment family, no torch and no
transformers.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from agentgym import _builtin as _builtin
from agentgym import errors, spaces
from agentgym.env import Env, Transition, fork
from agentgym.messages import ImagePart, Message, TextPart, ToolCall
from agentgym.outcome import Outcome
from agentgym.registry import families, make, register
from agentgym.task import Task, TaskSet
from agentgym.trajectory import Segment, Trajectory, Turn
from agentgym.vector import make_vec

try:
    __version__ = version("agentgym-llm")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "Env",
    "ImagePart",
    "Message",
    "Outcome",
    "Segment",
    "Task",
    "TaskSet",
    "TextPart",
    "ToolCall",
    "Trajectory",
    "Transition",
    "Turn",
    "__version__",
    "errors",
    "families",
    "fork",
    "make",
    "make_vec",
    "register",
    "spaces",
]
