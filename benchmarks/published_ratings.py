"""The numbers of the QLoRA paper's chatbot evaluation, recomputed from its released ratings: docs/chatbots.md.

    python benchmarks/published_ratings.py FOLDER     recomputes (a minute), then writes the page and its picture
    python benchmarks/published_ratings.py [--check]  writes the page from the stored numbers, or only checks it

FOLDER holds `pairwise` and `relative-gpt-3.5`: eval/ratings-gpt4/vicuna of github.com/artidoro/qlora.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "chatbots.md"
PICTURE = ROOT / "docs" / "chatbots.png"
NUMBERS = ROOT / "benchmarks" / "results" / "published_ratings.json"

SHARES = {
    "gpt4": ("GPT-4", None, None, 114.5),
    "65b-guanaco": ("Guanaco-65B", 96.7, 101.9, 99.3),
    "30b-guanaco": ("Guanaco-33B", 96.5, 99.2, 97.8),
    "vicuna-13b": ("Vicuna-13B", 91.2, 98.7, 94.9),
    "bard": ("Bard", 93.2, 96.4, 94.8),
    "13b-guanaco": ("Guanaco-13B", 87.3, 93.4, 90.4),
    "7b-guanaco": ("Guanaco-7B", 84.1, 89.8, 87.0),
    "65b-alpaca": ("Alpaca-65B", 63.0, 77.9, 70.7),
    "65b-flan": ("FLAN v2-65B", 37.0, 59.6, 48.4),
}
"""Printed shares of ChatGPT's score by the name in the files: ChatGPT shown first, the system shown first, both."""

MISPRINTED = {"30b-huggingchat": ("Open Assistant-33B", 91.2, 98.7, 94.9)}
"""A row that repeats another one's numbers."""

ELO = {
    "gpt4": 1348,
    "65b-guanaco": 1022,
    "30b-guanaco": 992,
    "vicuna-13b": 974,
    "gpt35": 966,
    "13b-guanaco": 916,
    "bard": 902,
    "7b-guanaco": 879,
}
"""The printed Elo column, GPT-4 as the judge."""

SHARE_TOLERANCE, ELO_TOLERANCE = 0.1, 4
NAMES = {name: row[0] for name, row in (SHARES | MISPRINTED).items()} | {"gpt35": "ChatGPT"}


def main(arguments: list[str]) -> int:
    """Recompute, write or check; returns the exit code."""
    if arguments and arguments != ["--check"]:
        found = measured(Path(arguments[0]))
        NUMBERS.write_text(json.dumps(found, indent=1) + "\n")
        draw(Path(arguments[0]))
    text = page(json.loads(NUMBERS.read_text()))
    if arguments == ["--check"]:
        if PAGE.exists() and PAGE.read_text() == text:
            return 0
        print("docs/chatbots.md is not what the numbers say; run `python benchmarks/published_ratings.py`.")
        return 1
    PAGE.write_text(text)
    return 0


def measured(folder: Path, *, samples: int = 1000) -> dict[str, Any]:
    """All numbers of the page."""
    from fourbit.evaluate import bradley_terry, elo, measure_agreement, measure_shares, read_ratings

    scores, pairs = read_ratings(folder / "relative-gpt-3.5"), read_ratings(folder / "pairwise")
    tables = {
        "500": elo(pairs, matches_per_order=500, samples=samples),
        "all": elo(pairs, samples=samples),
        "bradley-terry": bradley_terry(pairs, samples=samples),
    }
    agreement = measure_agreement({"gpt4": pairs}, samples=samples)
    (judge,) = agreement.raters
    assert judge.flips is not None
    return {
        "scores": len(scores),
        "scores_dropped": sum(rating.label == -1 for rating in scores),
        "pairs": len(pairs),
        "pairs_dropped": tables["all"].dropped,
        "shares": {
            share.model: [share.reference_first, share.model_first, share.mean, share.low, share.high]
            for share in measure_shares(scores, "gpt-3.5", samples=samples)
        },
        "elo": {name: {row.model: [row.elo, row.low, row.high] for row in table} for name, table in tables.items()},
        "untold": {row.model: list(row.untold) for row in tables["all"]},
        "shown_first": tables["all"].shown_first_share,
        "flips": [judge.flips.value, judge.flips.low, judge.flips.high, judge.flips.count],
        "prefers": [judge.prefers_first, judge.prefers_second],
    }


def draw(folder: Path) -> None:
    """The picture of the page."""
    from fourbit.evaluate import elo, read_ratings
    from fourbit.evaluate.picture import draw

    draw(elo(read_ratings(folder / "pairwise", names={name: NAMES[name] for name in ELO})), PICTURE)


def page(found: dict[str, Any]) -> str:
    """The page as the numbers have it."""
    return "\n".join([_opening(found), _shares(found), _elo(found), _judge(found)])


