"""Shared by the tests of command lines."""
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
