"""Policies: everything that answers a request with a completion.

Invariant: a name is looked up in one order (built in, a plug-in's, an import path, a model), and a backend
is imported when one of its policies is made.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from agentgym import plugins
from agentgym.actions import make_parser
from agentgym.errors import ModelUnavailable, UnknownName, UsageError, nearest
from agentgym.policies.base import Policy, PolicyContext

POLICIES = {
    "expert": "agentgym.policies.expert:ExpertPolicy",
    "human": "agentgym.policies.human:HumanPolicy",
    "nop": "agentgym.policies.expert:NopPolicy",
    "oracle": "agentgym.policies.expert:OraclePolicy",
    "random": "agentgym.policies.simple:RandomPolicy",
    "replay": "agentgym.policies.replay:ReplayPolicy",
    "scripted": "agentgym.policies.simple:ScriptedPolicy",
}
MODELS = "agentgym.policies.transformers:TransformersPolicy"

_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.\w+)*:[^\W\d]\w*(\.\w+)*")


def make_policy(name: str, context: PolicyContext | None = None) -> Policy:
    """The policy called ``name``.

    Args:
        name: A built-in policy (:data:`POLICIES`); one that an installed package declares in the group
            ``agentgym.policies``; an import path ``package.module:name``; else a model's name or folder,
            for the ``transformers`` backend. What an import path or a plug-in names is called with the
            context and returns a policy.
        context: What the policy may need. Its options are the arguments of the policy's class. The option
            ``parser`` (with ``parser_options``) names the format to answer in, as the environment's does:
            policies that know the action and not the format write it, others ignore it.

    Returns:
        The policy; the caller closes it.

    Raises:
        UnknownName: The policy has no such option.
        ModelUnavailable: The name is no policy, and no model of that name can be had.
        MissingDependency: The backend is not installed.
        UsageError: What was named makes no policy.
    """
    context = context or PolicyContext()
    if name in POLICIES:
        return _construct(name, plugins.import_path(POLICIES[name]), context)
    if name in plugins.declared("policies") or _IMPORT_PATH.fullmatch(name):
        made = plugins.find("policies", name, {}, "policy")(context)
        if not isinstance(made, Policy):
            raise UsageError(
                f"{name!r} made a {type(made).__name__}, no policy",
                hint="give a class or function that takes a PolicyContext and returns a Policy",
            )
        return made
    try:
        return _construct(name, plugins.import_path(MODELS), context, model=name)
    except ModelUnavailable as error:
        near = nearest(name, [*POLICIES, *plugins.declared("policies")])
        if near:
            meant = " or ".join(repr(other) for other in near)
            raise ModelUnavailable(
                error.message, hint=f"did you mean the policy {meant}? Or: {error.hint}"
            ) from error
        raise


def _construct(name: str, make: Callable[..., Policy], context: PolicyContext, **given: Any) -> Policy:
    """Call ``make`` with the options, and with context, parser and what is ``given`` where it takes them."""
    options = dict(context.options)
    parser = make_parser(options.pop("parser", "plain"), **options.pop("parser_options", {}))
    offered = {"context": context, "parser": parser, **given}
    known = inspect.signature(make).parameters
    free = [option for option in known if option not in offered]
    for option in options:
        if option not in free:
            raise UnknownName(f"option of the policy {name!r}:", option, [*free, "parser", "parser_options"])
    missing = [o for o in free if known[o].default is inspect.Parameter.empty and o not in options]
    if missing:
        raise UsageError(f"the policy {name!r} needs the option {missing[0]!r}", hint=f"give {missing[0]}=…")
    return make(**options, **{key: value for key, value in offered.items() if key in known})


__all__ = ["POLICIES", "Policy", "PolicyContext", "make_policy"]
