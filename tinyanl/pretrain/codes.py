"""Learning the codes of a vector-quantised first stage: k-means over latents."""
import torch
from torch import Tensor


@torch.no_grad()
def k_means(points: Tensor, k: int, rounds: int = 10) -> Tensor:
    """Lloyd's algorithm: points (N C) -> k centres (V C), V = min(k, N), each the mean of the points
    that were nearest to it. It starts from points drawn at random, by torch's global generator."""
    centres = points[torch.randperm(len(points))[:k]]  # V C
    for _ in range(rounds):
        nearest = torch.cat([torch.cdist(part, centres).argmin(1) for part in points.split(4096)])  # N
        count = torch.bincount(nearest, minlength=len(centres))[:, None]  # V 1
        total = torch.zeros_like(centres).index_add_(0, nearest, points)  # V C
        centres = torch.where(count > 0, total / count.clamp(min=1), centres)  # nothing near: it stays
    return centres
