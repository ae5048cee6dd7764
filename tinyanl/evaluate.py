"""Measure a trained run against real pictures, at several mask rates.

    python -m tinyanl.flowers ./fresh --n 1024 --seed 1
    python -m tinyanl.evaluate --run runs/flowers --real ./fresh --rates 0 0.3 0.7

FD_clip is judged by the CLIP that conditioned the samples, which flatters them. Drawn flowers are also judged by a
network that shares nothing with the model (`Judge`), trained on 6,000 other flowers by kind and colour. Conditions come
from the training pictures, which invite copies, and from those held out, 16 samples each. The last row is the floor:
real pictures against other real ones. N samples, S picture side, D features.
"""
import json
from pathlib import Path

import torch
from torch import Tensor

from .data import scan
from .encode import embed_pictures, embed_texts, encode
from .experiments.judge import CLASSES, Network, class_of, judged, pictures, share, train_judge
from .metrics import (diversity, frechet_distance, inception, inception_score, nearest_similarity, precision_recall,
                      retrieval)
from .models import Base, Run, TrainingSet, generator, load_run, training_set
from .runs import command, mistakes_in_one_line, save
from .sample import check_sampling, sample, sampling_arguments, to_uint8, trained_on_argument
from .weights import inspect

EACH = 16  # samples of a condition


def look(base: Base, x: Tensor, judge: Network | None = None, network: Network | None = None) -> dict[str, Tensor]:
    """Pictures (N 3 S S) uint8 -> what CLIP, the judge and FID's Inception make of them, those that are given."""
    seen = {"clip": embed_pictures(base, x)}
    for name, own in (("judge", judge), ("inception", network)):
        if own:
            seen[name], seen[f"{name}'s logits"] = judged(own, x)
    return seen


def measure(ours: dict[str, Tensor], theirs: dict[str, Tensor], training: Tensor) -> dict:
    """Figures of N samples, EACH in a row of one condition, against as many real pictures, both by `look`.
    training (M D): unit CLIP embeddings of what the run has seen. FD: Frechet distance, times 1000 where on CLIP.
    within, across: diversity of samples of one condition, and of different ones."""
    clip, n = ours["clip"], len(ours["clip"])
    row = {"samples": n, "real": len(theirs["clip"]), "1000 FD_clip": 1000 * frechet_distance(clip, theirs["clip"])}
    row["precision"], row["recall"] = precision_recall(theirs["clip"], clip)
    groups = clip.unflatten(0, (-1, EACH))                                                    # N/16 16 D
    row["within"] = sum(diversity(group) for group in groups) / len(groups)
    row["across"] = sum(diversity(groups[:, j]) for j in range(EACH)) / EACH
    row["nearest training picture"] = nearest_similarity(clip, training).mean().item()
    if "judge" in ours:
        row["FD_judge"] = frechet_distance(ours["judge"], theirs["judge"])
    if "inception" in ours:
        row["FID"] = frechet_distance(ours["inception"], theirs["inception"])
        shuffled = ours["inception's logits"][torch.randperm(n, generator=generator(0, 0))]
        row["IS"], row["IS deviation"] = inception_score(shuffled)
    return row


