"""Measure a trained run against real pictures, at several mask rates; or train and measure everything that is compared.

    python -m tinyanl.flowers ./fresh --n 1024 --seed 1
    python -m tinyanl.evaluate --run runs/flowers --real ./fresh --rates 0 0.3 0.7
    python -m tinyanl.evaluate --suite ./suite           hours: goes on where it stopped, ./suite/results.json

CLIP judges what it has itself conditioned (FD_clip), which is too kind; drawn flowers are also judged by a network that
has seen 6,000 others with their kinds and colours (`Judge`), and no part of the model. Conditions come from the
training pictures, which invite copies, and from those held out, 16 samples each. The last row is the floor: real
pictures against other real ones. N samples, S picture side, D features.
"""
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .data import scan
from .flowers import write
from .judge import CLASSES, Network, class_of, judged, pictures, share, train_judge
from .metrics import (diversity, frechet_distance, inception, inception_score, nearest_similarity, precision_recall,
                      retrieval)
from .models import Base, Run, embed_pictures, embed_texts, encode, generator, known, load_run
from .runs import command, load, save
from .sample import sample, sampling_arguments, to_uint8
from .schedule import ddim_timesteps
from .tune import TUNES
from .weights import inspect

EACH = 16  # samples of a condition
RATES, STEPS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0), (60, 125, 250, 500)  # of the suite


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
             sets: tuple[str, ...] = ("training", "held out")) -> list[dict]:
    """A row of figures for each rate and set of conditions, and the floor. real (M 3 S S) uint8: pictures that the run
    has not seen, at least 2 n for a floor with as many samples. ValueError: too few samples for any figure."""
    if n % EACH or n < 2 * EACH or len(real) < n:
        raise ValueError(f"{n} samples against {len(real)} real pictures: a multiple of {EACH}, at least {2 * EACH}, "
                         "and no fewer real ones")
    found, train_ids, held_ids = known(run)
    _, embeddings = encode(run.base, [p.path for p in found])                                 # P 2 D
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


def cells() -> Iterator[dict]:
    """What the suite trains: arguments of train, the most telling first."""
    for data in ("flowers", "faces", "vehicles"):
        yield from ({"data": data, "tune": tune, "seed": 0} for tune in TUNES)
    for seed in (1, 2):
        yield from ({"data": "flowers", "tune": tune, "seed": seed} for tune in ("anl", "attention", "all", "scratch"))
    for change in ({"tokens": 2}, {"tokens": 4}, {"tokens": 8}, {"ratio": 1}, {"ratio": 2}, {"train_mask": 0.5},
                   {"uncentred": True}):
        yield {"data": "flowers", "tune": "anl", "seed": 0, **change}


