"""Recordings with transcripts: the base of all speech data sets, Asterisk's voice prompts, and LibriSpeech.

Each class is a whole data section, see vision_data.py. A sample is a pair: audio (n,) float32 in -1..1 and the numbers
of its transcript's characters (S,) int64 (see models/speech.py). Transcripts and the headers of all sound files are
checked immediately, so that an error is reported before training: a ValueError or an OSError that names file and row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.file_limits import MAX_SECONDS, check_regular, check_size, unpacked
from models.speech import LETTERS, WINDOW_S, outputs_needed, outputs_of

SUFFIXES = frozenset({".wav", ".flac"})
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
Sample = tuple[Tensor, Tensor]


class SpeechData:
    """Base class of the data sections of speech: collation, and the inputs of `launch predict`."""

    num_workers = 0

    def __init__(self, rate: int = 8000, alphabet: str = LETTERS) -> None:
        self.rate, self.alphabet = rate, alphabet

    def collate(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Collate samples of any length to the batch of `models.speech.Speech`, padded with zeros."""
        audio, texts = zip(*samples, strict=True)
        return {
            "audio": torch.nn.utils.rnn.pad_sequence(list(audio), batch_first=True),  # (B, N)
            "lengths": torch.tensor([len(one) for one in audio]),  # (B,)
            "targets": torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True),  # (B, S)
            "target_lengths": torch.tensor([len(text) for text in texts]),  # (B,)
            "rate": self.rate,
            "alphabet": self.alphabet,
        }

    def inputs(self, path: str) -> Recordings:
        """Return a sound file, or all sound files of a folder and its subfolders, without transcripts."""
        return Recordings(list(_sound_files(Path(path).expanduser(), self.rate)), self.alphabet)


@dataclass(frozen=True)
class Recording:
    """A sound file and its transcript, or None. `samples`: its length; `name`: its displayed name."""

    path: Path
    samples: int
    rate: int
    text: str | None = None
    name: str = ""


class Recordings:
    """A data set of sound files, read on demand. `lengths` are in samples.

    With `speed`, each is played at a speed between 1 - speed and 1 + speed, which changes the pitch too (Ko et al.
    2015, doi:10.21437/Interspeech.2015-711), drawn from NumPy's generator, which the engine seeds for every sample.
    """

    def __init__(self, recordings: Sequence[Recording], alphabet: str, speed: float = 0.0) -> None:
        if not 0 <= speed < 1:
            raise ValueError(f"data.speed={speed}: must be at least 0 and below 1.")
        self.recordings, self.alphabet, self.speed = recordings, alphabet, speed
        self.lengths = [one.samples for one in recordings]
        self.names = [one.name for one in recordings]

    def __len__(self) -> int:
        return len(self.recordings)

    def __getitem__(self, index: int) -> Sample:
        one = self.recordings[index]
        audio, text = read_audio(one.path, one.rate), one.text or ""
        if self.speed:
            faster = change_speed(audio, np.random.uniform(1 - self.speed, 1 + self.speed))
            if outputs_needed(text) <= outputs_of(len(faster), one.rate):
                audio = faster
        return torch.from_numpy(audio), encode(text, self.alphabet, str(one.path))


