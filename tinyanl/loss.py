"""One training step without the update: the batch, the loss and its gradients.

A batch is drawn on the CPU from (seed, step) alone, so a resumed run needs no saved random states, and every process of
torchrun draws the same one and takes its part. N pictures, B batch, C h w latent, D CLIP embedding width.
"""
import contextlib
import copy
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .masking import mask_condition
from .models import Run, generator
from .schedule import add_noise, ldm_alpha_bar

ALPHA_BAR = ldm_alpha_bar()
COND_DROP = 0.1  # share of the samples trained without condition, for rate 1 and for guidance


def held_out_batch(latents: Tensor, cond: Tensor, ids: Tensor, size: int = 64) -> tuple[Tensor, ...]:
    """The same pictures, evenly spread timesteps and noise every time: the curve shows the model, not the draw.
    latents (N 2 C h w), cond (N 2 D), ids of the pictures to use."""
    i = ids[torch.arange(size) % len(ids)]
    eps = torch.randn(size, *latents.shape[2:], generator=torch.Generator().manual_seed(0))
    t = (torch.arange(size) * 29 % size * 1000 + 500) // size  # 29: neighbours in i are far apart in t
    return latents[i, 0], cond[i, 0], t, eps


def training_batch(latents: Tensor, cond: Tensor, ids: Tensor, batch: int, train_mask: float, seed: int,
                   step: int) -> tuple[Tensor, ...]:
    """z0 (B C h w), cond (B D), t (B,) and eps (B C h w) of one step, drawn on the CPU from (seed, step) alone.
    latents (N 2 C h w) and cond (N 2 D) of pictures and their mirror images, ids of the pictures to use."""
    g = generator(seed, step)
    i = torch.randint(2 * len(ids), (batch,), generator=g)
    picture, mirrored = ids[i // 2], i % 2
    t = torch.randint(1000, (batch,), generator=g)
    eps = torch.randn(batch, *latents.shape[2:], generator=g)
    fate, rate = torch.rand(2, batch, 1, generator=g)  # of each sample's condition: dropped, partly masked, or whole
    rate = torch.where(fate < COND_DROP, 1.0, torch.where(fate < COND_DROP + train_mask, rate, 0.0))
    return latents[picture, mirrored], mask_condition(cond[picture, mirrored], rate, g), t, eps


def denoising_loss(run: Run, z0: Tensor, cond: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Mean of |eps - eps_hat|^2 over a batch, DDPM eq. (14), without weights."""
    z0, cond, t, eps = (x.to(run.base.device) for x in (z0, cond, t, eps))
    return F.mse_loss(run.bind(cond)(add_noise(z0, t, eps, ALPHA_BAR), t), eps)


class Loss(nn.Module):
    """denoising_loss as a module that owns what is trained, since that is what DistributedDataParallel takes."""

    def __init__(self, run: Run):
        super().__init__()
        self.run, self.model = run, run.model

    def forward(self, *batch: Tensor) -> Tensor:
        return denoising_loss(self.run, *batch)


def gradients(loss_of: nn.Module, drawn: tuple[Tensor, ...], accumulate: int = 1, rank: int = 0,
              world: int = 1) -> Tensor:
    """Accumulate the gradients of a batch's mean loss, computed in parts -> the mean over this process's parts."""
    total, parts = 0.0, accumulate * world
    for part in range(rank, parts, world):
        last = world == 1 or part + world >= parts  # with it, DistributedDataParallel averages the gradients
        with contextlib.nullcontext() if last else loss_of.no_sync():
            loss = loss_of(*(x[part::parts] for x in drawn)) / accumulate
            loss.backward()
        total = total + loss.detach()
    return total


def rehearse(run: Run, changing: list[nn.Parameter], batch: int, accumulate: int) -> float:
    """Seconds of a training step, on noise; what it needs of memory stands in peak_megabytes afterwards."""
    optimizer, average = torch.optim.AdamW(changing, lr=1e-9), copy.deepcopy(run.model).requires_grad_(False)
    eps, cond = torch.randn(batch, *run.base.latent_shape), torch.randn(batch, run.base.clip.dim)
    for _ in range(3):  # the first ones are slower
        begin = time.perf_counter()
        optimizer.zero_grad()
        loss = gradients(Loss(run), (eps, cond, torch.arange(batch) * 29 % 1000, eps), accumulate)
        optimizer.step()
        for mean, p in zip(average.parameters(), run.model.parameters()):
            mean.lerp_(p.data, 0.01)
        loss.item()  # a GPU is waited for
    return time.perf_counter() - begin