def suite(folder: Path, n: int = 512, steps: int = 20, seed: int = 0) -> Path:
    """Train and measure every cell at STEPS, and the mask curve and the text figures of the first -> results.json,
    written after every piece; what is there is not made again. A cell is deleted from it to be made again."""
    out = folder / "results.json"
    results = json.loads(out.read_text()) if out.exists() else {}
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    machine = f"{card}, {os.cpu_count()} cores, torch {torch.__version__}"
    results.setdefault("setup", {"machine": machine, "samples": n, "DDIM steps": steps})
    for name, count, number in (("flowers", 200, 0), ("fresh flowers", 1024, 1)):
        if not (folder / name / "metadata.jsonl").exists():
            write(folder / name, count, seed=number)
    judge, results["setup"]["judge's accuracy"] = train_judge(folder / "judge")
    for cell in cells():
        name = " ".join(f"{k}={v}" for k, v in cell.items())
        data, run_folder = folder / cell["data"], folder / "runs" / name.replace(" ", ",")
        if not (data / "metadata.jsonl").exists():
            raise FileNotFoundError(f"no {data}: python -m tinyanl.pretrain families --data ./emoji --out {folder}")
        flags = [word for k, v in cell.items() if k != "data"
                 for word in (f"--{k.replace('_', '-')}", *([] if v is True else [str(v)]))]
        for before, done in zip((0, *STEPS), STEPS):
            key = f"{name} steps={done}"
            if key in results:
                continue
            begin = time.perf_counter()
            command_line = [sys.executable, "-m", "tinyanl.train", "--data", data, "--out", run_folder, "--resume"]
            command_line += ["--steps", str(done), "--sample-every", str(done), *flags]
            said = subprocess.run(command_line, stdout=subprocess.PIPE, text=True)
            log = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()][-1]
            if said.returncode or log["step"] != done:
                raise ValueError(f"{run_folder} is not at step {done}: see above, or delete it, to make {key} again")
            seconds, run = time.perf_counter() - begin, load_run(run_folder)
            seconds += results.get(f"{name} steps={before}", {}).get("seconds", 0)
            flowers = cell["data"] == "flowers"  # of the others there are no more than the run has seen
            real = scan(folder / "fresh flowers" if flowers else data, run.base.size).pictures
            count = min(n, len(real) // EACH * EACH)
            row, *_ = evaluate(run, pictures([p.path for p in real[:count]], run.base.size), (0.0,), count, steps, seed,
                               judge if flowers else None, sets=("held out",))
            own = load(run_folder / "adapter.pt", {"trained"})["trained"]
            results[key] = {"trainable": sum(x.numel() for x in own.values()), "seconds": seconds, "peak MB":
                            float(said.stdout.split("memory ")[1].split()[0].replace(",", "")), "training loss":
                            log["training"], "held-out loss": log["held_out"], **row,
                            "real are": "fresh" if flowers else "the training set"}
            save(json.dumps(results, indent=1), out)
            print(f"{key}: {json.dumps(results[key])}", flush=True)
        if cell == next(cells()) and "text" not in results:
            run = load_run(run_folder)
            found = scan(folder / "fresh flowers", run.base.size).pictures
            real = pictures([p.path for p in found], run.base.size)
            results["masks"] = evaluate(run, real, RATES, n, steps, seed, judge)
            results["text"] = text_figures(run, found, judge, steps=steps)
            save(json.dumps(results, indent=1), out)
    return out


def main(argv: list[str] | None = None) -> None:
    p = command("evaluate", __doc__)
    p.add_argument("--run", type=Path, help="folder that tinyanl.train wrote")
    p.add_argument("--real", type=Path, help="folder of real pictures that it has not seen; twice --n for the floor")
    p.add_argument("--suite", type=Path, help="folder for everything that is compared; flowers are drawn there")
    p.add_argument("--rates", type=float, nargs="+", default=[0.0], help="mask rates (default %(default)s)")
    p.add_argument("--n", type=int, default=512, help="samples a row (default %(default)s)")
    p.add_argument("--inception", type=Path, help="released FID weights: adds FID and Inception Score")
    sampling_arguments(p)
    args = p.parse_args(argv)
    if bool(args.suite) == bool(args.run) or bool(args.run) != bool(args.real):
        p.error("give --run and --real, or --suite")
    try:
        ddim_timesteps(1000, args.steps)
        if not all(0 <= rate <= 1 for rate in args.rates) or args.n % EACH or args.n < 2 * EACH or args.seed < 0:
            raise ValueError(f"--rates {args.rates} must be in [0, 1], --n {args.n} a multiple of {EACH}, at least "
                             f"{2 * EACH}, --seed {args.seed} not negative")
        if args.suite:
            print(suite(args.suite, args.n, args.steps, args.seed))
            return
        run = load_run(args.run, args.weights, args.device)
        found = scan(args.real, run.base.size).pictures
        network = None
        if args.inception:
            kind, state = inspect(args.inception)
            if "inception" not in kind.parts:
                raise ValueError(f"{args.inception} is {kind.name}, not FID's Inception: python -m tinyanl.weights")
            network = inception(state)
        flowers = class_of(found[0].text) is not None
        judge, accuracy = train_judge(args.run.parent / "judge") if flowers else (None, None)
        rows = evaluate(run, pictures([p.path for p in found], run.base.size), tuple(args.rates), args.n, args.steps,
                        args.seed, judge, network)
        save(json.dumps({"judge's accuracy": accuracy, "rows": rows}, indent=1), args.run / "evaluation.json")
        print(table(rows) + (f"\n\nThe judge knows {accuracy:.1%} of real flowers." if judge else ""))
    except (ValueError, OSError) as error:
        p.error(error)


if __name__ == "__main__":
    main()
