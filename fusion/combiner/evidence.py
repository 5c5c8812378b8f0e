"""Evidence: what is known of one question's answers before anyone weighs them.

A class is a set of equal answers. Its evidence is which members gave it and how they wrote it. Texts are read once,
here; the weighing (`artefact.py`) and the fit (`fit.py`) see classes only.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import iter_jsonl, sha256_json
from mixfuse.fusion.answering.agreement import readings
from mixfuse.fusion.answering.strengths import Comparison
from mixfuse.fusion.config import Agreement

UNREAD = ""
"""The class key of an answer in which nothing could be read. Two such answers are never equal."""


@dataclass(frozen=True)
class Answer:
    """One answer of one member.

    Attributes:
        member: The member's name.
        key: What the answer says: answers with equal keys are equal. `UNREAD` where nothing could be read.
        doubtful: The answer was cut, names several results, or its reading is contested.
        length: The natural logarithm of one plus its characters.
        right: The mark, where there is one.
        text: The answer itself; empty where only its key is known.
    """

    member: str
    key: str
    doubtful: bool = False
    length: float = 0.0
    right: bool | None = None
    text: str = ""


@dataclass(frozen=True)
class Question:
    """One question and the answers given to it.

    Attributes:
        id: Names the question in messages.
        answers: In the order in which they came.
        domain: The kind of question, where it is known.
        comparisons: What judges said.
        propensities: Member → the probability with which it was asked; a member that is not named was asked for sure.
        prompt: What was asked; empty where it is not known.
    """

    id: str
    answers: tuple[Answer, ...]
    domain: str | None = None
    comparisons: tuple[Comparison, ...] = ()
    propensities: Mapping[str, float] = field(default_factory=dict)
    prompt: str = ""

    @property
    def group(self) -> str:
        """What rows that belong together share: the prompt, where it is known, else the id."""
        return self.prompt or self.id


def read(text: str, how: Agreement, *, choice: str | None = None, cut: bool = False) -> tuple[str, bool]:
    """Reads what an answer says.

    Args:
        text: The answer.
        how: What makes two answers equal.
        choice: What the source of the answer read in it, where it says so. It is taken for the answer.
        cut: The answer ended at a token limit.

    Returns:
        Its class key, `UNREAD` where nothing could be read, and whether that reading is doubtful: the answer was cut,
        or its first, its last and the source's reading are not all the same.
    """
    keys = readings(text, how)
    key = choice if choice is not None else (keys[-1] if keys else UNREAD)
    agreed = bool(keys) and keys[0] == keys[-1] == key
    return key, cut or (key != UNREAD and not agreed)


def answer(
    member: str,
    text: str,
    how: Agreement,
    *,
    choice: str | None = None,
    cut: bool = False,
    right: bool | None = None,
) -> Answer:
    """Makes an `Answer` of a text; see `read` for the arguments."""
    key, doubtful = read(text, how, choice=choice, cut=cut)
    return Answer(member, key, doubtful, math.log1p(len(text)), right, text)


def read_pool(
    paths: Iterable[Path], how: Agreement | None = None, *, limit: int | None = None
) -> tuple[list[Question], Agreement]:
    """Reads recorded pools: `{id, prompt, responses: [{model, text, correct?, choice?}], domain?, verdicts?}` a line.

    `traces export` puts answers without a mark under `unmarked`; they come after the others. A verdict is
    `{judge?, first, second, score}`: two answers' places, and the probability that the first is better, averaged over
    both orders.

    Args:
        paths: JSONL files, as `pool collect` and `traces export` write them.
        how: What makes two answers equal; None to work it out from the rows: `choice` where the answers carry
            one, `number` where every reference that there is comes to a number, else `exact`.
        limit: Read only this many rows of each file.

    A row that stands there twice, word for word, counts once.

    Raises:
        MixfuseError: A row has another shape, or an id stands for two different rows (the message names file and
            line), or there are none.
    """
    rows: list[tuple[str, dict[str, Any]]] = []
    contents: set[str] = set()
    of_id: dict[str, str] = {}
    for path in paths:
        for number, row in islice(iter_jsonl(path), limit):
            place, content = f"{path}:{number}", sha256_json(row)
            if content in contents and (row.get("id") is not None or row.get("prompt")):
                continue
            if row.get("id") is not None and (earlier := of_id.setdefault(str(row["id"]), place)) != place:
                raise MixfuseError(
                    f"{place}: the id {str(row['id'])[:80]!r} is that of {earlier}, too, with other content; give "
                    "each question an id of its own, with all its answers in one row"
                )
            contents.add(content)
            rows.append((place, row))
    if not rows:
        raise MixfuseError(f"{', '.join(map(str, paths))}: there are no rows")
    how = how or _agreement_of([row for _, row in rows])
    return [_question(place, row, how) for place, row in rows], how


def members_of(questions: Sequence[Question]) -> list[str]:
    """Every member that answered, in the order of first appearance."""
    return list(dict.fromkeys(answer.member for question in questions for answer in question.answers))


def subset(questions: Sequence[Question], members: Sequence[str]) -> list[Question]:
    """The questions with the answers of some members only, and the comparisons between those."""
    wanted = set(members)
    result = []
    for question in questions:
        places = [place for place, answer in enumerate(question.answers) if answer.member in wanted]
        new = {place: number for number, place in enumerate(places)}
        comparisons = tuple(
            replace(comparison, first=new[comparison.first], second=new[comparison.second])
            for comparison in question.comparisons
            if comparison.first in new and comparison.second in new
        )
        if places:
            answers = tuple(question.answers[place] for place in places)
            result.append(replace(question, answers=answers, comparisons=comparisons))
    return result


def _agreement_of(rows: Sequence[dict[str, Any]]) -> Agreement:
    lists = (found for row in rows if isinstance(found := row.get("responses"), list))
    responses = [response for found in lists for response in found if isinstance(response, dict)]
    if any(isinstance(response.get("choice"), str) for response in responses):
        return "choice"
    references = [reference for row in rows if (reference := row.get("reference")) not in (None, "")]
    numeric = [isinstance(reference, str) and _is_number(reference) for reference in references]
    return "number" if numeric and all(numeric) else "exact"


def _is_number(text: str) -> bool:
    """Whether a reference comes to a number: as a whole, or in its last line, as GSM8K's solutions do."""
    lines = text.strip().splitlines() or [""]
    last = lines[-1].rpartition(":")[2].replace("####", "").replace(",", "").replace("$", "").strip()
    try:
        return math.isfinite(float(last))
    except ValueError:
        return False


