"""Compile RASP programs with Tracr, and store what comes out where nobody needs Tracr to read it.

    python -m venv tracr-venv && tracr-venv/bin/pip install -e ".[tracr]"     # JAX; an environment of its own
    tracr-venv/bin/python benchmarks/tracr_programs.py --out data/groundtruth

The programs are below, in our own words; most have parameters and stand for a family. A program is compiled for words
over a small alphabet up to some length; RASP's own interpreter then says what it answers to every such word, position
by position, and that is stored beside the weights. Written are `tracr.json` (what each program is) and
`tracr.safetensors` (`<name>.index`, `<name>.value`: weights that are not zero, by their place in one flat vector of all
of them; `<name>.answers`: which of the program's outputs, 255 for none).

No program counts on the nothing that RASP answers where no position is chosen: a compiled model cannot see it.

Tracr: Lindner et al. 2023 (arXiv:2301.05062). RASP: Weiss, Goldberg & Yahav 2021 (arXiv:2106.06981).
"""

import argparse
import itertools
import json
import string
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import haiku
import jax
import numpy as np
from safetensors.numpy import save_file
from tracr.compiler.compiling import compile_rasp_to_model
from tracr.rasp import rasp

BOS, PAD = "bos", "pad"
NO_ANSWER = 255


class Program(NamedTuple):
    """A RASP program and the words that it is compiled for."""

    family: str
    means: str
    """What it answers at each position, in words."""
    build: Callable[[], rasp.SOp]
    alphabet: Sequence[Any] = "abcd"
    longest: int = 5


# -- parts that many programs share ---------------------------------------------------------------------------------

t, i = rasp.tokens, rasp.indices


def both(a: rasp.SOp, b: rasp.SOp) -> rasp.SOp:
    return rasp.SequenceMap(lambda x, y: (x, y), a, b)


def join(f: Callable, a: rasp.SOp, b: rasp.SOp) -> rasp.SOp:
    return rasp.SequenceMap(f, a, b)


def number(keys: rasp.SOp, queries: rasp.SOp, chosen: Callable) -> rasp.SOp:
    """How many positions are chosen; `chosen` is told key and query."""
    return rasp.SelectorWidth(rasp.Select(keys, queries, chosen))


def fetch(keys: rasp.SOp, queries: rasp.SOp, chosen: Callable, values: rasp.SOp) -> rasp.SOp:
    """What stands at the chosen position; nothing where none is chosen."""
    return rasp.Aggregate(rasp.Select(keys, queries, chosen), values)


def length() -> rasp.SOp:
    return number(t, t, lambda k, q: True)


def count(wanted: str) -> rasp.SOp:
    return number(t, t, lambda k, q: k in wanted)


def at(index: int, values: rasp.SOp = t) -> rasp.SOp:
    return fetch(i, i, lambda k, q: k == index, values)


def back(steps: int, values: rasp.SOp = t) -> rasp.SOp:
    return fetch(i, i, lambda k, q: k == q - steps, values)


def from_end(steps: int, values: rasp.SOp = t) -> rasp.SOp:
    return fetch(i, length(), lambda k, q: k == q - steps, values)


def reverse(values: rasp.SOp = t) -> rasp.SOp:
    mirrored = join(lambda n, p: n - 1 - p, length(), i)
    return fetch(i, mirrored, lambda k, q: k == q, values)


def rank(keys: rasp.SOp, larger: bool) -> rasp.SOp:
    """How many positions have a larger (or smaller) key."""
    return number(keys, keys, (lambda k, q: k > q) if larger else (lambda k, q: k < q))


def best(keys: rasp.SOp, values: rasp.SOp, larger: bool = True) -> rasp.SOp:
    return fetch(rank(keys, larger), i, lambda k, q: k == 0, values)


