"""models/captions_data.py and captions_coco.py: rows of digits, words, COCO's layout, and rejected data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.captions_coco import Coco
from models.captions_data import (
    DIGITS,
    END,
    PAD,
    SPECIAL,
    START,
    UNKNOWN,
    DigitRows,
    RedrawnRows,
    Rows,
    Vocabulary,
    uniform,
    words_of,
)
from models.vision_data import Pictures
from tests.support.command import Place


@pytest.fixture(scope="module")
def rows() -> DigitRows:
    return DigitRows(limit=300, val_limit=200)


# ---- rows of digits -------------------------------------------------------------------------------------------------


def test_pictures_show_their_captions() -> None:
    """Uses squares of different brightness as digits, which the test can read from a picture."""
    squares = torch.zeros(10, 1, 28, 28, dtype=torch.uint8)
    squares[:, :, 4:24, 4:24] = 20 * torch.arange(1, 11, dtype=torch.uint8).view(10, 1, 1, 1)
    rows = Rows(Pictures(squares, torch.arange(10), 0, 1), 300, 0, 2, 5, distorted=False)
    pictures, tokens = rows.__getitems__(range(300))
    assert (pictures.shape, pictures.dtype) == ((300, 1, 28, 140), torch.float32)
    assert (tokens.shape, tokens.dtype) == ((300, 7), torch.int64)
    shown = [[x - 1 for x, _ in groupby(row) if x] for row in (pictures[:, 0, 14] / 20).round().int().tolist()]
    for digits, caption in zip(shown, tokens.tolist(), strict=True):
        assert caption == [START, *(SPECIAL + digit for digit in digits), END] + [PAD] * (5 - len(digits))
    assert {len(digits) for digits in shown} == {2, 3, 4, 5}
    assert len({tuple(digits) for digits in shown}) > 250, "too few different captions"
    starts = (pictures[:, 0].amax(1) > 0).int().argmax(1)
    assert starts.min() < 10, "no row starts at the left"
    assert starts.max() > 70, "no row ends at the right"


def test_digits_of_validation_are_not_in_the_training_set(rows: DigitRows) -> None:
    pictures = [{row.numpy().tobytes() for row in part.digits.pixels} for part in (rows.train, rows.val)]
    assert [len(part.digits) for part in (rows.train, rows.val)] == [4000, 1000]
    assert not pictures[0] & pictures[1]
    other = DigitRows(limit=1, val_limit=1, split_seed=1)
    assert {row.numpy().tobytes() for row in other.val.digits.pixels} != pictures[1], "split_seed has no effect"


def same(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_a_picture_depends_only_on_seed_and_index(rows: DigitRows) -> None:
    together = rows.val.__getitems__([7, 3, 199])
    for i, index in enumerate((7, 3, 199)):
        assert same((together[0][i], together[1][i]), rows.val[index])
        assert same(DigitRows(limit=9, val_limit=200).val[index], rows.val[index]), "the limit changed the picture"
        assert not same(DigitRows(limit=9, val_limit=200, split_seed=1).val[index], rows.val[index])
    assert not same(rows.val[3], rows.val[4])


def test_training_pictures_differ_between_epochs(rows: DigitRows) -> None:
    assert isinstance(rows.train, RedrawnRows)
    pictures, tokens = rows.train.__getitems__([7, 3], seeds=[70, 2**62 + 30])
    again, tokens_again = rows.train.__getitems__([3], seeds=[2**62 + 30])
    assert same((again[0], tokens_again[0]), (pictures[1], tokens[1])), "the picture depends on its batch"
    other, _ = rows.train.__getitems__([3], seeds=[2**62 + 31])
    assert not torch.equal(other[0], pictures[1])
    still = DigitRows(limit=10, val_limit=1, redraw=False).train
    assert same(still[3], still[3])


def test_training_pictures_are_distorted_within_the_range_of_brightness(rows: DigitRows) -> None:
    pictures, _ = rows.train.__getitems__(range(200))
    pixels = pictures * rows.std + rows.mean
    assert pixels.min() >= -1e-3
    assert pixels.max() <= 255.01
    assert not torch.equal(pixels, pixels.round()), "no distortion"
    exact = rows.val.__getitems__(range(200))[0] * rows.std + rows.mean
    assert (exact - exact.round()).abs().max() < 2e-3, "validation pictures are distorted"


def test_random_numbers_are_uniform_and_reproducible() -> None:
    drawn = uniform(range(4000), 5)
    assert drawn.shape == (4000, 5)
    assert 0 <= drawn.min() < drawn.max() < 1
    assert np.abs(np.histogram(drawn, 10, (0, 1))[0] / 2000 - 1).max() < 0.1
    assert np.abs(np.corrcoef(drawn.T) - np.eye(5)).max() < 0.06
    # The first outputs of SplitMix64 from seed 0 (as in github.com/lemire/testingRNG).
    assert [int(x * 2**53) for x in uniform([0], 2)[0]] == [0xE220A8397B1DCDAF >> 11, 0x6E789E6AA1B965F4 >> 11]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"least": 0}, "data.least=0"),
        ({"least": 4, "most": 3}, "data.least=4, data.most=3"),
        ({"limit": 0}, "data.limit=0"),
        ({"words": ["one", "two"]}, r"data\.words.*\b2\b"),
        ({"words": ["one"] * 10}, r'"one".*\b10\b'),
        ({"words": ["ONE", *DIGITS[1:]]}, '"ONE"'),
    ],
)
def test_invalid_options_of_rows_are_rejected(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DigitRows(**words)


# ---- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A man's dog, running.", ["a", "man's", "dog", "running"]),
        ("Zwei GRÜNE  Straßen\n", ["zwei", "grüne", "strassen"]),
        ("2 x 3", ["2", "x", "3"]),
        ("?! …", []),
    ],
)
def test_captions_are_read_as_words(caption: str, words: list[str]) -> None:
    assert words_of(caption) == words


def test_words_and_tokens(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("red\n\ncar\n")
    vocabulary = Vocabulary.of(str(tmp_path / "words.txt"))
    tokens = vocabulary.encode("A red car!")
    assert tokens == [START, UNKNOWN, SPECIAL, SPECIAL + 1, END]
    assert vocabulary.text([*tokens, PAD]) == "<unknown> red car"
    assert len(vocabulary) == SPECIAL + 2


# ---- COCO's layout --------------------------------------------------------------------------------------------------

TRAIN, VAL = "annotations/captions_train2017.json", "annotations/captions_val2017.json"
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Six training pictures with two captions each, and three validation pictures with one caption each."""
    root = tmp_path / "COCO"
    (root / "annotations").mkdir(parents=True)
    for part, file, count, each in (("train2017", TRAIN, 6, 2), ("val2017", VAL, 3, 1)):
        (root / part).mkdir()
        names = [f"{i:012d}.{'png' if i % 2 else 'jpg'}" for i in range(count)]
        colours = [list(COLOURS)[i % 3] for i in range(count)]
        for name, colour in zip(names, colours, strict=True):
            Image.new("RGB", (40, 30), COLOURS[colour]).save(root / part / name)
        images = [{"id": 100 + i, "file_name": name, "height": 30, "width": 40} for i, name in enumerate(names)]
        texts = ["A {} wall.", "{}, and nothing else"]
        captions = [
            {"id": 10 * i + k, "image_id": 100 + i, "caption": texts[k].format(colour.upper())}
            for i, colour in enumerate(colours)
            for k in range(each)
        ]
        (root / file).write_text(json.dumps({"info": {}, "images": images, "annotations": captions}))
    return root


