"""`fourbit chat MODEL`: a conversation in the terminal, or over a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from fourbit.cli import options, output
from fourbit.errors import InputError

if TYPE_CHECKING:
    from fourbit.generate import Loaded
    from fourbit.generate.session import Session

__all__ = ["chat"]

HELP = """\
/help           this
/reset          forget the conversation, but not what the system says
/system [TEXT]  say what the system says, or show it; /system - removes it
/retry          answer the last question anew
/save FILE      write the conversation to a file, one JSON record
/quit           end; Ctrl-D too
A line that ends with \\ goes on in the next; \"\"\" begins and ends a message of several lines.
Ctrl-C stops an answer."""
BLOCK = '"""'


def chat(
    model: options.Model,
    adapter: options.Adapter = None,
    system: options.System = None,
    max_new_tokens: options.MaxNewTokens = 512,
    temperature: options.Temperature = 0.7,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Draw only from the likeliest tokens that together reach this probability."
            " Default: 0.9, at temperature 0 all."
        ),
    ] = None,
    top_k: options.TopK = 0,
    seed: Annotated[int | None, typer.Option(help="Of the draw. Default: another one each time.")] = None,
    stop: options.Stop = None,
    format: options.Format = None,
    block_size: options.BlockSize = None,
    double_quant: options.DoubleQuant = None,
    dtype: options.Dtype = None,
    chat_template: options.ChatTemplate = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="At the end, print the conversation as one JSON object, and nothing else.")
    ] = False,
) -> None:
    """Talk to a model.

    Type /help in the conversation for what there is besides talking. Where the input is no terminal, each line is a
    question, and only the answers are printed.
    """
    with output.result(as_json) as show:
        from fourbit.generate import Origin, Sampling
        from fourbit.generate.session import Session

        settings = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=(0.9 if temperature > 0 else 1.0) if top_p is None else top_p,
            top_k=top_k,
            seed=_fresh_seed() if seed is None else seed,
            stop=tuple(stop or ()),
        )
        loaded = Origin(
            model=model,
            adapter=adapter,
            format=format,
            block_size=block_size,
            double_quant=double_quant,
            dtype=dtype,
            chat_template=chat_template,
            trust_remote_code=trust_remote_code,
            revision=revision,
        ).load()
        session = Session(loaded, settings=settings, system=system)
        if as_json:
            _Talk(session, sys.stderr).run()
            show({"model": model, "adapter": adapter, "messages": session.messages, "tokens": session.tokens}, str)
    if not as_json:
        _greet(loaded)
        _Talk(session, sys.stdout).run()


class _Talk:
    """Reads what a person says, and shows what the model answers; notices go to stderr.

    Args:
        out: where answers go.
    """

    def __init__(self, session: Session, out: TextIO) -> None:
        self._session, self._out = session, out
        self._terminal = sys.stdin.isatty()
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: _say(HELP),
            "/reset": self._reset,
            "/retry": self._retry,
            "/save": self._save,
            "/system": self._system,
        }

    def run(self) -> None:
        """Talk until the input ends.

        Raises:
            InputError: the input is no terminal, and a question cannot be answered.
        """
        if self._terminal:
            _edit_lines()
        try:
            for said in self._messages():
                self._take(said)
        except BrokenPipeError:  # nobody reads on; what Python would still flush has nowhere to go
            sys.stdout = None

    def _messages(self) -> Iterator[str]:
        """What is said, message by message, until /quit or the end of the input."""
        while True:
            try:
                said = self._read_message()
            except KeyboardInterrupt:
                if not self._terminal:
                    raise
                _say("\n(/quit or Ctrl-D ends)")
                continue
            if said is None and self._terminal:
                _say("")
            if said is None or said.strip() in ("/quit", "/exit"):
                return
            if said.strip():
                yield said

    def _take(self, said: str) -> None:
        if not said.startswith("/"):
            self._answer(said)
            return
        name, _, argument = said.strip().partition(" ")
        if name in self._commands:
            self._commands[name](argument.strip())
        else:
            _say(f"There is no {name}; /help shows what there is. A question that begins with / needs a space before.")

    def _answer(self, said: str) -> None:
        forgotten = self._session.forgotten
        try:
            with closing(self._session.ask(said.strip())) as pieces:
                self._show(pieces)
        except InputError as error:
            if not self._terminal:
                raise
            output.complain(str(error))
        if self._session.forgotten > forgotten:
            _say(f"(The oldest {self._session.forgotten} messages do not fit into the model's context any more.)")

    def _show(self, pieces: Iterator[str]) -> None:
        try:
            for piece in pieces:
                self._out.write(piece.translate(_HARMLESS) if self._out.isatty() else piece)
                self._out.flush()
        except KeyboardInterrupt:
            if not self._terminal:
                raise
        finally:
            self._out.write("\n")
            self._out.flush()

    def _reset(self, _: str) -> None:
        self._session.reset()
        _say("(The conversation begins anew.)")

    def _retry(self, _: str) -> None:
        question = self._session.take_back()
        if question is None:
            _say("There is no question yet to be answered anew.")
        else:
            self._answer(question)

    def _system(self, text: str) -> None:
        if text:
            self._session.system = None if text == "-" else text
        _say(f"(The system says: {self._session.system})" if self._session.system else "(The system says nothing.)")

    def _save(self, name: str) -> None:
        if not name:
            _say("/save needs the name of a file.")
            return
        path = Path(name).expanduser()
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self._session.messages}, ensure_ascii=False) + "\n")
        except FileExistsError:
            _say(f"{path} exists already; choose another name.")
        except OSError as error:
            _say(f"{path} cannot be written: {error.strerror}.")
        else:
            _say(f"(The conversation is in {path}.)")

    def _read_message(self) -> str | None:
        """One message, of one line or several; None at the end of the input."""
        line = self._read_line("> ")
        if line is None:
            return None
        if line.lstrip().startswith(BLOCK):
            said = line.lstrip().removeprefix(BLOCK)
            while not said.rstrip().endswith(BLOCK) and (line := self._read_line(". ")) is not None:
                said = f"{said}\n{line}"
            return said.rstrip().removesuffix(BLOCK).strip("\n")
        said = line
        while said.endswith("\\"):
            line = self._read_line(". ")
            said = f"{said[:-1]}\n{line or ''}"
        return said

    def _read_line(self, prompt: str) -> str | None:
        try:
            if self._terminal:
                return input(prompt)
            line = sys.stdin.readline()
        except EOFError:
            return None
        except UnicodeDecodeError as error:
            raise InputError("The input is not UTF-8 text; convert it first, with iconv for example.") from error
        return line.rstrip("\r\n") if line else None


_HARMLESS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""What a terminal would take for a command is left out of what a model says."""


def _greet(loaded: Loaded) -> None:
    """Say on stderr what is talked to."""
    for sentence in loaded.sentences:
        _say(sentence)
    if sys.stdin.isatty():
        _say("/help shows what there is besides talking; Ctrl-D ends.")


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _edit_lines() -> None:
    """Give `input` the keys and the history of readline, where there is one."""
    try:
        import readline  # noqa: F401
    except ModuleNotFoundError:
        return


def _fresh_seed() -> int:
    import secrets

    return secrets.randbelow(2**32)
