"""Preferences as people have them: one reader of the public shapes of "this answer is better than that one".

`pairs build` and `train judge` make training pairs of what it reads, `eval judge` measures a judge by it. A row's keys
say which shape it has; docs/data.md lists the shapes, each with a line that is read here. A row without a comparison is
refused under the name of what it is. A row with a comparison that cannot be judged is counted and left out.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal, NamedTuple

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import refuse_halves, sha256_json
from mixfuse.contracts.judge_protocol import Message, as_question

Label = Literal["first", "second", "tie"]
Benchmark = Literal["judgebench", "llmbar", "rewardbench", "rewardbench2", "rmbench", "ppe"]

TIES = "Ties"
"""RewardBench 2's subset of prompts with several right answers; it has a scoring rule of its own."""
REWARDBENCH_SECTIONS: Mapping[str, Mapping[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28, "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154, "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164, "hep-python": 164,
        "hep-rust": 164,
    },
}  # fmt: skip
"""RewardBench's sections: subset → its weight in the section's mean (arXiv 2403.13787; mathematics as much as code)."""
_RM_BENCH_STYLES = 3  # RM-Bench writes each answer concisely, in detail, and in detail with markdown

_Row = Mapping[str, Any]
_Models = tuple[str, str] | None

# Keys of the two answers of a row, the first and the second.
_ANSWERS = (
    ("response_a", "response_b"), ("response_A", "response_B"), ("orig_response_A", "orig_response_B"),
    ("output_1", "output_2"), ("response_1", "response_2"), ("response1", "response2"), ("response_0", "response_1"),
    ("answer_0", "answer_1"), ("answer_a", "answer_b"), ("output_a", "output_b"), ("completion_a", "completion_b"),
    ("human_ref_A", "human_ref_B"), ("conversation_a", "conversation_b"),
)  # fmt: skip
# Keys of a better and a worse answer.
_SIDES = (
    ("chosen", "rejected"), ("preferred_output", "non_preferred_output"), ("chosen_response", "rejected_response"),
)  # fmt: skip
_MODELS = (("model_a", "model_b"), ("generator_1", "generator_2"), ("chosen_model", "rejected_model"))
_PROMPTS = (
    "prompt", "question", "orig_instruction", "instruction", "context", "history", "conversations", "messages", "input",
)  # fmt: skip
_SCORES = (
    ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"), ("rating_chosen", "rating_rejected"),
)  # fmt: skip
_TOOLS = ("tools", "functions")  # what an answer may call, which a judge is not shown
# What a row would count in training, which is not read; 1 is the same as nothing.
_WEIGHTS = ("weight", "weights", "sample_weight", "loss_weight", "label_smoothing")
_NOTHING: tuple[Any, ...] = (None, "", "[]", "null", [], {})  # an empty cell, also one of JSON text
_PICTURES = ("images", "image", "videos", "video", "audios", "audio")  # columns beside a text that the text is about
# Columns that say in words or numbers which answer won.
_WINNERS = ("winner", "label", "orig_preference", "preference", "preferred")
_NAMED: dict[str, Label] = {
    **dict.fromkeys(("1", "first", "a>b", "a>>b", "b<a", "b<<a", "[[a]]"), "first"),
    **dict.fromkeys(("2", "second", "b>a", "b>>a", "a<b", "a<<b", "[[b]]"), "second"),
    **dict.fromkeys(
        (
            "tie", "tied", "tie bothbad", "tie both bad", "tie bothgood", "tie both good", "bothbad", "both bad",
            "bothgood", "both good", "both", "neither", "draw", "equal", "same", "no preference", "a=b", "b=a", "=",
            "[[c]]",
        ),
        "tie",
    ),
    **dict.fromkeys(("a", "model a", "response a", "answer a", "output a", "assistant a"), "first"),
    **dict.fromkeys(("b", "model b", "response b", "answer b", "output b", "assistant b"), "second"),
}  # fmt: skip
"""Words of a label, in lower case, with single spaces for underlines and round brackets → what they say."""
_ROLES = {
    "user": "user", "human": "user", "prompter": "user", "assistant": "assistant", "gpt": "assistant",
    "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "chatbot": "assistant", "system": "system",
    "developer": "system", "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
# One scored answer a row: the key of its text → the key, the lowest and the highest value of its score.
_SCORED = {"response": ("helpfulness", 0.0, 4.0), "orig_response": ("orig_score", 1.0, 5.0)}
_RATING, _OVERALL = (1.0, 5.0), (1.0, 10.0)  # UltraFeedback's scales
_STRONGEST = 3.0  # HelpSteer's preferences go from -3 (the first is much better) to 3
_ARENA_COLUMNS: tuple[tuple[Label, str], ...] = (
    ("first", "winner_model_a"), ("second", "winner_model_b"), ("tie", "winner_tie"),
)  # fmt: skip
_ANNOTATORS = ("annotator1", "annotator2", "annotator3")  # PandaLM's test set
_NUMBERED = ("overall_preference", "preference_strength", "labels", "better_response_id", "score_0")
_SOURCES = ("source", "subset", "domain", "category", "benchmark")
_IDS = ("id", "pair_id", "prompt_id", "question_id", "uid", "idx")
KEYS = frozenset(
    {
        *(key for keys in (*_ANSWERS, *_SIDES, *_MODELS, *_SCORES) for key in keys),
        *_SCORED, *(score for score, _, _ in _SCORED.values()), *(name for _, name in _ARENA_COLUMNS),
        *_PROMPTS, *_TOOLS, *_WEIGHTS, *_PICTURES, *_WINNERS, *_ANNOTATORS, *_NUMBERED, *_SOURCES, *_IDS,
        "answers", "completion", "completions", "margin", "messages", "output", "protocol", "rejected_messages",
        "responses", "sampled_conflict_pairs", "score_1", "scores", "system", "system_prompt", "text", "turn", "votes",
    }
)  # fmt: skip
"""All keys of a row that are read, so that a table's other columns need not be."""


@dataclass(frozen=True)
class Comparison:
    """A labelled pair of answers.

    Attributes:
        prompt: The question; pairs of one prompt are drawn together for the intervals.
        first: The answer shown as A in the first order.
        second: The answer shown as B in the first order.
        label: The better answer, or "tie".
        models: The models that wrote the answers, where known.
        file: The last two parts of the file's path.
        source: The part of the file, where its rows name one (`source`, `subset`, `domain`).
        benchmark: The benchmark whose official metrics the pair counts for.
        item: The row's id, or a hash of its content where it has none; one row may give several pairs.
        conversation: The messages of a prompt that is more than one question; the judge reads them in their roles.
        margin: How strong the preference is, from 0 to 1: the lead in votes, the distance of scores on their scale. It
            is 0 or less where the votes do not carry the label.
        cell: In RM-Bench, the styles of the better and of the worse answer, from 0 (concise) to 2.
    """

    prompt: str
    first: str
    second: str
    label: Label
    models: _Models = None
    file: str = ""
    source: str = ""
    benchmark: Benchmark | None = None
    item: str = ""
    conversation: tuple[dict[str, Any], ...] | None = field(default=None, compare=False)
    margin: float = 1.0
    cell: tuple[int, int] | None = None

    @property
    def better(self) -> str:
        """The better answer; of a tie the second."""
        return self.first if self.label == "first" else self.second

    @property
    def worse(self) -> str:
        """The worse answer; of a tie the first."""
        return self.second if self.label == "first" else self.first

    def toward_better(self, lean: float) -> float:
        """A lean towards the first answer (negative: the second) as a lean towards the better one."""
        return lean if self.label == "first" else -lean


@dataclass
class Preferences:
    """What was read.

    Attributes:
        pairs: The comparisons, ties among them, in the order of the rows.
        shapes: Shape → rows.
        left_out: Why rows or pairs were left out → how many.
    """

    pairs: list[Comparison] = field(default_factory=list)
    shapes: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)

    def described(self) -> str:
        """The shapes and what was left out, in one line."""
        shapes = ", ".join(
            f"{count} rows of {name}" if count > 1 else f"1 row of {name}" for name, count in self.shapes.items()
        )
        left = ", ".join(f"{reason} {count}" for reason, count in self.left_out.items())
        return f"{shapes}{f'; left out: {left}' if left else ''}"