def read(root: Path, **options: Any) -> Coco:
    given = {"height": 16, "width": 24, "crop": 2, "min_count": 1, "num_workers": 0, **options}
    return Coco(str(root), **{"words": str(root / TRAIN), **given})


def test_coco_is_read(coco: Path) -> None:
    data = read(coco)
    assert (len(data.train), len(data.val)) == (12, 3)
    vocabulary = data.train.vocabulary
    assert vocabulary.words == ["a", "and", "else", "nothing", "wall", "blue", "green", "red"], "frequent ones first"
    assert data.train.lengths[:2] == [5, 6]
    for part in (data.train, data.val):
        for i in range(len(part)):
            x, tokens = part[i]
            assert (x.shape, x.dtype) == ((3, 16, 24), torch.float32)
            caption = vocabulary.text(tokens.tolist())
            assert caption == " ".join(words_of(part.captions[i]))
            channel = [name in caption for name in COLOURS].index(True)
            assert x.mean((1, 2)).argmax() == channel, "the caption belongs to another picture"
    pictures, tokens = data.collate([data.train[i] for i in range(4)])
    assert (pictures.shape, tokens.shape) == ((4, 3, 16, 24), (4, 6))
    assert tokens[0, 4:].tolist() == [END, PAD]


def test_rare_words_are_unknown(coco: Path) -> None:
    vocabulary = read(coco, min_count=6, max_unknown=1).train.vocabulary
    assert vocabulary.words == ["a", "and", "else", "nothing", "wall"]
    assert vocabulary.encode("a red wall")[2] == UNKNOWN


