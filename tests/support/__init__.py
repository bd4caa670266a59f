"""Helpers that tests of several folders use: running commands, servers, stores, machines, and the engine on ranks."""
