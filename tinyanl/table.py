"""Rows of figures as a table in Markdown.

Copy this file alone: it needs nothing. Usage:

    from table import table
    print(table([{"rate": 0.0, "FID": 12.3456}, {"rate": 0.5, "samples": 512}]))
"""


def table(rows: list[dict]) -> str:
    """Rows -> lines of a table, with a column for each name in any of them, in the order in which
    the names first come. Floats have three digits; what a row lacks, or is None, is left empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names)]
    for row in rows:
        lines.append([cell(row.get(name)) for name in names])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: object) -> str:
    """How a figure is shown."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)
