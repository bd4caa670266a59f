"""Pictures with labels in a folder per class, decoded on demand."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from models.file_limits import MAX_PIXELS, open_picture
from models.vision_data import directory, limited, stratified_order, stratified_split

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}  # folder -> part
CHECKED_AT_START = 16  # pictures of a folder that are decoded before training starts


class PictureFolder:
    """A folder of pictures per class: `root/<class>/**/*.png`, of which `val_fraction` is `val`.

    If all folders in `root` are called train, val (or valid, validation) and test, these are the sets, each with a
    folder per class, and `val` is cut from `root/train` if there is no `root/val`. Classes are numbered in the order of
    their names. Pictures are scaled and center-cropped to `size`, converted to gray or color, and normalized as (pixel
    in 0..1 - mean) / std. A few are decoded immediately, so that a broken folder is reported before training; a broken
    picture is reported when it is read.
    """

    def __init__(
        self,
        root: str,
        size: int = 32,
        channels: int = 3,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        limit: int | None = None,
        val_limit: int | None = None,
        crop_padding: int = 0,
        flip: bool = False,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.25,
        num_workers: int = 2,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if size < 1 or crop_padding < 0 or num_workers < 0:
            raise ValueError(f"{size=}, {crop_padding=}, {num_workers=}: size is at least 1, the others at least 0.")
        if channels not in (1, 3):
            raise ValueError(f"channels={channels}: 1 is gray and 3 is color.")
        folder = directory(root, "a folder of pictures per class")
        self.num_workers = num_workers
        self.classes, train, val, test = _scan(folder, val_fraction, split_seed)
        train, val = list(limited(train, limit, "limit")), list(limited(val, val_limit, "val_limit"))
        look = size, channels, _per_channel(mean, channels, "mean"), _per_channel(std, channels, "std")
        if bool((look[3] <= 0).any()):
            raise ValueError(f"std={std}: must be above zero.")
        self.train = PictureFiles(train, *look, crop_padding, flip, max_pixels)
        self.val = PictureFiles(val, *look, max_pixels=max_pixels)
        self.test = PictureFiles(test, *look, max_pixels=max_pixels) if test else None
        files = train + val
        for path, _ in files[:: max(1, len(files) // CHECKED_AT_START)]:
            decode(path, size, channels, max_pixels)
        self._look, self._max_pixels = look, max_pixels

    def inputs(self, path: str) -> PictureInputs:
        """Return a picture, or all pictures of a folder and its subfolders, in the order of their names."""
        return PictureInputs(path, *self._look, self._max_pixels)


class PictureInputs(Dataset[Tensor]):
    """Pictures without labels: x (C, size, size) float32 each, scaled, cropped and normalized as in training.

    `names` are the files. Raises FileNotFoundError if `path` is neither a picture nor a folder of pictures.
    """

    def __init__(
        self, path: str, size: int, channels: int, mean: Tensor, std: Tensor, max_pixels: int = MAX_PIXELS
    ) -> None:
        """`mean` and `std` (C, 1, 1) are of pixels in 0..1."""
        place = Path(path).expanduser()
        self.names = list(_pictures_below(str(place))) if place.is_dir() else [str(place)] * place.is_file()
        if not self.names:
            found = "holds no picture" if place.is_dir() else "does not exist"
            raise FileNotFoundError(
                f"input={path} {found} ({place.absolute()}); it should be a picture or a folder of pictures "
                f"({' '.join(sorted(SUFFIXES))})."
            )
        self.size, self.channels, self.mean, self.std = size, channels, mean, std
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        pixels = decode(self.names[index], self.size, self.channels, self.max_pixels).float()
        return pixels.div_(255).sub_(self.mean).div_(self.std).contiguous()


class PictureFiles:
    """A data set of picture files, decoded on demand: x (C, size, size) float32, y int.

    Random crops and mirror images are drawn from torch's generator, which the caller seeds for each sample.
    """

    def __init__(
        self,
        files: Sequence[tuple[str, int]],
        size: int,
        channels: int,
        mean: Tensor,
        std: Tensor,
        crop_padding: int = 0,
        flip: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.files = list(files)
        self.size, self.channels = size, channels
        self.mean, self.std = mean, std  # (C, 1, 1), of pixels in 0..1
        self.crop_padding, self.flip, self.max_pixels = crop_padding, flip, max_pixels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        x = decode(path, self.size, self.channels, self.max_pixels).float().div_(255).sub_(self.mean).div_(self.std)
        if self.crop_padding:
            p = self.crop_padding
            x = F.pad(x, (p, p, p, p))  # zero is the mean, that is gray
            top, left = torch.randint(0, 2 * p + 1, (2,)).tolist()
            x = x[:, top : top + self.size, left : left + self.size]
        if self.flip and torch.rand(()) < 0.5:
            x = x.flip(2)
        return x.contiguous(), label


def decode(path: str, size: int | tuple[int, int], channels: int, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Return a picture file as (channels, H, W) uint8: its center, scaled. Raises ValueError naming the file.

    `size` is height and width, or one number for both.
    """
    mode = "RGB" if channels == 3 else "L"
    height, width = (size, size) if isinstance(size, int) else size
    try:
        with open_picture(path, max_pixels, "max_pixels") as opened:
            opened.draft(mode, (width, height))  # JPEG only: decode at a fraction of the size
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I"):  # 16 bits per pixel, which Pillow would clip
                picture = Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            if picture.mode == "F":
                raise ValueError("its pixels are floating-point numbers")
            picture = ImageOps.fit(picture.convert(mode), (width, height), Image.Resampling.BILINEAR)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise exceptions of any type
        what = str(error).replace(repr(path), "it")
        raise ValueError(f"{path} cannot be read as a picture: {what}. Repair or remove it.") from error
    return torch.from_numpy(np.array(picture)).reshape(height, width, channels).permute(2, 0, 1)


