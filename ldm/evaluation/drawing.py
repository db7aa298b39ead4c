"""Pictures of many prompts from fixed seeds, each drawn once: what lies in the folder already is not drawn again."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ldm.bundle import Bundle
from ldm.evaluation.pictures import Asked, Captioned, Pictures
from ldm.evaluation.results import digest, protocol_hash
from ldm.files import sha256
from ldm.images import save_png
from ldm.pipeline import TextToImage
from ldm.request import SEEDS, GenerationRequest

FIRST_SEED = 10_000
# Raised by a change that draws other pictures from the same settings.
VERSION = 1
# What differs from picture to picture, or changes no more than rounding.
LEFT_OUT = ("prompt", "seed", "num_images", "batch_size")


@dataclass(frozen=True)
class Drawing:
    """An engine and a resolved request with the settings to draw with; its prompt and seed do not count."""

    engine: TextToImage
    request: GenerationRequest

    @property
    def protocol(self) -> dict[str, object]:
        """Everything beside prompt and seed that decides a picture, as JSON values."""
        settings = {name: value for name, value in self.request.settings().items() if name not in LEFT_OUT}
        return {"drawing": VERSION, **computed_with(self.engine.bundle), **settings}

    def made(self, prompts: Sequence[str]) -> dict[str, object]:
        """Everything that decides the pictures of a list of prompts."""
        return {**self.protocol, "first_seed": FIRST_SEED, "count": len(prompts), "prompts_sha256": digest(prompts)}

    def about(self, count: int) -> dict[str, object]:
        """The model, the main settings and the machine that draw `count` pictures, as a report names them."""
        request, bundle = self.request, self.engine.bundle
        decided = computed_with(bundle)
        return {
            "model": bundle.name,
            "sha256": decided["model_sha256"],
            "sampler": request.sampler,
            "schedule": request.schedule,
            "steps": request.steps,
            "guidance_scale": request.guidance_scale,
            "first_seed": FIRST_SEED,
            "num_images": count,
            "device": str(bundle.device),
            "dtype": decided["dtype"],
        }

    def captioned(self, asked: Sequence[Asked], paths: Sequence[Path]) -> tuple[Pictures, dict[str, object]]:
        """The drawn pictures with what a judge holds them against, and everything that decides both."""
        pairs = list(zip(paths, asked, strict=True))
        made = {**self.made([one.prompt for one in asked]), "captions_sha256": digest([one.caption for one in asked])}
        return lambda: (Captioned(path.stem, opened(path), one.caption) for path, one in pairs), made

    def draw(self, prompts: Sequence[str], folder: Path) -> Iterator[Path]:
        """The PNG of each prompt in turn, picture i from seed FIRST_SEED + i, kept below `folder`.

        The file's name is a function of protocol, prompt and seed. A batch with a picture missing is drawn whole, so
        that an interrupted run ends with the same pixels as another.
        """
        assert self.request.batch_size is not None
        folder = folder / protocol_hash(self.protocol)[:16]
        folder.mkdir(parents=True, exist_ok=True)
        for first in range(0, len(prompts), self.request.batch_size):
            batch = prompts[first : first + self.request.batch_size]
            seeds = [(FIRST_SEED + first + offset) % SEEDS for offset in range(len(batch))]
            paths = [folder / f"{seed}-{_short(prompt)}.png" for prompt, seed in zip(batch, seeds, strict=True)]
            if not all(path.is_file() for path in paths):
                for path, image in zip(paths, self.engine.draw(batch, seeds, self.request), strict=True):
                    save_png(image, path)
            yield from paths


def computed_with(bundle: Bundle) -> dict[str, object]:
    """What decides every number that a model computes, as JSON values: its weights, number format, kind of device."""
    dtype = str(next(bundle.unet.parameters()).dtype).removeprefix("torch.")
    return {"model_sha256": model_digest(bundle), "device": bundle.device.type, "dtype": dtype}


def model_digest(bundle: Bundle) -> str:
    """The sha256 of a bundle, or of the weights of a file or folder of another layout."""
    if bundle.sha256 or bundle.description is None:
        return bundle.sha256
    path = bundle.description.path
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    return protocol_hash({file.relative_to(path).as_posix(): sha256(file) for file in files})


def _short(prompt: str) -> str:
    return hashlib.blake2b(prompt.encode(), digest_size=8).hexdigest()


def opened(path: Path) -> Image.Image:
    """A picture that was drawn."""
    with Image.open(path, formats=["PNG"]) as image:
        return image.copy()
