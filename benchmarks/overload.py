"""Many more clients than a running server has room for: python benchmarks/overload.py http://127.0.0.1:8000

Every answer is compared with that of the same request alone; a fifth of the clients leave in mid-stream. Prints JSON:
answers, refusals (status 429), wrong answers, the most requests that were in flight, memory beside what was given, and
how long one request took right after. Needs a server whose requests are exact, and nobody else asking it.
"""

from __future__ import annotations

import argparse
import json
import random
import threading
import time
from collections import Counter
from typing import Any

from moestro.client.connection import Connection
from moestro.errors import ClientError

PROMPTS = [f"Word {number} \\Word\\, n.\n   1. " for number in range(16)]


def ask(server: Connection, number: int) -> str:
    body = {"prompt": PROMPTS[number], "max_tokens": 24, "temperature": 0.9, "seed": number}
    return str(server.post("/v1/completions", body)["choices"][0]["text"])


def leave(server: Connection, number: int) -> None:
    stream = server.stream("/v1/completions", {"prompt": PROMPTS[number], "max_tokens": 200})
    next(stream)
    stream.close()  # type: ignore[attr-defined]


def client(server: Connection, number: int, alone: list[str], until: float, counts: Counter[str]) -> None:
    chance = random.Random(number)
    while time.monotonic() < until:
        which = chance.randrange(len(PROMPTS))
        try:
            if chance.random() < 0.2:
                leave(server, which)
                counts["left"] += 1
            else:
                counts["answered" if ask(server, which) == alone[which] else "wrong"] += 1
        except ClientError as error:
            refused = "HTTP status 429" in str(error)
            counts["refused" if refused else f"failed: {error}"] += 1
            time.sleep(0.2 if refused else 0)


def overload(server: Connection, *, clients: int, seconds: float) -> dict[str, Any]:
    alone = [ask(server, number) for number in range(len(PROMPTS))]
    counts: Counter[str] = Counter()
    until, most = time.monotonic() + seconds, 0
    threads = [
        threading.Thread(target=client, args=(server, number, alone, until, counts), daemon=True)
        for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    while time.monotonic() < until:
        most = max(most, len(server.get("/stats")["requests"]["listed"]))
        time.sleep(0.25)
    for thread in threads:
        thread.join()
    began = time.monotonic()
    again = ask(server, 0) == alone[0]
    now = server.get("/stats")
    stats = now["stats"]
    return {
        "clients": clients,
        "seconds": seconds,
        **counts,
        "most_in_flight": most,
        "right_after": again,
        "right_after_s": time.monotonic() - began,
        "left_behind": len(now["requests"]["listed"]),
        "peak_resident_bytes": stats["peak_rss_bytes"],
        "floor_and_memory_bytes": stats["process_floor_bytes"] + stats["memory_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=60.0)
    given = parser.parse_args()
    print(json.dumps(overload(Connection(given.url), clients=given.clients, seconds=given.seconds), indent=2))


if __name__ == "__main__":
    main()