class _LeftOut(Exception):  # noqa: N818 - no error: the row is well formed, but there is nothing to judge in it
    """A comparison that cannot be judged; its text is the reason, for the counts."""


class _Scored(NamedTuple):
    """One answer with its score, from 0 to 1 on the scale of its source."""

    text: str
    score: float
    model: str | None = None


def read(
    rows: Iterable[tuple[str, _Row]],
    *,
    file: str = "",
    pairs_per_prompt: int | None = None,
    bad: Callable[[MixfuseError], None] | None = None,
) -> Preferences:
    """Reads comparisons.

    Args:
        rows: (place, row); the place is for messages, such as file and line.
        file: The file's name in the comparisons.
        pairs_per_prompt: The most pairs of a prompt whose answers have scores or ranks; chosen by hash, the same every
            time. None: all.
        bad: What to do about a row that is malformed or holds no comparison; by default the error is raised.

    Raises:
        MixfuseError: A row is malformed or holds no comparison (the message names its place and what it is).
    """
    reader = _Reader(file, pairs_per_prompt)
    for place, given in rows:
        try:
            row = _plain(given)
            refuse_halves(row, place)
            reader.add(row)
        except _LeftOut as reason:
            reader.found.left_out[str(reason)] += 1
        except (KeyError, RecursionError, TypeError, ValueError, MixfuseError) as error:
            refused = error if isinstance(error, MixfuseError) else MixfuseError(f"{place}: {_why(error)}")
            if bad is None:
                raise refused from None
            bad(refused)
    reader.end()
    return reader.found


