"""An environment, a policy, an algorithm and a command for AgentGym."""

from __future__ import annotations

import agentgym


def register() -> None:
    """Register the ids; AgentGym calls this when it looks for environments."""
    agentgym.register(
        "example/Lamps-v0",
        "agentgym_plugin_example.lamps:Lamps",
        summary="switch off a row of lamps, each switch turning its neighbours too",
    )
