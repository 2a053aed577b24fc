"""Arithmetic word problems of one to three steps, with a short chain of thought and a boxed answer.

    python examples/tiny/problems.py --out data --train 2000 --test 512

A problem is a little story (an opening, events, a question) and the steps that solve it. Every number in the text is a
decimal numeral, every intermediate result lies in 2..50. Whether a problem is for training or for testing follows from
its numbers alone (`split_of`): the splits share neither a text nor a set of operands, for any seed and any size.
"""

from __future__ import annotations

import argparse
import json
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

NAMES = ("Mia", "Tom", "Ana", "Ben", "Eva", "Sam", "Zoe", "Leo", "Ida", "Max", "Amy", "Jon")
ITEMS = (  # (items, containers)
    ("apples", "bags"),
    ("pens", "packs"),
    ("books", "boxes"),
    ("coins", "jars"),
    ("cards", "packs"),
    ("eggs", "boxes"),
    ("shells", "jars"),
    ("stamps", "sheets"),
)
GAINS = ("buys", "finds", "gets")
LOSSES = ("sells", "loses", "gives away")
SMALLEST, LARGEST = 2, 50  # of every number and every intermediate result
TEST_SHARE = 8  # one set of operands in so many is for testing

APPLY: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}


@dataclass(frozen=True)
class Ref:
    """The result of an earlier step, by its index."""

    step: int


@dataclass(frozen=True)
class Step:
    """One calculation: `left op right`, and the words that introduce it in a story-like solution."""

    left: int | Ref
    op: str
    right: int | Ref
    says: str


@dataclass(frozen=True)
class Equation:
    """A step with its numbers filled in."""

    left: int
    op: str
    right: int
    result: int

    @classmethod
    def of(cls, left: int, op: str, right: int) -> Equation:
        return cls(left, op, right, APPLY[op](left, right))

    def __str__(self) -> str:
        return f"{self.left} {self.op} {self.right} = {self.result}"


# Turns a right equation (by step index) into what is written instead: how flawed solutions are made.
Tamper = Callable[[int, Equation], Equation]


@dataclass(frozen=True)
class Problem:
    """A story, the steps that solve it, and what it counts."""

    text: str
    steps: tuple[Step, ...]
    items: str

    @property
    def operands(self) -> tuple[int, ...]:
        """The numbers of the text in rising order."""
        given = [x for step in self.steps for x in (step.left, step.right) if isinstance(x, int)]
        return tuple(sorted(given))

    @property
    def answer(self) -> int:
        return self.work()[-1].result

    def work(self, tamper: Tamper | None = None) -> list[Equation]:
        """The equations in order; a tampered result is carried on into the later steps."""
        done: list[Equation] = []
        for i, step in enumerate(self.steps):
            left, right = (done[x.step].result if isinstance(x, Ref) else x for x in (step.left, step.right))
            right_equation = Equation.of(left, step.op, right)
            done.append(tamper(i, right_equation) if tamper else right_equation)
        return done

    def solution(self, style: str, equations: list[Equation] | None = None) -> str:
        """The working in words: `ordered` (First ... Then ...) or `story`, then the boxed result of the last step."""
        equations = equations or self.work()
        if style == "ordered":
            lines = [f"{'Then' if i else 'First'} {equation}." for i, equation in enumerate(equations)]
        else:
            pairs = zip(self.steps, equations, strict=False)
            lines = [f"{step.says} {equation} {self.items}." for step, equation in pairs]
        return " ".join([*lines, f"The answer is \\boxed{{{equations[-1].result}}}"])


STYLES = ("ordered", "story")


