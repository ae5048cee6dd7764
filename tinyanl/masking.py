"""Masked sampling and classifier-free guidance, as wrappers around a denoiser.

A mask hides coordinates of the condition. The condition is centred on the average training picture,
so a coordinate at 0 says "as the average picture": the more is hidden, the freer the sample; rate 1
is unconditional. How the paper draws its mask is not known to us. Our reading: per sample, each of
the D coordinates is hidden with probability `rate`, once for the whole trajectory, because a new
mask at every step would show every coordinate in the end.

    guided eps = eps(null) + scale * (eps(cond) - eps(null))     scale = 1 + w, Ho & Salimans 2022

B batch, D condition width, C H W latent.

Copy this file alone: it needs torch, nothing else of tinyanl. Usage:

    import torch
    from masking import guided, mask_condition
    cond = mask_condition(torch.randn(2, 8), rate=0.5, generator=torch.Generator().manual_seed(0))
    def bind(cond):                                         # a toy denoiser
        return lambda z, t: z * cond.mean(1).view(-1, 1, 1, 1)
    model = guided(bind, cond, null=torch.zeros(1, 8), scale=2.0)
    print((cond == 0).float().mean(), model(torch.ones(2, 3, 4, 4), torch.zeros(2)).shape)
"""
from collections.abc import Callable

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (z (B C H W), t (B,)) -> eps (B C H W)


def mask_condition(
    cond: Tensor, rate: float | Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Each coordinate of cond (B D) becomes 0 with probability `rate`, one number or (B 1).

    The mask is drawn where the generator lives. ValueError for a rate outside [0, 1]."""
    rate = torch.as_tensor(rate, device=generator.device if generator else "cpu")
    if not ((rate >= 0) & (rate <= 1)).all():
        raise ValueError(f"mask rate {rate.tolist()} is not between 0 and 1")
    keep = torch.rand(cond.shape, generator=generator, device=rate.device) >= rate
    return cond * keep.to(cond.device)  # rand is in [0, 1): rate 0 keeps all, rate 1 none


def guided(
    bind: Callable[[Tensor], Denoiser], cond: Tensor, null: Tensor, scale: float
) -> Denoiser:
    """Classifier-free guidance; with and without the condition run as one batch.

    bind(cond) -> model(z, t); cond (B D); null (1 D) or (B D). A scale of 1 is the condition alone,
    at no extra cost, 0 the null condition alone; more than 1 exaggerates the condition."""
    if scale == 1:
        return bind(cond)
    model = bind(torch.cat([cond, null.expand_as(cond)]))

    def eps(z: Tensor, t: Tensor) -> Tensor:
        with_cond, without = model(torch.cat([z, z]), torch.cat([t, t])).chunk(2)
        return without + scale * (with_cond - without)

    return eps
