"""The weights of one network lie in one file or, where files must be small, in pieces that say how many they are.

`unet.safetensors`, or `unet-00001-of-00003.safetensors` and its fellows: the names that other programs give to pieces.
Every piece is a whole safetensors file, and a tensor is never cut. All may lie in the folder of another bundle, which
has the same network; the manifest then says so.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from ldm.errors import ModelError
from ldm.formats.manifest import MANIFEST, read_manifest
from ldm.formats.tensors import FileTensor, StoredTensor, read_header

HEADER = 65_536  # bytes, more than the header of any piece


def weight_files(folder: Path, part: str) -> list[Path]:
    """The files of one network of a model folder, in order, its own or those of the bundle that it shares them with.

    The one whole file where there is none: who reads it says that it is not there. Raises ModelError where pieces are
    missing or too many, and for a manifest that is none.
    """
    own = own_files(folder, part)
    if own[0].exists() or not (folder / MANIFEST).is_file():
        return own
    beside = read_manifest(folder).shared.get(part)
    return own if beside is None else own_files(folder / ".." / beside, part)


def own_files(folder: Path, part: str) -> list[Path]:
    """The files of one network that lie in a folder itself, as `weight_files` has them."""
    whole, found = folder / f"{part}.safetensors", sorted(folder.glob(f"{part}-*-of-*.safetensors"))
    if not found:
        return [whole]
    count = int(match[1]) if (match := re.search(r"-of-(\d{5})\.safetensors$", found[0].name)) else 0
    expected = [folder / name for name in names(part, count)]
    if found != expected or whole.exists():
        given = ", ".join(path.name for path in [*found, *([whole] if whole.exists() else [])])
        raise ModelError(f"{folder}: {part} is {given}, expected all of one set; copy the whole model folder again")
    return found


def names(part: str, count: int) -> list[str]:
    """What the files of a network in so many pieces are called."""
    if count == 1:
        return [f"{part}.safetensors"]
    return [f"{part}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def read_weights(folder: Path, part: str) -> dict[str, FileTensor]:
    """The stored tensors of one network, by name. Raises ModelError as `read_header` does, and for one given twice."""
    tensors: dict[str, FileTensor] = {}
    for path in weight_files(folder, part):
        found = read_header(path).tensors
        if twice := sorted(tensors.keys() & found.keys()):
            raise ModelError(f"{path}: {twice[0]} is in another piece too; copy the whole model folder again")
        tensors |= found
    return tensors


def pieces(tensors: Mapping[str, StoredTensor], dtype: str | None, largest: int) -> list[dict[str, StoredTensor]]:
    """The tensors in order of name, in pieces whose files have at most `largest` bytes; a larger tensor is alone."""
    from ldm.formats.write import written_bytes  # which needs torch, and reading does not

    made: list[dict[str, StoredTensor]] = [{}]
    for name in sorted(tensors):
        longer = {**made[-1], name: tensors[name]}
        if made[-1] and written_bytes(longer, dtype) + HEADER > largest:
            made.append({name: tensors[name]})
        else:
            made[-1] = longer
    return made
