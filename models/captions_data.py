"""Pictures with captions: rows of real MNIST digits captioned in words, and the vocabulary of all captions.

A picture is (C, H, W) float32, a caption a row of tokens: START, its words, END, then PAD up to the longest caption.
COCO's layout is read by captions_coco.py. Whatever is wrong with the data is a ValueError or an OSError that names the
file and the entry.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.file_limits import open_picture
from models.vision_data import Mnist

PAD, START, END, UNKNOWN = range(4)  # the tokens that are no words; words follow
SPECIAL = 4
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 28  # height and width of an MNIST digit
SHIFT = 2  # a digit lies off its place by at most so many pixels
# How training digits are distorted, at most: radians, part of the size, part of the height.
ROTATION, SCALING, SHEAR = 0.2, 0.12, 0.15
WORD = re.compile(r"\w+(?:['’]\w+)*")


class Vocabulary:
    """Words and their tokens: token SPECIAL + i is `words[i]`."""

    def __init__(self, words: Iterable[str]) -> None:
        """Raises ValueError when a word is empty, twice there, or would be split or folded when a caption is read."""
        self.words = list(words)
        for word, times in Counter(self.words).items():
            if times > 1:
                raise ValueError(f'words: "{word}" is there {times} times; every word once.')
            if words_of(word) != [word]:
                raise ValueError(f'words: "{word}" is not one word in small letters, as captions are read.')
        if not self.words:
            raise ValueError("words: empty; a caption needs at least one word.")
        self._token = {word: SPECIAL + i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return SPECIAL + len(self.words)

    def encode(self, caption: str) -> list[int]:
        """START, a token for each word (UNKNOWN for one that is not in here), END."""
        return [START, *(self._token.get(word, UNKNOWN) for word in words_of(caption)), END]

    def text(self, tokens: Iterable[int]) -> str:
        """The caption that `tokens` stand for: what follows START (if it is there), up to END or PAD."""
        words = []
        for token in tokens:
            if token in (END, PAD):
                break
            if token != START:
                words.append("<unknown>" if token == UNKNOWN else self.words[token - SPECIAL])
        return " ".join(words)

    @classmethod
    def of(cls, source: str | Sequence[str], min_count: int = 1) -> Vocabulary:
        """The vocabulary of a list of words, a text file with a word a line, or a COCO captions file (`.json`).

        Of a captions file: the words that stand in it at least `min_count` times, the most frequent first.
        """
        if not isinstance(source, str):
            return cls(str(word) for word in source)
        path = Path(source).expanduser()
        if path.suffix != ".json":
            return cls(line.strip() for line in read_text(path).splitlines() if line.strip())
        counts = Counter(chain.from_iterable(words_of(caption) for _, caption in read_captions(str(path))[1]))
        kept = [word for word, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if n >= min_count]
        if not kept:
            raise ValueError(
                f"{path}: no word stands in its captions min_count={min_count} times; the most frequent is there "
                f"{max(counts.values(), default=0)} times. Lower data.min_count."
            )
        return cls(kept)


def words_of(caption: str) -> list[str]:
    """The words of a caption in small letters; punctuation is left out."""
    return WORD.findall(caption.casefold())


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises FileNotFoundError where there is none, ValueError where it is something else."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; expected captions in COCO's layout (.json), or a word a line.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#x}.") from error


@lru_cache(maxsize=4)  # the network reads the words, the data the captions: a file of 90 MB once, not twice
def read_captions(file: str) -> tuple[dict[Any, str], list[tuple[Any, str]]]:
    """A COCO captions file: ({image id: file name}, [(image id, caption)] in its order).

    Layout (cocodataset.org/#format-data): {"images": [{"id", "file_name"}…], "annotations": [{"image_id",
    "caption"}…]}, other keys are not looked at. Raises ValueError naming the entry that is not so.
    """
    path = Path(file)
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}.") from error
    images: dict[Any, str] = {}
    for i, (identity, name) in enumerate(_entries(path, content, "images", ("id", "file_name"))):
        if identity in images:
            raise ValueError(f"{path}: images[{i}] has the id {identity}, as an entry before it. Ids must differ.")
        images[identity] = _text(path, f"images[{i}].file_name", name)
    captions = []
    for i, (identity, caption) in enumerate(_entries(path, content, "annotations", ("image_id", "caption"))):
        if identity not in images:
            raise ValueError(f"{path}: annotations[{i}] belongs to image_id {identity}, which no entry of images has.")
        if not words_of(_text(path, f"annotations[{i}].caption", caption)):
            raise ValueError(f"{path}: annotations[{i}].caption is {caption!r}, in which there is no word.")
        captions.append((identity, caption))
    return images, captions


def _entries(path: Path, content: Any, key: str, fields: tuple[str, str]) -> Iterable[tuple[Any, Any]]:
    """The two fields of every entry of the list `key`."""
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(
            f'{path} is no file of COCO captions: it needs the lists "images" and "annotations" with entries in them, '
            f'and has {"an empty" if entries == [] else "no"} "{key}".'
        )
    for i, entry in enumerate(entries):
        for field in fields:
            if not isinstance(entry, dict) or field not in entry:
                raise ValueError(f'{path}: {key}[{i}] has no "{field}"; expected {" and ".join(fields)}.')
        if not isinstance(entry[fields[0]], int | str):
            raise ValueError(f"{path}: {key}[{i}].{fields[0]} is {entry[fields[0]]!r}; expected a number or a text.")
        yield entry[fields[0]], entry[fields[1]]


def _text(path: Path, where: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{path}: {where} is {value!r}; expected a text that is not empty.")
    return value


# ---- rows of digits -------------------------------------------------------------------------------------------------


class DigitRows:
    """Pictures of `least` to `most` MNIST digits in a row, 28 high and 28 `most` wide; captions such as "three seven".

    The digits are those of `vision_data.Mnist`: the 4,000 that train and the 1,000 that validate never meet. How many
    digits, which, and where they lie is drawn from (split_seed, index) alone. Training pictures are distorted a little,
    and, with `redraw`, drawn anew in each epoch, from the seed that the caller gives for each sample.
    """

    num_workers = 0

    def __init__(
        self,
        words: Sequence[str] = DIGITS,
        least: int = 2,
        most: int = 5,
        limit: int = 10_000,
        val_limit: int = 1_000,
        redraw: bool = True,
        split_seed: int = 0,
    ) -> None:
        if not 1 <= least <= most <= 20:
            raise ValueError(f"data.least={least}, data.most={most}: 1 <= least <= most <= 20 digits in a picture.")
        if min(limit, val_limit) < 1:
            raise ValueError(f"data.limit={limit}, data.val_limit={val_limit}: at least one picture each.")
        vocabulary = Vocabulary.of(words)
        if len(vocabulary.words) != 10:
            raise ValueError(f"data.words has {len(vocabulary.words)} words; ten are needed, those of 0 to 9.")
        mnist = Mnist(split_seed=split_seed)
        self.mean, self.std, self.most = mnist.train.mean, mnist.train.std, most
        rows = RedrawnRows if redraw else Rows
        # The two never share a seed, so that no layout of a training picture comes back in validation.
        self.train: Rows = rows(mnist.train, limit, 2 * split_seed, least, most, distorted=True)
        self.val = Rows(mnist.val, val_limit, 2 * split_seed + 1, least, most, distorted=False)

    def inputs(self, path: str) -> PictureInputs:
        """A picture, or a folder of them: a row of digits each, bright on dark or dark on bright, scaled to fit."""
        return PictureInputs(path, self._read)

    def _read(self, path: Path) -> Tensor:
        from PIL import Image, ImageOps

        picture = ImageOps.exif_transpose(open_picture(path)).convert("L")
        x = np.asarray(picture)
        if np.median(np.concatenate([x[0], x[-1], x[:, 0], x[:, -1]])) > 127:
            picture = ImageOps.invert(picture)  # MNIST is bright on dark
        picture = ImageOps.pad(picture, (SIDE * self.most, SIDE), Image.Resampling.BILINEAR, color=0)
        return torch.from_numpy(np.array(picture)).float().sub_(self.mean).mul_(1 / self.std)[None]


class Rows:
    """Map-style: a whole batch of pictures (B, 1, 28, 28 most) float32 and captions (B, most + 2) int64."""

    def __init__(self, digits: Any, length: int, seed: int, least: int, most: int, distorted: bool) -> None:
        """`digits`: a `vision_data.Pictures` of single ones."""
        self.digits, self.length, self.seed = digits, length, seed
        self.least, self.most, self.distorted = least, most, distorted

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pictures, tokens = self.__getitems__([range(self.length)[index]])
        return pictures[0], tokens[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self._draw([(self.seed << 32) + index for index in indices])

    def _draw(self, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        size, most = len(seeds), self.most
        drawn = uniform(seeds, 2 + 7 * most)
        count = self.least + (drawn[:, 0] * (most - self.least + 1)).astype(int)  # (B,) digits in each picture
        # The row begins anywhere: where a digit lies does not say which one of the caption it is.
        start = (drawn[:, 1] * (SIDE * (most - count) + 1)).astype(int)  # (B,)
        chosen = (drawn[:, 2 : 2 + most] * len(self.digits)).astype(int)  # (B, most)
        there = np.arange(most) < count[:, None]  # (B, most)
        looks = drawn[:, 2 + most :].reshape(size, most, 6) * 2 - 1  # (B, most, 6) in [-1, 1)
        cells = self._digits(chosen[there], looks[there])  # (D, 28, 28), digit after digit
        canvas = np.zeros((size, SIDE, SIDE * most), np.float32)
        for cell, (row, place) in zip(cells, np.argwhere(there), strict=True):
            left = start[row] + SIDE * place
            canvas[row, :, left : left + SIDE] = cell
        tokens = np.full((size, most + 2), PAD)
        tokens[:, 0] = START
        tokens[:, 1:-1][there] = SPECIAL + self.digits.labels.numpy()[chosen[there]]
        tokens[np.arange(size), count + 1] = END
        x = torch.from_numpy(canvas).sub_(self.digits.mean).mul_(1 / self.digits.std)
        return x[:, None], torch.from_numpy(tokens)

    def _digits(self, chosen: np.ndarray, looks: np.ndarray) -> np.ndarray:
        """The chosen digits (D,), shifted and perhaps distorted by looks (D, 6): (D, 28, 28) in 0..255.

        An output pixel is read where the inverse map takes it (Jaderberg et al. 2015, arXiv:1506.02025, section 3).
        """
        pixels = self.digits.pixels[torch.from_numpy(chosen)].float()  # (D, 1, 28, 28)
        shift = looks[:, 4:] * SHIFT * 2 / SIDE  # (D, 2), a picture being 2 wide
        angle, shear = looks[:, 0] * ROTATION, looks[:, 1] * SHEAR
        wide, high = np.exp(looks[:, 2] * SCALING), np.exp(looks[:, 3] * SCALING)
        if not self.distorted:
            shift = np.rint(looks[:, 4:] * SHIFT) * 2 / SIDE
            angle, shear, wide, high = (np.full(len(chosen), value) for value in (0.0, 0.0, 1.0, 1.0))
        across, down = np.cos(angle), np.sin(angle)
        rows = [[across * wide, (shear - down) * high, shift[:, 0]], [down * wide, across * high, shift[:, 1]]]
        maps = torch.from_numpy(np.array(rows, np.float32)).permute(2, 0, 1)[..., None, None]  # (D, 2, 3, 1, 1)
        place = (torch.arange(SIDE) * 2 + 1) / SIDE - 1
        # Products and sums by element, not a matrix product: a digit looks the same whatever else is in the batch.
        grid = maps[:, :, 0] * place + maps[:, :, 1] * place[:, None] + maps[:, :, 2]  # (D, 2, 28, 28)
        return F.grid_sample(pixels, grid.permute(0, 2, 3, 1), align_corners=False)[:, 0].numpy()


class RedrawnRows(Rows):
    """`Rows` that are others in each epoch: drawn from the seed given for each sample, not from the index."""

    def __getitems__(self, indices: Sequence[int], seeds: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        return super().__getitems__(indices) if seeds is None else self._draw(seeds)


def uniform(seeds: Sequence[int], count: int) -> np.ndarray:
    """Numbers in [0, 1), (seeds, count) float64, each row from its seed alone: SplitMix64 (Steele et al. 2014).

    A generator made for each sample would take longer than its picture does.
    """
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], np.uint64)[:, None] + steps
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) / 2**53


# ---- pictures to be captioned ---------------------------------------------------------------------------------------


class PictureInputs:
    """The picture at `path`, or those of the folder there, in the order of their names: (C, H, W) float32 each.

    `names` are the files' names. Raises OSError or ValueError naming the file that is missing or cannot be read.
    """

    def __init__(self, path: str, read: Callable[[Path], Tensor]) -> None:
        from models.vision_folder import SUFFIXES

        place = Path(path).expanduser()
        if place.is_dir():
            self.files = sorted(file for file in place.iterdir() if file.suffix.lower() in SUFFIXES)
        else:
            self.files = [place]
        if not self.files or not place.exists():
            what = "holds no picture" if place.is_dir() else "does not exist"
            raise FileNotFoundError(f"{path} {what}. Expected a picture, or a folder of pictures (.png, .jpg, …).")
        self.names = [file.name for file in self.files]
        self._read = read

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        file = self.files[index]
        try:
            return self._read(file)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise whatever they stumble over
            what = str(error).replace(repr(str(file)), "it")
            raise ValueError(f"{file} cannot be read as a picture: {what}.") from error
