"""How good pictures and embeddings are. Measures take features: whose features they are is the caller's choice.

    psnr = 10 log10(2^2 / mse)                                       pictures in [-1, 1], mean over pictures, in dB
    d^2(a, b) = |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))  Frechet distance of two Gaussians (Dowson & Landau
                                                                     1982), FID's formula (Heusel et al. 2017)
    IS = exp(mean KL(p(y|x), p(y)))                                  Inception Score (Salimans et al. 2016)
    precision, recall                                                share of samples inside the other set's k-nearest-
                                                                     neighbour balls (Kynkaanniemi et al. 2019)

On the features of `inception` with the released weights the distance is FID; others are named after theirs (FD_clip).
It falls as samples are added: compare only figures from equally many. B pictures, N M samples, D features.

Copy this file alone: it needs torch and torchvision, nothing else of tinyanl. Usage:

    import torch
    from metrics import frechet_distance, inception, precision_recall, psnr, retrieval
    a, b = torch.randn(500, 8), torch.randn(500, 8) + 1
    print(frechet_distance(a, b))                                                        # near 8: the means differ by 1
    print(precision_recall(a, b))                                                        # they overlap a little
    print(psnr(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.2)), retrieval(a, a, torch.arange(500)))  # 20.0 1.0
"""
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import inception_v3


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
    matrix root that may turn complex. ValueError for fewer than two samples, or features that are not finite; a warning
    where there are fewer samples than features, since such a covariance is singular and the distance far too large."""
    if min(len(a), len(b)) < 2 or a.shape[1:] != b.shape[1:] or a.dim() != 2:
        raise ValueError(f"features {tuple(a.shape)} and {tuple(b.shape)}: two samples or more, of equal width")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("features hold NaN or infinity: the model that made them has diverged")
    if min(len(a), len(b)) <= a.shape[1]:
        warnings.warn(f"{min(len(a), len(b))} samples of {a.shape[1]} features: more samples than features are needed")
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T).view(a.shape[1], -1), torch.cov(b.T).view(b.shape[1], -1)  # D D
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    trace = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace).item()


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision: share of fake (M D) that lie nearer to some real (N D) sample than its k-th nearest real neighbour;
    recall: the same with the sets exchanged. In [0, 1]. ValueError for k samples or fewer in a set."""
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"{len(real)} real and {len(fake)} fake samples: more than k = {k} of each are needed")

    def inside(points: Tensor, balls: Tensor) -> float:
        radius = torch.cdist(balls, balls).kthvalue(k + 1, dim=1).values                  # the nearest is itself
        return (torch.cdist(points, balls) <= radius).any(1).float().mean().item()

    return inside(fake, real), inside(real, fake)


def diversity(features: Tensor) -> float:
    """Mean cosine distance 1 - cos between the pairs of N > 1 samples, (N D) -> 0 (all the same) to 2."""
    unit, n = F.normalize(features, dim=-1), len(features)
    if n < 2:
        raise ValueError("diversity needs two samples or more")
    return 1 - ((unit.sum(0).square().sum() - n) / (n * (n - 1))).item()


def nearest_similarity(features: Tensor, training: Tensor) -> Tensor:
    """Cosine of each sample (N D) to the training sample (M D) most like it, (N,): near 1, a copy."""
    return (F.normalize(features, dim=-1) @ F.normalize(training, dim=-1).T).amax(1)


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """Inception Score of logits (N classes), without the final bias as it was published: mean and standard deviation
    over `splits` parts, in the order given (shuffle first). ValueError for fewer samples than splits."""
    if len(logits) < splits:
        raise ValueError(f"{len(logits)} samples cannot be split into {splits} parts")
    scores = []
    for part in logits.double().tensor_split(splits):
        log_p, p = part.log_softmax(1), part.softmax(1)
        scores.append((p * (log_p - p.mean(0).log())).sum(1).mean().exp())
    return torch.stack(scores).mean().item(), torch.stack(scores).std(correction=0).item()


def inception(state: dict[str, Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """From the released FID weights -> a function of pictures (B 3 H W) in [-1, 1] to features (B 2048) and logits
    without bias (B 1008). torchvision's Inception v3 with the three differences of the network that FID was defined on:
    1008 classes, averages that leave out the padding, and a maximum in place of the last block's average."""
    net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    net.load_state_dict({k: v.float() for k, v in state.items()}, strict=True)
    weight, net.fc = net.fc.weight.detach(), torch.nn.Identity()

    def unpadded(branch: torch.nn.Module, inputs: tuple[Tensor]) -> Tensor:
        x, = inputs  # an average of 9, of which only some are pixels: divide by their share
        return x / F.avg_pool2d(torch.ones_like(x[:1, :1]), 3, stride=1, padding=1)

    for name, block in net.named_children():
        if hasattr(block, "branch_pool"):
            block.branch_pool.register_forward_pre_hook(unpadded)
    last = net.Mixed_7c
    last.register_forward_pre_hook(lambda block, x: setattr(block, "pooled", F.max_pool2d(x[0], 3, 1, 1)))
    last.branch_pool.register_forward_pre_hook(lambda branch, x: last.pooled)  # after `unpadded`, whose result it drops
    net.eval().requires_grad_(False)

    def features(x: Tensor) -> tuple[Tensor, Tensor]:
        out = net(F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False))    # B 2048
        return out, out @ weight.T

    return features
