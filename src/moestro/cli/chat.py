"""`moestro chat`: talk to a model, in this process or behind a URL."""

from __future__ import annotations

import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import Annotated

import typer

from moestro.cli.boundary import paragraph, say
from moestro.cli.opening import open_llm
from moestro.cli.options import Only
from moestro.client.connection import Connection
from moestro.client.conversation import Conversation, Local, Partner, Server, Told
from moestro.config import ChatOptions, RuntimeOptions
from moestro.errors import MoestroError, RequestError
from moestro.memory.budget import format_bytes
from moestro.store.folders import cache_folder

_OPENING = tuple(name for name in RuntimeOptions.__dataclass_fields__ if name not in ("max_sequences", "guides"))
_HELP = """\
/reset          forget the conversation
/system TEXT    say what the assistant is to be like, and begin anew (without TEXT: show it)
/retry          ask the last question again
/save FILE      write the conversation to a file
/help           this list
/quit           end (Ctrl-D too)
A line that ends with \\ goes on in the next one. Ctrl-C stops an answer."""

ApiKey = Annotated[str, typer.Option("--api-key", envvar="MOESTRO_API_KEY", help="Key of a server that wants one.")]


def chat(
    model: Annotated[str, typer.Argument(help="A model as for other commands, or a server: http://127.0.0.1:8000.")],
    options: Annotated[RuntimeOptions, Only(*_OPENING)],
    chatting: ChatOptions,
    api_key: ApiKey = "",
) -> None:
    """Talk to a model; /help lists what can be typed beside text."""
    if model.startswith(("http://", "https://")):
        changed = [name for name in _OPENING if name != "quality" and _differs(options, name)]
        if changed:
            raise RequestError(f"{', '.join(changed)} is for opening a model, and {model} has one open. Leave it out.")
        quality = options.quality if _differs(options, "quality") else ""
        _talk(Server(Connection(model, key=api_key), chatting, quality=quality), chatting)
        return
    with open_llm(model, options) as llm, closing(Local(llm, chatting, name=model)) as partner:
        _talk(partner, chatting)


def _differs(options: RuntimeOptions, name: str) -> bool:
    return bool(getattr(options, name) != getattr(RuntimeOptions(), name))


def _talk(partner: Partner, options: ChatOptions) -> None:
    talk = _Talk(Conversation(partner, options.system))
    with _history():
        say("moestro", f"talking to {partner.name}; /help lists commands")
        while (line := _read()) is not None:
            if not talk.take(line):
                return


class _Talk:
    """Takes one line after the other."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation

    def take(self, line: str) -> bool:
        """Answer a line, or do what it commands; False at the end."""
        name, _, rest = line.partition(" ")
        match name:
            case "":
                return True
            case "/quit" | "/exit":
                return False
            case "/help":
                _note(_HELP)
            case "/reset":
                self._conversation.reset()
                _note("the conversation begins anew")
            case "/system":
                self._system(rest.strip())
            case "/retry":
                question = self._conversation.take_back()
                if question is None:
                    _note("there is no question yet")
                else:
                    self._answer(question)
            case "/save":
                self._save(rest.strip())
            case _ if name.startswith("/"):
                _note(f"there is no command {name}; /help lists them")
            case _:
                self._answer(line)
        return True

    def _system(self, text: str) -> None:
        if text:
            self._conversation.system = text
            self._conversation.reset()
            _note("the conversation begins anew")
        else:
            _note(self._conversation.system or "the assistant has been told nothing; /system TEXT does")

    def _save(self, name: str) -> None:
        if not name:
            _note("say where to: /save FILE")
            return
        lines = [f"{one['role']}: {one['content']}" for one in self._conversation.messages]
        try:
            Path(name).expanduser().write_text("\n\n".join(lines) + "\n", encoding="utf-8")
            _note(f"{name} has {len(lines)} messages")
        except OSError as error:
            _note(f"{name} cannot be written: {error.strerror}")

    def _answer(self, question: str) -> None:
        pieces = self._conversation.say(question)
        told: Told | None = None
        try:
            for piece in pieces:
                if isinstance(piece, Told):
                    told = piece
                else:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            told = None
        except MoestroError as error:
            sys.stderr.write(paragraph("error", error) + "\n")
            return
        finally:
            pieces.close()  # type: ignore[attr-defined]
        sys.stdout.write("\n")
        sys.stdout.flush()
        _note(_line(told) if told else "stopped")


def _line(told: Told) -> str:
    """`48 tokens (stop), 12.3 tokens/s, first after 0.41 s; experts 78.0% hits, 17.9 MiB read`."""
    speed = f", {(told.tokens - 1) / told.decode_s:.1f} tokens/s" if told.tokens > 1 and told.decode_s else ""
    line = f"{told.tokens} tokens ({told.finish_reason}){speed}, first after {told.ttft_s:.2f} s"
    if told.hits is not None and told.misses is not None and told.bytes_read is not None:
        share = told.hits / max(1, told.hits + told.misses)
        line += f"; experts {share:.1%} hits, {format_bytes(told.bytes_read)} read"
    if told.variant is not None:
        line += f"; answered by {told.variant}"
    return line


def _note(text: str) -> None:
    dim, plain = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
    sys.stderr.write(f"{dim}{text}{plain}\n")
    sys.stderr.flush()


def _read() -> str | None:
    """What the user types; None at the end."""
    prompt = "\001\x1b[1m\002> \001\x1b[0m\002" if sys.stdin.isatty() and sys.stdout.isatty() else ""
    lines: list[str] = []
    while True:
        try:
            line = input(prompt)
        except EOFError:
            return None
        except KeyboardInterrupt:
            if not lines and prompt:
                _note("Ctrl-D or /quit ends")
            lines.clear()
            continue
        if not line.endswith("\\"):
            return "\n".join([*lines, line]).strip()
        lines.append(line[:-1])


class _history:  # noqa: N801
    """Lines typed before can be called up again, also tomorrow; nothing of it where input is no terminal."""

    def __enter__(self) -> None:
        self._file = cache_folder() / "chat_history"
        if sys.stdin.isatty():
            import readline

            with suppress(OSError):
                readline.read_history_file(self._file)

    def __exit__(self, *_: object) -> None:
        if sys.stdin.isatty():
            import readline

            readline.set_history_length(1000)
            with suppress(OSError):
                self._file.parent.mkdir(parents=True, exist_ok=True)
                readline.write_history_file(self._file)
                self._file.chmod(0o600)
