"""What stands around the work of a command: mistakes in one line, files that are whole or not there, a folder that is
this run's alone, the state to resume from, signals that wait for the end of a step, and torchrun's other processes.
"""
import argparse
import contextlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows has no such locks: two runs into one folder go unnoticed there
    fcntl = None

import torch
from PIL import Image

from .checkpoint import refuse_bomb

FREE = ("batch", "lr", "train_mask")  # what a resumed run may change of its config.json
STATE = {"step", "live", "ema", "optimizer", "frames", "log", "losses", "same", "config"}  # names in state.pt
one_line = lambda error: " ".join(f"{error}".split())[:240] or type(error).__name__  # what torch says may be a page


def command(name: str, doc: str) -> argparse.ArgumentParser:
    """The parser of `python -m tinyanl.NAME`, which says what is wrong in one line, and on exit 2."""
    p = argparse.ArgumentParser(f"python -m tinyanl.{name}", description=doc,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: p.exit(2, f"{p.prog}: {message}\n")
    if hasattr(sys.stdout, "reconfigure"):  # a file may have a name that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    return p


def peak_megabytes(device: torch.device) -> float | None:
    """The most memory that this process has held: of the GPU, or else as Linux counts it; None on other systems."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024 if status.exists() else None


def join_processes() -> tuple[int, int]:
    """Rank and number of processes: torchrun's, after joining its group, a GPU for each; else 0 and 1. Ranks above 0
    print nothing."""
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if world > 1 and not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group()  # nccl for what is on GPUs, gloo for the rest
        sys.stdout = sys.stdout if rank == 0 else open(os.devnull, "w")
    return rank, world


def save(content: dict | str | Image.Image, path: Path) -> None:
    """Write tensors, text or a picture: `path` is the old file or the whole new one, whenever the power fails. Of
    torchrun's processes the first one writes. OSError: it cannot be written; the old file is still there."""
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    part = path.with_name(f".part-{path.name}")  # the suffix tells Pillow the format
    try:
        if isinstance(content, Image.Image):
            content.save(part)
        elif isinstance(content, str):
            part.write_text(content, encoding="utf-8")
        else:
            torch.save(content, part)
        with open(part, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError where a disk is full
        free = shutil.disk_usage(path.parent).free
        part.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written ({one_line(error)}; {free:,} bytes are free there): what was there "
                      "before is whole. Make room and try again") from error


def load(path: Path, names: set[str]) -> dict:
    """What `save` wrote, a dict with at least these names. Runs nothing. ValueError: it is something else."""
    try:
        refuse_bomb(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        if missing := names - set(content):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        if not isinstance(content.get("config"), dict):
            raise ValueError("its config is no dict")
    except OSError:
        raise
    except Exception as error:  # whatever a damaged or hostile file sets off
        raise ValueError(f"{path} is damaged or not of tinyanl ({one_line(error)}): train again") from error
    return content


def claim(out: Path) -> IO | None:
    """Make the run folder and hold it until the returned file is closed or this process ends, however it ends.
    OSError: it cannot be written to, or another process holds it."""
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "w")
    try:
        if fcntl:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # POSIX allows either
        raise OSError(f"{out} is in use by another process: wait for it, or choose another --out") from error
    return lock


def earlier_state(out: Path, config: dict, resume: bool, overwrite: bool) -> dict | None:
    """What to resume from, or None. FileExistsError: a run is there and neither flag was given. ValueError: it was made
    with other arguments than a resumed run may change, or it is damaged."""
    names = ("config.json", "state.pt", "adapter.pt", "log.jsonl", "filmstrip.png")
    there = [name for name in names if (out / name).exists()]
    if there and not resume and not overwrite:
        raise FileExistsError(f"{out} already has a {there[0]}: --resume continues its run, --overwrite replaces it")
    if resume and "adapter.pt" in there and "state.pt" not in there:
        raise FileExistsError(f"{out} has an adapter.pt but no state.pt to resume from: --overwrite starts anew")
    if not resume or "state.pt" not in there:
        return None
    state = load(out / "state.pt", STATE)
    changed = {name: f"{name} was {state['config'].get(name)}, is {value}" for name, value in config.items()
               if state["config"].get(name) != value}
    if fixed := [words for name, words in changed.items() if name not in FREE]:
        raise ValueError(f"{out} cannot be resumed with other arguments: {'; '.join(fixed)}. Use --out for a new run")
    print("".join(f"changed    {words}\n" for words in changed.values()), end="")
    return state


@contextlib.contextmanager
def noting_signals() -> Iterator[list[int]]:
    """Within it, a first Ctrl-C or SIGTERM only goes into the list, for a loop to stop between two steps; a second one
    does what it always does. Outside the main thread Python cannot listen: both do what they always do."""
    noted, usual = [], {}

    def note(number: int, frame: object) -> None:
        noted.append(number)
        signal.signal(number, usual[number])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup's wish is respected
                usual[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