def _why(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"missing key {error}"
    return "a text of JSON in it is nested too deep" if isinstance(error, RecursionError) else str(error)


def is_comparison(row: _Row) -> bool:
    """Whether a row's keys are those of a comparison that `read` knows."""
    return _shape_of(row) is not None


def with_label(row: _Row) -> _Row:
    """A row of two answers that nobody has judged yet, as a tie; any other row as it is."""
    named = [name for name in _WINNERS if name in row]
    judged = _has_verdict(row) and not (named and all(row[name] is None for name in named))
    return row if judged or _sides(row) or not (_has_answers(row) and _has_prompt(row)) else {**row, "winner": "tie"}


def what_it_is(row: _Row) -> str:
    """Names the shape of a row that holds no comparison, and what to do with it."""
    if "protocol" in row and "chosen" in row:
        return (
            "this is a pair that `mixfuse pairs build` wrote, for `mixfuse train judge`; name the data that it was "
            "built from"
        )
    if "responses" in row:
        return "this is a pool row; name it alone, or as a source with kind: pool"
    if isinstance(row.get("label"), bool) and "completion" in row:
        return "this is an answer with a thumb up or down (KTO); a comparison needs two answers to one prompt"
    if _has_answers(row) and _has_prompt(row):
        keys = " and ".join(_answer_keys(row))
        return (
            f"no pairs to judge: {keys} are two answers, but no column says which is better; add "
            f"{', '.join(_WINNERS[:2])} (A, B or tie)"
        )
    chat = "a chat to train on with `mixfuse train sft`"
    known = {
        "rejected_messages": "a better and a worse chat of ms-swift; write the last answer as 'rejected_response'",
        "messages": chat, "conversations": chat, "completion": chat, "output": chat,
        "response": "one answer to a prompt", "chosen": "a better answer without a 'rejected' one",
        "rejected": "a worse answer without a 'chosen' one", "text": "plain text",
    }  # fmt: skip
    keys = ", ".join(repr(key[:40]) for key in list(row)[:8]) or "none"
    words = next((words for key, words in known.items() if key in row), f"a row with the keys {keys}")
    return (
        f"no pairs to judge: this is {words}; a comparison has 'chosen' and 'rejected', or two answers and a winner, "
        "or several answers with scores (docs/data.md)"
    )


def _listed(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{name} must be a list, found {type(value).__name__}")
    return value


def _conflict(pair: Any) -> tuple[int, int]:
    if not isinstance(pair, list) or len(pair) != 2 or not all(type(place) is int for place in pair):
        raise ValueError(f"sampled_conflict_pairs must hold pairs of answers, as [0, 1]; found {str(pair)[:40]}")
    return pair[0], pair[1]


class _Reader:
    """Reads the rows of one file."""

    def __init__(self, file: str, most: int | None) -> None:
        self.found = Preferences()
        self._file, self._most = file, most
        self._single: dict[str, tuple[_Row, list[_Scored]]] = {}

    def add(self, row: _Row) -> None:
        """Reads one row; see `read`."""
        shape = _shape_of(row)
        if shape is None and _has_answers(row) and self.found.shapes[_TWO]:
            raise _LeftOut("rows without a label")  # in a table, an empty cell is an absent key
        if shape is None:
            raise ValueError(what_it_is(row))
        self.found.shapes[shape] += 1
        if weight := next((key for key in _WEIGHTS if row.get(key) not in (*_NOTHING, 1, "1")), None):
            raise ValueError(f"{weight!r} is not read, and would change what is learned; remove it from the rows")
        if any(row.get(key) not in _NOTHING for key in _PICTURES):
            raise _LeftOut("conversations with images or other parts that are no text")
        if any(row.get(key) not in _NOTHING for key in _TOOLS):
            raise _LeftOut("conversations with tools")
        self.found.pairs.extend(_SHAPES[shape][1](self, row))

    def end(self) -> None:
        """Pairs the answers that came in rows of their own."""
        for row, answers in self._single.values():
            if len(answers) < 2:
                self.found.left_out["prompts with one scored answer"] += 1
            self.found.pairs.extend(self._of_scores(row, answers))

    def chosen(self, row: _Row) -> list[Comparison]:
        """A better and a worse answer, as text or as messages."""
        question, good, bad = _split(row)
        benchmark: Benchmark | None = "rewardbench" if row.get("subset") in _REWARDBENCH_SUBSETS else None
        margin = _margin(row)
        more: dict[str, Any] = {"asked": question, "models": _models(row), "margin": margin, "benchmark": benchmark}
        return [self._by_hash(row, good, bad, tie=margin == 0, **more)]

    def lists(self, row: _Row) -> list[Comparison]:
        """Several better and several worse answers, as RewardBench 2 and RM-Bench have them."""
        good, bad = ([text_of(text) for text in row[key]] for key in ("chosen", "rejected"))
        if not good or not bad:
            raise ValueError("'chosen' and 'rejected' must each hold an answer")
        styles = len(good) == len(bad) == _RM_BENCH_STYLES and "domain" in row and "subset" not in row
        benchmark: Benchmark | None = "rmbench" if styles else "rewardbench2" if "subset" in row else None
        if (
            benchmark == "rewardbench2"
            and row["subset"] == TIES
            and str(row["id"]).partition(":")[0] not in ("ref", "tied")
        ):
            raise ValueError(f"the id {row['id']!r} of a row of the subset {TIES} must begin with 'ref:' or 'tied:'")
        return [
            self._by_hash(row, right, wrong, benchmark=benchmark, cell=(place, other) if styles else None)
            for place, right in enumerate(good)
            for other, wrong in enumerate(bad)
        ]

    def two(self, row: _Row) -> list[Comparison]:
        """Two answers, and a column that says which one won."""
        keys = _answer_keys(row)
        label, margin = _verdict(row)
        benchmark: Benchmark | None = None
        if keys[0] == "response_A" and "pair_id" in row:
            benchmark = "judgebench"
        elif keys[0] == "output_1" and "label" in row and "instruction" not in row:
            benchmark = "llmbar"
        elif keys[0] == "response_1" and "winner" in row and "question_id" in row:
            benchmark = "ppe"
        first, second = row[keys[0]], row[keys[1]]
        empty = next((key for key in keys if row[key] is None), None)
        if empty is not None:
            raise ValueError(f"{empty!r} holds no answer (null)")
        models = _models(row)
        if "winner_model_a" in row:  # a list of turns in JSON text, for the question and for each answer
            asked, first, second = _interleaved(row)
        elif keys[0] == "conversation_a":
            rounds = row.get("turn")
            most = 2 * rounds if isinstance(rounds, int) and rounds > 0 else None
            first, second = (_messages(_opened(side))[:most] for side in (first, second))
            asked, first, second = _last_answers(first, second)
        else:
            asked = _asked(row)
            first, second = _answer(first), _answer(second)
        if first == second and label != "tie":
            raise _LeftOut("equal answers")
        return [
            Comparison(
                first=first,
                second=second,
                label=label,
                models=models,
                margin=margin,
                **self._question(row, asked, benchmark),
            )
        ]

    def completions(self, row: _Row) -> list[Comparison]:
        """Several answers with scores, as UltraFeedback has them."""
        answers = [object_of(entry) for entry in row["completions"]]
        if not answers:
            raise _LeftOut("prompts without answers")
        # The overall scores of the public data are partly wrong; the ratings are not (argilla's cleaned version).
        fine = all(answer.get("fine-grained_score") is not None for answer in answers)
        key, scale = ("fine-grained_score", _RATING) if fine else ("overall_score", _OVERALL)
        scored = [
            _Scored(text_of(answer["response"]), _scaled(answer[key], key, *scale), _name(answer.get("model")))
            for answer in answers
        ]
        return self._of_scores(row, scored)

    def ranked(self, row: _Row) -> list[Comparison]:
        """Several answers in order, the best with the lowest rank or the highest score.

        Nectar has ranks, H4's pairs of Stack Exchange scores.
        """
        answers = [object_of(entry) for entry in row["answers"]]
        if not answers:
            raise _LeftOut("prompts without answers")
        text = next((key for key in ("answer", "text", "response") if all(key in one for one in answers)), None)
        key = next((key for key in ("rank", "score", "pm_score") if all(key in one for one in answers)), None)
        if text is None or key is None:
            raise ValueError("each entry of 'answers' needs 'answer' (a text), and 'rank' or 'score'")
        orders = [_number(answer[key], key) * (-1 if key == "rank" else 1) for answer in answers]
        scale = max(orders) - min(orders) or 1.0
        scored = [
            _Scored(text_of(answer[text]), (order - min(orders)) / scale, _name(answer.get("model")))
            for answer, order in zip(answers, orders, strict=True)
        ]
        return self._of_scores(row, scored)

    def single(self, row: _Row) -> list[Comparison]:
        """One answer with its score, as HelpSteer has them; those of one question are compared at the end."""
        key = next(key for key in _SCORED if key in row)
        score, low, high = _SCORED[key]
        _, answers = self._single.setdefault(as_question(_asked(row)), (row, []))
        answers.append(_Scored(text_of(row[key]), _scaled(row[score], score, low, high)))
        return []

    def best_of_k(self, row: _Row) -> list[Comparison]:
        """Many answers that are right or wrong, and the pairs of them that PPE compares."""
        scores = [_number(score, "scores", boolean=True) for score in row["scores"]]
        pairs = sorted(set(map(_conflict, _listed(row["sampled_conflict_pairs"], "sampled_conflict_pairs"))))
        found = []
        for a, b in pairs:
            if not (0 <= a < len(scores) and 0 <= b < len(scores)):
                raise ValueError(f"sampled_conflict_pairs names the answers {a} and {b} of {len(scores)}")
            if scores[a] == scores[b]:
                self.found.left_out["equal scores"] += 1
                continue
            better, worse = (a, b) if scores[a] > scores[b] else (b, a)
            texts = [text_of(row[f"response_{place + 1}"]) for place in (better, worse)]
            found.append(self._by_hash(row, *texts, benchmark="ppe"))
        return found

    def _of_scores(self, row: _Row, answers: Sequence[_Scored]) -> list[Comparison]:
        """Every two answers of a question, or as many as are wanted; equal scores are ties."""
        unique = {answer.text: answer for answer in reversed(answers)}
        if repeated := len(answers) - len(unique):
            self.found.left_out["equal answers"] += repeated
        pairs = []
        for a, b in combinations(reversed(unique.values()), 2):
            better, worse = (a, b) if a.score >= b.score else (b, a)
            models = (better.model, worse.model) if better.model and worse.model else None
            lead = better.score - worse.score
            pairs.append(self._by_hash(row, better.text, worse.text, models=models, margin=lead, tie=lead < 1e-9))
        if self._most is None or len(pairs) <= self._most:
            return pairs
        return sorted(pairs, key=lambda pair: pair_hash(pair.prompt, pair.better, pair.worse))[: self._most]

    def _by_hash(
        self,
        row: _Row,
        good: str,
        bad: str,
        *,
        asked: Sequence[Message] | None = None,
        benchmark: Benchmark | None = None,
        tie: bool = False,
        models: _Models = None,
        margin: float = 1.0,
        cell: tuple[int, int] | None = None,
    ) -> Comparison:
        """The pair; a hash of the texts puts the better answer first in half of all pairs."""
        if good == bad and not tie:
            raise _LeftOut("equal answers")
        question = self._question(row, _asked(row) if asked is None else asked, benchmark)
        return placed(
            str(question.pop("prompt")), good, bad, tie=tie, models=models, margin=margin, cell=cell, **question
        )

    def _question(self, row: _Row, asked: Sequence[Message], benchmark: Benchmark | None) -> dict[str, Any]:
        """What the pairs of a row have in common."""
        lone = len(asked) == 1 and asked[0]["role"] == "user"
        sources = [row.get(key) for key in _SOURCES]
        names = [row.get(key) for key in _IDS]
        own = next((name for name in names if isinstance(name, str | int) and name != ""), None)
        return {
            "prompt": as_question(asked),
            "conversation": None if lone else tuple(asked),
            "file": self._file,
            "source": next((source for source in sources if isinstance(source, str)), ""),
            "benchmark": benchmark,
            "item": sha256_json(row)[:16] if own is None else str(own),
        }


_REWARDBENCH_SUBSETS = frozenset(subset for section in REWARDBENCH_SECTIONS.values() for subset in section)

_TWO = "two answers with a winner"
# Shape → whether a row has it, and what reads it. The first that fits counts.
_SHAPES: dict[str, tuple[Callable[[_Row], bool], Callable[[_Reader, _Row], list[Comparison]]]] = {
    "chosen and rejected lists": (
        lambda row: "protocol" not in row and all(_is_texts(row.get(key)) for key in ("chosen", "rejected")),
        _Reader.lists,
    ),
    "chosen and rejected answers": (
        lambda row: _sides(row) is not None and "protocol" not in row,
        _Reader.chosen,
    ),
    "answers with conflict pairs": (
        lambda row: "sampled_conflict_pairs" in row and isinstance(row.get("scores"), list),
        _Reader.best_of_k,
    ),
    _TWO: (
        lambda row: _names_answers(row) and (_has_verdict(row) or not _has_answers(row)),
        _Reader.two,
    ),
    "scored completions": (lambda row: isinstance(row.get("completions"), list), _Reader.completions),
    "ranked answers": (lambda row: isinstance(row.get("answers"), list) and "responses" not in row, _Reader.ranked),
    "scored answers": (
        lambda row: any(key in row and score in row for key, (score, _, _) in _SCORED.items()),
        _Reader.single,
    ),
}


def _shape_of(row: _Row) -> str | None:
    return next((name for name, (fits, _) in _SHAPES.items() if fits(row)), None)


def placed(prompt: str, good: str, bad: str, *, tie: bool = False, models: _Models = None, **more: Any) -> Comparison:
    """The comparison of a better and a worse answer; a hash of the texts puts the better one first in half of them."""
    if int(pair_hash(prompt, good, bad)[-1], 16) % 2:
        return Comparison(prompt, good, bad, "tie" if tie else "first", models, **more)
    return Comparison(prompt, bad, good, "tie" if tie else "second", models and (models[1], models[0]), **more)


def pair_hash(*texts: str) -> str:
    """A hash of a pair's texts: choices by it are the same every time."""
    return hashlib.sha256("\0".join(texts).encode(errors="surrogatepass")).hexdigest()


# The columns of a row


def _plain(value: Any) -> Any:
    """A value of a table as JSON has it: binary text as text, and dates, decimals and other bytes as what they show.

    Such columns are never an answer, but they are part of the hash that stands for an id.
    """
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"bytes": hashlib.sha256(value).hexdigest()}
    return str(value)


def _sides(row: _Row) -> tuple[str, str] | None:
    """The keys of a better and a worse answer; `rejected_response` beside a chat is ms-swift's."""
    found = next((keys for keys in _SIDES if keys[0] in row and keys[1] in row), None)
    if found is None and "messages" in row and "rejected_response" in row:
        return "messages", "rejected_response"
    return found


def _names_answers(row: _Row) -> bool:
    """Whether a row has the key of an answer of a pair; `two` reports a missing second one."""
    return any(first in row for first, _ in _ANSWERS)


def _has_answers(row: _Row) -> bool:
    return any(first in row and second in row for first, second in _ANSWERS)


def _answer_keys(row: _Row) -> tuple[str, str]:
    whole = next((keys for keys in _ANSWERS if keys[0] in row and keys[1] in row), None)
    return whole or next(keys for keys in _ANSWERS if keys[0] in row)


def _has_prompt(row: _Row) -> bool:
    return any(row.get(key) is not None for key in _PROMPTS)


def _has_verdict(row: _Row) -> bool:
    return any(key in row for key in (*_WINNERS, "winner_model_a", *_NUMBERED, _ANNOTATORS[0]))


def _models(row: _Row) -> _Models:
    named = [(row.get(a), row.get(b)) for a, b in _MODELS]
    answers = [row[key] for key in _answer_keys(row)] if _has_answers(row) else []
    if answers and all(isinstance(answer, Mapping) for answer in answers):
        named.insert(0, (answers[0].get("model"), answers[1].get("model")))
    return next(((a, b) for a, b in named if isinstance(a, str) and isinstance(b, str) and a and b), None)


def _asked(row: _Row) -> list[Message]:
    """The conversation that the answers of a row answer."""
    key = next((key for key in _PROMPTS if row.get(key) is not None), None)
    if key is None:
        raise KeyError("prompt")
    value = _opened(row[key])
    if isinstance(value, Mapping) and isinstance(value.get("full_text"), str):  # WebGPT
        value = value["full_text"]
    if isinstance(value, Mapping) and "messages" in value:  # OpenAI's preference files
        if value.get("tools") not in _NOTHING:
            raise _LeftOut("conversations with tools")
        value = value["messages"]
    if isinstance(value, str) and not value.strip():
        raise _LeftOut("rows without a question")
    messages = _messages(value) if isinstance(value, list) else _spoken(text_of(value))
    if messages and key == "instruction" and isinstance(row.get("input"), str):
        text = row["input"].strip()
        messages[-1] = {
            **messages[-1],
            "content": f"{messages[-1]['content']}\n\n{text}" if text else messages[-1]["content"],
        }
    while messages and messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
        messages.pop()  # "Assistant:" at the end of a question is where the answer begins
    if not messages:
        raise ValueError(f"{key!r} is an empty question")
    return _with_system(row, messages)


def _with_system(row: _Row, messages: list[Message]) -> list[Message]:
    system = row.get("system", row.get("system_prompt"))
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def _split(row: _Row) -> tuple[list[Message], str, str]:
    """The conversation that a better and a worse answer have in common, and the two answers.

    Raises:
        _LeftOut: They answer different conversations.
    """
    keys = _sides(row)
    assert keys is not None  # noqa: S101 - the shape says so
    empty = next((key for key in keys if row[key] is None), None)
    if empty is not None:
        raise ValueError(f"{empty!r} holds no answer (null)")
    good, bad = (_side(row[key]) for key in keys)
    if keys[0] == "messages":  # the chat ends with the better answer
        bad = [*good[:-1], *bad]
    if len(good) == len(bad) == 1:
        if keys[0] == "messages" or not _has_prompt(row):
            raise ValueError("there is no question to the answers: neither a prompt nor a turn before them")
        return _asked(row), _last(good, keys[0]), _last(bad, keys[1])
    common = 0
    while common < min(len(good), len(bad)) - 1 and good[common] == bad[common]:
        common += 1
    if common != len(good) - 1 or common != len(bad) - 1:
        raise _LeftOut("answers to different conversations")
    asked = good[:common]
    given = row.get("prompt")
    if isinstance(given, list) and asked and asked[0]["role"] == "assistant":
        asked = [*_messages(given), *asked]
    return _with_system(row, asked), _last(good, keys[0]), _last(bad, keys[1])


def _side(value: Any) -> list[Message]:
    """An answer as messages: a text, one message, or a conversation that ends with it."""
    value = _opened(value)
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list):
        return _messages(value)
    text = text_of(value)
    return _spoken(text) if _SPEAKER.match(text) else [{"role": "assistant", "content": text}]


