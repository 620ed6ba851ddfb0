"""moestro's server and llama.cpp's in the same memory, asked by the same clients.

    python benchmarks/serving_throughput.py --store STORE --gguf FILE --server LLAMA_SERVER --text FILE
        [--shares 1,0.5] [--clients 1,4,16] [--rounds 3] [--prompt 128] [--tokens 32] [--per-client 2]
        [--out docs/benchmarks/serving-throughput.json]

A share is one of the GGUF file's bytes, and limits a cgroup around the server, page cache included (0: no limit).
moestro is told the share less its floor and a margin. Files are evicted from the page cache before each server starts.
A server is asked by a few clients first, unmeasured; then by so many clients at once, each of which asks again when it
has been answered, with pieces of a text and greedy sampling. Rounds can be run one by one: those that the file of
`--out` has are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cgroup import Cgroup, evict
from memory_budget import MARGIN, process_floor

from moestro.client.connection import Connection
from moestro.client.load import run_load, summarise
from moestro.config import LoadOptions
from moestro.errors import ClientError

START_S = 300.0


def main() -> None:
    given = _arguments()
    floor = process_floor(given.store)
    clients = [int(text) for text in given.clients.split(",")]
    samples: dict[str, Any] = json.loads(given.out.read_text())["samples"] if given.out and given.out.exists() else {}
    for _ in range(given.rounds):
        for share in (float(text) for text in given.shares.split(",")):
            limit = int(share * given.gguf.stat().st_size) or None
            for name in ("moestro", "llama.cpp"):
                command = (
                    _moestro(given, limit, floor, max(clients)) if name == "moestro" else _llama(given, max(clients))
                )
                evict(*([given.gguf] if name != "moestro" else [one for one in given.store.iterdir() if one.is_file()]))
                with running(command, limit) as (server, _):
                    _ask(server, given, clients=4, per_client=1)
                    for count in clients:
                        found = _ask(server, given, clients=count, per_client=given.per_client)
                        by_clients = samples.setdefault(f"{share:.0%}" if share else "no limit", {})
                        by_clients.setdefault(str(count), {}).setdefault(name, []).append(found)
                        print(f"{share:.0%} {count} clients, {name}: {_words(found)}", file=sys.stderr, flush=True)
                if given.out:
                    given.out.write_text(json.dumps({"floor": floor, "samples": samples}, indent=1) + "\n")
    _print(samples)


def _ask(server: Connection, given: argparse.Namespace, *, clients: int, per_client: int) -> dict[str, Any]:
    options = LoadOptions(
        requests=clients * per_client,
        concurrency=clients,
        prompt_tokens=given.prompt,
        max_tokens=given.tokens,
        text=str(given.text),
        seed=clients,
        timeout=given.timeout,
    )
    found = summarise(run_load(server, options), options)
    assert found["answered"] == found["requests"], found["errors"]
    return found


def _moestro(given: argparse.Namespace, limit: int | None, floor: int, clients: int) -> list[str]:
    memory = "100%" if limit is None else str(limit - floor - MARGIN)
    context = 2 * (given.prompt + given.tokens)
    command = [sys.executable, "-m", "moestro.cli", "serve", str(given.store), "--memory", memory]
    return [*command, "--context", str(context), "--max-concurrency", str(clients), "--port", "{port}"]


def _llama(given: argparse.Namespace, clients: int) -> list[str]:
    context = 2 * (given.prompt + given.tokens) * clients
    command = [given.server, "-m", str(given.gguf), "-t", str(os.cpu_count()), "-c", str(context), "-np", str(clients)]
    return [*command, "--no-repack", "--port", "{port}"] if given.no_repack else [*command, "--port", "{port}"]


@contextmanager
def running(command: list[str], limit: int | None) -> Iterator[tuple[Connection, subprocess.Popen[bytes]]]:
    """A server, once it is ready, within so many bytes; `{port}` in its command becomes a free one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = Cgroup(limit)
    with tempfile.TemporaryFile() as log, group as enter:
        text = [part.replace("{port}", str(port)) for part in command]
        process = subprocess.Popen(text, stdout=log, stderr=subprocess.STDOUT, preexec_fn=enter)
        try:
            server = Connection(f"http://127.0.0.1:{port}", timeout_s=START_S)
            _wait(server, process, log)
            yield server, process
        finally:
            process.terminate()
            process.wait(60)


def _wait(server: Connection, process: subprocess.Popen[bytes], log: Any) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        try:
            if server.get("/health").get("status") == "ok":
                return
        except ClientError:
            pass
        time.sleep(0.2)
    log.seek(0)
    raise SystemExit(f"{process.args} did not start:\n{log.read().decode(errors='replace')[-2000:]}")


def _words(found: dict[str, Any]) -> str:
    first, gap = found["ttft_ms"]["p50"], found["tpot_ms"].get("p50", 0.0)
    return f"{found['generated_tokens_per_s']:.3g} tokens/s, first token {first:.0f} ms, between {gap:.0f} ms"


def _print(samples: dict[str, dict[str, dict[str, list[dict[str, Any]]]]]) -> None:
    print("| memory | clients | engine | tokens/s | ratio | first token, p50 | between tokens, p50 |")
    print("|---|---|---|---|---|---|---|")
    for share, by_clients in samples.items():
        for count, by_name in by_clients.items():
            rates = {name: [one["generated_tokens_per_s"] for one in runs] for name, runs in by_name.items()}
            for name, runs in by_name.items():
                ratio = statistics.median(rates[name]) / statistics.median(rates["llama.cpp"])
                first, gap = (statistics.median(run[key]["p50"] for run in runs) for key in ("ttft_ms", "tpot_ms"))
                rate = f"{statistics.median(rates[name]):.3g} ({min(rates[name]):.3g} to {max(rates[name]):.3g})"
                print(f"| {share} | {count} | {name} | {rate} | {ratio:.2f} | {first:.0f} ms | {gap:.0f} ms |")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--server", required=True, help="path of llama-server")
    parser.add_argument("--text", type=Path, required=True, help="prompts are cut from it")
    parser.add_argument("--shares", default="0,0.5", help="of the GGUF file's bytes; 0: no limit")
    parser.add_argument("--clients", default="1,4,16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=128, help="tokens, about")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--per-client", type=int, default=2, help="requests of each client")
    parser.add_argument("--timeout", type=float, default=1800.0)
    parser.add_argument("--no-repack", action="store_true", help="llama.cpp keeps the file's blocks as they are")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
