"""A server as users start it: a process, found by what it says on standard error."""

from __future__ import annotations

import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from openai import OpenAI

from cli.running import command

NAME = "tiny"
PROMPT = "Bridge \\Bridge\\, n.\n   1. "
SETTINGS = {
    "--model-name": NAME,
    "--memory": "60MiB",
    "--context": "256",
    "--port": "0",
    "--max-concurrency": "4",
    "--max-queue": "16",
    "--drain": "20",
}


class Running:
    """One server process. `lines` is what it has written to standard error so far; `http` asks it by hand."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.lines = process, list[str]()
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = re.findall(r"http://\S+?(?=;)", self.wait_for("listening on"))[0]
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def wait_for(self, words: str, *, timeout_s: float = 60) -> str:
        """The first line with these words."""
        with self._news:
            seen = self._news.wait_for(
                lambda: any(words in line for line in self.lines) or not self._reader.is_alive(), timeout_s
            )
            found = next((line for line in self.lines if words in line), None)
        assert seen, self.lines
        assert found is not None, self.lines
        return found

    def until_ready(self) -> None:
        """Wait as clients do: by asking /health."""
        while self.process.poll() is None:
            answer = self.http.get("/health")
            if answer.status_code == 200:
                return
            assert answer.status_code == 503, answer.text
            time.sleep(0.1)
        raise AssertionError(self.lines)

    def end(self, sent: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to end. Returns its exit code."""
        self.process.send_signal(sent)
        code = self.process.wait(timeout=60)
        self._reader.join(timeout=10)
        return code

    def client(self, key: str = "none", **settings: object) -> OpenAI:
        """OpenAI's own client, without its repeated attempts."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **settings)  # type: ignore[arg-type]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._news.notify_all()


@contextmanager
def server(store: Path, **settings: str) -> Iterator[Running]:
    """A server of the store; `max_queue="2"` is a flag, "" leaves one of `SETTINGS` out, "yes" is a switch."""
    given = SETTINGS | {f"--{name.replace('_', '-')}": value for name, value in settings.items()}
    flags = [part for name, value in given.items() if value for part in (name, value) if part != "yes"]
    with subprocess.Popen(command("serve", store, *flags), stderr=subprocess.PIPE, text=True) as process:
        try:
            running = Running(process)
            with running.http:
                yield running
        finally:
            process.kill()
