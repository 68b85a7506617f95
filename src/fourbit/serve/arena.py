"""The arena in a browser: a page for raters, one for the organiser, and what the two ask for.

A link holds a token, and whoever has it is that rater. The pages send it as `Authorization: Bearer`, and there are no
cookies: so no other page in the same browser can vote, whatever it sends here. What a rater gets is made of a
`Showing`, which holds no system's name.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException as HttpError

from fourbit.errors import InputError
from fourbit.evaluate.arena.ballots import AlreadyVoted, Choice, NotYours, Showing
from fourbit.evaluate.arena.live import Panel, Unanswered
from fourbit.evaluate.arena.store import Store
from fourbit.evaluate.arena.survey import take_survey
from fourbit.evaluate.arena.votes import record
from fourbit.serve.guard import Guard
from fourbit.serve.markdown import render

__all__ = ["LONGEST_PROMPT", "build_app"]

LONGEST_PROMPT = 20_000
"""Characters that a rater may ask."""

_REST = 4.0
"""After a survey there is none for so many times its processor time, so that those who vote are not kept waiting."""

_LOG = logging.getLogger("fourbit.serve")
_PAGES = Path(__file__).with_name("pages")
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}


@dataclass
class _Arena:
    """What the routes work with.

    Attributes:
        asking: by rater, the answers that are being made.
        refusals: by rater, why the last ones were not.
        surveyed: the last survey, as JSON; `state` of the votes then, when it was made, and its processor time.
    """

    store: Store
    raters_per_pair: int | None
    panel: Panel | None
    asking: dict[str, asyncio.Task[Showing]] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    surveyed: dict[str, Any] = field(default_factory=dict)
    state: tuple[int, int] = (-1, -1)
    surveyed_at: float = 0.0
    took_s: float = 0.0
    surveying: asyncio.Lock = field(default_factory=asyncio.Lock)


class _Ballot(BaseModel):
    """A vote on what was shown.

    Attributes:
        ticket: of the showing.
        choice: see `Choice`.
        correct: whether it replaces the last vote.
    """

    ticket: str = Field(max_length=64)
    choice: Choice
    correct: bool = False


class _Question(BaseModel):
    """What a rater asks of two models."""

    prompt: str = Field(max_length=LONGEST_PROMPT)


def build_app(store: Store, *, raters_per_pair: int | None = None, panel: Panel | None = None) -> FastAPI:
    """The web application.

    Args:
        store: the votes, settled. It is the caller's to close.
        raters_per_pair: see `Store.next`.
        panel: what answers, for a store whose answers are made while people ask.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        if panel is not None:
            await panel.close()
        for task in arena.asking.values():
            task.cancel()

    app = FastAPI(title="fourbit arena", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    arena = app.state.arena = _Arena(store, raters_per_pair, panel)
    app.add_middleware(Guard)
    for error in (HttpError, RequestValidationError, InputError):
        app.add_exception_handler(error, _explain)
    for path in sorted(_PAGES.iterdir()):
        if path.suffix in (".css", ".js"):
            app.add_api_route(f"/{path.name}", functools.partial(_page, path.name), methods=["GET"])
    app.add_api_route("/rate/{token}", _rate, methods=["GET"])
    app.add_api_route("/organise/{token}", _organise, methods=["GET"])
    app.add_api_route("/api/next", _next, methods=["GET"])
    app.add_api_route("/api/last", _last, methods=["GET"])
    app.add_api_route("/api/vote", _vote, methods=["POST"], response_model=None)
    app.add_api_route("/api/ask", _ask, methods=["POST"])
    app.add_api_route("/api/survey", _survey, methods=["GET"])
    app.add_api_route("/api/votes.jsonl", _votes, methods=["GET"])
    return app


# pages


def _page(name: str, status: int = 200) -> Response:
    kind = _KINDS[Path(name).suffix]
    return Response(_read(name), status, media_type=f"{kind}; charset=utf-8")


@functools.cache
def _read(name: str) -> bytes:
    return (_PAGES / name).read_bytes()


def _rate(token: str, request: Request) -> Response:
    known = _arena(request).store.rater_of(token) is not None
    return _page("rate.html") if known else _page("unknown.html", 403)


def _organise(token: str, request: Request) -> Response:
    known = _arena(request).store.is_organiser(token)
    return _page("organise.html") if known else _page("unknown.html", 403)


async def _explain(request: Request, error: Exception) -> Response:
    """A sentence in JSON for the pages, and a page for people."""
    if isinstance(error, RequestValidationError):
        return JSONResponse({"error": "This is no request that the arena understands."}, 422)
    if isinstance(error, InputError):  # of the database: the disk is full, say
        _LOG.warning("%s", error)
        return JSONResponse({"error": "The arena cannot get at its votes. Please tell the organiser."}, 503)
    status = error.status_code if isinstance(error, HttpError) else 500
    if status == 404 and not request.url.path.startswith("/api/"):
        return _page("unknown.html", 404)
    return JSONResponse({"error": getattr(error, "detail", "")}, status, headers=getattr(error, "headers", None))


# who asks


def _arena(request: Request) -> _Arena:
    arena: _Arena = request.app.state.arena
    return arena


def _token(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _rater(request: Request) -> str:
    rater = _arena(request).store.rater_of(_token(request))
    if rater is None:
        raise HTTPException(401, "This link is not known here.", {"WWW-Authenticate": "Bearer"})
    return rater


def _check_organiser(request: Request) -> None:
    if not _arena(request).store.is_organiser(_token(request)):
        raise HTTPException(401, "This link is not known here.", {"WWW-Authenticate": "Bearer"})


Rater = Annotated[str, Depends(_rater)]
Known = Annotated[_Arena, Depends(_arena)]


# what a rater asks for


def _next(rater: Rater, arena: Known) -> dict[str, Any]:
    progress = arena.store.progress(rater, raters_per_pair=arena.raters_per_pair)
    found = {"rater": rater, "done": progress.done, "left": progress.left, "live": arena.panel is not None}
    task = arena.asking.get(rater)
    if task is not None and not task.done():
        return found | {"state": "answering"}
    showing = arena.store.next(rater, raters_per_pair=arena.raters_per_pair)
    if showing is not None:
        return found | {"state": "pair", "pair": _shown(showing)}
    if arena.panel is not None:
        return found | {"state": "ask", "refusal": arena.refusals.get(rater)}
    return found | {"state": "done"}


def _last(rater: Rater, arena: Known) -> dict[str, Any]:
    showing = arena.store.last(rater)
    if showing is None:
        raise HTTPException(404, "There is no vote yet.")
    return {"pair": _shown(showing)}


def _shown(showing: Showing) -> dict[str, Any]:
    texts = {"question": showing.question, "a": showing.first, "b": showing.second}
    return {
        "ticket": showing.ticket,
        "choice": showing.choice,
        "text": texts,
        "html": {name: render(text) for name, text in texts.items()},
    }


def _vote(ballot: _Ballot, rater: Rater, arena: Known) -> Response:
    take: Callable[[str, str, Choice], None] = arena.store.correct if ballot.correct else arena.store.vote
    try:
        take(rater, ballot.ticket, ballot.choice)
    except NotYours:
        raise HTTPException(404, "This pair was not shown to you.") from None
    except AlreadyVoted as error:
        # A browser that did not hear the answer sends the same again, and is told that it was heard.
        if error.choice != ballot.choice:
            sentence = f"You have voted on this pair already ({error.choice}), and that vote stands."
            return JSONResponse({"error": sentence, "choice": error.choice}, 409)
    return JSONResponse({"saved": ballot.choice})


async def _ask(question: _Question, rater: Rater, arena: Known) -> dict[str, Any]:
    if arena.panel is None:
        raise HTTPException(404, "No model is running here.")
    if not question.prompt.strip():
        raise HTTPException(422, "Type what the models are to be asked.")
    task = arena.asking.get(rater)
    if task is not None and not task.done():
        raise HTTPException(409, "Your last prompt is still being answered.")
    if await asyncio.to_thread(arena.store.next, rater) is not None:
        raise HTTPException(409, "Please vote on the answers to your last prompt first.")
    arena.refusals.pop(rater, None)
    prompt = question.prompt.encode("utf-8", "replace").decode().strip()
    task = arena.asking[rater] = asyncio.create_task(arena.panel.ask(arena.store, rater, prompt))
    task.add_done_callback(lambda done: _note_refusal(arena, rater, done))
    return {"state": "answering"}


def _note_refusal(arena: _Arena, rater: str, task: asyncio.Task[Showing]) -> None:
    error = None if task.cancelled() else task.exception()
    if error is not None:
        said = str(error) if isinstance(error, Unanswered) else "Something went wrong. Please tell the organiser."
        arena.refusals[rater] = said


# what the organiser asks for


async def _survey(request: Request, arena: Known) -> dict[str, Any]:
    _check_organiser(request)
    async with arena.surveying:  # one at a time, and none where nothing has changed
        if time.monotonic() - arena.surveyed_at >= _REST * arena.took_s:
            await asyncio.to_thread(_take_survey, arena)
        return arena.surveyed


def _take_survey(arena: _Arena) -> None:
    state, began = arena.store.state, time.thread_time()
    if state == arena.state:
        return
    survey = asdict(take_survey(arena.store, raters_per_pair=arena.raters_per_pair))
    arena.surveyed, arena.state = survey | {"counted_at": time.time()}, state
    arena.surveyed_at, arena.took_s = time.monotonic(), time.thread_time() - began


def _votes(request: Request, arena: Known) -> Response:
    _check_organiser(request)
    lines = "".join(json.dumps(record(vote), ensure_ascii=False) + "\n" for vote in arena.store.votes())
    name = f"{arena.store.path.stem}.jsonl".replace('"', "")
    headers = {"content-disposition": f'attachment; filename="{name}"'}
    return Response(lines, media_type="application/x-ndjson", headers=headers)
