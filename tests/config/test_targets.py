"""The names that a configuration may use; all others are neither imported nor called."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.config import calling_directory, targets
from launcher.errors import ConfigError, LaunchError, TrustError

HOME = Path(targets.__file__).resolve().parents[2]


@pytest.fixture
def calling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Return a function that writes a calling directory and registers it; all traces are removed afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    modules = dict(sys.modules)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("models", "conf")]:
        del sys.modules[name]

    def enter(files: dict[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / "project" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
        targets.add_calling_directory(tmp_path / "project")
        return tmp_path / "project"

    yield enter
    for name in set(sys.modules) - set(modules):
        del sys.modules[name]
    sys.modules.update(modules)


NET = """
    from subprocess import Popen
    import os, torch
    from torch import nn
    class Net(nn.Module):
        def __init__(self, width: int = 3, depth: int = 1, body=None):
            super().__init__()
            self.width, self.depth, self.body = width, depth, body
        class Inner(nn.Module): pass
    class Digits:
        def __init__(self, root, size=2, transform=None):
            self.root, self.size, self.transform = root, size, transform
    class Loose(nn.Module):
        def __init__(self, width=1, **options):
            super().__init__()
            self.options = options
    def factory(): return Net()
    instance = Net()
"""


# --- by name ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "models.vision.ConvNet",
        "torch.nn.Linear",
        "torch.optim.AdamW",
        "launcher.engine.optim.WarmupCosine",
        "models.x.Y",
    ],
)
def test_allowed_names(name: str) -> None:
    targets.check({"model": {"_target_": name}})


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "torch.utils.collect_env.run",
        "torch.load",
        "torch.hub.load",
        "torch.nnx.Linear",
        "torch.utils.data.TensorDataset",
        "torchvision.models.resnet18",
        "launcher.cli.main",
        "launcher.config.compose",
        "launcher.__main__.main",
        "launcher.clusters.local.embedded_ray.Anything",
        "modelsx.Net",
        "models",
        "Net",
        "",
        ".",
        "models..vision",
        "models.vision.ConvNet.__init__.__globals__",
        "models.__loader__.load_module",
        "models.vision.ConvNet()",
        "models vision",
        "conf.x.Y",
        "hydra.utils.instantiate",
        "antigravity.geohash",
    ],
)
def test_rejected_names(name: str) -> None:
    before = set(sys.modules)
    for tree in ({"model": {"_target_": name}}, {"a": [{"b": ({"_target_": name},)}]}):
        with pytest.raises(TrustError, match="_target_"):
            targets.check(tree)
    assert set(sys.modules) == before


@pytest.mark.parametrize("name", ["launcher.cli.main", "launcher.config.compose", "launcher.errors.LaunchError"])
def test_called_in_our_own_source_tree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who runs launch in its own clone trusts `models`, but not the modules of `launcher`."""
    monkeypatch.setattr(calling_directory, "_calling", [HOME])
    with pytest.raises(TrustError, match=rf'"{name}".*trust=\[launcher\]'):
        targets.check({"model": {"_target_": name}})


@pytest.mark.parametrize("name", [None, 3, ["models.vision.ConvNet"], {"a": 1}, True, b"models.vision.ConvNet"])
def test_a_target_must_be_text(name: Any) -> None:
    with pytest.raises(TrustError, match=r"model\._target_"):
        targets.check({"model": {"_target_": name}})


