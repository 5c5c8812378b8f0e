"""`fusion/auto` over HTTP on real answers: does the gateway do what the offline replay says, and what does it add?

    .venv/bin/python benchmarks/auto.py --data ../shared/data [--questions N] [--json]

The combiner is fitted on `train` of mmlu_pro_pool, four members. A mock pool replays their recorded answers over HTTP,
each at the price that the data's README assumes. Then

1. N questions (10 000) are asked of `fusion/auto`: who is asked, the answer, its confidence and its cost are compared
   with the offline replay, question by question, and the calls in the ledger with those that the mock saw;
2. 500 questions are asked with all members at once and random latencies: what is cancelled must be in the ledger;
3. time is measured against the same calls made by hand, in turn, question by question.

Ends with status 1 if anything differs.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import uvloop
from combiner import CODER, FLASH, LLAMA_70B, PRICES, PRO
from harness import Control, mock_upstream, open_session, process, table

from mixfuse.fusion.combiner.artefact import Combiner, save
from mixfuse.fusion.combiner.asking import policy_for
from mixfuse.fusion.combiner.evidence import Question, answer, read_pool, subset
from mixfuse.fusion.measure.combiner_fit import fit_combiner
from mixfuse.fusion.measure.combiner_replay import Asked, ask, expected_calibration_error
from mixfuse.fusion.measure.statistics import difference

MEMBERS = (PRO, FLASH, CODER, LLAMA_70B)
TARGETS = (0.75, 0.9)
AT_ONCE = 16
CANCELLING = 500
TIMED = 300


def config(upstream: str, folder: Path, combiner: Path) -> dict[str, Any]:
    """The gateway's config: an answer is one token at the mock, so its price is that of a million of them."""
    members = [
        {"name": name, "base_url": upstream, "model": name, "price": {"completion": PRICES[name]}} for name in MEMBERS
    ]
    return {
        "members": members,
        "combiner": str(combiner),
        "modes": {"agreement": "choice", "expose": "full"},
        "trace_db": str(folder / "traces.sqlite3"),
    }


def as_written(question: Question) -> Question:
    """The question with its answers read from their texts alone, as a gateway reads them; the data name choices."""
    answers = (answer(row.member, row.text, "choice", right=row.right) for row in question.answers)
    return replace(question, answers=tuple(answers))


def prompt(number: int, question: Question) -> str:
    """What is asked: the question, and the number by which the mock finds its answers."""
    return f"request-{number} {question.prompt}"


async def replay(session: Any, url: str, questions: Sequence[Question], **options: Any) -> list[dict[str, Any]]:
    """The gateway's answers to questions, in order; some are under way at once."""
    places = asyncio.Semaphore(AT_ONCE)
    done = 0

    async def one(number: int) -> dict[str, Any]:
        nonlocal done
        async with places:
            body = await _auto(session, url, number, questions[number], **options)
        done += 1
        if done % 1000 == 0:
            print(f"{done} of {len(questions)} questions", file=sys.stderr, flush=True)
        return body

    return await asyncio.gather(*(one(number) for number in range(len(questions))))


async def _auto(session: Any, url: str, number: int, question: Question, **options: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt(number, question)}]
    body = {"model": "fusion/auto", "messages": messages, "fusion": {"domain": question.domain, **options}}
    async with session.post(f"{url}/chat/completions", json=body) as response:
        found: dict[str, Any] = await response.json()
        if response.status != 200:
            raise SystemExit(f"error: HTTP {response.status}: {found}")
        return found


def compare(questions: Sequence[Question], bodies: Sequence[dict[str, Any]], offline: Sequence[Asked]) -> Counter[str]:
    """In how many questions the gateway differs from the offline replay, by what differs."""
    differing: Counter[str] = Counter()
    for question, body, wanted in zip(questions, bodies, offline, strict=True):
        fusion = body["fusion"]
        differing["members"] += tuple(fusion["asked"]) != wanted.members
        differing["confidence"] += abs(fusion["confidence"] - wanted.confidence) > 1e-9
        differing["cost"] += abs(fusion["cost"] * 1e6 - wanted.cost) > 1e-9
        differing["mark"] += right(question, body) != wanted.right
    return differing


