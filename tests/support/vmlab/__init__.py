"""Machines for the tests, made of namespaces: see `lab.py`."""