@pytest.mark.parametrize("word", ["_partial_", "_args_", "_convert_", "_recursive_", "_mode_"])
def test_hydras_own_keys_are_rejected(word: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.body\.{word}"):
        targets.check({"model": {"_target_": "models.vision.ConvNet", "body": {word: True}}})


def test_the_error_names_the_key() -> None:
    tree = {"data": {"_target_": "models.vision_data.Mnist", "transforms": [{"a": 1}, {"_target_": "os.system"}]}}
    with pytest.raises(TrustError, match=r"data\.transforms\.1\._target_.*os\.system.*trust=\[os\]"):
        targets.check(tree)


def test_trust_applies_to_whole_names() -> None:
    targets.check({"model": {"_target_": "mine.deep.Net"}}, ["mine"])
    targets.check({"model": {"_target_": "mine.deep.Net"}}, ["mine.deep"])
    for trust in (["min"], ["mine.deeper"], ["deep"]):
        with pytest.raises(TrustError):
            targets.check({"model": {"_target_": "mine.deep.Net"}}, trust)


def test_checking_imports_nothing() -> None:
    code = (
        "import sys; from launcher.config import targets; targets.add_calling_directory('.');"
        "targets.check({'model': {'_target_': 'models.vision.ConvNet'}, 'optimizer': {'_target_': 'torch.optim.SGD'}});"
        "assert not {'torch', 'models', 'hydra', 'omegaconf'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HOME, timeout=240)


# --- by its type ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("models.vision.ConvNet", "model"),
        ("torch.nn.Linear", "model"),
        ("torch.nn.modules.linear.Linear", "model"),
        ("torch.optim.AdamW", "optimizer"),
        ("torch.optim.lr_scheduler.StepLR", "scheduler"),
        ("models.vision_data.Mnist", "data"),
    ],
)
def test_classes_of_the_kind(name: str, kind: str) -> None:
    assert targets.resolve(name, kind).__name__ == name.rpartition(".")[2]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        # through modules that other modules have imported
        ("models.vision.torch.load", "model"),
        ("models.vision.nn.Linear", "model"),
        ("models.os.system", "data"),
        ("torch.nn.modules.module.os.system", "model"),
        ("torch.nn.modules.module.torch.hub.load", "model"),
        ("torch.optim.optimizer.functools.partial", "optimizer"),
        ("torch.nn.modules.module.OrderedDict", "data"),
        ("models.vision.Tensor", "data"),
        ("torch.nn.modules.module.Any", "data"),
        # not classes
        ("torch.nn.functional.relu", "model"),
        ("torch.nn.init.normal_", "model"),
        ("torch.nn.Linear.forward", "model"),
        ("torch.nn.utils.clip_grad_norm_", "data"),
        ("models.vision", "model"),
        ("torch.nn.modules", "model"),
        # of another kind
        ("torch.nn.Linear", "optimizer"),
        ("torch.optim.SGD", "model"),
        ("torch.optim.SGD", "scheduler"),
        ("torch.optim.lr_scheduler.StepLR", "optimizer"),
        ("models.vision_data.Mnist", "model"),
        ("torch.nn.Parameter", "model"),
        ("torch.nn.parameter.Parameter", "data"),
        ("torch.optim.SGD", "data"),
    ],
)
def test_rejected_classes(name: str, kind: str) -> None:
    with pytest.raises((TrustError, ConfigError)) as caught:
        targets.resolve(name, kind)
    # A name that does not exist is a ConfigError about the name; the module itself can be imported.
    if isinstance(caught.value, ConfigError):
        assert (caught.value.key, caught.value.__cause__) == (name, None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("models.visoin.ConvNet", "visoin"),
        ("models.vision.ConvNit", r'"ConvNit".*"ConvNet"'),
        ("torch.optim.AdamX", r'"AdamX"'),
        ("torch.nnn.Linear", r"trust=\[torch\]"),
    ],
)
def test_names_that_do_not_exist(name: str, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        targets.resolve(name, "model")


# --- the calling directory --------------------------------------------------------------------------------------------


def test_modules_of_the_calling_directory_are_trusted(calling: Callable[..., Path]) -> None:
    calling({"mynet.py": NET, "package/__init__.py": "", "package/deep/net.py": NET, "bare/net.py": NET})
    for name in ("mynet.Net", "mynet.Net.Inner", "package.deep.net.Net", "bare.net.Net"):
        targets.check({"model": {"_target_": name}})
        assert issubclass(targets.resolve(name, "model"), torch.nn.Module)
    for name in ("elsewhere.Net", "bare.other.Net"):
        with pytest.raises(TrustError):
            targets.check({"model": {"_target_": name}})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mynet.os.system", "data"),
        ("mynet.Popen", "data"),
        ("mynet.torch.load", "data"),
        ("mynet.torch.nn.Linear", "model"),
        ("mynet.factory", "model"),
        ("mynet.instance", "model"),
        ("mynet.instance.forward", "model"),
        ("mynet.Digits", "model"),
        ("mynet.Net", "optimizer"),
    ],
)
def test_a_trusted_module_does_not_expose_its_imports(name: str, kind: str, calling: Callable[..., Path]) -> None:
    calling({"mynet.py": NET})
    targets.check({kind: {"_target_": name}})
    with pytest.raises(TrustError):
        targets.resolve(name, kind)


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ({"torch/note.txt": ""}, "torch.load"),
        ({"torch/hub.py": "x = 1"}, "torch.hub.load"),
        ({"os.py": "def system(): ..."}, "os.system"),
        ({"subprocess/note.txt": ""}, "subprocess.Popen"),
        ({"builtins.py": ""}, "builtins.eval"),
        ({"hydra/note.txt": ""}, "hydra.utils.instantiate"),
        ({"launcher/note.txt": ""}, "launcher.cli.main"),
        ({"sub/inner.py": ""}, "inner.Net"),
        ({".venv/lib/python3/site-packages/foreign.py": ""}, "foreign.Net"),
    ],
)
def test_the_name_of_another_package_is_not_trusted(
    files: dict[str, str], name: str, calling: Callable[..., Path]
) -> None:
    calling(files)
    with pytest.raises(TrustError):
        targets.check({"data": {"_target_": name}})


