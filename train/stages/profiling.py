"""A window of steps under torch's profiler; the file opens in Perfetto."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixfuse.train.recipe import Profile

if TYPE_CHECKING:
    from transformers import TrainerCallback


def profiler(profile: Profile, out: Path) -> "TrainerCallback":
    """A callback that records the profile's steps on process 0 and writes `OUT/profile/steps-FIRST-LAST.json.gz`.

    A run that ends or is interrupted inside the window leaves the steps until then. A run that is resumed after it
    records nothing.

    Args:
        profile: The steps.
        out: The run's folder.
    """
    import torch
    from transformers import TrainerCallback

    first, last = profile.steps

    class Profiler(TrainerCallback):
        def __init__(self) -> None:
            self._running: Any = None
            self._began = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step = state.global_step + 1
            if self._running is None and state.is_world_process_zero and first <= step <= last:
                self._began = step
                self._running = torch.profiler.profile(record_shapes=True, profile_memory=profile.memory)
                self._running.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step >= last:
                self._write(state.global_step)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._write(state.global_step)

        def _write(self, step: int) -> None:
            if self._running is None:
                return
            running, self._running = self._running, None
            running.stop()
            path = out / "profile" / f"steps-{self._began}-{step}.json.gz"
            path.parent.mkdir(exist_ok=True)
            running.export_chrome_trace(str(path))
            print(f"{path}: open it in https://ui.perfetto.dev", flush=True)

    return Profiler()