def evaluate(run: Run, real: Tensor, rates: tuple[float, ...] = (0.0,), n: int = 512, steps: int = 50, seed: int = 0,
             judge: Network | None = None, network: Network | None = None,
             sets: tuple[str, ...] = ("training", "held out"), seen: TrainingSet | None = None) -> list[dict]:
    """A row of figures for each rate and set of conditions, and the floor. real (M 3 S S) uint8: pictures that the run
    has not seen, at least 2 n for a floor with as many samples. ValueError: too few samples for any figure."""
    if n % EACH or n < 2 * EACH or len(real) < n:
        raise ValueError(f"{n} samples against {len(real)} real pictures: a multiple of {EACH}, at least {2 * EACH}, "
                         "and no fewer real ones")
    found, train_ids, held_ids = seen or training_set(run)
    _, embeddings = encode(run.base, [p.path for p in found], latents=False)                  # P 2 D
    training, theirs, rows = embeddings[train_ids].flatten(0, 1), look(run.base, real[:n], judge, network), []
    for name in sets:
        ids = train_ids if name == "training" else held_ids
        own = embeddings[ids].transpose(0, 1).flatten(0, 1)                                   # all, then all mirrored
        i = torch.arange(n // EACH) * max(1, len(ids) * EACH // n) % len(own)  # spread over all
        for rate in rates:
            x = to_uint8(sample(run, run.condition(own[i.repeat_interleave(EACH)]), rate, steps=steps, seed=seed))
            ours = look(run.base, x, judge, network)
            row = {"conditions": name, "rate": rate, "steps": steps, **measure(ours, theirs, training)}
            truth = [class_of(found[ids[k % len(ids)]].text) for k in i.tolist()]
            if judge and None not in truth:
                truth = torch.tensor(truth).repeat_interleave(EACH)
                row["right kind and colour"] = share(ours["judge's logits"], truth)
            rows.append(row)
    floor = real[n : 2 * n][: (len(real) - n) // EACH * EACH]
    if len(floor) >= 2 * EACH:
        rows.append({"conditions": "real", **measure(look(run.base, floor, judge, network), theirs, training)})
    return rows


def text_figures(run: Run, real: list, judge: Network, each: int = 12, steps: int = 50) -> dict:
    """R-precision: the share of samples from "a red rose" ... whose best caption of all 43 is their prompt's, by CLIP
    and by the judge; and of real flowers (pictures with captions, as from `scan`)."""
    captions = embed_texts(run.base, [f"a {name}" for name in CLASSES])                       # 43 D
    truth = torch.arange(len(CLASSES)).repeat_interleave(each)
    x = to_uint8(sample(run, run.condition(captions, text=True)[truth], steps=steps))
    figures = {"samples": len(x), "chance": 1 / len(CLASSES)}
    seen, labels = pictures([p.path for p in real], run.base.size), torch.tensor([class_of(p.text) for p in real])
    for name, shown, right in (("samples", x, truth), ("real", seen, labels)):
        figures[f"R-precision of {name} by CLIP"] = retrieval(embed_pictures(run.base, shown), captions, right)
        figures[f"R-precision of {name} by the judge"] = share(judged(judge, shown)[1], right)
    return figures


def table(rows: list[dict]) -> str:
    """Rows as a table in Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    show = lambda v: "" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v)
    lines = [names, ["---"] * len(names), *([show(row.get(name)) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str] | None = None) -> None:
    p = command("evaluate", __doc__)
    p.add_argument("--run", type=Path, required=True, help="folder that tinyanl.train wrote")
    p.add_argument("--real", type=Path, required=True, help="pictures it has not seen; twice --n for the floor")
    p.add_argument("--rates", type=float, nargs="+", default=[0.0], help="mask rates (default %(default)s)")
    p.add_argument("--n", type=int, default=512, help="samples a row (default %(default)s)")
    p.add_argument("--inception", type=Path, help="released FID weights: adds FID and Inception Score")
    trained_on_argument(p)
    sampling_arguments(p)
    args = p.parse_args(argv)
    with mistakes_in_one_line(p):
        check_sampling(args)
        if not all(0 <= rate <= 1 for rate in args.rates) or args.n % EACH or args.n < 2 * EACH:
            raise ValueError(f"--rates {args.rates}: 0 to 1; --n {args.n}: a multiple of {EACH}, at least {2 * EACH}")
        run = load_run(args.run, args.weights, args.device)
        seen = training_set(run, args.trained_on)
        folder = scan(args.real, run.base.size)
        for note in folder.notes:
            print(f"note: {note}")
        found = folder.pictures
        if len(found) < args.n:
            raise ValueError(f"{args.real} has {len(found)} pictures, --n {args.n} needs as many: give more, or less")
        found = [found[i] for i in torch.randperm(len(found), generator=generator(0, 0))[: 2 * args.n]]  # not by class
        network = None
        if args.inception:
            kind, state = inspect(args.inception)
            if "inception" not in kind.parts:
                raise ValueError(f"{args.inception} is {kind.name}, not FID's Inception: python -m tinyanl.weights")
            network = inception(state)
        flowers = class_of(found[0].text) is not None
        judge, accuracy = train_judge(args.run.parent / "judge") if flowers else (None, None)
        rows = evaluate(run, pictures([p.path for p in found], run.base.size), tuple(args.rates), args.n, args.steps,
                        args.seed, judge, network, ("training", "held out"), seen)
        save(json.dumps({"judge's accuracy": accuracy, "rows": rows}, indent=1), args.run / "evaluation.json")
        print(table(rows) + (f"\n\nThe judge knows {accuracy:.1%} of real flowers." if judge else ""))


if __name__ == "__main__":
    main()
