"""The embedded sums, and the tokenizer of characters that the tiny models that write use."""

import re
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaConfig

import forgelm.models
from forgelm.tasks.arithmetic import SPLITS, rows

TOKENIZER = Path(forgelm.models.__file__).parent / "tiny" / "characters"
ALPHABET = "".join(c for c in string.printable if c.isprintable()) + "\n"
PROBLEM = re.compile(r"(\d+)([+-])(\d+)=")
CHAT = [
    {"role": "system", "content": "Work it out."},
    {"role": "user", "content": "12+34="},
    {"role": "assistant", "content": "46"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TOKENIZER)


def problems(split: str) -> list[tuple[int, str, int]]:
    found = [PROBLEM.fullmatch(row["prompt"]) for row in rows(split)]
    return [(int(m[1]), m[2], int(m[3])) for m in found if m]


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_right(split: str) -> None:
    made = rows(split)
    answers = [a + b if sign == "+" else a - b for a, sign, b in problems(split)]
    assert [row["completion"] for row in made] == [str(answer) for answer in answers]
    assert all(row.keys() == {"prompt", "completion"} for row in made)
    assert min(answers) >= 0


def test_no_problem_is_there_twice() -> None:
    every = [problem for split in SPLITS for problem in problems(split)]
    same = {(sign, *(sorted((a, b)) if sign == "+" else (a, b))) for a, sign, b in every}
    assert len(same) == len(every) == sum(len(rows(split)) for split in SPLITS)


def test_every_process_makes_the_same_rows() -> None:
    code = (
        "from forgelm.tasks.arithmetic import SPLITS, rows; "
        "print([rows(split) for split in SPLITS])"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout.strip() == repr([rows(split) for split in SPLITS])


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown split 'test'; valid splits: train, validation"):
        rows("test")


@pytest.mark.parametrize("text", [ALPHABET, "  two  spaces \n\nand .  ' s n't , ?", "12+34="])
def test_the_alphabet_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == text


def test_what_is_not_in_the_alphabet_is_unknown(tokenizer: Any) -> None:
    assert tokenizer.decode(tokenizer("1é2").input_ids) == "1<unk>2"


def test_the_tokenizer_is_the_same_beside_a_model(tokenizer: Any, tmp_path: Path) -> None:
    LlamaConfig(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template == tokenizer.chat_template
    assert again.decode(again(ALPHABET).input_ids) == ALPHABET
    specials = ("pad", "unk", "bos", "eos")
    names = [getattr(again, f"{name}_token") for name in specials]
    assert names == ["<pad>", "<unk>", "<s>", "</s>"]


def test_chat(tokenizer: Any) -> None:
    prompt = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert prompt == "<s><|system|>Work it out.</s><|user|>12+34=</s><|assistant|>"
    assert whole == prompt + "46</s>"
    made = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    assert made["input_ids"] == tokenizer(whole).input_ids
    written = [
        i for i, mine in zip(made["input_ids"], made["assistant_masks"], strict=True) if mine
    ]
    assert tokenizer.decode(written) == "46</s>"


def test_a_message_of_an_unknown_role_is_refused(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="unknown role tool; valid roles: system, user, assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "46"}], tokenize=False)


def test_the_script_writes_the_files_that_are_shipped(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "make_tiny_tokenizer.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True)
    for path in sorted(tmp_path.rglob("*.*")):
        shipped = TOKENIZER.parent / path.relative_to(tmp_path)
        assert path.read_bytes() == shipped.read_bytes(), path.name
