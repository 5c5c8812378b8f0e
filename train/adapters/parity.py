"""The parity gate: does an adapter act in vLLM exactly as in training?

Log-probabilities of fixed prompts are computed with transformers and PEFT in float32, and compared with those of a
running engine under the same adapter (`contracts/agreement.py`). Greedy text would prove nothing: near ties flip (in
bfloat16 even between runs), and an adapter whose experts were silently dropped can still write the same words. The gate
also measures the effect of the adapter and of its experts alone, because an effect below the tolerance cannot be told
from no effect.
"""

import platform
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from mixfuse.contracts import agreement, judge_protocol
from mixfuse.contracts.adapter import (
    PARITY_TOLERANCE,
    LogprobProbe,
    Measured,
    Parity,
    Probes,
    VerdictProbe,
    read_manifest,
    read_probes,
)
from mixfuse.contracts.agreement import (
    FIXED_PROMPTS,
    LENGTHS,
    REPEATED,
    Answers,
    Comparison,
    Rows,
    cut_lengths,
)
from mixfuse.contracts.errors import MixfuseError
from mixfuse.train.adapters.export import write_manifest
from mixfuse.train.adapters.layerwise import Alter, streams
from mixfuse.train.model.tokenizer import load_tokenizer

QUESTIONS = (
    "State the final answer to the following arithmetic problem: 14 + 29 =",
    'How many times does the letter "e" appear in the text: "three sleepy sheep"?',
    "Why is the sky blue?",
)
TEXTS = (
    "The quick brown fox jumps over the lazy dog, and the dog, who had seen it all before, went back to sleep.",
    "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)\n",
)

COMPARISONS = (
    (QUESTIONS[0], "43", "The answer is 33."),
    (QUESTIONS[1], "Four.", "Six."),
    (QUESTIONS[2], "Air scatters blue light more than red.", "It is a mirror of the sea."),
)
# What each word of a sentence of the long probes is chosen from.
_NAMES = ("river", "stone", "apple", "cloud", "tiger", "lamp", "winter", "door", "paper", "glass", "road", "summer")
_SENTENCE = (
    ("The", "A", "Every", "No", "This"),
    ("old", "green", "small", "third", "silver", "quiet", "last", "open"),
    _NAMES,
    ("holds", "finds", "sees", "moves", "makes", "keeps", "turns", "leaves", "draws", "meets"),
    tuple(str(number) for number in range(2, 90)),
    _NAMES,
    ("before", "after", "without", "because of", "near", "under"),
    ("noon", "Paris", "rain", "music", "the market", "its garden", "a letter", "somebody"),
)
_NONCE = "0a1b"
_TEXTS, _BEGINNINGS, _BEGINNING = 12, 12, 8  # repeated texts, what each stands behind, and the tokens of that
_PROBE_TOKENS = 64  # stored of each prompt; enough to tell adapters apart in a small file
_CANDIDATES = 20  # top tokens that a verdict is read from: the most that OpenAI and vLLM return

EngineLogprobs = Callable[[list[int]], Awaitable[list[float]]]


class Said(NamedTuple):
    """What an engine said of the probes.

    Attributes:
        answers: Its log-probabilities.
        verdicts: A judge's probabilities, of each comparison.
    """

    answers: Answers
    verdicts: Sequence[float] = ()


@dataclass(frozen=True)
class Reference:
    """PEFT's results on the probes.

    Attributes:
        prompts: Token ids of each probe.
        answers: Log-probabilities of each probe's tokens but the first, given those before, in nats.
        adapter_effect: Worst difference to the base model, in nats.
        expert_effect: Worst difference to the adapter without its experts, in nats; None if it trains none.
        verdicts: A judge's verdicts on comparisons in both orders.
    """

    prompts: list[list[int]]
    answers: Answers
    adapter_effect: float
    expert_effect: float | None
    verdicts: tuple[VerdictProbe, ...] = ()

    def within(self, length: int) -> "Reference":
        """The same for an engine in which a prompt may have no more than `length` tokens."""
        rows = [[row[: length - 1] for row in answers] for answers in self.answers]
        return replace(self, prompts=[prompt[:length] for prompt in self.prompts], answers=Answers(*rows))

    def without_repeats(self) -> "Reference":
        """The same without the texts behind several beginnings: float32 rounds too little to need them."""
        kept = agreement.once(self.prompts)
        rows = [[row[number] for number in kept] if row else [] for row in self.answers]
        return replace(self, prompts=[self.prompts[number] for number in kept], answers=Answers(*rows))

    @property
    def logprobs(self) -> list[list[float]]:
        """The log-probabilities under the adapter."""
        return [list(row) for row in self.answers.adapted]

    def probes(self, measured: Mapping[str, Said] | None = None) -> Probes:
        """The probes that a swap sends to an engine, with these results as the expected ones.

        Args:
            measured: What engines said, by number format.
        """
        sizes = [_stored(prompt) for prompt in self.prompts]
        return Probes(
            tolerance=PARITY_TOLERANCE,
            logprobs=stored_probes(self.prompts, self.answers),
            verdicts=list(self.verdicts),
            measured={
                precision: Measured(
                    logprobs=_cut(said.answers.adapted, sizes),
                    base=_cut(said.answers.base, sizes),
                    verdicts=[round(p, 6) for p in said.verdicts],
                )
                for precision, said in (measured or {}).items()
            },
        )


