"""Shell tasks about git.

Invariant: what is right is computed from the history as it was made, object by object; what a policy left is
read through :class:`~agentgym.environments.code.terminal_repository.Repository`.
"""

# ruff: noqa: D102 - what the methods of a task are for is said once, by Chore

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from agentgym.environments.code.terminal_chore import Chore, Done, Draw, Tree, expect, words
from agentgym.environments.code.terminal_repository import PEOPLE, Repository, Story, git


def _growing(story: Story, draw: Draw, branch: str, count: int, among: Sequence[str]) -> None:
    for number in range(count):
        text = f"{draw.prose(6)}\n{draw.prose(6)}\n"
        story.commit(
            branch,
            f"{draw.one(('add', 'edit', 'tidy'))} {draw.prose(2)} {number}",
            {draw.one(among): text},
            draw.one(PEOPLE),
        )


class Recover(Chore):
    """A file that a commit deleted comes back."""

    name = "git-recover"
    difficulty = "easy"
    needs = ("git",)

    def plan(self, draw: Draw) -> None:
        self.file = draw.one(("docs/plan.md", "budget.csv", "src/parser.txt"))

    def asked(self) -> str:
        return words(f"""
            In the git repository project the file {self.file} was deleted by a commit at some time. Write
            the content that it had last to recovered.txt in the working directory (outside the repository),
            and the full hash of the commit that deleted it for good to commit.txt. Do not change the
            repository's branches.
        """)

    def lay(self, root: Path) -> None:
        draw, story = self.draw("lay"), Story()
        others = ["readme.md", "a.txt", "b.txt", "plan.md", "src/lexer.txt"]
        _growing(story, draw, "main", 4, others)
        for number in range(draw.between(2, 5)):
            story.commit("main", f"work on {number}", {self.file: f"{draw.prose(20)}\n"}, draw.one(PEOPLE))
        story.commit("main", "tidy up", {self.file: None}, draw.one(PEOPLE))
        _growing(story, draw, "main", 2, others)
        story.commit("main", "bring it back", {self.file: f"{draw.prose(20)}\n"}, draw.one(PEOPLE))
        story.commit("main", "edit", {self.file: f"{draw.prose(20)}\n"}, draw.one(PEOPLE))
        _growing(story, draw, "main", draw.between(1, 4), others)
        story.commit("main", "less is more", {self.file: None, "b.txt": "b\n"}, draw.one(PEOPLE))
        _growing(story, draw, "main", draw.between(1, 5), others)
        story.tell(root / "project")

    def oracle(self) -> list[str]:
        return [
            f"git -C project log -1 --diff-filter=D --format=%H -- {self.file} > commit.txt",
            f'git -C project show "$(cat commit.txt)^:{self.file}" > recovered.txt',
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        repository = Repository(before, "project")
        line = repository.line(repository.tip("main"))
        last = max(n for n, commit in enumerate(line) if self.file in repository.files(commit))
        expect(after.text("commit.txt").strip() == line[last + 1], "commit.txt names another commit")
        content = repository.blob(repository.files(line[last])[self.file])
        expect(after.data("recovered.txt") == content, "recovered.txt has another content")
        expect(Repository(after, "project").refs == repository.refs, "a branch was changed")


class Bisect(Chore):
    """The first commit that breaks a rule."""

    name = "git-bisect"
    needs = ("git",)

    def plan(self, draw: Draw) -> None:
        self.limit = draw.between(500, 900)

    def asked(self) -> str:
        return words(f"""
            In the git repository shop the file prices.txt holds "name number" lines. In its first commits
            the numbers add up to at most {self.limit}; in the newest commit of the branch main they add up
            to more. From the commit at which the sum first went above {self.limit} it stayed above. Write
            the full hash of that commit to first.txt in the working directory. The branch main stays as it
            is.
        """)

    def lay(self, root: Path) -> None:
        draw, story = self.draw("lay"), Story()
        turn, count = draw.between(12, 50), draw.between(55, 70)
        names = draw.words(8)
        for number in range(count):
            total = draw.between(200, self.limit) if number < turn else draw.between(self.limit + 1, 1500)
            cuts = sorted(draw.below(total + 1) for _ in range(len(names) - 1))
            parts = [b - a for a, b in pairwise([0, *cuts, total])]
            text = "".join(f"{name} {part}\n" for name, part in zip(names, parts, strict=True))
            story.commit("main", f"prices of day {number}", {"prices.txt": text}, draw.one(PEOPLE))
        story.tell(root / "shop")

    def oracle(self) -> list[str]:
        return [
            words(f"""
                for c in $(git -C shop rev-list --reverse main); do
                  s=$(git -C shop show "$c:prices.txt" | awk '{{s += $2}} END {{print s}}')
                  if [ "$s" -gt {self.limit} ]; then echo "$c" > first.txt; break; fi
                done
            """)
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        repository = Repository(before, "shop")
        for commit in repository.line(repository.tip("main")):
            text = repository.blob(repository.files(commit)["prices.txt"]).decode()
            if sum(int(line.split()[1]) for line in text.splitlines()) > self.limit:
                break
        expect(after.text("first.txt").strip() == commit, "first.txt names another commit")
        expect(Repository(after, "shop").refs == repository.refs, "a branch was changed")


class Authors(Chore):
    """Who did how much, merges apart."""

    name = "git-authors"
    difficulty = "easy"
    needs = ("git",)

    def plan(self, draw: Draw) -> None:
        self.folder = draw.one(("src", "docs"))

    def asked(self) -> str:
        return words(f"""
            Count in the git repository team, over all commits that can be reached from the branch main, how
            many of each author changed something under {self.folder}/; merge commits do not count. Authors
            are told apart by e-mail address. Write authors.txt in the working directory, a line for each
            author with at least one: count, one blank, e-mail address. The highest count comes first;
            addresses of one count are in alphabetical order.
        """)

    def lay(self, root: Path) -> None:
        draw, story = self.draw("lay"), Story()
        among = ["src/a.txt", "src/b.txt", "docs/a.md", "docs/b.md", "readme.md"]
        mark = story.commit("main", "begin", dict.fromkeys(among, "x\n"), draw.one(PEOPLE))
        story.branch("topic", mark)
        for branch in ("main", "topic") * 3:
            _growing(story, draw, branch, draw.between(2, 5), among)
        merged = {"src/a.txt": f"{draw.token()}\n", "docs/a.md": f"{draw.token()}\n"}
        story.commit("main", "merge topic", merged, draw.one(PEOPLE), merge="topic")
        _growing(story, draw, "main", 4, among)
        _growing(story, draw, "topic", 4, among)
        story.tell(root / "team")

    def oracle(self) -> list[str]:
        return [
            f"git -C team log main --no-merges --full-history --format=%ae -- {self.folder} | sort | "
            "uniq -c | sed -E 's/^ +//' | LC_ALL=C sort -k1,1nr -k2 > authors.txt"
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        repository = Repository(before, "team")
        found: Counter[str] = Counter()
        for commit in repository.line(repository.tip("main"), "--no-merges"):
            parent, _, author = repository.told(commit, "%P %ae").rpartition(" ")
            old = repository.files(parent) if parent else {}
            new = repository.files(commit)
            changed = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
            found[author] += any(name.startswith(f"{self.folder}/") for name in changed)
        ranks = sorted(
            ((n, author) for author, n in found.items() if n), key=lambda item: (-item[0], item[1])
        )
        wanted = [f"{n} {author}" for n, author in ranks]
        expect(after.lines("authors.txt") == wanted, "authors.txt is not right")


class Backport(Chore):
    """Fixes of one branch are picked onto another."""

    name = "git-backport"
    needs = ("git",)

    def plan(self, draw: Draw) -> None:
        self.prefix = draw.one(("fix:", "security:"))
        self.target = draw.one(("stable", "release"))

    def asked(self) -> str:
        return words(f"""
            In the git repository product the branches main and {self.target} have grown apart. Put every
            commit of main that is not in {self.target} and whose message begins with "{self.prefix}" onto
            {self.target}, in their order on main: one commit each, with the same message, author and
            changes, on top of what {self.target} has now, and nothing else. The branch main stays as it is.
        """)

    def lay(self, root: Path) -> None:
        draw, story = self.draw("lay"), Story()
        common = {f"f{number}.txt": f"{draw.prose(5)}\n" for number in range(12)}
        common["shared.txt"] = "".join(f"{word}\n" for word in draw.words(30))
        mark = story.commit("main", "begin", common, PEOPLE[0])
        story.commit("main", f"{self.prefix} in both", {"both.txt": "both\n"}, PEOPLE[1])
        mark += 1
        story.branch(self.target, mark)
        for number in range(4):
            story.commit(
                self.target, f"prepare {number}", {f"only{number}.txt": f"{draw.prose(3)}\n"}, PEOPLE[2]
            )
        lines = common["shared.txt"].splitlines()
        fixes = draw.some(range(12), draw.between(3, 5))
        for number in range(12):
            # A fix has a file of its own, and a line far from the others' in a file that all share.
            files: dict[str, str | None] = {f"f{number}.txt": f"{draw.prose(5)}\n"}
            kind = draw.one(("feat:", "docs:", "prefix:", f"not a {self.prefix}"))
            if number in fixes:
                kind = self.prefix
                lines[2 + 7 * fixes.index(number) % 28] += " mended"
                files["shared.txt"] = "".join(f"{line}\n" for line in lines)
            story.commit("main", f"{kind} {draw.prose(3)}", files, draw.one(PEOPLE))
        story.tell(root / "product")

    def oracle(self) -> list[str]:
        return [
            f"git -C product checkout -q {self.target}; git -C product log --reverse --format='%H %s' "
            f"{self.target}..main | awk '$2 == \"{self.prefix}\" {{print $1}}' > picks.tmp",
            "xargs -n 1 git -C product cherry-pick < picks.tmp > /dev/null; git -C product checkout -q main",
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        old, new = Repository(before, "product"), Repository(after, "product")
        expect(new.tip("main") == old.tip("main"), "main was changed")
        base = old.tip(self.target)
        added = new.line(new.tip(self.target), f"^{base}")
        fixes = [
            c for c in old.line(old.tip("main"), f"^{base}") if old.told(c, "%s").startswith(self.prefix)
        ]
        expect(len(added) == len(fixes), f"{self.target} has another number of new commits")
        parent, lines = base, old.blob(old.files(base)["shared.txt"]).decode().splitlines()
        for commit, fix in zip(added, fixes, strict=True):
            expect(new.told(commit, "%P") == parent, f"{self.target} does not grow from where it was")
            form = "%an <%ae> %B"
            expect(new.told(commit, form) == old.told(fix, form), "a commit has another message or author")
            wanted = new.files(parent)
            have = new.files(commit)
            origin, fixed = old.files(old.told(fix, "%P")), old.files(fix)
            for name, blob in fixed.items():
                if name != "shared.txt" and origin.get(name) != blob:
                    wanted[name] = blob
            was = old.blob(origin["shared.txt"]).decode().splitlines()
            now = old.blob(fixed["shared.txt"]).decode().splitlines()
            lines = [new_ if new_ != old_ else line for line, old_, new_ in zip(lines, was, now, strict=True)]
            text = "".join(f"{line}\n" for line in lines)
            expect(new.blob(have["shared.txt"]).decode() == text, "a commit has other changes")
            wanted["shared.txt"] = have["shared.txt"]
            expect(have == wanted, "a commit has other changes")
            parent = commit


class Merge(Chore):
    """Two branches that disagree are merged by a rule."""

    name = "git-merge"
    needs = ("git",)

    def plan(self, draw: Draw) -> None:
        self.branch = draw.one(("feature", "topic", "experiment"))

    def asked(self) -> str:
        return words(f"""
            In the git repository lists merge the branch {self.branch} into main, by one merge commit whose
            first parent is what main is now and whose second parent is what {self.branch} is now. In the
            merge commit names.txt holds every line that names.txt has on either branch, each once, sorted
            in byte order; all other files are as a merge without a conflict makes them. The branch
            {self.branch} stays as it is, and main is checked out with nothing left to commit in files that
            git follows.
        """)

    def lay(self, root: Path) -> None:
        draw, story = self.draw("lay"), Story()
        pool = draw.words(24)
        base = sorted(pool[:10])
        mark = story.commit(
            "main", "begin", {"names.txt": _lines(base), "old.txt": "old\n", "same.txt": "s\n"}
        )
        story.branch(self.branch, mark)
        for branch, more, file in (("main", pool[10:17], "m.txt"), (self.branch, pool[14:24], "t.txt")):
            for number, word in enumerate(more):
                base_of = [*base, *more[: number + 1]]
                files: dict[str, str | None] = {
                    "names.txt": _lines(sorted(base_of, reverse=branch != "main"))
                }
                files[file] = f"{draw.prose(3)}\n"
                story.commit(branch, f"add {word}", files, draw.one(PEOPLE))
        story.commit(self.branch, "drop the old file", {"old.txt": None}, PEOPLE[1])
        story.commit("main", "the same, but better", {"same.txt": "better\n"}, PEOPLE[2])
        story.tell(root / "lists")

    def oracle(self) -> list[str]:
        return [
            words(f"""
                (cd lists; git merge -q {self.branch} > /dev/null 2>&1
                (git show main:names.txt; git show {self.branch}:names.txt) | LC_ALL=C sort -u > names.txt
                git add names.txt; git commit -q --no-edit)
            """)
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        old, new = Repository(before, "lists"), Repository(after, "lists")
        main, topic = old.tip("main"), old.tip(self.branch)
        expect(new.tip(self.branch) == topic, f"{self.branch} was changed")
        made = new.tip("main")
        expect(new.told(made, "%P") == f"{main} {topic}", "main is no merge of the two branches")
        ours, theirs = old.files(main), old.files(topic)
        names = {
            line for side in (ours, theirs) for line in old.blob(side["names.txt"]).decode().splitlines()
        }
        have = new.files(made)
        expect(
            new.blob(have.get("names.txt", "")).decode() == _lines(sorted(names)), "names.txt is not right"
        )
        wanted = {**ours, "t.txt": theirs["t.txt"], "names.txt": have["names.txt"]}
        del wanted["old.txt"]
        expect(have == wanted, "the merge has other files")
        expect(new.head == "ref: refs/heads/main", "main is not checked out")
        for name, blob in have.items():
            expect(after.data(f"lists/{name}") == new.blob(blob), f"{name} is not as it was committed")


def _lines(names: Sequence[str]) -> str:
    return "".join(f"{name}\n" for name in names)


class Purge(Chore):
    """A secret leaves the whole history."""

    name = "git-purge"
    difficulty = "hard"
    needs = ("git",)

    def plan(self, draw: Draw) -> None:
        self.file = draw.one(("secrets.env", "config/password.txt"))

    def asked(self) -> str:
        return words(f"""
            In the git repository vault the file {self.file} was committed by mistake, more than once.
            Rewrite the branches main and next so that no commit holds it. Every other file of every commit,
            and each commit's message, author and place in the history, stay as they are (commits that only
            touched it stay too, without changes). In the end no object in the repository holds any content
            that the file ever had, reachable or not, and there are no branches or other references beside
            main and next.
        """)

    def lay(self, root: Path) -> None:
        draw, story = self.draw("lay"), Story()
        among = ["a.txt", "b.txt", "config/c.txt"]
        _growing(story, draw, "main", 3, among)
        mark = story.commit(
            "main", "settings", {self.file: f"key={draw.token()}\n", "a.txt": "a\n"}, PEOPLE[1]
        )
        story.branch("next", mark)
        _growing(story, draw, "main", 2, among)
        story.commit("next", "rotate", {self.file: f"key={draw.token()}\n"}, PEOPLE[2])
        _growing(story, draw, "next", 2, among)
        story.commit("main", "remove", {self.file: None, "b.txt": "b\n"}, PEOPLE[1])
        _growing(story, draw, "main", 2, among)
        story.tell(root / "vault")

    def oracle(self) -> list[str]:
        return [
            "cd vault; FILTER_BRANCH_SQUELCH_WARNING=1 git filter-branch --index-filter "
            f"'git rm -q --cached --ignore-unmatch {self.file}' -- --all > /dev/null 2>&1; "
            "git for-each-ref --format='delete %(refname)' refs/original | git update-ref --stdin; "
            "git reflog expire --expire=now --all; git gc -q --prune=now; cd ..",
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        old, new = Repository(before, "vault"), Repository(after, "vault")
        expect(set(new.refs) == {"refs/heads/main", "refs/heads/next"}, "there are other references")
        secret = set()
        made: dict[str, str] = {}
        for branch in ("main", "next"):
            lines = old.line(old.tip(branch)), new.line(new.tip(branch))
            expect(len(lines[0]) == len(lines[1]), f"{branch} has another number of commits")
            for commit, again in zip(*lines, strict=True):
                form = "%an %ae %at %B"
                expect(old.told(commit, form) == new.told(again, form), "a commit is not what it was")
                expect(made.setdefault(commit, again) == again, "the branches have other commits in common")
                parents = [made.get(parent, "") for parent in old.told(commit, "%P").split()]
                expect(parents == new.told(again, "%P").split(), "a commit has another place")
                files = old.files(commit)
                if blob := files.pop(self.file, ""):
                    secret.add(blob)
                expect(files == new.files(again), "a commit has other files")
        expect(not secret & new.objects, "a content of the file is still in the repository")


class Lost(Chore):
    """A commit that no branch names any more."""

    name = "git-lost"
    needs = ("git",)

    def plan(self, draw: Draw) -> None:
        self.subject = f"{draw.prose(2)} {draw.below(100)}"
        self.branch = draw.one(("rescued", "found", "back"))

    def asked(self) -> str:
        return words(f"""
            In the git repository work someone deleted a branch that was never merged. Its newest commit has
            the message "{self.subject}". Make a branch {self.branch} at exactly that commit. The branch
            main stays as it is.
        """)

    def lay(self, root: Path) -> None:
        draw, story = self.draw("lay"), Story()
        among = ["a.txt", "b.txt", "c.txt"]
        mark = story.commit("main", "begin", {"a.txt": "a\n"})
        for number in range(4):
            story.branch(f"lost{number}", mark)
            _growing(story, draw, f"lost{number}", draw.between(1, 3), among)
            last = self.subject if number == 2 else f"{self.subject}{draw.below(10)}"
            story.commit(f"lost{number}", last, {"d.txt": f"{draw.token()}\n"}, draw.one(PEOPLE))
        _growing(story, draw, "main", 4, among)
        story.tell(root / "work")
        for number in range(4):
            git(root / "work", "branch", "-q", "-D", f"lost{number}")

    def oracle(self) -> list[str]:
        return [
            words(f"""
                (cd work; git fsck --lost-found 2> /dev/null | awk '$2 == "commit" {{print $3}}' |
                while read -r c; do
                  if [ "$(git log -1 --format=%s "$c")" = "{self.subject}" ]; then
                    git branch {self.branch} "$c"
                  fi
                done)
            """)
        ]

    def check(self, before: Tree, after: Tree, done: Sequence[Done]) -> None:
        old, new = Repository(before, "work"), Repository(after, "work")
        expect(new.tip("main") == old.tip("main"), "main was changed")
        tips = [c for c in old.objects if old._run("cat-file", "-t", c).strip() == "commit"]
        wanted = [c for c in tips if old.told(c, "%s") == self.subject]
        expect([new.tip(self.branch)] == wanted, f"{self.branch} is at another commit")


CHORES: tuple[type[Chore], ...] = (Recover, Bisect, Authors, Backport, Merge, Purge, Lost)
