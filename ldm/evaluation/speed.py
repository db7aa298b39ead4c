"""How fast something is: contenders take turns on the same work, beside what the machine can do at all."""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

Work = Callable[[], object]

# Where other programs had more of the cores than this share, seconds say little.
QUIET = 0.05
STAT = Path("/proc/stat")
# With CUDA graphs the first call runs as it is and the second is recorded; and one may take less than waiting for it.
WARM_UP_ON_GPU = 3
LEAST_SECONDS_ON_GPU = 0.1


@dataclass(frozen=True)
class Operations:
    """Multiplications and additions of some work, those of convolutions and those of all matrix products."""

    convolution: float = 0.0
    product: float = 0.0

    @property
    def total(self) -> float:
        """Both."""
        return self.convolution + self.product


@dataclass(frozen=True)
class Roofline:
    """Operations a second that the machine reaches in one number format, measured on shapes that suit it."""

    convolution: float
    product: float

    def floor(self, work: Operations) -> float:
        """Seconds that the work takes at least."""
        return work.convolution / self.convolution + work.product / self.product


@dataclass
class Timing:
    """What one contender needed, turn by turn: seconds by the clock, and the share of the cores that others had."""

    seconds: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds of the turn in the middle."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """From the fastest to the slowest turn, as a share of the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


@dataclass(frozen=True)
class Difference:
    """How far pictures are from the first contender's: norm of latents' difference, relative; PSNR in dB; SSIM."""

    latent: float
    psnr: float
    ssim: float


@dataclass
class Comparison:
    """The same work by several contenders, of whom the first is ours."""

    what: str
    timings: dict[str, Timing]
    operations: Operations
    # Share of the roofline of the number format in which each contender computes.
    of_roofline: dict[str, float] = field(default_factory=dict)
    # Of contenders that draw other pictures than the first.
    differs: dict[str, Difference] = field(default_factory=dict)

    def ratio(self, other: str) -> tuple[float, float, float]:
        """How many times as long the other takes as we do: the median of all turns, the least and the most."""
        ours = next(iter(self.timings.values()))
        ratios = [b / a for a, b in zip(ours.seconds, self.timings[other].seconds, strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)

    @property
    def quiet(self) -> bool:
        """Whether the machine was ours nearly all the time."""
        return all(statistics.median(timing.others) <= QUIET for timing in self.timings.values())

    def values(self) -> dict[str, object]:
        """The figures as JSON values."""
        others = list(self.timings)[1:]
        return {
            "operations": asdict(self.operations),
            "quiet": self.quiet,
            "contenders": {
                name: {**asdict(timing), "median": timing.median, "of_roofline": self.of_roofline.get(name)}
                for name, timing in self.timings.items()
            },
            "differs": {name: asdict(difference) for name, difference in self.differs.items()},
            "times_as_fast": {name: list(self.ratio(name)) for name in others},
        }


def compare(
    what: str,
    contenders: Mapping[str, Work],
    repeat: int,
    device: torch.device,
    operations: Operations | None = None,
    warm_up: bool = True,
    settle: bool = False,
) -> Comparison:
    """Let contenders do the same work in turns, after one turn that does not count; every second round goes backwards.

    What drifts, a processor's clock or other work on the machine, then meets all of them alike. With `settle` each
    works once more before it is timed, and so finds the memory as it leaves it itself, not as the one before it did.
    """
    calls = dict.fromkeys(contenders, 1)
    for name, work in contenders.items() if warm_up else ():
        for _ in range(WARM_UP_ON_GPU if device.type == "cuda" else 1):
            once(work, device)
        if device.type == "cuda":
            calls[name] = max(1, round(LEAST_SECONDS_ON_GPU / once(work, device)[0]))
    timings = {name: Timing() for name in contenders}
    for turn in range(repeat):
        for name in list(contenders)[:: -1 if turn % 2 else 1]:
            if settle:
                once(contenders[name], device)
            seconds, others = once(contenders[name], device, calls[name])
            timings[name].seconds.append(seconds)
            timings[name].others.append(others)
    return Comparison(what, timings, operations or Operations())


def once(work: Work, device: torch.device, calls: int = 1) -> tuple[float, float]:
    """Seconds by the clock of each of some calls, and the share of all cores that other programs had meanwhile."""
    synchronise(device)
    began, before = time.perf_counter(), foreign()
    for _ in range(calls):
        work()
    synchronise(device)
    seconds = time.perf_counter() - began
    return seconds / calls, max(0.0, (foreign() - before) / (seconds * (os.cpu_count() or 1)))


def foreign() -> float:
    """Seconds of processor time that programs other than this one and its children have used, where Linux tells."""
    if not STAT.exists():
        return 0.0
    user, nice, system, _, _, *interrupts = (int(word) for word in STAT.read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def roofline(dtype: torch.dtype, device: torch.device, seconds: float = 1.0) -> Roofline:
    """What the machine reaches: the best of a square product, and of a 3×3 convolution as Stable Diffusion has it."""
    side, batch = (8192, 16) if device.type == "cuda" else (2048, 2)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    x = torch.randn(batch, 320, 64, 64, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(320, 320, 3, 3, device=device).to(dtype).contiguous(memory_format=torch.channels_last)

    def rate(work: Callable[[], Tensor], operations: float) -> float:
        calls = 20 if device.type == "cuda" else 1
        found, end = [once(work, device, calls)[0]], time.perf_counter() + seconds
        while time.perf_counter() < end or len(found) < 4:
            found.append(once(work, device, calls)[0])
        return operations / min(found[1:])

    with torch.inference_mode():
        return Roofline(
            convolution=rate(lambda: F.conv2d(x, weight, padding=1), 2.0 * x.numel() * 320 * 9),
            product=rate(lambda: a @ b, 2.0 * side**3),
        )


def operations(work: Work) -> Operations:
    """The operations of work on the meta device, which computes nothing."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        work()
    counts = counter.get_flop_counts().get("Global", {})
    convolution = sum(count for kind, count in counts.items() if "conv" in str(kind))
    return Operations(float(convolution), float(sum(counts.values()) - convolution))
