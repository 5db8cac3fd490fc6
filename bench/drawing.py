"""The style of all figures, here and in study/: transparent, to be read on light pages and on dark ones."""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

GREY, BLUE, ORANGE = "#808890", "#3f8cff", "#e8762c"
plt.rcParams.update(
    {
        **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], GREY),
        **dict.fromkeys(["axes.spines.top", "axes.spines.right", "legend.frameon"], False),
        "axes.grid": True,
        "grid.color": GREY,
        "grid.alpha": 0.25,
        "savefig.transparent": True,
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "roe",  # the same file from the same data
        "font.size": 10,
        "figure.constrained_layout.use": True,
    }
)


def save(figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
