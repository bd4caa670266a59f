"""Secret values in all places where users keep them do not appear in any record of a run or a sweep."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command import Place, place  # noqa: F401 (a fixture)

MARK = b"pl4nted"
MODEL = '''\
import logging
import os
import sys
from pathlib import Path

from torch import nn

MARK = b"pl4" + b"nted"


def processes():
    """Return the command lines of all processes except the command of the user."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes()
        except OSError:
            continue
        if b"bin/launch" not in words and MARK in words.lower():
            yield f"{file}: {words}"


def logs():
    for file in Path(os.environ["TMPDIR"]).rglob("*"):
        if "/session_" in str(file):  # Ray's own file, which exists only while it runs
            with open(os.environ["FOUND"] + ".looked", "a") as looked:
                looked.write(f"{file}\\n")
        try:
            if file.is_file() and file.stat().st_size < 2**24 and MARK in file.read_bytes().lower():
                yield str(file)
        except OSError:
            continue


class Planted(nn.Module):
    def __init__(self, password, api_key, secret):
        super().__init__()
        self.line, self.calls = nn.Linear(1, 1), 0
        self.texts = [password, api_key, secret]

    def training_step(self, batch):
        x, y = batch
        self.calls += 1
        if self.calls == 2:  # after the start check
            print("connecting with", self.texts, os.environ["HF_TOKEN"])
            logging.getLogger("mine").warning("again with %s", os.environ["DB_PASSWORD"])
            sys.stderr.write(os.environ["HF_TOKEN"] + "\\\\n")
        if self.calls == 4:
            with open(os.environ["FOUND"], "a") as file:
                file.writelines(f"{line}\\\\n" for line in (*processes(), *logs()))
            if os.environ.get("FAILS"):
                raise RuntimeError(f"no entry with {os.environ['DB_PASSWORD']}")
        return {"loss": (self.line(x) - y).square().mean(1)}
'''.replace("\\\\n", "\\n")
EXPERIMENT = """\
# @package _global_
defaults:
  - override /model: planted
  - override /data: numbers
vars:
  login: {user: ada, password: pl4nted-04}
  url: postgres://ada:pl4nted-05@host/db
  note: hf_pl4nted06pl4nted06pl4nted06pl4nt
  remark: AKIAPL4NTED07PL4NTED
  share: https://a.blob.core.windows.net/c?sv=1&sig=pl4nted-08
  session: eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJwl4ntedInA.pl4nted09sig
  header: "Authorization: Bearer pl4nted10pl4nted10"
trainer: {epochs: 2, global_batch_size: 10, log_every: 2}
logging: {graph: false, hparams: [model.secret, model.api_key]}
"""
OPTION = """\
_target_: planted.Planted
password: ${oc.env:NOT_SET_HERE,pl4nted-11}
api_key: ${oc.env:PREFIX}pl4nted-12
secret: ${oc.env:MODEL_SECRET}
"""
ENVIRONMENT = {
    "HF_TOKEN": "pl4nted-01",
    "DB_PASSWORD": 'pl4nted"02',
    "MODEL_SECRET": "pl4nted-03",
    "PREFIX": "prefix",
}
WORDS = ["+vars.db={host: h, password: pl4nted-13}", "+vars.key.api_key=pl4nted-14"]
CHANGE = '''
PASSWORD = "pl4nted-15"
client = dict(api_key='pl4nted-16', note="hf_pl4nted17pl4nted17pl4nted17pl4nt")
KEY = """-----BEGIN RSA PRIVATE KEY-----
pl4nted18pl4nted18
-----END RSA PRIVATE KEY-----"""
'''


@pytest.fixture
def project(place: Place) -> Place:  # noqa: F811
    """A project in git with secrets in its configuration, in uncommitted changes, and in .env."""
    files = {"planted.py": MODEL, "own/experiment/planted.yaml": EXPERIMENT, "own/model/planted.yaml": OPTION}
    for name, text in {**files, ".env": "A=1\n", "more.py": "x = 1\n"}.items():
        (place.directory / name).write_text(text)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A", "-f"], ["commit", "-q", "-m", "x"]):
        subprocess.run(["git", "-C", str(place.directory), *identity, *words], check=True, capture_output=True)
    (place.directory / "more.py").write_text(f"x = 1\n{CHANGE}")
    (place.directory / ".env").write_text("A=pl4nted-19\n")
    return place


@pytest.fixture
def scratch() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="pl", dir="/tmp"))  # a short path, since it contains Ray's sockets
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def found(project: Place, scratch: Path) -> list[str]:
    """Return where secrets are found: records of runs, the home directory, and the temporary folder."""
    files = [file for root in (project.runs, project.home, scratch) for file in root.rglob("*") if file.is_file()]
    assert any("tfevents" in file.name for file in files)
    seen = [str(file) for file in files if MARK in file.read_bytes().lower()]
    hits = project.directory / "found.txt"
    assert hits.exists(), "the model never looked"
    return seen + hits.read_text().splitlines()


def environment(project: Place, scratch: Path, **more: str) -> dict[str, str]:
    return {**ENVIRONMENT, "TMPDIR": str(scratch), "FOUND": str(project.directory / "found.txt"), **more}


def test_a_run_records_no_secret(project: Place, scratch: Path) -> None:
    words = ["--config-dir", "own", "experiment=planted", "cluster=none", *WORDS]
    done = project.launch(*words, "run.name=a", seconds=200, **environment(project, scratch))
    assert done.status == 0, done.err[-3000:]
    assert found(project, scratch) == []
    patch = (project.runs / "a/code.patch").read_text()
    assert "+PASSWORD = " in patch
    assert ".env" not in patch
    log = (project.runs / "a/log.txt").read_text()
    assert "connecting with" in log
    assert "again with ***" in log


def test_a_run_that_fails_records_no_secret(project: Place, scratch: Path) -> None:
    words = ["--config-dir", "own", "experiment=planted", "cluster=none", "run.name=a", *WORDS]
    done = project.launch(*words, seconds=200, **environment(project, scratch, FAILS="1"))
    assert done.status == 1, done.err[-3000:]
    assert "no entry with ***" in project.result("a")["error"]
    assert found(project, scratch) == []


def test_a_run_of_two_ray_workers_records_no_secret(project: Place, scratch: Path) -> None:
    """Each worker searches the command lines of all processes and all files of Ray's session during training."""
    words = ["--config-dir", "own", "experiment=planted", "cluster=local", "scaling.workers=2", *WORDS]
    words += ["scaling.cpus_per_worker=0.5", "run.name=r"]
    done = project.launch(*words, seconds=240, **environment(project, scratch))
    assert done.status == 0, done.err[-3000:]
    assert project.result("r")["workers"] == 2
    looked = (project.directory / "found.txt.looked").read_text()
    assert "/logs/worker-" in looked, "Ray's session was not below TMPDIR, or nothing of it was looked at"
    assert found(project, scratch) == []
    assert MARK not in done.err.lower().encode() + done.out.lower().encode()
    log = (project.runs / "r/log.txt").read_text()
    assert all(f"[rank {rank}] connecting with" in log for rank in range(2))


def test_a_sweep_records_no_secret(project: Place, scratch: Path) -> None:
    words = ["-m", "--config-dir", "own", "experiment=planted", "cluster=none", "run.name=s", *WORDS]
    words += ["optimizer.lr=0.1,0.01"]
    done = project.launch(*words, seconds=230, **environment(project, scratch))
    assert done.status == 0, done.err[-3000:]
    assert found(project, scratch) == []
