"""Do generated pictures help where few are labelled? A compact FixMatch (Sohn et al. 2020, arXiv 2001.07685), compared.

    python -m tinyanl.experiments.semi_supervised ./ssl --labels 1 4 16

A small network learns the kind of drawn flowers, from a few labelled ones of each kind; with 600 unlabelled ones
besides, whose confident guesses on a weakly changed view are the labels of a strongly changed one; with variations of
the labelled ones, painted by a run that was trained on the unlabelled ones alone; and with both. Accuracy on 600
others, mean and spread over seeds. The embedded CLIP has read captions of flowers: its own zero-shot and linear-probe
accuracy are beside the rest, so that nobody takes them for the method's. B batch, N pictures, S side.
"""
import itertools
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2
from tqdm import tqdm

from ..augment import augment
from ..data import scan
from ..encode import embed_pictures, embed_texts
from ..table import table
from ..flowers import KINDS, write
from .judge import Judge, judged, pictures, share
from ..models import Base, Run, generator, has_bf16, load_run
from ..runs import command, mistakes_in_one_line, save

CONFIDENCE, SMOOTHING, UNLABELLED = 0.9, 0.1, 600  # of a guess that counts; of labels; pictures
WEAK = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(64, padding=4, padding_mode="reflect")])
# a kind has many colours, of which a few labelled pictures show some: the strong view hides the colour
STRONG = v2.Compose([WEAK, v2.RandomAffine(30, scale=(0.8, 1.2)), v2.RandomChannelPermutation(),
                     v2.ColorJitter(0.3, 0.3, 0.3), v2.RandomGrayscale(0.2)])
KIND = list(KINDS)
kind_of = lambda text: next(i for i, kind in enumerate(KIND) if f" {kind} " in f"{text} ")


def views(change: v2.Transform, x: Tensor) -> Tensor:
    """Each of x (B 3 S S) uint8 changed by itself -> (B 3 S S) in [-1, 1]."""
    return torch.stack([change(picture) for picture in x]) / 127.5 - 1