class Asterisk(SpeechData):
    """Voice prompts of the Asterisk telephone system: one speaker, 8 kHz, about 24 minutes, as Debian packages them.

    `val_fraction` of the recordings are for validation, drawn from `split_seed` alone. `folder` selects a folder, for
    example `digits`. Transcripts are lower case without punctuation; numerals are spelled out digit by digit, * is
    "star" and # is "pound", as they are read aloud; prompts without speech ("[ascending tones]") are excluded. Prompts
    longer # than `max_seconds` are excluded from training: a few prompts of a minute would take most of the time.
    `speed`: see # Recordings. Raises OSError if the packages, or their documentation with the transcripts, are not
    installed.
    """

    def __init__(
        self,
        root: str = "/usr/share/asterisk/sounds/en_US_f_Allison",
        texts: str = "/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz",
        folder: str | None = None,
        max_seconds: float = 10.0,
        speed: float = 0.1,
        val_fraction: float = 0.2,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        found = read_asterisk(root, texts, folder)
        held_out = round(val_fraction * len(found))
        if not 0 < held_out < len(found):
            raise ValueError(
                f"data.val_fraction={val_fraction} of {len(found)} recordings leaves none to validate or to train."
            )
        order = np.random.RandomState(split_seed).permutation(len(found))  # its stream is frozen (NEP 19)
        self.train = Recordings(_short([found[i] for i in order[held_out:]], max_seconds), self.alphabet, speed)
        self.val = Recordings([found[i] for i in order[:held_out]], self.alphabet)


class LibriSpeech(SpeechData):
    """Folders in the layout of LibriSpeech (Panayotov et al. 2015, doi:10.1109/ICASSP.2015.7178964).

    In `root/<subset>/**/`, each `*.trans.txt` has lines of a recording's name and its transcript, beside `<name>.flac`
    (or .wav), with one channel, of `rate` samples per second. `train`, `val` and `test` name subsets.
    Recordings longer than `max_seconds` are excluded from `train`. Package soundfile reads them.
    """

    def __init__(
        self,
        root: str,
        train: Sequence[str] = ("train-clean-100",),
        val: Sequence[str] = ("dev-clean",),
        test: Sequence[str] = (),
        rate: int = 16000,
        alphabet: str = LETTERS,
        max_seconds: float = 20.0,
        speed: float = 0.0,
        limit: int | None = None,
        val_limit: int | None = None,
        num_workers: int = 2,
        max_file_seconds: float = MAX_SECONDS,
    ) -> None:
        super().__init__(rate, alphabet)
        self._max_file_seconds = max_file_seconds
        self.num_workers = num_workers
        base = Path(root).expanduser()
        if not base.is_dir():
            raise FileNotFoundError(f"data.root={root} is not a directory; it should be one of LibriSpeech's folders.")
        short = _short(self._read(base, train, "train"), max_seconds)
        self.train = Recordings(_limited(short, limit, "limit"), alphabet, speed)
        self.val = Recordings(_limited(self._read(base, val, "val"), val_limit, "val_limit"), alphabet)
        self.test = Recordings(self._read(base, test, "test"), alphabet) if test else None

    def _read(self, base: Path, subsets: Sequence[str], key: str) -> list[Recording]:
        found: list[Recording] = []
        for subset in [subsets] if isinstance(subsets, str) else subsets:
            if not (base / subset).is_dir():
                there = ", ".join(sorted(entry.name for entry in base.iterdir() if entry.is_dir())[:8]) or "none"
                raise FileNotFoundError(f"data.{key}: {base} has no folder {subset}; its folders are: {there}.")
            found += read_librispeech(base / subset, self.rate, self.alphabet, self._max_file_seconds)
        if not found:
            raise ValueError(f"data.{key}=[]: name at least one folder in {base}.")
        return found


def read_librispeech(folder: Path, rate: int, alphabet: str, max_seconds: float = MAX_SECONDS) -> list[Recording]:
    """Return every recording below `folder`, in the order of names, checked without decoding."""
    found: list[Recording] = []
    sounds = {path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES}
    for transcripts in sorted(folder.rglob("*.trans.txt")):
        try:
            lines = transcripts.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{transcripts} is not UTF-8 text ({error}).") from error
        for row, line in enumerate(lines, 1):
            where = f"{transcripts}, line {row}"
            name, _, text = line.strip().partition(" ")
            text = text.strip().lower()
            if not text:
                raise ValueError(f"{where}: expected a recording's name, a space and its transcript; found {line!r}.")
            path = next((p for s in (".flac", ".wav") if (p := transcripts.parent / (name + s)) in sounds), None)
            if path is None:
                raise FileNotFoundError(f"{where}: there is no {name}.flac or {name}.wav beside it.")
            sounds.discard(path)
            encode(text, alphabet, where)
            samples = check_audio(
                path, rate, "; or set data.rate and model.rate, if all files have that rate", max_seconds
            )
            if outputs_needed(text) > outputs_of(samples, rate):
                raise ValueError(
                    f"{where}: {len(text)} characters do not fit the {samples / rate:.2f} s of {path.name}: CTC "
                    f"needs {outputs_needed(text)} outputs and the network has {outputs_of(samples, rate)}. "
                    "Is it the transcript of another recording?"
                )
            found.append(Recording(path, samples, rate, text, str(path.relative_to(folder))))
    if sounds:
        raise ValueError(f"{min(sounds)} has no line in a .trans.txt beside it ({len(sounds)} such file(s)).")
    if not found:
        raise FileNotFoundError(f"{folder} holds no *.trans.txt with .flac or .wav files beside it.")
    return found


_MAX_LIST = 64 * 2**20  # bytes of the list of prompts, decompressed


def read_asterisk(root: str, texts: str, folder: str | None = None) -> list[Recording]:
    """Return the prompts with speech, in the order of their list. See Asterisk."""
    install = "apt-get install asterisk-core-sounds-en asterisk-core-sounds-en-wav"
    base, listed = Path(root), Path(texts)
    if not base.is_dir():
        raise FileNotFoundError(f"data.root={root} does not exist. On Debian and Ubuntu: {install}")
    if not listed.is_file():
        raise FileNotFoundError(
            f"data.texts={texts} does not exist: it is part of package asterisk-core-sounds-en, and some containers "
            f"omit /usr/share/doc at installation. {install}; or unpack it with `apt-get download "
            "asterisk-core-sounds-en` and `dpkg-deb -x`, and set data.texts."
        )
    found: list[Recording] = []
    try:
        content, whole = unpacked(listed, _MAX_LIST)
        lines = content.decode().splitlines()
        if not whole:
            raise EOFError("it is cut short")
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{listed} is damaged ({error}). {install}") from error
    for row, line in enumerate(lines, 1):
        name, colon, text = line.partition(":")
        if not line.strip() or line.startswith(";"):
            continue
        if not colon:
            raise ValueError(f"{listed}, line {row}: expected NAME: TEXT, found {line!r}.")
        spoken = spoken_words(text)
        path = base / f"{name}.wav"
        if not spoken or (folder is not None and not name.startswith(f"{folder}/")) or not path.is_file():
            continue  # one text has no recording
        samples = check_audio(path, 8000)
        if outputs_needed(spoken) <= outputs_of(samples, 8000):
            found.append(Recording(path, samples, 8000, spoken, name))
    if not found:
        where = f"data.folder={folder}: {listed}" if folder else f"{listed}"
        raise ValueError(f"{where} names no recording below data.root={root}. {install}")
    return found


def spoken_words(text: str) -> str:
    """A prompt's text as it is read aloud: "Press 1, or *." -> "press one or star". Empty if it is not speech."""
    if text.lstrip().startswith(("[", "<", "(")):
        return ""
    text = re.sub(r"\[.*?\]|\(.*?\)", " ", text.lower())
    for sign, word in (("*", "star"), ("#", "pound"), *((str(digit), name) for digit, name in enumerate(NAMES))):
        text = text.replace(sign, f" {word} ")
    return " ".join(re.sub(r"[^a-z']", " ", text).split())


def encode(text: str, alphabet: str, where: str) -> Tensor:
    """Return the numbers (S,) of the characters. Raises ValueError starting with `where` for an unknown character."""
    unknown = sorted(set(text) - set(alphabet))
    if unknown:
        raise ValueError(
            f"{where}: {text[:60]!r} has {' '.join(map(repr, unknown[:8]))}, not in the alphabet {alphabet!r}. "
            "Correct the transcript, or set data.alphabet and model.alphabet."
        )
    return torch.tensor([1 + alphabet.index(character) for character in text], dtype=torch.int64)


def change_speed(audio: np.ndarray, speed: float) -> np.ndarray:
    """Resample sound (n,) to play faster (`speed` above 1) or slower, (n / speed,) float32, by linear interpolation."""
    places = np.arange(int(len(audio) / speed)) * speed
    return np.interp(places, np.arange(len(audio)), audio).astype(np.float32)


def check_audio(path: Path, rate: int, otherwise: str = "", max_seconds: float = MAX_SECONDS) -> int:
    """Return the number of samples of a sound file by its header. Raises ValueError if it cannot be used.

    `otherwise`: another remedy for a different rate than converting the file.
    """
    try:
        found = _soundfile().info(str(check_regular(path)))
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be read as sound ({error}). Expected a WAV or FLAC file.") from error
    check_size(f"{path}", found.frames / max(found.samplerate, 1), max_seconds, "seconds", "max_file_seconds")
    return _check(path, found.frames, found.channels, found.samplerate, rate, otherwise)


def read_audio(path: Path, rate: int) -> np.ndarray:
    """Return a sound file as (n,) float32 in -1..1. Raises ValueError if it cannot be used."""
    try:
        audio, found = _soundfile().read(str(check_regular(path)), dtype="float32", always_2d=True)
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be read as sound ({error}). Expected a WAV or FLAC file.") from error
    samples, channels = audio.shape
    _check(path, samples, channels, found, rate)
    return audio[:, 0]


def _check(path: Path, samples: int, channels: int, found: int, rate: int, otherwise: str = "") -> int:
    if found != rate or channels != 1:
        raise ValueError(
            f"{path} has {channels} channel(s) of {found} samples per second; expected one of {rate}. Convert it, with "
            f"`ffmpeg -i IN -ac 1 -ar {rate} OUT` for example{otherwise if found != rate else ''}."
        )
    if samples < WINDOW_S * rate:
        raise ValueError(
            f"{path} is {'empty' if samples == 0 else f'{1000 * samples / rate:.1f} ms long'}; expected at least "
            f"{1000 * WINDOW_S:.0f} ms, one window of the spectrogram. Remove it and its transcript."
        )
    return samples


def _sound_files(path: Path, rate: int) -> Iterator[Recording]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a WAV or FLAC file, or a folder of them.")
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{path} holds no .wav or .flac file.")
    for file in files:
        yield Recording(file, check_audio(file, rate), rate, name=str(file))


def _short(found: list[Recording], max_seconds: float) -> list[Recording]:
    short = [one for one in found if one.samples <= max_seconds * one.rate]
    if not short:
        raise ValueError(f"data.max_seconds={max_seconds} leaves none of {len(found)} recordings for training.")
    return short


def _limited(found: list[Recording], limit: int | None, key: str) -> list[Recording]:
    if limit is not None and limit < 1:
        raise ValueError(f"data.{key}={limit}: must be at least 1.")
    return found[:limit]


def _soundfile() -> Any:
    try:
        import soundfile
    except ImportError as error:
        raise OSError(
            "Package soundfile, which reads sound, is not installed: pip install 'launch-train[examples]'."
        ) from error
    return soundfile
