"""What every chapter shows pictures with: a titled figure of a grid, enlarged, its rows and columns
labelled."""

import matplotlib.pyplot as plt
from torch import Tensor
from torchvision.utils import make_grid


def pictures(
    x: Tensor, title: str, columns: int = 8, heads=(), rows=(), inches: float = 1.0
) -> None:
    """Show x (N 3 H W) in [-1, 1], `columns` to a row, each `inches` wide. heads: over the columns,
    rows: left of the rows."""
    height, width = x.shape[-2] + 2, x.shape[-1] + 2  # with the frame of make_grid
    grid = make_grid((x.float().clamp(-1, 1) + 1) / 2, nrow=columns, pad_value=1).permute(
        1, 2, 0
    )  # H' W' 3
    lines = -(-len(x) // columns)
    _, axes = plt.subplots(
        figsize=(inches * min(columns, len(x)) + 0.9 * bool(rows), inches * lines + 0.6)
    )
    axes.imshow(grid, interpolation="nearest")
    axes.set_title(title, fontsize=10, pad=18 if heads else 6)
    axes.set_xticks([(i + 0.5) * width for i in range(len(heads))], heads, fontsize=8)
    axes.set_yticks([(i + 0.5) * height for i in range(len(rows))], rows, fontsize=8)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    plt.show()
