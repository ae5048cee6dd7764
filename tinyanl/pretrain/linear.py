"""What is linear in a first stage: the principal components of patches, the components that an
earlier first stage gets wrong, and least squares, which lets a new convolution know from the first
step on what another one knew."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

RIDGE = 1e-3  # of the mean variance of a feature


def to_patches(x: Tensor, side: int = 4) -> Tensor:
    """(N 3 S S) -> (N h*w 3*f*f)."""
    return F.unfold(x, side, stride=side).transpose(1, 2)


def principal(covariance: Tensor) -> Tensor:
    """The eigenvectors of a covariance (D D), as columns with descending variances."""
    return torch.linalg.eigh(covariance).eigenvectors.flip(1)


class PatchCode:
    """The linear code of patches: their C first principal components, learned from pictures.

    All components share one scale, so that the code has a mean square of 1 while its first channels
    vary more than its last. N pictures, f side of a patch, C channels, h w patches."""

    def __init__(self, x: Tensor, channels: int, side: int = 4):
        """x (N 3 S S): pictures to learn from."""
        self.side = side
        flat = to_patches(x, side).flatten(0, 1)  # N*h*w 3*f*f
        self.mean = flat.mean(0)
        components = principal(torch.cov(flat.T))[:, :channels]  # 3*f*f C
        code = (flat - self.mean) @ components
        scale = code.square().mean().rsqrt()
        self.components = components * scale
        self.deviation = (code * scale).std(0)[:, None, None]  # C 1 1

    def to(self, device: torch.device) -> None:
        """Move the code to a device."""
        self.mean = self.mean.to(device)
        self.components = self.components.to(device)
        self.deviation = self.deviation.to(device)

    def __call__(self, x: Tensor) -> Tensor:
        """Pictures (N 3 S S) -> their code (N C h w)."""
        with torch.autocast(x.device.type, enabled=False):  # bf16 has no digits for faint channels
            code = (to_patches(x.float(), self.side) - self.mean) @ self.components  # N h*w C
        height = x.shape[2] // self.side
        return code.transpose(1, 2).unflatten(2, (height, -1))

    def distance(self, one: Tensor, other: Tensor) -> Tensor:
        """Mean squared distance of two codes (N C h w), each channel in units of its deviation: the
        faint channels, which tell a texture, count as much as the first, which tells the colour."""
        return ((one - other) / self.deviation).square().mean()


class Details(PatchCode):
    """The C linear components of patches that are most in error where pictures x (N 3 S S) were
    reconstructed as y (N 3 S S).

    The first three components of all, which are about a patch's mean colour, are left out: there
    the error is a small part of what the component says. All have the same deviation."""

    def __init__(self, x: Tensor, y: Tensor, channels: int, deviation: float, side: int = 4):
        self.side = side
        flat = to_patches(x, side).flatten(0, 1)  # N*h*w 3*f*f
        self.mean = flat.mean(0)
        fine = principal(torch.cov(flat.T))[:, 3:]
        error = to_patches(x - y, side).flatten(0, 1) @ fine
        components = fine @ principal(error.T @ error)[:, :channels]  # 3*f*f C
        code = (flat - self.mean) @ components
        self.components = components * (deviation / code.std(0))
        self.deviation = torch.full((channels, 1, 1), deviation)


@torch.no_grad()
def keep_inputs(conv: nn.Conv2d, old: nn.Conv2d) -> None:
    """Let a fresh convolution give what an old one gave of the first channels.

    The weights of the other channels stay small, not at zero: such would be learned late."""
    conv.weight.mul_(0.3)
    conv.weight[:, : old.in_channels] = old.weight
    conv.bias.copy_(old.bias)


@torch.no_grad()
def fit_convolution(conv: nn.Conv2d, x: Tensor, y: Tensor) -> None:
    """Set weight and bias of a convolution of stride 1 so that conv(x) is nearest to y, by ridge
    regression over all positions. x (N C H W), y (N D H W)."""
    columns = F.unfold(x, conv.kernel_size, padding=conv.padding)  # N C*k*k H*W
    features = columns.transpose(1, 2).flatten(0, 1)  # N*H*W C*k*k
    targets = y.flatten(2).transpose(1, 2).flatten(0, 1)  # N*H*W D
    mean_feature = features.mean(0)
    mean_target = targets.mean(0)
    features = features - mean_feature
    targets = targets - mean_target
    gram = (features.T @ features).double() / len(features)
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    product = (features.T @ targets).double() / len(features)
    weight = torch.linalg.solve(gram, product).T.float()  # D C*k*k
    conv.weight.copy_(weight.view_as(conv.weight))
    conv.bias.copy_(mean_target - weight @ mean_feature)
