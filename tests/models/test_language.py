"""models/language.py: causality, rotary positions, the loss, the count of FLOPs, generation, and the configurations."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import language
from models.language import GPT, UNCOUNTED, rotations, turn
from tests.support.command import Place

CONF = Path(language.__file__).parents[1] / "conf"
SIZES = {"gpt_1m": 1.0e6, "gpt_2m": 1.9e6, "gpt_10m": 10.8e6, "gpt_50m": 49.5e6, "gpt2_124m": 124e6}


def network(vocabulary: int = 256, context: int = 16, tied: bool = False) -> GPT:
    """Return a small network whose branches are not zero, unlike their initial values."""
    torch.manual_seed(0)
    model = GPT(vocabulary, context, width=16, layers=2, heads=2, tied=tied, generate=5)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def batch(rows: int = 3, length: int = 16, vocabulary: int = 256) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(vocabulary, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def test_no_token_attends_to_later_tokens() -> None:
    model, (x, _) = network(), batch()
    changed = x.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.isclose(before[:, 9:], after[:, 9:]).all(2).any(), "a later token does not depend on the change"


def test_rotary_positions_depend_only_on_the_distance() -> None:
    cos, sin = rotations(32, 8)
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))

    def score(at: int, other: int) -> float:
        return float(turn(q[None], cos[at, None], sin[at, None]) @ turn(k[None], cos[other, None], sin[other, None]).T)

    assert score(3, 1) == pytest.approx(score(29, 27), abs=1e-5)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3
    assert float(turn(q[None], cos[7, None], sin[7, None]).norm()) == pytest.approx(float(q.norm()), rel=1e-5)


def test_the_loss_is_the_sum_over_counted_tokens() -> None:
    model, (x, y) = network(), batch()
    y = y.clone()
    y[1, :10] = UNCOUNTED
    total, count = model.training_step((x, y))["loss"]
    each = F.cross_entropy(model(x).transpose(1, 2), y, reduction="none", ignore_index=UNCOUNTED)
    assert int(count) == 3 * 16 - 10
    torch.testing.assert_close(total, each.sum())


def test_the_initial_loss_is_that_of_a_uniform_prediction() -> None:
    torch.manual_seed(0)
    total, count = GPT(context=64).training_step(batch(2, 64))["loss"]
    assert float(total.detach() / count) == pytest.approx(math.log(256), abs=0.1)


def test_tied_weights_are_the_same_parameter() -> None:
    model = network(tied=True)
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize(("layers", "heads", "context"), [(1, 2, 16), (3, 4, 40)])
def test_flops_are_those_of_the_matrix_products(layers: int, heads: int, context: int) -> None:
    model = GPT(vocabulary=96, context=context, width=32, layers=layers, heads=heads)
    x, y = batch(2, context, 96)
    # Unfused attention, whose products the counter sees; the fused kernel computes some of them twice.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        total, _ = model.training_step((x, y))["loss"]
        total.backward()
    assert counter.get_total_flops() == 2 * model.flops_per_sample()


@pytest.mark.parametrize("name", SIZES)
def test_every_configuration_has_the_documented_size(name: str) -> None:
    section = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())
    assert section.pop("_target_") == "models.language.GPT"
    with torch.device("meta"):
        model = GPT(**section)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(SIZES[name], rel=0.06)
    if name == "gpt2_124m":  # nanoGPT's 6 N + 12 L H Q T, where N includes the output embedding
        assert model.flops_per_sample() / 1024 == pytest.approx(6 * 123.55e6 + 12 * 12 * 768 * 1024, rel=1e-3)


def test_the_units_of_the_loss() -> None:
    totals = {"loss": (torch.tensor(7 * math.log(4.0), dtype=torch.float64), 7.0)}
    assert network().summarize(totals) == {"bits_per_byte": pytest.approx(2.0)}
    assert network(vocabulary=300).summarize(totals) == {"perplexity": pytest.approx(4.0)}
    assert math.isnan(network().summarize({"loss": (torch.tensor(0.0), 0.0)})["bits_per_byte"])


# ---- generation -----------------------------------------------------------------------------------------------------


def test_greedy_continuation_equals_token_by_token_prediction() -> None:
    model = network()
    model.temperature = 0.0
    prompt = batch(1, 16)[0][0]
    row = prompt.tolist()
    for _ in range(20):  # beyond the context of 16 tokens
        row.append(int(model(torch.tensor([row[-16:]]))[0, -1].argmax()))
    assert model.continuation(prompt, 20).tolist() == row[16:]


def test_sampling_is_reproducible_and_preserves_the_random_state() -> None:
    model, prompt = network(), torch.tensor([1, 2, 3])
    state = torch.get_rng_state()
    one = model.continuation(prompt, 30, seed=1).tolist()
    assert one == model.continuation(prompt, 30, seed=1).tolist()
    assert one != model.continuation(prompt, 30, seed=2).tolist()
    assert torch.equal(state, torch.get_rng_state())


def test_predictions_are_text_for_bytes_and_ids_for_tokens() -> None:
    prompts = [torch.tensor([72, 105]), torch.tensor([72])]
    predictions = network().predict_step(prompts)
    assert [type(one["continuation"]) for one in predictions] == [str, str]
    assert [len(one["tokens"]) for one in network(vocabulary=300).predict_step(prompts)] == [5, 5]
    json.dumps(predictions)


def test_examples_quote_any_bytes() -> None:
    shown = network().examples(batch())["continuation"]
    before, after = re.split(r"^(?=\S)", shown, maxsplit=1, flags=re.MULTILINE)
    after = after.partition("\n")[2]
    assert before.strip()
    assert after.strip()
    assert all(line.startswith("    ") for line in (before + after).splitlines() if line)


def test_the_exported_network_computes_the_same() -> None:
    model, pair = network().eval(), batch()
    inputs = model.export_inputs(pair)
    exported = torch.export.export(model, inputs, dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(exported.module()(pair[0][:2]), model(pair[0][:2]))


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 30, "heads": 4}, "width=30, heads=4"),
        ({"width": 12, "heads": 4}, "width=12, heads=4"),
        ({"layers": 0}, "layers=0"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_invalid_sizes_are_rejected(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPT(**settings)  # type: ignore[arg-type]


def test_invalid_batches_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"\b16\b.*\(2, 17\).*data\.context"):
        network().training_step(batch(2, 17))
    with pytest.raises(ValueError, match=r" 299, .* 255\b.*model\.vocabulary"):
        network().training_step((torch.tensor([[299, 1]]), torch.tensor([[1, 1]])))
    with pytest.raises(ValueError, match=r"\(0,\)"):
        network().continuation(torch.tensor([], dtype=torch.long), 3)


# ---- command line ---------------------------------------------------------------------------------------------------


def test_a_few_steps_from_the_command_line(here: Place) -> None:
    words = ["experiment=language", "cluster=none", "scaling.workers=1", "model=gpt_1m", "model.width=16"]
    words += ["model.layers=1", "model.context=32", "data.context=32", "data.val_fraction=0.001", "trainer.steps=6"]
    done = here.here(*words, "model.generate=20", "run.name=one")
    assert done.status == 0, done.err
    tags = here.result("one")["metrics"]
    assert tags["val/bits_per_byte"] == pytest.approx(tags["val/loss"] / math.log(2))
    assert tags["val/bits_per_byte"] < 8


def test_a_context_longer_than_the_models_is_exit_2(here: Place) -> None:
    done = here.here("experiment=language", "cluster=none", "data.context=300")
    assert done.status == 2
    assert "model.context" in done.err
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_language_reaches_its_target(place: Place) -> None:
    """Two workers on CPUs reach 1.9 bits per byte on the held-out last 5% of the text in less than 15 minutes."""
    done = place.launch("experiment=language", "scaling.workers=2", "run.name=bible", seconds=960)
    assert done.status == 0, done.err
    result = place.result("bible")
    assert result["metrics"]["val/bits_per_byte"] <= 1.9
    assert result["seconds"] < 900
