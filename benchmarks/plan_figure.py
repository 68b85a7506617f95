"""The paper's memory figure, recounted: LLaMA 7B to 65B by part, and our own shapes beside it.

Figure 6 of arXiv:2305.14314 shows what finetuning LLaMA takes with one sequence of 512 tokens: NF4 weights, adapters of
rank 64 on every linear layer, paged optimizer. This draws the same from `fourbit.plan`, for one GPU, with the states of
the optimizer paged out, and writes docs/memory.png and the tables of docs/memory.md.

    python benchmarks/plan_figure.py [--docs FOLDER]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fourbit.memory.plan import Plan

ROOT = Path(__file__).parents[1]
PAPER = {"llama-7b": 5, "llama-13b": 9, "llama-33b": 21, "llama-65b": 40}
"""What each may take at most, 10^9 bytes: the bars of the design."""

OURS = ("tinyllama-1.1b", "llama-3.2-1b", "llama-3.2-3b", "qwen3-4b", "mistral-7b", "llama-3.1-8b")
KNOBS: dict[str, Any] = {
    "batch_size": 1,
    "sequence_length": 512,
    "rank": 64,
    "adapter_dtype": "bfloat16",
    "optimizer": "none",
    "device": "cuda",
}
COLOURS = {
    "weights_4bit": "#1a73e8",
    "scales": "#8ab4f8",
    "weights_16bit": "#c6dafc",
    "adapters": "#e8710a",
    "gradients": "#fbbc04",
    "activations": "#34a853",
    "logits": "#a8dab5",
    "workspace": "#5f6368",
    "slack": "#bdc1c6",
}
CARDS = (8, 16, 24, 48)
"""GB of common cards, drawn as lines."""

BEGIN, END = "<!-- written by benchmarks/plan_figure.py -->", "<!-- end -->"


def main() -> int:
    """Count, draw, write; the exit code is 1 if a shape takes more than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where memory.png and memory.md are")
    arguments = parser.parse_args()
    from fourbit.memory.plan import plan

    plans = {name: plan(name, **KNOBS) for name in (*PAPER, *OURS)}
    _draw(plans, arguments.docs / "memory.png")
    _write(_table(plans), arguments.docs / "memory.md")
    return int(any(plans[name].total_bytes > most * 1e9 for name, most in PAPER.items()))


def _draw(plans: dict[str, Plan], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    from fourbit.memory.plan import PARTS

    figure, both = pyplot.subplots(
        1, 2, figsize=(11, 4.8), dpi=120, layout="constrained", sharey=True, width_ratios=(4, 6)
    )
    for axes, names, title in zip(
        both, (tuple(PAPER), OURS), ("LLaMA, as in the paper's figure 6", "newer shapes"), strict=True
    ):
        bottoms = [0.0] * len(names)
        for part, colour in COLOURS.items():
            heights = [plans[name].parts[part] / 1e9 for name in names]
            axes.bar(names, heights, bottom=bottoms, color=colour, label=PARTS[part], width=0.7)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
        for index, total in enumerate(bottoms):
            axes.text(index, total + 0.5, f"{total:.1f}", ha="center", fontsize=9)
        for card in CARDS:
            axes.axhline(card, color="#9aa0a6", linewidth=0.8, linestyle=":")
        axes.set_title(title, loc="left", fontsize=11)
        axes.tick_params(axis="x", labelrotation=30, labelsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    both[0].set_ylabel("GB at the peak; dotted: 8, 16, 24, 48 GB")
    handles, labels = both[0].get_legend_handles_labels()
    both[1].legend(handles[::-1], labels[::-1], frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path, metadata={"Software": None})


def _table(plans: dict[str, Plan]) -> str:
    from fourbit.memory.plan import PARTS

    parts = [part for part in COLOURS if part != "logits"]
    lines = ["| GB | " + " | ".join(PARTS[part] for part in parts) + " | peak | with 32-bit states |"]
    lines.append("|---|" + "---:|" * (len(parts) + 2))
    for name, plan in plans.items():
        numbers = [plan.parts[part] / 1e9 for part in parts]
        numbers += [plan.total_bytes / 1e9, (plan.total_bytes + 8 * plan.trainable) / 1e9]
        lines.append(f"| {name} | {' | '.join(f'{number:.2f}' for number in numbers)} |")
    return "\n".join(lines)


def _write(table: str, path: Path) -> None:
    """Put the table between its marks."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