def by_order(keys: rasp.SOp, values: rasp.SOp, larger: bool = False) -> rasp.SOp:
    """Values in the order of their keys, of which no two are equal."""
    return fetch(rank(keys, larger), i, lambda k, q: k == q, values)


def untied(keys: rasp.SOp) -> rasp.SOp:
    """Keys of which no two are equal: of two that were, the later is larger."""
    return join(lambda key, p: 10 * key + p, keys, i)


def histogram() -> rasp.SOp:
    return number(t, t, lambda k, q: k == q)


def earlier_same() -> rasp.SOp:
    here = both(t, i)
    return number(here, here, lambda k, q: k[0] == q[0] and k[1] < q[1])


def share(wanted: str) -> rasp.SOp:
    """Share of the positions up to here that hold one of `wanted`."""
    held = rasp.numerical(rasp.Map(lambda x: int(x in wanted), t))
    upto = rasp.Select(i, i, rasp.Comparison.LEQ)
    return rasp.numerical(rasp.Aggregate(upto, held, default=0))


def upto(wanted: str) -> rasp.SOp:
    here = both(t, i)
    return number(here, here, lambda k, q: k[0] in wanted and k[1] <= q[1])


def depth(opening: str, closing: str) -> rasp.SOp:
    return join(lambda a, b: a - b, upto(opening), upto(closing))


def holds_somewhere(flags: rasp.SOp) -> rasp.SOp:
    return rasp.Map(lambda n: n > 0, number(flags, flags, lambda k, q: bool(k)))


def holds_nowhere(flags: rasp.SOp) -> rasp.SOp:
    return rasp.Map(lambda n: n == 0, number(flags, flags, lambda k, q: bool(k)))


def balanced(opening: str, closing: str) -> rasp.SOp:
    now = depth(opening, closing)
    never_below = holds_nowhere(rasp.Map(lambda d: d < 0, now))
    as_many = join(lambda a, b: a == b, count(opening), count(closing))
    return join(lambda a, b: a and b, never_below, as_many)


def next_letter(x: str, steps: int = 1, of: str = "abcd") -> str:
    return of[(of.index(x) + steps) % len(of)]


DIGITS = (1, 2, 3, 4)


# -- the programs ---------------------------------------------------------------------------------------------------


