"""What stands around the work of a command: mistakes in one line, files that are whole or not there, a folder that is
this run's alone, the state to resume from, signals that wait for the end of a step, and torchrun's other processes.
"""
import argparse
import contextlib
import errno
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
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


@contextlib.contextmanager
def handling_signals(handler: Callable[[int, object], None], *numbers: int) -> Iterator[dict]:
    """Within it, `handler` answers these signals, except those that are ignored: that is nohup's
    wish. Yields number -> what answered before. Outside the main thread Python cannot listen, and
    nothing changes."""
    usual = {}
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                usual[number] = signal.signal(number, handler)
    try:
        yield usual
    finally:
        for number, earlier in usual.items():
            signal.signal(number, earlier)


def interrupt(number: int, frame: object) -> None:
    """A signal's handler that does what Ctrl-C does."""
    raise KeyboardInterrupt


@contextlib.contextmanager
def mistakes_in_one_line(p: argparse.ArgumentParser,
                         stopped: str = "stopped: nothing was kept") -> Iterator[None]:
    """Around the work of a command: a traceback is for mistakes of the program, not of its user.

    What its user got wrong ends it with one line and exit 2. Ctrl-C, SIGTERM and a terminal that
    closes end it with one line and exit 130: the text of the KeyboardInterrupt, or `stopped`. A
    reader of its output that has left (`| head`) ends it without a word, and exit 141 as the shell
    has it.
    """
    hangup = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none
    try:
        with handling_signals(interrupt, signal.SIGTERM, hangup):
            yield
            sys.stdout.flush()
    except BrokenPipeError:
        # Python writes what is still buffered once more as it ends: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        p.exit(141)
    except (ModuleNotFoundError, OSError, ValueError) as error:
        p.error(str(error))
    except KeyboardInterrupt as stop:
        p.exit(130, f"{p.prog}: {str(stop) or stopped}\n")


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
    part = path.with_name(f".part-{path.name}")
    try:
        with open(part, "wb") as file:
            if isinstance(content, Image.Image):
                content.save(file, format=Image.registered_extensions()[path.suffix])
            elif isinstance(content, str):
                file.write(content.encode())
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        # torch raises a RuntimeError of its own while it handles that of the file
        cause = error if isinstance(error, OSError) else error.__context__
        free = shutil.disk_usage(path.parent).free
        part.unlink(missing_ok=True)
        is_full = getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        remedy = "Make room and try again" if is_full else "Mend that and try again"
        reason = f"{one_line(cause or error)}; {free:,} bytes are free there"
        raise OSError(f"{path} cannot be written ({reason}): what was there before is whole. "
                      f"{remedy}") from error


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
    OSError: it cannot be written to, or another process holds it. Some network file systems have no
    locks: there the run goes on, and says that nothing keeps another one out."""
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "w")
    try:
        if fcntl:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # POSIX allows either
        raise OSError(f"{out} is in use by another process: wait for it, or choose another --out") from error
    except OSError as error:
        print(f"unguarded  the file system of {out} has no locks ({one_line(error)}): start no "
              "other run there")
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
    noted = []

    def note(number: int, frame: object) -> None:
        noted.append(number)
        signal.signal(number, usual[number])

    with handling_signals(note, signal.SIGINT, signal.SIGTERM) as usual:
        yield noted
