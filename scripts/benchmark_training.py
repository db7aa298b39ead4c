"""Measure our training step beside diffusers' UNet as its own training script runs it: same weights, batch and loss."""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.cli import ArgumentParser, run
from ldm.errors import MachineError, SettingError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ldm.evaluation.speed import Comparison, Operations
    from ldm.models.model_config import ModelConfig
    from ldm.training.batch import Batch

EPILOG = """examples:
  OMP_NUM_THREADS=2 python scripts/benchmark_training.py --rounds 20
  python scripts/benchmark_training.py --sd15 --side 64 --batch 16 --compile --out training.json
Ours is the training loop itself with all that belongs to it: random numbers, caption dropout, clipping, averaged
weights, the check that all is finite. Theirs is the step of diffusers' examples/text_to_image/train_text_to_image.py
with --mixed_precision=bf16 and its other defaults: autocast over fp32 weights, NCHW, AdamW as PyTorch chooses it, no
averaged weights. Latents and text states lie ready for both. They take turns; the ratio is the median of all turns,
with an interval of 95 % that supposes nothing about how times are distributed."""
LEAST = {"channels": 32, "side": 8, "batch": 1, "rounds": 6}
WORDS, CONTEXT = 77, 768
OURS, COMPILED, MUON, THEIRS = "ldm", "ldm, compiled", "ldm, Muon", "diffusers"


class Given(NamedTuple):
    """What both train on: latents' mean and standard deviation (b c h w), text states (b l d), those of no words."""

    mean: "Tensor"
    std: "Tensor"
    text: "Tensor"
    null: "Tensor"


def parser() -> ArgumentParser:
    """The flags."""
    made = ArgumentParser(description=__doc__, epilog=EPILOG, prog="benchmark_training.py")
    made.add_argument("--channels", type=int, default=128, metavar="N", help="of the UNet's finest level (128)")
    made.add_argument("--sd15", action="store_true", help="Stable Diffusion 1.5's UNet instead of three levels 1, 2, 4")
    made.add_argument(
        "--side", type=int, default=32, metavar="N", help="of the latents; an eighth of the pictures (32)"
    )
    made.add_argument("--batch", type=int, default=8, metavar="N", help="samples of a step (8)")
    made.add_argument("--rounds", type=int, default=12, metavar="N", help="turns of each (12)")
    made.add_argument("--compile", action="store_true", help="ours also behind torch.compile")
    made.add_argument("--muon", action="store_true", help="ours also with Muon in place of AdamW")
    made.add_argument("--no-theirs", action="store_true", help="ours alone, without diffusers")
    made.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda (auto)")
    made.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    return made


def main() -> None:
    """Let them take turns, and print what a step took, how many images a second that is, and the ratio."""
    args = parser().parse_args()
    for name, least in LEAST.items():
        if getattr(args, name) < least:
            raise SettingError(f"--{name}: got {getattr(args, name)}, expected at least {least}; choose more")
    import torch

    from ldm.evaluation.speed import compare, roofline
    from ldm.training.workers import workers

    if args.device != "auto" and args.device != workers().device.type:
        raise MachineError(f"--device: training here computes on {workers().device.type}; leave the flag out")
    device = workers().device
    config = model(args)
    given = numbers(args, device)
    with tempfile.TemporaryDirectory() as folder:
        contenders = {OURS: ours(config, given, args.rounds, Path(folder) / "eager")}
        if args.compile:
            contenders[COMPILED] = ours(config, given, args.rounds, Path(folder) / "compiled", compile=True)
        if args.muon:
            contenders[MUON] = ours(config, given, args.rounds, Path(folder) / "muon", optimizer="muon")
        contenders = {name: allocating(one, 2**30) for name, one in contenders.items()}
        if not args.no_theirs:
            contenders[THEIRS] = allocating(theirs(config, given), 2**25)
        found = compare("training step", contenders, args.rounds, device, work(config, given))
    top = roofline(torch.bfloat16, device)
    found.of_roofline = {name: top.floor(found.operations) / found.timings[name].median for name in found.timings}
    show(found, args)
    if args.out:
        facts = {"settings": {name: str(value) for name, value in vars(args).items()}, "cpus": os.cpu_count()}
        args.out.write_text(json.dumps({**facts, **found.values()}, indent=2) + "\n")


def allocating(step: Callable[[], object], largest: int) -> Callable[[], object]:
    """A step for which freed blocks of up to `largest` bytes are kept: as train.py has it, or as glibc does at most."""
    from ldm.machine import keep_freed_memory

    def run_so() -> object:
        keep_freed_memory(largest, heaps=None)
        return step()

    return run_so


def show(found: "Comparison", args: argparse.Namespace) -> None:
    """A row for each, and the ratios."""
    print("| training step | seconds | from fastest to slowest | images/s | TFLOP/s | of roofline |")
    print("|---|---|---|---|---|---|")
    for name, timing in found.timings.items():
        rate, speed = args.batch / timing.median, found.operations.total / timing.median / 1e12
        share = found.of_roofline[name]
        print(f"| {name} | {timing.median:.3f} | {timing.spread:.0%} | {rate:.2f} | {speed:.2f} | {share:.0%} |")
    if THEIRS in found.timings:
        for name in found.timings:
            if name != THEIRS:
                ratio, low, high = advantage(found.timings[name].seconds, found.timings[THEIRS].seconds)
                print(f"{name}: {ratio:.2f} times as fast as diffusers (95 % interval {low:.2f} to {high:.2f})")
    if not found.quiet:
        print("other programs used the processor meanwhile: the figures are upper bounds of the times", file=sys.stderr)


