"""models/speech_data.py and speech_files.py: synthesis, LibriSpeech's layout, Asterisk's prompts, rejected data."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from models import speech_files
from models.speech import LETTERS
from models.speech_data import SpokenDigits, SpokenDigitsAsterisk, draw_strings
from models.speech_files import (
    NAMES,
    Asterisk,
    LibriSpeech,
    SpeechData,
    change_speed,
    encode,
    read_asterisk,
    spoken_words,
)
from tests.support.command import Place

REAL = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
LISTED = Path("/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")


@pytest.fixture(scope="module")
def digits() -> SpokenDigits:
    return SpokenDigits(size=300, val_size=100)


def write(path: Path, seconds: float, rate: int = 16000, channels: int = 1, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (round(seconds * rate), channels)
    soundfile.write(path, np.random.RandomState(seed).uniform(-0.5, 0.5, shape), rate)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two subsets in LibriSpeech's layout: three training recordings, one of them WAV, and one for validation."""
    root = tmp_path / "LibriSpeech"
    texts = {"train-clean-100/19/198": ["NORTHANGER ABBEY", "DON'T", "HE"], "dev-clean/84/121": ["GO"]}
    for number, (folder, lines) in enumerate(texts.items()):
        stem = "-".join(folder.split("/")[1:])
        names = [f"{stem}-{i:04d}" for i in range(len(lines))]
        for i, name in enumerate(names):
            write(root / folder / f"{name}.{'wav' if i == 1 else 'flac'}", 1.0 + i, seed=10 * number + i)
        listed = "".join(f"{name} {text}\n" for name, text in zip(names, lines, strict=True))
        (root / folder / f"{stem}.trans.txt").write_text(listed)
    return root


# ---- digit strings --------------------------------------------------------------------------------------------------


def test_validation_strings_are_not_in_the_training_set() -> None:
    train, val = (draw_strings(2000, 3, 6, seed=0, held_out=held_out) for held_out in (False, True))
    assert not set(train) & set(val)
    assert {len(string) for string in train} == {len(string) for string in val} == {3, 4, 5, 6}
    assert len(set(train)) > 1500, "too few different strings"
    assert draw_strings(3, 3, 6, seed=0, held_out=False) == train[:3] == ["751101", "529438", "977433"]
    assert draw_strings(2000, 3, 6, seed=1, held_out=False) != train


def test_a_sample_depends_only_on_its_index_and_seed(digits: SpokenDigits) -> None:
    train = digits.train
    first, second = train.__getitems__([7, 3], [70, 2**62 + 30])
    again = train.__getitems__([3], [2**62 + 30])[0]
    assert torch.equal(again[0], second[0])
    assert torch.equal(again[1], second[1])
    [other] = train.__getitems__([7], [71])
    assert torch.equal(other[1], first[1]), "the seed changed the string"
    assert other[0].shape != first[0].shape or not torch.equal(other[0], first[0]), "the seed did not change the sound"
    read = "".join(LETTERS[n - 1] for n in first[1].tolist())
    assert read == " ".join(NAMES[int(digit)] for digit in train.strings[7])


def test_validation_does_not_depend_on_the_seed(digits: SpokenDigits) -> None:
    one, other = (digits.val.__getitems__([5], [seed])[0][0] for seed in (1, 2))
    assert torch.equal(one, other)
    assert torch.equal(SpokenDigits(size=1, val_size=6).val[5][0], one)
    assert not torch.equal(SpokenDigits(size=1, val_size=6, split_seed=1).val[5][0], one)


def test_single_samples_use_the_global_random_generators(digits: SpokenDigits) -> None:
    torch.manual_seed(3)
    first, following = digits.train[4][0], digits.train[4][0]
    torch.manual_seed(3)
    assert torch.equal(digits.train[4][0], first)
    assert first.shape != following.shape or not torch.equal(first, following)


