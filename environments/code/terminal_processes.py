"""Shell tasks about processes: what runs is looked at, spoken to and stopped.

Programs that run others are written, too.

Invariant: a process cannot be handed in, so its traces in files are: words that only a live process knows and
gives away for the right treatment. What starts the processes is in
:mod:`agentgym.environments.code.terminal_live`.
"""

# ruff: noqa: D102 - what the methods of a task are for is said once, by Chore

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from agentgym.environments.code.terminal_chore import (
    Chore,
    Done,
    Draw,
    Live,
    Run,
    Tree,
    expect,
    folder_is,
    put,
    unchanged,
    words,
)


class Deleted(Chore):
    """A file that is deleted and still open."""

    name = "processes-deleted"

    def plan(self, draw: Draw) -> None:
        self.names = draw.words(4)
        self.text = {
            name: "".join(f"{draw.prose(5)} {draw.token()}\n" for _ in range(30)) for name in self.names
        }

    def asked(self) -> str:
        return words(f"""
            Some processes run keeper.sh, one for each of several ledgers. Somebody deleted the file
            ledgers/{self.names[1]}.txt, but the keeper that was started for it still holds it open. Write
            the file's content, byte for byte, to rescued.txt. Do not stop any keeper.
        """)

    def lay(self, root: Path) -> None:
        put(
            root / "keeper.sh",
            'read -r _\nexec 3< "ledgers/$1.txt"\ntouch "ledgers/$1.open"\n'
            "while [ -e keeper.sh ]; do sleep 1; done < /dev/null\n",
        )
        (root / "ledgers").mkdir()

    def live(self) -> Live:
        return Live("keepers", {"text": self.text, "gone": self.names[:3]})

    def oracle(self) -> list[str]:
        return [
            words(f"""
                for p in /proc/[0-9]*; do
                  c=$(tr '\\0' ' ' 2> /dev/null < "$p/cmdline")
                  if [ "$c" = 'bash keeper.sh {self.names[1]} ' ] && [ "$p/cwd" -ef . ]; then
                    cat "$p/fd/3" > rescued.txt
                  fi
                done
            """)
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        expect(after.text("rescued.txt") == self.text[self.names[1]], "rescued.txt has another content")


WORKER = """
read -r word
trap 'printf "%s\\n" "$word" > "reports/$1.txt"' USR1
touch "reports/$1.up"
while [ -e worker.sh ]; do sleep 1 & wait $!; done < /dev/null
"""


class Signal(Chore):
    """The right one of several processes gets a signal."""

    name = "processes-signal"

    def plan(self, draw: Draw) -> None:
        self.names = draw.words(6)
        self.zones = draw.some(("harbour", "hill", "market", "mill", "station", "tower"), 6)
        self.words = [draw.token() for _ in self.names]
        self.right = draw.below(6)

    def asked(self) -> str:
        return words(f"""
            Several processes run worker.sh. Each has an environment variable ZONE. Send the signal SIGUSR1
            to the one whose ZONE is {self.zones[self.right]}, and to no other one: it then writes its
            report into the folder reports. In the end reports holds that report and nothing else. Do not
            stop any worker.
        """)

    def lay(self, root: Path) -> None:
        put(root / "worker.sh", WORKER.lstrip())
        (root / "reports").mkdir()

    def live(self) -> Live:
        workers = list(zip(self.names, self.zones, self.words, strict=True))
        return Live("workers", {"workers": workers})

    def oracle(self) -> list[str]:
        return [
            words(f"""
                for p in /proc/[0-9]*; do
                  if tr '\\0' ' ' < "$p/cmdline" 2> /dev/null | grep -q '^bash worker.sh ' &&
                     [ "$p/cwd" -ef . ] &&
                     tr '\\0' '\\n' < "$p/environ" | grep -qx 'ZONE={self.zones[self.right]}'; then
                    kill -USR1 "${{p#/proc/}}"
                  fi
                done
                for i in $(seq 100); do
                  if [ -s reports/{self.names[self.right]}.txt ]; then break; fi; sleep 0.05
                done
            """)
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        word = self.words[self.right].encode() + b"\n"
        folder_is(after, "reports", {f"{self.names[self.right]}.txt": word})


class Supervisor(Chore):
    """A process that comes back has to be stopped at its root."""

    name = "processes-supervisor"
    difficulty = "hard"

    def plan(self, draw: Draw) -> None:
        self.word = draw.token()
        self.state = draw.one(("state", "spool", "journal"))

    def asked(self) -> str:
        return words(f"""
            keep.sh runs and starts drain.sh again whenever that ends. Stop both for good, so that the file
            {self.state}/saved, which drain.sh writes when it gets SIGTERM, is there in the end, and
            {self.state}/busy is not. Do not write or delete these two files yourself, and do not change the
            scripts.
        """)

    def lay(self, root: Path) -> None:
        (root / self.state).mkdir()
        put(
            root / "keep.sh",
            words(f"""
                read -r word
                trap 'exit 0' TERM
                while [ -e keep.sh ]; do
                  rm -f {self.state}/saved
                  printf '%s\\n' "$word" | bash drain.sh &
                  wait $!
                done < /dev/null
            """)
            + "\n",
        )
        put(
            root / "drain.sh",
            words(f"""
                read -r word
                trap 'printf "%s\\n" "$word" > {self.state}/saved; rm -f {self.state}/busy; exit 0' TERM
                touch {self.state}/busy
                while [ -e keep.sh ]; do sleep 1 & wait $!; done < /dev/null
            """)
            + "\n",
        )

    def live(self) -> Live:
        return Live("supervisor", {"word": self.word, "busy": f"{self.state}/busy"})

    def oracle(self) -> list[str]:
        return [
            words(f"""
                pids() {{ grep -alE "^bash.$1" /proc/[0-9]*/cmdline 2> /dev/null | cut -d/ -f3; }}
                stop() {{
                  for p in $(pids "$1"); do
                    if [ "/proc/$p/cwd" -ef . ]; then kill -TERM "$p"; fi
                  done
                }}
                stop keep.sh; sleep 0.2; stop drain.sh
                for i in $(seq 100); do if [ ! -e {self.state}/busy ]; then break; fi; sleep 0.05; done
            """)
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        unchanged(before, after, "keep.sh", "drain.sh")
        folder_is(after, self.state, {"saved": f"{self.word}\n".encode()})


class Locks(Chore):
    """Locks of processes that are gone are removed, the others stay."""

    name = "processes-locks"

    def plan(self, draw: Draw) -> None:
        names = draw.words(10)
        self.held, self.dead, self.taken = names[:4], names[4:7], names[7:]

    def asked(self) -> str:
        return words("""
            locks/ holds files NAME.lock; each holds the process id of the service that made it. A lock is
            in use if a process with that id runs now as "bash service.sh NAME" with the lock's own NAME.
            All other locks are stale: the process is gone, or its id belongs to another one by now. Delete
            the stale locks; the locks in use stay as they are. Do not stop any process.
        """)

    def lay(self, root: Path) -> None:
        put(root / "service.sh", "read -r _\nwhile [ -e service.sh ]; do sleep 1; done < /dev/null\n")
        (root / "locks").mkdir()

    def live(self) -> Live:
        return Live("locks", {"held": self.held, "dead": self.dead, "taken": self.taken})

    def oracle(self) -> list[str]:
        return [
            words("""
                for f in locks/*.lock; do
                  n=$(basename "$f" .lock)
                  c=$(tr '\\0' ' ' < "/proc/$(cat "$f")/cmdline" 2> /dev/null)
                  if [ "$c" != "bash service.sh $n " ]; then rm "$f"; fi
                done 2> /dev/null
            """)
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        expect(set(after.entries("locks")) == {f"{name}.lock" for name in self.held}, "other locks are there")
        expect(
            all(re.fullmatch(rb"\d+\n", data) for data in after.files("locks").values()), "a lock was changed"
        )


class Pipes(Chore):
    """A service answers through named pipes."""

    name = "processes-pipes"

    def plan(self, draw: Draw) -> None:
        self.key = draw.token(24)
        self.names = draw.words(12)

    def asked(self) -> str:
        return words("""
            A service reads lines from the named pipe pipes/in; for each line it writes one line to the
            named pipe pipes/out. Ask it about every name of names.txt, one at a time, and write answers.txt
            with a line for each name, in the same order: the name, one blank, the service's answer.
        """)

    def lay(self, root: Path) -> None:
        put(root / "names.txt", "".join(f"{name}\n" for name in self.names))
        put(
            root / "service.sh",
            words("""
                read -r key
                exec 3<> pipes/in 4<> pipes/out < /dev/null
                touch pipes/up
                while [ -e service.sh ]; do
                  if read -r -t 1 name <&3; then
                    printf '%s' "$key:$name" | sha256sum | cut -c 1-16 >&4
                  fi
                done
            """)
            + "\n",
        )
        (root / "pipes").mkdir()

    def live(self) -> Live:
        return Live("pipes", {"key": self.key})

    def oracle(self) -> list[str]:
        return [
            'while read -r n; do echo "$n" > pipes/in; read -r a < pipes/out; echo "$n $a"; done '
            "< names.txt > answers.txt"
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        wanted = [
            f"{name} {hashlib.sha256(f'{self.key}:{name}'.encode()).hexdigest()[:16]}" for name in self.names
        ]
        expect(after.lines("answers.txt") == wanted, "answers.txt is not right")


SIGNALLER = r"""
import json, os, signal, subprocess, sys
script, plan = sys.argv[1], json.loads(sys.argv[2])
run = subprocess.Popen(["bash", script, "total.txt"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
told = []
def line():
    signal.alarm(10)
    told.append(run.stdout.readline(200).decode("utf-8", "replace").strip())
    signal.alarm(0)
line()
for number in plan:
    os.kill(run.pid, number)
    line()
os.kill(run.pid, signal.SIGTERM)
signal.alarm(10)
print(json.dumps([told, run.wait()]))
"""


class Tally(Chore):
    """A program is written that counts signals."""

    name = "processes-tally"
    difficulty = "hard"

    def plan(self, draw: Draw) -> None:
        self.step = draw.between(2, 9)

    def asked(self) -> str:
        return words(f"""
            Write a program tally.sh, started as "bash tally.sh FILE". It prints the line "ready" and then
            waits for signals, without using the processor. It keeps a count that starts at 0. On SIGUSR1 it
            adds {self.step} to the count, on SIGUSR2 it sets the count to 0, on SIGHUP it leaves the count
            as it is; after each of these it prints the count as one line at once (in less than a second).
            On SIGTERM it writes the count as one line to FILE and exits with status 0. It is tried with
            signals that you do not see.
        """)

    def lay(self, root: Path) -> None:
        put(root / "readme.txt", "tally.sh belongs here\n")

    def oracle(self) -> list[str]:
        return [
            words(f"""
                cat > tally.sh <<'END'
                n=0
                trap 'n=$((n + {self.step})); echo "$n"' USR1
                trap 'n=0; echo "$n"' USR2
                trap 'echo "$n"' HUP
                trap 'echo "$n" > "$1"; kill "$!" 2> /dev/null; exit 0' TERM
                echo ready
                while :; do sleep 3600 > /dev/null & while kill -0 "$!" 2> /dev/null; do wait "$!"; done; done
                END
            """)
        ]

    def _plans(self) -> list[list[int]]:
        draw = self.draw("hidden")
        # USR1 is 10 on Linux, USR2 is 12, HUP is 1.
        return [[], *([draw.one((10, 10, 10, 12, 1)) for _ in range(draw.between(3, 12))] for _ in range(3))]

    def runs(self) -> list[Run]:
        python = ("python3", "-I", "-S", "-B", "-c", SIGNALLER, "../after/tally.sh")
        return [Run((*python, json.dumps(plan)), keep=("total.txt",), seconds=60.0) for plan in self._plans()]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        after.data("tally.sh")
        for plan, ran in zip(self._plans(), done, strict=True):
            expect(ran.code == 0, "tally.sh does not answer")
            count, wanted = 0, ["ready"]
            for number in plan:
                count = {10: count + self.step, 12: 0, 1: count}[number]
                wanted.append(str(count))
            expect(json.loads(ran.stdout) == [wanted, 0], "tally.sh says something else")
            expect(ran.files.get("total.txt", "").strip() == str(count), "tally.sh writes something else")


class Retry(Chore):
    """A program is written that runs another one until it succeeds."""

    name = "processes-retry"

    def plan(self, draw: Draw) -> None:
        self.word = draw.one(("giving up", "no luck", "enough"))
        self.status = draw.between(100, 120)

    def asked(self) -> str:
        return words(f"""
            Write a program retry.sh, started as "bash retry.sh N COMMAND ARGUMENT...". It runs the command
            with its arguments, as they are (they may hold blanks, quotes and *), until it exits with status
            0, but at most N times and without a pause. The command's output passes through. If a run
            succeeds, retry.sh exits with status 0; if all N fail, it prints the line "{self.word}" as the
            last line of its standard output and exits with the status of the last run. A command that exits
            with status {self.status} is not run again: retry.sh exits with {self.status} at once and prints
            nothing of its own. If N is not a whole number above 0, it runs nothing, prints nothing to its
            standard output and exits with status 2.
        """)

    def lay(self, root: Path) -> None:
        put(root / "readme.txt", "retry.sh belongs here\n")

    def oracle(self) -> list[str]:
        return [
            words(f"""
                cat > retry.sh <<'END'
                n=$1; shift
                if ! [[ "$n" =~ ^[0-9]+$ ]] || [ "$n" -lt 1 ]; then exit 2; fi
                for ((i = 0; i < n; i++)); do
                  "$@" && exit 0
                  s=$?
                  if [ "$s" -eq {self.status} ]; then exit "$s"; fi
                done
                echo "{self.word}"
                exit "$s"
                END
            """)
        ]

    def _cases(self) -> list[tuple[str, list[int], list[str]]]:
        draw = self.draw("hidden")
        odd = ["a b", "*", '"q"', "$HOME", "", "-n"]
        cases: list[tuple[str, list[int], list[str]]] = []
        for successes in (1, 3, 0, 2):
            fails = [draw.between(1, 90) for _ in range(6)]
            if successes:
                fails[successes - 1] = 0
            cases.append((str(draw.between(3, 5)), fails, draw.some(odd, 3)))
        cases.append(("4", [7, self.status, 0, 0, 0], ["x"]))
        cases += [(n, [0] * 5, ["y"]) for n in ("0", "-3", "many", "1")]
        return cases

    def runs(self) -> list[Run]:
        made = []
        for n, codes, arguments in self._cases():
            flaky = words(f"""
                codes=({" ".join(map(str, codes))})
                i=$(cat count 2> /dev/null || echo 0)
                echo $((i + 1)) > count
                printf '<%s>' "$@"; echo " run $i"
                exit "${{codes[$i]}}"
            """)
            argv = ("bash", "../after/retry.sh", n, "bash", "flaky.sh", *arguments)
            made.append(Run(argv, files={"flaky.sh": flaky + "\n"}, keep=("count",)))
        return made

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        after.data("retry.sh")
        for (n, codes, arguments), ran in zip(self._cases(), done, strict=True):
            most = int(n) if n.isdigit() else 0
            code, lines, count = 2, [], 0
            while count < most:
                lines.append("".join(f"<{argument}>" for argument in arguments) + f" run {count}")
                code, count = codes[count], count + 1
                if code in (0, self.status):
                    break
            if code not in (0, self.status) and most:
                lines.append(self.word)
            expect(ran.code == code, "retry.sh ends with another status")
            expect(ran.stdout == "".join(f"{line}\n" for line in lines), "retry.sh prints something else")
            expect(
                ran.files.get("count", "0").strip() == str(count), "the command ran another number of times"
            )


class Jobs(Chore):
    """A batch of jobs is run, and its ends are told apart."""

    name = "processes-jobs"
    difficulty = "easy"

    def plan(self, draw: Draw) -> None:
        self.seconds = draw.between(2, 3)

    def asked(self) -> str:
        return words(f"""
            Run each script jobs/*.sh with bash, from the working directory, and give it at most
            {self.seconds} seconds. Write results.csv with a line for each, ordered by name in byte order:
            the script's name without ".sh", how it ended, and the first line that it printed, with commas
            between them. How it ended is "ok" for status 0, "failed N" for status N, "killed N" if it was
            ended by signal number N, and "timeout" if it was still running after {self.seconds} seconds and
            had to be stopped. Do not change jobs/.
        """)

    def _fates(self) -> dict[str, tuple[str, str]]:
        draw = self.draw("jobs")
        ends = ["ok", "ok", "failed", "failed", "failed", "killed", "killed", "timeout"]
        fates = {}
        for name, end in zip(draw.words(8), draw.shuffled(ends), strict=True):
            number = draw.between(1, 90) if end == "failed" else draw.one((9, 15))
            fates[name] = end if end in ("ok", "timeout") else f"{end} {number}", draw.token()
        return fates

    def lay(self, root: Path) -> None:
        for name, (end, word) in self._fates().items():
            last = {"o": "exit 0", "f": f"exit {end[6:].strip()}", "k": f"kill -{end[6:].strip()} $$"}
            # Its word has to be computed, and so does its end, in part.
            put(
                root / "jobs" / f"{name}.sh",
                f"printf '%s' {word} | sha256sum | cut -c 1-20\necho more, and more\n"
                f"{last.get(end[0], 'sleep 600')}\n",
            )
        put(root / "jobs/notes.md", "no job\n")

    def oracle(self) -> list[str]:
        return [
            words(f"""
                export LC_ALL=C
                for f in jobs/*.sh; do
                  timeout -k 1 {self.seconds} bash "$f" > out.tmp 2> /dev/null; s=$?
                  case $s in
                    0) e=ok;; 124) e=timeout;; 137) e='killed 9';; 143) e='killed 15';; *) e="failed $s";;
                  esac
                  echo "$(basename "$f" .sh),$e,$(head -n 1 out.tmp)"
                done > results.csv 2> /dev/null
            """)
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        unchanged(before, after, "jobs")
        wanted = []
        for name, (end, word) in sorted(self._fates().items()):
            wanted.append(f"{name},{end},{hashlib.sha256(word.encode()).hexdigest()[:20]}")
        expect(after.lines("results.csv") == wanted, "results.csv is not right")


CHORES: tuple[type[Chore], ...] = (Deleted, Signal, Supervisor, Locks, Pipes, Tally, Retry, Jobs)