def stored_probes(prompts: list[list[int]], answers: Answers) -> list[LogprobProbe]:
    """The probes as they are stored: of the texts a beginning, of the long prompts all."""
    sizes = [_stored(prompt) for prompt in prompts]
    columns: list[list[list[float]]] = [_cut(rows, sizes) if rows else [[] for _ in prompts] for rows in answers]
    adapted, base, no_experts = columns
    return [
        LogprobProbe(tokens=prompt[:size], logprobs=said, base=of_base, no_experts=without)
        for prompt, size, said, of_base, without in zip(prompts, sizes, adapted, base, no_experts, strict=True)
    ]


def _stored(prompt: list[int]) -> int:
    """How many tokens of a prompt are stored: enough to tell adapters apart in a small file."""
    return len(prompt) if len(prompt) >= LENGTHS[1] else min(len(prompt), _PROBE_TOKENS)


def _cut(rows: Rows, sizes: list[int]) -> list[list[float]]:
    return [[round(value, 6) for value in row[: size - 1]] for row, size in zip(rows, sizes, strict=True)]


def reference(directory: Path, base: Path, *, length: int = LENGTHS[1], alter: Alter | None = None) -> Reference:
    """Computes the probes' log-probabilities with transformers and PEFT, float32, a layer at a time (`layerwise.py`).

    It uses the fused adapter that was trained (`peft/`) if the directory holds it. vLLM gets the per-expert one, so the
    comparison also covers the conversion.

    Args:
        directory: The adapter directory.
        base: The base model.
        length: The most tokens of a probe.
        alter: Changes the base's weights as they are read; None: none.
    """
    manifest = read_manifest(directory)
    tokenizer = load_tokenizer(base, manifest.recipe.get("chat_template"))
    prompts = probe_prompts(tokenizer, length)
    prompts += [prompt for prompt in repeated_prompts(tokenizer) if len(prompt) <= length]
    chats = comparisons() if manifest.judge_protocol == judge_protocol.describe() else []
    asked = [as_prompt(tokenizer, messages) for messages in chats]
    found = streams(directory, base, prompts + asked, alter=alter)
    count = len(prompts)
    adapted, unadapted = found.logprobs(found.adapted[:count], prompts), found.logprobs(found.base[:count], prompts)
    without = found.logprobs(found.no_experts[:count], prompts) if found.no_experts is not None else []
    last = [found.head(rows[-1:])[0] for rows in found.adapted[count:]]
    return Reference(
        prompts,
        Answers(adapted, unadapted, without),
        worst_difference(adapted, unadapted),
        worst_difference(adapted, without) if without else None,
        tuple(verdict_probes(chats, last, tokenizer)),
    )