def test_recordings_have_a_valid_level_and_duration(digits: SpokenDigits) -> None:
    for audio, _ in digits.val.__getitems__(range(50), range(50)):
        assert (audio.dtype, audio.ndim) == (torch.float32, 1)
        assert 0.08 < audio.abs().max() <= 0.901
        assert 0.6 < len(audio) / 8000 < 4


def test_a_batch_is_padded_with_silence(digits: SpokenDigits) -> None:
    samples = digits.val.__getitems__([0, 1, 2], [0, 0, 0])
    batch = digits.collate(samples)
    assert batch["audio"].shape == (3, int(batch["lengths"].max()))
    for i, (audio, text) in enumerate(samples):
        assert torch.equal(batch["audio"][i, : len(audio)], audio)
        assert not batch["audio"][i, len(audio) :].any()
        assert batch["targets"][i, : batch["target_lengths"][i]].tolist() == text.tolist()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"size": 0}, "data.size=0"),
        ({"fewest": 4, "most": 3}, "data.fewest=4, data.most=3"),
        ({"fewest": 0}, "data.fewest=0"),
    ],
)
def test_invalid_options_of_strings_are_rejected(words: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpokenDigits(**words)


def test_a_missing_package_is_reported_with_the_command_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OSError, match=r"captcha.*: pip install 'launch-train\[examples\]'"):
        SpokenDigits()


# ---- LibriSpeech ----------------------------------------------------------------------------------------------------


def test_librispeech_is_read(corpus: Path) -> None:
    data = LibriSpeech(str(corpus), num_workers=0)
    assert (len(data.train), len(data.val), data.test) == (3, 1, None)
    assert data.train.lengths == [16000, 32000, 48000]
    audio, text = data.train[1]
    assert (audio.shape, audio.dtype) == ((32000,), torch.float32)
    assert "".join(LETTERS[n - 1] for n in text.tolist()) == "don't"
    expected = soundfile.read(corpus / "train-clean-100/19/198/19-198-0001.wav", dtype="float32")[0]
    assert torch.equal(audio, torch.from_numpy(expected))
    batch = data.collate([data.train[i] for i in range(3)])
    assert (batch["audio"].shape, batch["rate"]) == ((3, 48000), 16000)


def test_librispeech_can_be_limited(corpus: Path) -> None:
    data = LibriSpeech(str(corpus), max_seconds=2.5, limit=1, test=["dev-clean"])
    assert (len(data.train), len(data.val)) == (1, 1)
    assert data.test is not None
    assert len(data.test) == 1
    assert len(LibriSpeech(str(corpus), max_seconds=2.5).train) == 2


FOLDER = "train-clean-100/19/198"
LINES = "19-198-0000 NORTHANGER ABBEY\n19-198-0001 DON'T\n19-198-0002 HE\n"
Change = Callable[[Path], object]


def lines(text: str) -> Change:
    return lambda root: (root / FOLDER / "19-198.trans.txt").write_text(text)


def sound(name: str, seconds: float, rate: int = 16000, channels: int = 1) -> Change:
    return lambda root: write(root / FOLDER / name, seconds, rate, channels)


