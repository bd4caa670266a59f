"""models/language_data.py: windows, every held-out token once, memory-mapped files, and errors of bad files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from models.language_data import UNCOUNTED, Held, KingJames, TextFile, Tokens, Windows, read_verses
from tests.support.command import Place

TOKENS = np.arange(1000, 1103, dtype=np.uint16)


def test_windows_are_consecutive() -> None:
    windows = Windows(TOKENS, 10)
    x, y = windows.__getitems__(range(len(windows)), [7] * len(windows))
    assert x.shape == y.shape == (10, 10)
    assert torch.equal(x.flatten(), torch.arange(1000, 1100))
    assert torch.equal(y, x + 1)
    assert torch.equal(windows[3][0], x[3])


def test_shifted_windows_depend_only_on_their_seeds_and_stay_inside_the_tokens() -> None:
    windows = Windows(TOKENS, 10, shifted=True)
    x, y = windows.__getitems__([0, 0, 5, 9], [3, 2**62 + 1, 3, 9])
    assert x[:, 0].tolist() == [1003, 1000 + (2**62 + 1) % 10, 1053, 1092]
    assert torch.equal(y, x + 1)
    assert int(y.max()) == 1102, "the last token is never predicted"


@pytest.mark.parametrize("length", [16, 17, 20, 41, 63, 64])
@pytest.mark.parametrize("stride", [1, 3, 8, 10])
@pytest.mark.parametrize("start", [1, 5])
def test_every_held_out_token_counts_once_with_enough_context(length: int, stride: int, start: int) -> None:
    context = 10
    tokens = np.arange(length, dtype=np.uint8)
    held = Held(tokens, start, context, stride)
    x, y = held.__getitems__(range(len(held)))
    counted = y[y != UNCOUNTED]
    assert counted.tolist() == list(range(start, length)), "each token must count once, in order"
    assert torch.equal(x + 1, torch.where(y == UNCOUNTED, x + 1, y)), "a target is not the next token"
    for row in y[1:]:
        assert int((row != UNCOUNTED).sum()) <= stride
    with pytest.raises(IndexError):
        held[len(held)]


def test_the_king_james_bible_is_split_by_position() -> None:
    data = KingJames(context=64)
    split = data.val.start
    whole = bytes(data.val.tokens)
    assert len(whole) == 4_137_451
    assert len(whole) - split == 206_873
    assert bytes(data.train.tokens) == whole[:split], "training text must end where the held-out text begins"
    assert whole.startswith(b"In the beginning God created the heaven and the earth.\nAnd the earth was")
    x, y = data.val[0]
    assert bytes(y.tolist()) == whole[split : split + 64]
    assert x[0] == whole[split - 1]


def test_a_text_file_is_read_as_bytes(tmp_path: Path) -> None:
    content = ("naïve Σ\n" * 40).encode()
    (tmp_path / "text.txt").write_bytes(content)
    data = TextFile(str(tmp_path / "text.txt"), context=16, val_fraction=0.25)
    assert bytes(data.val.tokens) == content


def test_prompts_come_from_a_file_or_a_directory(tmp_path: Path) -> None:
    for name, content in (("a.txt", "And God"), ("b.txt", "sang"), ("c.md", "no")):
        (tmp_path / name).write_text(content)
    data = KingJames()
    one = data.inputs(str(tmp_path / "a.txt"))
    assert (bytes(one[0].tolist()), one.names) == (b"And God", [str(tmp_path / "a.txt")])
    several = data.inputs(str(tmp_path))
    assert [Path(name).name for name in several.names] == ["a.txt", "b.txt"]
    assert [len(row) for row in data.collate_inputs([several[0], several[1]])] == [7, 4]


# ---- files of token ids ---------------------------------------------------------------------------------------------


def write(folder: Path, dtype: str = "uint16", **parts: list[int]) -> Path:
    for name, ids in parts.items():
        np.array(ids, dtype="<u2" if dtype == "uint16" else "<u4").tofile(folder / f"{name}.bin")
    return folder


@pytest.mark.parametrize(("dtype", "large"), [("uint16", 60_000), ("uint32", 100_000)])
def test_token_files_are_memory_mapped(tmp_path: Path, dtype: str, large: int) -> None:
    ids = [large, *range(20)]
    data = Tokens(str(write(tmp_path, dtype, train=ids, val=ids[::-1])), vocabulary=large + 1, context=5, dtype=dtype)
    assert isinstance(data.train.tokens, np.memmap)
    assert Windows(data.train.tokens, 5)[0][0].tolist() == ids[:5]
    assert data.val[0][1].tolist() == ids[::-1][1:6]
    assert data.test is None
    write(tmp_path, dtype, test=ids)
    again = Tokens(str(tmp_path), vocabulary=large + 1, context=5, dtype=dtype)
    assert again.test is not None
    assert again.inputs(str(tmp_path / "val.bin"))[0].tolist() == ids[::-1]


def cut(folder: Path) -> None:
    with (folder / "val.bin").open("ab") as file:
        file.write(b"\0")


SPOILED: list[tuple[Callable[[Path], object], dict[str, object], type[Exception], str]] = [
    (lambda folder: (folder / "val.bin").unlink(), {}, FileNotFoundError, r"val\.bin\D*uint16"),
    (lambda folder: (folder / "train.bin").write_bytes(b""), {}, ValueError, r"train\.bin\D*uint16"),
    (cut, {}, ValueError, r"val\.bin.*\b43\b.*\b2\b.*uint16"),
    (lambda folder: write(folder, val=[1, 2, 3]), {}, ValueError, r"val\.bin.*\b3\b.*\b6\b"),
    (lambda folder: write(folder, train=[1] * 9 + [77]), {}, ValueError, r"train\.bin.*\b9\b.*\b77\b.*\b0\b.*\b29\b"),
    (lambda folder: None, {"dtype": "int64"}, ValueError, "uint16 or uint32"),
    (lambda folder: None, {"stride": 6}, ValueError, r"data\.stride=6"),
    (lambda folder: None, {"root": "nowhere"}, FileNotFoundError, "data.root=nowhere"),
]


@pytest.mark.parametrize(("spoil", "settings", "error", "message"), SPOILED)
def test_bad_token_files_are_reported_by_name(
    tmp_path: Path,
    spoil: Callable[[Path], object],
    settings: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    write(tmp_path, train=list(range(21)), val=list(range(21)))
    spoil(tmp_path)
    arguments = {"root": str(tmp_path), "vocabulary": 30, "context": 5} | settings
    with pytest.raises(error, match=message):
        Tokens(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", ValueError, r"text\.txt\D*$"),
        (b"short", ValueError, r"\b5\b.*data.context=16"),
        (None, OSError, r"text\.txt"),
    ],
)
def test_bad_texts_are_reported_by_name(
    tmp_path: Path, content: bytes | None, error: type[Exception], message: str
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message):
        TextFile(str(path), context=16)


def test_a_damaged_package_is_reported_with_file_and_row(tmp_path: Path) -> None:
    path = tmp_path / "kjv.jsonl"
    path.write_text('{"text": "In the beginning"}\n{"verse": 2}\n')
    with pytest.raises(ValueError, match=r'kjv\.jsonl, row 2: .*"text"'):
        read_verses(path)


def test_a_text_shorter_than_the_context_is_exit_2(here: Place, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("In the beginning")
    done = here.here("experiment=language", "data=text", f"data.path={tmp_path}/short.txt", "cluster=none")
    assert done.status == 2
    assert re.search(r"short\.txt.*\b16\b", done.err)
    assert "Traceback" not in done.err