def peft_model(directory: Path, base: Path) -> PeftModel:
    """The base with an adapter directory's adapter as it was trained, float32, on the CPU."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True, use_safetensors=True)
    source = directory / "peft" if (directory / "peft").is_dir() else directory
    return PeftModel.from_pretrained(plain, str(source)).eval()


def probe_prompts(tokenizer: Any, length: int = LENGTHS[1]) -> list[list[int]]:
    """The fixed prompts, as token ids: chats, a comparison, texts, `FIXED_PROMPTS`, and texts of `LENGTHS` tokens.

    Args:
        tokenizer: The base's.
        length: The most tokens of a prompt.
    """
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    chats.append(judge_protocol.comparison(*COMPARISONS[0], nonce=_NONCE))
    prompts = [as_prompt(tokenizer, messages) for messages in chats] + [tokenizer(text).input_ids for text in TEXTS]
    prompts += FIXED_PROMPTS
    for number, size in enumerate(cut_lengths(length)):
        prompts.append(tokenizer(_text(number, size)).input_ids[:size])
    return [prompt[:length] for prompt in prompts]


def repeated_prompts(tokenizer: Any) -> list[list[int]]:
    """Texts behind several beginnings, as token ids: they show what rounding hides (`agreement.rest`)."""
    beginnings = [tokenizer(_text(100 + number, _BEGINNING)).input_ids[:_BEGINNING] for number in range(_BEGINNINGS)]
    texts = [tokenizer(_text(200 + number, REPEATED + 1)).input_ids[1 : REPEATED + 1] for number in range(_TEXTS)]
    return [[*beginning, *text] for text in texts for beginning in beginnings]


def _text(number: int, words: int) -> str:
    """At least so many words, in sentences that cannot be foreseen from one another."""
    state, sentences = number + 1, []
    for _ in range(words // len(_SENTENCE) + 1):
        chosen = []
        for choices in _SENTENCE:
            state = (1103515245 * state + 12345) % (1 << 31)
            chosen.append(choices[(state >> 12) % len(choices)])
        sentences.append(" ".join(chosen) + ".")
    return " ".join(sentences)


async def measure(expected: Reference, engine: EngineLogprobs, base: EngineLogprobs | None = None) -> Answers:
    """An engine's log-probabilities of the probes.

    Args:
        expected: PEFT's results.
        engine: Asks for those under the adapter.
        base: Asks for those of the base; None: they are not measured.
    """
    adapted = [await engine(prompt) for prompt in expected.prompts]
    return Answers(adapted, [await base(prompt) for prompt in expected.prompts] if base else ())


async def compare(
    expected: Reference,
    engine: EngineLogprobs,
    *,
    engine_name: str,
    base: EngineLogprobs | None = None,
    precision: str = "float32",
) -> Parity:
    """Compares an engine's log-probabilities of the probes with PEFT's; `check` passes or fails the result.

    Raises:
        MixfuseError: As for `compared`.
    """
    said = await measure(expected, engine, base)
    return compared(expected, said, engine_name=engine_name, precision=precision)


def compared(expected: Reference, said: Answers, *, engine_name: str, precision: str = "float32") -> Parity:
    """The comparison of an engine's answers with PEFT's.

    Raises:
        MixfuseError: One of the engine's is no number, as from an overflow.
    """
    try:
        answers = expected.answers if said.base else expected.answers._replace(base=())
        found = agreement.compare(answers, said, expected.prompts)
    except MixfuseError as error:
        raise MixfuseError(f"parity failed: {engine_name}: {error}", kind="parity") from None
    return Parity(
        max_abs_logprob_difference=found.off.worst,
        tolerance=agreement.tolerance_in(precision, PARITY_TOLERANCE, base_known=found.drift is not None),
        adapter_effect=expected.adapter_effect,
        expert_effect=expected.expert_effect,
        tokens=sum(map(len, expected.answers.adapted)),
        dtype=precision,
        engine=engine_name,
        platform=_platform(),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        deviation=found.off,
        base_deviation=found.drift,
        shares=list(found.shares),
        rest=found.rest,
    )


def check(
    directory: Path,
    parity: Parity,
    expected: Reference | None = None,
    *,
    measured: Mapping[str, Said] | None = None,
) -> None:
    """Passes or fails the gate.

    If it passes, the comparison goes into the manifest, and PEFT's results into `probes.json`, where what engines of
    other number formats said of the same probes stays. A signed manifest is not changed.

    Args:
        directory: The adapter directory.
        parity: The result of `compare`.
        expected: PEFT's results, to store as probes.
        measured: What engines said, by number format, to store with them.

    Raises:
        MixfuseError: The difference is more than the engine's number format explains, or the adapter (or its experts)
            changes so little that a dropped adapter could not be seen.
    """
    check_agrees(directory, parity)
    manifest = read_manifest(directory)
    if manifest.signature is None:
        probes = _with_earlier(directory, expected.probes(measured)) if expected else None
        changes: dict[str, Any] = {"parity": parity}
        if probes:
            changes["effect"] = agreement.effect_in(probes.logprobs)
        write_manifest(directory, manifest.model_copy(update=changes), probes=probes)


def _with_earlier(directory: Path, probes: Probes) -> Probes:
    """The probes, and what engines of other number formats said of the same ones before."""
    try:
        earlier = read_probes(directory)
    except MixfuseError:  # it is replaced, whatever it holds
        return probes
    if earlier is None or _asked(earlier) != _asked(probes):
        return probes
    return probes.model_copy(update={"measured": {**earlier.measured, **probes.measured}})


def _asked(probes: Probes) -> tuple[list[list[int]], list[list[dict[str, str]]]]:
    return [probe.tokens for probe in probes.logprobs], [probe.messages for probe in probes.verdicts]


def check_agrees(directory: Path, parity: Parity) -> None:
    """Passes or fails the gate; nothing is written.

    Raises:
        MixfuseError: As for `check`.
    """
    worst = parity.max_abs_logprob_difference
    if parity.deviation is None:
        wrong = None if worst <= parity.tolerance else f"log-probs in vLLM and PEFT differ by {worst:.2e}"
    else:
        found = Comparison(parity.deviation, parity.base_deviation, parity.shares, parity.rest)
        wrong = agreement.fault(found, tolerance=parity.tolerance)
    if wrong:
        dropped = ""
        if abs(worst - parity.adapter_effect) <= 0.1 * parity.adapter_effect:
            dropped = "; that is the effect of the whole adapter, so the engine seems to ignore it"
        elif parity.expert_effect and abs(worst - parity.expert_effect) <= 0.1 * parity.expert_effect:
            dropped = "; that is the effect of the experts, so the engine seems to ignore them"
        raise MixfuseError(f"{directory}: parity failed in {parity.dtype}: {wrong}{dropped}", kind="parity")
    for part, effect in (("the adapter", parity.adapter_effect), ("its expert part", parity.expert_effect)):
        if effect is not None and effect <= parity.tolerance:
            raise MixfuseError(
                f"{directory}: parity cannot be judged: {part} changes log-probs by only {effect:.1e}, so an engine "
                "that ignored it would look the same; train longer",
                kind="parity",
            )
    if unsure := next((share for share in parity.shares if agreement.unsure(share)), None):
        raise MixfuseError(
            f"{directory}: parity cannot be judged in {parity.dtype}: the engine shows {unsure}, so one that ignored "
            "it could look the same; train longer, or serve in a more precise format",
            kind="parity",
        )


@torch.no_grad()
def logprobs(model: Any, prompts: list[list[int]]) -> list[list[float]]:
    """Each prompt's log-probabilities of its tokens but the first, each given those before it, in nats.

    All prompts make one pass: PEFT builds every expert's whole delta weight in each.
    """
    logits = _logits(model, prompts)
    result = []
    for row, prompt in zip(logits, prompts, strict=True):
        scores = row[: len(prompt) - 1].float().log_softmax(-1)
        result.append(scores.gather(-1, torch.tensor(prompt)[1:, None])[:, 0].tolist())
    return result


def _logits(model: Any, prompts: list[list[int]]) -> torch.Tensor:
    """The logits of prompts of several lengths: (prompts, tokens of the longest, vocabulary).

    They are filled up on the right, where no token of a causal model looks; what stands there is to be ignored.
    """
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        mask[row, : len(prompt)] = 1
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits


def comparisons() -> list[list[dict[str, str]]]:
    """`COMPARISONS` as a judge's chats, in both orders."""
    return [
        judge_protocol.comparison(question, *pair, nonce=_NONCE)
        for question, first, second in COMPARISONS
        for pair in ((first, second), (second, first))
    ]


