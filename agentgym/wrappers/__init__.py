"""Wrappers that work on any environment of text. :mod:`agentgym.wrappers.stack` puts them in order."""

from agentgym.wrappers.base import TextWrapper
from agentgym.wrappers.format import ActionFormat
from agentgym.wrappers.limits import TimeLimit
from agentgym.wrappers.observations import ListActions, ObservationHistory, TruncateObservation

__all__ = [
    "ActionFormat",
    "ListActions",
    "ObservationHistory",
    "TextWrapper",
    "TimeLimit",
    "TruncateObservation",
]
