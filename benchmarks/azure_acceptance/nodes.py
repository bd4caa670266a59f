"""Inspects the GPU VMs: a probe runs on each through the SSH command of `launch status`, and its facts become rows."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.azure_acceptance.report import Row, judged, not_checked
from launcher.clusters.azure.ray_yaml import IMAGE
from launcher.clusters.azure.spec import PYTHON, USER

PROBE, NCCL = (Path(__file__).with_name(name).read_text() for name in ("node_probe.py", "nccl_probe.py"))
KEY = "~/ray_bootstrap_key.pem"  # used by Ray's autoscaler on the head to reach the nodes
ACCELERATED = {"mlx4_core", "mlx5_core", "mana"}  # drivers of the virtual function that accelerated networking adds
NO_AZURE = "the node is no VM of Azure"
_OPTIONS = "-o BatchMode=yes -o IdentitiesOnly=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
Facts = Mapping[str, Any]


def ask(head: Sequence[str], address: str, script: str, *words: str, seconds: float = 240) -> dict[str, Any]:
    """Run a Python script on a node through the head, and return the JSON object that it prints last.

    Raises:
        RuntimeError: the script failed; the message has its output.
    """
    there = shlex.join([PYTHON, "-I", "-", *words])
    hop = f"ssh -i {KEY} {_OPTIONS} -o LogLevel=ERROR {USER}@{shlex.quote(address)} {shlex.quote(there)}"
    command = [head[0], "-o", "BatchMode=yes", *head[1:], hop]
    try:
        done = subprocess.run(command, input=script, capture_output=True, text=True, timeout=seconds)
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the node did not answer within {seconds:.0f} s") from None
    except (IndexError, ValueError):
        raise RuntimeError(f"exit status {done.returncode}: {' '.join(done.stderr.split())[-300:]}") from None


def probe(head: Sequence[str], addresses: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the facts of each node, and those of NCCL between them."""
    with ThreadPoolExecutor(len(addresses)) as pool:
        facts = list(pool.map(lambda address: ask(head, address, PROBE), addresses))
        world = str(len(addresses))
        ranks = [
            pool.submit(ask, head, address, NCCL, str(rank), world, addresses[0])
            for rank, address in enumerate(addresses)
        ]
        try:
            return facts, ranks[0].result()
        except RuntimeError as error:
            return facts, {"error": str(error)}


def rows(facts: Sequence[Facts], nccl: Facts, spot: bool) -> Iterator[Row]:
    """Evaluate the facts of all nodes."""
    if not all(one["azure"] for one in facts):
        asked = (
            "a driver on each node",
            "a GPU on each node",
            "on each node",
            "right sums over a network",
            "the HPC image",
        )
        titles = ("GPU driver", "CUDA in PyTorch", "accelerated networking", "NCCL between the nodes", "image")
        yield from (not_checked(title, NO_AZURE, what) for title, what in zip(titles, asked, strict=True))
    else:
        yield from _hardware(facts)
        yield _nccl(nccl)
        yield _image(facts)
    yield _notices(facts)
    if spot and all(one["azure"] for one in facts):
        kinds = _each(one.get("priority") or "unknown" for one in facts)
        yield judged("spot nodes", kinds, "Spot", all(one.get("priority") == "Spot" for one in facts))


def _hardware(facts: Sequence[Facts]) -> Iterator[Row]:
    found = _each(f"{one['driver'] or 'no driver'} ({', '.join(one['gpus']) or 'no GPU'})" for one in facts)
    yield judged("GPU driver", found, "a driver on each node", all(one["driver"] for one in facts))
    found = _each(
        f"PyTorch {one.get('torch', one.get('torch_error'))}, CUDA {one.get('cuda')}, "
        f"{one.get('cuda_devices', 0)} of {one['pci']} GPUs"
        for one in facts
    )
    works = all(one.get("cuda_devices") and one["cuda_devices"] == one["pci"] for one in facts)
    yield judged("CUDA in PyTorch", found, "every GPU of each node", works)
    found = _each(f"{one['default']}; drivers {', '.join(sorted({*one['interfaces'].values()}))}" for one in facts)
    quick = all(ACCELERATED & {*one["interfaces"].values()} for one in facts)
    yield judged("accelerated networking", found, f"one of {', '.join(sorted(ACCELERATED))} on each node", quick)


def _nccl(nccl: Facts) -> Row:
    title, asked = "NCCL between the nodes", "right sums, over a named interface"
    if "right" not in nccl:
        return judged(title, nccl.get("error") or nccl.get("why") or "no answer", asked, False)
    found = (
        f"{'right' if nccl['right'] else 'WRONG'} sums, {nccl['gbit']:.1f} Gbit/s, NCCL {nccl['nccl']}, "
        f"{nccl['transport'] or 'unknown transport'} over {nccl['interface'] or 'an unknown interface'}"
    )
    return judged(title, found, asked, bool(nccl["right"] and nccl["interface"]))


def _image(facts: Sequence[Facts]) -> Row:
    wanted = {key.removeprefix("image").lower(): value for key, value in IMAGE.items()}
    same = ("publisher", "offer", "sku")
    fits = all(all(one["image"].get(key, "").lower() == wanted[key].lower() for key in same) for one in facts)
    found = _each(
        f"{one['image'].get('offer')}:{one['image'].get('sku')}:{one['image'].get('version')} ({one.get('os')})"
        for one in facts
    )
    return judged("image", found, f"{wanted['offer']}:{wanted['sku']}", fits)


def _notices(facts: Sequence[Facts]) -> Row:
    found = _each(
        f"Scheduled Events {'answers' if one['events'] else 'does not answer'}, the agent "
        f"{'runs' if one['agent'] else 'does not run'}"
        for one in facts
    )
    works = all(one["events"] and one["agent"] for one in facts)
    return judged("spot notice path", found, "both on each node", works)


def _each(texts: Iterator[str]) -> str:
    """Return a fact once if it is equal on all nodes, else node by node."""
    listed = list(texts)
    if len({*listed}) == 1:
        return listed[0]
    return "; ".join(f"node {number}: {text}" for number, text in enumerate(listed, start=1))
