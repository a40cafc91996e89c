"""Shell tasks about text: logs, tables, configuration, encodings, and one filter to write.

Invariant: what is right is computed from the folder as it was made, in Python, never by the solution's way.
"""

# ruff: noqa: D102 - what the methods of a task are for is said once, by Chore

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from agentgym.environments.code.terminal_chore import (
    Chore,
    Done,
    Draw,
    Run,
    Tree,
    expect,
    put,
    unchanged,
    words,
)


class AccessLog(Chore):
    """Who met the most errors."""

    name = "text-access-log"
    difficulty = "easy"

    def plan(self, draw: Draw) -> None:
        self.hundreds = draw.one((4, 5))
        self.method = draw.one(("GET", "POST"))
        self.count = draw.between(3, 6)

    def asked(self) -> str:
        return words(f"""
            logs/ holds access logs (*.log) whose lines look like
            10.0.0.7 - - [03/May/2023:10:11:12 +0000] "GET /index.html HTTP/1.1" 200 5120
            Over all of them count, for each address, the {self.method} requests that were answered by a
            status from {self.hundreds}00 to {self.hundreds}99. Write the {self.count} addresses with the
            highest counts to top.txt, one a line: address, one blank, count. The highest count comes first;
            addresses with one count are ordered byte by byte. Do not change logs/.
        """)

    def lay(self, root: Path) -> None:
        draw = self.draw("lay")
        addresses = sorted({f"10.{draw.below(3)}.{draw.below(4)}.{draw.between(1, 250)}" for _ in range(14)})
        for number in range(3):
            lines = []
            for _ in range(160):
                path = "/" + draw.one(WORDS_OF_PATHS) + draw.one(("", "?code=500", "/404", "%20POST"))
                status = draw.one((200, 200, 301, 400, 401, 404, 404, 500, 502, 503))
                day = f"{draw.between(1, 28):02}/May/2023:{draw.below(24):02}:{draw.below(60):02}:00 +0000"
                request = f'"{draw.one(("GET", "GET", "POST", "HEAD"))} {path} HTTP/1.1"'
                lines.append(f"{draw.one(addresses)} - - [{day}] {request} {status} {draw.below(9000)}\n")
            put(root / "logs" / f"access-{number}.log", "".join(lines))
        put(root / "logs/notes.txt", '10.0.0.1 - - [x] "GET / HTTP/1.1" 500 1\n' * 99)

    def oracle(self) -> list[str]:
        return [
            f'cat logs/*.log | awk \'$6 == "\\"{self.method}" && $9 >= {self.hundreds}00 && '
            f"$9 <= {self.hundreds}99 {{n[$1]++}} END {{for (a in n) print a, n[a]}}' | "
            f"LC_ALL=C sort -k2,2nr -k1,1 | head -n {self.count} > top.txt"
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        unchanged(before, after, "logs")
        form = re.compile(r'(\S+) - - \[[^]]*\] "(\S+) \S+ HTTP/1.1" (\d+) \d+')
        found: Counter[str] = Counter()
        for name, data in before.files("logs").items():
            for line in data.decode().splitlines() if name.endswith(".log") else ():
                read = form.fullmatch(line)
                if read and read[2] == self.method and int(read[3]) // 100 == self.hundreds:
                    found[read[1]] += 1
        ranks = sorted(found.items(), key=lambda item: (-item[1], item[0]))[: self.count]
        expect(after.lines("top.txt") == [f"{name} {count}" for name, count in ranks], "top.txt is not right")


WORDS_OF_PATHS = ("index.html", "login", "api/items", "static/app.js", "search", "cart")


class Join(Chore):
    """Two tables become one report."""

    name = "text-join"

    def plan(self, draw: Draw) -> None:
        self.state = draw.one(("shipped", "returned", "paid"))

    def asked(self) -> str:
        return words(f"""
            orders.csv has the columns order_id,customer_id,status,cents and customers.csv has
            customer_id,name,country, each with a header line; no field is quoted. Write report.csv with the
            header country,orders,cents and a line for every country that has at least one order with the
            status {self.state}: the country, the number of such orders of its customers, and the sum of
            their cents. The largest sum comes first; countries of one sum are ordered by name, byte by
            byte. Orders of customers that customers.csv does not list belong to the country "unknown".
            Statuses are compared without regard to letter case.
        """)

    def lay(self, root: Path) -> None:
        draw = self.draw("lay")
        customers = [f"C{number:03}" for number in draw.some(range(400), 30)]
        countries = ("Chile", "Ghana", "Japan", "Kenya", "Malta", "Nepal", "Peru", "Sri Lanka")
        rows = [
            f"{name},{draw.one(countries).lower().title()} {name},{draw.one(countries)}\n"
            for name in customers
        ]
        put(root / "customers.csv", "customer_id,name,country\n" + "".join(rows))
        lines = ["order_id,customer_id,status,cents\n"]
        for number in range(220):
            who = draw.one(customers) if draw.chance(0.95) else f"X{draw.below(99)}"
            status = draw.one(("shipped", "Shipped", "returned", "RETURNED", "paid", "Paid", "unpaid"))
            lines.append(f"{number},{who},{status},{draw.between(5, 9000)}\n")
        put(root / "orders.csv", "".join(lines))

    def oracle(self) -> list[str]:
        return [
            "awk -F, 'NR == FNR {if (FNR > 1) c[$1] = $3; next} FNR > 1 && tolower($3) == "
            f'"{self.state}" {{k = ($2 in c) ? c[$2] : "unknown"; n[k]++; s[k] += $4}} '
            'END {for (k in n) print k "," n[k] "," s[k]}\' customers.csv orders.csv | '
            "LC_ALL=C sort -t, -k3,3nr -k1,1 > body.tmp",
            "(echo country,orders,cents; cat body.tmp) > report.csv",
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        unchanged(before, after, "orders.csv", "customers.csv")
        home = {}
        for line in before.lines("customers.csv")[1:]:
            who, _, country = line.split(",")
            home[who] = country
        count: Counter[str] = Counter()
        cents: Counter[str] = Counter()
        for line in before.lines("orders.csv")[1:]:
            _, who, status, amount = line.split(",")
            if status.lower() == self.state:
                count[home.get(who, "unknown")] += 1
                cents[home.get(who, "unknown")] += int(amount)
        order = sorted(count, key=lambda country: (-cents[country], country))
        wanted = ["country,orders,cents", *(f"{name},{count[name]},{cents[name]}" for name in order)]
        expect(after.lines("report.csv") == wanted, "report.csv is not right")


class Settings(Chore):
    """One key of one section changes, and nothing else does."""

    name = "text-settings"
    difficulty = "easy"

    def plan(self, draw: Draw) -> None:
        self.section, self.other = draw.some(("server", "client", "cache", "queue", "mail"), 2)
        self.key = draw.one(("port", "timeout", "limit"))
        self.value = draw.between(1000, 9999)

    def asked(self) -> str:
        return words(f"""
            In every file conf/*.ini set the key {self.key} of the section [{self.section}] to {self.value}:
            its line becomes exactly "{self.key} = {self.value}". The same key in other sections, comments
            (lines that begin with ; or #) and every other byte stay as they are. A file whose section
            [{self.section}] has no such key, or that has no such section, is not changed. Where a section
            has the key, it has it once.
        """)

    def lay(self, root: Path) -> None:
        draw = self.draw("lay")
        for number in range(6):
            lines = [f"; made for {draw.one(('tests', 'night runs'))}", ""]
            for section in draw.shuffled((self.section, self.other, "main", self.section + "2")):
                if section == self.section and number == 4:
                    continue
                lines.append(f"[{section}]")
                keys = draw.shuffled(("host", "user", self.key, self.key + "s", "path"))
                for key in keys:
                    if not (section == self.section and number == 2 and key == self.key):
                        lines.append(f"{key}{draw.one((' = ', '=', ' ='))}{draw.between(1, 99)}")
                    if draw.chance(0.3):
                        lines.append(f"{draw.one(('#', ';'))}{self.key} = {draw.below(9)}")
                lines.append("")
            put(root / "conf" / f"{number}.ini", "\n".join(lines))
        put(root / "conf/old.ini.bak", f"[{self.section}]\n{self.key} = 1\n")

    def oracle(self) -> list[str]:
        return [
            f"for f in conf/*.ini; do sed -E -i '/^\\[{self.section}\\]$/,/^\\[/ "
            f's/^{self.key} *=.*$/{self.key} = {self.value}/\' "$f"; done'
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        wanted = {}
        for name, data in before.files("conf").items():
            section, lines = "", data.decode().split("\n")
            for number, line in enumerate(lines):
                if line.startswith("["):
                    section = line
                elif re.match(rf"{self.key} *=", line) and section == f"[{self.section}]":
                    lines[number] = f"{self.key} = {self.value}"
            wanted[name] = ("\n".join(lines) if name.endswith(".ini") else data.decode()).encode()
        expect(after.files("conf") == wanted, "a file in conf is not right")


class Frequencies(Chore):
    """Words of a text, counted."""

    name = "text-frequencies"
    difficulty = "easy"

    def plan(self, draw: Draw) -> None:
        self.least = draw.between(3, 5)
        self.count = draw.between(8, 15)

    def asked(self) -> str:
        return words(f"""
            Count the words of book.txt. A word is a longest run of the letters a-z and A-Z (anything else
            separates words), and letter case does not matter. Leave out words of fewer than {self.least}
            letters and the words listed in stop.txt. Write the {self.count} most frequent words to
            words.txt, one a line: count, one blank, the word in lower case. The highest count comes first;
            words of one count are in alphabetical order.
        """)

    def lay(self, root: Path) -> None:
        draw = self.draw("lay")
        pool = [*draw.words(40), "the", "of", "and", "a", "don't", "mother-in-law", "e2e"]
        text = []
        for _ in range(900):
            word = pool[min(draw.below(len(pool)), draw.below(len(pool)))]
            word = draw.one((word, word, word.capitalize(), word.upper()))
            text.append(word + draw.one((" ", " ", ", ", ".\n", "; ", "--", "_")))
        put(root / "book.txt", "".join(text) + "\n")
        put(root / "stop.txt", "".join(f"{word}\n" for word in ["the", "and", *draw.some(pool[:8], 3)]))

    def oracle(self) -> list[str]:
        return [
            "tr -cs 'A-Za-z' '\\n' < book.txt | tr 'A-Z' 'a-z' | grep -vxFf stop.txt | "
            f"grep -E '^.{{{self.least},}}$' | sort | uniq -c | LC_ALL=C sort -k1,1nr -k2 | "
            f"head -n {self.count} | sed -E 's/^ +//' > words.txt"
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        stop = set(before.lines("stop.txt"))
        found = Counter(re.findall("[a-z]+", before.text("book.txt").lower()))
        kept = [(word, n) for word, n in found.items() if len(word) >= self.least and word not in stop]
        kept.sort(key=lambda item: (-item[1], item[0]))
        wanted = [f"{n} {word}" for word, n in kept[: self.count]]
        expect(after.lines("words.txt") == wanted, "words.txt is not right")


class Encodings(Chore):
    """Old files become UTF-8 with plain line ends."""

    name = "text-encodings"

    def asked(self) -> str:
        return words("""
            The files letters/*.txt come from old machines. Each is encoded in UTF-8 or in ISO-8859-1
            (Latin-1); one that is valid UTF-8 is UTF-8. Some begin with a UTF-8 byte order mark; lines end
            with LF or with CR LF. Convert all of them in place to UTF-8 without a byte order mark, every CR
            LF becoming LF; a CR that no LF follows stays. Files with other names are not changed.
        """)

    def lay(self, root: Path) -> None:
        draw = self.draw("lay")
        accents = ("café", "señor", "größe", "naïve", "Ångström", "plain", "half a £", "façade")
        for number in range(14):
            end = draw.one(("\n", "\r\n"))
            text = "".join(f"{draw.one(accents)} {draw.prose(3)}{end}" for _ in range(draw.between(2, 7)))
            if number % 5 == 0:
                text += "a lone\rCR" + end
            data = text.encode(draw.one(("utf-8", "latin-1")))
            if draw.chance(0.3):
                data = b"\xef\xbb\xbf" + text.encode()
            put(root / "letters" / f"{number}.txt", data)
        put(root / "letters/raw.dat", "é\r\n".encode("latin-1"))

    def oracle(self) -> list[str]:
        return [
            words(r"""
                for f in letters/*.txt; do
                  if iconv -f UTF-8 -t UTF-8 "$f" > /dev/null 2>&1; then cat "$f" > new.tmp
                  else iconv -f ISO-8859-1 -t UTF-8 "$f" > new.tmp; fi
                  sed -e '1s/^\xef\xbb\xbf//' -e 's/\r$//' new.tmp > "$f"
                done; rm new.tmp
            """)
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        wanted = {}
        for name, data in before.files("letters").items():
            if name.endswith(".txt"):
                try:
                    text = data.decode("utf-8-sig")
                except UnicodeDecodeError:
                    text = data.decode("latin-1")
                data = text.replace("\r\n", "\n").encode()
            wanted[name] = data
        expect(after.files("letters") == wanted, "a file in letters is not right")


class Timeline(Chore):
    """Logs with entries of several lines are merged in time."""

    name = "text-timeline"
    difficulty = "hard"

    def plan(self, draw: Draw) -> None:
        self.level = draw.one(("ERROR", "FATAL"))

    def asked(self) -> str:
        return words(f"""
            The files in services/ called NAME.log hold entries in the order of time. An entry begins with a
            line such as "2023-04-01T10:20:30.123 LEVEL message"; the lines up to the next such line belong
            to it (they may hold anything else). Write all entries whose LEVEL is {self.level}, of all
            files, to timeline.log in the order of their times; entries of the same time are ordered by
            NAME, byte by byte, and those of one file keep their order. Write "[NAME] " before the first
            line of each entry; its other lines are copied as they are.
        """)

    def lay(self, root: Path) -> None:
        draw = self.draw("lay")
        stamps = [
            f"2023-04-01T{draw.below(24):02}:{draw.below(60):02}:00.{draw.below(9)}00" for _ in range(25)
        ]
        for name in draw.words(4):
            lines = []
            for stamp in sorted(draw.one(stamps) for _ in range(30)):
                level = draw.one(("INFO", "WARN", "ERROR", "FATAL"))
                lines.append(f"{stamp} {level} {draw.prose(3)} {draw.one(('', 'ERROR', 'FATAL'))}".rstrip())
                for _ in range(draw.below(3)):
                    lines.append(draw.one(("    at ", "", "Caused by: ERROR ")) + draw.prose(2))
            put(root / "services" / f"{name}.log", "\n".join(lines) + "\n")

    def oracle(self) -> list[str]:
        return [
            words(f"""
                for f in services/*.log; do
                  n=$(basename "$f" .log)
                  awk -v n="$n" '
                    /^[0-9]+-[0-9]+-[0-9]+T[0-9:.]+ [A-Z]+ / {{
                      keep = ($2 == "{self.level}"); stamp = $1; entry++; line = 0
                      if (keep) printf "%s\\t%s\\t%06d\\t%06d\\t[%s] %s\\n", stamp, n, entry, line, n, $0
                      next
                    }}
                    {{ line++; if (keep) printf "%s\\t%s\\t%06d\\t%06d\\t%s\\n", stamp, n, entry, line, $0 }}
                  ' "$f"
                done | LC_ALL=C sort -t "$(printf '\\t')" -k1,1 -k2,2 -k3,3 -k4,4 | cut -f5- > timeline.log
            """)
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        unchanged(before, after, "services")
        entries: list[tuple[str, str, int, list[str]]] = []
        for file, data in before.files("services").items():
            name = file[: -len(".log")]
            for line in data.decode().split("\n")[:-1]:
                if read := re.match(r"(\d{4}-\d\d-\d\dT[\d:.]+) ([A-Z]+) ", line):
                    level = read[2]
                    if level == self.level:
                        entries.append((read[1], name, len(entries), [f"[{name}] {line}"]))
                elif level == self.level:
                    entries[-1][3].append(line)
        entries.sort(key=lambda entry: entry[:3])
        wanted = [line for entry in entries for line in entry[3]]
        expect(after.lines("timeline.log") == wanted, "timeline.log is not right")


class Quantiles(Chore):
    """A filter is written: numbers in, figures out."""

    name = "text-quantiles"

    def plan(self, draw: Draw) -> None:
        self.column = draw.between(2, 4)
        self.mark = draw.one((";", "|", ":"))

    def asked(self) -> str:
        return words(f"""
            Write a program stats.sh, started as "bash stats.sh". It reads lines from its standard input
            whose fields are separated by "{self.mark}" and looks at field number {self.column} (the first
            one is 1). Lines in which that field is no whole number (an optional "-" and digits, nothing
            else) are ignored. It prints five lines: "count N", "min N", "max N", "median N", "sum N". The
            median of an even count is the smaller of the two middle numbers. Without any number it prints
            just "count 0" and exits with status 3; else the status is 0. It is tried on inputs that you do
            not see, with what this machine has; numbers have at most 9 digits.
        """)

    def lay(self, root: Path) -> None:
        put(root / "sample.txt", self._table(self.draw("sample"), 8))

    def _table(self, draw: Draw, rows: int) -> str:
        def cell() -> str:
            odd = draw.one(("x", "", "1.5", "-", "12a", " 7", "--3", "+4"))
            return str(draw.between(-5000, 50000)) if draw.chance(0.8) else odd

        lines = []
        for _ in range(rows):
            lines.append(self.mark.join(cell() for _ in range(draw.one((1, 4, 5, 5, 6)))) + "\n")
        return "".join(lines)

    def oracle(self) -> list[str]:
        return [
            words(f"""
                cat > stats.sh <<'END'
                awk -F '[{self.mark}]' '${self.column} ~ /^-?[0-9]+$/ {{print ${self.column}}}' | sort -n |
                awk '
                  {{v[NR] = $1; s += $1}}
                  END {{
                    if (NR == 0) {{print "count 0"; exit 3}}
                    m = int((NR + 1) / 2)
                    printf "count %d\\nmin %d\\nmax %d\\nmedian %d\\nsum %d\\n", NR, v[1], v[NR], v[m], s
                  }}'
                END
            """)
        ]

    def _inputs(self) -> list[str]:
        draw = self.draw("hidden")
        tables = [self._table(draw, rows) for rows in (1, 2, 7, 40, 41, 200)]
        return [*tables, "", self.mark.join(["x"] * 6) + "\n", self.mark.join(["-0012"] * 6) + "\n"]

    def runs(self) -> list[Run]:
        return [Run(("bash", "../after/stats.sh"), stdin=text) for text in self._inputs()]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        after.data("stats.sh")
        for text, ran in zip(self._inputs(), done, strict=True):
            cells = [line.split(self.mark) for line in text.splitlines()]
            fields = [row[self.column - 1] for row in cells if len(row) >= self.column]
            found = sorted(int(field) for field in fields if re.fullmatch("-?[0-9]+", field))
            wanted = ["count 0"]
            if found:
                wanted = [
                    f"count {len(found)}",
                    f"min {found[0]}",
                    f"max {found[-1]}",
                    f"median {found[(len(found) - 1) // 2]}",
                    f"sum {sum(found)}",
                ]
            expect(ran.code == (0 if found else 3), "stats.sh ends with another status")
            expect(ran.stdout.rstrip("\n").split("\n") == wanted, "stats.sh prints something else")


CHORES: tuple[type[Chore], ...] = (
    AccessLog,
    Join,
    Settings,
    Frequencies,
    Encodings,
    Timeline,
    Quantiles,
)
