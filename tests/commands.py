"""Shared by the tests of command lines and of pages in Markdown."""
import pytest


def one_line(main, argv, capsys, code: int = 2) -> str:
    """Run a command that must end with `code` and say one line on stderr: that line."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    err = capsys.readouterr().err
    lines = [line.rpartition("\r")[2].strip() for line in err.split("\n")]  # as a terminal shows it
    said = [line for line in lines if line and "%|" not in line]  # that is a progress bar
    assert stop.value.code == code and len(said) == 1 and "Traceback" not in err, err
    return said[0]


def flags(**values) -> list[str]:
    """The command line that gives these values: per_image=3 is --per-image 3."""
    words = []
    for name, value in values.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def section_of(text: str, title: str) -> str:
    """What stands under a heading, up to the next one."""
    return text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def table_lines(text: str) -> list[list[str]]:
    """The lines of all tables, as their cells."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|") and not line.startswith("| ---")
    ]
