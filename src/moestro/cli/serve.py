"""`moestro serve`: an OpenAI-compatible server for many clients on one memory budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from moestro.cli.arguments import Model
from moestro.cli.boundary import say
from moestro.cli.options import Only
from moestro.cli.settings import ConfigFile
from moestro.config import RuntimeOptions, ServeOptions

if TYPE_CHECKING:
    from moestro import LLM
    from moestro.server.host import Opener
    from moestro.store.pack import PackProgress

OPENING = tuple(
    name for name in RuntimeOptions.__dataclass_fields__ if name not in ("max_sequences", "guides", "variant")
)


def serve(
    model: Model,
    options: Annotated[RuntimeOptions, Only(*OPENING)],
    serving: ServeOptions,
    config: ConfigFile = None,  # noqa: ARG001
) -> None:
    """Serve a model over HTTP: OpenAI's protocol, metrics, and a web page. Ctrl-C ends it."""
    from moestro.server.listen import listen
    from moestro.server.rules import make_rules

    rules, listener = make_rules(serving), listen(serving)
    from moestro.server.host import ModelHost
    from moestro.server.run import serve as run

    host = ModelHost(
        serving.model_name or _name(model),
        _opener(model, options, serving),
        max_queue=serving.max_queue,
        drain_s=serving.drain,
        tool_parser=serving.tool_parser,
    )
    run(
        host,
        serving,
        listener=listener,
        rules=rules,
        memory=options.memory,
        say=lambda message: say("moestro", message),
    )


def _opener(model: str, options: RuntimeOptions, serving: ServeOptions) -> Opener:
    """Everything that is imported is there before the model is opened: it counts as the process's floor."""
    from moestro.server.opening import open_for_serving

    def open_llm(progress: Callable[[PackProgress], None]) -> LLM:
        return open_for_serving(
            model, options, max_concurrency=serving.max_concurrency, guides=serving.structured, progress=progress
        )

    return open_llm


def _name(model: str) -> str:
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model
