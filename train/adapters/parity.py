"""The parity gate: does an adapter do in vLLM exactly what it did in training?

Log-probabilities of fixed prompts are computed with transformers and PEFT in float32 and compared with those of a
running engine under the same adapter. Greedy text would be no proof: near ties flip (in bfloat16 by themselves), and
an adapter whose experts were silently dropped can still write the same words. The gate also measures what the adapter,
and its experts alone, change: an adapter that changes less than the tolerance could not be told from the base.
"""

import platform
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from mixfuse.contracts import judge_protocol
from mixfuse.contracts.adapter import PARITY_TOLERANCE, LogprobProbe, Parity, Probes, VerdictProbe, read_manifest
from mixfuse.contracts.errors import MixfuseError
from mixfuse.train.adapters.export import write_manifest
from mixfuse.train.model.load import load_tokenizer

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
_NONCE = "0a1b"
_PROBE_TOKENS = 64  # of each prompt; enough to tell adapters apart, and the file stays small
_CANDIDATES = 20  # the tokens a verdict is read from: the most that OpenAI and vLLM give

EngineLogprobs = Callable[[list[int]], Awaitable[list[float]]]


@dataclass(frozen=True)
class Reference:
    """What PEFT says of the probes.

    Attributes:
        prompts: Token ids of each probe.
        logprobs: Of each probe's tokens but the first, given those before, in nats; under the adapter.
        adapter_effect: Worst difference to the base model, in nats.
        expert_effect: Worst difference to the adapter without its experts; None where it trains none.
        verdicts: A judge's, on comparisons in both orders.
    """

    prompts: list[list[int]]
    logprobs: list[list[float]]
    adapter_effect: float
    expert_effect: float | None
    verdicts: tuple[VerdictProbe, ...] = ()

    def probes(self) -> Probes:
        """What a swap asks an engine, with these answers."""
        rows = zip(self.prompts, self.logprobs, strict=True)
        kept = [
            LogprobProbe(
                tokens=tokens[:_PROBE_TOKENS],
                logprobs=[round(value, 6) for value in logprobs[: _PROBE_TOKENS - 1]],
            )
            for tokens, logprobs in rows
        ]
        return Probes(tolerance=PARITY_TOLERANCE, logprobs=kept, verdicts=list(self.verdicts))


def reference(directory: Path, base: Path) -> Reference:
    """Computes the probes' log-probabilities with transformers and PEFT, float32, on the CPU.

    The fused adapter that was trained (`peft/`) is used where the directory holds it; what vLLM gets is the per-expert
    one, so the comparison covers the conversion too.
    """
    tokenizer = load_tokenizer(base)
    prompts = probe_prompts(tokenizer)
    model = peft_model(directory, base)
    adapted = logprobs(model, prompts)
    verdicts: tuple[VerdictProbe, ...] = ()
    if read_manifest(directory).judge_protocol == judge_protocol.describe():
        verdicts = tuple(_verdicts(model, tokenizer))
    with model.disable_adapter():
        unadapted = logprobs(model, prompts)
    expert_effect = None
    experts = [p for name, p in model.named_parameters() if ".mlp.experts." in name and ".lora_B." in name]
    if experts:
        with torch.no_grad():
            for parameter in experts:
                parameter.zero_()
        expert_effect = worst_difference(adapted, logprobs(model, prompts))
    return Reference(prompts, adapted, worst_difference(adapted, unadapted), expert_effect, verdicts)


