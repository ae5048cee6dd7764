"""How every command ends: mistakes, Ctrl-C and other signals, readers that leave, full disks."""

import errno
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from commands import one_line

from tinyanl import runs
from tinyanl.options import add_options, option

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Tried:
    where: Path = option(help="a place")
    rates: tuple[float, ...] = option((0.5,), help="some numbers")
    words: tuple[str, ...] | None = option(None, help="some words")
    n: int | None = option(None, help="a number")
    on: bool = option(False, help="a switch")


def test_a_field_is_a_flag_and_a_tuple_takes_several_values(capsys):
    parser = add_options(runs.command("tried", ""), Tried)
    parsed = Tried(**vars(parser.parse_args(["--where", "x"])))
    assert parsed == Tried(Path("x"), (0.5,), None, None, False)
    words = ["--where", "x", "--rates", "0", "0.3", "--words", "a b", "c", "--n", "3", "--on"]
    parsed = Tried(**vars(parser.parse_args(words)))
    assert parsed == Tried(Path("x"), [0.0, 0.3], ["a b", "c"], 3, True)
    said = parser.format_help()
    assert "some numbers (default 0.5)" in said and "a number\n" in said
    for mistake in [], ["--where", "x", "--rates"], ["--where", "x", "--rates", "many"]:
        one_line(parser.parse_args, mistake, capsys)


@dataclass(frozen=True, kw_only=True)
class TriedMore(Tried):
    first: int = option(1, help="a field of its own")


def test_flags_that_are_inherited_come_last():
    said = add_options(runs.command("tried", ""), TriedMore).format_help()
    assert said.index("--first") < said.index("--where") < said.index("--rates")


def ending_with(work, stopped=None):
    """A command whose work is `work`."""

    def main(argv):
        parser = runs.command("tried", "A command to try.")
        with runs.mistakes_in_one_line(parser, **({"stopped": stopped} if stopped else {})):
            work()

    return main


def failing(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    "error", [ValueError("a value"), FileNotFoundError("a file"), ModuleNotFoundError("a module")]
)
def test_a_mistake_is_one_line_and_exit_2(error, capsys):
    assert one_line(ending_with(failing(error)), [], capsys) == f"python -m tinyanl.tried: {error}"


def test_a_mistake_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        ending_with(failing(ZeroDivisionError()))([])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_one_line_and_exit_130_and_handlers_come_back(number, capsys):
    before = signal.getsignal(number)
    said = one_line(ending_with(lambda: signal.raise_signal(number)), [], capsys, code=130)
    assert said == "python -m tinyanl.tried: stopped: nothing was kept"
    assert signal.getsignal(number) == before
    said = one_line(
        ending_with(lambda: signal.raise_signal(number), "so it goes"), [], capsys, code=130
    )
    assert said == "python -m tinyanl.tried: so it goes"
    with_words = failing(KeyboardInterrupt("two pictures are kept"))
    assert "two pictures are kept" in one_line(ending_with(with_words), [], capsys, code=130)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        ending_with(lambda: signal.raise_signal(signal.SIGHUP))([])
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_thread_may_run_a_command():
    worked = []
    thread = threading.Thread(target=ending_with(lambda: worked.append(True)), args=([],))
    thread.start()
    thread.join()
    assert worked == [True]


PRINTING = """
from tinyanl.runs import command, mistakes_in_one_line
with mistakes_in_one_line(command("tried", "")):
    for i in range(LINES):
        print("line", i)
"""


@pytest.mark.parametrize("what", ["a few lines", "many lines", "tinyanl.weights"])
def test_a_reader_that_leaves_is_no_traceback(what):
    """As with `| head -0`. A few lines are still in the buffer of Python when the work is done."""
    lines = {"a few lines": "9", "many lines": "99_999"}
    script = ["-c", PRINTING.replace("LINES", lines[what])] if what in lines else ["-m", what]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, *script], stdout=writer, stderr=subprocess.PIPE, text=True, cwd=HERE.parent
    )
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode in (141, -signal.SIGPIPE)


@pytest.mark.parametrize(
    "number, remedy",
    [
        (errno.ENOSPC, "Make room"),
        (errno.EDQUOT, "Make room"),
        (errno.EIO, "Mend that"),
        (errno.EROFS, "Mend that"),
    ],
)
@pytest.mark.parametrize("content", ["text", {"x": torch.zeros(3)}], ids=["text", "tensors"])
def test_make_room_is_said_where_the_disk_is_full(number, remedy, content, tmp_path, monkeypatch):
    (tmp_path / "kept").write_bytes(b"old")

    def no_sync(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", no_sync)
    with pytest.raises(OSError, match=f"{os.strerror(number)}.*before is whole. {remedy}"):
        runs.save(content, tmp_path / "kept")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("kept", b"old")]


@pytest.mark.skipif(runs.fcntl is None, reason="Windows has no such locks")
@pytest.mark.parametrize(
    "number, is_held",
    [
        (errno.ENOSYS, False),
        (errno.ENOLCK, False),
        (errno.EOPNOTSUPP, False),
        (errno.EAGAIN, True),
        (errno.EACCES, True),
    ],
)
def test_a_file_system_without_locks_is_said_and_used(
    number, is_held, tmp_path, monkeypatch, capsys
):
    def lock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(runs.fcntl, "lockf", lock)
    if is_held:
        with pytest.raises(OSError, match="in use by another process"):
            runs.claim(tmp_path)
    else:
        runs.claim(tmp_path).close()
        assert os.strerror(number) in capsys.readouterr().out