def test_crops_depend_on_the_seed(coco: Path) -> None:
    gradient = np.arange(40 * 30, dtype=np.uint32).reshape(30, 40) % 251
    Image.fromarray(gradient.astype(np.uint8)).convert("RGB").save(coco / "train2017/000000000001.png")
    data = read(coco, crop=6)
    found = []
    for seed in (0, 0, 1, 2, 3):
        torch.manual_seed(seed)
        found.append(data.train[2][0])
    assert torch.equal(found[0], found[1])
    assert any(not torch.equal(found[0], other) for other in found[2:])
    assert torch.equal(data.val[1][0], data.val[1][0])


Change = Callable[[Path], object]


def edit(file: str, change: Callable[[Any], object]) -> Change:
    def apply(root: Path) -> None:
        content = json.loads((root / file).read_text())
        change(content)
        (root / file).write_text(json.dumps(content))

    return apply


def other_words(content: Any) -> None:
    content["annotations"][1]["caption"] = "Ein roter Wagen"


BAD: list[tuple[Change, str]] = [
    (edit(TRAIN, lambda c: c.pop("annotations")), r'captions_train2017.json .*and has no "annotations"'),
    (edit(TRAIN, lambda c: c.update(images=[])), 'captions_train2017.json.*"images"'),
    (edit(TRAIN, lambda c: c["images"][2].pop("file_name")), r'images\[2\].*"file_name"'),
    (edit(VAL, lambda c: c["annotations"][1].pop("caption")), r'val2017.json: annotations\[1\] has no "caption"'),
    (edit(TRAIN, lambda c: c["annotations"][3].update(image_id=7)), r"annotations\[3\].*image_id.*\b7\b"),
    (edit(TRAIN, lambda c: c["annotations"][4].update(caption=" ")), r"annotations\[4\].caption.*' '"),
    (edit(TRAIN, lambda c: c["annotations"][4].update(caption=None)), r"annotations\[4\].caption.*None"),
    (edit(TRAIN, lambda c: c["annotations"][4].update(caption="?!")), r"'\?!'"),
    (edit(TRAIN, lambda c: c["images"][1].update(id=100)), r"images\[1\].*\b100\b"),
    (edit(TRAIN, lambda c: c["images"][1].update(id=[1])), r"images\[1\].id.*\[1\]"),
    (edit(VAL, other_words), r'val2017.json.*\b3\b.*\b9\b.*\b8\b.*"ein".*annotations\[1\].*max_unknown'),
    (lambda root: (root / TRAIN).write_text('{"images": [,'), r"train2017.json.*\b1\b.*\b13\b"),
    (lambda root: (root / TRAIN).write_bytes(b"\xff\xfe"), "train2017.json.*UTF-8.*0xff"),
    (lambda root: (root / VAL).unlink(), "captions_val2017.json"),
    (lambda root: (root / "train2017/000000000003.png").unlink(), r"annotations\[6\].*000000000003.png"),
    (lambda root: (root / "val2017/000000000000.jpg").write_text("x"), "000000000000.jpg"),
    (lambda root: (root / "val2017").rename(root / "val"), "val2017.*data.val_pictures"),
    (lambda root: root.rename(root.with_name("other")), r"data\.root=.*COCO\b"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_captions_are_reported_with_file_and_entry(change: Change, message: str, coco: Path) -> None:
    change(coco)
    with pytest.raises((ValueError, OSError), match=message):
        read(coco)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_count": 99}, r"min_count=99.*\b6\b"),
        ({"height": 7}, "height=7"),
        ({"channels": 2}, "data.channels=2"),
        ({"limit": 13}, r"data.limit=13.*\b1\b.*\b12\b"),
    ],
)
def test_invalid_settings_are_rejected(options: dict[str, Any], message: str, coco: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read(coco, **options)


# ---- inputs of `launch predict` -------------------------------------------------------------------------------------


def test_inputs_are_a_picture_or_a_folder(rows: DigitRows, tmp_path: Path) -> None:
    x = rows.val[0][0]
    grey = (x[0] * rows.std + rows.mean).round().clamp(0, 255).to(torch.uint8).numpy()
    Image.fromarray(grey).save(tmp_path / "b.png")
    Image.fromarray(255 - grey).convert("RGB").resize((280, 56)).save(tmp_path / "a.PNG")
    (tmp_path / "notes.txt").write_text("no picture")
    found = rows.inputs(str(tmp_path))
    assert (found.names, len(found)) == (["a.PNG", "b.png"], 2)
    assert torch.allclose(found[1], x, atol=0.01), "a picture like those of training was converted differently"
    assert (found[0] - x).abs().mean() < 0.15, "a dark digit on bright ground was not inverted, or not scaled"
    assert rows.inputs(str(tmp_path / "b.png")).names == ["b.png"]


def test_photographs_to_predict_are_prepared_like_validation_pictures(coco: Path) -> None:
    data = read(coco)
    found = data.inputs(str(coco / "val2017"))
    assert torch.equal(data.collate_inputs([found[i] for i in range(3)])[2], data.val[2][0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.png", "nowhere.png"),
        ("empty", "/empty "),
        ("notes.txt", "notes.txt"),
    ],
)
def test_unreadable_inputs_are_reported(name: str, message: str, rows: DigitRows, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, OSError), match=message):
        rows.inputs(str(tmp_path / name))[0]


