"""What samples of runs are held against: as many pictures that no run has painted.

"base": samples of the untouched U-Net, without any ANL or condition. "copies": for each condition
the training pictures nearest to it, in place of samples like it; who copies is not better than
these. "reconstructions": real pictures, encoded and decoded by the first stage; nothing that is
painted through it can be expected to pass them, the ceiling. "real": real pictures against other
real ones, the floor of a distance.
N samples, T training pictures, S picture side, D CLIP embedding width.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..encode import encode
from ..evaluate import EACH, Observers, Plan, classes_of, measure, reconstruct, spread_conditions
from ..models import Base, Run, training_set
from ..sample import sample, to_uint8
from .judge import pictures


class RealPictures(NamedTuple):
    """Real pictures of a set, twice as many as there are samples."""

    reference: Tensor  # N 3 S S, that no run has seen
    others: Tensor  # N 3 S S
    classes: Tensor | None  # (N,) what the others show, for the judge
    are: str  # what the reference is


def paint_untouched(base: Base, plan: Plan) -> Tensor:
    """Samples of the U-Net as it was pretrained, of no class (N 3 S S) uint8."""
    nothing = torch.zeros(plan.n, base.clip.dim)
    run = Run(base, nn.ModuleDict(), nothing[0], nothing[0], 1.0, {}, [])
    return to_uint8(sample(run, nothing, guidance=1.0, steps=plan.steps, seed=plan.seed))


def nearest_copies(told: Tensor, training: Tensor) -> Tensor:
    """The EACH training pictures nearest to each condition, by cosine, nearest first: indices (N,).

    told (N D): EACH times the embedding of every condition in a row; training (T D)."""
    cosines = F.normalize(told[::EACH], dim=-1) @ F.normalize(training, dim=-1).T  # N/EACH T
    return cosines.topk(EACH).indices.flatten()


def control_rows(run: Run, real: RealPictures, plan: Plan, observers: Observers) -> list[dict]:
    """The figures of every control, plan.n pictures each; copies are those of a run's training
    pictures, for its held-out conditions.

    "nearest training picture" is of this run, too: 1 where the other real ones were trained on."""
    found, train_ids, held_ids = training_set(run)
    _, embeddings = encode(run.base, [picture.path for picture in found], latents=False)  # P 2 D
    told, of = spread_conditions(embeddings, held_ids, plan.n)
    copied = train_ids[nearest_copies(told, embeddings[train_ids, 0])]
    copies = pictures([found[i].path for i in copied.tolist()], run.base.size)
    asked = classes_of([found[i] for i in of.tolist()])
    shown = {  # name -> pictures (N 3 S S) uint8, and what they should show (N,)
        "base": (paint_untouched(run.base, plan), None),
        "copies": (copies, asked),
        "reconstructions": (reconstruct(run.base, real.others), real.classes),
        "real": (real.others, real.classes),
    }
    reference = observers.observe(real.reference)
    training = embeddings[train_ids].flatten(0, 1)  # 2T D
    rows = []
    for name, (x, classes) in shown.items():
        figures = measure(observers.observe(x), reference, training, classes)
        rows.append({"conditions": name, **figures})
    return rows