BAD: list[tuple[Change, str]] = [
    (sound("19-198-0001.wav", 0), r"0001.wav [^\d]* 25 ms"),
    (sound("19-198-0001.wav", 0.01), r"0001.wav .* 10\.0 ms.* 25 ms"),
    (sound("19-198-0002.flac", 1, 8000), r"0002.flac has 1 channel.* of 8000 .*one of 16000.*ffmpeg.*; or set d"),
    (sound("19-198-0002.flac", 1, channels=2), r"0002.flac has 2 channel.*ffmpeg .*-ac 1"),
    (sound("19-198-0003.flac", 1), r"0003.flac .*\.trans\.txt .*\(1 "),
    (
        lambda root: (root / FOLDER / "19-198-0001.wav").unlink(),
        r"trans.txt, .* 2: .*19-198-0001.flac .*19-198-0001.wav",
    ),
    (lambda root: (root / FOLDER / "19-198-0001.wav").write_text("no sound"), r"0001.wav .*\(Error opening"),
    (lambda root: (root / FOLDER / "19-198-0000.flac").write_bytes(b""), r"0000.flac .*\(Error opening"),
    (lines(LINES.replace("HE", "7 DAYS")), r"trans.txt, .* 3: '7 days' .*'7'"),
    (lines(LINES.replace(" HE", "")), r"trans.txt, .* 3: .*'19-198-0002'"),
    (lines(LINES.replace("DON'T", "A " * 200)), r" 2: 399 .* 2\.00 s .* 99\b"),
    (lambda root: (root / FOLDER / "19-198.trans.txt").write_bytes(b"\xff\xfe"), r"trans.txt is not UTF-8"),
    (lambda root: (root / FOLDER / "19-198.trans.txt").unlink(), r"\.trans\.txt .*\(3 "),
    (lambda root: (root / "dev-clean").rename(root / "dev"), r"data\.val: .* dev-clean; .* dev, train-clean"),
    (lambda root: root.rename(root.with_name("other")), r"data\.root=.*LibriSpeech "),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_recordings_are_reported_with_file_and_row(change: Change, message: str, corpus: Path) -> None:
    change(corpus)
    with pytest.raises((ValueError, OSError), match=message):
        LibriSpeech(str(corpus))


def test_empty_selections_are_reported(corpus: Path) -> None:
    (corpus / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty .*\*\.trans\.txt"):
        LibriSpeech(str(corpus), train=["empty"])
    with pytest.raises(ValueError, match=r"data.val=\[\]: .*LibriSpeech"):
        LibriSpeech(str(corpus), val=[])
    with pytest.raises(ValueError, match=r"data.max_seconds=0.5 .* 3\b"):
        LibriSpeech(str(corpus), max_seconds=0.5)
    with pytest.raises(ValueError, match=r"data.limit=0"):
        LibriSpeech(str(corpus), limit=0)


# ---- Asterisk's prompts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("Press 1, or * -- it's up to you.", "press one or star it's up to you"),
        ("followed by # or just # to exit", "followed by pound or just pound to exit"),
        ("H.323", "h three two three"),
        ("dollar [$]", "dollar"),
        ("press the pound key. (simple tone sound plays)", "press the pound key"),
        ("[ascending tones]", ""),
        ("<beep ascending>", ""),
        ("(10 seconds of silence)", ""),
    ],
)
def test_texts_of_prompts_are_converted_to_spoken_words(text: str, spoken: str) -> None:
    assert spoken_words(text) == spoken


@pytest.fixture
def prompts(tmp_path: Path) -> tuple[str, str]:
    root = tmp_path / "sounds"
    texts = {"digits/1": "one", "digits/2": "two", "go": "Go!", "beep": "[beep]", "short": "far too long for it"}
    for name in texts:
        write(root / f"{name}.wav", 0.2 if name == "short" else 1, 8000)
    listed = tmp_path / "texts.gz"
    content = "; A list\n\n" + "".join(f"{name}: {text}\n" for name, text in texts.items()) + "gone: Gone.\n"
    listed.write_bytes(gzip.compress(content.encode()))
    return str(root), str(listed)


def test_prompts_are_split_by_the_seed(prompts: tuple[str, str]) -> None:
    assert [(one.name, one.text) for one in read_asterisk(*prompts)] == [
        *(("digits/1", "one"), ("digits/2", "two"), ("go", "go"))
    ]
    data = Asterisk(*prompts, val_fraction=0.4)
    assert (len(data.train), len(data.val)) == (2, 1)
    assert not set(data.train.names) & set(data.val.names)
    assert Asterisk(*prompts, val_fraction=0.4).val.names == data.val.names
    assert {*Asterisk(*prompts, folder="digits", val_fraction=0.5).train.names} <= {"digits/1", "digits/2"}