def verdict_probes(
    chats: list[list[dict[str, str]]], logits: list[torch.Tensor], tokenizer: Any
) -> Iterator[VerdictProbe]:
    """The judge's verdicts on chats, from the logits of the first token; those that cannot be read are left out."""
    for messages, row in zip(chats, logits, strict=True):
        top = row.float().log_softmax(-1).topk(_CANDIDATES)
        spelled = [tokenizer.decode([token]) for token in top.indices.tolist()]
        p = judge_protocol.read_verdict(dict(zip(spelled, top.values.tolist(), strict=True)))
        if p is not None:
            yield VerdictProbe(messages=messages, p=round(p, 6))


def as_prompt(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """The token ids of a chat."""
    ids: list[int] = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return ids


def _platform() -> str:
    """This machine, on which both sides ran: the engine is a child of this process."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{platform.system()} {platform.machine()}, {device}"


def worst_difference(first: list[list[float]], second: list[list[float]]) -> float:
    """The largest absolute difference of two lists of log-probabilities; NaN if either holds NaN.

    Raises:
        MixfuseError: Their lengths differ.
    """
    if [len(row) for row in first] != [len(row) for row in second]:
        raise MixfuseError("the engine returned another number of tokens than were sent", kind="parity")
    left, right = (torch.tensor([value for row in rows for value in row]) for rows in (first, second))
    return float((left - right).abs().max())  # a tensor's max, unlike Python's, returns NaN