def _last(messages: Sequence[Message], name: str) -> str:
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError(f"{name!r} must end with an assistant's answer")
    return str(messages[-1]["content"])


def _last_answers(first: list[Message], second: list[Message]) -> tuple[list[Message], str, str]:
    """The conversation that two conversations have in common, and the last answer of each."""
    if len(first) != len(second) or not first or first[:-1] != second[:-1]:
        raise _LeftOut("answers to different conversations")
    if len(first) < 2:
        raise ValueError("a conversation needs a question and an answer")
    return first[:-1], _last(first, "conversation_a"), _last(second, "conversation_b")


def _interleaved(row: _Row) -> tuple[list[Message], str, str]:
    """The arena's lists of turns: the conversation in common, and the last answers."""
    prompts, first, second = (_turns(row[key], key) for key in ("prompt", "response_a", "response_b"))
    if not len(prompts) == len(first) == len(second) > 0:
        raise ValueError("prompt, response_a and response_b must hold as many turns")

    def conversation(answers: list[str]) -> list[Message]:
        pairs = zip(prompts, answers, strict=True)
        return [message for asked, said in pairs for message in _exchange(asked, said)]

    return _last_answers(conversation(first), conversation(second))


def _exchange(asked: str, said: str) -> list[Message]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


def _turns(value: Any, key: str) -> list[str]:
    try:
        turns = json.loads(value) if isinstance(value, str) and value.lstrip().startswith("[") else [value]
    except json.JSONDecodeError as error:
        raise ValueError(f"{key} is no JSON list of turns: {error.msg}") from None
    if not isinstance(turns, list):
        raise TypeError(f"{key} must be a list of turns")
    return [text_of(turn) if turn is not None else "" for turn in turns]


