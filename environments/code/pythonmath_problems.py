"""Generated problems of mathematics, each with an answer computed by exact arithmetic.

Invariants: a problem is a function of its kind and number alone, on any machine and Python; no two problems
of a kind have one question, so no split shares any with another; no answer is that of many problems of a
kind; an answer is computed by integers and fractions, never by floating point.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import product
from random import Random
from typing import Any, NamedTuple

COUNT = 450
"""Problems of each kind."""

HELD_OUT = 25
"""Of these, problems of the split ``test``, and as many of ``valid``; the others are for training."""


class Problem(NamedTuple):
    """A question, and its answer in LaTeX or plain digits."""

    question: str
    answer: str


class Draw:
    """Numbers from ``Random.random``, the one stream that Python promises to keep.

    Args:
        seed: A text; equal ones give equal numbers.
    """

    def __init__(self, seed: str) -> None:
        self._random = Random(seed)

    def whole(self, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``, both included."""
        return low + int(self._random.random() * (high - low + 1))

    def one(self, items: Any) -> Any:
        """One of ``items``."""
        return items[self.whole(0, len(items) - 1)]

    def several(self, count: int, low: int, high: int) -> list[int]:
        """``count`` different whole numbers, in the order in which they were drawn."""
        found: list[int] = []
        while len(found) < count:
            if (drawn := self.whole(low, high)) not in found:
                found.append(drawn)
        return found


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of problem.

    Attributes:
        name: Of its ids.
        draw: Draws what a problem is about.
        ask: Puts it into words.
        solve: Computes the answer.
    """

    name: str
    draw: Callable[[Draw], tuple[Any, ...]]
    ask: Callable[..., str]
    solve: Callable[..., int | Fraction | str]


KINDS: dict[str, Kind] = {}


def kind(name: str, draw: Callable[[Draw], tuple[Any, ...]], ask: Callable[..., str]) -> Callable[..., Any]:
    """Add a kind whose answer the decorated function computes."""

    def add(solve: Callable[..., int | Fraction | str]) -> Callable[..., int | Fraction | str]:
        KINDS[name] = Kind(name, draw, ask, solve)
        return solve

    return add


@lru_cache(maxsize=64)
def _drawn(name: str) -> tuple[tuple[tuple[Any, ...], str], ...]:
    """What the problems of a kind are about, and their questions, all different."""
    found: dict[str, tuple[Any, ...]] = {}
    draw, one = Draw(f"agentgym PythonMath {name}"), KINDS[name]
    while len(found) < COUNT:
        about = one.draw(draw)
        found.setdefault(one.ask(*about), about)
    return tuple((about, question) for question, about in found.items())


def ids(split: str) -> list[str]:
    """The ids of a split, its kinds in turn."""
    bounds = {"test": (0, HELD_OUT), "valid": (HELD_OUT, 2 * HELD_OUT), "train": (2 * HELD_OUT, COUNT)}
    return [f"{name}-{number}" for number in range(*bounds[split]) for name in KINDS]


def problem(task_id: str) -> Problem:
    """The problem of an id.

    Raises:
        KeyError: There is none.
    """
    name, _, number = task_id.rpartition("-")
    about, question = _drawn(name)[int(number)]
    return Problem(question, written(KINDS[name].solve(*about)))


def written(value: int | Fraction | str) -> str:
    """A number as an answer is written."""
    if isinstance(value, Fraction) and value.denominator != 1:
        sign = "-" if value < 0 else ""
        return rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
    return str(value)


def surd(square: Fraction) -> str:
    """The square root of a fraction, in lowest terms."""
    inside = square.numerator * square.denominator
    outside = max((n for n in range(1, math.isqrt(inside) + 1) if inside % (n * n) == 0), default=0)
    inside //= outside * outside
    factor = Fraction(outside, square.denominator)
    if inside == 1:
        return written(factor)
    over = "" if factor.numerator == 1 else str(factor.numerator)
    root = rf"{over}\sqrt{{{inside}}}"
    return root if factor.denominator == 1 else rf"\frac{{{root}}}{{{factor.denominator}}}"


def primes(limit: int) -> list[int]:
    """The primes below ``limit``."""
    sieve = bytearray([1]) * limit
    sieve[:2] = bytes(min(2, limit))
    for n in range(2, math.isqrt(limit) + 1):
        if sieve[n]:
            sieve[n * n :: n] = bytes(len(range(n * n, limit, n)))
    return [n for n in range(limit) if sieve[n]]


# Number theory --------------------------------------------------------------------------------


@kind(
    "divisors",
    lambda d: (d.whole(500, 20_000), d.whole(2, 9)),
    lambda n, m: f"What is the sum of the positive divisors of {n} that are not divisible by {m}?",
)
def _divisors(n: int, m: int) -> int:
    return sum(k for k in range(1, n + 1) if n % k == 0 and k % m != 0)


@kind(
    "coprime",
    lambda d: (d.whole(200, 2_000), d.whole(20, 400)),
    lambda n, m: f"Find the sum of all positive integers up to {n} that are relatively prime to {m}.",
)
def _coprime(n: int, m: int) -> int:
    return sum(k for k in range(1, n + 1) if math.gcd(k, m) == 1)


@kind(
    "powmod",
    lambda d: (d.whole(2, 60), d.whole(100, 9_999), d.whole(50, 2_000)),
    lambda a, b, m: f"What is the remainder when ${a}^{{{b}}}$ is divided by {m}?",
)
def _powmod(a: int, b: int, m: int) -> int:
    return pow(a, b, m)


@kind(
    "remainders",
    lambda d: (*d.several(3, 0, 4), *(d.one(part) for part in ((7, 8, 9), (11, 13), (17, 19, 23)))),
    lambda a, b, c, p, q, r: (
        f"What is the smallest positive integer that leaves remainder {a} when divided by {p}, "
        f"remainder {b} when divided by {q}, and remainder {c} when divided by {r}?"
    ),
)
def _remainders(a: int, b: int, c: int, p: int, q: int, r: int) -> int:
    return next(n for n in range(1, p * q * r + 1) if (n % p, n % q, n % r) == (a, b, c))


@kind(
    "zeros",
    lambda d: (d.whole(50, 900), d.whole(3, 20)),
    lambda n, b: f"In how many zeros does ${n}!$ end when it is written in base {b}?",
)
def _zeros(n: int, b: int) -> int:
    value, count = math.factorial(n), 0
    while value % b == 0:
        value, count = value // b, count + 1
    return count


@kind(
    "digits",
    lambda d: (d.whole(2, 30), d.whole(20, 150)),
    lambda a, b: f"What is the sum of the decimal digits of ${a}^{{{b}}}$?",
)
def _digits(a: int, b: int) -> int:
    return sum(map(int, str(a**b)))


@kind(
    "primes",
    lambda d: (d.whole(1, 900), d.whole(1_000, 4_000), d.one((3, 4, 5, 6, 8))),
    lambda a, b, m: f"How many primes p with {a} < p < {b} leave remainder 1 when divided by {m}?",
)
def _primes(a: int, b: int, m: int) -> int:
    return sum(p > a and p % m == 1 for p in primes(b))


# Counting -------------------------------------------------------------------------------------


@kind(
    "paths",
    lambda d: (m := d.whole(4, 9), n := d.whole(4, 9), d.whole(1, m - 1), d.whole(1, n - 1)),
    lambda m, n, x, y: (
        f"How many paths lead from (0, 0) to ({m}, {n}) by steps of one unit to the right or up, "
        f"without passing through ({x}, {y})?"
    ),
)
def _paths(m: int, n: int, x: int, y: int) -> int:
    return math.comb(m + n, m) - math.comb(x + y, x) * math.comb(m - x + n - y, m - x)


@kind(
    "coins",
    lambda d: (d.whole(500, 3_000), *_coprime_coins(d)),
    lambda n, a, b, c: (
        f"In how many ways can {n} cents be paid with coins of {a}, {b} and {c} cents, if the order of the "
        "coins does not matter and there are plenty of each?"
    ),
)
def _coins(n: int, *coins: int) -> int:
    ways = [1] + [0] * n
    for coin in coins:
        for amount in range(coin, n + 1):
            ways[amount] += ways[amount - coin]
    return ways[n]


@kind(
    "strings",
    lambda d: (d.whole(5, 60), d.one("ABC"), d.whole(2, 5)),
    lambda n, letter, run: (
        f"How many strings of {n} letters, each A, B or C, do not contain {run} or more consecutive letters "
        f"{letter}?"
    ),
)
def _strings(n: int, letter: str, run: int) -> int:
    ends = [1] + [0] * (run - 1)  # by the number of such letters at the end
    for _ in range(n):
        ends = [2 * sum(ends), *ends[:-1]]
    return sum(ends)


@kind(
    "seating",
    lambda d: (d.whole(8, 25), *d.several(3, 1, 8), d.whole(1, 5)),
    lambda n, a, b, c, gap: (
        f"People numbered 1 to {n} sit down in a row of {n} chairs. In how many orders does person {a} sit "
        f"somewhere to the left of person {b}, with exactly {gap} of the others between them, but not "
        f"person {c}?"
    ),
)
def _seating(n: int, a: int, b: int, c: int, gap: int) -> int:
    # Those two and whom they enclose are a block of gap + 2 chairs; the others are free.
    return (n - gap - 1) * math.perm(n - 3, gap) * math.factorial(n - 2 - gap)


@kind(
    "multiples",
    lambda d: (d.whole(500, 9_999), *sorted(d.several(3, 3, 30))),
    lambda n, a, b, c: (
        f"How many positive integers up to {n} are divisible by exactly one of {a}, {b} and {c}?"
    ),
)
def _multiples(n: int, *given: int) -> int:
    return sum(sum(k % m == 0 for m in given) == 1 for k in range(1, n + 1))


# Probability ----------------------------------------------------------------------------------


@kind(
    "dice",
    lambda d: (k := d.whole(2, 5), s := d.one((4, 6, 8, 10, 12, 20)), d.whole(k + 1, k * s - 1)),
    lambda k, s, t: (
        f"{k} fair dice with {s} sides, numbered from 1, are rolled. What is the probability that their sum "
        f"is at least {t}? Give a fraction."
    ),
)
def _dice(k: int, s: int, t: int) -> Fraction:
    ways = {0: 1}
    for _ in range(k):
        ways = _added(ways, s)
    return Fraction(sum(count for total, count in ways.items() if total >= t), s**k)


def _added(ways: dict[int, int], sides: int) -> dict[int, int]:
    made: dict[int, int] = {}
    for total, count in ways.items():
        for face in range(1, sides + 1):
            made[total + face] = made.get(total + face, 0) + count
    return made


@kind(
    "urn",
    lambda d: (r := d.whole(4, 15), d.whole(4, 15), n := d.whole(3, 7), d.whole(1, min(r, n) - 1)),
    lambda r, b, n, k: (
        f"An urn holds {r} red and {b} blue balls. {n} are drawn without replacement. What is the "
        f"probability that exactly {k} of them are red? Give a fraction."
    ),
)
def _urn(r: int, b: int, n: int, k: int) -> Fraction:
    return Fraction(math.comb(r, k) * math.comb(b, n - k), math.comb(r + b, n))


@kind(
    "ruin",
    lambda d: (n := d.whole(4, 12), d.whole(1, n - 1), d.one((2, 3, 4, 5)), d.one((3, 5, 7))),
    lambda n, i, p, q: (
        f"A player has {i} coins and plays rounds that each win one coin with probability "
        rf"$\frac{{{p}}}{{{p + q}}}$ and lose one otherwise, until there are {n} coins or none. What is the "
        f"probability that the play ends with {n} coins? Give a fraction."
    ),
)
def _ruin(n: int, i: int, p: int, q: int) -> Fraction:
    odds = Fraction(q, p)
    return Fraction(i, n) if odds == 1 else (1 - odds**i) / (1 - odds**n)


# Sequences ------------------------------------------------------------------------------------


@kind(
    "recurrence",
    lambda d: (*(d.whole(1, 9) for _ in range(4)), d.whole(20, 500), d.whole(100, 2_000)),
    lambda a, b, p, q, n, m: (
        f"Let $a_1 = {a}$, $a_2 = {b}$ and $a_n = {p} a_{{n-1}} + {q} a_{{n-2}}$ for n > 2. What is the "
        f"remainder when $a_{{{n}}}$ is divided by {m}?"
    ),
)
def _recurrence(a: int, b: int, p: int, q: int, n: int, m: int) -> int:
    for _ in range(n - 1):
        a, b = b, p * b + q * a
    return a % m


@kind(
    "series",
    lambda d: (d.whole(5, 200), d.whole(1, 8), d.whole(1, 8)),
    lambda n, a, b: rf"Compute $\sum_{{k=1}}^{{{n}}} \frac{{{b}}}{{(k + {a})(k + {a + b})}}$ as a fraction.",
)
def _series(n: int, a: int, b: int) -> Fraction:
    return sum((Fraction(b, (k + a) * (k + a + b)) for k in range(1, n + 1)), Fraction(0))


# Algebra --------------------------------------------------------------------------------------


@kind(
    "coefficient",
    lambda d: (d.whole(2, 5), d.whole(-9, -1), n := d.whole(4, 20), m := d.whole(2, 9), d.whole(2, n + m)),
    lambda a, b, n, m, k: (
        f"What is the coefficient of $x^{{{k}}}$ in $({a}x {_signed(b)})^{{{n}}} (1 + x)^{{{m}}}$?"
    ),
)
def _coefficient(a: int, b: int, n: int, m: int, k: int) -> int:
    return sum(
        math.comb(n, i) * a**i * b ** (n - i) * math.comb(m, k - i)
        for i in range(max(0, k - m), min(n, k) + 1)
    )


@kind(
    "interpolation",
    lambda d: (tuple(d.several(3, -6, 6)), tuple(d.whole(-9, 9) for _ in range(3))),
    lambda at, factors: (
        "Which polynomial p of degree at most 2 has "
        + ", ".join(f"$p({x}) = {factors[0] * x * x + factors[1] * x + factors[2]}$" for x in at)
        + "? Give it as a polynomial in x."
    ),
)
def _interpolation(at: tuple[int, ...], factors: tuple[int, ...]) -> str:
    return _polynomial(factors)


@kind(
    "quadratic",
    lambda draw: _with_real_roots(draw),
    lambda a, b, c: f"What is the larger root of $ {_polynomial((a, b, c))} = 0$? Give its exact value.",
)
def _quadratic(a: int, b: int, c: int) -> str:
    root = surd(Fraction(b * b - 4 * a * c, 4 * a * a))
    middle = Fraction(-b, 2 * a)
    if "sqrt" not in root:
        square = Fraction(math.isqrt(b * b - 4 * a * c), 2 * a)
        return written(middle + square)
    return root if middle == 0 else f"{written(middle)} + {root}"


@kind(
    "system",
    lambda draw: _regular(draw),
    lambda m, v: (
        "Solve for x + y + z: "
        + ", ".join(f"${_linear(row)} = {n}$" for row, n in zip(m, v, strict=True))
        + "."
    ),
)
def _system(m: tuple[tuple[int, ...], ...], v: tuple[int, ...]) -> Fraction:
    whole = _determinant(m)
    parts = (
        _determinant(tuple((*row[:at], value, *row[at + 1 :]) for row, value in zip(m, v, strict=True)))
        for at in range(3)
    )
    return sum((Fraction(part, whole) for part in parts), Fraction(0))


@kind(
    "determinant",
    lambda d: (tuple(tuple(d.whole(-9, 9) for _ in range(3)) for _ in range(3)),),
    lambda m: (
        r"What is the determinant of $\begin{pmatrix} "
        + r" \\ ".join(" & ".join(map(str, row)) for row in m)
        + r" \end{pmatrix}$?"
    ),
)
def _determinant(m: tuple[tuple[int, ...], ...]) -> int:
    a, b, c = m
    return sum(a[i] * (b[(i + 1) % 3] * c[(i + 2) % 3] - b[(i + 2) % 3] * c[(i + 1) % 3]) for i in range(3))


# Geometry -------------------------------------------------------------------------------------


@kind(
    "polygon",
    lambda draw: _around(draw),
    lambda *corners: (
        "What is the area of the quadrilateral with the corners "
        + ", ".join(f"({x}, {y})" for x, y in corners)
        + ", in this order?"
    ),
)
def _polygon(*corners: tuple[int, int]) -> Fraction:
    turned = zip(corners, corners[1:] + corners[:1], strict=True)
    return abs(Fraction(sum(x * v - u * y for (x, y), (u, v) in turned), 2))


@kind(
    "heron",
    lambda d: (a := d.whole(4, 30), b := d.whole(4, 30), d.whole(abs(a - b) + 1, a + b - 1)),
    lambda a, b, c: f"What is the exact area of a triangle with sides {a}, {b} and {c}?",
)
def _heron(a: int, b: int, c: int) -> str:
    return surd(Fraction((a + b + c) * (a + b - c) * (a - b + c) * (b + c - a), 16))


@kind(
    "lattice",
    lambda d: (d.whole(10, 900), d.one((1, 2, 3)), d.one((1, 2, 3, 5))),
    lambda n, a, b: (
        f"How many pairs (x, y) of integers satisfy $ {_linear((a, b), ('x^2', 'y^2'))} \\le {n}$?"
    ),
)
def _lattice(n: int, a: int, b: int) -> int:
    most = range(-math.isqrt(n), math.isqrt(n) + 1)
    return sum(a * x * x + b * y * y <= n for x, y in product(most, most))


def _signed(value: int) -> str:
    return f"{'-' if value < 0 else '+'} {abs(value)}"


def _linear(factors: tuple[int, ...], names: tuple[str, ...] = ("x", "y", "z")) -> str:
    told = ""
    for factor, name in zip(factors, names, strict=True):
        if factor:
            size = "" if abs(factor) == 1 and name else str(abs(factor))
            sign = ("-" if factor < 0 else "") if not told else f" {'-' if factor < 0 else '+'} "
            told += f"{sign}{size}{name}"
    return told or "0"


def _polynomial(factors: tuple[int, ...]) -> str:
    powers = [f"x^{n}" for n in range(len(factors) - 1, 1, -1)]
    return _linear(factors, (*powers, "x", ""))


def _coprime_coins(draw: Draw) -> list[int]:
    """Coins of three sizes that pay every large amount: where they cannot, the answer is 0 far too often."""
    while math.gcd(*(coins := sorted(draw.several(3, 2, 25)))) > 1:
        pass
    return coins


def _with_real_roots(draw: Draw) -> tuple[int, int, int]:
    while True:
        a, b, c = draw.whole(1, 6), draw.whole(-20, 20), draw.whole(-20, 20)
        if b * b > 4 * a * c:
            return a, b, c


def _regular(draw: Draw) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    while True:
        m = tuple(tuple(draw.whole(-6, 6) for _ in range(3)) for _ in range(3))
        if _determinant(m) and all(any(row) for row in m):
            return m, tuple(draw.whole(-20, 20) for _ in range(3))


def _around(draw: Draw) -> tuple[tuple[int, int], ...]:
    """One corner in each quadrant, in turn: the sides do not cross."""
    return tuple(
        (x * draw.whole(1, 20), y * draw.whole(1, 20)) for x, y in ((1, 1), (-1, 1), (-1, -1), (1, -1))
    )
