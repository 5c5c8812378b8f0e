"""Fitting the reader of domains: which kind of question a text is, for requests that do not say so.

A multinomial logistic regression over the commonest words of the recorded prompts. It is small enough to stand in the
combiner's own file, and a gateway reads a domain with a few hundred look-ups. On the pools of benchmarks/combiner.py
most of what domains add to the weighing is kept where they are read.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import minimize

from mixfuse.fusion.combiner.artefact import DomainReader, words_of
from mixfuse.fusion.combiner.evidence import Question
from mixfuse.fusion.combiner.fit import Fitted, leading_marks, scores_by_fold, truth_loss
from mixfuse.fusion.combiner.table import Floats

# Prompts of a domain without which nothing can be said of it, and of all domains.
_LEAST_OF_DOMAIN = 5
_LEAST = 50
# The commonest words that are kept, and the prompts that a word must stand in.
_WORDS = 1500
_LEAST_OF_WORD = 4
_PENALTY = 0.3
# Below this probability no domain is named; of two or three domains it must be half as much again as by chance.
_SURE = 0.4


def reader_of(fitted: Fitted, questions: Sequence[Question]) -> tuple[DomainReader | None, dict[str, float]]:
    """Fits a reader, and keeps it where weighing gains by what it reads.

    Args:
        fitted: The weights.
        questions: The marked ones, as they stand in its table.

    Returns:
        The reader, None where it is not shown to help; and cross-validated figures: how often the domain that it named
        was right (`accuracy`), the share of questions for which it named one (`named`), and the share of right answers
        weighed with the domain that it read (`weighed`) and with none (`weighed_without`).
    """
    made = fit_reader(questions, fitted.fold)
    if made is None:
        return None, {}
    reader, read = made
    places = {name: place for place, name in enumerate(fitted.table.layout.domains)}
    loss, right = {}, {}
    for name, domains in (("read", read), ("none", [None] * len(read))):
        table = replace(fitted.table, domain=np.array([places.get(domain or "", -1) for domain in domains]))
        loss[name] = truth_loss(table, fitted.fold, fitted.held_out)
        scores = scores_by_fold(table, fitted.fold, fitted.held_out)
        right[name] = float(np.nanmean(leading_marks(table, scores, fitted.accuracies)))
    figures = {
        "accuracy": reader.accuracy,
        "named": reader.named,
        "weighed": right["read"],
        "weighed_without": right["none"],
    }
    return reader if loss["read"] < loss["none"] else None, figures


def fit_reader(questions: Sequence[Question], fold: NDArray[np.int64]) -> tuple[DomainReader, list[str | None]] | None:
    """Fits a reader to the questions that have a prompt and a domain.

    Args:
        questions: Some with both.
        fold: (Q,) Each question's fold.

    Returns:
        The reader; and for each question the domain that one fitted without its fold reads. None where too few have
        both.
    """
    domains = Counter(question.domain for question in questions if question.domain and question.prompt)
    names = sorted(name for name, count in domains.items() if name and count >= _LEAST_OF_DOMAIN)
    usable = np.array([bool(question.prompt) and question.domain in names for question in questions])
    if len(names) < 2 or usable.sum() < _LEAST:
        return None
    words = [words_of(question.prompt) for question in questions]
    truth = np.array(
        [names.index(str(question.domain)) if use else -1 for question, use in zip(questions, usable, strict=True)]
    )
    read: list[str | None] = [None] * len(questions)
    for number in np.unique(fold):
        without = _fit(words, truth, names, np.flatnonzero(usable & (fold != number)))
        for row in np.flatnonzero(fold == number):
            read[row] = without(questions[row].prompt)
    named = [row for row in np.flatnonzero(usable) if read[row] is not None]
    right = [read[row] == questions[row].domain for row in named]
    reader = _fit(words, truth, names, np.flatnonzero(usable))
    figures = {"accuracy": float(np.mean(right)) if right else 0.0, "named": len(named) / int(usable.sum())}
    return reader.model_copy(update=figures), read


def _fit(
    words: Sequence[set[str]], truth: NDArray[np.int64], names: Sequence[str], rows: NDArray[np.int64]
) -> DomainReader:
    counts = Counter(word for row in rows for word in words[row])
    vocabulary = sorted(word for word, count in counts.most_common(_WORDS) if count >= _LEAST_OF_WORD)
    place = {word: number for number, word in enumerate(vocabulary)}
    found = [[place[word] for word in words[row] if word in place] for row in rows]
    lengths = np.array([len(places) for places in found])
    features = sparse.csr_matrix(
        (np.repeat(1 / np.sqrt(np.maximum(lengths, 1)), lengths), np.concatenate([*found, []]).astype(int),
         np.concatenate([[0], np.cumsum(lengths)])),
        shape=(len(rows), len(vocabulary)),
    )  # fmt: skip
    transposed = features.T.tocsr()
    one_hot = np.eye(len(names))[truth[rows]]
    shape = len(vocabulary) + 1, len(names)

    def loss(flat: Floats) -> tuple[float, Floats]:
        weights = flat.reshape(shape)
        scores = features @ weights[:-1] + weights[-1]
        scores -= scores.max(1, keepdims=True)
        sums = np.log(np.exp(scores).sum(1, keepdims=True))
        gap = np.exp(scores - sums) - one_hot
        gradient = np.vstack([transposed @ gap + _PENALTY * weights[:-1], gap.sum(0) + 1e-3 * weights[-1]])
        penalty = 0.5 * _PENALTY * (weights[:-1] ** 2).sum() + 0.5e-3 * (weights[-1] ** 2).sum()
        return float((sums.sum() - (scores * one_hot).sum()) + penalty), gradient.ravel()

    best = minimize(
        loss, np.zeros(shape[0] * shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 200, "ftol": 1e-6}
    )
    weights = best.x.reshape(shape).round(2)
    return DomainReader(
        domains=list(names),
        bias=weights[-1].tolist(),
        words={word: row.tolist() for word, row in zip(vocabulary, weights[:-1], strict=True)},
        sure=max(_SURE, 1.5 / len(names)),
        accuracy=0.0,
        named=0.0,
    )
