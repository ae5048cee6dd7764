"""How fast training and sampling are, beside diffusers' U-Net of the same shape in the same process, alternating.

    python -m tinyanl.experiments.benchmark --vs-diffusers                          the embedded shape, on CPU or GPU
    python -m tinyanl.experiments.benchmark --shape cin256-v2 --compile --vs-diffusers

Weights are random. A training step is train.py's on cached latents, less the average; a sample is 50 evaluations by our
DDIM, without the first stage. Times are medians over rounds in which everyone runs once, where the device has bf16 in
its autocast, sampling with bf16 weights. Memory: what one needed at most, with its weights. B batch, D condition.
"""
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..evaluate import table
from ..models import Base, Run, has_bf16, pick_device
from ..runs import command, mistakes_in_one_line
from ..schedule import Denoiser, add_noise, ddim, ldm_alpha_bar
from ..tune import DEAD, trained, tunable
from ..unet import UNet

# side of the latent; channels, mult, blocks, attention, width of context and condition
SHAPES = {"embedded": (16, (64, (1, 2, 3), 1, (False, True, True), 128)),
          "cin256-v2": (64, (192, (1, 2, 3, 5), 2, (False, True, True, True), 512))}
EVALUATIONS = 50  # of the network for one sample
Contestant = tuple[Callable[[Tensor], Denoiser], list[nn.Parameter]]  # cond (B D) -> model(z, t); what trains


def ours(shape: str, what: str, device: torch.device) -> Contestant:
    """A run with random weights, as train makes it, or to sample from, as load_run does."""
    side, sizes = SHAPES[shape]
    unet, width = UNet(3, 3, *sizes).to(device).requires_grad_(False), sizes[-1]
    clip, null = SimpleNamespace(dim=width), torch.zeros(1, 1, width, device=device)
    base = Base(unet, None, clip, None, null, 0, device, shape, has_bf16(device))
    model = tunable(base, {"sample": "attention", "sample anl": "anl"}.get(what, what)).to(device)
    changing = [p for name, p in trained(model).items() if not DEAD.search(name)]
    run = Run(base, model, torch.zeros(width), torch.zeros(width), 1.0, {}, [])
    return (run.frozen() if "sample" in what else run).bind, changing


def theirs(shape: str, what: str, device: torch.device) -> Contestant:
    """diffusers' U-Net of the same sizes, all of it or its attention blocks to be trained, or none to sample."""
    from diffusers import UNet2DConditionModel
    side, (channels, mult, blocks, attention, width) = SHAPES[shape]
    kinds = ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention]
    unet = UNet2DConditionModel(
        side, 3, 3, down_block_types=kinds, up_block_types=[kind.replace("Down", "Up") for kind in reversed(kinds)],
        block_out_channels=[channels * m for m in mult], layers_per_block=blocks, cross_attention_dim=width,
        attention_head_dim=1, norm_num_groups=min(32, channels // 4)).to(device)
    for name, p in unet.named_parameters():
        p.requires_grad_(what == "all" or what == "attention" and ".attentions." in name)
    changing = [p for p in unet.parameters() if p.requires_grad]
    own = torch.bfloat16 if has_bf16(device) and not changing else torch.float32
    network = torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device))(unet.to(own))
    return lambda cond: lambda z, t: network(z.to(own), t, cond[:, None].to(own)).sample.float(), changing


def training(contestant: Contestant, z0: Tensor, cond: Tensor, compile: bool) -> Callable[[], None]:
    """What is timed as a training step: loss, gradients, their norm, AdamW."""
    (bind, changing), alpha_bar, eps = contestant, ldm_alpha_bar(), torch.randn_like(z0)
    t, optimizer = torch.arange(len(z0), device=z0.device) * 29 % 1000, torch.optim.AdamW(changing, lr=1e-4)
    loss_of = lambda: F.mse_loss(bind(cond)(add_noise(z0, t, eps, alpha_bar), t), eps)
    loss_of = torch.compile(loss_of) if compile else loss_of

    def step() -> None:
        optimizer.zero_grad()
        loss_of().backward()
        nn.utils.clip_grad_norm_(changing, 1.0)
        optimizer.step()

    return step