def moves() -> Iterator[tuple[str, Program]]:
    def program(means: str, build: Callable[[], rasp.SOp], **words: Any) -> Program:
        return Program("moves", means, build, **words)

    yield "copy", program("the word itself", lambda: rasp.Map(lambda x: x, t))
    yield "reverse", program("the word backwards", reverse_in_steps, alphabet=(1, 2, 3))
    yield "reverse_4_letters", program("the word backwards", reverse, longest=4)
    yield "reverse_6_bits", program("the word backwards", reverse, alphabet="ab", longest=6)
    for n in (1, 2, 3):
        yield f"shift_{n}", program(f"the letter {n} before", lambda n=n: back(n))
    for n in (1, 2):
        means = f"the letter {n} before, of a word that is a ring"
        yield (
            f"rotate_{n}",
            program(
                means,
                lambda n=n: fetch(i, join(lambda p, m: (p - n) % max(m, 1), i, length()), lambda k, q: k == q, t),
                longest=4,
            ),
        )
    for n, said in enumerate(("first", "second", "third")):
        yield f"letter_{said}", program(f"the {said} letter, everywhere", lambda n=n: at(n))
    for n, said in ((2, "second"), (3, "third")):
        yield f"letter_{said}_last", program(f"the {said} last letter, everywhere", lambda n=n: from_end(n))
    yield "letter_middle", program("the letter in the middle", lambda: fetch(i, length(), lambda k, q: k == q // 2, t))
    yield (
        "letter_at_half",
        program("the letter half as far from the start", lambda: fetch(i, i, lambda k, q: k == q // 2, t)),
    )
    yield "ends_swapped", program("the word with its first and last letter exchanged", ends_swapped, longest=4)
    for n in (1, 2):
        yield (
            f"caesar_{n}",
            program(
                f"each letter {n} further on in the alphabet", lambda n=n: rasp.Map(lambda x: next_letter(x, n), t)
            ),
        )
        means = f"the word backwards, each letter {n} further on"
        yield (
            f"reverse_caesar_{n}",
            program(means, lambda n=n: reverse(rasp.Map(lambda x: next_letter(x, n), t)), longest=4),
        )
    yield "shift_caesar", program("the letter before, one further on", lambda: rasp.Map(next_letter, back(1)))
    yield "first_or_last", program("the first letter if the last is a or b, else the last", first_or_last)
    yield "first_if_long", program("the first letter of words of four or more, else the second", first_if_long)
    yield "second_if_many", program("the second letter if there are two a or more, else the first", second_if_many)


def reverse_in_steps() -> rasp.SOp:
    """As ACDC's comparison has it: the length less the place, and then less one."""
    return fetch(i, length() - i - 1, lambda k, q: k == q, t)


def ends_swapped() -> rasp.SOp:
    def other(p: int, n: int) -> int:
        return {0: n - 1, n - 1: 0}.get(p, p)

    return fetch(i, join(other, i, length()), lambda k, q: k == q, t)


def first_or_last() -> rasp.SOp:
    return join(lambda first, last: first if last in "ab" else last, at(0), from_end(1))


def first_if_long() -> rasp.SOp:
    return fetch(i, length(), lambda k, q: k == (0 if q >= 4 else 1), t)


def second_if_many() -> rasp.SOp:
    return fetch(i, count("a"), lambda k, q: k == (1 if q >= 2 else 0), t)


def counts() -> Iterator[tuple[str, Program]]:
    def program(means: str, build: Callable[[], rasp.SOp], **words: Any) -> Program:
        return Program("counts", means, build, **words)

    yield "histogram", program("how often the letter here occurs", histogram)
    yield "histogram_6_bits", program("how often the letter here occurs", histogram, alphabet="ab", longest=6)
    yield "histogram_earlier", program("how often the letter here occurred before", earlier_same, longest=4)
    for wanted in ("a", "ab", "abc"):
        yield f"count_{wanted}", program(f"how many letters are one of {wanted}", lambda w=wanted: count(w))
    for n in (2, 3, 4):
        yield f"count_a_mod_{n}", program(f"number of a, modulo {n}", lambda n=n: rasp.Map(lambda c: c % n, count("a")))
    yield "count_ab_mod_2", program("parity of the number of a and b", lambda: rasp.Map(lambda c: c % 2, count("ab")))
    for n in (1, 2, 3):
        yield (
            f"at_least_{n}_a",
            program(f"whether there are {n} a or more", lambda n=n: rasp.Map(lambda c: c >= n, count("a"))),
        )
        yield (
            f"exactly_{n}_a",
            program(f"whether there are {n} a and no more", lambda n=n: rasp.Map(lambda c: c == n, count("a"))),
        )
    pairs = {
        "more_a_than_b": ("whether a is more frequent than b", lambda a, b: a > b),
        "as_many_a_as_b": ("whether a and b are equally frequent", lambda a, b: a == b),
        "a_minus_b": ("number of a less number of b", lambda a, b: a - b),
        "a_and_b": ("whether both a and b occur", lambda a, b: a > 0 and b > 0),
        "a_or_b_not_both": ("whether just one of a and b occurs", lambda a, b: (a > 0) != (b > 0)),
        "neither_a_nor_b": ("whether neither a nor b occurs", lambda a, b: a + b == 0),
        "a_plus_2b_mod_3": ("number of a plus twice that of b, modulo 3", lambda a, b: (a + 2 * b) % 3),
        "both_parities": ("whether the numbers of a and of b are both even", lambda a, b: a % 2 == 0 and b % 2 == 0),
    }
    for name, (means, f) in pairs.items():
        yield name, program(means, lambda f=f: join(f, count("a"), count("b")))
    yield (
        "majority_a",
        program("whether more than half is a", lambda: join(lambda a, n: 2 * a > n, count("a"), length())),
    )
    yield (
        "count_others",
        program("how many letters differ from the one here", lambda: number(t, t, lambda k, q: k != q)),
    )
    yield "count_even_places", program("how many a stand at even places", lambda: at_places("a", 0))
    yield "count_odd_places", program("how many a stand at odd places", lambda: at_places("a", 1))
    yield "parity_even_places", program("parity of the a at even places", lambda: parity_at_places("a", 0))
    yield "distinct", program("how many different letters there are", distinct, longest=4)
    yield "length", program("length of the word", length)
    yield "length_parity", program("parity of the length", lambda: rasp.Map(lambda n: n % 2, length()))
    for wanted in ("x", "xy"):
        means = f"share of the letters up to here that are one of {wanted}"
        yield (
            "proportion" if wanted == "x" else f"proportion_{wanted}",
            program(means, lambda w=wanted: share(w), alphabet="wxyz"),
        )
    yield "proportion_6_bits", program("share of the letters up to here that are x", lambda: share("x"), **BITS)
    yield "share_of_all", program("share of the letters, of all, that are x", share_of_all, alphabet="wxyz")
    yield "surplus", program("share of x up to here less share of y", surplus, alphabet="wxyz")


BITS: dict[str, Any] = {"alphabet": "wx", "longest": 6}


def at_places(wanted: str, parity: int) -> rasp.SOp:
    flags = join(lambda x, p: x == wanted and p % 2 == parity, t, i)
    return number(flags, flags, lambda k, q: bool(k))


def parity_at_places(wanted: str, parity: int) -> rasp.SOp:
    return rasp.Map(lambda n: n % 2, at_places(wanted, parity))


def distinct() -> rasp.SOp:
    new = rasp.Map(lambda n: n == 0, earlier_same())
    return number(new, new, lambda k, q: bool(k))


def share_of_all() -> rasp.SOp:
    held = rasp.numerical(rasp.Map(lambda x: int(x == "x"), t))
    return rasp.numerical(rasp.Aggregate(rasp.Select(t, t, rasp.Comparison.TRUE), held, default=0))


def surplus() -> rasp.SOp:
    return rasp.numerical(rasp.LinearSequenceMap(share("x"), share("y"), 1, -1))


def orders() -> Iterator[tuple[str, Program]]:
    def program(means: str, build: Callable[[], rasp.SOp], **words: Any) -> Program:
        return Program("orders", means, build, **{"alphabet": DIGITS, "longest": 4, **words})

    yield "sort", program("the digits in ascending order", lambda: by_order(untied(t), t))
    yield "sort_descending", program("the digits in descending order", lambda: by_order(untied(t), t, larger=True))
    yield "sort_3_digits", program("the digits in ascending order", lambda: by_order(untied(t), t), alphabet=(1, 2, 3))
    key = rasp.Map(lambda x: (x % 2) * 4 + x, t)
    yield "sort_even_first", program("even digits, then odd ones, each ascending", lambda: by_order(untied(key), t))
    yield "maximum", program("the largest digit, everywhere", lambda: best(t, t), longest=5)
    yield "minimum", program("the smallest digit, everywhere", lambda: best(t, t, larger=False), longest=5)
    yield "maximum_index", program("where the first of the largest digits stands", lambda: best(first_of_largest(), i))
    yield "minimum_index", program("where the first of the smallest stands", lambda: best(untied(t), i, larger=False))
    for n, said in ((1, "second"), (2, "third")):
        yield (
            f"{said}_largest",
            program(f"the {said} largest digit", lambda n=n: fetch(rank(untied(t), True), i, lambda k, q: k == n, t)),
        )
    yield "median", program("the digit in the middle of the sorted word", median)
    yield "rank_ascending", program("how many digits are smaller", lambda: rank(t, larger=False), longest=5)
    yield "rank_descending", program("how many digits are larger", lambda: rank(t, larger=True), longest=5)
    yield "is_maximum", program("whether no digit is larger than this", lambda: none_beyond(True), longest=5)
    yield "is_minimum", program("whether no digit is smaller than this", lambda: none_beyond(False), longest=5)
    yield "above_first", program("how many digits are larger than the first", above_first, longest=5)
    yield "most_frequent", program("the most frequent digit, the first of several", lambda: best(frequency(), t))
    yield "least_frequent", program("the least frequent digit, the last of several", least_frequent)
    yield "highest_frequency", program("how often the most frequent digit occurs", highest_frequency)
    yield "sort_by_frequency", program("the digits, the rarest first", lambda: by_order(frequency(), t))


def first_of_largest() -> rasp.SOp:
    return join(lambda x, p: 10 * x - p, t, i)


def median() -> rasp.SOp:
    middle = rasp.Map(lambda n: (n - 1) // 2, length())
    return fetch(rank(untied(t), larger=False), middle, lambda k, q: k == q, t)


def none_beyond(larger: bool) -> rasp.SOp:
    return rasp.Map(lambda n: n == 0, rank(t, larger))


def above_first() -> rasp.SOp:
    first = at(0)
    return number(t, first, lambda k, q: k > q)


def frequency() -> rasp.SOp:
    """How often a digit occurs, and of several at one frequency the earlier more."""
    return join(lambda n, p: 10 * n - p, histogram(), i)


def least_frequent() -> rasp.SOp:
    return best(frequency(), t, larger=False)


def highest_frequency() -> rasp.SOp:
    return best(histogram(), histogram())


def places() -> Iterator[tuple[str, Program]]:
    def program(means: str, build: Callable[[], rasp.SOp], **words: Any) -> Program:
        return Program("places", means, build, **words)

    for wanted in ("a", "ab"):
        yield f"first_{wanted}", program(f"where the first of {wanted} stands", lambda w=wanted: occurrence(w, False))
        yield f"last_{wanted}", program(f"where the last of {wanted} stands", lambda w=wanted: occurrence(w, True))
    yield "first_same", program("where the letter here occurs first", lambda: same_letter(False), longest=4)
    yield "last_same_before", program("where the letter here occurred before", previous_same, alphabet="abc", longest=4)
    yield "seen_before", program("whether the letter here occurred before", seen_before, longest=4)
    yield "repeats", program("whether some letter occurs twice", repeats)
    yield "all_same", program("whether all letters are the same", all_same)
    yield "after_first_a", program("the letter after the first a", after_first_a, alphabet="abc", longest=4)
    yield "index", program("the place", lambda: join(lambda x, p: p, t, i), alphabet="ab", longest=6)
    yield "first_again", program("how often the first letter occurs", lambda: number(t, at(0), lambda k, q: k == q))
    yield "last_again", program("how often the last letter occurs", lambda: number(t, from_end(1), lambda k, q: k == q))


def occurrence(wanted: str, last: bool) -> rasp.SOp:
    """Where the first or last of some letters stands; nothing where there is none."""
    far = join(lambda x, p: (p + 1 if last else 10 - p) if x in wanted else -p, t, i)
    hit = join(lambda n, x: n == 0 and x in wanted, rank(far, larger=True), t)
    return fetch(hit, i, lambda k, q: bool(k), i)


def same_letter(last: bool) -> rasp.SOp:
    new = rasp.Map(lambda n: n == 0, earlier_same())
    key = join(lambda x, flag: x if flag else "-", t, new)
    return fetch(key, t, lambda k, q: k == q, i)


def previous_same() -> rasp.SOp:
    nth = join(lambda x, n: (x, n), t, earlier_same())
    return fetch(nth, nth, lambda k, q: k[0] == q[0] and k[1] == q[1] - 1, i)


def seen_before() -> rasp.SOp:
    return rasp.Map(lambda n: n > 0, earlier_same())


def repeats() -> rasp.SOp:
    return holds_somewhere(rasp.Map(lambda n: n > 1, histogram()))


def all_same() -> rasp.SOp:
    return holds_nowhere(join(lambda n, m: n < m, histogram(), length()))


def after_first_a() -> rasp.SOp:
    new = join(lambda x, n: x == "a" and n == 0, t, earlier_same())
    marked = back(1, new)
    return fetch(marked, i, lambda k, q: bool(k), t)


def brackets() -> Iterator[tuple[str, Program]]:
    def program(means: str, build: Callable[[], rasp.SOp], **words: Any) -> Program:
        return Program("brackets", means, build, **{"alphabet": "()x", "longest": 5, **words})

    yield "dyck_depth", program("how many brackets are open here", lambda: depth("(", ")"))
    yield "dyck_balanced", program("whether brackets are balanced", lambda: balanced("(", ")"))
    yield "dyck_balance", program("share of ( up to here less share of )", bracket_surplus)
    yield "dyck_open", program("whether a bracket is open here", lambda: rasp.Map(lambda d: d > 0, depth("(", ")")))
    yield "dyck_below", program("whether ever too many brackets were closed", dyck_below)
    yield "dyck_deepest", program("how deep brackets are nested", dyck_deepest)
    yield "dyck_depth_2_kinds", program("open brackets of either kind", two_kinds, alphabet="()[]", longest=4)
    yield "dyck_parity", program("parity of the number of open brackets", dyck_parity)


def bracket_surplus() -> rasp.SOp:
    return rasp.numerical(rasp.LinearSequenceMap(share("("), share(")"), 1, -1))


def dyck_below() -> rasp.SOp:
    return holds_somewhere(rasp.Map(lambda d: d < 0, depth("(", ")")))


def dyck_deepest() -> rasp.SOp:
    now = depth("(", ")")
    return best(now, now)


def two_kinds() -> rasp.SOp:
    return depth("([", ")]")


def dyck_parity() -> rasp.SOp:
    return rasp.Map(lambda d: d % 2, depth("(", ")"))


def patterns() -> Iterator[tuple[str, Program]]:
    def program(means: str, build: Callable[[], rasp.SOp], **words: Any) -> Program:
        return Program("patterns", means, build, **words)

    for first, second in ("ab", "aa", "bc"):
        means = f"whether {first} then {second} end here"
        yield f"ends_{first}{second}", program(means, lambda a=first, b=second: pair_here(a, b))
    yield "same_as_before", program("whether the letter before is the same", doubled_here)
    yield "ends_alike", program("whether first and last letter are the same", lambda: join(same, at(0), from_end(1)))
    yield "like_first", program("whether the letter here is the first", lambda: join(same, at(0), t))
    yield "starts_as_wanted", program("whether the word starts with a, or ends with b", starts_or_ends)
    yield "first_xor_last", program("whether just one end of the word is an a", first_xor_last)
    yield "palindrome", program("whether the word reads the same backwards", palindrome, alphabet="abc", longest=5)
    yield "mirrored_places", program("how many places hold what their mirror image holds", mirrored, alphabet="abc")
    yield "skip_pair", program("whether the letter two before is the same", lambda: join(same, back(2), t))
    yield "ab_star", program("whether the word is a, b in turn", ab_in_turn, alphabet="abc")


def same(x: Any, y: Any) -> bool:
    return x == y


def pair_here(first: str, second: str) -> rasp.SOp:
    return join(lambda before, x: before == first and x == second, back(1), t)


def doubled_here() -> rasp.SOp:
    return join(same, back(1), t)


def starts_or_ends() -> rasp.SOp:
    return join(lambda first, last: first == "a" or last == "b", at(0), from_end(1))


def first_xor_last() -> rasp.SOp:
    return join(lambda first, last: (first == "a") != (last == "a"), at(0), from_end(1))


def palindrome() -> rasp.SOp:
    return holds_nowhere(join(lambda x, y: x != y, reverse(), t))


def mirrored() -> rasp.SOp:
    flags = join(same, reverse(), t)
    return number(flags, flags, lambda k, q: bool(k))


def ab_in_turn() -> rasp.SOp:
    wrong = join(lambda x, p: x != "ab"[p % 2], t, i)
    return holds_nowhere(wrong)


def of_few_letters() -> Iterator[tuple[str, Program]]:
    """Programs of the other families, of so few letters that the words of a task show nearly all that can happen."""
    few = {
        "bits": {"alphabet": "ab", "longest": 6},
        "abc": {"alphabet": "abc", "longest": 4},
        "ones": {"alphabet": (1, 2), "longest": 6},
        "digits": {"alphabet": (1, 2, 3), "longest": 4},
        "plain": {"alphabet": "()", "longest": 6},
    }
    smaller = {
        "moves": [
            *(f"{name}_bits" for name in ("shift_1", "letter_middle", "letter_second_last", "rotate_1")),
            *(f"{name}_abc" for name in ("first_or_last", "first_if_long", "letter_middle", "shift_1")),
        ],
        "counts": [
            *(f"{name}_bits" for name in ("count_a", "count_a_mod_2", "at_least_3_a", "majority_a", "more_a_than_b")),
            *(f"{name}_abc" for name in ("a_or_b_not_both", "both_parities", "count_a_mod_2", "histogram", "distinct")),
        ],
        "orders": [
            *(f"{name}_ones" for name in ("sort", "sort_descending", "maximum", "most_frequent")),
            *(f"{name}_digits" for name in ("maximum", "minimum", "second_largest", "most_frequent", "maximum_index")),
        ],
        "places": [f"{name}_bits" for name in ("seen_before", "all_same", "first_a", "last_a")],
        "brackets": [f"{name}_plain" for name in ("dyck_depth", "dyck_open", "dyck_balance")],
        "patterns": [
            *(f"{name}_bits" for name in ("palindrome", "ends_alike", "same_as_before", "skip_pair")),
            *(f"{name}_abc" for name in ("ends_ab", "ends_aa", "ends_alike", "like_first", "starts_as_wanted")),
        ],
    }
    known = {name: program for family in FAMILIES for name, program in family()}
    for names in smaller.values():
        for name in names:
            whole, _, letters = name.rpartition("_")
            yield name, known[whole]._replace(**few[letters])


FAMILIES = (moves, counts, orders, places, brackets, patterns)


def programs() -> dict[str, Program]:
    """Every program, by name."""
    found: dict[str, Program] = {}
    for family in (*FAMILIES, of_few_letters):
        for name, program in family():
            assert name not in found, name
            assert set(name) <= set(string.ascii_lowercase + string.digits + "_"), name
            found[name] = program
    return found


# -- compiling ------------------------------------------------------------------------------------------------------


def words_of(program: Program) -> Iterator[tuple[Any, ...]]:
    """Every word, shorter ones first, in the order of the alphabet."""
    for n in range(1, program.longest + 1):
        yield from itertools.product(program.alphabet, repeat=n)


def as_text(value: Any) -> str:
    """An output as the name of a token: numbers that are no integers as fractions."""
    if isinstance(value, float | Fraction):
        return str(Fraction(value).limit_denominator(1000))
    return str(value)


def compiled(name: str, program: Program) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What the files say of a program, and its arrays."""
    source = program.build()
    model = compile_rasp_to_model(source, set(program.alphabet), program.longest, compiler_bos=BOS, compiler_pad=PAD)
    given = [source(list(word)) for word in words_of(program)]
    values = {as_text(v): v for row in given for v in row if v is not None}
    outputs = sorted(values, key=lambda text: (str(type(values[text])), values[text]))
    assert 1 < len(outputs) < NO_ANSWER
    answers = [NO_ANSWER if v is None else outputs.index(as_text(v)) for row in given for v in row]
    categorical = rasp.is_categorical(source)
    weights = _weights(model, program) | {"W_out": _readout(model, source.label, outputs)}
    flat = np.concatenate([w.reshape(-1) for w in weights.values()]).astype(np.float32)
    index = flat.nonzero()[0]
    cfg = model.model_config
    record = {
        "family": program.family,
        "means": program.means,
        "alphabet": [as_text(x) for x in program.alphabet],
        "longest": program.longest,
        "outputs": outputs,
        "numbers": None if categorical else [float(values[text]) for text in outputs],
        "n_layers": cfg.num_layers,
        "n_heads": cfg.num_heads,
        "d_head": cfg.key_size,
        "d_mlp": cfg.mlp_hidden_size,
        "channels": model.residual_labels,
    }
    arrays = {"index": index.astype(np.int32), "value": flat[index], "answers": np.array(answers, dtype=np.uint8)}
    return record, {f"{name}.{part}": array for part, array in arrays.items()}


def _weights(model: Any, program: Program) -> dict[str, np.ndarray]:
    """All weights but the readout, in the order of the flat vector; there are no biases."""
    params = {f"{module}.{name}": np.asarray(p) for module, held in model.params.items() for name, p in held.items()}
    rows = [model.input_encoder.encoding_map[x] for x in (*program.alphabet, BOS)]
    weights = {"W_E": params["token_embed.embeddings"][rows], "W_pos": params["pos_embed.embeddings"]}
    for layer in range(model.model_config.num_layers):
        parts = {"Q": "attn/query", "K": "attn/key", "V": "attn/value", "O": "attn/linear"}
        for letter, part in {**parts, "in": "mlp/linear_1", "out": "mlp/linear_2"}.items():
            weights[f"{layer}.W_{letter}"] = params[f"transformer/layer_{layer}/{part}.w"]
            assert not params[f"transformer/layer_{layer}/{part}.b"].any()
    return weights


def _readout(model: Any, label: str, outputs: Sequence[str]) -> np.ndarray:
    """Which channel says which output: a column for each, or a single one for the channel that holds the number."""
    channels = model.residual_labels
    says = {label: label}
    if label not in channels:
        says = {as_text(value): f"{label}:{value}" for value in model.output_encoder.encoding_map}
    wanted = [says[text] for text in (outputs if label not in channels else says)]
    readout = np.zeros((len(channels), len(wanted)), dtype=np.float32)
    for column, channel in enumerate(wanted):
        readout[channels.index(channel), column] = 1
    return readout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/groundtruth"))
    parser.add_argument("--only", nargs="*", help="compile these programs alone, to look at them")
    asked = parser.parse_args()
    # Tracr draws initial weights, by a program that XLA compiles for every shape, and overwrites all of them
    haiku.initializers.VarianceScaling.__call__ = lambda self, shape, dtype: jax.numpy.zeros(shape, dtype)
    records, arrays = {}, {}
    for name, program in programs().items():
        if asked.only and name not in asked.only:
            continue
        start = time.perf_counter()
        records[name], found = compiled(name, program)
        arrays |= found
        shape = {key: records[name][key] for key in ("n_layers", "n_heads", "d_head", "d_mlp")}
        n_channels, n_weights = len(records[name]["channels"]), len(found[f"{name}.index"])
        seconds = time.perf_counter() - start
        print(f"{name:22} {shape} {n_channels} channels {n_weights} weights {seconds:.1f} s", flush=True)
    asked.out.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(record)}" for name, record in records.items())
    (asked.out / "tracr.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    save_file(arrays, asked.out / "tracr.safetensors")


if __name__ == "__main__":
    main()
