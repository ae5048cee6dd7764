"""A judge of drawn flowers that shares nothing with the model: a small network trained on other
flowers, labelled by kind and colour. N samples, S picture side, K classes.
"""
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2
from tqdm import tqdm

from ..data import open_rgb, scan, to_square
from ..flowers import KINDS, write
from ..models import generator
from ..runs import load, save
from ..sample import to_uint8

PAIRS = [(colour, kind) for kind, colours in KINDS.items() for colour in colours]
CLASSES = [f"{colour} {kind}" for colour, kind in PAIRS]  # the 43 of drawn flowers
# A judge that has met sharp pictures alone goes by texture: to one, a third of what the VQ-f4 makes
# of flowers showed another kind, where people see the same flower. This one has met soft ones, too.
BLUR = v2.GaussianBlur(7, sigma=(0.1, 1.2))
# (N 3 S S) in [-1, 1] -> features (N D), logits (N K)
Network = Callable[[Tensor], tuple[Tensor, Tensor]]


def class_of(text: str | None) -> int | None:
    """The class of a flower by its caption, None for other captions."""
    for i, name in enumerate(CLASSES):
        if f"{text} ".startswith(f"a {name} "):
            return i
    return None


def share(logits: Tensor, labels: Tensor) -> float:
    """The share of right answers: of rows of logits (N K) that are largest at their label (N,)."""
    return (logits.argmax(1) == labels).float().mean().item()


def right_answers(logits: Tensor, classes: Tensor) -> dict[str, float]:
    """Shares of pictures whose most likely class, by the judge's logits (N 43), has the right kind,
    the right colour, and both. classes (N,): of what each picture should show."""
    kinds = list(KINDS)
    colours = sorted({colour for colour, _ in PAIRS})
    kind_of = torch.tensor([kinds.index(kind) for _, kind in PAIRS])  # 43
    colour_of = torch.tensor([colours.index(colour) for colour, _ in PAIRS])  # 43
    answers = logits.argmax(1).cpu()  # N
    right_kind = kind_of[answers] == kind_of[classes]
    right_colour = colour_of[answers] == colour_of[classes]
    return {"right kind": right_kind.float().mean().item(),
            "right colour": right_colour.float().mean().item(),
            "right kind and colour": (right_kind & right_colour).float().mean().item()}


class Judge(nn.Module):
    """A small convolutional network: pictures (N 3 64 64) in [-1, 1] -> features (N 64), logits
    (N K)."""

    def __init__(self, classes: int = len(CLASSES)):
        super().__init__()
        layers = []
        for channels, wider in ((3, 32), (32, 64), (64, 128), (128, 128)):
            layers += [nn.Conv2d(channels, wider, 3, stride=2, padding=1), nn.BatchNorm2d(wider),
                       nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.features = nn.Linear(128, 64)
        self.classes = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[-1] != 64:
            x = F.interpolate(x, size=64, mode="bilinear", antialias=True)
        features = F.relu(self.features(self.layers(x).mean((2, 3))))  # N 64
        return features, self.classes(features)


def pictures(paths: list[Path], size: int) -> Tensor:
    """Picture files -> (N 3 S S) uint8."""
    read = [to_uint8(to_square(open_rgb(path), size))
            for path in tqdm(paths, "reading", leave=False)]
    return torch.stack(read)


def train_judge(folder: Path, n: int = 6000, epochs: int = 20,
                size: int = 64) -> tuple[Judge, float]:
    """A judge trained on n flowers, and its accuracy on n / 6 others; kept in `folder`, with the
    flowers."""
    if not (folder / "flowers/metadata.jsonl").exists():
        write(folder / "flowers", n + n // 6, size, seed=424_242)  # a seed that no data set has
    torch.manual_seed(0)
    judge = Judge()
    path = folder / "judge.pt"
    if not path.exists():
        found = scan(folder / "flowers", size).pictures
        x = pictures([picture.path for picture in found], size)
        classes = torch.tensor([class_of(picture.text) for picture in found])
        fit(judge, x[:n], classes[:n], steps=epochs * (n // 128))
        accuracy = share(judged(judge, x[n:])[1], classes[n:])
        save({"config": {"n": n, "epochs": epochs}, "judge": judge.state_dict(),
              "accuracy": accuracy, "blur": BLUR.sigma}, path)
    kept = load(path, {"judge", "accuracy", "blur"})  # one that never met a blur has no "blur"
    judge.load_state_dict(kept["judge"])
    return judge.eval().requires_grad_(False), kept["accuracy"]


def fit(judge: Judge, x: Tensor, classes: Tensor, steps: int) -> None:
    """Train a judge on pictures x (N 3 S S) uint8 of classes (N,), half of them mirrored, all more
    or less blurred."""
    optimizer = torch.optim.AdamW(judge.parameters())
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for step in tqdm(range(steps), "training the judge"):
        g = generator(0, step)
        i = torch.randint(len(x), (128,), generator=g)
        mirrored = torch.rand(128, 1, 1, 1, generator=g) < 0.5
        view = x[i] / 127.5 - 1  # 128 3 S S
        view = torch.where(mirrored, view.flip(-1), view)
        view = torch.cat([BLUR(part) for part in view.split(16)])  # one deviation for each 16
        loss = F.cross_entropy(judge(view)[1], classes[i], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
    judge.eval()


@torch.no_grad()
def judged(network: Network, x: Tensor, batch: int = 250,
           device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Pictures (N 3 S S) uint8 -> features and logits, on the CPU, of a network on `device`."""
    features, logits = [], []
    for part in x.split(batch):
        found = network((part / 127.5 - 1).to(device))
        features.append(found[0].cpu())
        logits.append(found[1].cpu())
    return torch.cat(features), torch.cat(logits)
