"""Plots of what gpu_acceptance.py measured.

python benchmarks/gpu_plots.py docs/kernels/gpu-h100.json docs/kernels
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from attnserve_proto.commands import Parser, values
from matplotlib import pyplot

# Okabe and Ito's colours, as in kernels_plots.py; PyTorch's are dashed.
STYLES = {
    "flash": ("#009E73", "s", "-"),
    "cudnn": ("#D55E00", "D", "-"),
    "fused": ("#CC79A7", "v", "-"),
    "blocked": ("#0072B2", "^", "-"),
    "torch_flash": ("#009E73", "o", "--"),
    "torch_cudnn": ("#D55E00", "o", "--"),
    "torch_efficient": ("#000000", "o", "--"),
    "torch_flex": ("#999999", "P", "--"),
}


def draw(figures: dict[str, Any], folder: Path) -> None:
    """Time over length, a panel per model."""
    rows = figures["speed"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    columns = 3
    lines = -(-len(models) // columns)
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(5 * columns, 4 * lines), layout="constrained", squeeze=False
    )
    for axes, model in zip(grid.flat, models, strict=False):
        own = [row for row in rows if row["model"] == model]
        for name, (colour, marker, style) in STYLES.items():
            points = [(r["seq_len"], r["median_ms"]) for r in own if r["contender"] == name]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    color=colour, marker=marker, linestyle=style, label=name,
                )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        lengths = sorted({row["seq_len"] for row in own})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=45)
        axes.set_title(model)
        axes.set_xlabel("sequence length")
        axes.set_ylabel("time, ms")
        axes.grid(visible=True, which="major", alpha=0.3)
        axes.legend(fontsize="small")
    for axes in grid.flat[len(models) :]:
        axes.set_visible(False)
    figure.suptitle(f"{figures['device']}, ONNX Runtime {figures['onnxruntime']}")
    figure.savefig(folder / "gpu.png", dpi=80)
    pyplot.close(figure)


def main() -> int:
    """Read the figures, draw them."""
    options = _parser().parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    draw(json.loads(options.figures.read_text()), options.folder)
    return 0


def _parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("figures", type=values.path, help="JSON of gpu_acceptance.py")
    parser.add_argument("folder", type=values.path, help="where to put the plot")
    return parser


if __name__ == "__main__":
    sys.exit(main())
