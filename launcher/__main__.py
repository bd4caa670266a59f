"""Runs `python -m launcher`, which is the same as `launch`."""

from launcher.cli import main

main()
