"""Hydra's sweep grammar: the distribution of each form, and errors for unsupported forms."""

from __future__ import annotations

import re
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution as Choice
from optuna.distributions import FloatDistribution as Float
from optuna.distributions import IntDistribution as Int

from launcher.config import SweepConfig
from launcher.errors import ConfigError
from launcher.sweeps import algorithms, search, syntax
from launcher.sweeps.space import SearchSpace

GROUPS = {"model": ["convnet", "mlp", "resnet18"], "data": ["mnist"]}


def read(*words: str, params: dict[str, Any] | None = None) -> SearchSpace:
    return syntax.read(words, params or {}, GROUPS)


@pytest.mark.parametrize(
    ("word", "searched", "gridded"),
    [
        # choices
        ("optimizer.lr=1e-3,1e-2", Choice([0.001, 0.01]), Choice([0.001, 0.01])),
        ("trainer.epochs=1,2,3", Choice([1, 2, 3]), Choice([1, 2, 3])),
        ("model=mlp,convnet", Choice(["mlp", "convnet"]), Choice(["mlp", "convnet"])),
        ("model=choice(mlp,convnet)", Choice(["mlp", "convnet"]), Choice(["mlp", "convnet"])),
        ("+vars.a=true,null,2,0.5,x", Choice([True, None, 2, 0.5, "x"]), Choice([True, None, 2, 0.5, "x"])),
        ("vars.a=choice(one)", Choice(["one"]), Choice(["one"])),
        ("vars.a='a,b','c d'", Choice(["a,b", "c d"]), Choice(["a,b", "c d"])),
        (
            "optimizer.betas=[0.9,0.99],[0.8,0.9]",
            Choice(["[0.9,0.99]", "[0.8,0.9]"]),
            Choice(["[0.9,0.99]", "[0.8,0.9]"]),
        ),
        ("vars.a=sort(3,1,2)", Choice([1, 2, 3]), Choice([1, 2, 3])),
        ("vars.a=sort(3,1,2,reverse=true)", Choice([3, 2, 1]), Choice([3, 2, 1])),
        ("vars.a=int(1.0,2.0)", Choice([1, 2]), Choice([1, 2])),
        ("vars.a=float(1,2)", Choice([1.0, 2.0]), Choice([1.0, 2.0])),
        ("vars.a=str(choice(1,2))", Choice(["1", "2"]), Choice(["1", "2"])),
        ("vars.a=bool(choice(0,1))", Choice([False, True]), Choice([False, True])),
        ("vars.a=tag(some,choice(a,b))", Choice(["a", "b"]), Choice(["a", "b"])),
        # glob over a group
        ("model=glob(*)", Choice(GROUPS["model"]), Choice(GROUPS["model"])),
        ("model=glob([c*,r*],exclude=resnet*)", Choice(["convnet"]), Choice(["convnet"])),
        # ranges: the end is excluded
        ("scaling.workers=range(1,5)", Int(1, 4), Choice([1, 2, 3, 4])),
        ("trainer.epochs=range(3)", Int(0, 2), Choice([0, 1, 2])),
        ("trainer.epochs=range(1,10,3)", Int(1, 7, step=3), Choice([1, 4, 7])),
        ("trainer.epochs=range(10,1,-3)", Int(4, 10, step=3), Choice([10, 7, 4])),
        ("vars.a=range(0,1,0.25)", Float(0.0, 0.75, step=0.25), Choice([0.0, 0.25, 0.5, 0.75])),
        ("vars.a=float(range(1,4))", Float(1.0, 3.0, step=1.0), Choice([1.0, 2.0, 3.0])),
        ("vars.a=tag(log,range(1,5))", Int(1, 4, log=True), Choice([1, 2, 3, 4])),
        # intervals
        ("optimizer.lr=interval(0,1)", Float(0.0, 1.0), None),
        ("optimizer.lr=tag(log,interval(1e-4,1e-1))", Float(1e-4, 1e-1, log=True), None),
        ("model.width=int(interval(8,64))", Int(8, 64), None),
        ("model.width=tag(log,int(interval(8,64)))", Int(8, 64, log=True), None),
        ("model.width=int(tag(log,interval(8,64)))", Int(8, 64, log=True), None),
        ("vars.a=float(interval(1,2))", Float(1.0, 2.0), None),
        # the same under Hydra's own key
        ("hydra.sweeper.params.optimizer.lr=interval(0,1)", Float(0.0, 1.0), None),
        ("hydra.sweeper.params={optimizer.lr:'interval(0,1)'}", Float(0.0, 1.0), None),
    ],
)
def test_each_form_of_the_grammar(word: str, searched: Any, gridded: Any) -> None:
    words = read(word)
    (axis,) = words.axes
    assert search.distribution(axis) == searched
    if gridded is None:
        with pytest.raises(ConfigError, match="sweep=tpe") as refused:
            search.distribution(axis, grid=True)
        assert refused.value.key == axis.key
    else:
        assert search.distribution(axis, grid=True) == gridded