def _opened(value: Any) -> Any:
    """A value, unpacked where it is a JSON text of messages, as columns of Parquet and CSV files hold them."""
    if isinstance(value, str) and value.lstrip()[:2] in ("[{", "[\n"):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return value
        if (
            isinstance(parsed, list)
            and parsed
            and all(isinstance(entry, dict) for entry in parsed)
            and _is_turn(parsed[0])
        ):
            return parsed
    return value


def _is_turn(entry: Mapping[str, Any]) -> bool:
    return ("role" in entry and "content" in entry) or ("from" in entry and "value" in entry)


def _spoken(text: str) -> list[Message]:
    """A text as messages: HH-RLHF's turns of "Human:" and "Assistant:", or else one question."""
    if not _SPEAKER.match(text):
        return [{"role": "user", "content": text}]
    parts = _SPEAKER.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _messages(value: Any) -> list[Message]:
    """Messages in OpenAI's form, from its own or ShareGPT's, with text contents.

    Raises:
        _LeftOut: One holds an image, another part that is no text, or tool calls.
    """
    if not isinstance(value, list):
        raise TypeError(f"expected messages, found {type(value).__name__}")
    if value and _is_texts(value):
        raise TypeError("expected one text or messages, found a list of texts; write a row for each")
    messages: list[Message] = []
    for entry in map(object_of, value):
        if "role" not in entry and not ("from" in entry and "value" in entry):
            raise ValueError("a message has neither role and content nor from and value")
        named, content = (
            (entry.get("role"), entry.get("content")) if "role" in entry else (entry["from"], entry["value"])
        )
        role = _ROLES.get(str(named))
        if role is None:
            raise ValueError(f"a message has the unknown role {str(named)[:40]!r}")
        if entry.get("tool_calls") or role == "tool":
            raise _LeftOut("conversations with tool calls")
        if isinstance(content, list):
            parts = [object_of(part) for part in content]
            if any(part.get("type", "text") != "text" for part in parts):
                raise _LeftOut("conversations with images or other parts that are no text")
            content = "".join(text_of(part["text"]) for part in parts)
        messages.append({"role": role, "content": text_of(content)})
    return messages