def test_packages_inside_the_calling_directory_are_not_trusted(calling: Callable[..., Path]) -> None:
    """A virtual environment in the project contains code of other authors."""
    project = calling({"venv/foreign.py": NET})
    sys.path.append(str(project / "venv"))
    with pytest.raises(TrustError, match="foreign"):
        targets.check({"model": {"_target_": "foreign.Net"}})
    targets.check({"model": {"_target_": "foreign.Net"}}, ["foreign"])
    assert targets.resolve("foreign.Net", "model", ["foreign"]).__name__ == "Net"


def test_an_imported_class_is_checked_by_its_defining_module(calling: Callable[..., Path]) -> None:
    project = calling({"venv/foreign.py": NET, "mine.py": "from foreign import Net\n"})
    sys.path.append(str(project / "venv"))
    with pytest.raises(TrustError, match=r'"mine\.Net".* foreign\.Net\b.*trust=\[foreign\]'):
        targets.resolve("mine.Net", "model")
    assert targets.resolve("mine.Net", "model", ["foreign"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import surely_not_installed\n", '"broken.Net".*"broken".*"surely_not_installed"'),
        ("class Net(: pass\n", "SyntaxError"),
        ("raise RuntimeError('boom')\n", r"RuntimeError: boom.*broken\.py, \w+ 1\b"),
        ("raise ImportError('half done')\n", "half done"),
    ],
)
def test_a_module_that_cannot_be_imported(text: str, message: str, calling: Callable[..., Path]) -> None:
    calling({"broken.py": text})
    with pytest.raises(ConfigError, match=message) as caught:
        targets.resolve("broken.Net", "model")
    assert caught.value.key == "broken.Net"


