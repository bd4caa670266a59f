"""Checkpoints of one process: exact round trips, damage, forgery, full disks, retention."""

from __future__ import annotations

import collections
import errno
import fcntl
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from torch import nn

from launcher.engine import checkpoint
from launcher.engine.checkpoint import files, reader
from launcher.errors import CheckpointError

# Imports torch once for all processes that the tests kill.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["launcher.engine.checkpoint.training", "torch.distributed.fsdp", "torch._dynamo"])


def save(directory: Path, step: int, state: dict[str, Any], own: Any = None) -> Path:
    checkpoint.Checkpointer(directory, keep=100).save(step, state, own, asynchronous=False)
    return directory / files.name_of(step)


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal in type and bits."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        return torch.equal(
            one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8)
        )
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        pairs = zip(one.items(), other.items(), strict=True) if len(one) == len(other) else [((0, 0), (1, 1))]
        return all(same(key, key2) and same(value, value2) for (key, value), (key2, value2) in pairs)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, float):
        return one.hex() == other.hex()
    return bool(one == other)


# --- round trips -----------------------------------------------------------------------------------------------------

PLAIN: list[Any] = [
    None,
    True,
    0,
    -(2**80),
    0.1,
    -0.0,
    5e-324,
    math.inf,
    -math.inf,
    math.nan,
    "ünï\ud800\x00$",
    [],
    (),
    {},
    (1, [2, (3.5,)], {"a": None}),
    {0: "int", "0": "str", 1.5: "float", True and "t": 1, (1, ("a", None)): "tuple", None: "none"},
    {"$tensor": "not a reference", "$float": "nan"},
    collections.Counter({30: 1, 60: 2}),
    random.Random(3).getstate(),
]


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: repr(value)[:30])
def test_plain_values_are_restored_exactly(tmp_path: Path, value: Any) -> None:
    path = save(tmp_path, 1, {"section": value, "nested": {"x": [value]}}, own=value)
    content = checkpoint.load(path)
    assert same(content.state, {"section": value, "nested": {"x": [value]}})
    assert same(content.own, [value])
    assert (content.step, content.world_size) == (1, 1)


def tensors() -> dict[str, torch.Tensor]:
    examples = {}
    for name, dtype in reader.DTYPES.items():
        raw = torch.arange(2 * 3 * dtype.itemsize, dtype=torch.uint8) * 7 % (2 if dtype is torch.bool else 251)
        examples[name] = raw.view(dtype).reshape(2, 3)
        examples[f"{name} scalar"] = raw.view(dtype)[3].clone()
        examples[f"{name} empty"] = torch.empty(0, 4, dtype=dtype)
    examples["transposed"] = torch.randn(4, 5).t()
    examples["a slice with a step"] = torch.randn(10, 4)[::3, 1:3]
    examples["expanded"] = torch.randn(3, 1).expand(3, 4)
    examples["channels last"] = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    examples["conjugated"] = torch.randn(3, dtype=torch.complex64).conj()
    examples["a/b/c"] = torch.randn(2)
    examples["requires grad"] = nn.Parameter(torch.randn(2))
    return examples


@pytest.mark.parametrize("asynchronous", [True, False])
def test_tensors_are_restored_bit_for_bit(tmp_path: Path, asynchronous: bool) -> None:
    state: dict[str, Any] = {
        "tensors": tensors(),
        "a": {"b": torch.ones(1)},
        "nested": [(torch.tensor(2.0), {3: torch.zeros(3)})],
    }
    checkpointer = checkpoint.Checkpointer(tmp_path)
    checkpointer.save(7, state, asynchronous=asynchronous)
    saved = checkpointer.wait()
    assert saved is not None
    assert (saved.step, saved.path) == (7, tmp_path / "step-00000007")
    state["tensors"]["requires grad"] = state["tensors"]["requires grad"].detach()
    state["tensors"] = {name: tensor.resolve_conj() for name, tensor in state["tensors"].items()}
    assert same(checkpoint.load(saved.path).state, state)


