"""Pools of answers whose makers are known: members, their errors and their marks are drawn here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mixfuse.contracts.files import write_jsonl
from mixfuse.fusion.combiner.evidence import UNREAD, Answer, Comparison, Question

WRONG = 9
"""Wrong options of each question; the right one is `choice A`."""


def pool(
    count: int,
    accuracies: Mapping[str, float],
    *,
    seed: int = 0,
    copies: Mapping[str, str] | None = None,
    copied: float = 0.9,
    domains: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Question]:
    """Questions that every member answers once, each mark present.

    Args:
        count: Of the questions.
        accuracies: Member → how often it is right.
        seed: Of all draws.
        copies: Member → another, whose answer it repeats.
        copied: How often it does.
        domains: Domain → member → how often it is right there; questions take turns.
    """
    generator = np.random.default_rng(seed)
    names = list(domains or {})
    questions = []
    for number in range(count):
        domain = names[number % len(names)] if names else None
        options: dict[str, str] = {}
        for name, accuracy in accuracies.items():
            share = domains[domain].get(name, accuracy) if domains and domain else accuracy
            wrong = chr(ord("B") + int(generator.integers(WRONG)))
            options[name] = "A" if generator.random() < share else wrong
            source = (copies or {}).get(name)
            if source and generator.random() < copied:
                options[name] = options[source]
        answers = tuple(
            Answer(name, f"choice {option}", length=5.0, right=option == "A") for name, option in options.items()
        )
        questions.append(Question(str(number), answers, domain))
    return questions


def anything(count: int, seed: int, members: Sequence[str] = ("a", "b", "c")) -> list[Question]:
    """Questions with everything that evidence can have: samples, doubt, lengths, unread answers, judges, gaps."""
    generator = np.random.default_rng(seed)
    questions = []
    for number in range(count):
        answers: list[Answer] = []
        for name in members:
            for _ in range(int(generator.integers(0, 4)) if answers or name != members[-1] else 1):
                option = str(generator.choice(["A", "B", "C", UNREAD]))
                key = f"choice {option}" if option else UNREAD
                doubtful = bool(generator.random() < 0.3)
                answers.append(Answer(name, key, doubtful, math.log1p(generator.integers(1, 900)), option == "A"))
        order = generator.permutation(len(answers))
        answers = [answers[place] for place in order]
        comparisons = tuple(
            Comparison(str(generator.choice(["x", "y"])), first, second, float(generator.normal()))
            for first in range(len(answers))
            for second in range(first + 1, len(answers))
            if generator.random() < 0.5
        )
        domain = [None, "maths", "law", "unheard of"][int(generator.integers(4))]
        questions.append(Question(str(number), tuple(answers), domain, comparisons))
    return questions


def remarked(questions: Sequence[Question], keep: Any) -> list[Question]:
    """The questions with the marks of those answers only for which `keep(question, place)` is true."""
    return [
        replace(
            question,
            answers=tuple(
                answer if keep(question, place) else replace(answer, right=None)
                for place, answer in enumerate(question.answers)
            ),
        )
        for question in questions
    ]


def write_pool(path: Path, questions: Sequence[Question]) -> Path:
    """Writes questions as a pool file; each key becomes the answer's `choice`."""
    write_jsonl(path, [row(question) for question in questions])
    return path


def row(question: Question) -> dict[str, Any]:
    """A question as a row of a pool file."""
    responses = [
        {"model": answer.member, "text": f"The answer is ({answer.key[-1:]}).", "choice": answer.key[-1:] or None,
         "correct": answer.right}
        for answer in question.answers
    ]  # fmt: skip
    extra = {"domain": question.domain} if question.domain else {}
    return {"id": question.id, "prompt": f"question {question.id}", "responses": responses, **extra}
