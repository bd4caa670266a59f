"""Secrets are masked by name, by form and by value; other text is not changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.config import compose, masking
from launcher.errors import ConfigError
from launcher.runs.masked_patch import mask_patch

MARK = "hunter2"


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("vars.db={host: h, password: hunter2}", "vars.db=***"),
        ("vars.db={host: h, login: {credentials: {user: hunter2}}}", "vars.db=***"),
        ("vars.db={passwords: [hunter2]}", "vars.db=***"),
        ("vars.db={'password': 'hunter2 x'},{'password': 'hunter2 y'}", "vars.db=***"),
        ("vars.credentials.user=hunter2", "vars.credentials.user=***"),
        ("+vars.password=hunter2,other", "+vars.password=***"),
        ("vars.note=hf_hunter2hunter2hunter2hunter2", "vars.note=***"),
        ('cluster.setup=["export DB_PASSWORD=hunter2"]', "cluster.setup=***"),
        ("data.url=postgres://ada:hunter2@host/db", "data.url=***"),
        ("data.url=postgres://${oc.env:U}:hunter2@host/db", "data.url=***"),
        ("vars.password=${oc.env:A,hunter2}", "vars.password=${oc.env:A,***}"),
        ("vars.x=${oc.env:DB_PASSWORD,hunter2}", "vars.x=${oc.env:DB_PASSWORD,***}"),
        ("vars.password=${oc.env:A}hunter2", "vars.password=${oc.env:A}***"),
        ("vars.password=${oc.decode:hunter2}", "vars.password=${oc.decode:***}"),
        # no secrets, or references
        *(
            (word, word)
            for word in (
                "vars.db={host: h, password: ${oc.env:DB_PASSWORD}}",
                "data.url=postgres://${oc.env:U}:${oc.env:P}@host/db",
                "vars.password=${oc.env:A}",
                "vars.password=${oc.env:A,null}",
                "optimizer={_target_: torch.optim.AdamW, lr: 0.1}",
                "data.root=/data/ImageNet2012/0123456789abcdef0123456789abcdef",
                "checkpoint.load=runs/mnist-20261123-173835/checkpoints/step-00000400",
                "data.tokenizer=sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
                "model.label_key=caption",
                "cluster.ssh_key=~/.ssh/work",
                "cluster.env=[HF_TOKEN]",
                'cluster.setup=["pip install --token $HF_TOKEN x"]',
            )
        ),
    ],
)
def test_overrides_are_recorded_without_secrets(word: str, kept: str) -> None:
    assert masking.mask_word(word) == kept


PATCH = """\
diff --git a/a.py b/a.py
--- a/a.py
+++ b/a.py
+PASSWORD = "hunter2"
-password: str = 'hunter2'
 client = Client(api_key="hunter2", retries=3)
+x = {"db_password": "hunter2", "k": os.environ.get("API_KEY", "hunter2")}
+z = "hf_hunter2hunter2hunter2hunter2hun"
+u = "postgres://ada:hunter2@h/db"
+t = "ghp_hunter2hunter2hunter2hunter2hunter20"
+aws_secret = "wJalrXUtnFEMIhunter2K7MDENGbPxRfiCYhunter"
+w = f("https://a.blob.core.windows.net/c?sv=1&sig=hunter2&x=1")
+k = '''-----BEGIN RSA PRIVATE KEY-----
+MIIEpAIBAAKCAQEAhunter2xxxx
+hunter2==
+-----END RSA PRIVATE KEY-----'''
+kept = model(token, key=value, digest="9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822c")
--- a/run.sh
+++ b/run.sh
+export HF_TOKEN=hunter2
+curl --password hunter2 https://host
+kept=$HF_TOKEN
"""


def test_a_patch_is_recorded_without_secrets() -> None:
    masked = mask_patch(PATCH)
    assert MARK not in masked
    lines = PATCH.splitlines()
    for line in (line for line in lines if "kept" in line or line.startswith(("diff", "---", "+++"))):
        assert line in masked.splitlines()
    assert len(masked.splitlines()) == len(lines)


def test_a_patch_is_not_recorded_if_it_cannot_be_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher.config import secret_forms
    from launcher.runs import masked_patch

    for module in (masked_patch, secret_forms):
        monkeypatch.setattr(module, "token_patterns", lambda: None)
    assert MARK not in mask_patch('+x = "Zx9hunter2Zx9hunter2Zx9"\n')
    assert mask_patch("+x = 1\n") == "+x = 1\n"


def test_values_of_the_environment_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "_known", set())
    for name, value in {
        "HF_TOKEN": 'plan"ted\\one',
        "PGPASSWORD": "plantedtwo",
        "MAX_TOKEN": "512512512",
        "GOOGLE_APPLICATION_CREDENTIALS": "/home/ada/key.json",
        "DB_PASSWORD": "ada",
        "SORT_ORDER_KEY": "val/loss",
    }.items():
        monkeypatch.setenv(name, value)
    text = 'plan"ted\\one plantedtwo 512512512 /home/ada/key.json ada val/loss'
    assert masking.hide(text) == "*** *** 512512512 /home/ada/key.json ada val/loss"
    assert masking.hide(json.dumps({"error": text})) == json.dumps({"error": masking.hide(text)})
    assert masking.hide(repr(text)).count("***") == 2
    assert masking.mask({"x": "plantedtwo"}) == {"x": "***"}


def test_a_resume_never_uses_a_masked_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask of a secret in config.yaml is never used as a value."""
    monkeypatch.setenv("A_TOKEN", "planted-one")
    words = ["+vars.note=hf_hunter2hunter2hunter2hunter2", "+data.token=${oc.env:A_TOKEN,hunter2}"]
    stored = tmp_path / "config.yaml"
    stored.write_text(compose(["experiment=mnist_tiny", "data=mnist", *words]).to_yaml())
    assert MARK not in stored.read_text()
    assert compose([], stored=stored).job.data["token"] == "planted-one"
    monkeypatch.delenv("A_TOKEN")
    with pytest.raises(ConfigError, match=r"data\.token"):
        compose([], stored=stored)
    stored.write_text(stored.read_text().replace("${oc.env:A_TOKEN,***}", "${oc.env:HOME}***"))
    with pytest.raises(ConfigError, match=r"data\.token"):
        compose([], stored=stored)
    assert compose(["data.token=again"], stored=stored).job.data["token"] == "again"
