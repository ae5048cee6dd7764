"""What stands around the work of a command: mistakes in one line, files that are whole or not
there, a folder that is this run's alone, the state to resume from, signals that wait for the end of
a step, and torchrun's other processes.
"""
import argparse
import contextlib
import errno
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NoReturn

try:
    import fcntl
    import resource
except ImportError:  # on Windows two runs into one folder go unnoticed, and memory is not counted
    fcntl = None
    resource = None

import torch
from PIL import Image

from .checkpoint import refuse_bomb

HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)  # a terminal closes; Windows has no such signal
RUN_FILES = ("config.json", "state.pt", "adapter.pt", "log.jsonl", "filmstrip.png")
STATE = {"step", "live", "ema", "optimizer", "frames", "log", "losses", "same", "config"}


def one_line(error: Exception) -> str:
    """What an error says, which of torch's may be a page, in at most 240 characters."""
    return " ".join(str(error).split())[:240] or type(error).__name__


class OneLineParser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, without the usage, and on exit 2."""

    def error(self, message: str) -> NoReturn:
        if not is_first_process():
            # A mistake that all processes meet is said by the first one, and torchrun ends the
            # others meanwhile. What only this one met is said, too.
            time.sleep(30)
        self.exit(2, f"{self.prog}: {message}\n")


def command(name: str, doc: str) -> argparse.ArgumentParser:
    """The parser of `python -m tinyanl.NAME`."""
    if hasattr(sys.stdout, "reconfigure"):  # a file may have a name that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    return OneLineParser(f"python -m tinyanl.{name}", description=doc,
                         formatter_class=argparse.RawDescriptionHelpFormatter)


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
    try:
        with handling_signals(interrupt, signal.SIGTERM, HANGUP):
            yield
            sys.stdout.flush()
    except BrokenPipeError:
        # Python writes what is still buffered once more as it ends: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        p.exit(141)
    except (ModuleNotFoundError, OSError, ValueError) as error:
        p.error(str(error))
    except KeyboardInterrupt as stop:
        p.exit(130, f"{p.prog}: {str(stop) or stopped}\n" if is_first_process() else None)


def peak_megabytes(device: torch.device) -> float | None:
    """The most memory that this process has held so far: of the GPU, or else of the machine. None
    on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux kilobytes
    return peak / unit


def environment_number(name: str, default: int) -> int:
    """A whole number that torchrun has put into the environment; empty counts as absent."""
    return int(os.environ.get(name) or default)


def join_processes() -> tuple[int, int]:
    """Rank and number of processes: torchrun's, after joining its group, a GPU for each; else 0 and
    1.

    ValueError: there are more processes than GPUs."""
    rank = environment_number("RANK", 0)
    world = environment_number("WORLD_SIZE", 1)
    if world > 1 and not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            local = environment_number("LOCAL_RANK", 0)
            if local >= (gpus := torch.cuda.device_count()):
                raise ValueError(f"more processes than the {gpus} GPUs here: "
                                 f"give torchrun --nproc-per-node {gpus}")
            torch.cuda.set_device(local)
        torch.distributed.init_process_group()  # nccl for what is on GPUs, gloo for the rest
    return rank, world


def is_first_process() -> bool:
    """Whether this process is the one that speaks, paints and writes: alone, or the first of
    torchrun's."""
    return environment_number("RANK", 0) == 0 or environment_number("WORLD_SIZE", 1) == 1


def say(text: str) -> None:
    """Print a line, once however many processes train."""
    if is_first_process():
        print(text, flush=True)


def save(content: dict | str | Image.Image, path: Path) -> None:
    """Write tensors, text or a picture: `path` is the old file or the whole new one, whenever the
    power fails. Of torchrun's processes the first one writes. OSError: it cannot be written; the
    old file is still there."""
    if not is_first_process():
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
    """What `save` wrote, a dict with at least these names. Runs nothing. ValueError: it is
    something else."""
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
        raise ValueError(f"{path} is damaged or not of tinyanl ({one_line(error)}): "
                         "train again") from error
    return content


def claim(out: Path) -> IO | None:
    """Make the folder `out` and hold it until the returned file is closed or this process ends,
    however it ends. OSError: it cannot be written to, or another process holds it. Some network
    file systems have no locks: there the run goes on, and says that nothing keeps another one
    out."""
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "w")  # noqa: SIM115  it stays open: that is the lock
    try:
        if fcntl:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # POSIX allows either
        raise OSError(f"{out} is in use by another process: wait for it, or choose another "
                      "folder") from error
    except OSError as error:
        print(f"unguarded  the file system of {out} has no locks ({one_line(error)}): start no "
              "other run there")
    return lock


def earlier_state(out: Path, config: dict, may_change: set[str], resume: bool,
                  overwrite: bool) -> dict | None:
    """What to resume from, or None. config: the settings of now; may_change: which of them may
    differ from the run's.

    FileExistsError: a run is there and neither flag was given. ValueError: it was made with other
    settings, or is damaged."""
    traces = [name for name in RUN_FILES if (out / name).exists()]
    if traces and not resume and not overwrite:
        raise FileExistsError(f"{out} already has a {traces[0]}: --resume continues its run, "
                              "--overwrite replaces it")
    if resume and "adapter.pt" in traces and "state.pt" not in traces:
        raise FileExistsError(f"{out} has an adapter.pt but no state.pt to resume from: "
                              "--overwrite starts anew")
    if not resume or "state.pt" not in traces:
        return None
    state = load(out / "state.pt", STATE)
    changes = {}
    for name, value in config.items():
        before = state["config"].get(name)
        if before != value:
            changes[name] = f"{name} was {before}, is {value}"
    refused = [text for name, text in changes.items() if name not in may_change]
    if refused:
        raise ValueError(f"{out} cannot be resumed with other arguments: {'; '.join(refused)}. "
                         "Use --out for a new run")
    for text in changes.values():
        say(f"changed    {text}")
    return state


def remove_stale(out: Path) -> None:
    """Delete what an earlier run left in `out` and the new one would not replace at once."""
    for name in ("adapter.pt", "state.pt", "log.jsonl", "evaluation.json", "samples/step_*.png"):
        for path in out.glob(name):
            path.unlink()


@contextlib.contextmanager
def noting_signals() -> Iterator[list[int]]:
    """Within it, a first Ctrl-C, SIGTERM or SIGHUP (a connection that closes) only goes into the
    list, for a loop to stop between two steps; a second one does what it always does. Outside the
    main thread Python cannot listen, and nothing changes."""
    noted = []

    def note(number: int, frame: object) -> None:
        noted.append(number)
        signal.signal(number, usual[number])

    with handling_signals(note, signal.SIGINT, signal.SIGTERM, HANGUP) as usual:
        yield noted


@contextlib.contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Around what needs much memory. OSError, with `advice`, where there is not enough of it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch's own OutOfMemoryError is a RuntimeError
        text = one_line(error)
        named = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not named and "allocate memory" not in text:  # the CPU's allocator has no error class
            raise
        raise OSError(f"out of memory ({text}): {advice}") from error