def right(question: Question, body: dict[str, Any]) -> bool:
    """The mark of the answer that came back."""
    winner = body["fusion"]["winner"]
    member = next(row["member"] for row in body["fusion"]["candidates"] if row["candidate"] == winner)
    return bool(next(answer.right for answer in question.answers if answer.member == member))


async def ledger_faults(control: Control, bodies: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Compares the calls that the mock saw with those in the ledgers of the answers."""
    seen = await control.calls()
    by_request: dict[str, Counter[str]] = {}
    for call in seen:
        by_request.setdefault(call["tag"], Counter())[f"{call['model']} {call['end'] == 'answered'}"] += 1
    wrong = cancelled = 0
    for number, body in enumerate(bodies):
        entered = Counter(f"{call['member']} {call['outcome'] == 'ok'}" for call in body["fusion"]["calls"])
        cancelled += sum(call["outcome"] == "cancelled_straggler" for call in body["fusion"]["calls"])
        # The mock may have finished an answer that the gateway no longer waited for; who was called must agree.
        called = Counter(name.split()[0] for name in by_request.get(f"request-{number}", Counter()).elements())
        wrong += called != Counter(name.split()[0] for name in entered.elements())
        wrong += abs(sum(call["cost"] for call in body["fusion"]["calls"]) - body["fusion"]["cost"]) > 1e-12
    return {"calls": len(seen), "wrong ledgers": wrong, "cancelled": cancelled}


async def added(session: Any, url: str, upstream: str, questions: Sequence[Question]) -> dict[str, Any]:
    """Milliseconds that the gateway adds to the calls it makes: auto, and one member alone."""
    rows: dict[str, list[float]] = {"auto": [], "one member": []}

    async def by_hand(number: int, question: Question, members: Sequence[str]) -> float:
        began = time.perf_counter()
        for member in members:
            await _plain(session, upstream, member, number, question)
        return (time.perf_counter() - began) * 1000

    for number, question in enumerate(questions):
        began = time.perf_counter()
        body = await _auto(session, url, number, question, target=TARGETS[-1])
        took = (time.perf_counter() - began) * 1000
        rows["auto"].append(took - await by_hand(number, question, body["fusion"]["asked"]))
        began = time.perf_counter()
        await _plain(session, url, FLASH, number, question)
        took = (time.perf_counter() - began) * 1000
        rows["one member"].append(took - await by_hand(number, question, [FLASH]))
    return {
        name: {"p50": median(values), "p25": quantiles(values)[0], "p75": quantiles(values)[2]}
        for name, values in rows.items()
    }


async def _plain(session: Any, url: str, model: str, number: int, question: Question) -> None:
    messages = [{"role": "user", "content": prompt(number, question)}]
    async with session.post(f"{url}/chat/completions", json={"model": model, "messages": messages}) as response:
        await response.read()


async def measure(questions: Sequence[Question], unseen: int, combiner: Combiner) -> dict[str, Any]:
    """Runs everything; prints tables."""
    report: dict[str, Any] = {"questions": len(questions), "targets": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(combiner, folder / "combiner.json")
        with (folder / "answers.jsonl").open("w", encoding="utf-8") as answers:
            for number, question in enumerate(questions):
                texts = {answer.member: answer.text for answer in question.answers}
                answers.write(json.dumps({"tag": f"request-{number}", "texts": texts}) + "\n")
        with mock_upstream(folder, answers=folder / "answers.jsonl") as upstream:
            path = folder / "auto.yaml"
            path.write_text(json.dumps(config(upstream, folder, folder / "combiner.json")), encoding="utf-8")
            command = [sys.executable, "-m", "mixfuse", "gateway", str(path), "--port", "0"]
            with process(command, folder / "gateway.log") as (address, _):
                url = f"{address.removesuffix('/v1')}/v1"
                async with open_session() as session:
                    control = Control(session, upstream)
                    for target in TARGETS:
                        await control.set(log=True)
                        row = await _target((session, url, control), questions, unseen, combiner, target)
                        report["targets"].append(row)
                    await control.set(log=True, jitter=0.05)
                    some = questions[:CANCELLING]
                    bodies = await replay(session, url, some, target=TARGETS[0], width=len(MEMBERS))
                    report["cancelling"] = await ledger_faults(control, bodies)
                    await control.set()
                    report["added_ms"] = await added(session, url, upstream, questions[:TIMED])
    return report


async def _target(
    at: tuple[Any, str, Control], questions: Sequence[Question], unseen: int, combiner: Combiner, target: float
) -> dict[str, Any]:
    session, url, control = at
    policy = policy_for(combiner, target)
    assert policy is not None
    offline = [ask(combiner, policy, question) for question in questions]
    bodies = await replay(session, url, questions, target=target)
    marks = [float(right(question, body)) for question, body in zip(questions, bodies, strict=True)][:unseen]
    best = [
        float(any(answer.right and answer.member == combiner.best_member for answer in question.answers))
        for question in questions[:unseen]
    ]
    alone = combiner.members[combiner.best_member].price
    cost = sum(body["fusion"]["cost"] * 1e6 for body in bodies[:unseen]) / unseen / alone
    gain = difference([question.group for question in questions[:unseen]], marks, best)
    return {
        "target": target,
        "differing": dict(compare(questions, bodies, offline)),
        "ledger": await ledger_faults(control, bodies),
        "unseen": unseen,
        "accuracy": sum(marks) / unseen,
        "best_member_accuracy": sum(best) / unseen,
        "difference": gain.to_json(),
        "cost_ratio": cost,
        "ece": expected_calibration_error([body["fusion"]["confidence"] for body in bodies[:unseen]], marks),
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=10_000)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    arguments = parser.parse_args()
    train, agreement = read_pool([arguments.data / "mmlu_pro_pool" / "train.jsonl"])
    dev, _ = read_pool([arguments.data / "mmlu_pro_pool" / "dev.jsonl"])
    train, dev = subset(train, MEMBERS), subset(dev, MEMBERS)
    combiner = fit_combiner(train, agreement, {name: PRICES[name] for name in MEMBERS})
    both = [as_written(question) for question in (*dev, *train)]
    questions = [both[number % len(both)] for number in range(arguments.questions)]
    report = uvloop.run(measure(questions, min(len(dev), len(questions)), combiner))
    table(
        f"fusion/auto over HTTP, {len(questions)} questions; figures on the {report['targets'][0]['unseen']} of dev",
        [
            "target",
            "accuracy",
            "best member",
            "difference",
            "cost ratio",
            "ECE",
            "differ from offline",
            "wrong ledgers",
        ],
        [
            [
                row["target"],
                f"{row['accuracy']:.3f}",
                f"{row['best_member_accuracy']:.3f}",
                "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format_map(row["difference"]),
                f"{row['cost_ratio']:.2f}",
                f"{row['ece']:.3f}",
                sum(row["differing"].values()),
                f"{row['ledger']['wrong ledgers']} of {row['ledger']['calls']} calls",
            ]
            for row in report["targets"]
        ],
    )
    head = ["calls", "cancelled", "wrong ledgers"]
    table(f"All members at once, {CANCELLING} questions", head, [[report["cancelling"][name] for name in head]])
    table(
        "Added to the calls it makes, milliseconds",
        ["what", "p50", "p25 to p75"],
        [
            [name, f"{row['p50']:.2f}", f"{row['p25']:.2f} to {row['p75']:.2f}"]
            for name, row in report["added_ms"].items()
        ],
    )
    if arguments.json:
        print(json.dumps(report))
    faults = [report["cancelling"]["wrong ledgers"], *(sum(row["differing"].values()) for row in report["targets"])]
    faults += [row["ledger"]["wrong ledgers"] for row in report["targets"]]
    sys.exit(1 if any(faults) else 0)


if __name__ == "__main__":
    main()
