"""Textual inversion: one new word is learned, everything else stays (Gal et al. 2023, Section 4)."""

from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float, Int
from pydantic import Field, field_validator
from torch import Tensor, nn

from ldm.diffusion.noise import key
from ldm.errors import SettingError
from ldm.models.text import ClipTextEncoder
from ldm.models.unet import UNet
from ldm.training.batch import Batch
from ldm.training.checkpoint import save_tensors
from ldm.training.conditioned import Conditioned, token_ids
from ldm.training.diffusion import DiffusionTraining
from ldm.training.loop import Batches
from ldm.training.workers import workers


class InversionTraining(DiffusionTraining):
    """The stage that learns a word for what the pictures show."""

    # The new word, as prompts will have it, and the one whose vector it begins with: a single token of the vocabulary.
    word: str = "<new>"
    begin: str
    # What captions become; the new word takes the place of {}.
    templates: tuple[str, ...] = Field(("a photo of {}", "a picture of a {}", "{}"), min_length=1)

    @field_validator("templates")
    @classmethod
    def _have_a_place(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        if not all(template.count("{}") == 1 for template in templates):
            raise ValueError("every template needs one {} where the new word goes")
        return templates


class OneMoreWord(nn.Module):
    """A token embedding, frozen, and the vector of one token behind its last, which learns."""

    def __init__(self, embedding: nn.Embedding, begin: int) -> None:
        super().__init__()
        self.embedding = embedding.requires_grad_(False)
        self.vector = nn.Parameter(embedding.weight[begin].detach().clone())

    def forward(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        new = ids == self.embedding.num_embeddings
        return torch.where(new[..., None], self.vector, self.embedding(ids.masked_fill(new, 0)))


class Inversion(Conditioned):
    """A frozen text tower and UNet, and the vector of a new word, which learns."""

    def __init__(self, text: ClipTextEncoder, unet: UNet, config: InversionTraining) -> None:
        super().__init__(text.requires_grad_(False), unet.requires_grad_(False))
        _, begin, *rest = text.tokenize([config.begin])[0].tolist()
        if rest[0] != text.config.vocabulary - 1:
            raise SettingError(f"inversion_training.begin: {config.begin!r} is several tokens; use a word that is one")
        text.tower.set_submodule("token_embedding", OneMoreWord(text.tower.token_embedding, begin))
        self.prompts = torch.stack([self._ids(template, config.begin, begin) for template in config.templates])

    @property
    def vector(self) -> Float[Tensor, " d"]:
        """The new word's."""
        return self.text.get_parameter("tower.token_embedding.vector").detach()

    def _ids(self, template: str, word: str, begin: int) -> Int[Tensor, " l"]:
        """Token ids of a template with the new word in it, which is put where the begun one was."""
        ids = self.text.tokenize([template.format(word)])[0]
        if int((ids == begin).sum()) != 1:
            raise SettingError(f"inversion_training.templates: {word!r} is in {template!r} already; write it otherwise")
        return ids.masked_fill(ids == begin, self.text.config.vocabulary)


def worded(batches: Batches, inversion: Inversion, seed: int) -> Batches:
    """Batches of latents whose text is a template with the new word, drawn by (seed, step, place in the batch)."""

    def with_words(start: int) -> Iterator[Batch]:
        null = token_ids(inversion.text)([""])
        for step, batch in enumerate(batches(start), start):
            first = workers().rank * len(batch)
            drawn = [key(seed, step, f"template {first + i}") % len(inversion.prompts) for i in range(len(batch))]
            mean, std, _ = batch.rows
            yield Batch((mean, std, inversion.prompts[drawn][..., None].float()), (null,), batch.keys)

    return with_words


def save_word(path: Path, inversion: Inversion, word: str) -> None:
    """Write the word's vector as other programs read it: one tensor (1 d) under the word's own name."""
    save_tensors(path, {word: inversion.vector[None]})
