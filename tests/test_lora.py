"""A LoRA learns what it is shown, is merged exactly, and is the same to diffusers; a new word is learned alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from helpers import few, tiny_model
from safetensors.torch import load_file
from tiny_training import trained
from torch import nn

from ldm.bundle import Bundle, noise_schedule
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.samplers import SAMPLERS
from ldm.errors import SettingError
from ldm.models.model_config import ModelConfig
from ldm.models.text import ClipTextEncoder, open_clip_module
from ldm.models.unet import UNet, UNetConfig
from ldm.training.batch import Batch, Draws
from ldm.training.diffusion import DiffusionTraining, diffusion_losses
from ldm.training.inversion import Inversion, InversionTraining, save_word, worded
from ldm.training.loop import train
from ldm.training.lora import LoraTraining, adapt, adapted, merge, save_lora

STAGE = {"steps": 30, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 0, "side": 64, "precision": "no"}
SD_LIKE = UNetConfig(
    channels=16, multipliers=(1, 2), res_blocks=1, attention=(True, True), heads=2, context_width=32, groups=4
)

MODEL = ModelConfig.model_validate(
    {
        "autoencoder": {"kind": "kl"},
        "text": {"kind": "clip"},
        "unet": {},
        "sampling": {"width": 512, "height": 512},
    }
)


def random_unet(config: UNetConfig) -> UNet:
    torch.manual_seed(0)
    unet = UNet(config)
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.08)
    return unet.eval()


def filled(unet: nn.Module, config: LoraTraining) -> None:
    """Adapt, with additions that are not zero."""
    adapt(unet, config)
    for _, layer in adapted(unet):
        nn.init.normal_(layer.lora_up.weight, std=0.3)


INPUTS = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.randn(2, 5, 32)


def test_an_adapted_network_begins_as_the_one_it_adapts() -> None:
    unet = random_unet(SD_LIKE)
    with torch.inference_mode():
        before = unet(*INPUTS)
        adapt(unet, LoraTraining(rank=2, **STAGE))
        assert torch.equal(unet(*INPUTS), before)
    trained_names = {name for name, p in unet.named_parameters() if p.requires_grad}
    assert trained_names and all("lora_" in name for name in trained_names)


@pytest.mark.parametrize("layers", ["attention", "linear"])
def test_merging_changes_nothing_but_rounding_and_leaves_a_plain_network(
    layers: Literal["attention", "linear"],
) -> None:
    unet = random_unet(SD_LIKE)
    plain = {name: weight.clone() for name, weight in unet.state_dict().items()}
    filled(unet, LoraTraining(rank=2, alpha=3.0, layers=layers, **STAGE))
    with torch.inference_mode():
        adapted_output = unet(*INPUTS)
        merge(unet)
        merged_output = unet(*INPUTS)
    assert torch.allclose(merged_output, adapted_output, rtol=1e-5, atol=1e-6)
    changed = {name for name, weight in unet.state_dict().items() if not torch.equal(weight, plain[name])}
    assert unet.state_dict().keys() == plain.keys()
    # Seven transformers of one block: two attentions of four projections, and two layers of the feed-forward.
    assert len(changed) == 7 * (8 if layers == "attention" else 10)


def test_a_network_without_such_layers_is_refused() -> None:
    with pytest.raises(SettingError, match="no attention layer"):
        adapt(nn.Conv2d(1, 1, 1), LoraTraining(**STAGE))


def colour_batches(bundle: Bundle, colour: torch.Tensor) -> Iterator[Batch]:
    """Latents of pictures of one colour, with the caption "x"."""
    with torch.no_grad():
        mean = bundle.autoencoder.encode(colour[None, :, None, None].expand(4, 3, 64, 64)).mean
        text = bundle.text.encode(["x"]).tokens.expand(4, -1, -1)
        null = bundle.text.encode([""]).tokens
    while True:
        yield Batch((mean, torch.zeros_like(mean), text), (null,))


def test_a_lora_makes_its_model_draw_what_it_was_shown(tmp_path: Path) -> None:
    bundle = tiny_model()
    bundle.unet.requires_grad_(True)
    config = LoraTraining(rank=4, alpha=4.0, layers="linear", caption_dropout=0.0, **{**STAGE, "steps": 120})
    adapt(bundle.unet, config)
    objective = diffusion_losses(bundle.config, bundle.schedule, config)
    shown = colour_batches(bundle, torch.tensor([0.9, -0.9, 0.1]))
    losses = [r.losses["loss"] for r in train(bundle.unet, objective, lambda _: shown, config, tmp_path, seed=0)]
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    save_lora(tmp_path / "lora.safetensors", bundle.unet, config, bundle.name)
    tensors = load_file(tmp_path / "lora.safetensors")
    assert len(tensors) == 3 * len(list(adapted(bundle.unet)))
    drawn = bundle.unet
    with torch.inference_mode():
        noisy = torch.randn(4, 4, 8, 8)
        text = bundle.text.encode(["x"] * 4).tokens
        before = Denoiser(tiny_model().unet, bundle.schedule, bundle.config.prediction)(noisy * 5, 5.0, text)
        after = Denoiser(drawn, bundle.schedule, bundle.config.prediction)(noisy * 5, 5.0, text)
    known = next(shown).rows[0]
    assert (after - known).square().mean() < 0.5 * (before - known).square().mean()


@pytest.mark.parity
@pytest.mark.parametrize("names", few(["kohya", "peft"], "kohya"))
def test_diffusers_loads_the_file_and_draws_the_same_picture(names: Literal["kohya", "peft"], tmp_path: Path) -> None:
    open_clip_module()
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    ours = random_unet(SD_LIKE)
    theirs = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    config = LoraTraining(rank=2, alpha=3.0, layers="linear", format=names, **STAGE)
    filled(ours, config)
    path = tmp_path / "lora.safetensors"
    save_lora(path, ours, config, "tiny")
    pipeline = diffusers.StableDiffusionPipeline
    state, alphas = pipeline.lora_state_dict(path, unet_config=theirs.config)
    before = theirs(*INPUTS).sample.detach()
    pipeline.load_lora_into_unet(state, network_alphas=alphas, unet=theirs)
    schedule = noise_schedule(MODEL)
    noise, text = torch.randn(2, 4, 8, 8) * schedule.sigma_max, INPUTS[2]

    def drawn(network: nn.Module) -> torch.Tensor:
        def plain(x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            output = network(x, t, context)
            said: torch.Tensor = output if network is ours else output.sample
            return said

        denoiser = Denoiser(plain, schedule)
        sigmas = [schedule.sigma(t) for t in (999, 600, 200)] + [0.0]
        *_, last = SAMPLERS["euler"](lambda x, sigma: denoiser(x, sigma, text), noise, sigmas)
        return last.x

    with torch.inference_mode():
        assert not torch.allclose(ours(*INPUTS), before, rtol=1e-2), "the additions count"
        assert torch.allclose(ours(*INPUTS), theirs(*INPUTS).sample, rtol=1e-4, atol=1e-5)
        mine, other = drawn(ours), drawn(theirs)
    assert (mine - other).abs().max() < 1e-4 * other.abs().max()


@pytest.mark.slow
def test_a_new_word_is_all_that_textual_inversion_changes(tmp_path: Path) -> None:
    bundle = tiny_model()
    assert isinstance(bundle.text, ClipTextEncoder)
    frozen = {name: tensor.clone() for name, tensor in bundle.unet.state_dict().items()}
    begin = bundle.text.tower.token_embedding.weight[int(bundle.text.tokenize(["a"])[0, 1])].clone()
    settings = {**STAGE, "steps": 30, "caption_dropout": 0.0}
    config = InversionTraining(word="<hue>", begin="a", templates=("{}", "the {}"), **settings)
    inversion = Inversion(bundle.text, bundle.unet, config)
    shown = colour_batches(tiny_model(), torch.tensor([0.9, -0.9, 0.1]))
    batches = worded(lambda _: shown, inversion, seed=0)
    objective = diffusion_losses(bundle.config, bundle.schedule, config)
    losses = [r.losses["loss"] for r in train(inversion, objective, batches, config, tmp_path, seed=0)]
    assert len(losses) == 30
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in bundle.unet.state_dict().items())
    save_word(tmp_path / "word.safetensors", inversion, config.word)
    (vector,) = load_file(tmp_path / "word.safetensors").values()
    assert vector.shape == (1, 32) and not torch.allclose(vector[0], begin, atol=1e-3)
    saved = load_file(tmp_path / "step_00000030" / "model.safetensors")
    assert list(saved) == ["text.tower.token_embedding.vector"]


def test_a_beginning_of_several_tokens_is_refused() -> None:
    bundle = tiny_model()
    assert isinstance(bundle.text, ClipTextEncoder)
    with pytest.raises(SettingError, match="several tokens"):
        Inversion(bundle.text, bundle.unet, InversionTraining(begin="quite a lot", **STAGE))


def test_adapting_resumes_with_the_additions_alone(tmp_path: Path) -> None:
    for _ in trained("lora", tmp_path, steps=2, save_every=2):
        pass
    saved = load_file(tmp_path / "step_00000002" / "model.safetensors")
    assert saved and all("lora_" in name for name in saved)


def test_offset_noise_is_the_same_at_every_pixel() -> None:
    seen = []

    def network(x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return torch.zeros_like(x)

    mean = torch.zeros(4, 4, 8, 8)
    batch = Batch((mean, mean, torch.zeros(4, 5, 32)), (torch.zeros(1, 5, 32),))
    for offset in (0.0, 0.5):
        config = DiffusionTraining(offset_noise=offset, **STAGE)
        diffusion_losses(MODEL, noise_schedule(MODEL), config)(network, batch, Draws(0, 0, 4))  # type: ignore[arg-type]  # a function in place of a network
    difference = seen[1] - seen[0]
    assert difference.abs().max() > 0.1
    assert torch.allclose(difference, difference[:, :, :1, :1].expand_as(difference), atol=1e-6)
