"""Tasks with verifiers: splits that share no prompt, the same tasks for the same arguments, verifiers that verify."""

from pathlib import Path

import pytest

from mixfuse.contracts import tasks
from mixfuse.contracts.errors import MixfuseError

KINDS = """
tasks:
  - name: chain_sum
    weight: 3
    settings: {min_terms: 2, max_terms: 3, min_digits: 1, max_digits: 1}
  - name: letter_counting
    settings: {min_words: 2, max_words: 3}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tasks.yaml"
    path.write_text(KINDS)
    return path


def test_no_prompt_is_in_two_splits_however_often_it_is_generated(file: Path) -> None:
    prompts = {
        split: {task.prompt for seed in range(3) for task in tasks.make(file, split, 150, seed=seed)}
        for split in ("train", "pool", "heldout")
    }
    assert all(len(found) >= 150 for found in prompts.values())
    assert not prompts["train"] & prompts["pool"]
    assert not prompts["train"] & prompts["heldout"]
    assert not prompts["pool"] & prompts["heldout"]


def test_the_same_arguments_make_the_same_tasks(file: Path) -> None:
    assert tasks.make(file, "pool", 20, seed=4) == tasks.make(file, "pool", 20, seed=4)
    assert tasks.make(file, "pool", 20, seed=4) != tasks.make(file, "pool", 20, seed=5)


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_the_count_and_the_weights_are_kept(count: int, file: Path) -> None:
    made = tasks.make(file, "train", count)
    assert len(made) == count
    assert len({task.id for task in made}) == count
    share = sum(task.kind == "chain_sum" for task in made)
    assert abs(share - 0.75 * count) < 1


def test_any_prefix_holds_every_kind(file: Path) -> None:
    assert {task.kind for task in tasks.make(file, "train", 40)[:4]} == {"chain_sum", "letter_counting"}


def test_a_verifier_accepts_the_reference_and_nothing_else(file: Path) -> None:
    held_out = tasks.make(file, "heldout", 12)
    assert len(held_out) == 12
    for task in held_out:
        wrong = str(int(task.reference) + 1)
        assert task.verify(f" {task.reference}\n")
        assert not task.verify(wrong)
        assert not task.verify("")
        assert not task.verify_lenient(wrong)
        assert task.verify_lenient(f"The answer is {task.reference}.")
        user, assistant = task.chat()["messages"]
        assert (user["content"], assistant["content"]) == (task.prompt, task.reference)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: []", "no tasks are listed"),
        ("tasks: [{name: no_such_task}]", "reasoning-gym refuses 'no_such_task'"),
        ("tasks: [{name: chain_sum, settings: {min_terms: 5, max_terms: 2}}]", "reasoning-gym refuses 'chain_sum'"),
        ("tasks: [{name: chain_sum, settings: {terms: 5}}]", "reasoning-gym refuses 'chain_sum'"),
        ("tasks: [{nme: chain_sum}]", "unknown key 'tasks.0.nme'; did you mean 'tasks.0.name'?"),
    ],
)
def test_a_bad_task_file_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "tasks.yaml").write_text(text)
    with pytest.raises(MixfuseError) as caught:
        tasks.make(tmp_path / "tasks.yaml", "train", 4)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
