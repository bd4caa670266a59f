"""Storage of runs: on this disk, on an object store, or on the disk of the machine that drives them.

directory    one run on this disk: result.json, heartbeat, requests; the runs of a root
plain_files  files of a run, opened without following links
results      what a result.json may hold
curves       the result of a run with its curves, for the Python API
store_copies where copies of run roots on object stores are, and which directory is one
user_state   the user's own record of runs, in the state directory
storage      run roots on object stores: their URIs, and operations with retries
mirror       such a root and its copy on this machine
gathered     run.root=head:///PATH: one machine's disk, shared with all others
provenance   where a run comes from: user, versions, commit
"""

from launcher.runs import user_state
from launcher.runs.directory import (
    FINAL,
    HEARTBEAT_SECONDS,
    LOST_AFTER_SECONDS,
    REMOTE,
    SENT,
    RunDirectory,
    find,
    list_runs,
    write_json,
    write_text,
)

__all__ = [
    "FINAL",
    "HEARTBEAT_SECONDS",
    "LOST_AFTER_SECONDS",
    "REMOTE",
    "SENT",
    "RunDirectory",
    "find",
    "list_runs",
    "user_state",
    "write_json",
    "write_text",
]
