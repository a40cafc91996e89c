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

register(
    "agentgym/BabyAIText-v0",
    "agentgym.environments.text.babyai:BabyAIText",
    extra="text",
    summary="BabyAI's grid worlds in words: go to, pick up, open, put next to",
)

_BRIDGES = "agentgym.environments.bridges."

register(
    "agentgym/Gymnasium-v0",
    _BRIDGES + "gymnasium_env:Gymnasium",
    summary="any Gymnasium id with text or numbers (env_id=FrozenLake-v1)",
)
register(
    "agentgym/GEM-v0",
    _BRIDGES + "gem_env:GEM",
    extra="bridges",
    summary="GEM's games and reasoning tasks (game=game:GuessTheNumber-v0-hard)",
)
register(
    "agentgym/TextArena-v0",
    _BRIDGES + "textarena_env:TextArena",
    extra="bridges",
    summary="TextArena's single-player games (game=GuessTheNumber-v0)",
)
register(
    "agentgym/ReasoningGym-v0",
    _BRIDGES + "reasoning_gym_env:ReasoningGym",
    extra="bridges",
    summary="reasoning-gym's procedural questions (dataset=chain_sum)",
)

register(
    "agentgym/OpenEnv-v0",
    "agentgym.environments.bridges.openenv:OpenEnv",
    extra="bridges",
    summary="the environment behind any OpenEnv server (url=ws://…)",
)

register(
    "agentgym/TextToSQL-v0",
    "agentgym.environments.sql.texttosql:TextToSQL",
    extra="sql",
    summary="Spider's questions over databases, answered by a query, with the database at hand",
)

register(
    "agentgym/Tau2-Airline-v0",
    "agentgym.environments.apis.tau2:Airline",
    summary="tau2-bench: serve an airline's customers by its policy, with a database and tools",
)
register(
    "agentgym/Tau2-Retail-v0",
    "agentgym.environments.apis.tau2:Retail",
    summary="tau2-bench: serve a shop's customers by its policy, with a database and tools",
)

register(
    "agentgym/ALFWorld-v0",
    "agentgym.environments.text.alfworld:ALFWorld",
    extra="text",
    summary="household tasks in words: find, clean, heat, cool, place, look at (six types)",
)

register(
    "agentgym/SearchQA-v0",
    "agentgym.environments.search.searchqa:SearchQA",
    extra="search",
    summary="multi-hop questions answered by searching a local corpus (data=factbook, multihop or files)",
)

register(
    "agentgym/BFCL-MultiTurn-v0",
    "agentgym.environments.apis.bfcl:BFCLMultiTurn",
    extra="apis",
    summary="BFCL's multi-turn tool use: do what a user asks by calling the functions of stateful APIs",
)

register(
    "agentgym/ScienceWorld-v0",
    "agentgym.environments.text.scienceworld:ScienceWorld",
    extra="text",
    summary="experiments of primary-school science: 30 task types, 7,207 variations",
)

register(
    "agentgym/TextWorldExpress-v0",
    "agentgym.environments.text.textworld_express:TextWorldExpress",
    extra="text",
    summary="eight fast text games: cooking, tidying up, coins, maps, sums, sorting, Simon, instructions",
)

register(
    "agentgym/HumanEval-v0",
    "agentgym.environments.code.humaneval:HumanEval",
    extra="code",
    summary="write a function, run its visible examples in a sandbox, submit it to hidden tests",
    episodes=164,
)

register(
    "agentgym/Repair-v0",
    "agentgym.environments.code.repair:Repair",
    extra="code",
    summary="repair a package with a shell and an editor; hidden tests decide, in the way of SWE-bench",
    episodes=19,
)

register(
    "agentgym/Terminal-v0",
    "agentgym.environments.code.terminal:Terminal",
    extra="code",
    summary="42 kinds of shell tasks: files, text, git, archives, processes, SQLite; the folder is judged",
    episodes=84,
)
register(
    "agentgym/TaskFolder-v0",
    "agentgym.environments.code.harbor:TaskFolders",
    extra="code",
    summary="tasks in the folders of Harbor and Terminal-Bench, judged in a fresh container (folder=…)",
)
register(
    "agentgym/PythonMath-v0",
    "agentgym.environments.code.pythonmath:PythonMath",
    extra="code",
    summary="problems of mathematics with a Python interpreter, answered in a box (generated, or your JSONL)",
)
