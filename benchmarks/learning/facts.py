"""A small world of one-line facts, and questions that need two or three of them.

Invariant: files follow from their arguments alone. A chain of facts stands in one split: no question of a
held-out one is a training question, though all are over the same people.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from random import Random

RELATIONS = ("friend", "teacher", "doctor", "boss", "rival", "cousin", "guard", "cook")
ONSETS = ("B", "D", "F", "G", "K", "L", "M", "N", "P", "R", "S", "T", "V", "Z")
VOWELS = ("a", "e", "i", "o", "u")
CODAS = ("l", "m", "n", "r", "s", "x")


def write(folder: Path, *, people: int = 40, relations: int = 6, hops: int = 2, seed: int = 0) -> None:
    """Write ``corpus.jsonl`` and ``questions.jsonl`` into ``folder``.

    Args:
        folder: Made where it is missing.
        people: How many there are.
        relations: Each has one of these to someone else; at most ``len(RELATIONS)``.
        hops: Facts that a question needs.
        seed: Of names, facts and splits.
    """
    random = Random(seed)
    spelled = sorted({o + v + c + w for o, v, c, w in product(ONSETS, VOWELS, CODAS, VOWELS)})
    names = random.sample(spelled, people)
    chosen = RELATIONS[:relations]
    facts = {
        (name, relation): random.choice([n for n in names if n != name])
        for name in names
        for relation in chosen
    }
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for (name, relation), other in facts.items():
            title = f"{relation} of {name}"
            passage = {"id": f"{name}-{relation}".lower(), "title": title, "text": f"It is {other}."}
            file.write(json.dumps(passage) + "\n")
    chains = [(name, path) for name in names for path in product(chosen, repeat=hops)]
    random.shuffle(chains)
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as file:
        for index, (name, path) in enumerate(chains):
            at, needed = name, []
            for relation in path:
                needed.append(f"{at}-{relation}".lower())
                at = facts[at, relation]
            asked = " of ".join(f"the {relation}" for relation in reversed(path))
            question = {
                "id": f"{name}-{'-'.join(path)}".lower(),
                "question": f"Who is {asked} of {name}?",
                "answers": [at],
                "supporting_ids": needed,
                "hops": hops,
                "split": ("valid", "test")[index % 10 - 8] if index % 10 >= 8 else "train",
            }
            file.write(json.dumps(question) + "\n")
