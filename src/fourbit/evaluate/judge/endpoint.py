"""One question to an OpenAI-compatible server, and what can become of it."""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from fourbit.errors import InputError, MissingExtra
from fourbit.evaluate.judge.requests import Settings
from fourbit.evaluate.judge.store import Reply

__all__ = ["Address", "Endpoint", "Fatal", "Refused", "Transient"]

OPENAI = "https://api.openai.com/v1"
_NEVER_ARRIVED = ("ConnectError", "ConnectTimeout", "PoolTimeout", "LocalProtocolError", "UnsupportedProtocol")
"""Of httpx: the question was not sent."""

_TOO_LONG = re.compile(r"context.?(?:length|window|size)|max_model_len|too (?:long|many tokens)", flags=re.IGNORECASE)
_SHOWN = 200


class Transient(Exception):
    """It may go better the next time.

    Attributes:
        retry_after_s: how long the server asks to wait; None where it does not say.
        maybe_paid: whether the server may have answered all the same.
        arrived: whether there is a server at all.
    """

    def __init__(
        self, sentence: str, *, retry_after_s: float | None = None, maybe_paid: bool = False, arrived: bool = True
    ) -> None:
        super().__init__(sentence)
        self.retry_after_s, self.maybe_paid, self.arrived = retry_after_s, maybe_paid, arrived


class Refused(Exception):
    """The server does not take this question, and will not; others it may."""


class Fatal(Exception):
    """The server will take no question."""


@dataclass(frozen=True)
class Address:
    """Where the judge is, and the key for it.

    Attributes:
        url: of the API, such as http://localhost:8000/v1.
        key: None: none is sent.
        key_name: the environment variable to name in messages.
    """

    url: str
    key: str | None
    key_name: str

    @classmethod
    def find(cls, url: str | None, key_name: str | None) -> Address:
        """From a URL and the name of an environment variable, or their defaults.

        The key in OPENAI_API_KEY goes to OpenAI, or to OPENAI_BASE_URL, which is set beside it. Another server gets one
        only if the variable is named.

        Raises:
            InputError: no URL, or no key where one is needed.
        """
        environment = os.environ
        found = url or environment.get("OPENAI_BASE_URL") or OPENAI
        parts = urlsplit(found)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"The base URL {found!r} is none; write it as in http://localhost:8000/v1.")
        wanted = key_name or ("OPENAI_API_KEY" if url is None or parts.hostname == "api.openai.com" else None)
        if wanted is None:
            return cls(found, None, "NAME")
        key = environment.get(wanted, "").strip()
        if not key:
            raise InputError(f"There is no key in the environment variable {wanted}, which {found} is to be sent.")
        if not key.isascii() or not key.isprintable():
            raise InputError(f"The key in {wanted} has characters that no key has; copy it anew.")
        return cls(found, key, wanted)