def _question(place: str, row: dict[str, Any], how: Agreement) -> Question:
    responses = row.get("responses")
    if not isinstance(responses, list) or not responses:
        raise MixfuseError(f"{place}: no pool row: it needs 'responses', a list of answers")
    unmarked = row.get("unmarked") or []
    if not isinstance(unmarked, list):
        raise MixfuseError(f"{place}: 'unmarked' must be a list of answers")
    answers = tuple(_answer(place, response, how) for response in (*responses, *unmarked))
    domain = row.get("domain")
    if domain is not None and not isinstance(domain, str):
        raise MixfuseError(f"{place}: 'domain' must be text")
    verdicts = row.get("verdicts") or []
    if not isinstance(verdicts, list):
        raise MixfuseError(f"{place}: 'verdicts' must be a list")
    comparisons = tuple(_comparison(place, verdict, len(answers)) for verdict in verdicts)
    propensities = row.get("propensities") or {}
    if not isinstance(propensities, dict) or not all(
        isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
        for value in propensities.values()
    ):
        raise MixfuseError(f"{place}: 'propensities' must map members to probabilities above 0, at most 1")
    prompt = row.get("prompt")
    return Question(
        str(row.get("id", place)), answers, domain, comparisons, propensities, prompt if isinstance(prompt, str) else ""
    )


def _answer(place: str, response: Any, how: Agreement) -> Answer:
    match response:
        case {"model": str(member), "text": str(text)}:
            pass
        case _:
            raise MixfuseError(f"{place}: an answer needs 'model' and 'text'")
    choice, right = response.get("choice"), response.get("correct")
    if choice is not None and not isinstance(choice, str):
        raise MixfuseError(f"{place}: 'choice' of {member} must be text")
    if right is not None and not isinstance(right, bool):
        raise MixfuseError(f"{place}: 'correct' of {member} must be true or false, or absent (got {str(right)[:40]!r})")
    if "choice" in response and choice is None:  # the source looked and found none
        return Answer(member, UNREAD, True, math.log1p(len(text)), right, text)
    key = None if choice is None else f"{how} {choice}"
    return answer(member, text, how, choice=key, cut=response.get("finish_reason") == "length", right=right)


def _comparison(place: str, verdict: Any, answers: int) -> Comparison:
    match verdict:
        case {"first": int(first), "second": int(second), "score": int() | float() as score} if (
            0 <= first < answers and 0 <= second < answers and first != second and 0 <= score <= 1
        ):
            clipped = min(1 - 1e-4, max(1e-4, float(score)))
            return Comparison(str(verdict.get("judge", "judge")), first, second, math.log(clipped / (1 - clipped)))
    raise MixfuseError(f"{place}: a verdict needs 'first', 'second' (two answers' places) and 'score' from 0 to 1")
