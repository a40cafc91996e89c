"""The built-in ids, as strings: importing this imports no family."""

from __future__ import annotations

from agentgym.registry import register

_TEXTWORLD = "agentgym.environments.text.textworld:"

register(
    "agentgym/TextWorld-CoinCollector-v0",
    _TEXTWORLD + "CoinCollector",
    extra="text",
    summary="find the coin: one quest along a chain of rooms",
)
register(
    "agentgym/TextWorld-TreasureHunter-v0",
    _TEXTWORLD + "TreasureHunter",
    extra="text",
    summary="find one object among rooms, doors and containers",
)
register(
    "agentgym/TextWorld-Cooking-v0",
    _TEXTWORLD + "Cooking",
    extra="text",
    summary="gather ingredients, prepare them by the recipe, eat the meal",
)
register(
    "agentgym/TextWorld-Simple-v0",
    _TEXTWORLD + "Simple",
    extra="text",
    summary="prepare a dinner in one small house",
)
register(
    "agentgym/TextWorld-Custom-v0",
    _TEXTWORLD + "Custom",
    extra="text",
    summary="rooms, objects and quest length of your choice (w2-o3-q4)",
)
