"""A policy that takes the admissible actions in turn."""

from __future__ import annotations

from collections.abc import Sequence

from agentgym.actions import make_parser
from agentgym.policies.base import Completion, Policy, PolicyContext, Request


class SweepPolicy(Policy):
    """The first action in the first turn, the second in the second, and so on, from the first again.

    Args:
        context: What AgentGym hands to a plug-in's policy; its options hold the format to answer in.
    """

    name = "sweep"

    def __init__(self, context: PolicyContext) -> None:
        self._parser = make_parser(
            context.options.get("parser", "plain"), **context.options.get("parser_options", {})
        )

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion a request."""
        return [Completion(self._parser.format(self._choose(request))) for request in requests]

    def _choose(self, request: Request) -> str:
        actions = request.turn.admissible_actions or ("look",)
        return actions[request.turn.turn % len(actions)]
