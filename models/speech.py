"""Audio to transcriptions: a log-mel front end, convolutions, bidirectional GRUs and CTC.

The order of layers follows Deep Speech 2 (Amodei et al. 2015, arXiv:1512.02595), small enough for a CPU. The
contribution of a recording does not depend on the other recordings of the batch: there is no batch normalization and no
dropout, every layer sets frames after the end of a recording to zero, and the backward GRU starts at the last frame of
each recording. On CUDA PyTorch adds the gradients of CTC atomically, so it rejects this network in deterministic mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LETTERS = " 'abcdefghijklmnopqrstuvwxyz"  # the characters of LibriSpeech's transcripts
BLANK = 0  # of CTC; character c has the number 1 + alphabet.index(c)
WINDOW_S, HOP_S, STRIDE = 0.025, 0.010, 2  # of the spectrogram; the network has one output per STRIDE frames

Batch = dict[str, Any]  # see Speech


class LogMel(nn.Module):
    """Log-mel spectrogram: logarithm of the energy in triangular bands on the mel scale, without parameters.

    m(f) = 2595 log10(1 + f / 700) (O'Shaughnessy 1987); the triangles of Davis and Mermelstein (1980,
    doi:10.1109/TASSP.1980.1163420), evenly spaced in m from 0 Hz to half the rate, each with a peak of 1; a Hann window
    of 25 ms every 10 ms. The mean over time is subtracted from each band, and all bands are divided by one deviation,
    so that loudness and the microphone's frequency response have little effect.
    """

    window: Tensor
    bands: Tensor

    def __init__(self, rate: int, mels: int) -> None:
        super().__init__()
        self.width, self.hop = round(rate * WINDOW_S), round(rate * HOP_S)
        self.size = 1 << (self.width - 1).bit_length()  # of the Fourier transform: the next power of two
        if rate < 4000 or mels < 1:
            raise ValueError(f"rate={rate}, mels={mels}: the rate is at least 4000 (per second), mels at least 1.")
        bands = mel_bands(rate, mels, self.size)
        if not bool(bands.any(0).all()):
            raise ValueError(
                f"mels={mels} at rate={rate}: the lowest bands are narrower than the {rate / self.size:.0f} Hz that a "
                f"window of {1000 * WINDOW_S:.0f} ms resolves. Choose fewer."
            )
        self.register_buffer("window", torch.hann_window(self.width), persistent=False)
        self.register_buffer("bands", bands, persistent=False)  # (size / 2 + 1, mels)

    def forward(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """audio (B, N), lengths (B,) in samples -> features (B, T, mels) float32, frames (B,); zeros after the last.

        A frame counts if its whole window is inside the recording.
        """
        with torch.autocast(audio.device.type, enabled=False):  # 16-bit numbers could not represent the power of a band
            windows = audio.float().unfold(1, self.width, self.hop) * self.window  # (B, T, width)
            spectrum = torch.fft.rfft(windows, n=self.size)  # (B, T, size / 2 + 1)
            power = spectrum.real**2 + spectrum.imag**2
            x = torch.log(power @ self.bands + 1e-5)  # (B, T, mels)
            frames = count_frames(lengths, self.width, self.hop)
            valid = mask(frames, x.shape[1])[:, :, None]  # (B, T, 1)
            count = frames.clamp(min=1)[:, None, None]
            x = (x - (x * valid).sum(1, keepdim=True) / count) * valid
            deviation = ((x**2).mean(2, keepdim=True).sum(1, keepdim=True) / count).sqrt()  # (B, 1, 1)
            return x / (deviation + 1e-3), frames


class Speech(nn.Module):
    """Recordings to characters by connectionist temporal classification (CTC; Graves et al. 2006,
    doi:10.1145/1143844.1143891).

    A batch is a mapping: `audio` (B, N) float32 in -1..1, zeros after each recording's end; `lengths` (B,) int64 in
    samples; `targets` (B, S) int64, `target_lengths` (B,) int64 (see BLANK); `rate` and `alphabet` of the data, which
    must be the model's own. `predict_step` needs the first two only.

    The loss is the negative logarithm of the probability of the whole transcript, per character of it: a mean over
    the characters of all workers. `character_error_rate` and `word_error_rate` of the validation are edits per
    character (word) of the true transcripts, over all of them, so long ones have more weight; `text_accuracy` is the
    share of transcripts without an error. Decoding is greedy: the most likely character of each frame.
    """

    def __init__(
        self,
        alphabet: str = LETTERS,
        rate: int = 8000,
        mels: int = 40,
        channels: int = 32,
        hidden: int = 96,
        layers: int = 2,
    ) -> None:
        """`rate`: samples per second of the recordings. `hidden`: of each GRU, of which a layer has two."""
        super().__init__()
        if len(set(alphabet)) != len(alphabet) or not alphabet:
            raise ValueError(f"alphabet={alphabet!r}: must have characters, each of them once.")
        if min(channels, hidden, layers) < 1:
            raise ValueError(f"channels={channels}, hidden={hidden}, layers={layers}: each must be at least 1.")
        self.alphabet, self.rate = alphabet, rate
        self.front = LogMel(rate, mels)
        self.conv1 = nn.Conv2d(1, channels, 3, stride=(STRIDE, 2), padding=1)  # (B, C, T/2, M/2)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=(1, 2), padding=1)  # (B, C, T/2, M/4)
        self.project = nn.Linear(channels * (((mels + 1) // 2 + 1) // 2), hidden)
        self.norm = nn.LayerNorm(hidden)
        self.recurrent = nn.ModuleList(
            BidirectionalGRU(hidden if layer == 0 else 2 * hidden, hidden) for layer in range(layers)
        )
        self.head = nn.Linear(2 * hidden, 1 + len(alphabet))

    def forward(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """audio (B, N), lengths (B,) -> log-probabilities (B, T, 1 + characters), valid frames of the T (B,)."""
        features, frames = self.front(audio, lengths)  # (B, 2T, M)
        frames = (frames + STRIDE - 1) // STRIDE
        x = features[:, None]  # (B, 1, 2T, M)
        valid = mask(frames, (x.shape[2] + STRIDE - 1) // STRIDE)[:, None, :, None]  # (B, 1, T, 1)
        x = F.relu(self.conv1(x)) * valid  # zeros after the recording, because the next layer reads there
        x = F.relu(self.conv2(x)) * valid  # (B, C, T, M/4)
        x = self.norm(self.project(x.transpose(1, 2).flatten(2)))  # (B, T, H)
        for layer in self.recurrent:
            x = layer(x, frames)  # (B, T, 2H)
        return self.head(x).float().log_softmax(2), frames

    def training_step(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        return {"loss": self._loss(*self._outputs(batch), batch)}

    def validation_step(self, batch: Batch) -> dict[str, tuple[Tensor | float, Tensor | float]]:
        outputs, frames = self._outputs(batch)
        pairs = list(zip(self._read(batch), self._decode(outputs, frames), strict=True))
        edits = sum(edit_distance(true, found) for true, found in pairs)
        words = sum(edit_distance(true.split(), found.split()) for true, found in pairs)
        return {
            "loss": self._loss(outputs, frames, batch),
            "character_error_rate": (float(edits), float(sum(len(true) for true, _ in pairs))),
            "word_error_rate": (float(words), float(sum(len(true.split()) for true, _ in pairs))),
            "text_accuracy": (float(sum(true == found for true, found in pairs)), float(len(pairs))),
        }

    def predict_step(self, batch: Batch) -> list[dict[str, str]]:
        return [{"transcription": text} for text in self._decode(*self._outputs(batch))]

    def examples(self, batch: Batch) -> dict[str, Any]:
        """Return the first recording as spectrogram and audio, and the first eight as text. -> {name: value}"""
        found = self._decode(*self._outputs(batch))
        true = self._read(batch)
        rows = [f"| {one} | {other} |" for one, other in zip(true[:8], found[:8], strict=True)]
        audio = batch["audio"][0, : int(batch["lengths"][0])].float().cpu()
        return {
            "spectrogram": self._picture(audio, f"true: {true[0]}\npredicted: {found[0]}"),
            "recording": (audio, self.rate),
            "transcriptions": "\n".join(["| true | predicted |", "| --- | --- |", *rows]),
        }

    def export_inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the arguments of `forward`. An exported network keeps the length N of this batch; pad shorter
        recordings."""
        return batch["audio"], batch["lengths"]

    def _outputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        for name, mine in (("rate", self.rate), ("alphabet", self.alphabet)):
            if batch.get(name, mine) != mine:
                raise ValueError(
                    f"The model has {name}={mine!r} and the data {batch[name]!r}. Set model.{name} to the latter."
                )
        return self(batch["audio"], batch["lengths"])

    def _loss(self, outputs: Tensor, frames: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """outputs (B, T, 1 + characters) -> the sum over the batch, and its number of characters."""
        lengths = batch["target_lengths"]
        each = F.ctc_loss(outputs.transpose(0, 1), batch["targets"], frames, lengths, BLANK, reduction="none")  # (B,)
        return each.sum(), lengths.sum()

    def _decode(self, outputs: Tensor, frames: Tensor) -> list[str]:
        best = outputs.argmax(2).cpu()  # (B, T)
        return [self._text(collapse(row[:n])) for row, n in zip(best.tolist(), frames.tolist(), strict=True)]

    def _read(self, batch: Batch) -> list[str]:
        """Return the true transcripts."""
        lengths = batch["target_lengths"].tolist()
        return [self._text(row[:n]) for row, n in zip(batch["targets"].tolist(), lengths, strict=True)]

    def _text(self, numbers: Sequence[int]) -> str:
        return "".join(self.alphabet[number - 1] for number in numbers)

    def _picture(self, audio: Tensor, title: str) -> Any:
        from matplotlib.figure import Figure

        lengths = torch.tensor([len(audio)], device=self.front.window.device)
        features, _ = self.front(audio.to(lengths.device)[None], lengths)  # (1, T, M)
        figure = Figure(figsize=(8, 3), layout="constrained")
        axes = figure.subplots()
        extent = (0, features.shape[1] * HOP_S, 0, features.shape[2])
        axes.imshow(features[0].T.cpu().numpy(), origin="lower", aspect="auto", extent=extent)
        axes.set(xlabel="seconds", ylabel="mel band")
        axes.set_title(title, loc="left", family="monospace", fontsize=9, wrap=True)
        return figure


class BidirectionalGRU(nn.Module):
    """One GRU from the first frame to the last, another from the last to the first (Schuster and Paliwal 1997,
    doi:10.1109/78.650093; Cho et al. 2014, arXiv:1406.1078). (B, T, inputs) -> (B, T, 2 hidden), zeros after the end.

    Each recording is reversed separately, so that padding is last in both directions. Packed sequences would work too,
    but `torch.export` does not support them, and they copy the lengths from the GPU at every step.
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.forwards = nn.GRU(inputs, hidden, batch_first=True)
        self.backwards = nn.GRU(inputs, hidden, batch_first=True)

    def forward(self, x: Tensor, frames: Tensor) -> Tensor:
        time = torch.arange(x.shape[1], device=x.device)  # (T,)
        order = frames[:, None] - 1 - time  # (B, T)
        order = torch.where(order < 0, time, order)  # padding is not moved
        forwards, _ = self.forwards(x)
        backwards, _ = self.backwards(_reordered(x, order))
        both = torch.cat([forwards, _reordered(backwards, order)], 2)
        return both * mask(frames, x.shape[1])[:, :, None]


def _reordered(x: Tensor, order: Tensor) -> Tensor:
    """x (B, T, H), order (B, T) -> y (B, T, H) with y[b, t] = x[b, order[b, t]]"""
    return x.gather(1, order[:, :, None].expand(-1, -1, x.shape[2]))


def mask(lengths: Tensor, size: int) -> Tensor:
    """lengths (B,) -> (B, size) bool: true before the end."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def mel_bands(rate: int, mels: int, size: int) -> Tensor:
    """Return weights (size / 2 + 1, mels) from the bins of a Fourier transform of `size` to the bands of LogMel."""
    top = 2595 * np.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, mels + 2) / 2595) - 1)  # Hz; a band starts, peaks and ends at three
    bins = np.arange(size // 2 + 1)[:, None] * rate / size  # Hz
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return torch.from_numpy(np.maximum(0, np.minimum(rising, falling))).float()


def count_frames(samples: Any, width: int, hop: int) -> Any:
    """Return the number of windows of `width`, one every `hop`. An int, or a tensor of ints."""
    frames = (samples - width) // hop + 1
    return frames.clamp(min=0) if isinstance(frames, Tensor) else max(frames, 0)


def outputs_of(samples: int, rate: int) -> int:
    """Return the number of outputs of `Speech` for a recording: 50 per second."""
    return -(-count_frames(samples, round(rate * WINDOW_S), round(rate * HOP_S)) // STRIDE)


def outputs_needed(text: str) -> int:
    """Return the minimum number of outputs for `text`: one per character, and a blank between equal neighbors."""
    return len(text) + sum(one == other for one, other in pairwise(text))


def collapse(numbers: Sequence[int]) -> list[int]:
    """Decode a path of CTC: runs count once, then blanks are removed."""
    return [n for i, n in enumerate(numbers) if n != BLANK and (i == 0 or n != numbers[i - 1])]


def edit_distance(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return the minimum number of insertions, deletions and substitutions between both (Levenshtein 1966).

    Row by row (Wagner and Fischer 1974). Insertions, which depend on their left neighbor, are a running minimum.
    """
    index = {item: number for number, item in enumerate({*one, *other})}
    target = np.array([index[item] for item in other], np.int64)
    places = np.arange(len(other) + 1)
    row = places.copy()
    for i, item in enumerate(one, 1):
        best = np.minimum(row[1:] + 1, row[:-1] + (target != index[item]))
        row = np.minimum.accumulate(np.concatenate([[i], best]) - places) + places
    return int(row[-1])
