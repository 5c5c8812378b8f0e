"""What a judge's training step costs: TRL's DPO on verdict pairs, and one pass over the prompt.

    .venv/bin/python benchmarks/judge_step.py [--base DIR] [--pairs N] [--tokens N] [--rounds N] [--json]

On the embedded base (built where --base holds none), forward and backward of one micro batch, both orders of --pairs
pairs of about --tokens tokens. The methods take turns within each round, in CPU time of one thread; ratios are
medians over rounds of ratios within a round. The baseline, 1.00, is TRL's own loss in float32 on the same rows:
chosen and rejected as two sequences, the reference by a second pass with the adapter off. Both give the same loss and
gradients (`tests/train/test_one_pass_dpo.py`).
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from mixfuse.contracts.families.mixtral import FAMILY as MIXTRAL
from mixfuse.contracts.judge_protocol import VERDICTS, comparison
from mixfuse.train.model.load import load_base, lora_config
from mixfuse.train.model.tokenizer import load_tokenizer
from mixfuse.train.recipe import Lora
from mixfuse.train.stages.one_pass_dpo import Reference
from mixfuse.train.stages.trainers import JudgeTrainer, NamedPairs, Verdicts, verdict_rows

WORDS = ("river", "stone", "apple", "cloud", "tiger", "lamp", "green", "winter")


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        base = arguments.base or Path(temporary) / "base"
        if not (base / "config.json").is_file():
            from mixfuse.train.model.embedded_base import build

            build(base)
        trainers = {name: _trainer(base, dtype, arguments, Path(temporary)) for name, dtype in DTYPES.items()}
        steps = [(f"{how}, {name}", trainer, how) for name, trainer in trainers.items() for how in ("TRL", "one pass")]
        seconds: dict[str, list[float]] = {name: [] for name, _, _ in steps}
        for number in range(arguments.rounds + 1):  # the first warms up
            for name, trainer, how in steps:
                took = _step(trainer, whole=how == "TRL")
                if number:
                    seconds[name].append(took)
    baseline = seconds["TRL, float32"]
    tokens = sum(len(ids) for ids in trainers["float32"].train_dataset["prompt_ids"])
    ratios = {}
    for name, took in seconds.items():
        ratios[name] = statistics.median(one / other for one, other in zip(baseline, took, strict=True))
        print(f"{name:20} {statistics.median(took):7.2f} s, {ratios[name]:5.2f} times as fast", flush=True)
    print(f"a micro batch of {2 * arguments.pairs} comparisons, {tokens} tokens of prompts; LoRA on {arguments.lora}")
    if arguments.json:
        print(json.dumps({"tokens": tokens, "speedup": ratios}))


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _trainer(base: Path, dtype: torch.dtype, arguments: argparse.Namespace, folder: Path) -> Any:
    tokenizer = load_tokenizer(base)
    settings = DPOConfig(
        str(folder / "out"), use_cpu=True, bf16=False, report_to=[], remove_unused_columns=False,
        router_aux_loss_coef=0.0, gradient_checkpointing=False, per_device_train_batch_size=4,
    )  # fmt: skip
    lora = Lora(experts="all" if arguments.lora == "experts" else "none")
    trainer = JudgeTrainer(
        model=load_base(base, dtype),
        args=settings,
        train_dataset=Dataset.from_list(_rows(arguments)),
        data_collator=NamedPairs(pad_token_id=tokenizer.pad_token_id, verdicts=True),
        processing_class=tokenizer,
        peft_config=lora_config(MIXTRAL, lora),
    )
    reference = Reference(folder / f"{dtype}.json", str(dtype))
    trainer.read_verdicts(Verdicts(verdict_rows(trainer.train_dataset), reference))
    return trainer


def _rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rng = random.Random(0)
    rows = []
    for number in range(arguments.pairs):
        one, other = (" ".join(rng.choices(WORDS, k=arguments.tokens // 2 - 30)) for _ in range(2))
        for verdict, answers in enumerate(((one, other), (other, one))):
            said = [[{"role": "assistant", "content": VERDICTS[letter]}] for letter in (verdict, 1 - verdict)]
            prompt = comparison(f"Question {number}?", *answers, nonce="0abc")
            rows.append({"id": str(number), "prompt": prompt, "chosen": said[0], "rejected": said[1]})
    return rows


def _step(trainer: Any, *, whole: bool) -> float:
    """CPU seconds of forward and backward of all rows; `whole`: as TRL does it, its completions whole."""
    collator = NamedPairs(pad_token_id=trainer.processing_class.pad_token_id, verdicts=not whole)
    batch = collator([trainer.train_dataset[number] for number in range(len(trainer.train_dataset))])
    batch.pop("ids")
    trainer.model.zero_grad()
    trainer.precompute_ref_logps = not whole
    began = time.process_time()
    with torch.enable_grad():
        compute = DPOTrainer._compute_loss if whole else JudgeTrainer._compute_loss
        compute(trainer, trainer.model, batch, False).backward()
    return time.process_time() - began


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="the embedded base; built there where it is missing")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lora", choices=("attention", "experts"), default="attention")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    return parser.parse_args()


if __name__ == "__main__":
    main()