@pytest.mark.parametrize(
    ("word", "quoted"),
    [
        ("vars.a={x:1},{x:2}", r"\{x:1\} "),
        ("vars.a=choice({x:{y:1}},{x:{y:2}})", r"\{x:\{y:1\}\} "),
        ("vars.a=[[1,2]],[[3]]", r"\[\[1,2\]\] "),
        ("vars.a=[{x:1}],[2]", r"\[\{x:1\}\] "),
        ("optimizer.lr=interval(1,0)", r" 1\.0,.* 0\.0\."),
        ("optimizer.lr=tag(log,interval(0,1))", r"\b0,.*\b0\."),
        ("trainer.epochs=tag(log,range(1,9,2))", r"\b1,.*\b2,.*\b0\."),
        ("trainer.epochs=range(5,5)", r" 5,"),
        ("trainer.epochs=range(1,5,0)", r" 0\."),
        ("trainer.epochs=range(1,1000000)", r"\b100,000\b"),
        ("model=mlp,mlp", r" mlp .*sweep.over=trainer.seed"),
        ("vars.a=1,1.0", r" 1\.0 .*sweep.over=trainer.seed"),
        ("model=glob(x*)", r"\bconvnet, mlp, resnet18\b"),
        ("optimizer.lr=glob(*)", r" optimizer\.lr\."),
        ("optimizer.lr=interval(1)", r"KEY=interval\(0,1\)"),
        ("optimizer.lr=choice(1", r"KEY=interval\(0,1\)"),
        ("run.name=a,b", r" run\.name "),
        ("sweep.trials=1,2", r" sweep\.trials "),
        ("cluster=none,local", r" cluster "),
    ],
)
def test_unsupported_sweeps_are_rejected(word: str, quoted: str) -> None:
    with pytest.raises(ConfigError, match=rf'^"{re.escape(word)}".*{quoted}') as refused:
        read(word)
    assert refused.value.key == word.partition("=")[0]


def test_the_parameters_of_a_sweep_must_be_a_mapping() -> None:
    with pytest.raises(ConfigError, match=r"hydra\.sweeper\.params\.optimizer\.lr="):
        read("hydra.sweeper.params=3")


def test_a_mixture_of_everything() -> None:
    """Would be wrong: a fixed word swept, a parameter of a file that wins over the command line, a lost axis."""
    words = read(
        "trainer.seed=3",
        "model=glob(*)",
        "optimizer.lr=1e-3,1e-2",
        params={"optimizer.lr": "interval(0,1)", "trainer.epochs": "1,2", "vars.b": 7, "vars": {"c": "x,y"}},
    )
    assert words.fixed == ("vars.b=7", "trainer.seed=3")
    assert [axis.key for axis in words.axes] == ["trainer.epochs", "vars.c", "model", "optimizer.lr"]
    assert words.finite
    assert words.first() == [
        "vars.b=7",
        "trainer.seed=3",
        "trainer.epochs=1",
        "vars.c=x",
        "model=convnet",
        "optimizer.lr=0.001",
    ]
    assert len(list(search.grid(words))) == 2 * 2 * 3 * 2


