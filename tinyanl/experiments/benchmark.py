"""How fast training and sampling are, beside diffusers' U-Net of the same shape.

    python -m tinyanl.experiments.benchmark --vs-diffusers         the embedded shape, on CPU or GPU
    python -m tinyanl.experiments.benchmark --shape cin256-v2 --compile --vs-diffusers

Weights are random. A training step is train.py's on cached latents, less the average; a sample is
50 evaluations by our DDIM, without the first stage. All run in one process, in turns, and times are
medians over the rounds. Where the device computes in bf16, training is in bf16 autocast, and
weights are rounded to bf16 for sampling. Memory is the most that one needed, with its weights; it
is counted on CUDA only.
B batch, C h w latent, D width of the condition.
"""
import statistics
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import Base, Run, has_bf16, pick_device
from ..runs import command, mistakes_in_one_line
from ..schedule import Denoiser, add_noise, ddim, ldm_alpha_bar
from ..table import table
from ..tune import DEAD, trained, tunable
from ..unet import UNet

EVALUATIONS = 50  # of the network for one sample
# our row -> those of diffusers that do the same; ANL, which it has not, is compared with attention
PEERS = {
    "train anl": ["diffusers train attention"],
    "train attention": ["diffusers train attention"],
    "train all": ["diffusers train all"],
    "sample anl": ["diffusers sample", "diffusers sample, channels last"],
    "sample": ["diffusers sample", "diffusers sample, channels last"],
}


class Shape(NamedTuple):
    """Sizes of a U-Net, and of what it works on."""

    side: int  # of the latent
    channels: int
    mult: tuple[int, ...]
    blocks: int
    attention: tuple[bool, ...]
    width: int  # of the context, and of the condition


SHAPES = {
    "embedded": Shape(16, 64, (1, 2, 3), 1, (False, True, True), 128),
    "cin256-v2": Shape(64, 192, (1, 2, 3, 5), 2, (False, True, True, True), 512),
}


class Contestant(NamedTuple):
    """What is timed."""

    bind: Callable[[Tensor], Denoiser]  # cond (B D) -> model(z, t)
    parameters: list[nn.Parameter]  # those that train


def our_run(shape: Shape, tune: str, device: torch.device) -> Run:
    """A run with random weights, as training starts from it."""
    unet = UNet(3, 3, shape.channels, shape.mult, shape.blocks, shape.attention, shape.width)
    base = Base(
        unet=unet.to(device).requires_grad_(False),
        autoencoder=None,
        clip=SimpleNamespace(dim=shape.width),
        tokenizer=None,
        null=torch.zeros(1, 1, shape.width, device=device),
        size=0,
        device=device,
        name="random weights",
        bf16=has_bf16(device),
    )
    model = tunable(base, tune).to(device)
    centre = torch.zeros(shape.width)
    return Run(base, model, mu=centre, mu_text=centre, sigma=1.0, config={}, pictures=[])


def our_trainer(shape: Shape, tune: str, device: torch.device) -> Contestant:
    run = our_run(shape, tune, device)
    parameters = [p for name, p in trained(run.model).items() if not DEAD.search(name)]
    return Contestant(run.bind, parameters)


def our_sampler(shape: Shape, tune: str, device: torch.device) -> Contestant:
    return Contestant(our_run(shape, tune, device).frozen().bind, [])


