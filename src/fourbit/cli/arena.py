"""`fourbit arena ANSWERS ANSWERS... --votes FILE --raters NAMES`: people as the judges of answers."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from fourbit.cli import output
from fourbit.errors import InputError, MissingExtra

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fourbit.evaluate.arena.live import Panel
    from fourbit.evaluate.arena.pairs import PairSet
    from fourbit.evaluate.arena.store import Store

__all__ = ["arena"]

LONGEST_NAME = 40

_BEGIN = "give files of answers, or --live, to begin"


def arena(
    votes: Annotated[
        Path,
        typer.Option(help="Where the votes are kept, an SQLite file. Where it exists already, it is gone on with."),
    ],
    answers: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ANSWERS...]",
            help="Two or more files of `fourbit generate`, one for each system, as FILE or NAME=FILE; none goes on with"
            " what is in --votes.",
        ),
    ] = None,
    raters: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Who votes; a link is made for each. Further ones may be added."),
    ] = None,
    raters_per_pair: Annotated[
        int | None, typer.Option(metavar="N", help="How many raters vote on each pair. Default: all of them.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="Compare each system with this one, by its name or file. Default: all with all."),
    ] = None,
    questions: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="The prompts, for answers that do not hold them: a file, vicuna, or openassistant."
        ),
    ] = None,
    common: Annotated[bool, typer.Option("--common", help="Take only the prompts that all systems answer.")] = False,
    live: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]MODEL[@URL]",
            help="In place of files: a system that answers what raters type. A folder of a model or adapter, or a name"
            " at an OpenAI-compatible API. Given twice or more.",
        ),
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="The API of --live without @URL, such as http://localhost:8000/v1.")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="The environment variable with the key of the API.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="The most tokens of an answer of --live.")] = 512,
    temperature: Annotated[float, typer.Option(help="Of the answers of --live.")] = 0.7,
    host: Annotated[str, typer.Option(help="The address to listen on; 127.0.0.1 is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on; 0: any that is free.")] = 8765,
    url: Annotated[
        str | None, typer.Option(help="What the links begin with, where a proxy stands before this machine.")
    ] = None,
    new_links: Annotated[
        bool, typer.Option("--new-links", help="Replace all links; the old ones work no more.")
    ] = False,
    export: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the votes as ratings, one JSON record each, and end.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Start nothing; only say what there is to vote on.")
    ] = False,
    as_json: output.AsJson = False,
) -> None:
    """Let people compare anonymous answers in the browser.

    A link is printed for each rater, and one for whoever organises it. Every vote is on the disk before the next pair
    is shown. Ctrl-C ends it, and the same command goes on, with the same links. What --export writes is for
    `fourbit elo` and `fourbit agreement`.
    """
    with output.result(as_json) as show:
        if export is not None:
            _export(votes, export, show, also=answers or live or raters or new_links or dry_run)
            return
        given = _given(answers or [], live or [], base_url, reference, questions, common)
        names = _names(raters)
        if raters_per_pair is not None and raters_per_pair < 1:
            raise InputError(f"--raters-per-pair is {raters_per_pair}; it must be 1 or more.")
        if dry_run:
            _look(votes, given, names, raters_per_pair, show)
            return
        _check_url(url)
        _check_extra()
        from fourbit.serve.arena import build_app
        from fourbit.serve.run import address_of, is_local, listen, serve

        with contextlib.ExitStack() as stack:
            listening = stack.enter_context(listen(host, port))
            _check_known(votes, given)
            panel = _panel(live or [], base_url, api_key_env, max_tokens, temperature)
            store = stack.enter_context(_open(votes, given, names, new_links))
            keys = _keys(store, (url or address_of(listening)).rstrip("/"), raters_per_pair)
            for sentence in [] if given is None else given.sentences:
                _say(sentence)
            if not is_local(listening):
                _say(
                    "Whoever reaches this machine and has a link can vote, and what is sent is not encrypted; outside a"
                    " network that you trust, put a server with TLS before it."
                )
            show(keys, lambda: _links(keys))
            serve(build_app(store, raters_per_pair=raters_per_pair, panel=panel), listening)
            count = store.vote_count
            _say(f"Stopped. {count:,} {'vote is' if count == 1 else 'votes are'} in {votes}; the same command goes on.")


def _given(
    answers: Sequence[str],
    live: Sequence[str],
    base_url: str | None,
    reference: str | None,
    questions: str | None,
    common: bool,
) -> PairSet | None:
    """What the command names to be compared; None where it names nothing."""
    from fourbit.evaluate.arena.live import read_live
    from fourbit.evaluate.arena.pairs import PairSet, plan_pairs

    if answers and live:
        raise InputError("Answers come out of files or of running models; leave out one of ANSWERS and --live.")
    if base_url is not None and not live:
        raise InputError("--base-url is for running models; name them with --live.")
    if (reference or questions or common) and not answers:
        raise InputError("--reference, --questions and --common are for files of answers; give these, too.")
    if live:
        return PairSet(tuple(one.name for one in read_live(live, base_url)), live=True)
    return plan_pairs(answers, reference=reference, questions=questions, common=common) if answers else None


def _names(raters: str | None) -> list[str]:
    if raters is None:
        return []
    names = [name.strip() for name in raters.split(",")]
    for name in names:
        if not re.fullmatch(rf"[\w.\-][\w.\- ]{{0,{LONGEST_NAME - 1}}}", name):
            raise InputError(
                f"--raters has the name {name!r}; a name has 1 to {LONGEST_NAME} letters, digits, spaces and . _ -, and"
                " commas stand between names."
            )
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"--raters names {twice[0]} twice; give each rater a name of their own.")
    return names


def _check_url(url: str | None) -> None:
    parts = urlsplit(url or "http://host")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
        raise InputError(f"--url is {url!r}; write it as in https://arena.example.org, without a path.")


def _check_extra() -> None:
    try:
        import fourbit.serve.arena
        import fourbit.serve.run  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("fourbit"):
            raise
        raise MissingExtra(f"The arena needs {error.name}; install it with `pip install 'fourbit[serve]'`.") from error


def _open(votes: Path, given: PairSet | None, names: Sequence[str], new_links: bool) -> Store:
    """The votes, settled. No file is left of a command that is refused.

    Raises:
        InputError: the file has votes on something else, or nothing says what is compared, or by whom.
    """
    from fourbit.evaluate.arena.store import Store

    nobody = InputError("Nobody is to vote; name the raters, as in --raters anna,ben.")
    if not votes.exists():
        if given is None:
            raise InputError(f"{votes} does not exist; {_BEGIN}.")
        if not names:
            raise nobody
    store = Store(votes, make=given is not None)
    try:
        if given is not None:
            store.settle(given)
        if store.is_new:
            raise InputError(f"{votes} holds nothing to vote on; {_BEGIN}.")
        store.add_raters(names, new_links=new_links)
        if not store.raters:
            raise nobody
    except BaseException:
        store.close()
        raise
    return store


def _check_known(votes: Path, given: PairSet | None) -> None:
    """Refuse votes on something else, before models are loaded."""
    from fourbit.evaluate.arena.store import Store

    if not votes.exists():
        return
    with Store(votes) as store:
        if given is not None and not store.is_new:
            store.check(given)
        elif store.live and given is None:
            named = " ".join(f"--live {name}=…" for name in store.systems)
            raise InputError(f"{votes} has votes on models that run; name them again, as in {named}.")


def _panel(
    live: Sequence[str], base_url: str | None, api_key_env: str | None, max_tokens: int, temperature: float
) -> Panel | None:
    from fourbit.evaluate.arena.live import Panel, read_live

    if not live:
        return None
    systems = read_live(live, base_url)
    return Panel.load(systems, api_key_env=api_key_env, max_tokens=max_tokens, temperature=temperature, say=_say)


def _export(votes: Path, target: Path, show: output.Show, *, also: Any) -> None:
    from fourbit.evaluate.arena.store import Store
    from fourbit.evaluate.arena.votes import export_votes

    if also:
        raise InputError("--export writes the votes that are there, and ends; leave out what is for voting.")
    if target.resolve() == votes.resolve():
        raise InputError(f"{target} would be written over the votes themselves; choose another output.")
    with Store(votes) as store:
        found = store.votes()
    if not found:
        raise InputError(f"{votes} has no votes yet, so that there is nothing to write.")
    export_votes(found, target)
    keys = {"votes": str(votes), "output": str(target), "ratings": len(found), "raters": len({v.rater for v in found})}
    facts = {"ratings": f"{len(found):,} by {keys['raters']:,}", "to rank": f"fourbit elo {target}"}
    if len({vote.rater for vote in found}) > 1:
        facts["to compare raters"] = f"fourbit agreement {target}"
    show(keys, lambda: output.facts(str(target), facts))


def _look(
    votes: Path, given: PairSet | None, names: Sequence[str], raters_per_pair: int | None, show: output.Show
) -> None:
    """Show what there would be to vote on, and write nothing."""
    from fourbit.evaluate.arena.store import Store

    known, people, settled = 0, list(names), False
    if votes.exists():
        with Store(votes) as store:
            known, people, settled = store.vote_count, sorted({*names, *store.raters}), not store.is_new
            if given is not None and settled:
                store.check(given)
            systems, live, prompts = store.systems, store.live, store.prompt_count
            pairs = sum(store.pairs_by_systems().values())
    if not settled:
        if given is None:
            raise InputError(f"{votes} {'holds nothing to vote on' if votes.exists() else 'does not exist'}; {_BEGIN}.")
        systems, live, prompts, pairs = given.systems, given.live, given.prompts, len(given.pairs)
    each = len(people) if raters_per_pair is None else min(raters_per_pair, len(people))
    keys = {
        "votes": str(votes),
        "systems": list(systems),
        "live": live,
        "prompts": prompts,
        "pairs": pairs,
        "raters": people,
        "votes_wanted": None if live else pairs * each,
        "already": known,
        "dry_run": True,
    }
    facts = {"systems": ", ".join(systems), "raters": ", ".join(people) or "nobody yet; name them with --raters"}
    if not live:
        facts |= {"pairs": f"{pairs:,} on {prompts:,} prompts", "raters per pair": f"{each:,}"}
        facts["votes wanted"] = f"{pairs * each:,}" + (f"; {known:,} are there already" if known else "")
    show(keys, lambda: output.facts(f"{votes} would be", facts))


def _keys(store: Store, base: str, raters_per_pair: int | None) -> dict[str, Any]:
    pairs = sum(store.pairs_by_systems().values())
    return {
        "votes": str(store.path),
        "systems": list(store.systems),
        "live": store.live,
        "pairs": pairs,
        "already": store.vote_count,
        "raters_per_pair": raters_per_pair,
        "raters": {name: f"{base}/rate/{token}" for name, token in store.raters.items()},
        "organiser": f"{base}/organise/{store.organiser}",
        "dry_run": False,
    }


def _links(keys: Mapping[str, Any]) -> RenderableType:
    what = "answers made while raters ask" if keys["live"] else f"{keys['pairs']:,} pairs"
    title = f"{', '.join(keys['systems'])}: {what}; {keys['already']:,} votes so far. Ctrl-C ends it."
    return output.facts(title, {**keys["raters"], "(the organiser)": keys["organiser"]})


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