def test_the_speed_of_recordings_is_changed_in_training_only(prompts: tuple[str, str]) -> None:
    data = Asterisk(*prompts, speed=0.2, val_fraction=0.4)
    lengths = set()
    for seed in range(20):
        np.random.seed(seed)
        audio, _ = data.train[0]
        lengths.add(len(audio))
        assert len(data.val[0][0]) == 8000
        np.random.seed(seed)
        assert torch.equal(data.train[0][0], audio)
    assert len(lengths) > 10
    assert 8000 / 1.2 - 1 <= min(lengths) < 7500 < 9000 < max(lengths) <= 8000 / 0.8
    with pytest.raises(ValueError, match=r"data.speed=1.5"):
        Asterisk(*prompts, speed=1.5, val_fraction=0.4)


def test_speed_changes_the_pitch() -> None:
    tone = np.sin(2 * np.pi * 500 * np.arange(8000) / 8000).astype(np.float32)
    faster = change_speed(tone, 1.25)
    assert (faster.shape, faster.dtype) == ((6400,), np.float32)
    assert np.abs(np.fft.rfft(faster)).argmax() * 8000 / 6400 == 625


def test_asterisk_adds_validation_sets_of_recorded_speech(prompts: tuple[str, str]) -> None:
    data = SpokenDigitsAsterisk(size=2, val_size=3, root=prompts[0], texts=prompts[1])
    assert {name: len(part) for name, part in data.val.items()} == {"string": 3, "digit": 2, "number": 2, "prompt": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda root, listed: root.rename(root.with_name("x")),
            r"data\.root=.*asterisk-core",
        ),
        (lambda root, listed: listed.unlink(), r"data\.texts=.*/usr/share/doc.*dpkg-deb -x"),
        (lambda root, listed: listed.write_bytes(listed.read_bytes()[:-9]), r"texts\.gz [^=]*\("),
        (lambda root, listed: listed.write_text("one: x"), r"texts\.gz .*data\.root="),
        (lambda root, listed: listed.write_bytes(gzip.compress(b"; x\none two\n")), r"texts\.gz, .* 2: .*'one two'"),
        (lambda root, listed: write(root / "go.wav", 1, 16000), r"go.wav has 1 channel.* of 16000 .* 8000\b"),
    ],
)
def test_unreadable_prompts_are_reported(change: Callable[..., object], message: str, prompts: tuple[str, str]) -> None:
    change(Path(prompts[0]), Path(prompts[1]))
    with pytest.raises((ValueError, OSError), match=message):
        Asterisk(*prompts)


def test_an_empty_split_is_reported(prompts: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=r"data\.val_fraction=0\.01 of 3 "):
        Asterisk(*prompts, val_fraction=0.01)
    with pytest.raises(ValueError, match=r"data.folder=nowhere"):
        Asterisk(*prompts, folder="nowhere")


@pytest.mark.skipif(not (REAL.is_dir() and LISTED.is_file()), reason="Debian's asterisk-core-sounds-en-wav is absent")
def test_the_packaged_prompts() -> None:
    """The numbers that the documentation states."""
    found = read_asterisk(str(REAL), str(LISTED))
    assert len(found) == 551
    assert round(sum(one.samples for one in found) / 8000) == 1456
    assert sum(one.text in NAMES for one in found) == 10
    assert sum(one.name.startswith("digits/") for one in found) == 94


# ---- inputs of `launch predict` -------------------------------------------------------------------------------------


