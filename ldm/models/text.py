"""A prompt becomes vectors: CLIP's text transformer behind open_clip's tokenizer, or a fixed vector per label."""

import gzip
import importlib.util
import os
import re
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from ldm.cli import nearest
from ldm.config import Config
from ldm.errors import MachineError, SettingError
from ldm.models.text_tower import TextTower, embedding

# open_clip's vocabulary: 256 bytes, the same 256 as word ends, the merges, and the two special tokens.
BYTES_AND_SPECIALS = 514
SPECIAL_TOKEN = re.compile(r"<(start|end)_of_text>", re.IGNORECASE)
# How CLIP's tokenizer takes a text apart: English endings, runs of letters, single digits, runs of anything else.
WORD = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
# Stable Diffusion 2 pads with id 0, which is the word `!` inside a longer one; Hugging Face's tokenizer then takes
# every typed `!` for padding.
PADDING_WORD = "!"


class ClipTextConfig(Config):
    """Shape of the text transformer; the defaults are CLIP ViT-L/14's (123,060,480 parameters), as in SD 1.x."""

    kind: Literal["clip"] = "clip"
    width: PositiveInt = 768
    layers: PositiveInt = 12
    heads: PositiveInt = 12
    context_length: PositiveInt = 77
    # 514 + the number of merges; fewer than 49,408 means the first merges of open_clip's own file.
    vocabulary: int = Field(default=49408, gt=BYTES_AND_SPECIALS, le=49408)
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    # Which states the UNet reads: after the last block or after the one before it; both through the final norm.
    hidden: Literal["last", "penultimate"] = "last"
    # What fills the row behind the prompt: the end token (SD 1.x) or id 0 (SD 2.x and our own).
    padding: Literal["end", "zero"] = "end"
    # Whether a token sees only the ones before it, as in CLIP. Otherwise a noun also reads the words behind it, and can
    # say of itself that it is the one on the left.
    causal: bool = True
    # How text is made plain before it is taken apart: as open_clip does (repairs broken Unicode, reads HTML entities),
    # or as Hugging Face's CLIPTokenizer does, which Stable Diffusion's other programs use.
    tokenizer: Literal["open_clip", "hf"] = "open_clip"

    @model_validator(mode="after")
    def _consistent(self) -> "ClipTextConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of the {self.heads} heads")
        return self


class LabelConfig(Config):
    """A fixed vector for each of a few labels: class-conditional diffusion without a language."""

    kind: Literal["labels"]
    labels: tuple[str, ...]
    width: PositiveInt = 64


@dataclass(frozen=True)
class TextEmbedding:
    """What a text encoder says of b prompts: states per token for the UNet, and one vector per prompt."""

    tokens: Float[Tensor, "b l d"]
    pooled: Float[Tensor, "b p"]


@runtime_checkable
class TextEncoder(Protocol):
    """Turns prompts into vectors; the null prompt is the empty text."""

    def encode(self, prompts: Sequence[str]) -> TextEmbedding:
        """The states of `prompts`. Raises SettingError for a prompt the encoder cannot read."""
        ...

    def words_cut(self, prompt: str) -> str:
        """The end of `prompt` that does not fit into the context; empty if all fits."""
        ...


class ReadAhead:
    """What a text encoder says of texts that are known beforehand, so that it need not stay in memory for them."""

    @torch.inference_mode()
    def __init__(self, encoder: TextEncoder, texts: Sequence[str]) -> None:
        """Read all `texts`, each by itself. Raises SettingError for one that the encoder cannot read."""
        self._said = {text: (encoder.encode([text]), encoder.words_cut(text)) for text in texts}

    def encode(self, prompts: Sequence[str]) -> TextEmbedding:
        """What the encoder said of `prompts`, which are among its texts."""
        said = [self._said[prompt][0] for prompt in prompts]
        return TextEmbedding(torch.cat([one.tokens for one in said]), torch.cat([one.pooled for one in said]))

    def words_cut(self, prompt: str) -> str:
        """The end of `prompt` that did not fit into the encoder's context; empty if all fitted."""
        return self._said[prompt][1]


def open_clip_module() -> Any:
    """open_clip, imported late because it is slow."""
    import_torchvision()
    import open_clip

    return open_clip


@cache
def import_torchvision() -> torch.library.Library | None:
    """Import torchvision, also one that lacks its compiled operators.

    From PyPI next to a CPU-only torch it fails while it registers `nms`; declaring the two operators first makes the
    import work. Nothing here calls them. The declarations live as long as what is returned: in the cache, for ever.
    """
    try:
        import torchvision

        return None
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401

        return library


@cache
def tokenizer_module() -> tuple[Path, Any]:
    """open_clip's folder and its module `tokenizer`, which stands alone: the package around it takes seconds."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise MachineError("open_clip: not installed, and its tokenizer reads the prompts; pip install open_clip_torch")
    folder = Path(package.submodule_search_locations[0])
    found = importlib.util.spec_from_file_location("open_clip_tokenizer", folder / "tokenizer.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return folder, module


@cache
def tokenizer(vocabulary: int, context_length: int) -> Any:
    """open_clip's byte-pair tokenizer, reduced to the first merges where the vocabulary is smaller."""
    folder_of_open_clip, tokenizers = tokenizer_module()
    if vocabulary == 49408:
        return tokenizers.SimpleTokenizer(context_length=context_length)
    source = folder_of_open_clip / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(source.read_bytes()).decode("utf-8").split("\n")
    kept = lines[: 1 + vocabulary - BYTES_AND_SPECIALS]  # the first line is a header
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "merges.txt.gz")
        with gzip.open(path, "wb") as file:
            file.write("\n".join(kept).encode("utf-8"))
        made = tokenizers.SimpleTokenizer(bpe_path=path, context_length=context_length)
    assert made.vocab_size == vocabulary, (made.vocab_size, vocabulary)
    return made


