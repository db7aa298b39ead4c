"""The networks have Stable Diffusion's sizes, names and behaviour where their configs say so."""

import math

import pytest
import torch
from torch import nn

from ldm.models.autoencoder import Autoencoder, AutoencoderConfig, KLAutoencoder, PixelAutoencoder, PixelConfig
from ldm.models.model_config import ModelConfig, SamplingDefaults
from ldm.models.text import ClipTextConfig, ClipTextEncoder, LabelConfig, LabelEncoder, TextEncoder
from ldm.models.unet import UNet, UNetConfig
from ldm.nn.layers import Downsample, timestep_embedding

SD2_UNET = UNetConfig(heads=None, head_width=64, context_width=1024, linear_projection=True)
SD2_TEXT = ClipTextConfig(width=1024, layers=24, heads=16, activation="gelu", hidden="penultimate", padding="zero")
TINY_AUTOENCODER = AutoencoderConfig(channels=32, multipliers=(1, 1, 2, 2), res_blocks=1, mid_attention=False)
TINY_UNET = UNetConfig(
    channels=32, multipliers=(1, 2), res_blocks=1, attention=(False, True), heads=None, head_width=32, context_width=16
)
TINY_TEXT = ClipTextConfig(
    width=16, layers=2, heads=2, context_length=16, vocabulary=1024, activation="gelu", padding="zero"
)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("config", "count"),
    [(UNetConfig(), 859_520_964), (UNetConfig(in_channels=9), 859_535_364), (SD2_UNET, 865_910_724)],
)
def test_unet_has_stable_diffusions_count(config: UNetConfig, count: int) -> None:
    with torch.device("meta"):
        assert parameters(UNet(config)) == count


def test_autoencoder_has_stable_diffusions_count() -> None:
    with torch.device("meta"):
        model = KLAutoencoder(AutoencoderConfig())
    assert parameters(model) == 83_653_863
    assert parameters(model.encoder) == 34_163_592
    assert parameters(model.decoder) == 49_490_179


@pytest.mark.parametrize(("config", "count"), [(ClipTextConfig(), 123_060_480), (SD2_TEXT, 352_984_064)])
def test_text_tower_has_clips_count(config: ClipTextConfig, count: int) -> None:
    with torch.device("meta"):
        assert parameters(ClipTextEncoder(config)) == count


def test_stable_diffusions_shapes_on_the_meta_device() -> None:
    with torch.device("meta"), torch.inference_mode():
        image = torch.empty(1, 3, 512, 512)
        latent = KLAutoencoder(AutoencoderConfig()).encode(image).mean
        assert latent.shape == (1, 4, 64, 64)
        assert UNet(UNetConfig())(latent, torch.empty(1), torch.empty(1, 77, 768)).shape == latent.shape
        assert KLAutoencoder(AutoencoderConfig()).decode(latent).shape == image.shape


def test_unet_starts_as_zero_and_reads_text_and_time_once_it_is_trained() -> None:
    torch.manual_seed(0)
    unet = UNet(TINY_UNET)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 900.0]), torch.randn(2, 5, 16)
    assert unet(x, t, text).abs().max() == 0
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.05)
    out = unet(x, t, text)
    assert not torch.allclose(out, unet(x, t + 50, text))
    assert not torch.allclose(out, unet(x, t, text + 1))
    assert torch.allclose(out[:1], unet(x[:1], t[:1], text[:1]), atol=1e-5), "an image does not depend on its batch"


def test_timestep_embedding_is_cos_then_sin_and_takes_fractions() -> None:
    embedding = timestep_embedding(torch.tensor([0.0, 2.5]), 8)
    assert torch.allclose(embedding[0], torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]))
    frequency = math.exp(-math.log(10_000) * 1 / 4)
    assert math.isclose(embedding[1, 1].item(), math.cos(2.5 * frequency), abs_tol=1e-6)
    assert math.isclose(embedding[1, 5].item(), math.sin(2.5 * frequency), abs_tol=1e-6)


def test_downsample_pads_both_sides_or_right_and_below_only() -> None:
    impulse = torch.zeros(1, 1, 4, 4)
    impulse[0, 0, 0, 0] = 1.0
    for symmetric, expected in ((True, 5.0), (False, 1.0)):
        layer = Downsample(1, symmetric=symmetric)
        layer.conv.weight.data = torch.arange(1.0, 10.0).reshape(1, 1, 3, 3)
        layer.conv.bias.data.zero_()
        out = layer(impulse)
        assert out.shape == (1, 1, 2, 2)
        assert out[0, 0, 0, 0] == expected


def test_autoencoder_normalises_inside() -> None:
    torch.manual_seed(0)
    plain = KLAutoencoder(TINY_AUTOENCODER.model_copy(update={"latent_mean": (0.0,) * 4, "latent_std": (1.0,) * 4}))
    scaled_config = TINY_AUTOENCODER.model_copy(update={"latent_mean": (1.0,) * 4, "latent_std": (2.0,) * 4})
    scaled = KLAutoencoder(scaled_config)
    scaled.load_state_dict(plain.state_dict())
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    raw, normal = plain.encode(image), scaled.encode(image)
    assert torch.allclose(normal.mean, (raw.mean - 1) / 2, atol=1e-6)
    assert torch.allclose(normal.std, raw.std / 2, atol=1e-6)
    assert torch.allclose(scaled.decode(normal.mean), plain.decode(raw.mean), atol=1e-5)


