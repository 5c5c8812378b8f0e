"""The base is loaded by slices: every process reads its part, and has what DeepSpeed's own partitioning gives it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from train_harness import ENVIRONMENT

from mixfuse.train.model.embedded_base import build


@pytest.fixture(scope="module")
def bases(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Mixtral's, one whose head is its embedding, and Qwen3's, each in another type than it is loaded in."""
    folder = tmp_path_factory.mktemp("bases")
    build(folder / "qwen3", tiny=True, family="qwen3_moe")
    build(folder / "tied", tiny=True)
    config = json.loads((folder / "tied" / "config.json").read_text())
    (folder / "tied" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    (file,) = (folder / "tied").glob("*.safetensors")
    tensors = load_file(file)
    tensors.pop("lm_head.weight", None)
    save_file(tensors, file, {"format": "pt"})
    return {"mixtral": tiny_base, "tied": folder / "tied", "qwen3": folder / "qwen3"}


@pytest.mark.zero3
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.slow
def test_each_process_reads_what_a_broadcast_would_give_it(
    processes: int, bases: dict[str, Path], tmp_path: Path
) -> None:
    """Three processes cut matrices, and their rows, anywhere."""
    cases = {name: f"{base}:bfloat16" for name, base in bases.items()}
    cases["float32"] = f"{bases['mixtral']}:float32"
    cases |= {"nf4": f"{bases['mixtral']}:bfloat16+nf4", "int8": f"{bases['qwen3']}:bfloat16+int8"}
    probe = Path(__file__).with_name("loading_probe.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += [f"--nproc-per-node={processes}", str(probe), str(tmp_path), *cases.values()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    ranks: list[dict[str, Any]] = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(processes)]
    for rank, found in enumerate(ranks):
        for name, case in cases.items():
            seen = found[case]
            assert seen["different"] == [], (name, rank)
            assert seen["zero"] == [], "a part was left as it was allocated"
            assert seen["weights"] > 15
            ours, broadcast = seen["whole_tensors_read"]
            assert ours == 0
            assert (broadcast > 0) == (rank == 0)
            assert seen["dtypes"] == ["torch.float32" if name == "float32" else "torch.bfloat16"]
