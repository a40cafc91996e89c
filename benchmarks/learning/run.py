"""``agentgym bench learning``: run the learning studies and write their report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# Last on the path: the benchmarks are called like the packages that they measure.
sys.path.append(str(Path(__file__).parent))
import report
from studies import HERE, run, studies

ROOT = Path(__file__).resolve().parent.parent.parent


def main() -> int:
    """Run what is asked for; 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", nargs="*", help="default: all")
    parser.add_argument("--studies", type=Path, default=HERE, help="folder of the studies' files")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "learning", help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", help="others than the studies'; nothing is reported")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="over all settings; start.KEY: the model's",
    )
    parser.add_argument("--at-once", type=int, help="runs at once; default: one a core")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the report")
    given = parser.parse_args()
    known = studies(given.studies)
    if strange := sorted({*given.study} - {*known}):
        parser.error(f"there is no study {', '.join(strange)}, only {', '.join(known)}")
    failed = {}

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    for name in given.study or known:
        study = known[name]
        if not given.report:
            failed |= {
                (name, *key): why
                for key, why in run(
                    study, given.runs, seeds=given.seeds, at_once=given.at_once, extra=given.set, tell=tell
                ).items()
            }
        if not given.seeds and not given.set:
            print(f"{name}: {study.title}\n\n{report.write(study, given.runs, given.docs, tell)}")
    for key, why in failed.items():
        print(f"{'/'.join(map(str, key))} failed: {why}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