@pytest.mark.parametrize(
    ("words", "params", "fixed", "swept"),
    [
        (["model={width: 8}", "model={channels: 1}"], {}, ["model={width: 8}", "model={channels: 1}"], []),
        (["optimizer=sgd", "optimizer={momentum: 0.5}"], {}, ["optimizer=sgd", "optimizer={momentum: 0.5}"], []),
        (["vars.a=1", "vars.a=2,3"], {}, [], ["vars.a"]),
        (["vars.a=2,3", "vars.a=1"], {}, ["vars.a=1"], []),
        (["model=mlp"], {"model": "convnet"}, ["model=mlp"], []),
        ([], {"vars": {"a": None, "b": True, "c": [1, None], "d": "0,1"}}, None, ["vars.d"]),
    ],
)
def test_fixed_words_are_kept_in_order(
    words: list[str], params: dict[str, Any], fixed: list[str] | None, swept: list[str]
) -> None:
    """Would be wrong: `-m` drops a fixed word, or a null of a file becomes the text None."""
    space = read(*words, params=params)
    assert list(space.fixed) == (["vars.a=null", "vars.b=true", "vars.c=[1,null]"] if fixed is None else fixed)
    assert space.keys == swept


@pytest.mark.parametrize(
    "word",
    [
        "vars.a='a,b','c d'",
        "vars.a=true,null",
        "optimizer.lr=1e-5,0.1",
        "vars.a=[1,2],[3]",
        "vars.a='1',x",
        "model=mlp,convnet",
    ],
)
def test_the_words_of_a_trial_have_the_swept_values(word: str) -> None:
    """Would be wrong: a value that Hydra parses differently from the given one."""
    words = read(word)
    key, expected = word.partition("=")[0], syntax.parse(word)
    values = list(search.grid(words))
    from hydra.core.override_parser.types import Override

    for value, element in zip(values, expected.sweep_iterator(), strict=True):
        (text,) = words.overrides(value)
        assert syntax.parse(text).value() == Override._convert_value(element), key


def test_trials_of_one_size_follow_each_other() -> None:
    """Would be wrong: a warm group that is restarted after every trial."""
    words = read("optimizer.lr=1,2", "scaling.workers=1,2")
    assert [values["scaling.workers"] for values in search.grid(words)] == [1, 1, 2, 2]


def test_a_shuffle_is_the_same_each_time() -> None:
    """A resumed grid must equal the grid at the start."""
    words = [read("vars.a=shuffle(range(0,20))", "vars.b=shuffle(1,2,3,4)") for _ in range(2)]
    assert words[0] == words[1]
    assert words[0].axes[0].values != tuple(range(20))  # type: ignore[union-attr]
    assert sorted(words[0].axes[0].values) == list(range(20))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("word", "values", "shown"),
    [
        ("vars.a=1,x", [1, "x"], ["1", "x"]),
        ("vars.a=true,x", [True, "x"], ["true", "x"]),
        ("vars.a=true,false", [True, False], [True, False]),
        ("vars.a=1,null", [1, None], ["1", "null"]),
        ("vars.a=1,2.5", [1, 2.5], [1, 2.5]),
    ],
)
def test_one_key_has_one_type(word: str, values: list[Any], shown: list[Any]) -> None:
    """Would be wrong: TensorBoard uses the type of the first trial, and shows the others incorrectly."""
    words = read(word)
    assert [search.display_values({"vars.a": value}, words)["vars.a"] for value in values] == shown


def test_cmaes_needs_numbers() -> None:
    with pytest.raises(ConfigError, match=r"sweep=cmaes.*sweep=tpe"):
        algorithms.sampler(SweepConfig(sampler="cmaes", trials=3), read("model=mlp,convnet"), 0)


@pytest.mark.parametrize(
    "word",
    ["vars.api_key=first-one,second-one", "vars.db.password=choice(one,two)", "+vars.a=x,hf_" + "aB3" * 8],
)
def test_literal_secrets_are_not_swept_and_not_printed(word: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read(word)
    assert not any(value in str(refused.value) for value in ("first-one", "choice(one", "hf_aB3"))


def test_references_to_secrets_are_swept() -> None:
    words = read("vars.api_key='${oc.env:FIRST}','${oc.env:SECOND}'", "data.max_tokens=1,2")
    assert [axis.key for axis in words.axes] == ["vars.api_key", "data.max_tokens"]
