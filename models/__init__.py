"""Networks and their data sets in plain PyTorch, one file per kind of input.

Nothing here imports the launcher: configuration names both (`model._target_`, `data._target_`), and a file of this
folder runs in any training loop.
"""