def test_posterior_kl_agrees_with_the_closed_form_of_torch() -> None:
    torch.manual_seed(0)
    posterior = KLAutoencoder(TINY_AUTOENCODER).encode(torch.rand(2, 3, 32, 32))
    known = torch.distributions.kl_divergence(
        torch.distributions.Normal(posterior.mean, posterior.std), torch.distributions.Normal(0.0, 1.0)
    ).sum(dim=(1, 2, 3))
    assert torch.allclose(posterior.kl(), known, rtol=1e-4)


def test_preview_is_the_stored_linear_map() -> None:
    preview = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.0, 0.0, 0.0), (0.1, 0.2, 0.3))
    model = KLAutoencoder(TINY_AUTOENCODER.model_copy(update={"preview": preview}))
    latent = torch.randn(1, 4, 2, 2)
    assert torch.allclose(model.preview(latent), latent[:, :3] + torch.tensor([0.1, 0.2, 0.3])[:, None, None])


def test_pixel_autoencoder_is_the_identity() -> None:
    model, image = PixelAutoencoder(PixelConfig(kind="pixels")), torch.randn(1, 1, 28, 28)
    assert isinstance(model, Autoencoder)
    assert torch.equal(model.decode(model.encode(image).sample(torch.randn(1, 1, 28, 28))), image)


def test_text_encoder_gives_states_per_token_and_one_vector() -> None:
    torch.manual_seed(0)
    encoder = ClipTextEncoder(TINY_TEXT)
    assert isinstance(encoder, TextEncoder)
    embedding = encoder.encode(["a red circle", ""])
    assert embedding.tokens.shape == (2, 16, 16)
    assert embedding.pooled.shape == (2, 16)
    alone = encoder.encode(["a red circle"])
    assert torch.allclose(alone.tokens, embedding.tokens[:1], atol=1e-5)


def test_text_states_are_causal_and_penultimate_skips_the_last_block() -> None:
    torch.manual_seed(0)
    encoder = ClipTextEncoder(TINY_TEXT)
    first, second = encoder.encode(["red circle", "red square"]).tokens
    assert torch.allclose(first[:2], second[:2], atol=1e-6), "a token does not see what follows it"
    assert not torch.allclose(first[2], second[2])
    shortened = ClipTextEncoder(TINY_TEXT.model_copy(update={"hidden": "penultimate"}))
    shortened.load_state_dict(encoder.state_dict())
    ids = encoder.tokenize(["red circle"])
    states = encoder.tower.token_embedding(ids) + encoder.tower.positional_embedding
    states = encoder.tower.transformer.resblocks[0](states, causal=True)
    assert torch.allclose(shortened(ids)[0], encoder.tower.ln_final(states), atol=1e-5)


def test_tokens_are_start_words_end_padding() -> None:
    full = ClipTextEncoder.tokenize
    with torch.device("meta"):
        sd1, sd2 = ClipTextEncoder(ClipTextConfig()), ClipTextEncoder(SD2_TEXT)
    row = full(sd1, ["a cat"])[0].tolist()
    assert row[:4] == [49406, 320, 2368, 49407]
    assert set(row[4:]) == {49407}
    assert set(full(sd2, ["a cat"])[0, 4:].tolist()) == {0}


@pytest.mark.parametrize("typed", ["a <end_of_text> b", "a <END_OF_TEXT> b", "<start_of_text>"])
def test_a_typed_special_token_is_read_as_words(typed: str) -> None:
    ids = ClipTextEncoder(TINY_TEXT).tokenize([typed])[0].tolist()
    assert ids.count(1022) == 1 and ids.count(1023) == 1


def test_words_that_do_not_fit_are_named() -> None:
    encoder = ClipTextEncoder(TINY_TEXT)
    assert encoder.words_cut("a a a") == ""
    assert encoder.words_cut("a " * 14 + "a b").replace(" ", "") == "ab"


def test_label_encoder_knows_its_labels_only() -> None:
    torch.manual_seed(0)
    encoder = LabelEncoder(LabelConfig(kind="labels", labels=("zero", "one"), width=8))
    tokens = encoder.encode(["one", "", "zero"]).tokens
    assert tokens.shape == (3, 1, 8)
    assert len({tuple(row.flatten().tolist()) for row in tokens}) == 3
    with pytest.raises(ValueError, match="did you mean 'zero'"):
        encoder.encode(["zerro"])


def test_parts_that_do_not_fit_are_refused() -> None:
    sampling = SamplingDefaults(width=64, height=64)
    with pytest.raises(ValueError, match=r"16 wide.*expects 24"):
        ModelConfig(
            autoencoder=TINY_AUTOENCODER, text=TINY_TEXT, unet=TINY_UNET.model_copy(update={"context_width": 24}),
            sampling=sampling,
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"4 latent channels.*reads 8"):
        ModelConfig(
            autoencoder=TINY_AUTOENCODER, text=TINY_TEXT,
            unet=TINY_UNET.model_copy(update={"in_channels": 8, "out_channels": 8}), sampling=sampling,
        )  # fmt: skip
    with pytest.raises(ValueError, match="multiple of 16"):
        ModelConfig(
            autoencoder=TINY_AUTOENCODER, text=TINY_TEXT, unet=TINY_UNET, sampling=SamplingDefaults(width=72, height=64)
        )
