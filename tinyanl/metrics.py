"""How good pictures and embeddings are: PSNR, caption retrieval, Frechet distance. Features come in: no model is here.

    psnr = 10 log10(2^2 / mse)                                       pictures in [-1, 1], mean over pictures, in dB
    d^2(a, b) = |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))  Frechet distance of two Gaussians (Dowson & Landau
                                                                     1982), FID's formula (Heusel et al. 2017)

FID is this distance on one given Inception network's features; on any other features it goes by their name.
B pictures, N samples, D features.

Copy this file alone: it needs torch, nothing else of tinyanl. Usage:

    import torch
    from metrics import frechet_distance, psnr, retrieval
    a, b = torch.randn(500, 8), torch.randn(500, 8) + 1
    print(frechet_distance(a, b))                                                        # near 8: the means differ by 1
    print(psnr(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.2)))                  # 20.0
    print(retrieval(a, a, torch.arange(500)))                                            # 1.0
"""
import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(x: Tensor, y: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, the mean over pictures; x and y (B 3 H W) in [-1, 1], clipped to it."""
    mse = (x.clamp(-1, 1) - y.clamp(-1, 1)).square().flatten(1).mean(1)                   # B
    return (10 * torch.log10(4 / mse.clamp(min=1e-10))).mean().item()


def retrieval(images: Tensor, texts: Tensor, truth: Tensor) -> float:
    """Share of images (N D) whose nearest text (M D), by cosine, is the right one; truth (N,): its row in texts."""
    nearest = (F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T).argmax(1)      # N
    return (nearest == truth).float().mean().item()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance between Gaussians fitted to features a (N D) and b (M D), in float64.

    tr (S_a S_b)^(1/2) is the sum of the roots of the eigenvalues of S_a^(1/2) S_b S_a^(1/2), which is symmetric: no
    matrix root that may turn complex. ValueError for fewer than two samples, or features that are not finite."""
    if min(len(a), len(b)) < 2 or a.shape[1:] != b.shape[1:] or a.dim() != 2:
        raise ValueError(f"features {tuple(a.shape)} and {tuple(b.shape)}: two samples or more, of equal width")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("features hold NaN or infinity: the model that made them has diverged")
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T).view(a.shape[1], -1), torch.cov(b.T).view(b.shape[1], -1)  # D D
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    trace = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace).item()