def vocabulary_words(size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """The words of a vocabulary by id, the two special ones last, and its merges in order."""
    coder = tokenizer(size, 77)
    return [coder.decoder[number] for number in range(size)], list(coder.bpe_ranks)


def hf_ids(coder: Any, prompt: str, padding_word: bool) -> Iterator[int]:
    """Token ids of a text as Hugging Face's fast CLIPTokenizer gives them; with `padding_word`, `!` is id 0.

    A typed `<|endoftext|>` is read as words here, so that no prompt can end itself.
    """
    import regex  # type: ignore[import-untyped]  # open_clip needs it too

    plain = "".join(character.lower() for character in unicodedata.normalize("NFC", prompt))
    for index, part in enumerate(plain.split(PADDING_WORD) if padding_word else [plain]):
        if index:
            yield 0
        for word in regex.findall(WORD, part):
            symbols = "".join(coder.byte_encoder[byte] for byte in word.encode("utf-8"))
            yield from (coder.encoder[piece] for piece in coder.bpe(symbols).split(" "))


def escape_special(prompt: str) -> str:
    """`prompt` with a typed `<end_of_text>` broken up, so that it is read as words and not as the token."""
    return SPECIAL_TOKEN.sub(lambda found: f"< {found[0][1:-1]} >", prompt)


class ClipTextEncoder(nn.Module):
    """CLIP's text tower, giving the states of every token.

    Source: Radford et al. 2021, Section 2.4; for the penultimate states, Stable Diffusion 2's `FrozenOpenCLIPEmbedder`.
    """

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.config = config
        quick = config.activation == "quick_gelu"
        self.tower = TextTower(
            config.context_length, config.vocabulary, config.width, config.heads, config.layers, quick
        )

    def tokenize(self, prompts: Sequence[str]) -> Int[Tensor, "b l"]:
        """Token ids: start, prompt, end, padding; a prompt that is too long is cut before the end token."""
        length, end = self.config.context_length, self.config.vocabulary - 1
        ids = torch.full((len(prompts), length), end if self.config.padding == "end" else 0)
        for row, prompt in zip(ids, prompts, strict=True):
            known = [end - 1, *self._words(prompt)[: length - 2], end]
            row[: len(known)] = torch.tensor(known)
        return ids

    def words_cut(self, prompt: str) -> str:
        """The end of `prompt` that does not fit into `context_length` − 2 tokens."""
        coder = tokenizer(self.config.vocabulary, self.config.context_length)
        return coder.decode(self._words(prompt)[self.config.context_length - 2 :]).strip()

    def _words(self, prompt: str) -> list[int]:
        """The token ids of a prompt alone."""
        coder = tokenizer(self.config.vocabulary, self.config.context_length)
        if self.config.tokenizer == "hf":
            return list(hf_ids(coder, prompt, padding_word=self.config.padding == "zero"))
        return list(coder.encode(escape_special(prompt)))

    def forward(self, ids: Int[Tensor, "b l"]) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d"]]:
        """States of every token (the config's layer, normalised) and the state at the end token (last layer)."""
        tower = self.tower
        x = tower.token_embedding(ids) + tower.positional_embedding[: ids.shape[1]]
        states = x
        for block in tower.transformer.resblocks:
            before, states = states, block(states, self.config.causal)
        chosen = states if self.config.hidden == "last" else before
        last = tower.ln_final(states)
        end = (ids == self.config.vocabulary - 1).int().argmax(dim=1)
        return tower.ln_final(chosen), last[torch.arange(len(ids), device=ids.device), end]

    def encode(self, prompts: Sequence[str]) -> TextEmbedding:
        """The states of `prompts`, in fp32."""
        ids = self.tokenize(prompts).to(self.tower.positional_embedding.device)
        tokens, pooled = self(ids)
        return TextEmbedding(tokens.float(), pooled.float())


class LabelEncoder(nn.Module):
    """One token per label, and one for the null prompt: random vectors that stay as they are.

    The UNet's key and value projections are linear, so what they learn of a label does not depend on its vector.
    """

    def __init__(self, config: LabelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = embedding(len(config.labels) + 1, config.width)

    def words_cut(self, prompt: str) -> str:
        """Nothing: a label is read whole or refused."""
        return ""

    def encode(self, prompts: Sequence[str]) -> TextEmbedding:
        """The vector of each label. Raises SettingError for a prompt that is no label of this model."""
        indices = []
        for prompt in prompts:
            label = prompt.strip()
            if label and label not in self.config.labels:
                known = f"{nearest(label, self.config.labels)}; use one of {', '.join(self.config.labels)}"
                raise SettingError(f"prompt: {prompt!r} is not a label of this model{known}")
            indices.append(self.config.labels.index(label) if label else len(self.config.labels))
        vectors = self.embedding(torch.tensor(indices, device=self.embedding.weight.device)).float()
        return TextEmbedding(vectors[:, None], vectors)