def fixmatch(x: Tensor, y: Tensor, unlabelled: Tensor | None, more: tuple[Tensor, Tensor] | None, seed: int,
             steps: int = 1600, batch: int = 32) -> nn.Module:
    """A network trained on strong views of pictures x (N 3 S S) uint8 of classes y (N,); with FixMatch's loss on sure
    guesses for unlabelled ones, at twice the batch; with generated pictures and their classes for half of every
    labelled batch. In bf16 where the CPU multiplies in it."""
    torch.manual_seed(seed)
    model = Judge(len(KIND))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    cycle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in tqdm(range(steps), "learning", leave=False):
        g = generator(seed, step)
        torch.manual_seed(seed * 1_000_003 + step)  # what the changes draw from
        i = torch.randint(len(x), (batch,), generator=g)
        shown, truth = x[i], y[i]
        if more:
            j = torch.randint(len(more[0]), (batch // 2,), generator=g)
            shown, truth = torch.cat([shown[: batch // 2], more[0][j]]), torch.cat([truth[: batch // 2], more[1][j]])
        inputs = [views(STRONG, shown)]
        if unlabelled is not None:
            u = unlabelled[torch.randint(len(unlabelled), (2 * batch,), generator=g)]
            inputs += [views(WEAK, u), views(STRONG, u)]
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16(torch.device("cpu"))):
            logits = model(torch.cat(inputs))[1].float().split([len(part) for part in inputs])
        loss = F.cross_entropy(logits[0], truth, label_smoothing=SMOOTHING)
        if unlabelled is not None:
            sure, guess = logits[1].detach().softmax(1).max(1)                                # 2B
            loss = loss + (F.cross_entropy(logits[2], guess, reduction="none") * (sure >= CONFIDENCE)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
    return model.eval()


def clip_rows(base: Base, x: Tensor, y: Tensor, test: Tensor, truth: Tensor) -> dict[str, float]:
    """Accuracy of CLIP alone: by the nearest of "a daisy" ..., and of a linear map fitted to labelled embeddings."""
    own, others = embed_pictures(base, x), embed_pictures(base, test)                        # N D, M D
    captions, wanted = embed_texts(base, [f"a {kind}" for kind in KIND]), F.one_hot(y, len(KIND)) - 1 / len(KIND)
    probe = torch.linalg.solve(own.T @ own + torch.eye(own.shape[1]), own.T @ wanted)         # ridge regression, D K
    return {"CLIP, zero-shot": share(others @ captions.T, truth), "CLIP, linear probe": share(others @ probe, truth)}


def draw_sets(folder: Path) -> None:
    """Draw the pictures of the comparison that `folder` lacks: labelled, unlabelled, test."""
    for i, (name, n) in enumerate((("labelled", 192), ("unlabelled", UNLABELLED), ("test", 600))):
        if not (folder / name / "metadata.jsonl").exists():
            write(folder / name, n, seed=700 + i)


def compare(run: Run, folder: Path, labels: tuple[int, ...] = (1, 4, 16), seeds: int = 3, per_image: int = 8,
            mask_rate: float = 0.3, steps: int = 1600) -> list[dict]:
    """Accuracy of every way, for every number of labels a kind, on the pictures of `draw_sets`. What is done with the
    same settings is kept in semi_supervised.json and not done again."""
    found = {name: scan(folder / name, 64).pictures for name in ("labelled", "unlabelled", "test")}
    shown = {name: pictures([p.path for p in own], 64) for name, own in found.items()}
    truth = {name: torch.tensor([kind_of(p.text) for p in own]) for name, own in found.items()}
    out, rows = folder / "semi_supervised.json", []
    kept = json.loads(out.read_text()) if out.exists() else {}
    keys = {(count, seed): f"{count} labels, seed {seed}, {per_image} variations at {mask_rate}, {steps} steps"
            for count, seed in itertools.product(labels, range(seeds))}
    for (count, seed), key in keys.items():
        if key in kept:
            continue
        order = torch.randperm(len(shown["labelled"]), generator=generator(seed, count))
        ids = torch.cat([order[truth["labelled"][order] == kind][:count] for kind in range(len(KIND))])
        x, y = shown["labelled"][ids], truth["labelled"][ids]
        painted, _ = augment(run, [found["labelled"][i].path for i in ids.tolist()], per_image, mask_rate, 20, seed)
        more, scores = (painted.flatten(0, 1), y.repeat_interleave(per_image)), {}
        for name, rest in (("labelled only", (None, None)), ("+ generated", (None, more)),
                           ("+ unlabelled", (shown["unlabelled"], None)),
                           ("+ unlabelled + generated", (shown["unlabelled"], more))):
            model = fixmatch(x, y, *rest, seed, steps)
            scores[name] = share(judged(model, shown["test"])[1], truth["test"])
        kept[key] = scores | clip_rows(run.base, x, y, shown["test"], truth["test"])
        save(json.dumps(kept, indent=1), out)
        print(f"{key}: {json.dumps(kept[key])}", flush=True)
    for count in labels:
        own = [kept[keys[count, seed]] for seed in range(seeds)]
        for name in own[0]:
            scores = torch.tensor([score[name] for score in own])
            rows.append({"labels a kind": count, "learned from": name, "accuracy": scores.mean().item(),
                         "spread": scores.std(correction=0).item(), "seeds": seeds})
    return rows


def main(argv: list[str] | None = None) -> None:
    p = command("experiments.semi_supervised", __doc__)
    p.add_argument("folder", type=Path, help="folder for the pictures, the run and semi_supervised.json")
    p.add_argument("--labels", type=int, nargs="+", default=[1, 4, 16], help="labels a kind (default %(default)s)")
    p.add_argument("--seeds", type=int, default=3, help="runs of each (default %(default)s)")
    p.add_argument("--steps", type=int, default=1600, help="of the small network (default %(default)s)")
    args = p.parse_args(argv)
    with mistakes_in_one_line(p, "stopped: the same command keeps the finished rows and goes on"):
        if min(*args.labels, args.seeds, args.steps) < 1 or max(args.labels) > 16:
            raise ValueError("--labels must be 1 to 16, --seeds and --steps at least 1")
        draw_sets(args.folder)
        if not (args.folder / "run/adapter.pt").exists():
            raise FileNotFoundError(f"first train on the unlabelled pictures alone: python -m tinyanl.train --data "
                                    f"{args.folder / 'unlabelled'} --out {args.folder / 'run'}")
        run = load_run(args.folder / "run")
        print(table(compare(run, args.folder, args.labels, args.seeds, steps=args.steps)))


if __name__ == "__main__":
    main()