def test_tensors_of_any_layout_are_restored_in_place(tmp_path: Path) -> None:
    saved = {"x": torch.randn(4, 5), "y": torch.randn(2, 3, 4, 4), "z": torch.randn(3)}
    path = save(tmp_path, 1, {"model": saved})
    into = {
        "x": torch.zeros(5, 4).t(),
        "y": torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "z": nn.Parameter(torch.zeros(3)),
    }
    found = checkpoint.load(path, {"model": into}).state["model"]
    for name, tensor in into.items():
        assert found[name] is tensor
        assert torch.equal(tensor, saved[name])


def test_numpy_state_is_restored(tmp_path: Path) -> None:
    state: dict[str, Any] = {
        "rng": np.random.RandomState(3).get_state(legacy=False),
        "x": np.arange(6.0).reshape(2, 3)[:, ::2],
        "n": np.float64(2.5),
    }
    found = checkpoint.load(save(tmp_path, 1, {"numpy": state})).state["numpy"]
    assert same(found["rng"]["state"]["key"], state["rng"]["state"]["key"])
    assert np.array_equal(found["x"], state["x"])
    assert found["n"] == 2.5
    np.random.RandomState(0).set_state(found["rng"])


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (object(), "builtins.object"),
        ({1, 2}, "builtins.set"),
        (print, "builtin_function"),
        (b"bytes", "builtins.bytes"),
        (torch.eye(2).to_sparse(), "sparse"),
        ({frozenset(): 1}, "frozenset"),
        (np.array([object()]), "numpy.ndarray"),
    ],
)
def test_an_unsupported_value_is_reported_with_its_path(tmp_path: Path, value: Any, named: str) -> None:
    with pytest.raises(CheckpointError, match=f"callbacks/mine/0.*{named}"):
        save(tmp_path, 1, {"callbacks": {"mine": [value]}})
    assert list(tmp_path.iterdir()) == []


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    weight = torch.randn(100, 100)
    path = save(tmp_path, 1, {"model": {"in": weight, "out": weight, "view": weight[:2]}})
    assert (path / "data-00000.bin").stat().st_size == 102 * 100 * 4
    fresh = checkpoint.load_weights(path)
    assert fresh["in"].data_ptr() == fresh["out"].data_ptr()
    untied = {"in": torch.zeros(100, 100), "out": torch.zeros(100, 100), "view": torch.zeros(2, 100)}
    checkpoint.load(path, {"model": untied})
    assert all(torch.equal(untied[name], weight) for name in ("in", "out"))
    assert torch.equal(untied["view"], weight[:2])


def test_a_mismatch_names_every_tensor_with_the_found_and_expected_form(tmp_path: Path) -> None:
    path = save(
        tmp_path,
        1,
        {"model": {"a": torch.zeros(2), "b": torch.zeros(3, 4), "c": torch.zeros(1), "d": 5}, "rest": torch.ones(1)},
    )
    into = {
        "a": torch.zeros(2, dtype=torch.float64),
        "b": torch.zeros(3, 5),
        "d": torch.zeros(1),
        "new": torch.full((1,), 8.0),
    }
    with pytest.raises(checkpoint.Mismatch) as caught:
        checkpoint.load(path, {"model": into})
    error = pickle.loads(pickle.dumps(caught.value))  # workers send it to the driver
    assert error.missing == ["model/new"]
    assert error.unexpected == ["model/c"]
    assert error.differing["model/b"] == ("(3, 4) float32", "(3, 5) float32")
    assert error.differing.keys() == {"model/a", "model/b", "model/d"}
    assert str(path) in str(error)
    assert re.search(r"model/b .*\(3, 4\) float32 .*\(3, 5\) float32", str(error))
    assert into["new"] == 8.0


# --- asynchronous saves ----------------------------------------------------------------------------------------------


def test_tensors_may_change_as_soon_as_save_returns(tmp_path: Path) -> None:
    tensor, box = torch.zeros(4_000_000), {"n": 0, "list": [1]}
    checkpointer = checkpoint.Checkpointer(tmp_path, keep=10)
    for step in range(1, 5):  # buffers are reused from the second on
        tensor.fill_(step)
        box["n"] = step
        checkpointer.save(step, {"state": {"tensor": tensor, "box": box}}, own={"mine": tensor[:5]})
        tensor.fill_(math.nan)
        box["n"] = -1
    checkpointer.close()
    for step, path in checkpoint.available(tmp_path).items():
        content = checkpoint.load(path)
        assert torch.equal(content.state["state"]["tensor"], torch.full_like(tensor, step))
        assert content.state["state"]["box"]["n"] == step
        assert torch.equal(content.own[0]["mine"], torch.full((5,), float(step)))
    assert len(checkpoint.available(tmp_path)) == 4


