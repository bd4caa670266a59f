"""models/speech.py: the front end, CTC, padding, decoding, and the methods that launch calls."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import speech
from models.speech import (
    BidirectionalGRU,
    LogMel,
    Speech,
    collapse,
    edit_distance,
    mel_bands,
    outputs_needed,
    outputs_of,
)
from models.speech_data import SpokenDigits
from models.speech_files import SpeechData, encode
from tests.support.engine_ranks import make_job
from tests.support.networks import check_configuration, check_two_workers_equal_one, losses_while_training

CONF = Path(speech.__file__).parents[1] / "conf"
FILES = [
    CONF / "model/speech.yaml",
    *(CONF / "data" / f"{n}.yaml" for n in ("spoken_digits", "spoken_digits_asterisk", "asterisk", "librispeech")),
]
SMALL = {"channels": 4, "hidden": 8, "mels": 20}


@pytest.fixture
def network() -> Speech:
    torch.manual_seed(0)
    return Speech(**SMALL)  # type: ignore[arg-type]


def samples(*texts: str) -> list[tuple[Tensor, Tensor]]:
    """Return one recording of noise for each text, all of different lengths."""
    generator = torch.Generator().manual_seed(1)
    return [
        (0.1 * torch.randn(3000 + 1731 * i, generator=generator), encode(text, speech.LETTERS, "a test"))
        for i, text in enumerate(texts)
    ]


def batch_of(*texts: str) -> dict[str, Any]:
    return SpeechData().collate(samples(*texts))


# ---- front end ------------------------------------------------------------------------------------------------------


def test_front_end_is_a_discrete_fourier_transform_in_mel_bands() -> None:
    """Compares the features with the formulas, computed frequency by frequency."""
    front = LogMel(8000, 20)
    audio = 0.1 * torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    features, frames = front(audio, torch.tensor([1000]))
    assert frames.tolist() == [1 + (1000 - 200) // 80] == [features.shape[1]]

    def log_energy(frame: int) -> list[float]:
        x = [audio[0, 80 * frame + n].item() * (0.5 - 0.5 * math.cos(2 * math.pi * n / 200)) for n in range(200)]
        edges = [700 * (10 ** (2146.06 * i / 21 / 2595) - 1) for i in range(22)]  # 2146.06 mel are 4000 Hz
        bands = [0.0] * 20
        for k in range(129):
            re = sum(v * math.cos(2 * math.pi * k * n / 256) for n, v in enumerate(x))
            im = sum(v * math.sin(2 * math.pi * k * n / 256) for n, v in enumerate(x))
            hertz = k * 8000 / 256
            for b in range(20):
                low, mid, high = edges[b : b + 3]
                weight = (hertz - low) / (mid - low) if hertz < mid else (high - hertz) / (high - mid)
                bands[b] += max(0.0, weight) * (re * re + im * im)
        return [math.log(energy + 1e-5) for energy in bands]

    table = np.array([log_energy(frame) for frame in range(11)])
    table -= table.mean(0)
    expected = table / (np.sqrt((table**2).mean()) + 1e-3)
    assert features[0].numpy() == pytest.approx(expected, abs=2e-3)


def test_a_tone_is_in_the_band_of_its_frequency() -> None:
    bands = mel_bands(8000, 40, 256)
    assert bands.shape == (129, 40)
    for hertz in (500, 1000, 3000):
        mel = 2595 * math.log10(1 + hertz / 700)
        assert bands[round(hertz / 8000 * 256)].argmax().item() == round(mel / 2146.06 * 41) - 1


def test_features_do_not_depend_on_loudness() -> None:
    front = LogMel(8000, 20)
    audio = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    loud, quiet = (front(gain * audio, torch.tensor([4000]))[0] for gain in (1.0, 0.05))
    assert (loud - quiet).abs().max() < 0.02


@pytest.mark.parametrize(("samples", "outputs"), [(199, 0), (200, 1), (280, 1), (360, 2), (8000, 49)])
def test_the_number_of_outputs_is_that_of_the_network(samples: int, outputs: int, network: Speech) -> None:
    _, frames = network(torch.zeros(1, 8000), torch.tensor([samples]))
    assert frames.tolist() == [outputs] == [outputs_of(samples, 8000)]


# ---- padding --------------------------------------------------------------------------------------------------------


def test_a_padded_recording_in_a_batch_equals_a_single_recording(network: Speech) -> None:
    texts = ("one", "three seven", "zero nine one two", "a")
    together = batch_of(*texts)
    outputs, frames = network(together["audio"], together["lengths"])
    total, count = 0.0, 0
    for i, sample in enumerate(samples(*texts)):
        alone = SpeechData().collate([sample])
        expected, [n] = network(alone["audio"], alone["lengths"])
        assert frames[i] == n == expected.shape[1]
        assert torch.allclose(outputs[i, :n], expected[0], atol=1e-5), (
            "padding, or another recording, changes the result"
        )
        loss, characters = network.training_step(alone)["loss"]
        total, count = total + loss.item(), count + int(characters)
    loss, characters = network.training_step(together)["loss"]
    assert (loss.item(), int(characters)) == (pytest.approx(total, rel=1e-5), count)


def test_the_content_of_the_padding_has_no_effect(network: Speech) -> None:
    together = batch_of("one", "three seven")
    loss = network.training_step(together)["loss"][0]
    together["audio"][0, int(together["lengths"][0]) :] = 1.0
    assert network.training_step(together)["loss"][0].item() == pytest.approx(loss.item(), rel=1e-6)


def test_the_bidirectional_gru_equals_that_of_pytorch() -> None:
    torch.manual_seed(0)
    ours, theirs = BidirectionalGRU(5, 7), torch.nn.GRU(5, 7, batch_first=True, bidirectional=True)
    weights = dict(ours.forwards.state_dict())
    weights |= {f"{name}_reverse": value for name, value in ours.backwards.state_dict().items()}
    theirs.load_state_dict(weights)
    x, lengths = torch.randn(3, 9, 5), torch.tensor([4, 9, 1])
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    expected, _ = torch.nn.utils.rnn.pad_packed_sequence(theirs(packed)[0], batch_first=True)
    assert torch.allclose(ours(x, lengths), expected, atol=1e-6)


# ---- loss and decoding ----------------------------------------------------------------------------------------------


def test_loss_is_the_probability_of_all_paths_of_the_text() -> None:
    """Two outputs, summed by hand: the paths of "a" are (a, a), (a, blank) and (blank, a)."""
    network = Speech(alphabet="ab", **SMALL)
    logits = torch.tensor([[[0.1, 0.5, -0.2], [0.3, -0.1, 0.2]]]).log_softmax(2)
    batch = {"targets": torch.tensor([[1]]), "target_lengths": torch.tensor([1])}
    total, count = network._loss(logits, torch.tensor([2]), batch)
    p = logits[0].exp()
    assert total.item() == pytest.approx(-math.log(p[0, 1] * p[1, 1] + p[0, 1] * p[1, 0] + p[0, 0] * p[1, 1]))
    assert int(count) == 1


def test_loss_counts_characters_and_not_recordings(network: Speech) -> None:
    batch = batch_of("one", "three seven")
    outputs, frames = network(batch["audio"], batch["lengths"])
    each = [
        F.ctc_loss(outputs[i, :n, None], batch["targets"][i : i + 1, :s], n[None], s[None], reduction="sum").item()
        for i, (n, s) in enumerate(zip(frames, batch["target_lengths"], strict=True))
    ]
    total, count = network.training_step(batch)["loss"]
    assert (total.item(), int(count)) == (pytest.approx(sum(each), rel=1e-5), len("one") + len("three seven"))


@pytest.mark.parametrize(
    ("path", "text"), [([0, 0], []), ([1, 1, 0, 1], [1, 1]), ([0, 2, 2, 3, 0, 0, 3], [2, 3, 3]), ([], [])]
)
def test_a_path_is_collapsed(path: list[int], text: list[int]) -> None:
    assert collapse(path) == text


@pytest.mark.parametrize(("text", "needed"), [("", 0), ("one", 3), ("three", 6), ("aaa", 5)])
def test_doubled_letters_need_a_blank_between_them(text: str, needed: int) -> None:
    assert outputs_needed(text) == needed


@pytest.mark.parametrize(
    ("one", "other", "edits"),
    [
        ("", "", 0),
        ("abc", "", 3),
        ("", "abc", 3),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("three", "tree", 1),
        ("ab", "ba", 2),
        ("abcdef", "azced", 3),
        (["one", "two", "three"], ["one", "three", "three"], 1),
    ],
)
def test_edit_distance(one: Any, other: Any, edits: int) -> None:
    assert edit_distance(one, other) == edit_distance(other, one) == edits


def test_validation_returns_edits_and_characters_of_the_whole_batch(
    network: Speech, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = ["one", "three even", ""]
    monkeypatch.setattr(network, "_decode", lambda outputs, frames: decoded)
    result = network.validation_step(batch_of("one", "three seven", "nine two"))
    assert {name: value for name, value in result.items() if name != "loss"} == {
        "character_error_rate": (1 + 8, 3 + 11 + 8),
        "word_error_rate": (1 + 2, 1 + 2 + 2),
        "text_accuracy": (1, 3),
    }
    assert list(result) == ["loss", "character_error_rate", "word_error_rate", "text_accuracy"]


def test_predictions_need_no_transcripts(network: Speech) -> None:
    batch = batch_of("one", "")
    found = network.predict_step({"audio": batch["audio"], "lengths": batch["lengths"]})
    assert len(found) == 2
    assert all(set(one) == {"transcription"} and set(one["transcription"]) <= set(network.alphabet) for one in found)


def test_examples_are_a_figure_a_recording_and_a_text(network: Speech) -> None:
    found = network.examples(batch_of("one", "three seven"))
    axes = found["spectrogram"].axes[0]
    assert axes.images[0].get_array().shape == (20, outputs_of(3000, 8000) * 2)
    assert ": one\n" in axes.get_title(loc="left")
    audio, rate = found["recording"]
    assert (audio.shape, rate) == ((3000,), 8000)
    assert [line.split("|")[1].strip() for line in found["transcriptions"].splitlines()[2:]] == ["one", "three seven"]


def test_the_network_can_be_exported_for_any_number_of_recordings(network: Speech) -> None:
    network.eval()
    inputs = network.export_inputs(SpeechData().collate([(audio[:2000], text) for audio, text in samples("a", "b")]))
    many = torch.export.Dim("B", min=1, max=64)
    program = torch.export.export(network, inputs, dynamic_shapes=({0: many}, {0: many}))
    other = torch.randn(3, 2000), torch.tensor([2000, 900, 1500])
    for ours, theirs in zip(network(*other), program.module()(*other), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"alphabet": "aba"}, "alphabet='aba'"),
        ({"alphabet": ""}, "alphabet=''"),
        ({"rate": 100}, "rate=100"),
        ({"mels": 100}, "mels=100.*rate=8000.* 31 Hz"),
        ({"layers": 0}, "layers=0"),
    ],
)
def test_invalid_settings_are_rejected(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Speech(**words)


@pytest.mark.parametrize(
    ("section", "message"),
    [({"rate": 16000}, "rate=8000.* 16000.*model.rate"), ({"alphabet": "ab "}, "alphabet=.*model.alphabet")],
)
def test_data_of_another_rate_or_alphabet_are_rejected(section: dict[str, Any], message: str, network: Speech) -> None:
    batch = SpeechData(**section).collate([(torch.zeros(1000), torch.tensor([1]))])
    for step in (network.training_step, network.predict_step):
        with pytest.raises(ValueError, match=message):
            step(batch)


# ---- as a job -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
def test_two_workers_have_the_loss_of_one(exact: bool, tmp_path: Path) -> None:
    """The shares of a batch have unequal numbers of characters, and different lengths."""
    job = make_job(
        model={"_target_": "models.speech.Speech", **SMALL},
        data={"_target_": "models.speech_data.SpokenDigits", "size": 25, "val_size": 7, "fewest": 1},
        epochs=1,
        global_batch_size=9,
        deterministic=exact,
    )
    tags = ("train/loss", "val/loss", "val/character_error_rate", "train/grad_norm")
    check_two_workers_equal_one(job, tmp_path, tags)


def test_training_lowers_the_loss() -> None:
    data = SpokenDigits(size=8, val_size=1, fewest=1, most=1)
    torch.manual_seed(0)
    network = Speech(**SMALL)  # type: ignore[arg-type]
    batch = data.collate(data.train.__getitems__(range(8), range(8)))
    losses = losses_while_training(network, batch, steps=8)
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_configuration_has_the_parameters_and_defaults_of_its_class(file: Path) -> None:
    check_configuration(file)


def test_default_size() -> None:
    """The figure in conf/model/speech.yaml."""
    assert round(sum(p.numel() for p in Speech().parameters()), -3) == 325_000
