"""What a run says of itself while it trains: `metrics.jsonl`, always."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainerCallback


def metrics_log(path: Path, *, resumed: bool) -> "TrainerCallback":
    """A callback that appends every logged dict to a JSONL file, on rank 0."""
    from transformers import TrainerCallback

    class MetricsLog(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not state.is_world_process_zero:
                return
            kept: list[str] = []
            if resumed and path.is_file():
                # A killed run may have logged steps beyond its last checkpoint; they will be done again.
                lines = path.read_text(encoding="utf-8").splitlines()
                kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
            path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if state.is_world_process_zero:
                row = {"step": state.global_step, "time": round(time.time(), 3)}
                row |= {key: value for key, value in logs.items() if isinstance(value, (int, float))}
                with path.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(row) + "\n")

    return MetricsLog()