def test_a_shape_may_change_between_saves(tmp_path: Path) -> None:
    checkpointer = checkpoint.Checkpointer(tmp_path, keep=10)
    for step in (1, 2, 3):
        checkpointer.save(step, {"x": torch.ones(step, 2)})
    checkpointer.close()
    assert [checkpoint.load(path).state["x"].shape[0] for path in checkpoint.available(tmp_path).values()] == [1, 2, 3]


def test_an_error_of_a_background_save_is_raised_by_the_next_call(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    checkpointer = checkpoint.Checkpointer(directory)
    checkpointer.save(1, {"x": torch.ones(2)}, asynchronous=False)
    shutil.rmtree(directory)
    checkpointer.save(2, {"x": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r" 2 .*checkpoints: "):
        checkpointer.save(3, {"x": torch.ones(2)})
    directory.mkdir()
    checkpointer.save(4, {"x": torch.ones(2)})  # the error is raised once only
    saved = checkpointer.wait()
    assert saved is not None
    assert saved.path == directory / "step-00000004"


# --- damage ----------------------------------------------------------------------------------------------------------


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def empty(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "data cut short": ("data-00000.bin", lambda path: os.truncate(path / "data-00000.bin", 100)),
    "data longer": ("data-00000.bin", lambda path: (path / "data-00000.bin").open("ab").write(b"x")),
    "one bit of the data": ("data-00000.bin", lambda path: flip(path / "data-00000.bin")),
    "one bit of the metadata": ("metadata.json", lambda path: flip(path / "metadata.json")),
    "one bit of the state": ("state.json", lambda path: flip(path / "state.json")),
    "data missing": ("data-00000.bin", lambda path: (path / "data-00000.bin").unlink()),
    "metadata missing": ("metadata.json", lambda path: (path / "metadata.json").unlink()),
    "manifest missing": ("manifest.json", lambda path: (path / "manifest.json").unlink()),
    "manifest cut short": ("manifest.json", lambda path: os.truncate(path / "manifest.json", 50)),
    "manifest empty": ("manifest.json", lambda path: os.truncate(path / "manifest.json", 0)),
    "empty directory": ("manifest.json", empty),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_reported_and_skipped(tmp_path: Path, damage: str) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, {"x": torch.full((1000,), float(step)), "n": step})
    file, destroy = DAMAGE[damage]
    destroy(tmp_path / "step-00000003")
    newest = checkpoint.newest_intact(tmp_path)
    assert newest.path == tmp_path / "step-00000002"
    assert [damaged.path.name for damaged in newest.skipped] == ["step-00000003"]
    assert file in newest.skipped[0].reason
    assert "\n" not in newest.explain()
    assert "step-00000003" in newest.explain()
    with pytest.raises(CheckpointError, match=file):
        checkpoint.load(tmp_path / "step-00000003")
    # A new checkpoint of the same step replaces it.
    save(tmp_path, 3, {"n": 33})
    assert checkpoint.load(tmp_path / "step-00000003").state == {"n": 33}


def test_no_intact_checkpoint_and_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.newest_intact(tmp_path / "absent") == checkpoint.NewestCheckpoint(None, [])
    assert checkpoint.available(tmp_path / "absent") == {}
    (save(tmp_path, 5, {"n": 1}) / "state.json").unlink()
    (tmp_path / "step-00000009").write_text("a file")
    (tmp_path / "notes").mkdir()
    newest = checkpoint.newest_intact(tmp_path)
    assert newest.path is None
    assert "step-00000005" in newest.explain()
    with pytest.raises(CheckpointError, match=r"^[^:]*step-00000777\.$"):
        checkpoint.load(tmp_path / "step-00000777")


def test_finding_a_checkpoint_needs_no_torch() -> None:
    script = "import sys, launcher.engine.checkpoint as c; c.newest_intact('.'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=240).returncode == 0


# --- forged checkpoints ----------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def rewrite(path: Path, name: str, change: Callable[[Any], Any] | bytes) -> None:
    """Change a file of a checkpoint, and update its checksum in the manifest."""
    file = path / name
    if isinstance(change, bytes):
        file.write_bytes(change)
    else:
        content = json.loads(file.read_text())
        file.write_text(json.dumps(change(content) or content))
    manifest = json.loads((path / "manifest.json").read_text())
    content = file.read_bytes()
    manifest["files"][name] = {"size": len(content), "xxh128": xxhash.xxh3_128_hexdigest(content)}
    (path / "manifest.json").write_text(json.dumps(manifest))


def forge(**changes: Any) -> Callable[[Path], None]:
    """Change the entry of tensor `model/x`, or its chunk, in the metadata."""

    def change(content: Any) -> None:
        entry = content["tensors"]["model/x"]
        for key, value in changes.items():
            (entry if key in ("dtype", "shape", "chunks") else entry["chunks"][0])[key] = value

    return lambda path: rewrite(path, "metadata.json", change)


def forge_manifest(name: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"][name] = {"size": 1, "xxh128": ""}
        (path / "manifest.json").write_text(json.dumps(manifest))

    return change


def link(target: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / "data-00000.bin").unlink()
        (path / "data-00000.bin").symlink_to(target)

    return change


def link_to_the_same(path: Path) -> None:
    (path / "data-00000.bin").rename(path.parent / "other")
    (path / "data-00000.bin").symlink_to(path.parent / "other")


def pipe(path: Path) -> None:
    (path / "data-00000.bin").unlink()
    os.mkfifo(path / "data-00000.bin")


HUGE = {"shape": [2**50], "chunks": [{"offsets": [0], "sizes": [2**50], "file": "data-00000.bin", "start": 0}]}
FORGED: dict[str, tuple[str, Callable[[Path], None]]] = {
    "another directory": ("metadata.json", forge(file="../../x")),
    "absolute path": ("metadata.json", forge(file="/etc/passwd")),
    "a file of JSON as data": ("metadata.json", forge(file="state.json")),
    "a file that is not listed": ("metadata.json", forge(file="data-00009.bin")),
    "a list for a file": ("metadata.json", forge(file=[])),
    "manifest with another directory": ("manifest.json", forge_manifest("../../x")),
    "manifest with a pickle": ("manifest.json", forge_manifest(".metadata")),
    "link": ("data-00000.bin", link("/etc/passwd")),
    "link to a valid file": ("data-00000.bin", link_to_the_same),
    "device": ("data-00000.bin", link("/dev/zero")),
    "pipe": ("data-00000.bin", pipe),
    "huge": ("metadata.json", forge(**HUGE)),
    "huge and empty": ("metadata.json", forge(shape=[0, 2**61, 2**61], chunks=[])),
    "huge shape without data": ("metadata.json", forge(shape=[2**40, 2**40])),
    "chunks for nothing": ("metadata.json", forge(chunks=[])),
    "offset beyond the end": ("metadata.json", forge(start=2**60)),
    "negative offset": ("metadata.json", forge(start=-4)),
    "negative size": ("metadata.json", forge(shape=[-1], sizes=[-1])),
    "half a size": ("metadata.json", forge(shape=[2.5])),
    "boolean size": ("metadata.json", forge(shape=[True])),
    "too many dimensions": ("metadata.json", forge(shape=[1] * 1000)),
    "box outside of the tensor": ("metadata.json", forge(offsets=[1])),
    "shared bytes": ("metadata.json", forge(start=8)),
    "unknown type": ("metadata.json", forge(dtype="object")),
    "an attribute for a type": ("metadata.json", forge(dtype="__builtins__")),
    "wrong byte order": (
        "metadata.json",
        lambda path: rewrite(path, "metadata.json", lambda c: {**c, "byteorder": "big"}),
    ),
    "list for metadata": ("metadata.json", lambda path: rewrite(path, "metadata.json", b"[]")),
    "deep metadata": ("metadata.json", lambda path: rewrite(path, "metadata.json", b"[" * 10**6)),
    "deep state": ("state.json", lambda path: rewrite(path, "state.json", b'{"a":' * 10**5 + b"1" + b"}" * 10**5)),
    "endless number": ("state.json", lambda path: rewrite(path, "state.json", b"1" * 10**5)),
    "list for state": ("state.json", lambda path: rewrite(path, "state.json", b"[]")),
    "unknown kind": (
        "state.json",
        lambda path: rewrite(path, "state.json", lambda c: {**c, "shared": {"x": {"$call": "os.system"}}}),
    ),
    "missing tensor": (
        "state.json",
        lambda path: rewrite(path, "state.json", lambda c: {**c, "shared": {"x": {"$tensor": "y"}}}),
    ),
    "unhashable key": (
        "state.json",
        lambda path: rewrite(path, "state.json", lambda c: {**c, "shared": {"x": {"$dict": [[[], 1]]}}}),
    ),
    "wrong world": ("state.json", lambda path: rewrite(path, "state.json", lambda c: {**c, "world_size": 5})),
}


@pytest.mark.parametrize("forgery", FORGED)
def test_a_forged_checkpoint_is_rejected_with_the_name_of_the_file(tmp_path: Path, forgery: str) -> None:
    path = save(tmp_path, 1, {"model": {"w": torch.ones(4), "x": torch.ones(5)}})
    named, change = FORGED[forgery]
    change(path)
    with pytest.raises(CheckpointError, match=named):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match=named):
        checkpoint.load(path, verified=True)
    with pytest.raises(CheckpointError, match=named):
        checkpoint.load_weights(path)


def test_reading_executes_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    evil = pickle.dumps(Evil(mark), protocol=2)
    path = save(tmp_path, 1, {"model": {"x": torch.ones(1000, dtype=torch.uint8)}})
    # Stock DCP would unpickle this file.
    (path / ".metadata").write_bytes(evil)
    checkpoint.load(path)
    # As tensor data: first too short, then with the right size, so that it is read as numbers.
    rewrite(path, "data-00000.bin", evil)
    with pytest.raises(CheckpointError, match=r"data-00000\.bin"):
        checkpoint.load(path)
    rewrite(path, "data-00000.bin", evil.ljust(1000, b"\0"))
    assert bytes(checkpoint.load_weights(path)["x"].tolist()).startswith(evil)
    # A directory with the files of stock DCP.
    foreign = tmp_path / "step-00000002"
    foreign.mkdir()
    for name in (".metadata", "__0_0.distcp"):
        (foreign / name).write_bytes(evil)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        checkpoint.load(foreign)
    # Files of weights.
    for name in ("weights.pt", "weights.safetensors", "weights"):
        (tmp_path / name).write_bytes(evil)
        with pytest.raises(CheckpointError, match=name):
            checkpoint.load_weights(tmp_path / name)
    torch.save({"x": torch.ones(1), "evil": Evil(mark)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"weights\.pt"):
        checkpoint.load_weights(tmp_path / "weights.pt")
    assert not mark.exists()
    pickle.loads(evil)
    assert mark.exists(), "the planted pickle does nothing, so this test is void"


# --- interrupted and failed saves ------------------------------------------------------------------------------------


def fill_the_disk(directory: str, printed: str) -> None:
    with open(printed, "w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    checkpointer = checkpoint.Checkpointer(directory)
    checkpointer.save(10, {"x": torch.ones(1000)}, asynchronous=False)
    # Limits files to a megabyte, like a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
    checkpointer.save(20, {"x": torch.ones(1_000_000)})
    try:
        checkpointer.wait()
    except CheckpointError as error:
        os.write(1, str(error).encode())
    checkpointer.save(30, {"x": torch.ones(2000)}, asynchronous=False)


def test_a_full_disk_is_reported_and_the_last_good_checkpoint_is_kept(tmp_path: Path) -> None:
    directory, printed = tmp_path / "checkpoints", tmp_path / "printed"
    process = FORKSERVER.Process(target=fill_the_disk, args=(str(directory), str(printed)))
    process.start()
    process.join(timeout=240)
    assert process.exitcode == 0, printed.read_text()
    message = printed.read_text()
    assert " 20 " in message.partition(str(directory))[0]  # without a traceback of DCP
    assert message.count("\n") == 0
    assert str(directory) in message
    assert re.search(r" 0: File too large, \S+ [KMGT]iB ", message)
    assert "step-00000010" in message
    assert [path.name for path in directory.iterdir()] == ["step-00000030"]
    checkpoint.verify(directory / "step-00000030")


def test_insufficient_disk_space_is_reported_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 1, {"x": torch.ones(2)})
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40 - 2**20, 2**20))
    with pytest.raises(CheckpointError, match=r" 4\.0 MiB, .* 1\.0 MiB "):
        save(tmp_path, 2, {"x": torch.ones(2**20)})
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/checkpoints: Not a directory"):
        checkpoint.Checkpointer(tmp_path / "file" / "checkpoints")


def save_for_ever(directory: str) -> None:
    torch.set_num_threads(1)
    checkpointer = checkpoint.Checkpointer(directory, keep=2)
    start = 1 + max(checkpoint.available(directory), default=0)
    for step in range(start, 10_000):
        tensors = {f"{index}": torch.full((100_000,), float(step)) for index in range(20)}
        checkpointer.save(step - step % 2, {"model": tensors})  # every second save replaces one of the same step


def test_killed_at_any_moment_a_checkpoint_is_complete_or_absent(tmp_path: Path) -> None:
    leftovers = 0
    for delay in (0.0, 0.01, 0.03, 0.06, 0.1, 0.2):
        process = FORKSERVER.Process(target=save_for_ever, args=(str(tmp_path),))
        seen = max(checkpoint.available(tmp_path), default=0)
        process.start()
        deadline = time.monotonic() + 240
        while max(checkpoint.available(tmp_path), default=0) <= seen:
            assert time.monotonic() < deadline
            assert process.is_alive()
            time.sleep(0.005)
        time.sleep(delay)
        process.kill()
        process.join()
        leftovers += sum(path.name.startswith(".") for path in tmp_path.iterdir())
        before = set(checkpoint.available(tmp_path))
        for path in checkpoint.available(tmp_path).values():
            checkpoint.verify(path)
        assert not checkpoint.newest_intact(tmp_path).skipped
        checkpoint.Checkpointer(tmp_path)  # the next start cleans up, and restores a replaced checkpoint
        assert not any(path.name.startswith(".") for path in tmp_path.iterdir())
        assert before <= set(checkpoint.available(tmp_path))
        for step, path in checkpoint.available(tmp_path).items():
            for tensor in checkpoint.load_weights(path).values():
                assert tensor[0] in (step, step + 1)
                assert torch.equal(tensor, tensor[:1].expand_as(tensor))
    assert leftovers, "no save was interrupted, so this test is void"


@pytest.mark.parametrize("kind", ["tmp", "old"])
def test_cleaning_restores_complete_checkpoints_and_removes_the_others(tmp_path: Path, kind: str) -> None:
    save(tmp_path, 1, {"n": 1})
    save(tmp_path, 2, {"n": 2}).rename(tmp_path / f".step-00000002.{kind}-0a")  # killed between two renames
    (save(tmp_path, 3, {"n": 3}).rename(tmp_path / f".step-00000003.{kind}-0b") / "state.json").unlink()
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000001.tmp-0c")
    save(tmp_path / "other", 4, {"n": 4}).rename(tmp_path / ".step-00000004.gone-0d")
    (tmp_path / ".mine").mkdir()
    removed = files.clean(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", "other", "step-00000001", "step-00000002"]
    assert len(removed) == 3
    assert checkpoint.load(tmp_path / "step-00000002").state == {"n": 2}


def test_a_kill_during_deletion_leaves_no_partial_checkpoint_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, {"n": step})
    new = save(tmp_path / "other", 3, {"n": 33})
    remove = shutil.rmtree

    def half(path: Path, ignore_errors: bool = False) -> None:
        (Path(path) / "state.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", half)
    with pytest.raises(KeyboardInterrupt):
        files.commit(new, tmp_path, 3)
    with pytest.raises(KeyboardInterrupt):
        files.prune(tmp_path, 3, None, 1)
    for path in checkpoint.available(tmp_path).values():
        checkpoint.verify(path)
    assert checkpoint.load(tmp_path / "step-00000003").state == {"n": 33}
    monkeypatch.setattr(shutil, "rmtree", remove)
    assert len(files.clean(tmp_path)) == 2


# --- retention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "newest", "best", "keep", "kept"),
    [
        ({1, 2, 3, 4}, 4, None, 1, {4}),
        ({1, 2, 3, 4}, 4, 2, 1, {2, 4}),
        ({1, 2, 3, 4}, 4, 4, 1, {4}),
        ({1, 2, 3, 4}, 4, 1, 2, {1, 3, 4}),
        ({1, 2, 3, 4}, 4, 2, 0, {2, 4}),  # the newest is always kept
        ({1, 2, 3, 4}, 4, 9, 9, {1, 2, 3, 4}),  # the best one does not exist
        ({1, 2, 8}, 2, None, 1, {2}),  # resumed from 1 because 8 was damaged: 8 does not belong to this history
        ({1, 2, 8}, 2, 8, 1, {2, 8}),
    ],
)
def test_retention_by_number_newest_and_best(
    steps: set[int], newest: int, best: int | None, keep: int, kept: set[int]
) -> None:
    assert files.to_keep(steps, newest, best, keep) == kept


