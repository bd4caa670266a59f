"""Files with secrets are not sent to other machines by any of the ways in which a project is sent."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from launcher.clusters.remote import project
from launcher.clusters.ssh import lifecycle as ssh
from launcher.jobs.remote import packaging
from launcher.runs import provenance
from launcher.runs.secret_files import is_secret_path

KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nharmless\n-----END OPENSSH PRIVATE KEY-----\n"
ACCOUNT = '{"type": "service_account", "private_key": "harmless"}'
_WITHHELD = [
    *(".env", ".env.production", "deploy/prod.env", ".envrc", "id_rsa", "keys/id_ed25519", ".ssh/config", "server.pem"),
    *(".aws/credentials", ".azure/msal_token_cache.json", ".kube/config", ".config/gcloud/access_tokens.db"),
    *("Server.KEY", "store.p12", ".netrc", ".pypirc", ".npmrc", ".git-credentials", "kaggle.json", ".pgpass"),
    *("conf/secrets.yaml", "service-account.json", "infra/terraform.tfstate", "credentials.json"),
]
_SENT = ["train.py", "secrets.py", "models/token.py", ".env.example", "data/tokens.txt", "key.yaml", "id_rsa.pub"]
SECRET = dict.fromkeys(_WITHHELD, "MARK=harmless\n") | {"deploy_key": KEY, "my-project-1a2b.json": ACCOUNT}
SENT = dict.fromkeys(_SENT, "ordinary\n")


@pytest.fixture(params=["git", "plain"])
def calling(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A project with ordinary files and secrets: in git, with secrets added by mistake, and without git."""
    calling = tmp_path / "project"
    for name, text in {**SECRET, **SENT}.items():
        (calling / name).parent.mkdir(parents=True, exist_ok=True)
        (calling / name).write_text(text)
    (calling / "settings").symlink_to(".env")
    if request.param == "git":
        for words in (["init", "-q"], ["add", "-A", "-f"]):
            subprocess.run(["git", "-C", str(calling), *words], check=True)
    return calling


def files_below(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def test_no_secret_is_packed_for_a_cluster(calling: Path, tmp_path: Path) -> None:
    packed = packaging.pack(calling, None, tmp_path / "freight")
    assert files_below(tmp_path / "freight" / "calling") == SENT.keys()
    assert ".aws/credentials" in packed.withheld
    assert "\n" not in packed.withheld
    assert b"harmless" not in b"".join(
        path.read_bytes() for path in (tmp_path / "freight" / "calling").rglob("*") if path.is_file()
    )


def test_no_secret_of_a_configuration_directory_is_packed(calling: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "train.py").touch()
    packed = packaging.pack(outside, calling, tmp_path / "freight")
    place = tmp_path / "freight" / "calling" / str(packed.config_dir)
    assert files_below(place) == SENT.keys()
    assert ".env" in packed.withheld


def test_an_ignore_file_adds_and_takes_away(calling: Path) -> None:
    (calling / ".launchignore").write_text("# ours\ndata/\n*.tmp\n!server.pem\n!my-project-1a2b.json\n")
    (calling / "scratch.tmp").touch()
    chosen = project.select(calling)
    assert {"server.pem", "my-project-1a2b.json", ".launchignore"} <= set(chosen.files)
    assert not {"scratch.tmp", "data/tokens.txt", "Server.KEY", ".env"} & set(chosen.files)
    assert chosen.ignored == 2
    assert "2 files" in chosen.withheld()


def test_what_is_named_is_safe_for_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "\x1b[31m.pem").write_text("x")
    (tmp_path / "plain.py").touch()
    assert project.select(tmp_path).withheld().isprintable()
    (tmp_path / "\x1b[31m.pem").unlink()
    assert project.select(tmp_path).withheld() == ""


def test_no_secret_of_launch_itself_is_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A developer of launch may have keys in its conf/."""
    for name in ("conf/.env", "conf/config.yaml", "models/a.py", "launcher/b.py", "launcher/aws.pem"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(project, "HOME", tmp_path)
    assert project.own_files() == ["launcher/b.py", "models/a.py", "conf/config.yaml"]


def test_ray_up_copies_no_secret_to_azure() -> None:
    """`ray up` copies whole folders with rsync; the files to exclude are passed by name."""
    from launcher.clusters.azure import ray_yaml
    from launcher.runs.secret_files import PATTERNS
    from tests.azure.test_spec import LOCAL, spec_of

    own = {"*.key"}  # Ray sends the cluster's own key, demo.key, under the same patterns
    assert set(PATTERNS) - own <= set(ray_yaml.ray_config(spec_of(), LOCAL)["rsync_exclude"])


def test_rsync_matches_the_same_files(calling: Path, tmp_path: Path) -> None:
    from launcher.runs.secret_files import PATTERNS

    words = ["rsync", "-a", *(f"--exclude={pattern}" for pattern in PATTERNS), f"{calling}/", str(tmp_path / "there")]
    subprocess.run(words, check=True)
    by_name = {name for name in SECRET if is_secret_path(name)} - {"Server.KEY"}  # rsync is case-sensitive
    assert not by_name & files_below(tmp_path / "there")
    assert {"train.py", "data/tokens.txt"} <= files_below(tmp_path / "there")


def test_no_secret_is_sent_over_ssh(calling: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, list[str]] = {}

    class Recorder:
        def send(self, directory: Path, files: list[str], to: str, **options: object) -> None:
            sent[to] = list(files)

    host: Any = ssh._Host("vm1", Recorder(), [], facts={"directory": "/there"})  # type: ignore[arg-type]
    lines: list[str] = []
    ssh._send(ssh._Hosts("ours", [host], lines.append), calling, lines.append)
    (files,) = [files for to, files in sent.items() if "/projects/" in to]
    assert set(files) == SENT.keys()
    assert sum(".aws/credentials" in line for line in lines) == 1


def test_no_secret_file_is_in_the_recorded_patch(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    git("init")
    for name in (".env", "sub/deploy.key", "train.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one\n")
    git("add", "-A")
    git("commit", "-m", "first")
    for name in (".env", "sub/deploy.key", "train.py"):
        (tmp_path / name).write_text("planted\n")
    for directory in (tmp_path, tmp_path / "sub"):
        patch = provenance.patch(directory)
        assert patch.count("+planted") == 1
        assert "b/train.py" in patch
    subprocess.run(["git", "-C", str(tmp_path), "checkout", "-q", "."], check=True)
    (tmp_path / ".env").write_text("planted\n")
    assert provenance.patch(tmp_path) == ""
