"""TextWorld's generator as a process of its own: one game a request, each in a forked child.

Invariant: a game depends on its request alone. TextWorld's generator iterates over sets of strings, draws
from global generators and looks for files in the working directory, so the same seed makes another game in
another process. Here the hash seed is fixed (:func:`command` and :func:`environment` start the interpreter
so), the child is forked from a parent that holds nothing but parsed grammars, global generators are seeded
from the request, and the working directory is the root.

The parent reads one JSON object a line on standard input and answers each with one line, the child's exit
status. It ends at end of input, and imports nothing of AgentGym, so that it starts quickly.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import random
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

ATTEMPTS = 8
"""Some seeds have no game (no room left on the map, no quest of that length); each attempt has its own."""

STREAMS = ("map", "objects", "quest", "grammar")
CHALLENGES = {
    "coin_collector": "tw-coin_collector",
    "treasure_hunter": "tw-treasure_hunter",
    "simple": "tw-simple",
    "cooking": "tw-cooking",
}


def command() -> list[str]:
    """How to start this process. ``-P`` keeps this folder, which has a ``textworld.py``, off ``sys.path``."""
    return [sys.executable, "-P", __file__]


def environment() -> dict[str, str]:
    """The environment variables to start it with."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TEXTWORLD_", "INFORM_HOME"))}
    return inherited | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def seeds(seed: int, attempt: int) -> dict[str, int]:
    """The seeds of TextWorld's four random streams for ``attempt`` at the game of ``seed``."""
    return {
        stream: int.from_bytes(hashlib.blake2b(f"{seed}/{attempt}/{stream}".encode(), digest_size=4).digest())
        for stream in STREAMS
    }


def serve() -> None:
    """Answer requests until standard input ends."""
    replies = os.dup(sys.stdout.fileno())
    # What TextWorld and the compilers print must not be taken for a reply.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # A folder's order differs between file systems, and the grammars are read in that order.
    unsorted = glob.glob
    glob.glob = lambda *args, **kwargs: sorted(unsorted(*args, **kwargs))
    for line in sys.stdin:
        request = json.loads(line)
        _warm(request["challenge"])
        child = os.fork()
        if child == 0:
            os._exit(_attempt_all(request))
        _, status = os.waitpid(child, 0)
        os.write(replies, b"%d\n" % os.waitstatus_to_exitcode(status))


def _warm(challenge: str) -> None:
    """Parse the grammars that games of ``challenge`` share: two seconds that a child then saves."""
    from types import SimpleNamespace

    import numpy as np
    from textworld import challenges
    from textworld.generator.text_grammar import Grammar

    folder = f"tw_{challenge}/textworld_data/text_grammars"
    own = SimpleNamespace(text_grammars_path=os.path.join(os.path.dirname(challenges.__file__), folder))
    Grammar(rng=np.random.RandomState(0), kb=None if challenge == "custom" else own)


def _attempt_all(request: dict[str, Any]) -> int:
    """Write the request's game, a game that was won, to its folder; else the reason to ``error.txt``."""
    folder = Path(request["folder"])
    try:
        # Outlives even the death of whoever waits: a hanging generator burns no more than this.
        resource.setrlimit(resource.RLIMIT_CPU, (int(request["seconds"]) + 1,) * 2)
        scratch = folder / "scratch"
        scratch.mkdir()
        tempfile.tempdir = str(scratch)
        errors = []
        for attempt in range(ATTEMPTS):
            try:
                facts = _make(request["challenge"], request["settings"], request["seed"], attempt, folder)
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")
            else:
                (folder / "made.json").write_text(json.dumps({"attempt": attempt, **facts}))
                return 0
        (folder / "error.txt").write_text(errors[-1])
    except BaseException as error:
        (folder / "error.txt").write_text(f"{type(error).__name__}: {error}")
    return 1


def _make(challenge: str, settings: dict[str, Any], seed: int, attempt: int, folder: Path) -> dict[str, Any]:
    import numpy as np
    import textworld
    from textworld.challenges import CHALLENGES as makers
    from textworld.generator import compile_game, make_game

    own = seeds(seed, attempt)
    random.seed(own["map"])
    np.random.seed(own["map"])
    textworld.g_rng.set_seed(own["map"])
    options = textworld.GameOptions()
    options.seeds = own
    options.path = str(folder / "game.z8")
    options.force_recompile = True
    options.grammar.only_last_action = settings.get("goal") == "brief"
    if challenge == "custom":
        options.nb_rooms, options.nb_objects = settings["rooms"], settings["objects"]
        options.quest_length = settings["quest_length"]
        game = make_game(options)
    else:
        game = makers[CHALLENGES[challenge]][1](settings, options)
    path = compile_game(game, options)
    walkthrough = _winning(path, list(game.walkthrough or ()))
    return {"objective": game.objective, "walkthrough": walkthrough, "max_score": game.max_score}


def _winning(path: str, walkthrough: list[str]) -> list[str]:
    """The commands of ``walkthrough`` that have an effect, shown to win the game.

    Some makers' walkthroughs open what is already open; a policy that learns from them would too.
    """
    import textworld

    play = textworld.start(path, textworld.EnvInfos(admissible_commands=True))
    for only_admissible in (True, False):
        state, kept, done = play.reset(), [], False
        for command in walkthrough:
            if not done and (command in state["admissible_commands"] or not only_admissible):
                state, _, done = play.step(command)
                kept.append(command)
        if state["won"]:
            play.close()
            return kept
    raise ValueError("the maker's walkthrough does not win its game")


if __name__ == "__main__":
    serve()
