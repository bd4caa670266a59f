"""models/captions.py: the network, its loss under padding, greedy and beam decoding, and the methods that launch "
"calls."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from models import captions
from models.captions import Captioner
from models.captions_data import DIGITS, END, PAD, START, UNKNOWN, DigitRows
from tests.support.engine_ranks import make_job
from tests.support.networks import check_configuration, check_two_workers_equal_one, losses_while_training

CONF = Path(captions.__file__).parents[1] / "conf"
FILES = [CONF / "model/captioner.yaml", CONF / "data/digit_rows.yaml", CONF / "data/coco.yaml"]
SMALL: dict[str, Any] = {"width": 4, "dim": 16, "heads": 2, "max_words": 4}


@pytest.fixture
def network() -> Captioner:
    torch.manual_seed(0)
    return Captioner(["a", "b", "c"], **SMALL)


def batch_of(*captions: list[int]) -> tuple[Tensor, Tensor]:
    """Return pictures of noise, and padded captions."""
    longest = max(map(len, captions)) + 2
    rows = [[START, *caption, END] + [PAD] * (longest - len(caption) - 2) for caption in captions]
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(rows), 1, 17, 40, generator=generator), torch.tensor(rows)


BATCH = batch_of([4], [5, 6, 4, 4], [6, 5], [4, 4, 4, 5])


# ---- the loss -------------------------------------------------------------------------------------------------------


def test_padding_has_no_effect(network: Captioner) -> None:
    """The sums of a padded batch equal the sums over its captions, each evaluated without padding."""
    for step in (network.training_step, network.validation_step):
        together = step(BATCH)
        alone = [step((x[None], y[y != PAD][None])) for x, y in zip(*BATCH, strict=True)]
        for name, (total, count) in together.items():
            parts = [one[name] for one in alone]
            assert torch.allclose(total.float(), sum(part[0].float() for part in parts), atol=1e-4), name
            assert count == sum(part[1] for part in parts), name
    total, count = network.training_step(BATCH)["loss"]
    assert count == 1 + 4 + 2 + 4 + 4, "the words and one end token per caption"
    more = F.pad(BATCH[1], (0, 3), value=PAD)
    assert network.training_step((BATCH[0], more))["loss"][0].item() == pytest.approx(total.item(), rel=1e-6)


def test_a_word_does_not_depend_on_later_words(network: Captioner) -> None:
    pictures, tokens = BATCH
    other = tokens.clone()
    other[:, 3] = 6
    one, two = network(pictures, tokens), network(pictures, other)
    assert one.shape == (4, 6, 7)
    assert torch.allclose(one[:, :3], two[:, :3], atol=1e-6)
    assert not torch.allclose(one[1, 3:], two[1, 3:], atol=1e-3)
    assert not torch.allclose(one, network(pictures.flip(0), tokens), atol=1e-3), "the picture has no effect"


def test_an_empty_share_of_a_batch_has_count_zero(network: Captioner) -> None:
    empty = BATCH[0][:0], BATCH[1][:0]
    answer = network.training_step(empty)
    assert [(total.item(), count.item()) for total, count in answer.values()] == [(0, 0), (0, 0)]
    answer["loss"][0].backward()
    assert network.validation_step(empty)["tally"][0].tolist() == [0, 0, 0]


# ---- decoding -------------------------------------------------------------------------------------------------------


def log_probability(network: Captioner, pictures: Tensor, written: Tensor) -> Tensor:
    """Return the log-probability of captions (B, L), from the logits of `forward`, without PAD and START."""
    tokens = F.pad(written, (1, 0), value=START)
    logits = network(pictures, tokens[:, :-1])
    logits[:, :, [PAD, START]] = -math.inf
    each = logits.log_softmax(2).gather(2, tokens[:, 1:, None])[:, :, 0]
    return each.masked_fill(written == PAD, 0).sum(1)


def sharpened(network: Captioner, seed: int) -> Captioner:
    """Return the network with confident predictions, so that beams differ."""
    torch.manual_seed(seed)
    with torch.no_grad():
        network.head.weight.normal_(std=0.4)
    return network


def test_decoding_returns_the_probability_of_its_captions(network: Captioner) -> None:
    """Guards against a wrong cache of keys and values, and beams that are worse than greedy decoding."""
    gained = []
    for seed in range(8):
        pictures = torch.randn(6, 1, 17, 40)
        with torch.no_grad():
            sharpened(network, seed)
            greedy, sure = network.greedy(pictures)
            assert torch.allclose(sure, log_probability(network, pictures, greedy), atol=1e-4)
            for beams in (2, 5):
                found, score = network.beam(pictures, beams)
                assert found.shape == greedy.shape == (6, 5)
                assert torch.allclose(score, log_probability(network, pictures, found), atol=1e-4)
                gained += (score - sure).tolist()
        for caption in (*greedy.tolist(), *found.tolist()):
            end = caption.index(END) if END in caption else len(caption)
            assert set(caption[end + 1 :]) <= {PAD}
            assert not {PAD, START} & set(caption[:end])
    assert min(gained) >= -1e-5
    assert max(gained) > 0.1, "no beam is better than greedy decoding"


def test_an_exhaustive_beam_finds_the_most_likely_caption(network: Captioner) -> None:
    torch.manual_seed(0)
    small = sharpened(Captioner(["a", "b"], **{**SMALL, "max_words": 2}), 3)
    pictures = torch.randn(6, 1, 17, 40)
    # All captions of up to three tokens: END, or a word and its continuations.
    words = [UNKNOWN, 4, 5]
    every = [[END, PAD, PAD]]
    every += [[a, END, PAD] for a in words] + [[a, b, c] for a in words for b in words for c in [*words, END]]
    with torch.no_grad():
        scores = torch.stack([log_probability(small, pictures, torch.tensor([one] * 6)) for one in every])
        found, score = small.beam(pictures, beams=30)
    assert torch.allclose(score, scores.amax(0), atol=1e-4)
    assert found.tolist() == [every[i] for i in scores.argmax(0).tolist()]


def test_exact_captions_are_counted(network: Captioner, monkeypatch: pytest.MonkeyPatch) -> None:
    written = torch.tensor(
        [[4, END, PAD, PAD, PAD], [5, 6, 4, 5, END], [UNKNOWN, 5, END, PAD, PAD], [4, 4, END, PAD, PAD]]
    )
    monkeypatch.setattr(network, "_greedy", lambda memory, size: (written, torch.zeros(size)))
    batch = batch_of([4], [5, 6, 4, 4], [UNKNOWN, 5], [4])
    tally, count = network.validation_step(batch)["tally"]
    assert (tally.tolist(), count) == ([2 + 4 + 2 + 1, 2 + 5 + 3 + 2, 1], 4)
    assert network.summarize({"tally": (tally, 4.0)}) == {"exact": 0.25, "token_accuracy": 9 / 12}


# ---- methods that launch calls --------------------------------------------------------------------------------------


def test_predictions_are_captions_as_text(network: Captioner) -> None:
    with torch.no_grad():
        found = network.predict_step(BATCH[0])
        assert network.predict_step(BATCH) == found, "captions in the batch must not be required"
        tokens, score = network.beam(BATCH[0])
    assert [one["caption"] for one in found] == [network.vocabulary.text(row) for row in tokens.tolist()]
    assert [one["probability"] for one in found] == pytest.approx(score.exp().tolist())
    assert all({*str(one["caption"]).split()} <= {"a", "b", "c", "<unknown>"} for one in found)


def test_words_are_part_of_the_weights(network: Captioner) -> None:
    other = Captioner(["c", "a", "b"], **SMALL)
    other.load_state_dict(network.state_dict())
    assert other.vocabulary.words == ["a", "b", "c"]
    assert other.predict_step(BATCH) == network.predict_step(BATCH)


def test_examples_are_pictures_with_both_captions(network: Captioner) -> None:
    with torch.no_grad():
        figure = network.examples(BATCH)["captions"]
    assert isinstance(figure, Figure)
    shown = [axes.get_title() for axes in figure.axes if axes.images]
    assert len(shown) == 4
    assert shown[1].endswith(": b c a a")


def test_the_network_can_be_exported_for_any_number_of_pictures(network: Captioner) -> None:
    inputs = network.export_inputs(BATCH)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(network.eval(), inputs, dynamic_shapes=({0: batch}, {0: batch})).module()
    for size in (2, 4):
        given = tuple(part[:size] for part in inputs)
        assert torch.allclose(program(*given), network(*given), atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"dim": 18}, "dim=18, heads=2"),
        ({"heads": 3}, "dim=16, heads=3"),
        ({"beams": 0}, "beams=0"),
        ({"words": ["a", "a"]}, r'"a".*\b2\b'),
        ({"words": ["a b"]}, '"a b"'),
        ({"words": []}, r"\[\]"),
        ({"words": "nowhere.json"}, "nowhere.json"),
    ],
)
def test_invalid_settings_are_rejected(words: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        Captioner(**{"words": ["a"], **SMALL, **words})


@pytest.mark.parametrize("shape", [(2, 3, 28, 28), (2, 1, 7, 28), (1, 28, 28)])
def test_pictures_of_another_shape_are_rejected(shape: tuple[int, ...], network: Captioner) -> None:
    with pytest.raises(ValueError, match=r"\b1\b.* 8 x 8\b.*model\.channels"):
        network.predict_step(torch.zeros(shape))


def test_tokens_of_another_vocabulary_are_rejected(network: Captioner) -> None:
    with pytest.raises(ValueError, match=r"\b9\b.*\b7\b.*data.words"):
        network.training_step(batch_of([4], [9]))


# ---- as a job -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
def test_two_workers_have_the_loss_of_one(exact: bool, tmp_path: Path) -> None:
    """The shares of a batch have unequal numbers of words."""
    job = make_job(
        model={"_target_": "models.captions.Captioner", "words": list(DIGITS), **SMALL},
        data={"_target_": "models.captions_data.DigitRows", "limit": 25, "val_limit": 7},
        epochs=1,
        global_batch_size=9,
        deterministic=exact,
    )
    tags = ("train/loss", "train/next_token", "val/loss", "val/exact", "val/token_accuracy", "train/grad_norm")
    check_two_workers_equal_one(job, tmp_path, tags)


def test_training_lowers_the_loss(network: Captioner) -> None:
    network = Captioner(DIGITS, **SMALL)
    batch = DigitRows(limit=8, val_limit=1, least=1, most=1).train.__getitems__(range(8))
    losses = losses_while_training(network, batch, steps=15)
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_configuration_has_the_parameters_and_defaults_of_its_class(file: Path) -> None:
    check_configuration(file)


def test_default_size() -> None:
    """The figures in conf/model/captioner.yaml."""
    network = Captioner(DIGITS)
    assert sum(p.numel() for p in network.parameters()) == 163_278
    assert network.flops_per_sample == 66_185_984
