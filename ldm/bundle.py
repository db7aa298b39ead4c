"""A bundle is a folder that holds a whole model: config.yaml, weights in safetensors, and a manifest of sha256.

`Bundle.load` takes the name of a bundle that ships with this package, or the path of a folder.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm import config as configuration
from ldm.cli import nearest
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedule import NOISE_SCHEDULES, NoiseSchedule
from ldm.errors import MachineError, ModelError, SettingError
from ldm.models.autoencoder import Autoencoder, AutoencoderConfig, KLAutoencoder, PixelAutoencoder
from ldm.models.model_config import ModelConfig
from ldm.models.text import ClipTextConfig, ClipTextEncoder, LabelEncoder, TextEncoder
from ldm.models.unet import UNet
from ldm.nn.layers import channels_last

FOLDER = Path(__file__).parent / "bundles"
DEFAULT = "shapes-256"
CONFIG, MANIFEST = "config.yaml", "manifest.json"
PARTS = ("autoencoder", "text", "unet")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def bundled_names() -> list[str]:
    """The names of the bundles that ship with this package."""
    return sorted(path.parent.name for path in FOLDER.glob(f"*/{CONFIG}"))


def find(name_or_path: str) -> Path:
    """The folder of a bundle, by name or path. Raises ModelError, with the nearest name, where there is none."""
    if name_or_path in bundled_names():
        return FOLDER / name_or_path
    path = Path(name_or_path).expanduser()
    if (path / CONFIG).is_file():
        return path
    if path.exists():
        raise ModelError(f"{name_or_path}: not a model folder, it has no {CONFIG}; give a bundle's name or folder")
    known = [*bundled_names(), *(p.name for p in path.parent.glob("*"))] if path.parent.is_dir() else bundled_names()
    raise ModelError(
        f"{name_or_path}: no such model{nearest(path.name, known)}; "
        f"bundled models: {', '.join(bundled_names()) or 'none'}, or train one: make train-shapes"
    )


def read_config(folder: Path) -> ModelConfig:
    """The model's config, without reading weights. Raises ModelError for one that is not valid."""
    try:
        return configuration.load(folder / CONFIG, ModelConfig)
    except SettingError as error:
        raise ModelError(str(error)) from None


def build(config: ModelConfig) -> tuple[Autoencoder, TextEncoder, UNet]:
    """The three networks of a config, with fresh weights."""
    autoencoder: Autoencoder
    if isinstance(config.autoencoder, AutoencoderConfig):
        autoencoder = KLAutoencoder(config.autoencoder)
    else:
        autoencoder = PixelAutoencoder(config.autoencoder)
    text: TextEncoder
    text = ClipTextEncoder(config.text) if isinstance(config.text, ClipTextConfig) else LabelEncoder(config.text)
    return autoencoder, text, UNet(config.unet)


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
    def load(cls, name_or_path: str = DEFAULT, device: str = "cpu", dtype: torch.dtype = torch.float32) -> "Bundle":
        """The bundle of that name or folder, in evaluation mode on `device`; the text encoder stays in fp32.

        Raises ModelError for a file that is missing, torn, changed, not finite or that does not fit the config.
        """
        folder = find(name_or_path)
        config = read_config(folder)
        digest = verify(folder)
        with torch.device("meta"):
            autoencoder, text, unet = build(config)
        for part, network in zip(PARTS, (autoencoder, text, unet), strict=True):
            assert isinstance(network, nn.Module)
            fill(network, folder / f"{part}.safetensors", torch.float32 if part == "text" else dtype)
            channels_last(network.to(device)).eval().requires_grad_(False)
        return cls(folder.name, config, autoencoder, text, unet, digest)

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
        names = [CONFIG, *(f"{part}.safetensors" for part in PARTS)]
        manifest = {name: sha256(folder / name) for name in names}
        (folder / MANIFEST).write_text(json.dumps({"format": 1, "sha256": manifest}, indent=2) + "\n")
        return folder


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path) -> str:
    """Check every file against the manifest; returns one digest of the whole bundle."""
    path = folder / MANIFEST
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["sha256"]
        items = sorted((str(name), str(digest)) for name, digest in entries.items())
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; copy the whole model folder again") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{path}: not a manifest; copy the whole model folder again") from None
    for name in (CONFIG, *(f"{part}.safetensors" for part in PARTS)):
        file = folder / name
        if not file.is_file():
            raise ModelError(f"{file}: no such file; copy the whole model folder again")
        if dict(items).get(name) != sha256(file):
            raise ModelError(f"{file}: sha256 differs from {MANIFEST}: torn or changed; copy the model folder again")
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()


def fill(module: nn.Module, path: Path, dtype: torch.dtype) -> None:
    """Give every tensor of a module on the meta device its value from a safetensors file, cast to `dtype`."""
    wanted = module.state_dict()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            found = set(file.keys())
            refuse_difference(path, wanted, {key: tuple(file.get_slice(key).get_shape()) for key in found})
            tensors = {key: checked(path, key, file.get_tensor(key)).to(dtype) for key in wanted}
    except safetensors.SafetensorError as error:
        raise ModelError(f"{path}: not a whole safetensors file ({error}); copy it again") from None
    module.load_state_dict(tensors, assign=True)
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            restore_buffer(module, name)


def refuse_difference(path: Path, wanted: dict[str, Tensor], found: dict[str, tuple[int, ...]]) -> None:
    """Raise ModelError that names the first five tensors that are missing, unexpected or of another shape."""
    problems = [
        ("missing", sorted(wanted.keys() - found.keys())),
        ("unexpected", sorted(found.keys() - wanted.keys())),
        (
            "of another shape",
            [
                f"{key} {found[key]}, expected {tuple(wanted[key].shape)}"
                for key in sorted(wanted.keys() & found.keys())
                if found[key] != tuple(wanted[key].shape)
            ],
        ),
    ]
    words = [f"{len(names)} {what}: {', '.join(names[:5])}" for what, names in problems if names]
    if words:
        raise ModelError(f"{path}: does not fit {CONFIG}: {'; '.join(words)}; use the files of one model")


def checked(path: Path, key: str, tensor: Tensor) -> Tensor:
    """`tensor`, if it holds finite floating-point numbers."""
    if tensor.dtype not in FLOATS:
        raise ModelError(f"{path}: {key} is {tensor.dtype}, expected fp32, fp16 or bf16; convert the file")
    if not torch.isfinite(tensor).all():
        count = int((~torch.isfinite(tensor)).sum())
        raise ModelError(f"{path}: {key} holds {count} values that are not finite; the file is damaged, copy it again")
    return tensor


def restore_buffer(module: nn.Module, name: str) -> None:
    """Compute a constant that is not stored in files: the causal mask of the text transformer."""
    assert name == "tower.attn_mask", name
    tower = module.get_submodule("tower")
    length = tower.attn_mask.shape[0]  # type: ignore[index]
    tower.attn_mask = torch.full((length, length), float("-inf")).triu(1)  # type: ignore[arg-type]
