"""Answers of models that run: what a rater types goes to two of them, and both answers are compared."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fourbit.errors import InputError
from fourbit.evaluate.arena.ballots import Showing
from fourbit.evaluate.arena.pairs import Pair
from fourbit.evaluate.arena.store import Store
from fourbit.evaluate.judge.endpoint import Address, Endpoint, Fatal, Refused, Transient
from fourbit.evaluate.judge.requests import Settings

if TYPE_CHECKING:
    from fourbit.generate import Loaded, Sampling

__all__ = ["Live", "Panel", "Respondent", "Unanswered", "read_live"]

TRIES = 3
"""How often a server is asked that fails for a moment."""

PAUSE_S = 1.0
"""Before the second time; before the third it is twice that."""


class Unanswered(Exception):
    """There is no pair of answers; the message is for the rater, and names no system."""


@dataclass(frozen=True)
class Live:
    """A system that runs.

    Attributes:
        name: what it is called.
        model: a folder, of a model or of an adapter on one, or the model's name at the server.
        url: of the server; None: the model is a folder.
    """

    name: str
    model: str
    url: str | None


def read_live(sources: Sequence[str], base_url: str | None) -> list[Live]:
    """Read what runs: [NAME=]MODEL[@URL].

    Args:
        sources: MODEL is a folder, or the model's name at the server with the given URL, or at `base_url`.

    Raises:
        InputError: fewer than two, two of one name, or a folder that is not there.
    """
    found: list[Live] = []
    for source in sources:
        name, equals, rest = source.partition("=")
        if not equals or "@" in name or not name or not rest:
            name, rest = "", source
        model, at, url = rest.rpartition("@")
        if not at or "://" not in url:
            model, url = rest, base_url or ""
        if not model:
            raise InputError(f"--live {source} names no model; give it as NAME=MODEL, or NAME=MODEL@URL.")
        if not url and not Path(model).is_dir():
            raise InputError(f"--live {source}: {model} is no folder; for a model behind a server pass --base-url too.")
        name = name or Path(model).name
        if any(other.name == name for other in found):
            raise InputError(f"Two systems are called {name!r}; name one of them, as in --live other={rest}.")
        found.append(Live(name, model, url or None))
    if len(found) < 2:
        raise InputError("Answers are compared; give --live twice or more.")
    return found


class Respondent(Protocol):
    """What answers a prompt."""

    name: str

    async def answer(self, prompt: str) -> str:
        """Raises: InputError, Refused: it takes no such prompt. Fatal, Transient: it cannot be asked."""

    async def close(self) -> None:
        """Let go of what it holds."""


class _Server:
    """A model behind an OpenAI-compatible API."""

    def __init__(self, name: str, address: Address, settings: Settings, timeout_s: float) -> None:
        self.name = name
        self._endpoint = Endpoint(address, settings, timeout_s=timeout_s)

    async def answer(self, prompt: str) -> str:
        for attempt in itertools.count(1):
            try:
                messages = [{"role": "user", "content": prompt}]
                reply = await self._endpoint.ask(messages, key=secrets.token_hex(16), most=(0, 0))
            except Transient:
                if attempt == TRIES:
                    raise
                await asyncio.sleep(PAUSE_S * attempt)
            else:
                return reply.text
        raise AssertionError

    async def close(self) -> None:
        await self._endpoint.__aexit__(None, None, None)


class _Folder:
    """A model in this process. All of them take turns, as they share the machine."""

    def __init__(self, name: str, loaded: Loaded, settings: Sampling, turns: ThreadPoolExecutor) -> None:
        self.name = name
        self._loaded, self._settings, self._turns = loaded, settings, turns
        self._closed = threading.Event()

    async def answer(self, prompt: str) -> str:
        return await asyncio.get_running_loop().run_in_executor(self._turns, self._generate, prompt)

    def _generate(self, prompt: str) -> str:
        from dataclasses import replace

        from fourbit.generate import Answer, stream

        settings = replace(self._settings, seed=secrets.randbelow(2**32))
        asked = [{"role": "user", "content": prompt}]
        text = ""
        with closing(stream(self._loaded.model, self._loaded.tokenizer, asked, settings=settings)) as pieces:
            for piece in pieces:
                if self._closed.is_set():
                    raise Fatal("The arena is closing")
                if isinstance(piece, Answer):
                    return piece.text
                text += piece
        return text

    async def close(self) -> None:
        self._closed.set()


class Panel:
    """The systems that run, and the pairs that raters make by asking them.

    Args:
        respondents: two or more.
        say: told why a system does not answer.
    """

    def __init__(
        self, respondents: Sequence[Respondent], *, say: Callable[[str], None] = lambda sentence: None
    ) -> None:
        self._respondents = {each.name: each for each in respondents}
        self._say = say

    @classmethod
    def load(
        cls,
        given: Sequence[Live],
        *,
        api_key_env: str | None = None,
        max_tokens: int = 512,
        temperature: float = 0.7,
        timeout_s: float = 120.0,
        say: Callable[[str], None] = lambda sentence: None,
    ) -> Panel:
        """Load the folders, and make ready for the servers.

        Raises:
            InputError, MissingExtra: a folder holds no model, a key is missing, openai is not installed.
        """
        if max_tokens < 1:
            raise InputError(f"An answer may have {max_tokens} tokens; it must be 1 or more.")
        turns = ThreadPoolExecutor(1, thread_name_prefix="arena-model")
        made: list[Respondent] = []
        for one in given:
            if one.url is not None:
                settings = Settings(one.model, temperature, max_tokens)
                made.append(_Server(one.name, Address.find(one.url, api_key_env), settings, timeout_s))
                continue
            from fourbit.generate import Sampling

            loaded = _load(Path(one.model))
            for sentence in loaded.sentences:
                say(f"{one.name}: {sentence}")
            sampling = Sampling(max_new_tokens=max_tokens, temperature=temperature, top_p=0.9 if temperature else 1.0)
            made.append(_Folder(one.name, loaded, sampling, turns))
        return cls(made, say=say)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the systems."""
        return tuple(self._respondents)

    async def ask(self, store: Store, rater: str, prompt: str) -> Showing:
        """Let two systems answer, those two that have met least often, and show both answers to the rater.

        Raises:
            Unanswered: one of them does not.
        """
        met = store.pairs_by_systems()
        counts = {two: met.get(two, 0) + met.get(two[::-1], 0) for two in itertools.combinations(self.names, 2)}
        fewest = [two for two, count in counts.items() if count == min(counts.values())]
        one, other = secrets.choice(fewest)
        answers = await asyncio.gather(self._answer(one, prompt), self._answer(other, prompt))
        pair = Pair(f"live-{secrets.token_hex(8)}", prompt, (one, other), (answers[0], answers[1]))
        return await asyncio.to_thread(store.put, rater, pair)

    async def close(self) -> None:
        """End what is under way."""
        for respondent in self._respondents.values():
            await respondent.close()

    async def _answer(self, name: str, prompt: str) -> str:
        try:
            text = await self._respondents[name].answer(prompt)
        except (InputError, Refused) as error:
            self._say(f"{name} refuses a prompt: {error}")
            raise Unanswered("One of the models cannot take this prompt. Try a shorter or another one.") from error
        except (Transient, Fatal) as error:
            self._say(f"{name} does not answer: {error}")
            raise Unanswered(
                "One of the models cannot be reached at the moment. Try again, or tell the organiser."
            ) from error
        return text.encode("utf-8", "replace").decode()


def _load(folder: Path) -> Loaded:
    """The model in a folder, or the adapter in it together with the model that it was made for."""
    from fourbit.generate import find_base, load_for_generation

    base = find_base(folder)
    return load_for_generation(folder) if base is None else load_for_generation(base, adapter=folder)
