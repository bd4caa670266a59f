"""Digit strings, joined from ten recordings of a package.

This is *not* natural speech: every "three", in training and in validation, is the same clip of 0.3 s (of unstated
origin), with different speed, loudness, pauses and noise. Held out are the strings (none of those in `val` occurs in
`train`) and the random variations. The data show that a network learns to transcribe, in minutes, on a CPU;
`SpokenDigitsAsterisk` evaluates it on real speech.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from models.speech_files import (
    NAMES,
    Recordings,
    Sample,
    SpeechData,
    change_speed,
    encode,
    read_asterisk,
    read_audio,
)
from models.vision_data import packaged

RATE = 8000


class SpokenDigits(SpeechData):
    """Strings of `fewest` to `most` digits, spelled out: "three seven one".

    The package captcha contains the clips; it is not imported. A string is drawn from (`split_seed`, its index) alone.
    Its speed (0.85 to 1.15, which changes the pitch too, as in Ko et al. 2015, doi:10.21437/Interspeech.2015-711), its
    pauses, its loudness (over 20 dB) and its noise (white to dull, 0 to 30 dB below the speech) are drawn in training
    from the engine's seed, different in every epoch, and in `val` from (`split_seed`, index) alone. Raises OSError if
    captcha is not installed.
    """

    def __init__(
        self, size: int = 3200, val_size: int = 500, fewest: int = 3, most: int = 6, split_seed: int = 0
    ) -> None:
        super().__init__(RATE)
        if min(size, val_size, fewest) < 1 or fewest > most:
            raise ValueError(
                f"data.size={size}, data.val_size={val_size}, data.fewest={fewest}, data.most={most}: each must be at "
                "least 1, and the fewest no more than the most."
            )
        clips = [read_audio(packaged("captcha", f"data/{digit}/default.wav"), RATE) for digit in range(10)]
        strings = draw_strings(size, fewest, most, split_seed, held_out=False)
        others = draw_strings(val_size, fewest, most, split_seed, held_out=True)
        self.train = DigitStrings(clips, strings, self.alphabet, None)
        self.val: Any = DigitStrings(clips, others, self.alphabet, split_seed)


class SpokenDigitsAsterisk(SpokenDigits):
    """SpokenDigits, validated on real speech too: `val` has the digit strings as `string`, and of Asterisk's prompts
    the ten of zero to nine as `digit`, the folder digits (numbers, days, months) as `number`, and all as `prompt`."""

    def __init__(
        self,
        size: int = 3200,
        val_size: int = 500,
        fewest: int = 3,
        most: int = 6,
        split_seed: int = 0,
        root: str = "/usr/share/asterisk/sounds/en_US_f_Allison",
        texts: str = "/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz",
    ) -> None:
        super().__init__(size, val_size, fewest, most, split_seed)
        found = read_asterisk(root, texts)
        self.val = {
            "string": self.val,
            "digit": Recordings([one for one in found if one.text in NAMES], self.alphabet),
            "number": Recordings([one for one in found if one.name.startswith("digits/")], self.alphabet),
            "prompt": Recordings(found, self.alphabet),
        }


class DigitStrings:
    """A data set of strings that are synthesized on demand.

    It has no `lengths`: with batches of strings of similar length the network started to learn 130 steps later.
    """

    def __init__(self, clips: list[np.ndarray], strings: list[str], alphabet: str, seed: int | None) -> None:
        """`seed`: draw the variations from it and the index, not from the seeds of `__getitems__`."""
        self.clips, self.strings, self.seed = clips, strings, seed
        self.texts = [encode(" ".join(NAMES[int(digit)] for digit in string), alphabet, string) for string in strings]

    def __len__(self) -> int:
        return len(self.strings)

    def __getitems__(self, indices: Sequence[int], seeds: Sequence[int]) -> list[Sample]:
        return [self._sample(index, seed) for index, seed in zip(indices, seeds, strict=True)]

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        return self._sample(index, int(torch.randint(2**62, ())))

    def _sample(self, index: int, seed: int) -> Sample:
        state = [seed & 0xFFFFFFFF, seed >> 32] if self.seed is None else [self.seed, index]
        audio = speak(self.strings[index], self.clips, np.random.RandomState(state))
        return torch.from_numpy(audio), self.texts[index]


def draw_strings(size: int, fewest: int, most: int, seed: int, held_out: bool) -> list[str]:
    """Return `size` strings of digits. One in ten of all possible strings is held out, selected by its checksum."""
    strings = []
    for index in range(size):
        random = np.random.RandomState([seed, int(held_out), index])  # its stream is frozen (NEP 19)
        for _ in range(10_000):
            length = random.randint(fewest, most + 1)
            string = "".join(map(str, random.randint(10, size=length)))
            if (zlib.crc32(string.encode()) % 10 == 0) == held_out:
                break
        else:
            raise ValueError(f"data.fewest={fewest}, data.most={most}: too few strings to hold some of them out.")
        strings.append(string)
    return strings


def speak(string: str, clips: list[np.ndarray], random: np.random.RandomState) -> np.ndarray:
    """Return a string of digits as sound (n,) float32 in -1..1, at 8 kHz, with the variations of SpokenDigits."""
    speed = random.uniform(0.9, 1.1)
    parts = [np.zeros(random.randint(400, 1600), np.float32)]
    for digit in string:
        clip = clips[int(digit)]
        pace = speed * random.uniform(0.945, 1.045)
        spoken = change_speed(clip, pace)
        pause = np.zeros(random.randint(0, 1200), np.float32)
        parts += [spoken * np.float32(10 ** random.uniform(-0.15, 0.15)), pause]
    parts.append(np.zeros(random.randint(400, 1600), np.float32))
    voice = np.concatenate(parts)
    white = random.standard_normal(len(voice) + 7).astype(np.float32)
    dull = np.convolve(white, np.full(8, 8**-0.5, np.float32), "valid")
    share = random.uniform()
    noise = np.float32(1 - share) * white[: len(voice)] + np.float32(share) * dull
    level = np.sqrt(np.mean(voice**2) / np.mean(noise**2)) * 10 ** (-random.uniform(0, 30) / 20)
    mixed = voice + np.float32(level) * noise
    return mixed * np.float32(0.9 * 10 ** -random.uniform(0, 1) / np.abs(mixed).max())
