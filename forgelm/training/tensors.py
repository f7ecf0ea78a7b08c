"""Tensors to files in the safetensors format, so that a thread can do it beside training.

The libraries' writers hold Python's lock while they copy, tensor by tensor, and training waits for
it. Here a file is written by a few system calls straight from the tensors' memory, which hold no
lock; so the thread may also have the lowest priority. Layout:
https://huggingface.co/docs/safetensors (length of the header, header as JSON, bytes).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_AT_ONCE = 512
_MARK = "__tensor__"


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write named tensors; of those that share their memory the first name stands for all.

    Raises:
        OSError: the disk is full, or can't be written.
        KeyError: a tensor of a type that the format doesn't have.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    views: list[memoryview] = []
    end, seen = 0, set()
    for name, tensor in tensors.items():
        identity = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and identity in seen:
            continue
        seen.add(identity)
        view = _bytes(tensor)
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + view.nbytes],
        }
        end += view.nbytes
        views.append(view)
    text = json.dumps(header, separators=(",", ":")).encode()
    # The bytes begin at a multiple of eight.
    text += b" " * (-len(text) % 8)
    # Not emptied first: a file that is written over keeps its place in memory and on the disk.
    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        _write_all(handle, [memoryview(len(text).to_bytes(8, "little") + text), *views])
        os.ftruncate(handle, 8 + len(text) + end)
    finally:
        os.close(handle)


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if not flat.numel():
        return memoryview(b"")
    content: Any = flat.view(torch.uint8).numpy()
    return memoryview(content)


def _write_all(handle: int, views: list[memoryview]) -> None:
    """A system call writes up to 2 GB of up to _AT_ONCE pieces, and says how far it came."""
    waiting = [view for view in views if view.nbytes]
    while waiting:
        written = os.writev(handle, waiting[:_AT_ONCE])
        while waiting and written >= waiting[0].nbytes:
            written -= waiting.pop(0).nbytes
        if written:
            waiting[0] = waiting[0][written:]


def save_tree(tree: Any, path: Path) -> None:
    """Write nested dicts, lists, values and tensors: `path` and, for what is large, a neighbour."""
    found: dict[str, torch.Tensor] = {}
    skeleton = _without(tree, "", found)
    if found:
        write_tensors(found, path.with_suffix(".safetensors"))
    # Through a file of our own: the reason of a failed write would be lost otherwise.
    with path.open("wb") as file:
        torch.save(skeleton, file)


def _without(node: Any, name: str, found: dict[str, torch.Tensor]) -> Any:
    """The tree with a mark in the place of each tensor that isn't a single number."""
    if isinstance(node, torch.Tensor) and node.dim():
        found[name] = node
        return {_MARK: name}
    if isinstance(node, dict):
        return {key: _without(value, f"{name}/{key}", found) for key, value in node.items()}
    if isinstance(node, list | tuple):
        parts = (_without(value, f"{name}/{place}", found) for place, value in enumerate(node))
        return type(node)(parts)
    return node


def load_tree(path: Path) -> Any:
    """What `save_tree` wrote; nothing in the files is executed."""
    skeleton = torch.load(path, map_location="cpu", weights_only=True)
    beside = path.with_suffix(".safetensors")
    # Copied: what is loaded may be a view of the file, which the next checkpoints are written over.
    found = {name: tensor.clone() for name, tensor in _stored(beside).items()}
    return _with(skeleton, found)


def _stored(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(path) if path.is_file() else {}
    return found


def _with(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(node, dict):
        if node.keys() == {_MARK}:
            return tensors[node[_MARK]]
        return {key: _with(value, tensors) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_with(value, tensors) for value in node)
    return node
