"""The parity gate: does an adapter act in vLLM exactly as in training?

Log-probabilities of fixed prompts are computed with transformers and PEFT in float32, and compared with those of a
running engine under the same adapter. Greedy text would prove nothing: near ties flip (in bfloat16 even between runs),
and an adapter whose experts were silently dropped can still write the same words. The gate also measures the effect of
the adapter and of its experts alone, because an effect below the tolerance cannot be told from no effect.
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
_PROBE_TOKENS = 64  # stored of each prompt; enough to tell adapters apart in a small file
_CANDIDATES = 20  # top tokens that a verdict is read from: the most that OpenAI and vLLM return

EngineLogprobs = Callable[[list[int]], Awaitable[list[float]]]


@dataclass(frozen=True)
class Reference:
    """PEFT's results on the probes.

    Attributes:
        prompts: Token ids of each probe.
        logprobs: Log-probabilities under the adapter of each probe's tokens but the first, given those before, in nats.
        adapter_effect: Worst difference to the base model, in nats.
        expert_effect: Worst difference to the adapter without its experts, in nats; None if it trains none.
        verdicts: A judge's verdicts on comparisons in both orders.
    """

    prompts: list[list[int]]
    logprobs: list[list[float]]
    adapter_effect: float
    expert_effect: float | None
    verdicts: tuple[VerdictProbe, ...] = ()

    def probes(self) -> Probes:
        """The probes that a swap sends to an engine, with these results as the expected ones."""
        rows = zip(self.prompts, self.logprobs, strict=True)
        logprob_probes = [
            LogprobProbe(
                tokens=tokens[:_PROBE_TOKENS],
                logprobs=[round(value, 6) for value in logprobs[: _PROBE_TOKENS - 1]],
            )
            for tokens, logprobs in rows
        ]
        return Probes(tolerance=PARITY_TOLERANCE, logprobs=logprob_probes, verdicts=list(self.verdicts))


def reference(directory: Path, base: Path) -> Reference:
    """Computes the probes' log-probabilities with transformers and PEFT, float32, on the CPU.

    It uses the fused adapter that was trained (`peft/`) if the directory holds it. vLLM gets the per-expert one, so the
    comparison also covers the conversion.
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
    """The base with an adapter directory's adapter as it was trained, float32, on the CPU."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True, use_safetensors=True)
    source = directory / "peft" if (directory / "peft").is_dir() else directory
    return PeftModel.from_pretrained(plain, str(source)).eval()


def probe_prompts(tokenizer: Any) -> list[list[int]]:
    """The fixed prompts, as token ids: chats, a comparison, and plain texts."""
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    chats.append(judge_protocol.comparison(*COMPARISONS[0], nonce=_NONCE))
    return [_as_prompt(tokenizer, messages) for messages in chats] + [tokenizer(text).input_ids for text in TEXTS]


async def compare(expected: Reference, engine: EngineLogprobs, *, engine_name: str) -> Parity:
    """Compares an engine's log-probabilities of the probes with PEFT's; `check` passes or fails the result."""
    served = [await engine(prompt) for prompt in expected.prompts]
    return Parity(
        max_abs_logprob_difference=worst_difference(expected.logprobs, served),
        tolerance=PARITY_TOLERANCE,
        adapter_effect=expected.adapter_effect,
        expert_effect=expected.expert_effect,
        tokens=sum(map(len, expected.logprobs)),
        dtype="float32",
        engine=engine_name,
        platform=_platform(),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def check(directory: Path, parity: Parity, expected: Reference | None = None) -> None:
    """Passes or fails the gate.

    If it passes, the measured difference goes into the manifest, and PEFT's results into `probes.json`. A signed
    manifest is not changed.

    Args:
        directory: The adapter directory.
        parity: The result of `compare`.
        expected: PEFT's results, to store as probes.

    Raises:
        MixfuseError: The difference is above the tolerance, or the adapter (or its experts) changes so little that a
            dropped adapter could not be seen.
    """
    worst = parity.max_abs_logprob_difference
    if not worst <= parity.tolerance:
        dropped = ""
        if abs(worst - parity.adapter_effect) <= 0.1 * parity.adapter_effect:
            dropped = "; that is the effect of the whole adapter, so the engine seems to ignore it"
        elif parity.expert_effect and abs(worst - parity.expert_effect) <= 0.1 * parity.expert_effect:
            dropped = "; that is the effect of the experts, so the engine seems to ignore them"
        raise MixfuseError(
            f"{directory}: parity failed: log-probs in vLLM and PEFT differ by {worst:.2e}, more than "
            f"{parity.tolerance:.0e}{dropped}",
            kind="parity",
        )
    for part, effect in (("the adapter", parity.adapter_effect), ("its expert part", parity.expert_effect)):
        if effect is not None and effect <= parity.tolerance:
            raise MixfuseError(
                f"{directory}: parity cannot be judged: {part} changes log-probs by only {effect:.1e}, so an engine "
                "that ignored it would look the same; train longer",
                kind="parity",
            )
    manifest = read_manifest(directory)
    if manifest.signature is None:
        probes = expected.probes() if expected else None
        write_manifest(directory, manifest.model_copy(update={"parity": parity}), probes=probes)


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


@torch.no_grad()
def _verdicts(model: PeftModel, tokenizer: Any) -> Iterator[VerdictProbe]:
    """The judge's verdicts on `COMPARISONS` in both orders; those that cannot be read are left out."""
    chats = [
        judge_protocol.comparison(question, *pair, nonce=_NONCE)
        for question, first, second in COMPARISONS
        for pair in ((first, second), (second, first))
    ]
    prompts = [_as_prompt(tokenizer, messages) for messages in chats]
    for messages, prompt, row in zip(chats, prompts, _logits(model, prompts), strict=True):
        top = row[len(prompt) - 1].float().log_softmax(-1).topk(_CANDIDATES)
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