# Labels and scores


def _verdict(row: _Row) -> tuple[Label, float]:
    """Which of a row's two answers won, and by how much (0 to 1)."""
    if "winner_model_a" in row:
        won = [label for label, name in _ARENA_COLUMNS if _bit(row[name], name)]
        if len(won) != 1:
            raise ValueError("one of winner_model_a, winner_model_b and winner_tie must be 1")
        return won[0], 1.0
    for key in ("overall_preference", "preference_strength"):
        if key in row:
            return _leaning(_number(row[key], key, -_STRONGEST, _STRONGEST) / -_STRONGEST)
    if "preference" in row and "output_1" in row:  # alpaca_eval: 1 to 2, and 0 or 1.5 for a tie
        if row["preference"] is None:
            raise _LeftOut("rows without a label")
        value = _number(row["preference"], "preference", 0, 2)
        if 0 < value < 1:
            raise ValueError(f"preference must be from 1 to 2, or 0 for a tie; found {value:g}")
        return _leaning(0.0 if value == 0 else 3 - 2 * value)
    if "score_0" in row:
        return _leaning(float(_number(row["score_0"], "score_0") - _number(row["score_1"], "score_1")))
    if "labels" in row and "human_ref_A" in row:  # SHP: 1 for A
        return ("first" if _bit(row["labels"], "labels") else "second"), 1.0
    if "better_response_id" in row:
        return ("second" if _bit(row["better_response_id"], "better_response_id") else "first"), 1.0
    named = next((name for name in _WINNERS if name in row), None)
    if named is None:
        return _majority([row[name] for name in _ANNOTATORS if name in row])
    if row[named] is None:
        raise _LeftOut("rows without a label")
    models = _models(row)
    label = _named(row[named], named, models)
    votes = row.get("votes")
    if isinstance(votes, str) and votes.lstrip().startswith(("[", "{")):
        try:
            votes = json.loads(votes)
        except json.JSONDecodeError as error:
            raise ValueError(f"votes is a text, but no JSON: {error.msg}") from None
    if label == "tie" or votes is None or votes in ([], {}):
        _tally(votes, models)
        return label, 1.0
    tally = _tally(votes, models)
    other: Label = "second" if label == "first" else "first"
    return label, (tally[label] - tally[other]) / max(1, tally.total())