class Endpoint:
    """Asks questions, each once. Use it in an `async with` block.

    Raises:
        MissingExtra: openai is not installed.
    """

    def __init__(self, address: Address, settings: Settings, *, timeout_s: float) -> None:
        try:
            import openai
        except ModuleNotFoundError as error:
            raise MissingExtra("Asking needs openai; install it with `pip install 'fourbit[eval]'`.") from error
        self._openai = openai
        self._address, self._settings, self._timeout_s = address, settings, timeout_s
        self._client: Any = openai.AsyncOpenAI(
            base_url=address.url,
            api_key=address.key or "none",
            max_retries=0,  # asking.py tries again, as it counts what each try may cost
            timeout=timeout_s,
        )
        self._limit = "max_tokens"

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    async def ask(self, messages: Sequence[Mapping[str, str]], *, key: str, most: tuple[int, int]) -> Reply:
        """Ask once.

        Args:
            key: sent as the Idempotency-Key, by which a gateway can see that a question comes again.
            most: prompt and completion tokens to count where the server does not.

        Raises:
            Transient, Refused, Fatal.
        """
        began = time.monotonic()
        openai = self._openai
        try:
            body = await asyncio.wait_for(self._send(messages, key), self._timeout_s)
        except (asyncio.TimeoutError, openai.APITimeoutError) as error:
            arrived = not _never_arrived(error)
            raise Transient(
                f"{self._address.url} did not answer within {self._timeout_s:g} s",
                maybe_paid=arrived,
                arrived=arrived,
            ) from error
        except openai.APIConnectionError as error:
            reason = _short(str(error.__cause__ or error)) or type(error.__cause__).__name__
            if _never_arrived(error):
                raise Transient(f"{self._address.url} cannot be reached ({reason})", arrived=False) from error
            raise Transient(f"{self._address.url} broke off ({reason})", maybe_paid=True) from error
        except openai.APIStatusError as error:
            raise self._failure(error) from error
        return self._read(body, most, time.monotonic() - began)

    async def _send(self, messages: Sequence[Mapping[str, str]], key: str) -> str:
        settings = self._settings
        arguments: dict[str, Any] = {
            "model": settings.judge,
            "messages": list(messages),
            "temperature": settings.temperature,
        }
        if settings.seed is not None:
            arguments["seed"] = settings.seed
        while True:
            limit = {self._limit: settings.max_tokens}
            try:
                raw = await self._client.chat.completions.with_raw_response.create(
                    **arguments, **limit, extra_headers={"Idempotency-Key": key}
                )
            except self._openai.BadRequestError as error:
                # newer models of OpenAI know the limit by its other name, and charge nothing for saying so
                if self._limit == "max_tokens" and "max_completion_tokens" in str(error):
                    self._limit = "max_completion_tokens"
                    continue
                raise
            return str(raw.http_response.text)

    def _failure(self, error: Any) -> Exception:
        status, url = int(error.status_code), self._address.url
        said = f"{status}: {self._said(error)}"
        if status == 401:
            advice = (
                f"set {self._address.key_name} to a valid one"
                if self._address.key
                else "name the environment variable that holds one with --api-key-env"
            )
            return Fatal(f"{url} does not accept the key ({said}); {advice}")
        if status == 403:
            return Fatal(f"{url} does not allow this ({said}); is the key for {self._settings.judge}?")
        if status == 404:
            return Fatal(f"{url} has no model {self._settings.judge!r}, or is not the right --base-url ({said})")
        if status == 402 or str(error.code) == "insufficient_quota":
            return Fatal(f"The account at {url} has no money left ({said})")
        if status in (408, 409, 425, 429) or status >= 500:
            return Transient(f"{url} answers {said}", retry_after_s=_retry_after(error.response.headers))
        if str(error.code) == "context_length_exceeded" or _TOO_LONG.search(said):
            return Refused(f"it is too long for the judge ({said}); choose one with a longer context")
        return Refused(f"the server refuses it ({said})")

    def _said(self, error: Any) -> str:
        body = error.body
        message = body.get("message") if isinstance(body, Mapping) else body
        return _short(self._without_key(str(message or "no reason given")))

    def _without_key(self, text: str) -> str:
        return text.replace(self._address.key, "…") if self._address.key else text

    def _read(self, body: str, most: tuple[int, int], seconds: float) -> Reply:
        try:
            found = json.loads(body)
            choice = found["choices"][0]
            message = choice["message"]
            text = message.get("content") or message.get("refusal") or ""
            finish = choice.get("finish_reason")
        except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError) as error:
            shown = _short(self._without_key(body))[:80]
            raise Transient(
                f"{self._address.url} answers what is no completion: {shown or 'nothing'}", maybe_paid=True
            ) from error
        if isinstance(text, list):  # some servers answer in parts
            text = "".join(str(part.get("text", "")) for part in text if isinstance(part, Mapping))
        counts = _counts(found.get("usage"))
        prompt, completion = counts or most
        return Reply(
            str(text), finish if isinstance(finish, str) else None, prompt, completion, counts is not None, seconds
        )


def _counts(usage: object) -> tuple[int, int] | None:
    """The tokens that a server counted; None where it says nothing that can be."""
    if not isinstance(usage, Mapping):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if type(prompt) is not int or type(completion) is not int:
        return None
    return (prompt, completion) if 0 <= prompt < 10**9 and 0 <= completion < 10**9 else None


def _never_arrived(error: BaseException) -> bool:
    cause = error.__cause__
    return type(cause).__name__ in _NEVER_ARRIVED


def _short(text: str) -> str:
    line = " ".join(text.split())
    return (line[:_SHOWN] + "…" if len(line) > _SHOWN else line).rstrip(".")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds to wait that a server asks for: a number, or a date."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name) or "") / unit
        except ValueError:
            continue
        if math.isfinite(seconds):
            return max(seconds, 0.0)
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after") or "")
        return max(date.timestamp() - time.time(), 0.0)
    except (TypeError, ValueError, OverflowError, IndexError):
        return None
