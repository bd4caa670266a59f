"""Networks and their data sets, one file a kind of input, in plain PyTorch.

Nothing here imports the launcher: configuration names both (`model._target_`, `data._target_`), and a file taken
from this folder runs in anybody's training loop.
"""