def _scan(folder: Path, val_fraction: float, seed: int) -> tuple[list[str], list[Any], list[Any], list[Any]]:
    """Return class names and the (path, label) pairs of train, val and test."""
    names = {entry.name for entry in _folders(folder)}
    if not names or not names <= set(PARTS):
        classes = _class_names(folder)
        train, val, test = _files(folder, classes), [], []
    else:
        parts: dict[str, list[tuple[str, int]]] = {"train": [], "val": [], "test": []}
        if "train" not in names:
            raise ValueError(f"{folder} has {' and '.join(sorted(names))} and no train. Add train/<class>/<pictures>.")
        classes = _class_names(folder / "train")
        for name in sorted(names):
            parts[PARTS[name]] += _files(folder / name, classes)
        train, val, test = parts["train"], parts["val"], parts["test"]
    if not val:
        learn, hold = stratified_split(_labels(train), val_fraction, seed)
        return classes, [train[i] for i in learn], [train[i] for i in hold], test
    train, val = ([part[i] for i in stratified_order(_labels(part), seed)] for part in (train, val))
    return classes, train, val, test


def _class_names(folder: Path) -> list[str]:
    classes = sorted(entry.name for entry in _folders(folder))
    if len(classes) < 2:
        raise ValueError(
            f"{folder} should hold a folder of pictures for each of at least two classes, and holds "
            f"{f'one folder, {classes[0]}' if classes else 'no folder'}."
        )
    return classes


def _files(folder: Path, classes: list[str]) -> list[tuple[str, int]]:
    """Return (path, label) of every picture below `folder`, sorted by name, which file systems do not guarantee."""
    number = {name: label for label, name in enumerate(classes)}
    files: list[tuple[str, int]] = []
    for entry in sorted(_folders(folder), key=lambda entry: entry.name):
        if entry.name not in number:
            raise ValueError(f"{entry.path} is a class that train does not have; it has {', '.join(classes[:8])}.")
        found = list(_pictures_below(entry.path))
        if not found:
            raise ValueError(
                f"{entry.path} is the folder of a class and holds no picture ({' '.join(sorted(SUFFIXES))}). "
                "Add pictures or remove it."
            )
        files += [(path, number[entry.name]) for path in found]
    return files


def _folders(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]


def _pictures_below(folder: str) -> Iterator[str]:
    def stop(error: OSError) -> None:
        raise error  # os.walk would skip a folder that it may not read

    for parent, folders, names in os.walk(folder, onerror=stop):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield os.path.join(parent, name)


def _labels(files: list[tuple[str, int]]) -> np.ndarray:
    return np.array([label for _, label in files], np.int64)


def _per_channel(value: float | Sequence[float], channels: int, key: str) -> Tensor:
    """(C, 1, 1)"""
    tensor = torch.tensor(value, dtype=torch.float32).flatten()
    if len(tensor) not in (1, channels):
        raise ValueError(f"data.{key}={value}: must be one number, or one for each of the {channels} channels.")
    return tensor.expand(channels).reshape(channels, 1, 1)
