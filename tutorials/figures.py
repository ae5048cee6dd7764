"""What every chapter shows pictures with: a titled figure of a grid, enlarged, its rows and columns
labelled."""

import matplotlib.pyplot as plt
from torch import Tensor
from torchvision.utils import make_grid

FRAME = 2  # pixels between two pictures of a grid


def pictures(
    x: Tensor, title: str, columns: int = 8, heads=(), rows=(), inches: float = 1.98
) -> None:
    """Show x (N 3 H W) in [-1, 1], `columns` to a row, each `inches` wide. heads: over the columns,
    rows: left of the rows.

    At 100 dots an inch the default shows each pixel of a picture of 64 as three by three dots: a
    whole number, so that none is wider than its neighbour and the file stays small."""
    columns = min(columns, len(x))
    lines = -(-len(x) // columns)
    height = x.shape[-2] + FRAME
    width = x.shape[-1] + FRAME
    grid = make_grid((x.float().clamp(-1, 1) + 1) / 2, nrow=columns, padding=FRAME, pad_value=1)
    grid = grid[:, 1:-1, 1:-1].permute(1, 2, 0)  # H' W' 3: half a frame around each picture
    figure = plt.figure(figsize=(inches * columns, inches * height / width * lines), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(grid, interpolation="nearest", aspect="auto")
    axes.set_title(title, fontsize=16, pad=28 if heads else 10)
    axes.set_xticks([(i + 0.5) * width for i in range(len(heads))], heads, fontsize=14)
    axes.set_yticks([(i + 0.5) * height for i in range(len(rows))], rows, fontsize=14)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    plt.show()