def test_old_checkpoints_are_deleted_after_a_new_one_is_durable(tmp_path: Path) -> None:
    checkpointer = checkpoint.Checkpointer(tmp_path, keep=2)
    for step in (10, 20, 30, 40, 50):
        checkpointer.save(step, {"n": step})
        if step == 20:
            checkpointer.best = 20
    checkpointer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020", "step-00000040", "step-00000050"]
    assert checkpointer.last is not None
    assert checkpointer.last.note == ""


# --- weights of other files ------------------------------------------------------------------------------------------


def test_weights_are_loaded_from_files(tmp_path: Path) -> None:
    weights = {"a.weight": torch.randn(2, 3), "a.bias": torch.randn(2).bfloat16(), "n": torch.tensor(3)}
    torch.save(weights, tmp_path / "plain.pt")
    torch.save({"epoch": 3, "state_dict": weights}, tmp_path / "wrapped.ckpt")
    for name in ("plain.pt", "wrapped.ckpt"):
        assert same(dict(checkpoint.load_weights(tmp_path / name)), weights)
    path = save(tmp_path, 1, {"model": {**weights, "_extra_state": {"x": 1}}, "ema": {"a": torch.ones(1)}, "n": 1})
    assert same(dict(checkpoint.load_weights(path)), weights)
    assert same(dict(checkpoint.load_weights(path, "ema")), {"a": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"step-00000001 .*'other'; .* model, ema, n"):
        checkpoint.load_weights(path, "other")
    with pytest.raises(CheckpointError, match=r"absent\.pt\.$"):
        checkpoint.load_weights(tmp_path / "absent.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"x": 1}, tmp_path / "none.pt")
    for name in ("list.pt", "none.pt"):
        with pytest.raises(CheckpointError, match=name):
            checkpoint.load_weights(tmp_path / name)


def test_weights_are_loaded_from_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="the package safetensors is not installed")
    weights = {"a.weight": torch.randn(2, 3), "a.bias": torch.randn(2).bfloat16()}
    safetensors.save_file(weights, tmp_path / "weights.safetensors")
    found = checkpoint.load_weights(tmp_path / "weights.safetensors")
    assert same(dict(sorted(found.items())), dict(sorted(weights.items())))


def test_missing_safetensors_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pip install safetensors"):
        checkpoint.load_weights(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("supports_direct", [True, False])
@pytest.mark.parametrize("length", [0, 1, 8191, 8192, 8193, 3 * 8192, 3 * 8192 + 5])
def test_a_file_has_the_given_content_with_and_without_direct_io(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, supports_direct: bool
) -> None:
    monkeypatch.setattr(files, "BLOCK_BYTES", 8192)
    if not supports_direct:
        original = fcntl.fcntl

        def refusing(descriptor: Any, command: int, argument: int = 0) -> int:
            if command == fcntl.F_SETFL and argument & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return original(descriptor, command, argument)

        monkeypatch.setattr(fcntl, "fcntl", refusing)
    content = random.Random(length).randbytes(length)
    entry = files.write_file(tmp_path / "data", [content[at : at + 3000] for at in range(0, length, 3000)])
    assert (tmp_path / "data").read_bytes() == content
    assert (entry.size, entry.checksum) == (length, xxhash.xxh3_128_hexdigest(content))


def test_one_element_of_any_stride_is_saved(tmp_path: Path) -> None:
    column = torch.arange(6.0).reshape(2, 3)[:1, 1]  # shape (1,), stride 3
    path = save(tmp_path, 1, {"model": {"column": column}})
    assert torch.equal(checkpoint.load(path).state["model"]["column"], torch.tensor([1.0]))
