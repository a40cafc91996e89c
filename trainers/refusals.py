"""Refusals: a setting that would change nothing is refused before a run is started.

Invariant: what a config accepts acts, or stands at its default. So a default is always accepted, as the saved
config of a run that is resumed names every setting. A coefficient of 0 is a default of its own kind: it takes
its term out, and the term's other numbers may stay as they are, for an ablation is a change of one number.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from agentgym.errors import ConfigError


def refuse_idle(
    settings: Any, *names: str, section: str, because: str, hint: str, off: object = None
) -> None:
    """Refuse ``names`` where they are not at their defaults; called where nothing would read them.

    Args:
        settings: A section: a dataclass or a pydantic model.
        names: Of its settings.
        section: What the section is called in a config; empty for the config itself.
        because: Why they would change nothing.
        hint: What would let them act.
        off: What takes the setting back where a preset has it; ``None``: its default.

    Raises:
        ConfigError: The first that is set.
    """
    if is_dataclass(settings):
        defaults = {field.name: field.default for field in fields(settings)}
    else:
        defaults = {name: field.default for name, field in type(settings).model_fields.items()}
    for name in names:
        value, default = getattr(settings, name), defaults[name]
        if value != default:
            full = f"{section}.{name}" if section else name
            back = default if off is None else off
            raise ConfigError(
                f"{full} is {value!r}, but {because}",
                hint=f"{hint}, or " + (f"leave out {full}" if back is None else f"{full}={back!r}"),
            )