def _paragraph(text: str) -> str:
    """Words in lines as long as those of the other pages."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False) + "\n"


def _opening(found: dict[str, Any]) -> str:
    said = f"""The authors of QLoRA (arXiv 2305.14314) released what GPT-4 said of the answers to the 80 Vicuna
        questions: {found["scores"]:,} pairs of scores against ChatGPT ({found["scores_dropped"]} could not be
        parsed) and {found["pairs"]:,} verdicts between eight systems ({found["pairs_dropped"]} could not be
        parsed). This page says what comes of them with `fourbit elo`, beside what the paper prints. The same
        comparison is a test."""
    result = f"""**Reproduced:** every share of ChatGPT's score within
        {SHARE_TOLERANCE}, but for two misprints; the Elo column within {ELO_TOLERANCE} with 500 matches per order;
        its ranks with all matches. **Not reproduced:** the agreement with people, whose labels were not released
        with these files."""
    return "\n".join(
        [
            "# The paper's chatbot evaluation, recomputed\n",
            "Written by `python benchmarks/published_ratings.py FOLDER`; do not edit by hand.\n",
            _paragraph(said),
            _paragraph(result),
        ]
    )


def _shares(found: dict[str, Any]) -> str:
    lines = [
        "## Shares of ChatGPT's score\n",
        _paragraph(
            """`fourbit elo FOLDER/relative-gpt-3.5 --share-of gpt-3.5`: sums of scores, in percent of ChatGPT's sum;
            printed | recomputed."""
        ),
        "| system | ChatGPT shown first | system shown first | both | 95% interval |",
        "|---|---:|---:|---:|---|",
    ]
    for name, (*values, low, high) in found["shares"].items():
        shown, *printed = (SHARES | MISPRINTED).get(name, (name, None, None, None))
        cells = [
            f"{new:.1f}" if old is None else f"{old:.1f} \\| {new:.1f}"
            for old, new in zip(printed, values, strict=True)
        ]
        star = " *" if name in MISPRINTED or name == "gpt4" else ""
        lines.append(f"| {shown}{star} | {' | '.join(cells)} | {low:.1f}–{high:.1f} |")
    misprints = """\\* Misprints: the paper has GPT-4's two order columns in each other's place, and the row of Open
        Assistant repeats Vicuna's; the files have what is recomputed here. Rows with one number are not among those
        compared with the paper."""
    traps = """Two traps are in the files. In those of finetuned models the name has the systems in the order opposite
        to that of the presentation, and in the others in the same; and two systems that gave the same answer share
        its id. `fourbit elo` takes the order from the ids, by how many files speak for it
        ([identities.py](../src/fourbit/evaluate/identities.py))."""
    return "\n".join([*lines, "", _paragraph(misprints), _paragraph(traps)])


def _elo(found: dict[str, Any]) -> str:
    lines = [
        "## Elo\n",
        _paragraph(
            """`fourbit elo FOLDER/pairwise --matches-per-order 500`, then with all matches, then
            `--method bradley-terry`; 10,000 orders, K = 32, start 1000, with 95% bootstrap intervals over the 80
            prompts, which the paper does not give."""
        ),
        "| # | system | printed | 500 matches per order | all matches | Bradley–Terry |",
        "|---:|---|---:|---|---|---|",
    ]
    tables = [found["elo"][name] for name in ("500", "all", "bradley-terry")]
    for place, (name, printed) in enumerate(ELO.items(), start=1):
        cells = [f"{value:.0f} ({low:.0f}–{high:.0f})" for value, low, high in (table[name] for table in tables)]
        lines.append(f"| {place} | {NAMES[name]} | {printed} | {' | '.join(cells)} |")
    largest = max(abs(tables[0][name][0] - printed) for name, printed in ELO.items())
    higher = tables[1]["gpt4"][0] - ELO["gpt4"]
    order = list(ELO)
    after = {name: [o for o in found["untold"][name] if order.index(o) > order.index(name)] for name in order}
    alike = "; ".join(
        f"{NAMES[name]} and {', '.join(NAMES[other] for other in others)}" for name, others in after.items() if others
    )
    said = f"""With 500 matches per order the largest difference is {largest:.1f} points. So that is what the paper did:
        with all matches GPT-4 stands {higher:.0f} points higher than printed, as 500 matches are too few for a rating
        to arrive where it is going. Of the 28 pairs {sum(map(len, after.values()))} cannot be told apart with 80
        prompts: {alike}."""
    picture = "![Elo of the eight systems, and the points of each against each](chatbots.png)\n"
    return "\n".join([*lines, "", picture, _paragraph(said)])


def _judge(found: dict[str, Any]) -> str:
    value, low, high, count = found["flips"]
    first, second = found["prefers"]
    judge = f"""`fourbit agreement gpt4=FOLDER/pairwise`. The answer shown first takes {found["shown_first"]:.0%} of the
        points. Of {count:,} pairs of answers judged in both orders, GPT-4's verdict changes with the order in
        {value:.0%} ({low:.0%} to {high:.0%}); the answer shown first wins both times in {first:.0%}, the one shown
        second in {second:.0%}. Without both orders such a judge is not to be trusted."""
    people = """The paper's κ = 0.25 between GPT-4 and the majority of people, τ = 0.43 and ρ = 0.55 need the people's
        labels. With them it would be
        `fourbit agreement people=VOTES gpt4=FOLDER/pairwise --majority crowd=people/1,people/2,people/3`."""
    return "\n".join(["## The judge\n", _paragraph(judge), _paragraph(people)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