class Story:
    """Collects sentences and steps while a problem is told; `value` is what the hero holds so far."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.hero, self.friend = rng.sample(NAMES, 2)
        self.items, self.containers = rng.choice(ITEMS)
        self.sentences: list[str] = []
        self.steps: list[Step] = []
        self.amount: int | Ref = 0
        self.value = 0

    def calculate(self, left: int | Ref, op: str, right: int | Ref, value: int, says: str) -> Ref:
        self.steps.append(Step(left, op, right, says))
        self.value = value
        return Ref(len(self.steps) - 1)

    def open_plain(self) -> None:
        self.amount = self.value = self.rng.randint(5, LARGEST)
        self.sentences.append(f"{self.hero} has {self.value} {self.items}.")

    def open_containers(self) -> None:
        many, each = self.rng.randint(2, 9), self.rng.randint(2, 9)
        self.sentences.append(f"{self.hero} has {many} {self.containers} with {each} {self.items} in each.")
        self.amount = self.calculate(many, "*", each, many * each, f"The {self.containers} hold")

    def open_compared(self) -> None:
        other, word = self.rng.randint(5, 40), self.rng.choice(("more", "fewer"))
        by = self.rng.randint(2, 20 if word == "more" else other - 1)
        op, value = ("+", other + by) if word == "more" else ("-", other - by)
        self.sentences.append(
            f"{self.friend} has {other} {self.items}. {self.hero} has {by} {word} {self.items} than {self.friend}."
        )
        self.amount = self.calculate(other, op, by, value, f"{self.hero} has")

    def open_times(self) -> None:
        other, times = self.rng.randint(2, 9), self.rng.randint(2, 9)
        self.sentences.append(
            f"{self.friend} has {other} {self.items}. "
            f"{self.hero} has {times} times as many {self.items} as {self.friend}."
        )
        self.amount = self.calculate(times, "*", other, times * other, f"{self.hero} has")

    def gain(self) -> None:
        count = self.rng.randint(2, max(2, LARGEST - self.value))
        self.sentences.append(f"{self.hero} {self.rng.choice(GAINS)} {count} {self.items}.")
        self.amount = self.calculate(self.amount, "+", count, self.value + count, f"Now {self.hero} has")

    def lose(self) -> None:
        count = self.rng.randint(2, max(2, self.value - 1))
        self.sentences.append(f"{self.hero} {self.rng.choice(LOSSES)} {count} {self.items}.")
        self.amount = self.calculate(self.amount, "-", count, self.value - count, f"Now {self.hero} has")

    def trade_containers(self) -> None:
        many, each, before = self.rng.randint(2, 9), self.rng.randint(2, 9), self.value
        word, op, value = self.rng.choice(
            (
                (self.rng.choice(GAINS), "+", before + many * each),
                (self.rng.choice(LOSSES), "-", before - many * each),
            )
        )
        self.sentences.append(f"{self.hero} {word} {many} {self.containers} with {each} {self.items} in each.")
        product = self.calculate(many, "*", each, many * each, f"The {self.containers} hold")
        self.amount = self.calculate(self.amount, op, product, value, f"Now {self.hero} has")

    def ask_together(self) -> None:
        other = self.rng.randint(2, max(2, LARGEST - self.value))
        self.sentences.append(f"{self.friend} has {other} {self.items}.")
        self.sentences.append(f"How many {self.items} do they have together?")
        self.amount = self.calculate(self.amount, "+", other, self.value + other, "Together they have")

    def ask_now(self) -> None:
        self.sentences.append(f"How many {self.items} does {self.hero} have?")


def tell(rng: random.Random) -> Problem:
    """One random problem of one to three steps, all results in 2..50."""
    while True:
        wanted = rng.choice((1, 2, 2, 3, 3))
        story = Story(rng)
        opening = rng.choice(
            (story.open_plain, story.open_plain, story.open_containers, story.open_compared, story.open_times)
        )
        opening()
        # Comparing and asking for the sum both introduce the friend: only one of them may.
        together = opening in (story.open_plain, story.open_containers) and rng.random() < 0.25
        while len(story.steps) + together < wanted:
            room = wanted - len(story.steps) - together
            events = (story.gain, story.lose) if room < 2 else (story.gain, story.lose, story.trade_containers)
            rng.choice(events)()
        if together:
            story.ask_together()
        else:
            story.ask_now()
        problem = Problem(" ".join(story.sentences), tuple(story.steps), story.items)
        if len(story.steps) == wanted and all(SMALLEST <= equation.result <= LARGEST for equation in problem.work()):
            return problem


def split_of(problem: Problem) -> str:
    """`train` or `test`, by the numbers of the text alone."""
    key = " ".join(map(str, problem.operands)).encode()
    return "train" if zlib.crc32(key) % TEST_SHARE else "test"


def problems(split: str, seed: int) -> Iterator[Problem]:
    """Endless distinct problems of a split; the same seed gives the same sequence."""
    rng, seen = random.Random(f"{split}-{seed}"), set()
    while True:
        problem = tell(rng)
        if split_of(problem) == split and problem.text not in seen:
            seen.add(problem.text)
            yield problem


def records(split: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """`count` rows with the keys `problem`, `answer` and `solution` (all strings)."""
    styles = random.Random(f"styles-{split}-{seed}")
    rows = []
    for problem, _ in zip(problems(split, seed), range(count), strict=False):
        solution = problem.solution(styles.choice(STYLES))
        rows.append({"problem": problem.text, "answer": str(problem.answer), "solution": solution})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Write train.jsonl and test.jsonl.")
    parser.add_argument("--out", type=Path, required=True, help="directory, made if it does not exist")
    parser.add_argument("--train", type=int, default=2000, help="training problems")
    parser.add_argument("--test", type=int, default=512, help="test problems")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", args.train), ("test", args.test)):
        path = args.out / f"{split}.jsonl"
        lines = [json.dumps(row) + "\n" for row in records(split, count, args.seed)]
        path.write_text("".join(lines), encoding="utf-8")
        print(f"{path}: {len(lines)} problems")


if __name__ == "__main__":
    main()
