"""Diffusion schedule and samplers: DDPM (Ho et al. 2020) and DDIM (Song et al. 2021), by the
conventions of latent diffusion (LDM, Rombach et al. 2022).

    z_t = sqrt(alpha_bar_t) z0 + sqrt(1 - alpha_bar_t) eps                          DDPM eq. (4)

A sampler is a generator over any callable model(z, t) -> eps. It yields every step, so a notebook
can draw the whole trajectory and a program can keep the last item. Guidance and masks are wrappers
around `model` (masking.py), never options of a sampler. Coefficients are Python floats taken from a
float64 alpha_bar, so latents keep their own type.
B batch, C channels, H W latent sides, T training steps (1000), S sampling steps.

Copy this file alone: it needs torch, nothing else of tinyanl. Usage:

    import torch
    from schedule import ddim, ldm_alpha_bar
    a = ldm_alpha_bar()
    def at_three(z, t):                                # exact, if all data were the number 3
        return (z - 3 * a[t[0]] ** 0.5) / (1 - a[t[0]]) ** 0.5
    for t, z, z0_hat in ddim(at_three, torch.randn(2, 3, 8, 8), a, steps=10):
        print(t, round(z.mean().item(), 3))            # ends near 3
"""
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (z (B C H W), t (B,) int64) -> eps (B C H W)
Step = tuple[int, Tensor, Tensor]  # t, z after the step, the z0 that the step believed in


def ldm_alpha_bar(
    beta_start: float = 0.0015, beta_end: float = 0.0195, steps: int = 1000
) -> Tensor:
    """alpha_bar (T,) float64, the cumulative product of 1 - beta.

    LDM's "linear" schedule is linear in sqrt(beta)."""
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


def add_noise(z0: Tensor, t: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """Forward process, DDPM eq. (4).

    z0, eps (B C H W); t (B,) int64; alpha_bar (T,) -> z_t (B C H W) in z0's type."""
    # The type changes first, on alpha_bar's own device: MPS has no float64.
    a = alpha_bar.to(z0.dtype).to(z0.device)[t].view(-1, 1, 1, 1)
    return a.sqrt() * z0 + (1 - a).sqrt() * eps


def min_snr_weights(alpha_bar: Tensor, most: float = 5.0) -> Tensor:
    """Loss weights min(SNR, most) / SNR for a model that predicts noise, SNR = alpha_bar / (1 -
    alpha_bar): (T,) -> (T,) in (0, 1], in alpha_bar's type. Hang et al. 2023, arXiv 2303.09556.

    Without them most of the loss is about steps with hardly any noise, where there is nothing left
    to decide."""
    snr = alpha_bar / (1 - alpha_bar)
    return snr.clamp(max=most) / snr


def ddim_timesteps(T: int, S: int) -> Tensor:
    """The S of T timesteps that DDIM visits: 1, 1 + T/S, 1 + 2T/S ..., as released. (S,) int64.

    ValueError unless S divides T and S < T: the original then runs past the last timestep."""
    if not 0 < S < T or T % S:
        divisors = [s for s in range(1, T) if T % s == 0]
        raise ValueError(f"steps={S} must divide {T} and be less than it: choose from {divisors}")
    return torch.arange(0, T, T // S) + 1


def _noise_like(z: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise in the shape, type and device of z.

    It is drawn where the generator lives: a CPU generator gives the same pictures everywhere."""
    device = generator.device if generator else z.device
    return torch.randn(z.shape, generator=generator, device=device, dtype=z.dtype).to(z.device)


@torch.no_grad()
def ddpm(
    model: Denoiser, z: Tensor, alpha_bar: Tensor, generator: torch.Generator | None = None
) -> Iterator[Step]:
    """Ancestral sampling, DDPM algorithm 2, in T steps from noise z (B C H W).

    Posterior mean and variance are eqs. (6) and (7)."""
    alpha_bar = alpha_bar.tolist()
    for t in reversed(range(len(alpha_bar))):
        a, a_prev = alpha_bar[t], alpha_bar[t - 1] if t else 1.0
        beta = 1 - a / a_prev
        eps = model(z, torch.full((len(z),), t, device=z.device))
        z0 = (z - (1 - a) ** 0.5 * eps) / a**0.5
        z = (a_prev**0.5 * beta * z0 + (1 - beta) ** 0.5 * (1 - a_prev) * z) / (1 - a)
        if t:  # the last step is the mean
            z = z + ((1 - a_prev) / (1 - a) * beta) ** 0.5 * _noise_like(z, generator)
        yield t, z, z0


@torch.no_grad()
def ddim(
    model: Denoiser,
    z: Tensor,
    alpha_bar: Tensor,
    steps: int,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
) -> Iterator[Step]:
    """DDIM eq. (12) from noise z (B C H W). eta = 0 is deterministic, eta = 1 has DDPM's variance,
    eq. (16).

    The last step goes to alpha_bar[0], not to 1, as released. ValueError for eta outside [0, 1]."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} is not between 0 and 1: a step cannot add more noise than it "
                         "takes away")
    times = ddim_timesteps(len(alpha_bar), steps).tolist()
    alpha_bar = alpha_bar.tolist()
    for t, t_prev in zip(reversed(times), reversed([0, *times[:-1]]), strict=True):
        a, a_prev = alpha_bar[t], alpha_bar[t_prev]
        eps = model(z, torch.full((len(z),), t, device=z.device))
        z0 = (z - (1 - a) ** 0.5 * eps) / a**0.5
        sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)) ** 0.5
        z = a_prev**0.5 * z0 + (1 - a_prev - sigma**2) ** 0.5 * eps
        if eta:
            z = z + sigma * _noise_like(z, generator)
        yield t, z, z0
