"""One training step without the update: the denoising loss of a batch, and its gradients.

B batch, C h w latent, D CLIP embedding width.
"""
import contextlib
import functools

import torch
from torch import Tensor, nn

from .dataset import Batch
from .models import Run
from .schedule import add_noise, ldm_alpha_bar, min_snr_weights


@functools.cache
def alpha_bar_on(device: torch.device) -> Tensor:
    """The schedule (T,) in float32 (MPS has no float64), sent to a device once and not with every
    batch."""
    return ldm_alpha_bar().float().to(device)


@functools.cache
def weights_on(device: torch.device) -> Tensor:
    """min-SNR-5 loss weights (T,) in float32 on a device."""
    return min_snr_weights(ldm_alpha_bar()).float().to(device)


def denoising_loss(run: Run, z0: Tensor, cond: Tensor, t: Tensor, eps: Tensor,
                   weights: Tensor | None = None) -> Tensor:
    """Mean of |eps - eps_hat(z_t, t, cond)|^2 over a batch, DDPM eq. (14). All lie on the run's
    device.

    weights (T,): how much each timestep counts; without them all count alike."""
    z_t = add_noise(z0, t, eps, alpha_bar_on(z0.device))
    errors = (run.bind(cond)(z_t, t) - eps).square().mean((1, 2, 3))  # B
    if weights is not None:
        errors = errors * weights[t]
    return errors.mean()


class Loss(nn.Module):
    """What training minimises: denoising_loss with min-SNR-5 weights. It is a module that owns what
    is trained, since that is what DistributedDataParallel takes."""

    def __init__(self, run: Run):
        super().__init__()
        self.run = run
        self.model = run.model

    def forward(self, z0: Tensor, cond: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return denoising_loss(self.run, z0, cond, t, eps, weights_on(z0.device))


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
    """This process's share of the mean loss of a batch, without weights, (): the sum over all
    `world` processes is the mean."""
    share = [x[rank::world] for x in batch[:4]]
    if not len(share[0]):
        return torch.zeros((), device=batch.z0.device)
    return denoising_loss(run, *share) * (len(share[0]) / len(batch.z0))