def _leaning(lean: float) -> tuple[Label, float]:
    """A number above 0 for the first answer, below it for the second."""
    if lean == 0:
        return "tie", 1.0
    return ("first" if lean > 0 else "second"), min(1.0, abs(lean))


def _named(value: Any, key: str, models: _Models = None) -> Label:
    """What a label says: in the field's words, or by the name of the model that won."""
    if models is not None and models[0] != models[1] and value in models:
        return "first" if value == models[0] else "second"
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
    words = "" if number not in (1, 2) else f"{number:g}"
    if isinstance(value, str):
        words = re.sub(r"[\s_()]+", " ", value).strip().lower()
    if words not in _NAMED:
        either = "" if models is None else f", or {models[0][:40]!r} or {models[1][:40]!r} for the model"
        raise ValueError(f"{key} {str(value)[:40]!r} is no label; write A, B or tie{either}")
    return _NAMED[words]


def _tally(votes: Any, models: _Models = None) -> Counter[Label]:
    """Counts votes: a list of votes (A, B, tie; or 1, 2 and 0 for a tie), or the number of votes for each.

    A vote may also be the name of one of the two models.

    Raises:
        ValueError: A vote is none of these, or a number of votes is no whole number from 0.
    """
    tally: Counter[Label] = Counter()
    if votes is None:
        return tally
    if isinstance(votes, list):
        for vote in votes:
            zero = (vote == 0 and not isinstance(vote, bool)) or (isinstance(vote, str) and vote.strip() == "0")
            tally["tie" if zero else _named(vote, "the vote", models)] += 1
    elif isinstance(votes, Mapping):
        for name, count in votes.items():
            if count is not None:
                number = _number(count, f"the number of votes for {name!r}")
                if number < 0 or number != int(number):
                    raise ValueError(
                        f"the number of votes for {name!r} must be a whole number from 0, found {number:g}"
                    )
                tally["tie" if str(name).strip() == "0" else _named(name, "votes: the name", models)] += int(number)
    else:
        raise TypeError("votes must be a list of votes, or the numbers of votes for A, B and tie")
    return tally


