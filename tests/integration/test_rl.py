"""Mode rl: what it learns, logs and keeps, what rows and rewards it takes, what it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, only_run

from forgelm import plugins
from forgelm.run.files import read_json

PROMPTS = [{"prompt": f"{a}+{b}="} for a in range(1, 9) for b in range(1, 9)]
PAIRS = [
    {"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(1, 9) for b in range(1, 9)
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    }
    for row in PAIRS
]
ASKED = [{"messages": row["messages"][:1]} for row in CHATS]

SMALL = (
    "model.tiny.hidden_size=16",
    "model.tiny.intermediate_size=32",
    "training.per_device_train_batch_size=16",
    "training.logging_steps=1",
    "training.learning_rate=1e-2",
    "training.eval_strategy=no",
    "task.max_length=64",
    "task.max_new_tokens=4",
    "task.max_eval_samples=16",
    "mode.num_generations=4",
    "mode.max_completion_length=4",
    "wandb.mode=disabled",
    "max_steps=3",
)
LORA = ("model.lora.enabled=true", "model.lora.r=4")
DIGITS = ("mode.rewards=[format]", "mode.format_pattern='[0-9].*'")
ANSWERS = ("task.metrics=[exact_match]", "task.greater_is_better=true")
REWARD = ("task.metrics=[reward]", "task.greater_is_better=true")

Package = Callable[[str], None]


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def request(rows: Path, *words: str) -> list[str]:
    """The words of a small run on prompts that are trained and evaluated on."""
    files = (f"task.train_file={rows}", f"task.validation_file={rows}")
    return ["train", "mode=rl", "task=causal_lm", *files, *SMALL, *words]


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    """Installs a package whose function `judge` is the reward `judge`."""
    site = tmp_path / "site"
    about = site / "judges-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: judges\nVersion: 1\n")
    (about / "entry_points.txt").write_text(f"[{plugins.REWARDS}]\njudge = judges:judge\n")
    monkeypatch.syspath_prepend(str(site))
    plugins._points.cache_clear()
    yield lambda code: (site / "judges.py").write_text(code) and None
    sys.modules.pop("judges", None)
    plugins._points.cache_clear()


def test_what_is_rewarded_is_learnt_logged_and_kept(forgelm: Command, tmp_path: Path) -> None:
    rewards = ("mode.rewards=[format,length]", "mode.reward_weights=[2,0.5]", DIGITS[1])
    options = ("mode.length_target=2", "mode.samples_per_log=3", "mode.beta=0.01", "max_steps=40")
    words = request(write(tmp_path, PROMPTS), *REWARD, *rewards, *options)
    done = forgelm(*words, "training.logging_steps=5", "training.per_device_train_batch_size=32")
    assert done.code == 0, done.err
    assert "GRPO (dapo) on format, length" in done.out
    run = only_run(tmp_path / "outputs")
    results = read_json(run / "eval.json")
    before, after = (results[when]["student"]["validation"] for when in ("before", "after"))
    assert list(after) == ["reward", "reward_format", "reward_length"]
    assert after["reward"] == pytest.approx(2 * after["reward_format"] + after["reward_length"] / 2)
    assert after["reward"] > before["reward"] + 0.5
    logged = lines(run)
    assert [line["step"] for line in logged] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert logged[-1]["rewards/format/mean"] > logged[0]["rewards/format/mean"] + 0.3
    expected = {"reward", "reward_std", "rewards/length/mean", "kl", "entropy", "loss"}
    assert all(expected <= set(line) and "step_time" not in line for line in logged)
    samples = lines(run, "samples.jsonl")
    assert [sample["step"] for sample in samples] == [
        line["step"] for line in logged for _ in "abc"
    ]
    assert set(samples[0]) == {"step", "prompt", "completion", "rewards", "advantage"}
    assert set(samples[0]["rewards"]) == {"format", "length"}
    assert len({sample["prompt"] for sample in samples[:3]}) == 3
    evaluated = forgelm("evaluate", str(run), "--output-format", "json")
    assert json.loads(evaluated.out)["splits"]["validation"] == after


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (PAIRS, ("mode.rewards=[exact_match,numeric,contains]", *ANSWERS)),
        (CHATS, ("mode.rewards=[exact_match]", *ANSWERS, "training.bf16=true")),
        (ASKED, (*DIGITS, *REWARD)),
        (PROMPTS, (*DIGITS, *REWARD, "task.as_chat=true", "mode.samples_per_log=0")),
    ],
    ids=["pairs", "chats", "chats without answers", "prompts as chats"],
)
def test_rows_of_every_layout(
    forgelm: Command, tmp_path: Path, rows: list[dict[str, Any]], words: tuple[str, ...]
) -> None:
    done = forgelm(*request(write(tmp_path, rows), *words))
    assert done.code == 0, done.err
    run = only_run(tmp_path / "outputs")
    after = read_json(run / "eval.json")["after"]["student"]["validation"]
    assert ("exact_match" in after) == ("loss" in after) == (ANSWERS[0] in words)
    assert "reward" in after
    if "mode.samples_per_log=0" in words:
        assert not (run / "samples.jsonl").exists()
        return
    (first, *_) = lines(run, "samples.jsonl")
    asked = first["prompt"] if rows is PAIRS else first["prompt"][-1]["content"]
    assert asked in {row["prompt"] for row in PROMPTS}


def test_references_stay_as_they_start_or_follow(forgelm: Command, tmp_path: Path) -> None:
    words = request(write(tmp_path, PROMPTS), *DIGITS, *REWARD, "mode.beta=0.1", "max_steps=6")
    follows = ("mode.sync_ref_model=true", "mode.ref_model_sync_steps=1")
    whole = ("mode.ref_model_mixup_alpha=1", "run_name=follows")
    for added in (("run_name=stays",), (*follows, *whole)):
        done = forgelm(*words, *added)
        assert done.code == 0, done.err
    stays, followed = (
        [line["kl"] for line in lines(tmp_path / f"outputs/causal_lm/tiny/rl/{name}")]
        for name in ("stays", "follows")
    )
    assert stays[0] == followed[0] == pytest.approx(0, abs=1e-6)
    assert stays[-1] > 1e-3
    assert followed == pytest.approx([0] * 6, abs=1e-6)


def test_adapters_have_themselves_as_reference(forgelm: Command, tmp_path: Path) -> None:
    words = request(write(tmp_path, PROMPTS), *DIGITS, *REWARD, "mode.beta=0.1", *LORA)
    for added in (("run_name=first",), ("run_name=second",)):
        done = forgelm(*words, *added)
        assert done.code == 0, done.err
        run = tmp_path / "outputs/causal_lm/tiny/rl" / added[0].partition("=")[2]
        kl = [line["kl"] for line in lines(run)]
        assert kl[0] == pytest.approx(0, abs=1e-6)
        assert kl[-1] > 1e-5
        assert (run / "adapter_model.safetensors").is_file()
        assert not (run / "ref").exists()
        # The second is an adapter that was trained before.
        words.append(f"model.path={run}")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "model.lora.target_modules=[lm_head]",
            "model.lora.target_modules: names the model's head, whose weights GRPO reads past any "
            "adapter, so it would learn nothing; leave the head out",
        ),
        (
            "model.lora.bias=all",
            "mode=rl can't be trained like this: LoraModel supports only 1 adapter with bias. When "
            "using multiple adapters, set bias to 'none' for all adapters.",
        ),
    ],
    ids=["head", "bias"],
)
def test_adapters_that_cannot_be_are_refused(
    forgelm: Command, tmp_path: Path, word: str, said: str
) -> None:
    words = request(write(tmp_path, PROMPTS), *DIGITS, *REWARD, "mode.beta=0.1", *LORA)
    done = forgelm(*words, word)
    assert (done.code, done.err.strip()) == (1, f"forgelm: {said}")


def test_epochs_count_rounds_of_prompts(forgelm: Command, tmp_path: Path) -> None:
    # Eight prompts a round, two optimizer steps each: 64 prompts and a half.
    words = request(write(tmp_path, PROMPTS[:60]), *DIGITS, *REWARD, "max_steps=null")
    rounds = ("mode.steps_per_generation=2", "mode.num_iterations=2", "epochs=1.5")
    done = forgelm(*words, *rounds, "training.gradient_accumulation_steps=2")
    assert done.code == 0, done.err
    run = only_run(tmp_path / "outputs")
    assert [line["step"] for line in lines(run)] == list(range(1, 25))
    generated = [line["step"] for line in lines(run) if "reward" in line]
    assert generated == list(range(1, 25, 2))
    assert read_json(run / "training_state.json")["target"] == 24


def test_a_reward_of_another_package(forgelm: Command, tmp_path: Path, package: Package) -> None:
    package(
        "def judge(prompts, completions, references):\n"
        "    return [None if p == '1+1=' else float(len(c) + len(r))\n"
        "            for p, c, r in zip(prompts, completions, references)]\n"
    )
    rewards = ("mode.rewards=[judge,exact_match]", *ANSWERS)
    done = forgelm(*request(write(tmp_path, PAIRS[:16]), *rewards))
    assert done.code == 0, done.err
    run = only_run(tmp_path / "outputs")
    assert all("rewards/judge/mean" in line for line in lines(run))
    assert read_json(run / "eval.json")["after"]["student"]["validation"]["reward_judge"] > 0


def test_rewards_that_never_apply_are_warned_of(
    forgelm: Command, tmp_path: Path, package: Package
) -> None:
    package("def judge(completions): return [None] * len(completions)")
    words = ("mode.rewards=[judge]", *REWARD, "training.eval_strategy=steps")
    done = forgelm(*request(write(tmp_path, PROMPTS[:16]), *words, "training.eval_steps=2"))
    assert done.code == 0, done.err
    warned = [line for line in done.out.splitlines() if line.startswith("warning:")]
    assert warned == [
        "warning: no reward applied to any completion since the last logged step, so nothing was "
        "learnt: judge gave None for all of them; check the rewards and the training rows"
    ]
    run = only_run(tmp_path / "outputs")
    assert not any("reward" in line for line in lines(run))
    assert read_json(run / "eval.json")["after"]["student"]["validation"] == {"reward": None}


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "def judge(completions): return [float('nan')] * len(completions)",
            "the reward judge returned nan for the prompt '{prompt}' and the completion '…': it "
            "must be a finite number, or None where the reward doesn't apply",
        ),
        (
            "def judge(completions): return [10**400] * len(completions)",
            f"the reward judge returned 1{'0' * 56}... for the prompt '{{prompt}}' and the "
            "completion '…': it must be a finite number, or None where the reward doesn't apply",
        ),
        (
            "import torch\ndef judge(completions): return torch.ones(len(completions), 2)",
            "the reward judge returned tensor([1., 1.]) for the prompt '{prompt}' and the "
            "completion '…': it must be a finite number, or None where the reward doesn't apply",
        ),
        (
            "def judge(completions): return [1 / 0 for text in completions]",
            "the reward judge failed for the prompt '{prompt}' and the completion '…': "
            "ZeroDivisionError: division by zero",
        ),
    ],
    ids=["nan", "huge", "table", "raises"],
)
@pytest.mark.parametrize("before", ["true", "false"], ids=["evaluation", "training"])
def test_a_reward_that_fails_is_named(
    forgelm: Command, tmp_path: Path, package: Package, code: str, said: str, before: str
) -> None:
    package(code)
    words = ("mode.rewards=[judge]", *REWARD, f"eval.before_training={before}")
    done = forgelm(*request(write(tmp_path, PROMPTS[:1]), *words))
    assert done.code == 2
    start, end = said.format(prompt="1+1=").split("…")
    (line,) = [line for line in done.err.splitlines() if line.startswith("forgelm: ")]
    assert line.startswith(f"forgelm: {start}")
    assert line.endswith(end)
    assert "Traceback" not in done.err


def test_what_a_reward_of_another_package_may_ask_for(
    forgelm: Command, tmp_path: Path, package: Package
) -> None:
    package("def judge(completions, solution): return [1.0]")
    done = forgelm(*request(write(tmp_path, PROMPTS), "mode.rewards=[judge]", *REWARD))
    assert done.code == 1
    assert done.err.strip() == (
        "forgelm: the reward judge takes solution, which nobody gives it: "
        "a reward is given prompts, completions, references, completion_ids"
    )


NOTHING = "has only prompts, so there is nothing to compare with; name the answers with"


@pytest.mark.parametrize(
    ("rows", "words", "said"),
    [
        (
            PROMPTS,
            ("mode.rewards=[exact_match,length]", *ANSWERS),
            [
                f"mode.rewards: exact_match: split {split} {NOTHING} task.completion_column, or "
                "use rewards that need none, such as format and length"
                for split in ("train", "validation")
            ]
            + [
                f"task.metrics: exact_match: split validation {NOTHING} task.completion_column, "
                "or use task.metrics=[reward]"
            ],
        ),
        (
            [*PAIRS, {"prompt": "1+1=", "completion": "two"}],
            ("mode.rewards=[numeric]", *ANSWERS),
            ["split train, row 65: there is no number in 'two'; the reward numeric needs one"],
        ),
        (
            PAIRS,
            ("mode.rewards=[exact_match]", *ANSWERS, "task.answer_pattern='#(.*)'"),
            [
                "split train, row 1: task.answer_pattern finds no answer in '2'; the reward "
                "exact_match needs one"
            ],
        ),
        (
            [*CHATS, ASKED[0]],
            ("mode.rewards=[exact_match]", *ANSWERS),
            [
                "split train, row 65: ends with the turn of user, and other rows with an answer; "
                "give all rows an answer, or none"
            ],
        ),
        (
            [{"text": "1+1=2"}],
            (*DIGITS, *REWARD),
            ["mode=rl: plain text has no prompts; give task.prompt_column or task.messages_column"],
        ),
        (
            PROMPTS,
            (*DIGITS, *REWARD, "mode.max_completion_length=2045"),
            [
                "mode.max_completion_length=2045: with a prompt of 4 tokens that is more than the "
                "2048 that the model has positions for; lower it, or lower task.max_length"
            ],
        ),
        (
            PROMPTS[:3],
            (*DIGITS, *REWARD, "training.dataloader_drop_last=true"),
            [
                "training.dataloader_drop_last=true: 3 prompts don't fill one generation of 4; "
                "leave it out, or lower training.per_device_train_batch_size"
            ],
        ),
    ],
    ids=["prompts", "number", "pattern", "chats", "text", "room", "few"],
)
def test_rows_that_do_not_do_are_refused(
    forgelm: Command,
    tmp_path: Path,
    rows: list[dict[str, Any]],
    words: tuple[str, ...],
    said: list[str],
) -> None:
    done = forgelm(*request(write(tmp_path, rows), *words))
    assert done.code == 1
    assert done.err.splitlines()[: len(said)] == [f"forgelm: {line}" for line in said]


def test_too_long_prompts_are_left_out_and_said(forgelm: Command, tmp_path: Path) -> None:
    rows = write(tmp_path, [*PROMPTS, {"prompt": "1+" * 40 + "1="}])
    done = forgelm(*request(rows, *DIGITS, *REWARD, "eval.before_training=false"))
    assert done.code == 0, done.err
    assert "split train: 1 of 65 rows left out" in done.out
    assert "(row 65)" in done.out


def test_without_trl_it_says_what_to_install(
    forgelm: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    done = forgelm("train", "mode=rl", "task=arithmetic")
    assert done.code == 1
    assert done.err.strip() == (
        "forgelm: mode=rl needs trl, which isn't installed: pip install 'forgelm[rl]'"
    )


def test_weights_that_are_no_numbers_are_named(forgelm: Command, tmp_path: Path) -> None:
    words = ("training.learning_rate=1e30", "training.logging_steps=100", "max_steps=9")
    done = forgelm(*request(write(tmp_path, PROMPTS), *DIGITS, *REWARD, *words))
    assert done.code == 2
    assert "the model's probabilities are not numbers at step" in done.err
