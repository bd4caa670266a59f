"""Pictures with captions: rows of real MNIST digits captioned in words, and the vocabulary of all captions.

A picture is (C, H, W) float32, a caption a row of tokens: START, its words, END, then PAD up to the longest caption.
captions_coco.py reads COCO's layout. Invalid data raise a ValueError or an OSError that names the file and the entry.
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

PAD, START, END, UNKNOWN = range(4)  # the tokens that are not words; words follow
SPECIAL = 4
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 28  # height and width of an MNIST digit
SHIFT = 2  # maximum offset of a digit in pixels
# Maximum distortion of training digits: radians, fraction of the size, fraction of the height.
ROTATION, SCALING, SHEAR = 0.2, 0.12, 0.15
WORD = re.compile(r"\w+(?:['’]\w+)*")


class Vocabulary:
    """Words and their tokens: token SPECIAL + i is `words[i]`."""

    def __init__(self, words: Iterable[str]) -> None:
        """Raises ValueError if a word is empty, duplicate, or would be split or lower-cased when a caption is read."""
        self.words = list(words)
        for word, times in Counter(self.words).items():
            if times > 1:
                raise ValueError(f'words: "{word}" occurs {times} times; list every word once.')
            if words_of(word) != [word]:
                raise ValueError(f'words: "{word}" is not one word in lower case, as captions are read.')
        if not self.words:
            raise ValueError("words: []; a caption needs at least one word.")
        self._token = {word: SPECIAL + i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return SPECIAL + len(self.words)

    def encode(self, caption: str) -> list[int]:
        """Return START, a token for each word (UNKNOWN for an unknown word), END."""
        return [START, *(self._token.get(word, UNKNOWN) for word in words_of(caption)), END]

    def text(self, tokens: Iterable[int]) -> str:
        """Return the caption of `tokens`: the words after START (if present), up to END or PAD."""
        words = []
        for token in tokens:
            if token in (END, PAD):
                break
            if token != START:
                words.append("<unknown>" if token == UNKNOWN else self.words[token - SPECIAL])
        return " ".join(words)

    @classmethod
    def of(cls, source: str | Sequence[str], min_count: int = 1) -> Vocabulary:
        """Return the vocabulary of a list of words, a text file with one word per line, or a COCO captions file
        (`.json`).

        From a captions file: the words that occur at least `min_count` times, the most frequent first.
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
                f"{path}: no word occurs in its captions min_count={min_count} times; the most frequent occurs "
                f"{max(counts.values(), default=0)} times. Lower data.min_count."
            )
        return cls(kept)


def words_of(caption: str) -> list[str]:
    """Return the words of a caption in lower case, without punctuation."""
    return WORD.findall(caption.casefold())


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file. Raises FileNotFoundError if it does not exist, ValueError if it is not UTF-8."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not a file; expected captions in COCO's layout (.json), or one word per line."
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#x}.") from error


@lru_cache(maxsize=4)  # the network reads the words, the data the captions: a file of 90 MB is parsed once, not twice
def read_captions(file: str) -> tuple[dict[Any, str], list[tuple[Any, str]]]:
    """Read a COCO captions file: ({image id: file name}, [(image id, caption)] in its order).

    Layout (cocodataset.org/#format-data): {"images": [{"id", "file_name"}…], "annotations": [{"image_id",
    "caption"}…]}, other keys are ignored. Raises ValueError naming the invalid entry.
    """
    path = Path(file)
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}.") from error
    images: dict[Any, str] = {}
    for i, (identity, name) in enumerate(_entries(path, content, "images", ("id", "file_name"))):
        if identity in images:
            raise ValueError(f"{path}: images[{i}] has the id {identity} of an earlier entry. Ids must be unique.")
        images[identity] = _text(path, f"images[{i}].file_name", name)
    captions = []
    for i, (identity, caption) in enumerate(_entries(path, content, "annotations", ("image_id", "caption"))):
        if identity not in images:
            raise ValueError(f"{path}: annotations[{i}] belongs to image_id {identity}, which no entry of images has.")
        if not words_of(_text(path, f"annotations[{i}].caption", caption)):
            raise ValueError(f"{path}: annotations[{i}].caption is {caption!r}, which contains no word.")
        captions.append((identity, caption))
    return images, captions


def _entries(path: Path, content: Any, key: str, fields: tuple[str, str]) -> Iterable[tuple[Any, Any]]:
    """Return the two fields of every entry of the list `key`."""
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(
            f'{path} is not a file of COCO captions: it needs the non-empty lists "images" and "annotations", '
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
        raise ValueError(f"{path}: {where} is {value!r}; expected a non-empty text.")
    return value


# ---- rows of digits -------------------------------------------------------------------------------------------------


class DigitRows:
    """Pictures of `least` to `most` MNIST digits in a row, 28 high and 28 `most` wide; captions such as "three seven".

    The digits are those of `vision_data.Mnist`: the 4,000 training and the 1,000 validation digits are never mixed.
    Number, choice and positions of the digits are drawn from (split_seed, index) alone. Training pictures are slightly
    distorted, and, with `redraw`, drawn again in each epoch, from the seed that the caller passes for each sample.
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
        # The two never share a seed, so that no layout of a training picture is repeated in validation.
        self.train: Rows = rows(mnist.train, limit, 2 * split_seed, least, most, distorted=True)
        self.val = Rows(mnist.val, val_limit, 2 * split_seed + 1, least, most, distorted=False)

    def inputs(self, path: str) -> PictureInputs:
        """Return a picture, or a folder of pictures: a row of digits each, bright on dark or dark on bright, scaled to
        fit."""
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
        """`digits`: a `vision_data.Pictures` of single digits."""
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
        # The row starts at any position, so the position of a digit does not reveal its index in the caption.
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
        """Return the chosen digits (D,), shifted and optionally distorted by looks (D, 6): (D, 28, 28) in 0..255.

        An output pixel is read at the position of the inverse map (Jaderberg et al. 2015, arXiv:1506.02025, section 3).
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
        # Elementwise products and sums, not a matrix product: a digit does not depend on the rest of the batch.
        grid = maps[:, :, 0] * place + maps[:, :, 1] * place[:, None] + maps[:, :, 2]  # (D, 2, 28, 28)
        return F.grid_sample(pixels, grid.permute(0, 2, 3, 1), align_corners=False)[:, 0].numpy()


class RedrawnRows(Rows):
    """`Rows` that differ in each epoch: drawn from the seed of each sample, not from the index."""

    def __getitems__(self, indices: Sequence[int], seeds: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        return super().__getitems__(indices) if seeds is None else self._draw(seeds)


def uniform(seeds: Sequence[int], count: int) -> np.ndarray:
    """Return numbers in [0, 1), (seeds, count) float64, each row from its seed alone: SplitMix64 (Steele et al. 2014).

    Creating a generator for each sample would take longer than drawing its picture.
    """
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], np.uint64)[:, None] + steps
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) / 2**53


# ---- pictures to be captioned ---------------------------------------------------------------------------------------


class PictureInputs:
    """The picture at `path`, or the pictures of that folder in the order of their names: (C, H, W) float32 each.

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
        except Exception as error:  # Pillow's decoders raise exceptions of any type
            what = str(error).replace(repr(str(file)), "it")
            raise ValueError(f"{file} cannot be read as a picture: {what}.") from error