def sampling(contestant: Contestant, z: Tensor, cond: Tensor, steps: int, compile: bool) -> Callable[[], None]:
    """What is timed as sampling: the first `steps` of 50 DDIM steps, the condition bound once."""
    model = torch.no_grad()(contestant[0])(cond)
    model = torch.compile(model) if compile else model
    return torch.no_grad()(lambda: list(zip(range(steps), ddim(model, z, ldm_alpha_bar(), EVALUATIONS))))


def seconds(step: Callable[[], object], device: torch.device) -> float:
    wait = getattr(torch, device.type).synchronize
    wait()
    begin = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - begin


def benchmark(shape: str = "embedded", batch: int = 32, rounds: int = 5, device: str | None = None,
              compile: bool = False, vs_diffusers: bool = False) -> list[dict]:
    """A row for each contestant: images a second, peak memory (CUDA), share of what a large matrix product reaches,
    ratio to diffusers doing the same; for ANL, which it has not, to it training its attention blocks."""
    device, (side, sizes) = pick_device(device), SHAPES[shape]
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)  # which synchronize and the counters of memory look at
    evaluations, n = (EVALUATIONS, 8192) if cuda else (2, 2048)
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if has_bf16(device) else torch.float32)
    most = 2 * n**3 / min(seconds(lambda: a @ a, device) for _ in range(20))
    z, cond = torch.randn(batch, 3, side, side, device=device), torch.randn(batch, sizes[-1], device=device)
    who = dict.fromkeys(("train anl", "train attention", "train all", "sample anl", "sample"), ours)
    peers = {f"diffusers {name}": theirs for name in who if vs_diffusers and "anl" not in name}
    steps, rows, times = {}, {}, {}
    for name, make in (peers | who).items():
        before = cuda and (torch.cuda.reset_peak_memory_stats() or torch.cuda.memory_allocated())
        contestant = make(shape, name.removeprefix("diffusers ").removeprefix("train "), device)
        steps[name] = (training(contestant, z, cond, compile) if "train" in name else
                       sampling(contestant, z, cond, evaluations, compile))
        rows[name] = {"what": name, "first call, s": seconds(steps[name], device), "peak GiB":
                      (torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else None}
    for name, step in [*steps.items()] * rounds:
        times.setdefault(name, []).append(seconds(step, device))
    for name, row in rows.items():
        with FlopCounterMode(display=False) as flops:
            steps[name]()
        median = statistics.median(times[name])
        row["images/s"] = batch / median * (evaluations / EVALUATIONS if "sample" in name else 1)
        row["of the limit"] = flops.get_total_flops() / median / most
        peer = rows.get("diffusers " + {"train anl": "train attention", "sample anl": "sample"}.get(name, name))
        row["ratio"] = row["images/s"] / peer["images/s"] if peer else None
    print(f"{shape}, batch {batch}, {device}{', bf16' * has_bf16(device)}{', compiled' * compile}; a matrix product "
          f"reaches {most / 1e9:,.0f} GFLOP/s")
    return list(rows.values())


def main(argv: list[str] | None = None) -> None:
    p = command("experiments.benchmark", __doc__)
    p.add_argument("--shape", choices=SHAPES, default="embedded", help="of the U-Net (default %(default)s)")
    p.add_argument("--batch", type=int, default=32, help="(default %(default)s)")
    p.add_argument("--rounds", type=int, default=5, help="of which the median counts (default %(default)s)")
    p.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    p.add_argument("--compile", action="store_true", help="torch.compile all contestants")
    p.add_argument("--vs-diffusers", action="store_true", help="beside diffusers (pip install diffusers)")
    args = p.parse_args(argv)
    with mistakes_in_one_line(p):
        if min(args.batch, args.rounds) < 1:
            raise ValueError(f"--batch {args.batch} and --rounds {args.rounds} must be at least 1")
        print(table(benchmark(**vars(args))))


if __name__ == "__main__":
    main()