def test_inputs_are_a_file_or_a_folder(tmp_path: Path) -> None:
    for name in ("b.wav", "a.flac", "deep/c.WAV"):
        write(tmp_path / name, 0.5, 8000)
    (tmp_path / "notes.txt").write_text("no sound")
    data = SpeechData()
    found = data.inputs(str(tmp_path))
    assert found.names == [str(tmp_path / name) for name in ("a.flac", "b.wav", "deep/c.WAV")]
    batch = data.collate([found[i] for i in range(len(found))])
    assert batch["audio"].shape == (3, 4000)
    assert batch["target_lengths"].tolist() == [0, 0, 0]
    assert data.inputs(str(tmp_path / "b.wav")).names == [str(tmp_path / "b.wav")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.wav", r"nowhere\.wav .*WAV .*FLAC"),
        ("notes.txt", r"notes\.txt .*\(Error opening"),
        ("empty", r"empty .* \.wav .* \.flac"),
        ("fast.wav", r" 16000 .* 8000\b.*ffmpeg"),
    ],
)
def test_unreadable_inputs_are_reported(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no sound")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "fast.wav", 1, 16000)
    with pytest.raises((ValueError, OSError), match=message):
        SpeechData().inputs(str(tmp_path / name))


def test_unknown_characters_are_reported() -> None:
    with pytest.raises(ValueError, match=r"row 3: 'aé7' has '7' 'é'.*data.alphabet and model.alphabet"):
        encode("aé7", LETTERS, "row 3")


def test_missing_soundfile_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(OSError, match=r"^Package .*: pip install 'launch-train\[examples\]'"):
        speech_files.check_audio(Path("a.wav"), 8000)


# ---- command line ---------------------------------------------------------------------------------------------------

QUICK = ("experiment=transcribe", "cluster=none", "data.size=6", "data.val_size=4", "trainer.global_batch_size=3")
TINY = (*QUICK, "trainer.epochs=1", "model.channels=4", "model.hidden=8", "logging.graph=false")


def test_experiment_runs_to_its_end_and_transcribes(here: Place, tmp_path: Path) -> None:
    done = here.here(*TINY, "run.name=a")
    assert done.status == 0, done.err
    metrics = here.result("a")["metrics"]
    assert {"val/loss", "val/character_error_rate", "val/word_error_rate", "val/text_accuracy"} <= set(metrics)
    assert here.result("a")["steps"] == 2
    write(tmp_path / "noise.wav", 0.5, 8000)
    predicted = here.here("predict", "a", f"input={tmp_path}")
    assert predicted.status == 0, predicted.err
    [line] = predicted.out.splitlines()
    assert set(json.loads(line)) == {"input", "transcription"}
    write(tmp_path / "fast.wav", 0.5, 16000)
    failed = here.here("predict", "a", f"input={tmp_path}")
    assert failed.status == 2
    assert "fast.wav has 1 channel(s) of 16000" in failed.err


@pytest.mark.parametrize(("change", "message"), [BAD[2], BAD[8]])
def test_bad_recordings_are_exit_2(change: Change, message: str, corpus: Path, here: Place) -> None:
    change(corpus)
    words = ("data=librispeech", f"data.root={corpus}", "model.rate=16000")
    done = here.here("experiment=transcribe", "cluster=none", *words)
    assert done.status == 2
    assert re.search(message, done.err.replace("\n", " "))
    assert not here.runs.exists()


def test_another_rate_than_the_models_is_exit_2(corpus: Path, here: Place) -> None:
    done = here.here("experiment=transcribe", "cluster=none", "data=librispeech", f"data.root={corpus}")
    assert done.status == 2
    assert "model.rate" in done.err


@pytest.mark.slow
def test_transcribe_reaches_its_target(place: Place) -> None:
    """Two workers on CPUs reach a character error rate of 10% on held-out strings in less than 15 minutes."""
    done = place.launch("experiment=transcribe", "scaling.workers=2", "run.name=a", seconds=900)
    assert done.status == 0, done.err
    result = place.result("a")
    assert result["best"]["value"] <= 0.10
    assert result["metrics"]["val/character_error_rate"] <= 0.10
    assert result["seconds"] < 900
