"""One training step without the update: the denoising loss of a batch, and its gradients.

B batch, C h w latent, D CLIP embedding width.
"""
import contextlib
import copy
import functools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dataset import Batch, T
from .models import Run
from .schedule import add_noise, ldm_alpha_bar


@functools.cache
def alpha_bar_on(device: torch.device) -> Tensor:
    """The schedule (T,) in float32 (MPS has no float64), sent to a device once and not with every
    batch."""
    return ldm_alpha_bar().float().to(device)


def denoising_loss(run: Run, z0: Tensor, cond: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Mean of |eps - eps_hat(z_t, t, cond)|^2 over a batch, DDPM eq. (14), without weights. All lie
    on the run's device."""
    z_t = add_noise(z0, t, eps, alpha_bar_on(z0.device))
    return F.mse_loss(run.bind(cond)(z_t, t), eps)


class Loss(nn.Module):
    """denoising_loss as a module that owns what is trained, since that is what
    DistributedDataParallel takes."""

    def __init__(self, run: Run):
        super().__init__()
        self.run = run
        self.model = run.model

    def forward(self, z0: Tensor, cond: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return denoising_loss(self.run, z0, cond, t, eps)


def gradients(loss_of: nn.Module, batch: Batch, accumulate: int = 1, rank: int = 0,
              world: int = 1) -> Tensor:
    """Accumulate the gradients of a batch's mean loss, computed in parts -> the mean over this
    process's parts, ().

    Of accumulate * world parts each process computes every world-th one. With its last part
    DistributedDataParallel averages the gradients over the processes; before, it would be work for
    nothing."""
    parts = accumulate * world
    total = torch.zeros((), device=batch.z0.device)
    for part in range(rank, parts, world):
        is_last = part + world >= parts
        waiting = contextlib.nullcontext() if is_last else no_sync(loss_of)
        with waiting:
            loss = loss_of(*(x[part::parts] for x in batch[:4])) / accumulate
            loss.backward()
        total = total + loss.detach()
    return total


def no_sync(loss_of: nn.Module) -> contextlib.AbstractContextManager:
    """Where gradients are summed up before the processes average them; one process alone has
    nothing to wait for."""
    return loss_of.no_sync() if hasattr(loss_of, "no_sync") else contextlib.nullcontext()


@torch.no_grad()
def curve_loss(run: Run, batch: Batch, rank: int = 0, world: int = 1) -> Tensor:
    """This process's share of the mean loss of a batch, (): the sum over all `world` processes is
    the mean."""
    share = [x[rank::world] for x in batch[:4]]
    if not len(share[0]):
        return torch.zeros((), device=batch.z0.device)
    return denoising_loss(run, *share) * (len(share[0]) / len(batch.z0))


def rehearse(run: Run, loss_of: Callable[..., Tensor], parameters: list[nn.Parameter], batch: int,
             accumulate: int) -> float:
    """Seconds of a training step, on noise; what it needs of memory stands in peak_megabytes
    afterwards."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-9)
    average = copy.deepcopy(run.model).requires_grad_(False)
    z0 = torch.randn(batch, *run.base.latent_shape)
    cond = torch.randn(batch, run.base.clip.dim)
    t = torch.randint(T, (batch,))
    noise = Batch(z0, cond, t, z0, t).to(run.base.device)
    for _ in range(3):  # the first ones are slower
        begin = time.perf_counter()
        optimizer.zero_grad()
        loss = gradients(loss_of, noise, accumulate)
        optimizer.step()
        torch._foreach_lerp_(list(average.parameters()), list(run.model.parameters()), 0.01)
        loss.item()  # a GPU is waited for
    return time.perf_counter() - begin
