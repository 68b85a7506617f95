"""A folder of models to be made into a ranking and a page about it, one step after the other, each resumable."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fourbit import __version__
from fourbit.errors import InputError, OutputExists
from fourbit.evaluate.agreement import Agreement, measure_agreement
from fourbit.evaluate.answers import System, read_systems, same_prompts, unanswered
from fourbit.evaluate.compare.contenders import Contender, find_contenders
from fourbit.evaluate.compare.report import Shown, write_report
from fourbit.evaluate.judge.job import Job as Judging
from fourbit.evaluate.judge.job import Judged, check_terms
from fourbit.evaluate.judge.money import Prices
from fourbit.evaluate.judge.requests import Settings
from fourbit.evaluate.judge.summary import summarize
from fourbit.evaluate.matches import collect
from fourbit.evaluate.ranking import Ranking
from fourbit.evaluate.raters import read_raters
from fourbit.evaluate.ratings import Rating
from fourbit.evaluate.tournament import elo
from fourbit.files import replace_file
from fourbit.generate import Origin, Sampling
from fourbit.generate.job import Job as Generating
from fourbit.generate.prompts import read_prompts

__all__ = ["Comparison", "Jury", "Weights"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Weights:
    """How models are loaded; see `fourbit.generate.Origin`."""

    format: str | None = None
    dtype: str | None = None
    chat_template: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Jury:
    """Who judges, and how; see `fourbit.evaluate.judge.job.Job`."""

    settings: Settings
    mode: str = "verdict"
    reference: str | None = None
    prompt: Path | None = None
    prices: Prices = field(default_factory=Prices)
    max_cost: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Everything that is to be done, checked as far as it can be without a model or a judge. Nothing is written yet.

    Attributes:
        source: where the prompts come from.
        contenders: see `find_contenders`.
        generating: how each model among them is to answer.
        prompts: how many.
        jury: None: no model judges.
        votes: ratings of people, between these contenders.
        common: judge only the prompts that all answer.
        sentences: what a person should know.
    """

    folder: Path
    source: str
    output: Path
    contenders: tuple[Contender, ...]
    generating: Mapping[str, Generating]
    prompts: int
    jury: Jury | None
    votes: Mapping[str, Sequence[Rating]]
    common: bool
    overwrite: bool
    sentences: tuple[str, ...]

    @classmethod
    def plan(
        cls,
        folder: Path,
        source: str,
        output: Path,
        *,
        sampling: Sampling,
        weights: Weights | None = None,
        batch_size: int = 8,
        system: str | None = None,
        with_base: bool = False,
        jury: Jury | None = None,
        votes: Sequence[str] = (),
        common: bool = False,
        overwrite: bool = False,
    ) -> Comparison:
        """Find the contenders, and check all that can be checked before hours are spent.

        Args:
            source: of the prompts; see `fourbit.generate.prompts.read_prompts`.
            output: a folder, of which the same settings may have made a part already.
            votes: files of ratings by people.
            overwrite: make answers and ratings anew that other settings made.

        Raises:
            InputError, OutputExists: says what is wrong.
        """
        if output.exists() and not output.is_dir():
            raise OutputExists(f"{output} is a file; the output is a folder.")
        if (output / "report.html").exists() and not _is_ours(output / "ranking.json"):
            raise OutputExists(f"{output} holds a report.html that was not written by this command; choose another.")
        contenders, sentences = find_contenders(folder, with_base=with_base, leave=[output, Path(source)])
        if jury is not None:
            _check_jury(jury, contenders)
        found = _check_votes(votes, [one.name for one in contenders], sentences)
        asked = read_prompts(source, system=system)
        there = read_systems([(one.name, one.answers) for one in contenders if one.answers is not None])
        if there:
            same_prompts([unanswered(source, asked), *there], common=common)
        loading = weights or Weights()
        generating = {}
        for one in contenders:
            if one.model is None:
                continue
            job = Generating.plan(
                Origin(model=one.model, adapter=one.adapter, **asdict(loading)),
                source,
                output / "answers" / f"{one.name}.jsonl",
                settings=sampling,
                batch_size=batch_size,
                system=system,
                overwrite=overwrite,
            )
            sentences += [f"{one.name}: {sentence}" for sentence in job.sentences]
            generating[one.name] = job
        planned = cls(
            folder=folder,
            source=source,
            output=output,
            contenders=tuple(contenders),
            generating=generating,
            prompts=len(asked),
            jury=jury,
            votes=found,
            common=common,
            overwrite=overwrite,
            sentences=tuple(sentences),
        )
        if not any(planned.to_answer.values()):
            planned.judging()  # which can be refused now, and not after models were loaded
        return planned

    @property
    def to_answer(self) -> dict[str, int]:
        """For each model, how many answers are missing."""
        return {name: len(job.prompts) - len(job.file.done) for name, job in self.generating.items()}

    @property
    def judgements(self) -> int:
        """How many pairs of answers the judge is shown, both orders counted, if all prompts are common to all."""
        if self.jury is None:
            return 0
        count = len(self.contenders)
        pairs = count * (count - 1) // 2 if self.jury.reference is None else count - 1
        return 2 * pairs * self.prompts

    def answer(self, progress: Progress) -> None:
        """Let one model after the other answer what it has not answered yet.

        Raises:
            InputError and its kin: a model cannot be loaded. What is answered stays.
        """
        for name, job in self.generating.items():
            loaded = job.load()
            job.run(loaded, progress=_rated(progress, name))
            del loaded
            gc.collect()  # before the next model is loaded beside it

    def judging(self) -> Judging | None:
        """The judge's work, once all answers are there; None where no model judges.

        Raises:
            InputError: the answers do not fit together.
        """
        if self.jury is None:
            return None
        return Judging.plan(
            [(one.name, self._answers(one)) for one in self.contenders],
            self.output / "ratings.jsonl",
            settings=self.jury.settings,
            mode=self.jury.mode,
            reference=self.jury.reference,
            prompt=self.jury.prompt,
            common=self.common,
            prices=self.jury.prices,
            max_cost=self.jury.max_cost,
            overwrite=self.overwrite,
        )

    def conclude(self, judged: Judged | None, *, progress: Progress = lambda what, done, total: None) -> dict[str, Any]:
        """Rank, and write `ranking.json` and `report.html`.

        Returns:
            what `ranking.json` holds.
        """
        raters: dict[str, list[Rating]] = {}
        summary = None
        if judged is not None and judged.written and self.jury is not None:
            raters = read_raters([(None, str(self.output / "ratings.jsonl"))])
            summary = {"judge": next(iter(raters)), "mode": self.jury.mode, "missing": judged.missing}
            summary |= summarize(judged.judgements, mode=self.jury.mode)
        groups = dict(raters) | ({"people": _all(self.votes)} if self.votes else {})
        rankings, notes = {}, []
        for title, ratings in groups.items():
            try:
                rankings[title] = elo(collect(ratings), progress=lambda done, total: progress("ranking", done, total))
            except InputError as error:
                notes.append(f"There is no ranking by {title}: {error}")
        agreement = self._agreement({**raters, **self.votes}, notes)
        systems = read_systems([(one.name, self._answers(one)) for one in self.contenders])
        record = self._record(systems, rankings, agreement, summary, notes)
        shown = Shown(self.contenders, systems, rankings, [*_all(raters), *_all(self.votes)], record)
        page = write_report(shown)
        # First what tells that the page is ours: after a kill between the two the same command goes on.
        replace_file(self.output / "ranking.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        replace_file(self.output / "report.html", page)
        return record

    def _answers(self, contender: Contender) -> Path:
        return contender.answers or self.generating[contender.name].file.path

    def _agreement(self, raters: Mapping[str, Sequence[Rating]], notes: list[str]) -> Agreement | None:
        if len(raters) < 2:
            return None
        try:
            return measure_agreement(raters)
        except InputError as error:
            notes.append(str(error))
            return None

    def _record(
        self,
        systems: Sequence[System],
        rankings: Mapping[str, Ranking],
        agreement: Agreement | None,
        summary: Mapping[str, Any] | None,
        notes: Sequence[str],
    ) -> dict[str, Any]:
        return {
            "written_by": f"fourbit {__version__}",
            "folder": str(self.folder),
            "prompts": {"source": self.source, "count": self.prompts},
            "systems": [
                {
                    "name": one.name,
                    "what": one.what,
                    "answers": str(self._answers(one)),
                    "settings": self.generating[one.name].file.settings if one.name in self.generating else None,
                    "answered": len(system.answers),
                    "empty": sum(not answered.text.strip() for answered in system.answers.values()),
                    "mean_words": sum(len(each.text.split()) for each in system.answers.values()) / len(system.answers),
                }
                for one, system in zip(self.contenders, systems, strict=True)
            ],
            "judge": None if summary is None else dict(summary),
            "rankings": {name: ranking.record() for name, ranking in rankings.items()},
            "agreement": None if agreement is None else asdict(agreement),
            "notes": [*self.sentences, *notes],
        }


def _check_jury(jury: Jury, contenders: Sequence[Contender]) -> None:
    check_terms(jury.mode, prompt=jury.prompt, reference=jury.reference, prices=jury.prices, max_cost=jury.max_cost)
    names = [one.name for one in contenders]
    if len(names) < 2:
        raise InputError(f"A judge compares, and there is one system only, {names[0]}; put another one beside it.")
    if jury.reference is not None and jury.reference not in names:
        raise InputError(f"The reference {jury.reference!r} is none of the systems; they are {', '.join(names)}.")


def _check_votes(votes: Sequence[str], names: Sequence[str], sentences: list[str]) -> dict[str, list[Rating]]:
    """Votes between the contenders, by rater; what is left out is said."""
    if not votes:
        return {}
    every = read_raters([(None, path) for path in votes])
    kept = {
        rater: [rating for rating in ratings if {rating.first, rating.second} <= set(names)]
        for rater, ratings in every.items()
    }
    left = sum(map(len, every.values())) - sum(map(len, kept.values()))
    others = {name for rating in _all(every) for name in (rating.first, rating.second)} - set(names)
    if not any(kept.values()):
        raise InputError(
            f"No vote of {', '.join(votes)} is about two of the systems {', '.join(names)}; the votes are about"
            f" {', '.join(sorted(others))}."
        )
    if left:
        sentences.append(f"{left:,} votes are left out, as they are about {', '.join(sorted(others))}.")
    return {rater: ratings for rater, ratings in kept.items() if ratings}


def _all(ratings: Mapping[str, Sequence[Rating]]) -> list[Rating]:
    return [replace(rating, rater=rater) for rater, found in ratings.items() for rating in found]


def _rated(progress: Progress, name: str) -> Callable[[int, int, float], None]:
    return lambda done, total, rate: progress(f"{name} answers, {rate:,.0f} tokens/s", done, total)


def _is_ours(path: Path) -> bool:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["written_by"]).startswith("fourbit")
    except (OSError, ValueError, KeyError, TypeError):
        return False
