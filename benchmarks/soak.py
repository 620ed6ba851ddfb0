"""A server under steady, mixed load for a long time: does it grow, and do its counters stay true?

    python benchmarks/soak.py MODEL --memory 48MiB [--minutes 30] [--rate 3] [--out soak.json]

Clients come at random moments, `--rate` a second: completions that are compared with those of an idle server, chats,
streams of which some are left in the middle, guided JSON, log-probabilities, another quality, and requests with
mistakes. Resident memory is looked at every second. Reported are its medians in each tenth of the time (the first one
begins after a minute of warming up) and the growth from the first to the last; what clients got beside what the server
counted; and what is left behind in the end.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serving_throughput import running

from moestro.client.connection import Connection
from moestro.errors import ClientError

WARM_UP_S, TENTHS = 60.0, 10
PROMPTS = [
    f"All of the chapters begin with this.\n\nChapter {number}. The {number}th \\item of\n" for number in range(24)
]


class Clients:
    """What they ask, and what they got."""

    def __init__(self, server: Connection, quality: str) -> None:
        self._server, self._quality = server, quality
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._alone = [self._complete(number)["choices"][0]["text"] for number in range(len(PROMPTS))]
        kinds = (self.same, self.chat, self.stream, self.leave, self.guided, self.likely, self.elastic, self.wrong)
        self._kinds: tuple[Callable[[random.Random], str], ...] = (*kinds, self.same)

    def one(self, seed: int) -> None:
        """One client, of a kind by chance."""
        chance = random.Random(seed)
        try:
            outcome = chance.choice(self._kinds)(chance)
        except ClientError as error:
            outcome = f"failed: {error}"
        self._count(**{outcome: 1})

    def same(self, chance: random.Random) -> str:
        number = chance.randrange(len(PROMPTS))
        return "same" if self._complete(number)["choices"][0]["text"] == self._alone[number] else "other answer"

    def chat(self, chance: random.Random) -> str:
        body = {"messages": [{"role": "user", "content": chance.choice(PROMPTS)}], "max_tokens": 16}
        self._take(self._server.post("/v1/chat/completions", body))
        return "chat"

    def stream(self, chance: random.Random) -> str:
        body = {"prompt": chance.choice(PROMPTS), "max_tokens": 32, "temperature": 1.0}
        for event in self._server.stream("/v1/completions", {**body, "stream_options": {"include_usage": True}}):
            if event.get("usage"):
                self._take(event)
        return "stream"

    def leave(self, chance: random.Random) -> str:
        stream = self._server.stream("/v1/completions", {"prompt": chance.choice(PROMPTS), "max_tokens": 200})
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        return "left"

    def guided(self, chance: random.Random) -> str:
        kind = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["yes", "no", "perhaps"]}}}
        body = {"messages": [{"role": "user", "content": chance.choice(PROMPTS)}], "response_format": kind}
        answer = self._take(self._server.post("/v1/chat/completions", {**body, "max_tokens": 16}))
        return "guided" if json.loads(answer["choices"][0]["message"]["content"]) else "guided wrongly"

    def likely(self, chance: random.Random) -> str:
        body = {"prompt": chance.choice(PROMPTS), "max_tokens": 8, "logprobs": 3}
        self._take(self._server.post("/v1/completions", body))
        return "logprobs"

    def elastic(self, chance: random.Random) -> str:
        body = {"prompt": chance.choice(PROMPTS), "max_tokens": 16, "quality": self._quality}
        self._take(self._server.post("/v1/completions", body))
        return "elastic"

    def wrong(self, _chance: random.Random) -> str:
        try:
            self._server.post("/v1/completions", {"prompt": "x", "best_off": 3})
        except ClientError as error:
            return "refused" if "HTTP status 400" in str(error) else f"failed: {error}"
        return "wrong request answered"

    def _complete(self, number: int) -> dict[str, Any]:
        body = {"prompt": PROMPTS[number], "max_tokens": 24, "temperature": 0.8, "seed": number}
        return self._take(self._server.post("/v1/completions", body))

    def _take(self, answer: dict[str, Any]) -> dict[str, Any]:
        usage = answer["usage"]
        self._count(answered=1, prompt_tokens=usage["prompt_tokens"], tokens=usage["completion_tokens"])
        return answer

    def _count(self, **more: int) -> None:
        with self._lock:
            self.counts.update(more)


def soak(server: Connection, process: subprocess.Popen[bytes], given: argparse.Namespace) -> dict[str, Any]:
    """Everything that is reported."""
    clients, threads = Clients(server, given.quality), []
    samples: list[tuple[float, int]] = []
    chance, start, number = random.Random(1), time.monotonic(), 0
    end, looked = start + WARM_UP_S + 60 * given.minutes, start
    while (now := time.monotonic()) < end:
        time.sleep(min(chance.expovariate(given.rate), end - now))
        threads.append(threading.Thread(target=clients.one, args=(number,)))
        threads[-1].start()
        number += 1
        threads = [one for one in threads if one.is_alive()]
        if time.monotonic() > looked + 1:
            looked = time.monotonic()
            samples.append((looked - start - WARM_UP_S, _resident(process.pid)))
    for one in threads:
        one.join()
    return _report(server, clients, [one for one in samples if one[0] > 0], 60 * given.minutes)


def _resident(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


def _report(server: Connection, clients: Clients, samples: list[tuple[float, int]], seconds: float) -> dict[str, Any]:
    until = time.monotonic() + 10
    while (now := server.get("/stats"))["requests"]["listed"] and time.monotonic() < until:
        time.sleep(0.1)
    tenths = [
        statistics.median(size for when, size in samples if part <= TENTHS * when / seconds < part + 1)
        for part in range(TENTHS)
    ]
    finished, stats = now["requests"]["finished"], now["stats"]
    return {
        "resident_bytes": tenths,
        "growth": tenths[-1] / tenths[0] - 1,
        "clients": dict(sorted(clients.counts.items())),
        "server": {"finished": finished, "tokens": now["tokens"], "kv_blocks": now["kv_blocks"]},
        "left_behind": len(now["requests"]["listed"]),
        "ended_and_counted": sum(finished.values()) == clients.counts["answered"] + clients.counts["left"],
        "most_bytes_beyond_budget": stats["peak_rss_bytes"] - stats["process_floor_bytes"] - stats["memory_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--memory", default="48MiB")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=3.0, help="clients a second")
    parser.add_argument("--quality", default="balanced")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    command = [sys.executable, "-m", "moestro.cli", "serve", given.model, "--memory", given.memory]
    command += ["--context", "512", "--max-concurrency", "4", "--max-queue", "64", "--port", "{port}"]
    with running(command, None) as (server, process):
        found = soak(server, process, given)
    print(json.dumps(found, indent=1))
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
