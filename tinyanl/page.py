"""The page to watch a run on: runs/NAME/index.html, one static file that train rewrites with every
save.

It shows the filmstrip, the latest grid, the loss curves, the settings, the time that is left, and
the commands that come next. Nothing is loaded from elsewhere, and no script runs; while the run
goes on the browser is told to look again every half minute.
"""
from html import escape

WIDTH, HEIGHT = 640, 260  # of the chart, in pixels
LEFT, BOTTOM, TOP, RIGHT = 60, 40, 15, 15  # its margins
COLOURS = {"training": "#1f77b4", "held_out": "#d62728"}
LEGEND = {"training": "training pictures", "held_out": "held-out pictures"}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em;
       color: #222; background: #fff; }
img { max-width: 100%; min-width: 50%; image-rendering: pixelated; }
pre { background: #f4f4f4; padding: .7em; white-space: pre-wrap; }
td { padding-right: 2em; }
"""


def page(title: str, step: int, steps: int, seconds_left: float | None, grid: str,
         log: list[dict], settings: dict[str, object], commands: dict[str, str]) -> str:
    """The page as text. seconds_left: None where that is not known; grid: the latest picture,
    relative to the page; log: rows of "step", "training" and "held_out"; settings: name -> value;
    commands: what one does -> its command line."""
    is_running = step < steps
    refresh = '<meta http-equiv="refresh" content="30">' if is_running else ""
    rows = "\n".join(f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>"
                     for name, value in settings.items())
    lines = "\n".join(f"<p>{escape(what)}</p>\n<pre>{escape(command)}</pre>"
                      for what, command in commands.items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{refresh}
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p>{escape(status(step, steps, seconds_left))}</p>
<h2>Samples by step</h2>
<p>Left, held-out pictures; each row goes on with what the model paints after that picture, from one
fixed noise.</p>
<img src="filmstrip.png?{step}" alt="samples of one seed and condition per row, by step">
<h2>The latest samples</h2>
<p>Above, the held-out pictures; below, the samples after them.</p>
<img src="{escape(grid)}" alt="the latest grid of samples">
<h2>Loss</h2>
{loss_chart(log)}
<h2>Settings</h2>
<table>
{rows}
</table>
<h2>Next</h2>
{lines}
</body>
</html>
"""


def status(step: int, steps: int, seconds_left: float | None) -> str:
    """How far the run is, in a sentence."""
    if step >= steps:
        return f"All {steps} steps are done."
    if seconds_left is None:
        return f"Step {step} of {steps}."
    minutes = max(1, round(seconds_left / 60))
    unit = "minute" if minutes == 1 else "minutes"
    return f"Step {step} of {steps}; about {minutes} {unit} left at this pace."


def loss_chart(log: list[dict]) -> str:
    """The loss curves as an inline SVG, with axes and a legend."""
    if not log:
        return "<p>There is no loss yet.</p>"
    last_step = max(row["step"] for row in log)
    values = [row[name] for row in log for name in LEGEND]
    tick = tick_size(max(values) - min(values))
    low = min(values) // tick * tick
    high = (max(values) // tick + 1) * tick

    def x(step: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last_step

    def y(loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low)

    parts = [f'<svg width="{WIDTH}" height="{HEIGHT}" font-size="13" role="img" '
             'aria-label="loss by step">']
    for i in range(round((high - low) / tick) + 1):
        loss = low + i * tick
        parts.append(line(LEFT, y(loss), WIDTH - RIGHT, y(loss), "#ddd"))
        parts.append(text(LEFT - 8, y(loss) + 4, f"{loss:.4g}", "end"))
    for i in range(5):
        step = last_step * i // 4
        parts.append(line(x(step), HEIGHT - BOTTOM, x(step), HEIGHT - BOTTOM + 5, "#888"))
        parts.append(text(x(step), HEIGHT - BOTTOM + 19, str(step), "middle"))
    parts.append(line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "#888"))
    parts.append(text((LEFT + WIDTH) / 2, HEIGHT - 4, "step", "middle"))
    for i, name in enumerate(LEGEND):
        points = " ".join(f"{x(row['step']):.1f},{y(row[name]):.1f}" for row in log)
        colour = COLOURS[name]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" '
                     'stroke-width="2"/>')
        parts += [f'<circle cx="{x(row["step"]):.1f}" cy="{y(row[name]):.1f}" r="2.5" '
                  f'fill="{colour}"/>' for row in log]
        height = TOP + 14 + 18 * i
        parts.append(line(WIDTH - 170, height - 4, WIDTH - 145, height - 4, colour))
        parts.append(text(WIDTH - 138, height, LEGEND[name], "start"))
    return "\n".join([*parts, "</svg>"])


def tick_size(spread: float) -> float:
    """A round number (1, 2 or 5 times a power of ten) that divides `spread` into 3 to 8 parts."""
    power = 1e-4
    while spread > 8 * power:
        power *= 10
    smaller = [power / 5, power / 2, power]
    return next(size for size in smaller if spread <= 8 * size)


def line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return (f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
            'stroke-width="1.5"/>')


def text(x: float, y: float, words: str, anchor: str) -> str:
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#444">'
            f'{escape(words)}</text>')
