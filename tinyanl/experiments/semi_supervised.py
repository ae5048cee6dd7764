"""Do generated pictures help where few are labelled? A compact FixMatch, compared.

    python -m tinyanl.experiments.semi_supervised ./ssl --labels 1 4 16

A small network learns the kind of drawn flowers, from a few labelled ones of each kind. With 600
unlabelled ones besides: its confident guesses on a weakly changed view are the labels of a strongly
changed one (Sohn et al. 2020, arXiv 2001.07685). With variations of the labelled ones, painted by a
run that was trained on the unlabelled ones alone. And with both. Accuracy on 600 others, mean and
spread over seeds. The embedded CLIP has read captions of flowers: its own zero-shot and
linear-probe accuracy are beside the rest, so that nobody takes them for the method's.
B batch, N pictures, S side, D embedding width, K kinds.
"""
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
from ..flowers import KINDS, write
from ..models import Base, Run, fingerprint, generator, has_bf16, load_run
from ..runs import command, mistakes_in_one_line, save
from ..sample import GUIDANCE, STEPS
from ..table import table
from .judge import Judge, judged, pictures, share

CONFIDENCE = 0.9  # from which on a guess counts
SMOOTHING = 0.1  # of labels
SETS = {"labelled": 192, "unlabelled": 600, "test": 600}  # name -> pictures
WEAK = v2.Compose(
    [v2.RandomHorizontalFlip(), v2.RandomCrop(64, padding=4, padding_mode="reflect")]
)
# A kind has many colours, of which a few labelled pictures show some: this view hides the colour.
STRONG = v2.Compose(
    [
        WEAK,
        v2.RandomAffine(30, scale=(0.8, 1.2)),
        v2.RandomChannelPermutation(),
        v2.ColorJitter(0.3, 0.3, 0.3),
        v2.RandomGrayscale(0.2),
    ]
)
KIND = list(KINDS)

Labelled = tuple[Tensor, Tensor]  # pictures (N 3 S S) uint8, and their kinds (N,)


def kind_of(text: str) -> int:
    """The index in KIND of the kind that a caption names. ValueError: it names none."""
    for i, kind in enumerate(KIND):
        if f" {kind} " in f"{text} ":
            return i
    raise ValueError(f"{text!r} names none of {', '.join(KIND)}: draw the pictures anew")


def views(change: v2.Transform, x: Tensor) -> Tensor:
    """Each of x (B 3 S S) uint8 changed by itself -> (B 3 S S) in [-1, 1]."""
    return torch.stack([change(picture) for picture in x]) / 127.5 - 1


def labelled_batch(
    x: Tensor, y: Tensor, more: Labelled | None, batch: int, g: torch.Generator
) -> Labelled:
    """Pictures drawn from x (N 3 S S) and their classes; where there are more, half of them from
    those."""
    i = torch.randint(len(x), (batch,), generator=g)
    if more is None:
        return x[i], y[i]
    half = batch // 2
    j = torch.randint(len(more[0]), (half,), generator=g)
    shown = torch.cat([x[i[:half]], more[0][j]])
    classes = torch.cat([y[i[:half]], more[1][j]])
    return shown, classes


def consistency_loss(weak: Tensor, strong: Tensor) -> Tensor:
    """FixMatch's, eq. (4), of logits (B K) of two views: the class guessed for the weak one is the
    label of the strong one, where the guess is sure."""
    confidence, guess = weak.detach().softmax(1).max(1)  # B
    is_sure = confidence >= CONFIDENCE
    return (F.cross_entropy(strong, guess, reduction="none") * is_sure).mean()