def diffusers_unet(shape: Shape) -> nn.Module:
    """diffusers' U-Net of the same sizes."""
    from diffusers import UNet2DConditionModel

    down = ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in shape.attention]
    return UNet2DConditionModel(
        sample_size=shape.side,
        in_channels=3,
        out_channels=3,
        down_block_types=down,
        up_block_types=[kind.replace("Down", "Up") for kind in reversed(down)],
        block_out_channels=[shape.channels * m for m in shape.mult],
        layers_per_block=shape.blocks,
        cross_attention_dim=shape.width,
        attention_head_dim=1,
        norm_num_groups=min(32, shape.channels // 4),
    )


def bind_diffusers(unet: nn.Module, dtype: torch.dtype, autocast: bool) -> Callable:
    """cond (B D) -> model(z, t), with inputs in `dtype`, that of the weights."""

    def bind(cond: Tensor) -> Denoiser:
        context = cond[:, None].to(dtype)  # B 1 D

        def model(z: Tensor, t: Tensor) -> Tensor:
            with torch.autocast(z.device.type, torch.bfloat16, enabled=autocast):
                return unet(z.to(dtype), t, context).sample.float()

        return model

    return bind


def diffusers_trainer(shape: Shape, tune: str, device: torch.device) -> Contestant:
    """Its U-Net, of which all or the attention blocks train."""
    unet = diffusers_unet(shape).to(device)
    for name, p in unet.named_parameters():
        p.requires_grad_(tune == "all" or ".attentions." in name)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    return Contestant(bind_diffusers(unet, torch.float32, has_bf16(device)), parameters)


def diffusers_sampler(shape: Shape, channels_last: bool, device: torch.device) -> Contestant:
    """Its U-Net with weights in bf16 where the device computes in it: as it comes, under autocast;
    or as it is fastest, with channels last in memory and without autocast."""
    unet = diffusers_unet(shape).to(device).requires_grad_(False)
    if has_bf16(device):
        unet = unet.bfloat16()
    if channels_last:
        unet = unet.to(memory_format=torch.channels_last)
    autocast = has_bf16(device) and not channels_last
    return Contestant(bind_diffusers(unet, unet.dtype, autocast), [])


def contestants(
    shape: Shape, device: torch.device, vs_diffusers: bool
) -> dict[str, Callable[[], Contestant]]:
    """Name of each row -> what makes its contestant."""
    ours = {
        "train anl": partial(our_trainer, shape, "anl", device),
        "train attention": partial(our_trainer, shape, "attention", device),
        "train all": partial(our_trainer, shape, "all", device),
        "sample anl": partial(our_sampler, shape, "anl", device),
        "sample": partial(our_sampler, shape, "attention", device),
    }
    if not vs_diffusers:
        return ours
    return {
        "diffusers train attention": partial(diffusers_trainer, shape, "attention", device),
        "diffusers train all": partial(diffusers_trainer, shape, "all", device),
        "diffusers sample": partial(diffusers_sampler, shape, False, device),
        "diffusers sample, channels last": partial(diffusers_sampler, shape, True, device),
        **ours,
    }


def training(
    contestant: Contestant, z0: Tensor, cond: Tensor, compile: bool = False
) -> Callable[[], None]:
    """What is timed as a training step: loss, gradients, their norm, AdamW. z0 (B C h w)."""
    alpha_bar = ldm_alpha_bar()
    eps = torch.randn_like(z0)
    t = torch.arange(len(z0), device=z0.device) * 29 % len(alpha_bar)
    optimizer = torch.optim.AdamW(contestant.parameters, lr=1e-4)

    def loss_of() -> Tensor:
        guess = contestant.bind(cond)(add_noise(z0, t, eps, alpha_bar), t)
        return F.mse_loss(guess, eps)

    if compile:
        loss_of = torch.compile(loss_of)

    def step() -> None:
        optimizer.zero_grad()
        loss_of().backward()
        nn.utils.clip_grad_norm_(contestant.parameters, 1.0)
        optimizer.step()

    return step


def sampling(
    contestant: Contestant, z: Tensor, cond: Tensor, steps: int, compile: bool = False
) -> Callable[[], None]:
    """What is timed as sampling: the first `steps` of 50 of DDIM, the condition bound once."""
    with torch.no_grad():
        model = contestant.bind(cond)
    if compile:
        model = torch.compile(model)

    def some_steps() -> None:
        for done, _ in enumerate(ddim(model, z, ldm_alpha_bar(), EVALUATIONS), start=1):
            if done == steps:
                break

    return some_steps


def seconds(step: Callable[[], None], device: torch.device) -> float:
    """How long it takes, all that it starts on the device included."""
    synchronize = getattr(torch, device.type).synchronize
    synchronize()
    begin = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - begin


def start_counting_memory(device: torch.device) -> int:
    """The bytes in use on a GPU, whose peak is counted from here; 0 on other devices."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def median_seconds(
    steps: dict[str, Callable[[], None]], rounds: int, device: torch.device
) -> dict[str, float]:
    """The median over rounds in which every step is taken once."""
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, device))
    return {name: statistics.median(values) for name, values in times.items()}


def add_ratios(rows: dict[str, dict]) -> None:
    """Give our rows the ratio of their images a second to those of diffusers' best peer."""
    for name, peers in PEERS.items():
        speeds = [rows[peer]["images/s"] for peer in peers if peer in rows]
        if speeds:
            rows[name]["ratio"] = rows[name]["images/s"] / max(speeds)


def benchmark(
    shape: str = "embedded",
    batch: int = 32,
    rounds: int = 5,
    device: str | None = None,
    compile: bool = False,
    vs_diffusers: bool = False,
) -> list[dict]:
    """A row for each contestant: seconds of the first call, peak memory (CUDA), images a second,
    and the ratio to diffusers doing the same. ModuleNotFoundError: diffusers is not there."""
    device = pick_device(device)
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(device)  # which synchronize and the counters of memory look at
    sizes = SHAPES[shape]
    evaluations = EVALUATIONS if is_cuda else 2  # a CPU's are all alike: a few will do
    z = torch.randn(batch, 3, sizes.side, sizes.side, device=device)
    cond = torch.randn(batch, sizes.width, device=device)
    steps = {}
    rows = {}
    for name, make in contestants(sizes, device, vs_diffusers).items():
        before = start_counting_memory(device)
        contestant = make()
        if contestant.parameters:
            steps[name] = training(contestant, z, cond, compile)
        else:
            steps[name] = sampling(contestant, z, cond, evaluations, compile)
        rows[name] = {"what": name, "first call, s": seconds(steps[name], device)}
        if is_cuda:
            rows[name]["peak GiB"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    for name, median in median_seconds(steps, rounds, device).items():
        share_of_a_sample = 1 if "train" in name else evaluations / EVALUATIONS
        rows[name]["images/s"] = batch / median * share_of_a_sample
    add_ratios(rows)
    words = [shape, f"batch {batch}", str(device)]
    if has_bf16(device):
        words.append("bf16")
    if compile:
        words.append("compiled")
    print(", ".join(words))
    return list(rows.values())


def main(argv: list[str] | None = None) -> None:
    p = command("experiments.benchmark", __doc__)
    p.add_argument(
        "--shape", choices=SHAPES, default="embedded", help="of the U-Net (default %(default)s)"
    )
    p.add_argument("--batch", type=int, default=32, help="(default %(default)s)")
    p.add_argument(
        "--rounds", type=int, default=5, help="of which the median counts (default %(default)s)"
    )
    p.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    p.add_argument("--compile", action="store_true", help="torch.compile all contestants")
    p.add_argument(
        "--vs-diffusers", action="store_true", help="beside diffusers (pip install diffusers)"
    )
    args = p.parse_args(argv)
    with mistakes_in_one_line(p):
        if args.batch < 1:
            raise ValueError(f"--batch {args.batch} must be at least 1")
        if args.rounds < 1:
            raise ValueError(f"--rounds {args.rounds} must be at least 1")
        print(table(benchmark(**vars(args))))


if __name__ == "__main__":
    main()
