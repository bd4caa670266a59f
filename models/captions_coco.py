"""Pictures with captions in the layout of COCO: a folder of pictures, and a JSON file of captions for each part."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from models.captions_data import PAD, UNKNOWN, PictureInputs, Vocabulary, read_captions, words_of
from models.file_limits import MAX_PIXELS
from models.vision_data import directory, limited

CHECKED_AT_START = 16  # pictures of each part that are decoded before training starts


class Coco:
    """`root` in COCO's layout: `annotations/captions_train2017.json`, `train2017/*.jpg`, and the same for val2017.

    Every caption is a sample, so a picture occurs once per caption. Pictures are scaled and center-cropped to `height`
    x `width`, in training cropped randomly from a picture that is larger by `crop`; mean 0.5 and deviation 0.25 become
    0 and 1. Words are those of `Vocabulary.of(words, min_count)`; others are read as UNKNOWN, in validation at most the
    share `max_unknown`. Captions, the existence of every picture and a few pictures are checked immediately; another
    broken picture is reported when it is read.
    """

    def __init__(
        self,
        root: str,
        words: str | Sequence[str],
        min_count: int = 5,
        train: str = "annotations/captions_train2017.json",
        train_pictures: str = "train2017",
        val: str = "annotations/captions_val2017.json",
        val_pictures: str = "val2017",
        height: int = 128,
        width: int = 128,
        channels: int = 3,
        crop: int = 8,
        max_unknown: float = 0.1,
        limit: int | None = None,
        val_limit: int | None = None,
        num_workers: int = 2,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if min(height, width) < 8 or min(crop, num_workers) < 0:
            raise ValueError(f"data: {height=}, {width=}, {crop=}, {num_workers=}: the first two at least 8, others 0.")
        if channels not in (1, 3):
            raise ValueError(f"data.channels={channels}: 1 is gray and 3 is color.")
        folder = directory(root, "captions and pictures (annotations/captions_train2017.json, train2017/*.jpg, …)")
        self.num_workers, self.size, self.channels, self.max_pixels = num_workers, (height, width), channels, max_pixels
        vocabulary = Vocabulary.of(words, min_count)
        learned = _captions(folder / train, folder / train_pictures, "data.train")
        examined = _captions(folder / val, folder / val_pictures, "data.val")
        _check_words(folder / val, examined, vocabulary, max_unknown)
        learned, examined = limited(learned, limit, "limit"), limited(examined, val_limit, "val_limit")
        self.train = CaptionedPictures(learned, vocabulary, self.size, channels, crop, max_pixels)
        self.val = CaptionedPictures(examined, vocabulary, self.size, channels, max_pixels=max_pixels)

    def inputs(self, path: str) -> PictureInputs:
        """Return a picture, or a folder of pictures, scaled and cropped as in validation."""
        return PictureInputs(path, lambda file: _normal(_decode(str(file), self.size, self.channels, self.max_pixels)))

    @staticmethod
    def collate(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return pictures (B, C, H, W), and captions (B, L) padded with PAD to the longest."""
        captions = [caption for _, caption in samples]
        longest = max(len(caption) for caption in captions)
        padded = [F.pad(caption, (0, longest - len(caption)), value=PAD) for caption in captions]
        return torch.stack([picture for picture, _ in samples]), torch.stack(padded)

    @staticmethod
    def collate_inputs(pictures: list[Tensor]) -> Tensor:
        return torch.stack(pictures)


class CaptionedPictures:
    """Map-style: a picture (C, H, W) float32, decoded on demand, and its caption (L,) int64 with START and END.

    `lengths` are those of the captions. Random crops are drawn from torch's generator, which the caller seeds.
    """

    def __init__(
        self,
        captions: Sequence[tuple[str, str]],
        vocabulary: Vocabulary,
        size: tuple[int, int],
        channels: int,
        crop: int = 0,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        """`captions`: (picture file, caption); `crop`: number of additional pixels for random crops."""
        self.files = [file for file, _ in captions]
        self.captions = [caption for _, caption in captions]
        self.lengths = [len(words_of(caption)) + 2 for caption in self.captions]
        self.vocabulary, self.size, self.channels, self.crop = vocabulary, size, channels, crop
        self.max_pixels = max_pixels
        for file in self.files[:: max(1, len(self.files) // CHECKED_AT_START)]:
            _decode(file, size, channels, max_pixels)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        height, width = self.size
        picture = _decode(self.files[index], (height + self.crop, width + self.crop), self.channels, self.max_pixels)
        top, left = torch.randint(0, self.crop + 1, (2,)).tolist() if self.crop else (0, 0)
        picture = picture[:, top : top + height, left : left + width].contiguous()
        return _normal(picture), torch.tensor(self.vocabulary.encode(self.captions[index]))


def _decode(file: str, size: tuple[int, int], channels: int, max_pixels: int) -> Tensor:
    from models.vision_folder import decode  # with Pillow

    return decode(file, size, channels, max_pixels)


def _normal(picture: Tensor) -> Tensor:
    return picture.float().div_(255).sub_(0.5).div_(0.25)


def _captions(file: Path, pictures: Path, key: str) -> list[tuple[str, str]]:
    """Return (picture file, caption) of every entry of a captions file, after a check that every picture exists."""
    images, captions = read_captions(str(file))
    if not pictures.is_dir():
        raise FileNotFoundError(
            f"{pictures} is not a folder; {key}_pictures must name the folder of the pictures of {file}."
        )
    there = {entry.name for entry in os.scandir(pictures)}
    for i, (identity, _) in enumerate(captions):
        if images[identity] not in there and not (pictures / images[identity]).is_file():
            raise FileNotFoundError(
                f"{file}: annotations[{i}] is about {images[identity]}, which is not in {pictures}. Copy the picture "
                "there, or remove the entry."
            )
    return [(str(pictures / images[identity]), caption) for identity, caption in captions]


def _check_words(file: Path, captions: list[tuple[str, str]], vocabulary: Vocabulary, most: float) -> None:
    """Raise ValueError if validation captions contain too many words that cannot be learned."""
    count, unknown, first = 0, 0, ""
    for i, (_, caption) in enumerate(captions):
        tokens = vocabulary.encode(caption)[1:-1]
        count += len(tokens)
        if UNKNOWN in tokens:
            unknown += tokens.count(UNKNOWN)
            first = first or f'"{words_of(caption)[tokens.index(UNKNOWN)]}" in annotations[{i}]'
    if unknown > most * count:
        raise ValueError(
            f"{file}: {unknown} of {count} words are not among the {len(vocabulary.words)} words of the training "
            f"captions, such as {first}. Expected at most data.max_unknown={most} of them: lower data.min_count, or "
            "validate on captions similar to those of training."
        )
