"""`moestro ps`: which servers run on this machine, and what is placed where."""

from __future__ import annotations

from typing import Any

from moestro.cli.arguments import AsJson
from moestro.cli.boundary import say
from moestro.cli.chat import ApiKey
from moestro.cli.console import print_json, print_table
from moestro.client.connection import Connection
from moestro.errors import ClientError
from moestro.memory.budget import format_bytes
from moestro.server.registry import Entry, running


def ps(api_key: ApiKey = "", as_json: AsJson = False) -> None:
    """List moestro's servers on this machine."""
    found = [(entry, _asked(entry, api_key)) for entry in running()]
    if as_json:
        print_json(
            {"servers": [{"pid": entry.pid, "url": entry.url, "model": entry.model, **now} for entry, now in found]}
        )
    elif not found:
        say("note", "No server of moestro's runs here. `moestro serve MODEL --memory N` starts one.")
    for entry, now in found if not as_json else []:
        print_table(f"{entry.model}  {entry.url}", [("process", str(entry.pid)), *_rows(now)])


def _asked(entry: Entry, key: str) -> dict[str, Any]:
    connection = Connection(entry.url, key=key, timeout_s=5.0)
    try:
        return {"status": "ok", **connection.get("/stats")}
    except ClientError as error:
        return {"status": str(error)}


def _rows(now: dict[str, Any]) -> list[tuple[str, str] | tuple[str, str, str]]:
    if now["status"] != "ok":
        return [("status", now["status"])]
    stats, requests, tokens = now["stats"], now["requests"], now["tokens"]
    held = [level for row in now["levels"] for level in row]
    resident = sum(level > 0 for level in held)
    asked = stats["hits"] + stats["misses"]
    uses = {"dense": "dense_bytes", "experts": "arena_bytes", "KV": "kv_bytes", "activations": "activation_bytes"}
    split = ", ".join(f"{name} {format_bytes(stats[key])}" for name, key in uses.items())
    return [
        ("memory", format_bytes(stats["memory_bytes"]), split),
        ("experts in it", f"{resident} of {len(held)}", f"{stats['hits'] / max(1, asked):.1%} hits"),
        ("requests", f"{requests['running']} running", f"{requests['waiting']} waiting"),
        ("tokens", f"{tokens['generated']} written", f"{tokens['prompt']} read"),
        ("read from disk", format_bytes(stats["bytes_read"]), f"waited {stats['stall_s']:.1f} s"),
    ]
