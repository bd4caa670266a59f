"""models/vision_folder.py: pictures in one folder per class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from models.vision_data import Idx
from models.vision_folder import PictureFolder

COLOURS = {"blue": (0, 0, 255), "red": (255, 0, 0)}


def write_folder(root: Path, count: int = 10) -> None:
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (12, 9), (colour[0], i, colour[2])).save(root / name / f"{i}.png")


def folder(root: Path, **options: Any) -> PictureFolder:
    return PictureFolder(str(root), **{"size": 8, "num_workers": 0, **options})


def test_folder_reads_every_picture_with_its_label(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "blue" / "more").mkdir()
    Image.new("L", (8, 8), 99).save(tmp_path / "blue" / "more" / "deep.JPG")
    for clutter in ("blue/Thumbs.db", "blue/._0.png", "notes.txt"):
        (tmp_path / clutter).write_text("not a picture")
    data = folder(tmp_path, val_fraction=0.2, mean=[0.0, 0.0, 0.5], std=1.0)
    assert (data.classes, len(data.train), len(data.val), data.test) == (["blue", "red"], 17, 4, None)
    assert not {path for path, _ in data.train.files} & {path for path, _ in data.val.files}
    for part in (data.train, data.val):
        for i, (path, label) in enumerate(part.files):
            x, y = part[i]
            assert (x.shape, x.dtype, y) == ((3, 8, 8), torch.float32, label)
            assert data.classes[y] in path
            if path.endswith(".png"):
                expected = torch.tensor(COLOURS[data.classes[y]]) / 255 - torch.tensor([0, 0, 0.5])
                expected[1] = int(Path(path).stem) / 255
                assert torch.allclose(x, expected.view(3, 1, 1).expand(3, 8, 8))
    x, y = next(iter(DataLoader(data.train, batch_size=4)))  # type: ignore[arg-type]
    assert (x.shape, y.dtype) == ((4, 3, 8, 8), torch.int64)


def test_folders_named_train_val_and_test_are_the_sets(tmp_path: Path) -> None:
    for part, count in (("train", 10), ("valid", 3), ("test", 2)):
        write_folder(tmp_path / part, count)
    data = folder(tmp_path)
    assert data.test is not None
    assert [len(part) for part in (data.train, data.val, data.test)] == [20, 6, 4]
    assert all("/valid/" in path for path, _ in data.val.files)
    assert np.bincount([label for _, label in folder(tmp_path, limit=10).train.files]).tolist() == [5, 5]


def test_without_a_validation_folder_train_is_split(tmp_path: Path) -> None:
    write_folder(tmp_path / "train")
    data = folder(tmp_path)
    assert [len(data.train), len(data.val), data.test] == [18, 2, None]


@pytest.mark.parametrize(("mode", "channels"), [("L", 3), ("RGB", 1), ("RGBA", 3), ("P", 1), ("I;16", 1), ("CMYK", 3)])
def test_any_pixel_format_is_converted_to_bytes(tmp_path: Path, mode: str, channels: int) -> None:
    write_folder(tmp_path)
    value = 102  # a grey level in Pillow's palette
    if mode == "I;16":
        picture = Image.fromarray(np.full((9, 9), value * 256 + 7, np.uint16))
    else:
        picture = Image.new("RGB" if mode == "P" else "L", (9, 9), (value,) * 3 if mode == "P" else value).convert(mode)
    path = tmp_path / "blue" / ("0.png" if mode != "CMYK" else "0.tif")
    picture.save(path)
    data = folder(tmp_path, channels=channels, mean=0.0, std=1.0)
    part, index = next((p, i) for p in (data.train, data.val) for i, f in enumerate(p.files) if f[0] == str(path))
    assert (part[index][0] * 255 - value).abs().max() <= 1.01


def test_augmentation_follows_the_random_state_and_excludes_validation(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(5):
            noise = np.random.RandomState(i).randint(0, 256, (8, 8, 3)).astype(np.uint8)
            Image.fromarray(noise).save(tmp_path / name / f"{i}.png")
    data, plain = folder(tmp_path, crop_padding=2, flip=True), folder(tmp_path)
    seen = set()
    for seed in range(200):
        torch.manual_seed(seed)
        x = data.train[0][0]
        torch.manual_seed(seed)
        assert torch.equal(x, data.train[0][0])
        seen.add(x.numpy().tobytes())
    assert len(seen) == 5 * 5 * 2, "every crop and its mirror image must occur"
    assert plain.train[0][0].numpy().tobytes() in seen
    assert torch.equal(data.val[0][0], plain.val[0][0])


def cut(path: str | Path, length: int) -> None:
    Path(path).write_bytes(Path(path).read_bytes()[:length])


def class_of_texts(root: Path) -> None:
    (root / "green").mkdir()
    (root / "green" / "a.txt").write_text("")


def val_without_train(root: Path) -> None:
    (root / "red").rename(root / "test")
    (root / "blue").rename(root / "val")


BAD_FOLDER: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty class": (lambda d: (d / "green").mkdir(), "green .*\\.bmp .*\\.webp"),
    "class of texts": (class_of_texts, "green .*\\.bmp .*\\.webp"),
    "one class": (lambda d: (d / "red").rename(d.parent / "red"), r", blue\.$"),
    "text as picture": (lambda d: (d / "red/0.png").write_text("hello"), "red/0.png .*cannot identify image file"),
    "cut picture": (lambda d: cut(d / "red/3.png", 45), "red/3.png .*image file is truncated"),
    "empty picture": (lambda d: cut(d / "red/3.png", 0), "red/3.png .*cannot identify image file"),
    "val without train": (val_without_train, r"\btest .*\bval .*train/<class>"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_FOLDER.values(), ids=BAD_FOLDER.keys())
def test_a_bad_folder_is_reported_by_name(tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    root = tmp_path / "pictures"
    write_folder(root, count=8)  # few enough that the start check reads all
    spoil(root)
    with pytest.raises(ValueError, match=f"{root}.*{message}"):
        folder(root)


def test_a_picture_damaged_later_is_reported(tmp_path: Path) -> None:
    write_folder(tmp_path)
    data = folder(tmp_path)
    cut(data.train.files[0][0], 45)
    with pytest.raises(ValueError, match=rf"{data.train.files[0][0]} .*image file is truncated"):
        data.train[0]


def test_a_class_without_training_pictures_is_reported(tmp_path: Path) -> None:
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "val")
    (tmp_path / "val" / "red").rename(tmp_path / "val" / "rod")
    with pytest.raises(ValueError, match=r"val/rod .* blue, red"):
        folder(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size=0"),
        ({"channels": 2}, "channels=2"),
        ({"crop_padding": -1}, "crop_padding=-1"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"mean": [0.5, 0.5]}, r"data.mean=\[0.5, 0.5\]: .* 3 "),
        ({"std": 0.0}, "std=0.0"),
        ({"val_fraction": 0.01}, "val_fraction=0.01 .* 20 "),
        ({"limit": 19}, "data.limit=19: .*1 to 18"),
    ],
)
def test_a_bad_folder_option_is_reported_with_its_value(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    write_folder(tmp_path)
    with pytest.raises(ValueError, match=message):
        folder(tmp_path, **options)


@pytest.mark.parametrize("data", [Idx, PictureFolder])
def test_a_root_that_is_no_directory_is_reported(tmp_path: Path, data: Callable[[str], Any]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"data.root=.*nowhere "):
        data(str(tmp_path / "nowhere"))
    with pytest.raises(OSError, match=r"data.root=.*/file "):
        data(str(tmp_path / "file"))


@pytest.mark.parametrize("data", [Idx, PictureFolder])
def test_an_empty_directory_is_reported(tmp_path: Path, data: Callable[[str], Any]) -> None:
    with pytest.raises((ValueError, OSError), match=f"^{tmp_path} "):
        data(str(tmp_path))


def test_pictures_to_predict_are_prepared_like_training_pictures(tmp_path: Path) -> None:
    from models.vision_data import Mnist

    mnist = Mnist(limit=10)
    folder = tmp_path / "given" / "deeper"
    folder.mkdir(parents=True)
    for number in (0, 1):
        Image.fromarray(mnist.train.pixels[number, 0].numpy()).save(folder / f"{number}.png")
    inputs: Any = mnist.inputs(str(tmp_path / "given"))
    assert inputs.names == [str(folder / "0.png"), str(folder / "1.png")]
    for number in (0, 1):
        torch.testing.assert_close(inputs[number], mnist.train[number][0], atol=1e-5, rtol=0)
    one: Any = mnist.inputs(str(folder / "1.png"))
    assert (len(one), one[0].shape) == (1, (1, 28, 28))


@pytest.mark.parametrize("path", ["nowhere", "empty"])
def test_missing_inputs_are_reported(path: str, tmp_path: Path) -> None:
    from models.vision_data import Mnist

    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=rf"input=.*{path} .*\.bmp .*\.webp"):
        Mnist(limit=10).inputs(str(tmp_path / path))