def fixmatch(
    x: Tensor,
    y: Tensor,
    unlabelled: Tensor | None,
    more: Labelled | None,
    seed: int,
    steps: int = 1600,
    batch: int = 32,
) -> nn.Module:
    """A network trained on strong views of pictures x (N 3 S S) uint8 of classes y (N,).

    unlabelled (M 3 S S) uint8: FixMatch's loss is added, at twice the batch. more: generated
    pictures and their classes, for half of every labelled batch. In bf16 where the CPU multiplies
    in it."""
    torch.manual_seed(seed)
    model = Judge(len(KIND))
    optimizer = torch.optim.SGD(
        model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    cycle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    bf16 = has_bf16(torch.device("cpu"))
    for step in tqdm(range(steps), "learning", leave=False):
        g = generator(seed, step)
        torch.manual_seed(g.initial_seed())  # what the changes draw from
        shown, classes = labelled_batch(x, y, more, batch, g)
        inputs = [views(STRONG, shown)]
        if unlabelled is not None:
            u = unlabelled[torch.randint(len(unlabelled), (2 * batch,), generator=g)]
            inputs += [views(WEAK, u), views(STRONG, u)]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            _, logits = model(torch.cat(inputs))  # one batch, so that its statistics are of all
        logits = logits.float().split([len(part) for part in inputs])
        loss = F.cross_entropy(logits[0], classes, label_smoothing=SMOOTHING)
        if unlabelled is not None:
            loss = loss + consistency_loss(logits[1], logits[2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
    return model.eval()


def ridge_regression(x: Tensor, y: Tensor) -> Tensor:
    """The linear map (D K) from x (N D) to y (N K) with the least |x map - y|^2 + |map|^2."""
    return torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]), x.T @ y)


def clip_rows(base: Base, x: Tensor, y: Tensor, test: Tensor, truth: Tensor) -> dict[str, float]:
    """Accuracy of CLIP alone on test (M 3 S S) of classes truth (M,): by the nearest of "a daisy"
    ..., and by a linear map fitted to the embeddings of pictures x (N 3 S S) of classes y (N,)."""
    embeddings = embed_pictures(base, x)  # N D
    others = embed_pictures(base, test)  # M D
    captions = embed_texts(base, [f"a {kind}" for kind in KIND])  # K D
    wanted = F.one_hot(y, len(KIND)) - 1 / len(KIND)  # N K
    probe = ridge_regression(embeddings, wanted)
    return {
        "CLIP, zero-shot": share(others @ captions.T, truth),
        "CLIP, linear probe": share(others @ probe, truth),
    }


def draw_sets(folder: Path) -> None:
    """Draw the pictures of the comparison that `folder` lacks."""
    for i, (name, n) in enumerate(SETS.items()):
        if not (folder / name / "metadata.jsonl").exists():
            write(folder / name, n, seed=700 + i)


def choose_labelled(kinds: Tensor, count: int, seed: int) -> Tensor:
    """Indices of `count` pictures of each kind, drawn at random. kinds (N,): those of all."""
    order = torch.randperm(len(kinds), generator=generator(seed, count))
    chosen = [order[kinds[order] == kind][:count] for kind in range(len(KIND))]
    return torch.cat(chosen)


class Data:
    """The pictures of `draw_sets`."""

    def __init__(self, folder: Path):
        self.paths: dict[str, list[Path]] = {}
        self.x: dict[str, Tensor] = {}  # name -> N 3 S S, uint8
        self.kinds: dict[str, Tensor] = {}  # name -> (N,)
        for name in SETS:
            found = scan(folder / name, 64).pictures
            self.paths[name] = [picture.path for picture in found]
            self.x[name] = pictures(self.paths[name], 64)
            self.kinds[name] = torch.tensor([kind_of(picture.text) for picture in found])


