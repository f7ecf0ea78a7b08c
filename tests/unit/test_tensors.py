"""Files of tensors: what the format's own library reads, and what is loaded again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from forgelm.training.tensors import load_tree, save_tree, write_tensors

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_library_reads_what_was_written(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        "matrix": (torch.randn(7, 5) * 9).to(dtype),
        "turned": (torch.randn(4, 6) * 9).to(dtype).t(),
        "one": torch.ones((), dtype=dtype),
        "none": torch.empty(0, 3, dtype=dtype),
    }
    path = tmp_path / "made.safetensors"
    path.write_bytes(b"something longer that was there before" * 100)
    write_tensors(tensors, path)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_more_tensors_than_one_call_takes(tmp_path: Path) -> None:
    tensors = {f"t{n}": torch.full((3,), n) for n in range(1500)}
    write_tensors(tensors, tmp_path / "many.safetensors")
    found = load_file(tmp_path / "many.safetensors")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_shared_memory_is_written_once(tmp_path: Path) -> None:
    weight = torch.randn(3, 3)
    write_tensors({"a": weight, "b": weight, "c": weight[1:]}, tmp_path / "t.safetensors")
    assert load_file(tmp_path / "t.safetensors").keys() == {"a", "c"}


def test_a_tree_comes_back_and_is_no_view_of_its_file(tmp_path: Path) -> None:
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(4)}, 1: {}},
        "param_groups": [{"betas": (0.9, 0.999), "params": [0, 1], "lr": 1e-3, "x": None}],
    }
    save_tree(tree, tmp_path / "o.pt")
    found = load_tree(tmp_path / "o.pt")
    beside = tmp_path / "o.safetensors"
    with beside.open("r+b") as file:
        file.write(b"\xff" * beside.stat().st_size)
    assert torch.equal(found["state"][0]["exp_avg"], tree["state"][0]["exp_avg"])
    assert found["state"][0]["step"] == 3
    assert found["state"][1] == {}
    assert found["param_groups"] == tree["param_groups"]