# ---- command line ---------------------------------------------------------------------------------------------------

SMALL = ("model.width=4", "model.dim=16", "model.heads=2", "logging.graph=false")
QUICK = ("experiment=captions", "cluster=none", "trainer.log_every=2", *SMALL)


def test_experiment_runs_to_its_end_and_predicts(here: Place, rows: DigitRows, tmp_path: Path) -> None:
    done = here.here(*QUICK, "debug=fast", "run.name=a")
    assert done.status == 0, done.err
    assert {"val/loss", "val/exact", "val/token_accuracy"} <= set(here.result("a")["metrics"])
    assert here.result("a")["best"]["tag"] == "val/exact"
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(2):
        Image.fromarray((rows.val[i][0][0] > 0).numpy()).save(folder / f"{i}.png")
    predicted = here.here("predict", "a", f"input={folder}")
    assert predicted.status == 0, predicted.err
    lines = [json.loads(line) for line in predicted.out.splitlines()]
    assert [line["input"] for line in lines] == ["0.png", "1.png"]
    assert all({*line["caption"].split()} <= {*DIGITS, "<unknown>"} and 0 < line["probability"] <= 1 for line in lines)
    (folder / "1.png").write_text("no picture")
    failed = here.here("predict", "a", f"input={folder}")
    assert failed.status == 2
    assert re.search(r"1\.png", failed.err.replace("\n", " "))


PHOTOGRAPHS = ("data=coco", "model.channels=3", "data.min_count=1", "data.height=16", "data.width=24")


def test_experiment_reads_coco(coco: Path, here: Place) -> None:
    words = ("trainer.global_batch_size=4", "trainer.epochs=1", "data.num_workers=0", "model.size=[16,24]")
    done = here.here(*QUICK, *PHOTOGRAPHS, *words, f"data.root={coco}", "run.name=a")
    assert done.status == 0, done.err
    assert here.result("a")["steps"] == 3


@pytest.mark.parametrize(("change", "message"), [BAD[3], BAD[10], BAD[14], BAD[15]])
def test_bad_captions_are_exit_2(change: Change, message: str, coco: Path, here: Place) -> None:
    change(coco)
    done = here.here(*QUICK, *PHOTOGRAPHS, f"data.root={coco}")
    assert done.status == 2
    assert re.search(message, done.err.replace("\n", " "))
    assert not here.runs.exists()


def test_pictures_of_other_channels_than_the_models_are_exit_2(coco: Path, here: Place) -> None:
    done = here.here(*QUICK, *PHOTOGRAPHS, f"data.root={coco}", "model.channels=1")
    assert done.status == 2
    assert "model.channels" in done.err


@pytest.mark.slow
def test_captions_reach_their_target(place: Place) -> None:
    """Two workers on CPUs caption at least 90% of the pictures exactly, in less than 15 minutes."""
    done = place.launch("experiment=captions", "scaling.workers=2", "run.name=a", seconds=900)
    assert done.status == 0, done.err
    result = place.result("a")
    assert result["best"]["value"] >= 0.90
    assert result["metrics"]["val/exact"] >= 0.90
    assert result["seconds"] < 900