@pytest.mark.parametrize(
    "files",
    [
        {"models/__init__.py": "", "models/mine.py": NET},
        {"models/mine.py": NET},
        {"models.py": NET},
        {"models/__init__.py": "from .vision import ConvNet", "models/mine.py": NET, "conf/__init__.py": "x = 1"},
    ],
    ids=["package", "folder", "file", "package that uses ours"],
)
@pytest.mark.parametrize("ours_first", [False, True])
def test_own_models_next_to_ours(files: dict[str, str], ours_first: bool, calling: Callable[..., Path]) -> None:
    if ours_first:
        if "models.py" in files:
            pytest.skip("a module that is loaded already cannot become another one")
        import models.vision  # noqa: F401
    calling(files)
    mine = "models.Net" if "models.py" in files else "models.mine.Net"
    targets.check({"a": {"_target_": mine}, "b": {"_target_": "models.vision.ConvNet"}})
    assert targets.resolve(mine, "model").__name__ == "Net"
    assert targets.resolve("models.vision.ConvNet", "model").__name__ == "ConvNet"
    import conf

    assert getattr(conf, "x", None) == (1 if "conf/__init__.py" in files else None)


def test_an_own_file_takes_precedence_over_ours(calling: Callable[..., Path]) -> None:
    calling({"models/vision.py": NET})
    assert targets.resolve("models.vision.Net", "model").__name__ == "Net"
    assert targets.resolve("models.vision_data.Mnist", "data").__name__ == "Mnist"


def test_an_installed_models_package_is_not_ours(calling: Callable[..., Path], tmp_path: Path) -> None:
    stranger = tmp_path / "site"
    (stranger / "models").mkdir(parents=True)
    (stranger / "models" / "__init__.py").write_text("raise SystemExit('a stranger ran')")
    (stranger / "models" / "evil.py").write_text("raise SystemExit('a stranger ran')")
    calling({})
    sys.path.insert(0, str(stranger))
    assert targets.resolve("models.vision.ConvNet", "model")
    with pytest.raises(LaunchError):
        targets.resolve("models.evil.Net", "model")


