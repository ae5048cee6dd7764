"""Kill a training run, resume it, and compare what is left with a run that was never killed, bit
for bit.

    python tests/kills.py 100 FOLDER

Half of the kills come at a random moment, half inside a save: when a file is half written, whole
but not yet renamed, or just renamed. A run may be killed twice. It is forked from a process that
has loaded the models, and small, so that a kill costs about two seconds; everything else is the
program as it is."""

import json
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch

from tinyanl import models, train
from tinyanl.flowers import draw

STEPS, SETTINGS = 20, dict(batch=2, sample_every=10, save_every=3, seed=3, device="cpu")


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def left(out: Path) -> list:
    """Everything that a run leaves behind."""
    return [
        {name: torch.load(out / name, weights_only=True) for name in ("state.pt", "adapter.pt")},
        *(
            sorted(
                (str(p.relative_to(out)), p.read_bytes())
                for p in out.rglob("*")
                if p.suffix in (".png", ".json", ".jsonl")
            )
        ),
    ]


def die_in_a_save(nth: int, phase: str) -> None:
    """The nth file to be written from now on kills this process."""
    replace, count = os.replace, iter(range(1, 10_000))

    def dying(part: Path, path: Path) -> None:
        if next(count) == nth:
            if phase == "half written":
                os.truncate(part, os.path.getsize(part) // 2)
            if phase == "renamed":
                replace(part, path)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(part, path)

    os.replace = dying


def fork(out: Path, data: Path, prepare=lambda: None) -> int:
    """Start a run that resumes what is in `out`, in a child of this process."""
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        prepare()
        train.train(data, steps=STEPS, out=out, resume=True, **SETTINGS)
        os._exit(0)
    return child


def main(kills: int, folder: Path) -> None:
    torch.set_num_threads(1)  # a process with more threads cannot be forked
    data = folder / "flowers"
    data.mkdir(parents=True)
    for i in range(4):
        draw(i)[0].save(data / f"{i}.png")
    base = models.load_base(device="cpu")
    train.load_base = lambda *args: base
    train.sample, train.ROWS = partial(train.sample, steps=2), 1
    start = time.time()
    assert os.waitpid(fork(folder / "whole", data), 0)[1] == 0
    whole, seconds = left(folder / "whole"), time.time() - start
    writes = (
        1 + 3 * (STEPS // 3 + 2) + 4
    )  # of a run, about: some numbers are never reached, and that child ends unharmed

    dice, killed, tally, runs = random.Random(kills), 0, {}, 0
    while killed < kills:
        out, runs = folder / f"run{runs}", runs + 1
        for _ in range(dice.choice([1, 1, 2])):
            phase = dice.choice(["any moment"] * 3 + ["half written", "whole", "renamed"])
            if phase == "any moment":
                child = fork(out, data)
                time.sleep(dice.random() * seconds)
                os.kill(child, signal.SIGKILL)
            else:
                child = fork(out, data, partial(die_in_a_save, dice.randint(1, writes), phase))
            if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
                killed, tally[phase] = killed + 1, tally.get(phase, 0) + 1
        assert os.waitpid(fork(out, data), 0)[1] == 0, f"{out} could not be resumed"
        assert same(left(out), whole), f"{out} differs from a run that was never killed"
        assert not [p for p in out.rglob(".part-*")], f"{out} has half a file"
    print(json.dumps({"kills": killed, "runs": runs, "all exact": True, **tally}))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