def _majority(votes: Sequence[Any]) -> tuple[Label, float]:
    tally = _tally(list(votes))
    lead = tally["first"] - tally["second"]
    label: Label = (
        "tie"
        if lead == 0 or tally["tie"] >= max(tally["first"], tally["second"])
        else "first"
        if lead > 0
        else "second"
    )
    return label, 1.0 if label == "tie" else abs(lead) / max(1, tally.total())


def _margin(row: _Row) -> float:
    """How strong the preference of a better and a worse answer is; 0 for a tie."""
    scores = next(((row[a], row[b]) for a, b in _SCORES if row.get(a) is not None and row.get(b) is not None), None)
    if scores is None:
        return 1.0 if row.get("margin") is None else _number(row["margin"], "margin", 0, 1)
    high, low = (_number(score, "a score") for score in scores)
    if high < low:
        raise _LeftOut("rows whose scores say the opposite")
    # Ratings go up to 10; the scores of reward models have no scale.
    return (high - low) / _OVERALL[1] if 0 <= low <= high <= _OVERALL[1] else float(high > low)


def _scaled(value: Any, name: str, low: float, high: float) -> float:
    return (_number(value, name, low, high) - low) / (high - low)


def _number(value: Any, name: str, low: float = -math.inf, high: float = math.inf, *, boolean: bool = False) -> float:
    """A number, perhaps written as text.

    Raises:
        ValueError: It is none, not finite, or out of bounds.
    """
    number = math.nan
    if isinstance(value, int | float) and (boolean or not isinstance(value, bool)):
        number = float(value) if abs(value) < 1e300 else math.nan
    elif isinstance(value, str) and len(value) < 40:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a number, found {str(value)[:40]!r}")
    if not low <= number <= high:
        raise ValueError(f"{name} must be from {low:g} to {high:g}, found {number:g}")
    return number


def _bit(value: Any, name: str) -> bool:
    """0 or 1, as a number, a text or a boolean."""
    number = _number(value, name, 0, 1, boolean=True)
    if number not in (0, 1):
        raise ValueError(f"{name} must be 0 or 1, found {number:g}")
    return number == 1


def _name(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _answer(value: Any) -> str:
    """An answer: a text, an object with a text, or a message."""
    if isinstance(value, Mapping):
        return text_of(value["text"] if "text" in value else value["content"])
    if isinstance(value, list):
        return _last(_messages(value), "the answer")
    return text_of(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def object_of(value: Any) -> Mapping[str, Any]:
    """The value, which must be an object.

    Raises:
        TypeError: It is not.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"expected an object with a text, found {type(value).__name__}")
    return value


def text_of(value: object) -> str:
    """The value, which must be a text.

    Raises:
        TypeError: It is not.
    """
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {type(value).__name__}")
    return value
