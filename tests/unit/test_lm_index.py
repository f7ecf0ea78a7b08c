"""lm-eval's tasks by name, found without its index: the same answers as the whole index gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forgelm.config import lm_index
from forgelm.config.lm_tasks import manager, unknown
from forgelm.config.schema import LmEvalConfig

NAMES = (
    "hellaswag",  # a task
    "arc_easy",  # a task that includes nothing and is tagged
    "arc_challenge",  # a task that includes another
    "squadv2",  # a class
    "20_newsgroups",  # a class that it inherits, a name that begins with a figure
    "mmlu",  # a group of groups of tags
    "truthfulqa",  # a tag
    "ai2_arc",  # a tag
    "wic",  # a name in quotes
    "aclue",  # a group of tasks whose keys are in quotes
    "flan_held_in",  # a group of groups that are written inside it
    "blimp_nl",  # a group that isn't a tree of names alone
    "darija_summarization",  # a group with keys for its tasks
    "openllm",  # a group of groups with settings of their own
    "cabbq",  # a group with a tag
    "social_bias",  # a tag
)
OWN = {
    "template": """
custom_dataset: !function data.rows
test_split: test
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
output_type: loglikelihood_rolling
metric_list: [{metric: byte_perplexity}]
tag: [all, "half"]
""",
    "a.yaml": "include: template\ntask: a\n",
    "b.yaml": "include: template\ntag: all\ntask: 'b'\n",
    "c.yaml": "{include: template, task: c, tag: []}\n",
    "again.yaml": "include: template\ntask: a\ntag: again\n",
    "inner.yaml": "group: inner\ntask: [b, {task: c, num_fewshot: 3}]\ndescription: of inner\n",
    "outer.yaml": """
group: outer
task:
  - inner
  - half
  - group: written
    description: of written
    task: [c]
  - task: new
    custom_dataset: !function data.rows
    test_split: test
    doc_to_text: "{{text}}"
    doc_to_target: "{{text}}"
    output_type: loglikelihood_rolling
    metric_list: [{metric: byte_perplexity}]
""",
    "broken.yaml": "task: broken\ntag: [\n",
    "data.py": """
from datasets import Dataset


def rows(**kwargs):
    return {"test": Dataset.from_dict({"text": ["x", "y"]})}
""",
}


@pytest.fixture(scope="module")
def whole() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager().task_index


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    for name, text in OWN.items():
        (folder / name).write_text(text)
    return folder


def reach(name: str, index: Any) -> set[str]:
    """A name and all that belongs to it by a whole index."""
    found, wanted = set(), [name]
    while wanted:
        name = wanted.pop()
        if name not in index or name in found:
            continue
        found.add(name)
        entry = index[name]
        wanted += entry.tags if entry.kind.name == "TAG" else []
        members = [(entry.cfg or {}).get("task")] if entry.kind.name == "GROUP" else []
        while members:
            member = members.pop()
            members += member if isinstance(member, list) else []
            members += [member.get("task")] if isinstance(member, dict) else []
            wanted += [member.get("group")] if isinstance(member, dict) else []
            wanted += [member] if isinstance(member, str) else []
    return found


def test_all_names_are_known(whole: Any) -> None:
    assert lm_index.names_of_lm_eval() == sorted(whole)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_what_the_whole_index_says(name: str, whole: Any) -> None:
    entries = lm_index.find([name]).entries
    assert set(entries) == reach(name, whole)
    index = manager(LmEvalConfig(tasks=[name])).task_index
    assert index == {each: whole[each] for each in entries}


def test_known_counts() -> None:
    found = lm_index.find(["mmlu", "truthfulqa", "hellaswag"])
    counts = {name: len(found.leaves(name)) for name in ("mmlu", "truthfulqa", "hellaswag")}
    assert counts == {"mmlu": 57, "truthfulqa": 3, "hellaswag": 1}


@pytest.mark.parametrize("name", ["a", "all", "half", "inner"])
def test_leaves_are_those_that_lm_eval_builds(name: str, own: Path) -> None:
    asked = LmEvalConfig(tasks=[name], include_path=str(own))
    built = manager(asked).load([name])["tasks"]
    leaves = lm_index.find([name], own).leaves(name)
    assert [leaf.name for leaf in leaves] == list(built)
    for leaf in leaves:
        over = {key: value for key, value in leaf.config.items() if key != "task"}
        assert {key: built[leaf.name].get_config(key) for key in over} == over


def test_a_group_in_a_group(own: Path) -> None:
    """lm-eval keeps the last of two leaves with one name; both are needed here."""
    asked = LmEvalConfig(tasks=["outer"], include_path=str(own))
    built = manager(asked).load(["outer"])["tasks"]
    leaves = lm_index.find(["outer"], own).leaves("outer")
    assert [leaf.name for leaf in leaves] == ["b", "c", "a", "c", "outer::new"]
    assert {leaf.name for leaf in leaves} == set(built)
    assert leaves[1].config == {"description": "of inner", "task": "c", "num_fewshot": 3}
    assert leaves[3].config == {"description": "of written", "task": "c"}


def test_of_two_definitions_the_first_counts(own: Path) -> None:
    """So the tags of the second are none."""
    found = lm_index.find(["a", "again", "half"], own).entries
    assert set(found) == {"a", "half"}
    assert found["a"].file == own / "a.yaml"
    assert found["half"].tasks == {"a"}


def test_own_definitions_go_before(own: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("task: hellaswag\ntag: truthfulqa\ndataset_path: json\n")
    found = lm_index.find(["hellaswag", "truthfulqa", "arc_easy"], tmp_path).entries
    assert found["hellaswag"].config["dataset_path"] == "json"
    assert found["truthfulqa"].tasks == {"hellaswag"}
    assert found["arc_easy"].config["dataset_path"] == "allenai/ai2_arc"


def test_unknown_names_all_at_once(own: Path) -> None:
    asked = ["hellaswg", "hellaswag", "nothing_like_it_xyz"]
    near, far = unknown(asked, None, "--tasks")
    assert near.startswith("--tasks: hellaswg: lm-eval has no such task; did you mean hellaswag")
    assert far == "--tasks: nothing_like_it_xyz: lm-eval has no such task"
    broken, lacking = unknown(["outr", "a"], str(own))
    assert broken.startswith(f"{own}/broken.yaml: not a task of lm-eval: while parsing")
    assert lacking.startswith(
        f"eval.lm_eval.tasks: outr: neither lm-eval nor {own} has such a task"
    )
    assert "; the folder has a, all, b, c, half, inner, outer; did you mean outer" in lacking