def accuracies(
    run: Run,
    data: Data,
    count: int,
    seed: int,
    per_image: int,
    mask_rate: float,
    steps: int,
    guidance: float,
) -> dict[str, float]:
    """Name of each way -> its accuracy, with `count` labels a kind."""
    chosen = choose_labelled(data.kinds["labelled"], count, seed)
    x = data.x["labelled"][chosen]
    y = data.kinds["labelled"][chosen]
    paths = [data.paths["labelled"][i] for i in chosen.tolist()]
    # N per_image 3 S S
    painted, _ = augment(run, paths, per_image, mask_rate, STEPS, seed, guidance)
    more = (painted.flatten(0, 1), y.repeat_interleave(per_image))
    ways = {
        "labelled only": (None, None),
        "+ generated": (None, more),
        "+ unlabelled": (data.x["unlabelled"], None),
        "+ unlabelled + generated": (data.x["unlabelled"], more),
    }
    test = data.x["test"]
    truth = data.kinds["test"]
    found = {}
    for name, (unlabelled, generated) in ways.items():
        model = fixmatch(x, y, unlabelled, generated, seed, steps)
        _, logits = judged(model, test)
        found[name] = share(logits, truth)
    return {**found, **clip_rows(run.base, x, y, test, truth)}


def mean_and_spread(count: int, found: list[dict[str, float]]) -> list[dict]:
    """A row for each way, over the seeds."""
    rows = []
    for name in found[0]:
        values = torch.tensor([accuracy[name] for accuracy in found])
        rows.append(
            {
                "labels a kind": count,
                "learned from": name,
                "accuracy": values.mean().item(),
                "spread": values.std(correction=0).item(),
                "seeds": len(found),
            }
        )
    return rows


def compare(
    run: Run,
    folder: Path,
    labels: tuple[int, ...] = (1, 4, 16),
    seeds: int = 3,
    per_image: int = 8,
    mask_rate: float = 0.3,
    steps: int = 1600,
    guidance: float = GUIDANCE,
) -> list[dict]:
    """Accuracy of every way, for every number of labels a kind, on the pictures of `draw_sets`.

    What is done with the same settings is kept in semi_supervised.json and not done again."""
    data = Data(folder)
    out = folder / "semi_supervised.json"
    kept = json.loads(out.read_text()) if out.exists() else {}
    how = f"{per_image} variations at {mask_rate}, {STEPS} DDIM steps, guidance {guidance:g}"
    how += f", {steps} steps, run {fingerprint(run.model)}"
    rows = []
    for count in labels:
        found = []
        for seed in range(seeds):
            key = f"{count} labels, seed {seed}, {how}"
            if key not in kept:
                kept[key] = accuracies(
                    run, data, count, seed, per_image, mask_rate, steps, guidance
                )
                save(json.dumps(kept, indent=1), out)
                print(f"{key}: {json.dumps(kept[key])}", flush=True)
            found.append(kept[key])
        rows += mean_and_spread(count, found)
    return rows


def main(argv: list[str] | None = None) -> None:
    p = command("experiments.semi_supervised", __doc__)
    p.add_argument("folder", type=Path, help="for the pictures, the run and semi_supervised.json")
    p.add_argument(
        "--labels",
        type=int,
        nargs="+",
        default=[1, 4, 16],
        help="labels a kind (default %(default)s)",
    )
    p.add_argument("--seeds", type=int, default=3, help="runs of each (default %(default)s)")
    p.add_argument(
        "--steps", type=int, default=1600, help="of the small network (default %(default)s)"
    )
    args = p.parse_args(argv)
    most = SETS["labelled"] // len(KIND) // 2  # so that seeds choose different ones
    with mistakes_in_one_line(p, "stopped: the same command keeps the finished rows and goes on"):
        if not all(1 <= count <= most for count in args.labels):
            raise ValueError(f"--labels {args.labels}: each must be 1 to {most}")
        if args.seeds < 1:
            raise ValueError(f"--seeds {args.seeds} must be at least 1")
        if args.steps < 1:
            raise ValueError(f"--steps {args.steps} must be at least 1")
        draw_sets(args.folder)
        if not (args.folder / "run/adapter.pt").exists():
            raise FileNotFoundError(
                "first train on the unlabelled pictures alone: python -m tinyanl.train "
                f"--data {args.folder / 'unlabelled'} --out {args.folder / 'run'}"
            )
        run = load_run(args.folder / "run")
        print(table(compare(run, args.folder, args.labels, args.seeds, steps=args.steps)))


if __name__ == "__main__":
    main()
