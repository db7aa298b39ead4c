"""Checkpoints of other programs: what they are, told from evidence, and their tensors under our names.

`describe(path)` (in `describe.py`) says what a file or folder is and reads no weight; `open_model(path)` (in `read.py`)
gives its config and its tensors, which are read from the disk when they are asked for.
"""
