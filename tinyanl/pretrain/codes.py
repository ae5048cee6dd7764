"""Learning the codes of a vector-quantised first stage: k-means over latents."""
import torch
from torch import Tensor


@torch.no_grad()
def k_means(points: Tensor, k: int, rounds: int = 10) -> Tensor:
    """Lloyd's algorithm: points (N C) -> k centres (k C), each the mean of what is nearest to it.

    It starts from k points drawn at random, by torch's global generator."""
    centres = points[torch.randperm(len(points))[:k]]  # k C
    for _ in range(rounds):
        parts = points.split(4096)  # a whole table of distances would not fit into memory
        nearest = torch.cat([torch.cdist(part, centres).argmin(1) for part in parts])  # N
        count = torch.bincount(nearest, minlength=len(centres))[:, None]  # k 1
        total = torch.zeros_like(centres).index_add_(0, nearest, points)  # k C
        mean = total / count.clamp(min=1)
        centres = torch.where(count > 0, mean, centres)  # a centre that nothing is nearest to stays
    return centres