def test_own_models_in_another_process(tmp_path: Path) -> None:
    """As with the command line: our directory is on the path, and the project has `models` as well."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("from models.vision import ConvNet\nclass Mine(ConvNet): ...\n")
    code = (
        "from launcher.config import targets; targets.add_calling_directory('.');"
        "print(targets.build({'_target_': 'models.Mine', 'width': 4}, 'model').__class__.__mro__[1].__module__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(HOME)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.stdout == "models.vision\n", done.stderr


# --- keys of a section ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "kind", "key", "quoted"),
    [
        ({"_target_": "mynet.Net", "widht": 3}, "model", "model.widht", '"width".*: width, depth, body'),
        ({"_target_": "mynet.Net", "body": {"_target_": "mynet.Net", "x": 3}}, "model", "model.body.x", ": width, "),
        ({"_target_": "mynet.Digits"}, "data", "data.root", r"data\.root=\.\.\."),
        ({"_target_": "mynet.Digits", "root": [{"_target_": "mynet.Digits"}]}, "data", "data.root.0.root", r"0\.root="),
        ({"width": 3}, "model", "model", "_target_"),
        ({"_target_": "torch.optim.AdamW", "learning_rate": 1}, "optimizer", "optimizer.learning_rate", ": lr, "),
        ({"_target_": "torch.optim.AdamW", "params": []}, "optimizer", "optimizer.params", r"^(?!.*: lr)"),
        ({"_target_": "torch.optim.lr_scheduler.StepLR"}, "scheduler", "scheduler.step_size", "step_size=..."),
        ({"_target_": "torch.optim.AdamW", "_if_taken_": 3}, "optimizer", "optimizer._if_taken_", r"\b3\b"),
    ],
)  # fmt: skip
def test_keys_are_checked(
    section: dict[str, Any], kind: str, key: str, quoted: str, calling: Callable[..., Path]
) -> None:
    calling({"mynet.py": NET})
    with pytest.raises(ConfigError, match=quoted) as caught:
        targets.check_signature(section, kind)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("section", "kind"),
    [
        ({"_target_": "mynet.Net", "width": 3}, "model"),
        ({"_target_": "mynet.Loose", "anything": 3}, "model"),
        ({"_target_": "torch.optim.AdamW", "lr": 1, "groups": [{"match": "a"}]}, "optimizer"),
        ({"_target_": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": 1}, "scheduler"),
        ({"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 1}, "scheduler"),
        ({"_target_": "mynet.Digits", "root": "x", "_if_taken_": {"unknown": 1}}, "data"),
    ],
)
def test_valid_keys(section: dict[str, Any], kind: str, calling: Callable[..., Path]) -> None:
    calling({"mynet.py": NET})
    targets.check_signature(section, kind)


def test_accepts(calling: Callable[..., Path]) -> None:
    calling({"mynet.py": NET})
    assert targets.accepts({"_target_": "mynet.Net"}, "model", "width")
    assert not targets.accepts({"_target_": "mynet.Net"}, "model", "seed")
    assert targets.accepts({"_target_": "mynet.Loose"}, "model", "seed")


# --- building ---------------------------------------------------------------------------------------------------------


def test_build_with_nested_sections(calling: Callable[..., Path]) -> None:
    calling({"mynet.py": NET})
    net = targets.build({"_target_": "mynet.Net", "width": 5, "body": {"_target_": "torch.nn.ReLU"}}, "model")
    assert (net.width, type(net.body)) == (5, torch.nn.ReLU)
    section = {
        "_target_": "mynet.Digits",
        "root": {"plain": [1, {"_target_": "mynet.Digits", "root": "inner"}]},
        "_if_taken_": {"size": 9, "unknown": 1},
    }
    data = targets.build(section, "data")
    assert data.size == 9
    assert data.root["plain"][1].root == "inner"
    assert section["root"]["plain"][1]["_target_"] == "mynet.Digits"  # type: ignore[index]  # unchanged


def test_build_optimizer_and_scheduler() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = targets.build(
        {"_target_": "torch.optim.SGD", "lr": 0.5, "groups": [{"match": "x"}]}, "optimizer", params=[weight]
    )
    assert optimizer.param_groups[0]["lr"] == 0.5
    step = {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 2}
    assert targets.build(step, "scheduler", optimizer=optimizer, total_steps=9).step_size == 2
    cycle = {"_target_": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": 1.0}
    assert targets.build(cycle, "scheduler", optimizer=optimizer, total_steps=9).total_steps == 9
    assert targets.build({**cycle, "total_steps": 7}, "scheduler", optimizer=optimizer, total_steps=9).total_steps == 7


@pytest.mark.parametrize(
    "section",
    [
        {"_target_": "os.system", "command": "touch pwned"},
        {"_target_": "mynet.Net", "body": {"_target_": "os.system", "command": "touch pwned"}},
        {"_target_": "mynet.Net", "body": [{"_target_": "mynet.Popen", "args": "touch pwned"}]},
        {"_target_": "mynet.Net", "body": {"_target_": "mynet.Digits", "root": 1}},
        {"_target_": "mynet.Net", "body": {"_target_": "torch.nn.ReLU", "_partial_": True}},
        {"_target_": "mynet.Net", "_if_taken_": {"body": {"_target_": "os.system", "command": "touch pwned"}}},
        {"_target_": "mynet.Net", "_if_taken_": {"body": {"_target_": "mynet.Popen", "args": ["touch", "pwned"]}}},
    ],
)
def test_build_validates_before_it_builds(
    section: dict[str, Any], calling: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calling({"mynet.py": NET})
    monkeypatch.chdir(tmp_path)
    with pytest.raises((TrustError, ConfigError)):
        targets.build(section, "model")
    assert not (tmp_path / "pwned").exists()


def test_an_exception_of_a_constructor_is_passed_on(calling: Callable[..., Path]) -> None:
    calling({"mydata.py": "class Digits:\n    def __init__(self): raise ValueError('row 3')\n"})
    with pytest.raises(ValueError, match="row 3"):
        targets.build({"_target_": "mydata.Digits"}, "data")
