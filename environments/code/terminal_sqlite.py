"""Shell tasks about SQLite databases; the program sqlite3 may be absent, Python's module is there.

Invariant: what is right is computed from the database as it was made, in Python; what a policy left is read
through :class:`~agentgym.environments.code.terminal_database.Database`.
"""

# ruff: noqa: D102 - what the methods of a task are for is said once, by Chore

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from agentgym.environments.code.terminal_chore import Chore, Done, Draw, Tree, expect, put, unchanged, words
from agentgym.environments.code.terminal_database import Database, make


def script(code: str) -> str:
    """A command that runs a Python script."""
    return f"python3 - <<'END'\n{words(code)}\nEND"


class Report(Chore):
    """The best customers of a period."""

    name = "sqlite-report"
    difficulty = "easy"

    def plan(self, draw: Draw) -> None:
        self.year = draw.between(2019, 2022)
        self.count = draw.between(4, 8)

    def asked(self) -> str:
        return words(f"""
            shop.db is an SQLite database with the tables customer(id, name), orders(id, customer_id, day,
            cancelled) and item(order_id, product, quantity, cents); day is text like 2021-07-30, and an
            order with cancelled = 1 does not count. Write to best.csv the {self.count} customers with the
            highest turnover (the sum of quantity * cents over the items of their orders) in the year
            {self.year}, with the header name,turnover and a line each: name, comma, turnover in cents. The
            highest comes first; customers of one turnover are ordered by name. Do not change shop.db.
        """)

    def lay(self, root: Path) -> None:
        draw = self.draw("lay")
        names = draw.words(30)
        orders, items = [], []
        for number in range(160):
            day = f"{draw.between(2019, 2022)}-{draw.between(1, 12):02}-{draw.between(1, 28):02}"
            orders.append((number, draw.between(1, 30), day, int(draw.chance(0.2))))
            items += [
                (number, draw.one(names), draw.between(1, 5), draw.between(1, 40) * 50)
                for _ in range(draw.below(4))
            ]
        make(
            root / "shop.db",
            "CREATE TABLE customer (id INTEGER PRIMARY KEY, name TEXT); "
            "CREATE TABLE orders (id INTEGER PRIMARY KEY, customer_id INTEGER, day TEXT, cancelled INTEGER); "
            "CREATE TABLE item (order_id INTEGER, product TEXT, quantity INTEGER, cents INTEGER);",
            {"customer": [(n + 1, name) for n, name in enumerate(names)], "orders": orders, "item": items},
        )

    def oracle(self) -> list[str]:
        return [
            script(f"""
                import sqlite3
                rows = sqlite3.connect("shop.db").execute('''
                    SELECT c.name, sum(i.quantity * i.cents) AS s FROM customer c
                    JOIN orders o ON o.customer_id = c.id JOIN item i ON i.order_id = o.id
                    WHERE o.cancelled = 0 AND o.day LIKE '{self.year}-%'
                    GROUP BY c.id ORDER BY s DESC, c.name LIMIT {self.count}''')
                with open("best.csv", "w") as f:
                    print("name,turnover", file=f)
                    for name, total in rows:
                        print(name, total, sep=",", file=f)
            """)
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        unchanged(before, after, "shop.db")
        base = Database(before, "shop.db")
        names = dict(base.rows("SELECT id, name FROM customer"))
        counted = {
            row[0]: row[1]
            for row in base.rows("SELECT * FROM orders")
            if not row[3] and row[2][:4] == str(self.year)
        }
        total: dict[str, int] = defaultdict(int)
        for order, _, quantity, cents in base.rows("SELECT * FROM item"):
            if order in counted:
                total[names[counted[order]]] += quantity * cents
        ranks = sorted(total.items(), key=lambda item: (-item[1], item[0]))[: self.count]
        wanted = ["name,turnover", *(f"{name},{amount}" for name, amount in ranks)]
        expect(after.lines("best.csv") == wanted, "best.csv is not right")


class Import(Chore):
    """A table of text becomes a typed table."""

    name = "sqlite-import"

    def plan(self, draw: Draw) -> None:
        self.table = draw.one(("reading", "sample", "measure"))

    def asked(self) -> str:
        return words(f"""
            readings.csv has the header id,station,celsius,note; fields may be quoted as CSV does, with
            commas, quotes and line breaks inside. Make the SQLite database readings.db with one table
            {self.table}: the columns id (INTEGER, the primary key), station (TEXT, not null), celsius
            (REAL) and note (TEXT), in this order, with one row for each record. An empty celsius or note is
            NULL; station is stored without blanks around it. Of records with the same id only the last one
            counts.
        """)

    def lay(self, root: Path) -> None:
        draw = self.draw("lay")
        lines = ["id,station,celsius,note"]
        for _ in range(90):
            note = draw.one(
                ("", draw.prose(2), f'"{draw.prose(1)}, {draw.prose(1)}"', '"say ""hi"""', '"two\nlines"')
            )
            station = draw.one(("", " ")) + draw.one(("north", "south", "east side")) + draw.one(("", "  "))
            celsius = draw.one(("", f"{draw.between(-300, 400) / 10}", f"{draw.between(-30, 40)}"))
            lines.append(f"{draw.between(1, 75)},{station},{celsius},{note}")
        put(root / "readings.csv", "\n".join(lines) + "\n")

    def oracle(self) -> list[str]:
        return [
            script(f"""
                import csv, sqlite3
                base = sqlite3.connect("readings.db")
                base.execute("CREATE TABLE {self.table} (id INTEGER PRIMARY KEY, station TEXT NOT NULL, "
                             "celsius REAL, note TEXT)")
                for r in csv.DictReader(open("readings.csv", newline="")):
                    celsius = float(r["celsius"]) if r["celsius"] else None
                    row = int(r["id"]), r["station"].strip(), celsius, r["note"] or None
                    base.execute("INSERT OR REPLACE INTO {self.table} VALUES (?, ?, ?, ?)", row)
                base.commit()
            """)
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        import csv
        import io

        unchanged(before, after, "readings.csv")
        wanted = {}
        for row in csv.DictReader(io.StringIO(before.data("readings.csv").decode(), newline="")):
            celsius = float(row["celsius"]) if row["celsius"] else None
            wanted[int(row["id"])] = (row["station"].strip(), celsius, row["note"] or None)
        base = Database(after, "readings.db")
        expect(base.tables() == {self.table}, "readings.db has other tables")
        base.table(self.table)
        shape = [(row[1], row[2].upper(), row[5]) for row in base.rows(f"PRAGMA table_info({self.table})")]
        expect(
            shape
            == [("id", "INTEGER", 1), ("station", "TEXT", 0), ("celsius", "REAL", 0), ("note", "TEXT", 0)],
            "the table has other columns",
        )
        expect(base.rows(f"PRAGMA table_info({self.table})")[1][3] == 1, "station may be null")
        found = {row[0]: row[1:] for row in base.rows(f"SELECT id, station, celsius, note FROM {self.table}")}
        expect(found == wanted, "the table has other rows")


class Migrate(Chore):
    """A column is split, and a table renamed."""

    name = "sqlite-migrate"

    def plan(self, draw: Draw) -> None:
        self.old, self.new = draw.one((("person", "member"), ("people", "contact"), ("staff", "employee")))

    def asked(self) -> str:
        return words(f"""
            office.db is an SQLite database with the tables {self.old}(id INTEGER PRIMARY KEY, name TEXT,
            room TEXT) and loan({self.old}_id INTEGER, thing TEXT). Change it in place: the table {self.old}
            becomes {self.new}(id INTEGER PRIMARY KEY, first TEXT, last TEXT, room TEXT), with the same ids
            and rooms; last is what follows the last blank of the old name and first is what comes before
            that blank, and a name without a blank becomes last, with first NULL. loan stays, its column
            {self.old}_id renamed to {self.new}_id. No other table or view remains, and PRAGMA user_version
            becomes one more than it is.
        """)

    def lay(self, root: Path) -> None:
        draw = self.draw("lay")
        rows = []
        for number in draw.some(range(1, 200), 40):
            name = " ".join(part.capitalize() for part in draw.words(draw.one((1, 2, 2, 3))))
            rows.append((number, name, draw.one((None, "A1", "B22", "C3"))))
        loans = [(draw.one(rows)[0], draw.one(("key", "lamp", "drill"))) for _ in range(30)]
        make(
            root / "office.db",
            f"CREATE TABLE {self.old} (id INTEGER PRIMARY KEY, name TEXT, room TEXT); CREATE TABLE loan "
            f"({self.old}_id INTEGER, thing TEXT); PRAGMA user_version = {draw.between(3, 30)};",
            {self.old: rows, "loan": loans},
        )

    def oracle(self) -> list[str]:
        return [
            script(f"""
                import sqlite3
                base = sqlite3.connect("office.db")
                shape = "id INTEGER PRIMARY KEY, first TEXT, last TEXT, room TEXT"
                base.execute(f"CREATE TABLE {self.new} ({{shape}})")
                for number, name, room in base.execute("SELECT id, name, room FROM {self.old}").fetchall():
                    first, _, last = name.rpartition(" ")
                    row = number, first or None, last, room
                    base.execute("INSERT INTO {self.new} VALUES (?, ?, ?, ?)", row)
                base.execute("DROP TABLE {self.old}")
                base.execute("ALTER TABLE loan RENAME COLUMN {self.old}_id TO {self.new}_id")
                version = base.execute("PRAGMA user_version").fetchone()[0]
                base.execute(f"PRAGMA user_version = {{version + 1}}")
                base.commit()
            """)
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        old, new = Database(before, "office.db"), Database(after, "office.db")
        expect(new.tables() == {self.new, "loan"}, "office.db has other tables")
        expect(new.columns(self.new) == ["id", "first", "last", "room"], f"{self.new} has other columns")
        expect(new.columns("loan") == [f"{self.new}_id", "thing"], "loan has other columns")
        key = [row[5] for row in new.rows(f"PRAGMA table_info({self.new})")]
        expect(key == [1, 0, 0, 0], f"{self.new} has another primary key")
        wanted = []
        for number, name, room in old.rows(f"SELECT id, name, room FROM {self.old} ORDER BY id"):
            first, _, last = name.rpartition(" ")
            wanted.append((number, first or None, last, room))
        expect(new.rows(f"SELECT * FROM {self.new} ORDER BY id") == wanted, f"{self.new} has other rows")
        loans = [sorted(base.rows("SELECT * FROM loan")) for base in (old, new)]
        expect(loans[0] == loans[1], "loan has other rows")
        version = old.rows("PRAGMA user_version")[0][0]
        expect(new.rows("PRAGMA user_version")[0][0] == version + 1, "user_version is not right")


class Duplicates(Chore):
    """Rows of one address become one, and what refers to them follows."""

    name = "sqlite-duplicates"
    difficulty = "hard"

    def asked(self) -> str:
        return words("""
            crm.db is an SQLite database with the tables client(id INTEGER PRIMARY KEY, email TEXT, points
            INTEGER) and ticket(id INTEGER PRIMARY KEY, client_id INTEGER, title TEXT). Some clients are
            there more than once: their e-mail addresses are equal but for letter case and blanks around
            them. Of each such set keep the row with the smallest id, give it the sum of the set's points,
            and let all tickets of the set refer to it; delete the other rows. All addresses that remain are
            stored in lower case without blanks around them, and a unique index on client(email) (that
            column only, not partial) keeps it so. Tickets are not deleted, and otherwise not changed.
        """)

    def lay(self, root: Path) -> None:
        draw = self.draw("lay")
        pool = [f"{word}@{draw.one(('example.org', 'example.com'))}" for word in draw.words(22)]
        clients = []
        for number in draw.some(range(1, 300), 50):
            address = draw.one(pool)
            address = draw.one(
                (address, address, address.upper(), address.title(), f" {address}", f"{address}  ")
            )
            clients.append((number, address, draw.below(100)))
        tickets = [(n, draw.one(clients)[0], draw.prose(2)) for n in draw.some(range(900), 80)]
        make(
            root / "crm.db",
            "CREATE TABLE client (id INTEGER PRIMARY KEY, email TEXT, points INTEGER); "
            "CREATE TABLE ticket (id INTEGER PRIMARY KEY, client_id INTEGER, title TEXT);",
            {"client": clients, "ticket": tickets},
        )

    def oracle(self) -> list[str]:
        return [
            script("""
                import sqlite3
                base = sqlite3.connect("crm.db")
                base.executescript('''
                    CREATE TEMP TABLE m AS SELECT id, lower(trim(email)) AS e, points,
                        min(id) OVER (PARTITION BY lower(trim(email))) AS keep FROM client;
                    UPDATE ticket SET client_id = (SELECT keep FROM m WHERE m.id = ticket.client_id);
                    DELETE FROM client WHERE id NOT IN (SELECT keep FROM m);
                    UPDATE client SET email = lower(trim(email)),
                        points = (SELECT sum(points) FROM m WHERE m.keep = client.id);
                    CREATE UNIQUE INDEX client_email ON client (email);
                ''')
                base.commit()
            """)
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        old, new = Database(before, "crm.db"), Database(after, "crm.db")
        first: dict[str, int] = {}
        points: dict[str, int] = defaultdict(int)
        kept = {}
        for number, email, more in old.rows("SELECT id, email, points FROM client ORDER BY id"):
            email = email.strip().lower()
            kept[number] = first.setdefault(email, number)
            points[email] += more
        wanted = sorted((number, email, points[email]) for email, number in first.items())
        expect(new.tables() == {"client", "ticket"}, "crm.db has other tables")
        new.table("client")
        new.table("ticket")
        expect(
            new.rows("SELECT id, email, points FROM client ORDER BY id") == wanted, "client has other rows"
        )
        tickets = [(n, kept[who], title) for n, who, title in old.rows("SELECT * FROM ticket ORDER BY id")]
        expect(
            new.rows("SELECT id, client_id, title FROM ticket ORDER BY id") == tickets,
            "ticket has other rows",
        )
        unique = [row[1] for row in new.rows("PRAGMA index_list(client)") if row[2] and not row[4]]
        quoted = [name.replace('"', '""') for name in unique]
        columns = [[row[2] for row in new.rows(f'PRAGMA index_info("{name}")')] for name in quoted]
        expect(["email"] in columns, "there is no unique index on the address")


class Orphans(Chore):
    """Rows that refer to nothing are set aside."""

    name = "sqlite-orphans"

    def plan(self, draw: Draw) -> None:
        self.keep = draw.one(("lost", "orphan", "aside"))

    def asked(self) -> str:
        return words(f"""
            library.db is an SQLite database with the tables author(id, name), book(id, author_id, title)
            and copy(id, book_id, shelf). A book is an orphan if its author_id is not NULL and no author has
            that id; a copy is an orphan if no book has its book_id, or if its book is an orphan; a copy
            whose book_id is NULL is one too. Delete all orphans from book and copy, and list them in a new
            table {self.keep} with the columns kind (TEXT: 'book' or 'copy') and id (INTEGER), one row each.
            Nothing else changes.
        """)

    def lay(self, root: Path) -> None:
        draw = self.draw("lay")
        authors = [(n, draw.prose(2)) for n in draw.some(range(1, 60), 12)]
        books = []
        for number in draw.some(range(1, 300), 60):
            author = draw.one((draw.one(authors)[0], draw.one(authors)[0], draw.between(1, 70), None))
            books.append((number, author, draw.prose(3)))
        copies = []
        for number in draw.some(range(1, 900), 120):
            book = draw.one(
                (draw.one(books)[0], draw.one(books)[0], draw.one(books)[0], draw.between(1, 320), None)
            )
            copies.append((number, book, draw.one(("A", "B"))))
        make(
            root / "library.db",
            "CREATE TABLE author (id INTEGER PRIMARY KEY, name TEXT); "
            "CREATE TABLE book (id INTEGER PRIMARY KEY, author_id INTEGER, title TEXT); "
            "CREATE TABLE copy (id INTEGER PRIMARY KEY, book_id INTEGER, shelf TEXT);",
            {"author": authors, "book": books, "copy": copies},
        )

    def oracle(self) -> list[str]:
        return [
            script(f"""
                import sqlite3
                base = sqlite3.connect("library.db")
                base.executescript('''
                    CREATE TABLE {self.keep} (kind TEXT, id INTEGER);
                    INSERT INTO {self.keep} SELECT 'book', id FROM book
                        WHERE author_id IS NOT NULL AND author_id NOT IN (SELECT id FROM author);
                    DELETE FROM book WHERE id IN (SELECT id FROM {self.keep} WHERE kind = 'book');
                    INSERT INTO {self.keep} SELECT 'copy', id FROM copy
                        WHERE book_id IS NULL OR book_id NOT IN (SELECT id FROM book);
                    DELETE FROM copy WHERE id IN (SELECT id FROM {self.keep} WHERE kind = 'copy');
                ''')
                base.commit()
            """)
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        old, new = Database(before, "library.db"), Database(after, "library.db")
        authors = {row[0] for row in old.rows("SELECT id FROM author")}
        books = old.rows("SELECT * FROM book ORDER BY id")
        copies = old.rows("SELECT * FROM copy ORDER BY id")
        good = [book for book in books if book[1] is None or book[1] in authors]
        there = {book[0] for book in good}
        held = [copy for copy in copies if copy[1] in there]
        gone = [("book", book[0]) for book in books if book not in good]
        gone += [("copy", copy[0]) for copy in copies if copy not in held]
        expect(new.tables() == {"author", "book", "copy", self.keep}, "library.db has other tables")
        expect(new.columns(self.keep) == ["kind", "id"], f"{self.keep} has other columns")
        expect(
            sorted(new.rows(f"SELECT kind, id FROM {self.keep}")) == sorted(gone),
            f"{self.keep} has other rows",
        )
        for name, rows in (
            ("book", good),
            ("copy", held),
            ("author", old.rows("SELECT * FROM author ORDER BY id")),
        ):
            new.table(name)
            expect(new.rows(f"SELECT * FROM {name} ORDER BY id") == rows, f"{name} has other rows")


class Index(Chore):
    """Slow queries get the indexes that they need."""

    name = "sqlite-index"

    def plan(self, draw: Draw) -> None:
        self.columns = draw.some(("kind", "owner", "place", "made", "size"), 4)

    def _queries(self) -> list[str]:
        a, b, c, d = self.columns
        return [
            f"SELECT * FROM thing WHERE {a} = 5 AND {b} = 7",
            f"SELECT * FROM thing WHERE {a} = 5 AND {b} > 7 AND {b} < 12",
            f"SELECT * FROM thing WHERE {c} = 3 ORDER BY {d}",
            f"SELECT id FROM thing WHERE {a} = 2",
            f"SELECT {d} FROM thing WHERE {c} = 9",
        ]

    def asked(self) -> str:
        return words("""
            store.db is an SQLite database with one large table, thing. queries.sql holds queries, one a
            line. Add indexes (and change nothing else) so that for each of the queries the plan shown by
            EXPLAIN QUERY PLAN searches thing by an index, comparing every column of the query's WHERE
            clause in the index, and sorts nothing by itself (no "USE TEMP B-TREE"). There may be at most
            two indexes.
        """)

    def lay(self, root: Path) -> None:
        draw = self.draw("lay")
        rows = [(n, *(draw.below(20) for _ in range(5)), draw.prose(2)) for n in range(1500)]
        make(
            root / "store.db",
            "CREATE TABLE thing (id INTEGER PRIMARY KEY, kind INTEGER, owner INTEGER, place INTEGER, "
            "made INTEGER, size INTEGER, note TEXT);",
            {"thing": rows},
        )
        put(root / "queries.sql", "".join(f"{query};\n" for query in self._queries()))

    def oracle(self) -> list[str]:
        a, b, c, d = self.columns
        return [
            script(f"""
                import sqlite3
                base = sqlite3.connect("store.db")
                base.execute("CREATE INDEX thing_1 ON thing ({a}, {b})")
                base.execute("CREATE INDEX thing_2 ON thing ({c}, {d})")
                base.commit()
            """)
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        old, new = Database(before, "store.db"), Database(after, "store.db")
        expect(
            new.tables() == {"thing"} and new.table("thing") == old.table("thing"), "the table was changed"
        )
        expect(new.rows("SELECT * FROM thing") == old.rows("SELECT * FROM thing"), "the rows were changed")
        kinds = [row[0] for row in new.rows("SELECT type FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'")]
        expect(
            sorted(kinds) in (["index", "table"], ["index", "index", "table"]), "there is more than indexes"
        )
        a, b, c, _ = self.columns
        compared = [f"({a}=? AND {b}=?)", f"({a}=? AND {b}>? AND {b}<?)", f"({c}=?)", f"({a}=?)", f"({c}=?)"]
        swapped = {0: f"({b}=? AND {a}=?)"}
        for number, query in enumerate(self._queries()):
            plan = [row[3] for row in new.rows(f"EXPLAIN QUERY PLAN {query}")]
            wanted = (compared[number], swapped.get(number, compared[number]))
            expect(
                len(plan) == 1 and plan[0].startswith("SEARCH") and plan[0].endswith(wanted),
                "a query has another plan",
            )


class Overdrawn(Chore):
    """Running sums, and the first time that each goes below zero."""

    name = "sqlite-overdrawn"
    difficulty = "hard"

    def plan(self, draw: Draw) -> None:
        self.floor = -100 * draw.below(4)

    def asked(self) -> str:
        return words(f"""
            bank.db is an SQLite database with the tables account(id, opened_with), in cents, and move(id,
            account, day, cents), where day is text like 2021-07-30 and cents may be negative. An account's
            balance starts as opened_with and changes with its moves in the order of day, and of id on one
            day. Write low.csv with the header account,day,balance and a line for each account whose balance
            ever goes below {self.floor}: its id, the day on which that first happens, and the balance right
            after that move. The lines are ordered by account, as numbers. Then add a column balance
            (INTEGER) to the table account with every account's balance after all its moves. Moves stay as
            they are.
        """)

    def lay(self, root: Path) -> None:
        draw = self.draw("lay")
        accounts = [(n, draw.between(0, 3000)) for n in draw.some(range(1, 120), 25)]
        moves = []
        for number in draw.some(range(1, 900), 260):
            day = f"2021-{draw.between(1, 12):02}-{draw.between(1, 6):02}"
            moves.append((number, draw.one(accounts[1:])[0], day, draw.between(-1500, 1400)))
        make(
            root / "bank.db",
            "CREATE TABLE account (id INTEGER PRIMARY KEY, opened_with INTEGER); "
            "CREATE TABLE move (id INTEGER PRIMARY KEY, account INTEGER, day TEXT, cents INTEGER);",
            {"account": accounts, "move": moves},
        )

    def oracle(self) -> list[str]:
        return [
            script(f"""
                import sqlite3
                base = sqlite3.connect("bank.db")
                base.execute("ALTER TABLE account ADD COLUMN balance INTEGER")
                with open("low.csv", "w") as f:
                    print("account,day,balance", file=f)
                    accounts = base.execute("SELECT id, opened_with FROM account ORDER BY id").fetchall()
                    for number, amount in accounts:
                        low = False
                        for day, cents in base.execute(
                            "SELECT day, cents FROM move WHERE account = ? ORDER BY day, id", (number,)
                        ):
                            amount += cents
                            if amount < {self.floor} and not low:
                                low = True
                                print(number, day, amount, sep=",", file=f)
                        base.execute("UPDATE account SET balance = ? WHERE id = ?", (amount, number))
                base.commit()
            """)
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        old, new = Database(before, "bank.db"), Database(after, "bank.db")
        moves = sorted(old.rows("SELECT day, id, account, cents FROM move"))
        lines, accounts = ["account,day,balance"], []
        for number, start in sorted(old.rows("SELECT id, opened_with FROM account")):
            balance, low = start, ""
            for day, _, account, cents in moves:
                if account == number:
                    balance += cents
                    if balance < self.floor and not low:
                        low = f"{number},{day},{balance}"
            lines += [low] if low else []
            accounts.append((number, start, balance))
        expect(after.lines("low.csv") == lines, "low.csv is not right")
        expect(new.columns("account") == ["id", "opened_with", "balance"], "account has other columns")
        expect(new.rows("SELECT * FROM account ORDER BY id") == accounts, "account has other rows")
        expect(
            sorted(new.rows("SELECT day, id, account, cents FROM move")) == moves, "the moves were changed"
        )


CHORES: tuple[type[Chore], ...] = (Report, Import, Migrate, Duplicates, Orphans, Index, Overdrawn)
