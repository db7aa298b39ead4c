"""A bundle is a whole model, ready to draw; our own lie in folders: config.yaml, safetensors, a manifest of sha256.

`Bundle.load` is the one door: it takes the name of a bundle that ships with this package, a folder of ours or of
diffusers, or a single file with CompVis's names.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import nn

from ldm import config as configuration
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedule import NOISE_SCHEDULES, NoiseSchedule
from ldm.errors import MachineError, ModelError
from ldm.files import sha256
from ldm.formats import probe
from ldm.formats.describe import BUNDLE_CONFIG as CONFIG
from ldm.formats.describe import BUNDLE_PARTS as PARTS
from ldm.formats.describe import layout
from ldm.formats.evidence import Description, Prediction
from ldm.formats.export_bundle import write_manifest
from ldm.formats.fill import fill
from ldm.formats.finding import DEFAULT, find
from ldm.formats.manifest import MANIFEST, read_manifest
from ldm.formats.pieces import weight_files
from ldm.formats.read import OpenModel, open_model, read_bundle_config
from ldm.models.autoencoder import Autoencoder, KLAutoencoder
from ldm.models.model_config import ModelConfig, build
from ldm.models.text import TextEncoder
from ldm.models.unet import UNet
from ldm.nn.packing import Conv2d


def read_config(path: Path, prediction: Prediction | None = None) -> ModelConfig:
    """The model's config, without reading weights where that can be. Raises ModelError for one that is not valid.

    A file of Stable Diffusion 2 may leave open whether it predicts ε or v, which decides the size of its pictures;
    its UNet is then loaded and asked, unless `prediction` says it.
    """
    if layout(path) == "bundle":
        return read_bundle_config(path)
    opened = open_model(path, prediction)
    sizes = {opened.predicting(answer, "").config.sampling.width for answer in ("eps", "v")}
    undecided = opened.description.prediction is None and len(sizes) > 1
    return Bundle.predicting(opened).config if undecided else opened.config


def noise_schedule(config: ModelConfig) -> NoiseSchedule:
    """The noise schedule that a config names."""
    chosen = config.noise_schedule
    return NOISE_SCHEDULES[chosen.kind](chosen.beta_start, chosen.beta_end, chosen.timesteps)


@dataclass(frozen=True)
class Bundle:
    """A whole model, ready to draw: three networks, their noise schedule, and where they came from."""

    name: str
    config: ModelConfig
    autoencoder: Autoencoder
    text: TextEncoder
    unet: UNet
    sha256: str = ""
    # What the file or folder was found to be, for a model that was loaded.
    description: Description | None = None

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule the UNet was trained with."""
        return noise_schedule(self.config)

    @property
    def denoiser(self) -> Denoiser:
        """The UNet as a clean estimate."""
        return Denoiser(self.unet, self.schedule, self.config.prediction, next(self.unet.parameters()).dtype)

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return next(self.unet.parameters()).device

    @classmethod
    def load(
        cls,
        name_or_path: str = DEFAULT,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        prediction: Prediction | None = None,
    ) -> "Bundle":
        """The model of that name, folder or file, in evaluation mode on `device`; the text encoder stays in fp32.

        `prediction` is the user's word on what the UNet predicts, against what the file says.
        Raises ModelError for a file that is missing, torn, changed, not finite or that does not fit its config.
        """
        path = find(name_or_path)
        digest = verify(path) if layout(path) == "bundle" else ""
        return cls.of(open_model(path, prediction), device, dtype, digest)

    @classmethod
    def of(
        cls, opened: OpenModel, device: str = "cpu", dtype: torch.dtype = torch.float32, sha256: str = ""
    ) -> "Bundle":
        """The model that lies open on the disk, with its weights read. Raises ModelError for damaged ones."""
        autoencoder, text, unet = networks(opened, device, dtype)
        if opened.description.prediction is None:
            opened = opened.predicting(*probe.ask(unet, text.encode([""]).tokens))
        return cls(opened.description.path.name, opened.config, autoencoder, text, unet, sha256, opened.description)

    def compile(self) -> None:
        """Have PyTorch translate UNet and decoder for this machine, at the first call with each size; then it is kept.

        On CUDA their kernels are chosen by trial and run as one graph.
        """
        # Code for any size would be slower, and CUDA graphs have one size each.
        how: dict[str, Any] = {"mode": "max-autotune", "dynamic": False} if self.device.type == "cuda" else {}
        for module in self.unet.modules():
            if isinstance(module, Conv2d):
                module.unpack()
                module.packs = False
        self.unet.compile(**how)
        if isinstance(self.autoencoder, KLAutoencoder) and not self.autoencoder.sparing:  # bands are code of their own
            self.autoencoder.decoder.compile(**how)

    @staticmethod
    def predicting(opened: OpenModel) -> OpenModel:
        """`opened` with what its UNet predicts, for which the UNet is loaded and asked where nothing else tells."""
        if opened.description.prediction is not None:
            return opened
        _, text, unet = networks(opened, "cpu", torch.float32, parts=("text", "unet"))
        return opened.predicting(*probe.ask(unet, text.encode([""]).tokens))

    def save(self, folder: Path, dtype: torch.dtype = torch.float16) -> Path:
        """Write config, weights in `dtype` and the manifest to `folder`, which is made; returns it."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(configuration.dump(self.config), encoding="utf-8")
        for part in PARTS:
            tensors = {
                key: value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype).contiguous()
                for key, value in getattr(self, part).state_dict().items()
            }
            try:
                save_file(tensors, folder / f"{part}.safetensors")
            except safetensors.SafetensorError as error:
                raise MachineError(f"{folder}: cannot be written ({error}); free space on the disk") from None
            (folder / f"{part}.safetensors").chmod(0o644)  # safetensors makes files that only their owner may read
        write_manifest(folder)
        return folder


def verify(folder: Path) -> str:
    """Check every file against the manifest; returns one digest of the whole bundle."""
    manifest = read_manifest(folder)
    for file in (folder / CONFIG, *(path for part in PARTS for path in weight_files(folder, part))):
        if not file.is_file():
            also = "" if file.parent == folder else f", and {file.parent.name} beside it"
            raise ModelError(f"{file}: no such file; copy the whole model folder again{also}")
        if manifest.sha256.get(file.relative_to(folder).as_posix()) != sha256(file):
            raise ModelError(f"{file}: sha256 differs from {MANIFEST}: torn or changed; copy the model folder again")
    return hashlib.sha256(json.dumps(sorted(manifest.sha256.items())).encode()).hexdigest()


def networks(
    opened: OpenModel, device: str, dtype: torch.dtype, parts: tuple[str, ...] = PARTS
) -> tuple[Autoencoder, TextEncoder, UNet]:
    """The networks of a model, those of `parts` with their weights; the text encoder in fp32, the others in `dtype`."""
    with torch.device("meta"):
        built = build(opened.config)
    for part, network in zip(PARTS, built, strict=True):
        assert isinstance(network, nn.Module)
        if part in parts:
            where = opened.description.path
            where = weight_files(where, part)[0] if opened.description.layout == "bundle" else where
            fill(network, opened.parts[part], where, torch.float32 if part == "text" else dtype, device)
        network.eval().requires_grad_(False)
    return built
