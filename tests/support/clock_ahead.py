"""Workers of Ray whose clock is ahead: SITE is the content of a `sitecustomize.py` in their PYTHONPATH."""

from __future__ import annotations

AHEAD = 180.0  # seconds
# Python imports this module at the start of every process. Only processes of Ray's workers change their clock.
SITE = f"""
import sys, time
if any("default_worker" in word for word in sys.orig_argv):
    real = time.time
    time.time = lambda: real() + {AHEAD}
"""