def peft_model(directory: Path, base: Path) -> PeftModel:
    """The base under an adapter directory's adapter as it was trained, float32, on the CPU."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True, use_safetensors=True)
    source = directory / "peft" if (directory / "peft").is_dir() else directory
    return PeftModel.from_pretrained(plain, str(source)).eval()


def probe_prompts(tokenizer: Any) -> list[list[int]]:
    """The fixed prompts, as token ids: chats, a comparison, and plain texts."""
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    chats.append(judge_protocol.comparison(*COMPARISONS[0], nonce=_NONCE))
    return [_as_prompt(tokenizer, messages) for messages in chats] + [tokenizer(text).input_ids for text in TEXTS]


async def compare(wanted: Reference, engine: EngineLogprobs, *, engine_name: str) -> Parity:
    """Asks the engine for the probes' log-probabilities and compares; raises nothing, `check` judges the result."""
    served = [await engine(prompt) for prompt in wanted.prompts]
    return Parity(
        max_abs_logprob_difference=worst_difference(wanted.logprobs, served),
        tolerance=PARITY_TOLERANCE,
        adapter_effect=wanted.adapter_effect,
        expert_effect=wanted.expert_effect,
        tokens=sum(map(len, wanted.logprobs)),
        dtype="float32",
        engine=engine_name,
        platform=_platform(),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def check(directory: Path, parity: Parity, wanted: Reference | None = None) -> None:
    """Passes or fails the gate.

    When it passes, the figure goes into the manifest, and what was asked of PEFT into `probes.json`. A signed manifest
    stays as whoever signed it left it.

    Args:
        directory: The adapter directory.
        parity: What was measured.
        wanted: What PEFT said, to store as probes.

    Raises:
        MixfuseError: The difference is above the tolerance, or the adapter (or its experts) changes so little that a
            dropped adapter could not be seen.
    """
    worst = parity.max_abs_logprob_difference
    if not worst <= parity.tolerance:
        dropped = ""
        if abs(worst - parity.adapter_effect) <= 0.1 * parity.adapter_effect:
            dropped = "; that is what the whole adapter changes, so the engine seems to ignore it"
        elif parity.expert_effect and abs(worst - parity.expert_effect) <= 0.1 * parity.expert_effect:
            dropped = "; that is what the experts change, so the engine seems to ignore them"
        raise MixfuseError(
            f"{directory}: parity failed: log-probs in vLLM and PEFT differ by {worst:.2e}, more than "
            f"{parity.tolerance:.0e}{dropped}",
            kind="parity",
        )
    for what, effect in (("the adapter", parity.adapter_effect), ("its expert part", parity.expert_effect)):
        if effect is not None and effect <= parity.tolerance:
            raise MixfuseError(
                f"{directory}: parity cannot be judged: {what} changes log-probs by only {effect:.1e}, so an engine "
                "that ignored it would look the same; train longer",
                kind="parity",
            )
    manifest = read_manifest(directory)
    if manifest.signature is None:
        probes = wanted.probes() if wanted else None
        write_manifest(directory, manifest.model_copy(update={"parity": parity}), probes=probes)


@torch.no_grad()
def logprobs(model: Any, prompts: list[list[int]]) -> list[list[float]]:
    """Each prompt's log-probabilities of its tokens but the first, each given those before it, in nats."""
    result = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        scores = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        result.append(scores.gather(-1, ids[0, 1:, None])[:, 0].tolist())
    return result


@torch.no_grad()
def _verdicts(model: PeftModel, tokenizer: Any) -> Iterator[VerdictProbe]:
    """The judge's verdicts on `COMPARISONS` in both orders; those that cannot be read are left out."""
    for question, first, second in COMPARISONS:
        for pair in ((first, second), (second, first)):
            messages = judge_protocol.comparison(question, *pair, nonce=_NONCE)
            ids = torch.tensor([_as_prompt(tokenizer, messages)])
            top = model(input_ids=ids).logits[0, -1].float().log_softmax(-1).topk(_CANDIDATES)
            spelled = [tokenizer.decode([token]) for token in top.indices.tolist()]
            p = judge_protocol.read_verdict(dict(zip(spelled, top.values.tolist(), strict=True)))
            if p is not None:
                yield VerdictProbe(messages=messages, p=round(p, 6))


def _as_prompt(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return ids


def _platform() -> str:
    """The machine both sides ran on: the engine is a child of this process."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{platform.system()} {platform.machine()}, {device}"


def worst_difference(one: list[list[float]], other: list[list[float]]) -> float:
    """The largest absolute difference of two answers; NaN where either holds one.

    Raises:
        MixfuseError: They are not of equally many tokens.
    """
    if [len(row) for row in one] != [len(row) for row in other]:
        raise MixfuseError("the engine returned another number of tokens than were sent", kind="parity")
    left, right = (torch.tensor([value for row in rows for value in row]) for rows in (one, other))
    return float((left - right).abs().max())  # a tensor's max, unlike Python's, does not pass over NaN
