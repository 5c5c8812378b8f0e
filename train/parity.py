"""The parity gate: does an adapter do in vLLM exactly what it did in training?

Log-probabilities of fixed prompts are computed with transformers and PEFT in float32 and compared with those of a
running engine under the same adapter. Greedy text would be no proof: near ties flip (in bfloat16 by themselves), and
an adapter whose experts were silently dropped can still write the same words. The gate also measures what the adapter,
and its experts alone, change: an adapter that changes less than the tolerance could not be told from the base.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import MixtralForCausalLM

from mixfuse import judge_protocol
from mixfuse.adapter import PARITY_TOLERANCE, Parity, read_manifest
from mixfuse.errors import MixfuseError
from train.export import write_manifest
from train.model import load_tokenizer

QUESTIONS = (
    "State the final answer to the following arithmetic problem: 14 + 29 =",
    'How many times does the letter "e" appear in the text: "three sleepy sheep"?',
    "Why is the sky blue?",
)
TEXTS = (
    "The quick brown fox jumps over the lazy dog, and the dog, who had seen it all before, went back to sleep.",
    "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)\n",
)

EngineLogprobs = Callable[[list[int]], Awaitable[list[float]]]


@dataclass(frozen=True)
class Reference:
    """What PEFT says of the probes.

    Attributes:
        prompts: Token ids of each probe.
        logprobs: Of each probe's tokens but the first, given those before, in nats; under the adapter.
        adapter_effect: Worst difference to the base model, in nats.
        expert_effect: Worst difference to the adapter without its experts; None where it trains none.
    """

    prompts: list[list[int]]
    logprobs: list[list[float]]
    adapter_effect: float
    expert_effect: float | None


def reference(directory: Path, base: Path) -> Reference:
    """Computes the probes' log-probabilities with transformers and PEFT, float32, on the CPU.

    The fused adapter that was trained (`peft/`) is used where the directory holds it; what vLLM gets is the per-expert
    one, so the comparison covers the conversion too.
    """
    tokenizer = load_tokenizer(base)
    prompts = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        for messages in _chats()
    ] + [tokenizer(text).input_ids for text in TEXTS]
    plain = MixtralForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True, use_safetensors=True)
    source = directory / "peft" if (directory / "peft").is_dir() else directory
    model = PeftModel.from_pretrained(plain, str(source)).eval()
    adapted = _logprobs(model, prompts)
    with model.disable_adapter():
        unadapted = _logprobs(model, prompts)
    expert_effect = None
    experts = [p for name, p in model.named_parameters() if ".mlp.experts." in name and ".lora_B." in name]
    if experts:
        with torch.no_grad():
            for parameter in experts:
                parameter.zero_()
        expert_effect = _worst(adapted, _logprobs(model, prompts))
    return Reference(prompts, adapted, _worst(adapted, unadapted), expert_effect)


async def compare(wanted: Reference, engine: EngineLogprobs, *, engine_name: str) -> Parity:
    """Asks the engine for the probes' log-probabilities and compares; raises nothing, `check` judges the result."""
    served = [await engine(prompt) for prompt in wanted.prompts]
    return Parity(
        max_abs_logprob_difference=_worst(wanted.logprobs, served),
        tolerance=PARITY_TOLERANCE,
        adapter_effect=wanted.adapter_effect,
        expert_effect=wanted.expert_effect,
        tokens=sum(map(len, wanted.logprobs)),
        dtype="float32",
        engine=engine_name,
    )


def check(directory: Path, parity: Parity) -> None:
    """Passes or fails the gate; the figure goes into the manifest when it passes.

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
    write_manifest(directory, read_manifest(directory).model_copy(update={"parity": parity}))


def _chats() -> list[list[dict[str, str]]]:
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    chats.append(judge_protocol.comparison(QUESTIONS[0], "43", "The answer is 33.", nonce="0a1b"))
    return chats


@torch.no_grad()
def _logprobs(model: PeftModel, prompts: list[list[int]]) -> list[list[float]]:
    result = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        logprobs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        result.append(logprobs.gather(-1, ids[0, 1:, None])[:, 0].tolist())
    return result


def _worst(one: list[list[float]], other: list[list[float]]) -> float:
    if [len(row) for row in one] != [len(row) for row in other]:
        raise MixfuseError("the engine returned another number of tokens than were sent", kind="parity")
    left, right = (torch.tensor([value for row in rows for value in row]) for rows in (one, other))
    return float((left - right).abs().max())  # a tensor's max, unlike Python's, does not pass over NaN
