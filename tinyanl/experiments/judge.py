"""A judge of drawn flowers that shares nothing with the model: a small network trained on other flowers, labelled by
kind and colour. N samples, S picture side.
"""
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..data import open_rgb, scan, to_square
from ..flowers import KINDS, write
from ..models import generator
from ..runs import load, save
from ..sample import to_uint8

CLASSES = [f"{colour} {kind}" for kind, colours in KINDS.items() for colour in colours]  # 43 of drawn flowers
Network = Callable[[Tensor], tuple[Tensor, Tensor]]  # (N 3 S S) in [-1, 1] -> features (N D), logits
share = lambda logits, labels: (logits.argmax(1) == labels).float().mean().item()  # of right answers


def class_of(text: str | None) -> int | None:
    """The class of a flower by its caption, None for other captions."""
    return next((i for i, name in enumerate(CLASSES) if f"{text} ".startswith(f"a {name} ")), None)


class Judge(nn.Module):
    """A small convolutional network: pictures (N 3 64 64) in [-1, 1] -> features (N 64), logits (N classes)."""

    def __init__(self, classes: int = len(CLASSES)):
        super().__init__()
        layers = [[nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
                  for a, b in ((3, 32), (32, 64), (64, 128), (128, 128))]
        self.layers = nn.Sequential(*sum(layers, []))
        self.features, self.classes = nn.Linear(128, 64), nn.Linear(64, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[-1] != 64:
            x = F.interpolate(x, size=64, mode="bilinear", antialias=True)
        features = F.relu(self.features(self.layers(x).mean((2, 3))))                         # N 64
        return features, self.classes(features)


def pictures(paths: list[Path], size: int) -> Tensor:
    """Picture files -> (N 3 S S) uint8."""
    return torch.stack([to_uint8(to_square(open_rgb(path), size)) for path in tqdm(paths, "reading", leave=False)])


def train_judge(folder: Path, n: int = 6000, epochs: int = 12, size: int = 64) -> tuple[Judge, float]:
    """A judge trained on n flowers, and its accuracy on n / 6 others; kept in `folder`, with the flowers."""
    if not (folder / "flowers/metadata.jsonl").exists():
        write(folder / "flowers", n + n // 6, size, seed=424_242)  # a seed that no data set has
    torch.manual_seed(0)
    judge, path = Judge(), folder / "judge.pt"
    if not path.exists():
        found = scan(folder / "flowers", size).pictures
        x, y = pictures([p.path for p in found], size), torch.tensor([class_of(p.text) for p in found])
        optimizer, steps = torch.optim.AdamW(judge.parameters()), epochs * (n // 128)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
        for step in tqdm(range(steps), "training the judge"):
            g = generator(0, step)
            i, flip = torch.randint(n, (128,), generator=g), torch.rand(128, 1, 1, 1, generator=g) < 0.5
            view = x[i] / 127.5 - 1                                                           # 128 3 S S
            loss = F.cross_entropy(judge(torch.where(flip, view.flip(-1), view))[1], y[i], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
        judge.eval()
        accuracy = share(judged(judge, x[n:])[1], y[n:])
        save({"config": {"n": n, "epochs": epochs}, "judge": judge.state_dict(), "accuracy": accuracy}, path)
    kept = load(path, {"judge", "accuracy"})
    judge.load_state_dict(kept["judge"])
    return judge.eval().requires_grad_(False), kept["accuracy"]


@torch.no_grad()
def judged(judge: Network, x: Tensor, batch: int = 250) -> tuple[Tensor, Tensor]:
    """(N 3 S S) uint8 -> the judge's features and logits."""
    parts = [judge(part / 127.5 - 1) for part in x.split(batch)]
    return torch.cat([features for features, _ in parts]), torch.cat([logits for _, logits in parts])
