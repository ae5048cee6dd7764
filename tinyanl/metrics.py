"""How good pictures and embeddings are. Whose features a measure takes is the caller's choice.

    psnr = 10 log10(2^2 / mse)                      pictures in [-1, 1], mean over pictures, in dB
    d^2(a, b) = |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))
                                                    Frechet distance of two Gaussians (Dowson &
                                                    Landau 1982), FID's formula (Heusel et al. 2017)
    IS = exp(mean KL(p(y|x), p(y)))                 Inception Score (Salimans et al. 2016)
    precision, recall                               share of samples inside the other set's balls of
                                                    k nearest neighbours (Kynkaanniemi et al. 2019)

On the features of `inception` with the released weights the distance is FID; others are named after
theirs (FD_clip). It falls as samples are added: compare only figures from equally many.
B pictures, N M samples, D features.

Copy this file alone: it needs torch and torchvision, nothing else of tinyanl. Usage:

    import torch
    from metrics import frechet_distance, inception, precision_recall, psnr, retrieval
    a, b = torch.randn(500, 8), torch.randn(500, 8) + 1
    print(frechet_distance(a, b))                             # near 8: the means differ by 1
    print(precision_recall(a, b))                             # they overlap a little
    print(psnr(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.2)))          # 20.0
    print(retrieval(a, a, torch.arange(500)))                                    # 1.0
"""
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import inception_v3


def psnr(x: Tensor, y: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, the mean over pictures (B 3 H W), clipped to [-1, 1]."""
    mse = (x.clamp(-1, 1) - y.clamp(-1, 1)).square().flatten(1).mean(1)  # B
    return (10 * torch.log10(4 / mse.clamp(min=1e-10))).mean().item()


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of every row of a (N D) with every row of b (M D), (N M)."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


def retrieval(images: Tensor, texts: Tensor, truth: Tensor) -> float:
    """Share of images (N D) whose nearest text (M D), by cosine, is row truth (N,) of the texts."""
    nearest = cosines(images, texts).argmax(1)  # N
    return (nearest == truth).float().mean().item()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance between Gaussians fitted to features a (N D), b (M D), in float64.

    tr (S_a S_b)^(1/2) is the sum of the roots of the eigenvalues of S_a^(1/2) S_b S_a^(1/2), which
    is symmetric: no matrix root that may turn complex. ValueError for fewer than two samples, or
    features that are not finite; a warning where there are fewer samples than features, since such
    a covariance is singular and the distance far too large."""
    n = min(len(a), len(b))
    if n < 2 or a.dim() != 2 or a.shape[1:] != b.shape[1:]:
        raise ValueError(
            f"features {tuple(a.shape)} and {tuple(b.shape)}: two samples or more, of equal width"
        )
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("features hold NaN or infinity: the model that made them has diverged")
    width = a.shape[1]
    if n <= width:
        warnings.warn(
            f"{n} samples of {width} features: more samples than features are needed", stacklevel=2
        )
    a, b = a.double(), b.double()
    cov_a = torch.cov(a.T).view(width, width)
    cov_b = torch.cov(b.T).view(width, width)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # D D
    trace = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return (apart + cov_a.trace() + cov_b.trace() - 2 * trace).item()


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision: share of fake (M D) that lie nearer to some real (N D) sample than its k-th
    nearest real neighbour; recall: the same with the sets exchanged. In [0, 1]. ValueError for k
    samples or fewer in a set."""
    if min(len(real), len(fake)) <= k:
        raise ValueError(
            f"{len(real)} real and {len(fake)} fake samples: more than k = {k} of each are needed"
        )

    def share_inside(points: Tensor, balls: Tensor) -> float:
        radius = torch.cdist(balls, balls).kthvalue(k + 1, dim=1).values  # the nearest is itself
        return (torch.cdist(points, balls) <= radius).any(1).float().mean().item()

    return share_inside(fake, real), share_inside(real, fake)


def diversity(features: Tensor) -> float:
    """Mean cosine distance 1 - cos over the pairs of N > 1 samples (N D): 0 (all alike) to 2.

    The squared length of the sum of unit vectors is N plus the cosines of all ordered pairs."""
    n = len(features)
    if n < 2:
        raise ValueError(f"{n} sample: diversity needs two samples or more")
    unit = F.normalize(features, dim=-1)
    pairs = unit.sum(0).square().sum() - n
    return 1 - (pairs / (n * (n - 1))).item()


def nearest_similarity(features: Tensor, training: Tensor) -> Tensor:
    """Cosine of each sample (N D) to the training sample (M D) most like it, (N,); 1 is a copy."""
    return cosines(features, training).amax(1)


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """Inception Score of logits (N classes), without the final bias as it was published: mean and
    standard deviation over `splits` parts, in the order given (shuffle first). ValueError for fewer
    samples than splits."""
    if len(logits) < splits:
        raise ValueError(f"{len(logits)} samples cannot be split into {splits} parts")
    scores = []
    for part in logits.double().tensor_split(splits):
        log_p = part.log_softmax(1)
        p = part.softmax(1)
        kl = (p * (log_p - p.mean(0).log())).sum(1)
        scores.append(kl.mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


class Unpadded(nn.Module):
    """A branch behind an average over 3 x 3 that counted the padding as zeros: as if it had not."""

    def __init__(self, branch: nn.Module):
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        share = F.avg_pool2d(torch.ones_like(x[:1, :1]), 3, stride=1, padding=1)  # of real pixels
        return self.branch(x / share)


class MaxPooled(nn.Module):
    """An Inception block whose pooling branch, its last channels, takes the maximum over 3 x 3."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.block.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))
        others = self.block(x)[:, : -pooled.shape[1]]
        return torch.cat([others, pooled], dim=1)


def inception(state: dict[str, Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """From the released FID weights -> a function of pictures (B 3 H W) in [-1, 1] to features
    (B 2048) and logits without bias (B 1008).

    It is torchvision's Inception v3 with the three differences of the network that FID was defined
    on: 1008 classes, averages that leave out the padding, and a maximum in place of the last
    block's average."""
    net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    net.load_state_dict({name: x.float() for name, x in state.items()}, strict=True)
    weight = net.fc.weight.detach()
    net.fc = nn.Identity()
    net.Mixed_7c = MaxPooled(net.Mixed_7c)
    for block in net.children():
        if hasattr(block, "branch_pool"):
            block.branch_pool = Unpadded(block.branch_pool)
    net.eval().requires_grad_(False)

    def features(x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
        out = net(x)  # B 2048
        return out, out @ weight.T

    return features