def advantage(seconds: list[float], others: list[float]) -> tuple[float, float, float]:
    """The median of the ratios of all turns and its 95 % interval, from order statistics (the sign test's)."""
    from scipy.stats import binom

    ratios = sorted(other / own for own, other in zip(seconds, others, strict=True))
    count = len(ratios)
    rank = max(0, int(binom.ppf(0.025, count, 0.5)) - 1)
    return (ratios[(count - 1) // 2] + ratios[count // 2]) / 2, ratios[rank], ratios[count - 1 - rank]


def model(args: argparse.Namespace) -> "ModelConfig":
    """The config of the model whose UNet is trained."""
    from ldm.config import validate
    from ldm.models.model_config import ModelConfig

    three: dict[str, Any] = {"channels": args.channels, "multipliers": [1, 2, 4], "attention": [False, True, True]}
    side = 8 * args.side
    values = {
        "autoencoder": {"kind": "kl"},
        "text": {"kind": "clip", "tokenizer": "hf"},
        "unet": {} if args.sd15 else three,
        "sampling": {"width": side, "height": side, "schedule": "leading", "convention": "diffusers", "steps": 50},
    }
    return validate(values, ModelConfig, "benchmark")


def numbers(args: argparse.Namespace, device: "torch.device") -> Given:
    """A batch from a seed, in the number format in which caches have it."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> "Tensor":
        return torch.randn(shape, generator=generator).half().to(device)

    latent = (args.batch, 4, args.side, args.side)
    return Given(drawn(*latent), drawn(*latent).abs(), drawn(args.batch, WORDS, CONTEXT), drawn(1, WORDS, CONTEXT))


def network(config: "ModelConfig") -> "nn.Module":
    """Our UNet, none of whose weights are zero, as a fresh one's are."""
    import torch

    from ldm.models.unet import UNet

    torch.manual_seed(0)
    made = UNet(config.unet)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return made


def ours(config: "ModelConfig", given: Given, rounds: int, folder: Path, **chosen: object) -> Callable[[], object]:
    """One step of our training loop, which goes on at each call; `chosen` are settings of the stage."""
    from ldm.bundle import noise_schedule
    from ldm.nn.layers import channels_last
    from ldm.training.batch import Batch
    from ldm.training.diffusion import DiffusionTraining, diffusion_losses
    from ldm.training.loop import train

    count = len(given.mean)
    settings = {
        "side": config.sampling.width, "steps": rounds + 9, "batch_size": count, "learning_rate": 1e-5,
        "warmup_steps": 0, "decay": 0.0, "betas": (0.9, 0.999), "precision": "bf16",
        "save_every": rounds + 9, "keep": 1, **chosen,
    }  # fmt: skip
    stage = DiffusionTraining.model_validate(settings)
    batch = Batch((given.mean, given.std, given.text), (given.null,), tuple(map(str, range(count))))

    def batches(start: int) -> "Iterator[Batch]":
        while True:
            yield batch

    objective = diffusion_losses(config, noise_schedule(config), stage)
    running = train(channels_last(network(config)), objective, batches, stage, folder, seed=0)
    return lambda: next(running)  # never to its end, where it would save


def theirs(config: "ModelConfig", given: Given) -> Callable[[], object]:
    """One step of diffusers' training script."""
    import torch
    import torch.nn.functional as F

    from ldm.models.text import import_torchvision

    import_torchvision()  # which diffusers does too, and cannot by itself beside a CPU-only PyTorch
    from diffusers import DDPMScheduler, UNet2DConditionModel

    shape = config.unet
    kinds = ["CrossAttn" if attention else "" for attention in shape.attention]
    unet: Any = UNet2DConditionModel(
        block_out_channels=tuple(shape.widths), cross_attention_dim=CONTEXT, attention_head_dim=shape.heads,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
    )  # fmt: skip
    unet.load_state_dict(network(config).state_dict())
    unet.to(given.mean.device).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    slower = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    noising: Any = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    states = given.text.bfloat16()

    def step() -> float:
        latents = (given.mean + given.std * torch.randn_like(given.mean)).bfloat16()
        noise = torch.randn_like(latents)
        t = torch.randint(0, 1000, (len(latents),), device=latents.device)
        with torch.autocast(latents.device.type, torch.bfloat16):
            said = unet(noising.add_noise(latents, noise, t), t, states, return_dict=False)[0]
        loss = F.mse_loss(said.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        slower.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def work(config: "ModelConfig", given: Given) -> "Operations":
    """The operations of a step: the gradients of inputs and of weights cost as much as the way forward, each."""
    import torch

    from ldm.evaluation.speed import Operations, operations
    from ldm.models.unet import UNet

    with torch.device("meta"):
        unet = UNet(config.unet)
    t = torch.zeros(len(given.mean))
    forward = operations(lambda: unet(*(tensor.float().to("meta") for tensor in (given.mean, t, given.text))))
    return Operations(3.0 * forward.convolution, 3.0 * forward.product)


if __name__ == "__main__":
    run(main)
