"""Who may use a server: keys, and the addresses and names under which it can be reached."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from moestro.config import ServeOptions
from moestro.errors import BudgetError, ServeError
from moestro.memory.budget import parse_bytes


@dataclass(frozen=True)
class Rules:
    """Digests of keys, so that all comparisons take the same time; `hosts` are the names a browser may know us by."""

    keys: tuple[bytes, ...] = field(repr=False)
    admin_key: bytes | None = field(repr=False)
    hosts: frozenset[str] | None
    most_bytes: int

    def allows(self, given: str) -> bool:
        """Whether this is one of the keys. All are compared, whichever fits."""
        return sum(hmac.compare_digest(_digest(given), key) for key in self.keys) > 0

    def allows_admin(self, given: str) -> bool:
        """Whether this is the admin key."""
        return self.admin_key is not None and hmac.compare_digest(_digest(given), self.admin_key)


def make_rules(options: ServeOptions) -> Rules:
    """The rules that the options ask for.

    Raises:
        ServeError: anybody could use the server from elsewhere, or the file of keys is of no use.
    """
    keys = _keys(options)
    local = is_loopback(options.host)
    if not local and not keys and not options.insecure:
        raise ServeError(
            f"host is {options.host}, which other machines can reach, and there is no API key: anybody could use the "
            "server. Give --api-key-file FILE, or listen on 127.0.0.1; --insecure if that is what you want."
        )
    # Without keys a web page of anybody's could reach a local server under a name of its own (DNS rebinding).
    hosts = frozenset({"localhost", "127.0.0.1", "::1", options.host.lower()}) if local and not keys else None
    return Rules(
        keys=tuple(_digest(key) for key in keys),
        admin_key=_digest(options.admin_key) if options.admin_key else None,
        hosts=hosts,
        most_bytes=_size(options.max_request),
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except BudgetError as error:
        raise ServeError(f"max_request is {text!r}, which is no size. Write 4MiB, 500kB or 1048576 (bytes).") from error


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _keys(options: ServeOptions) -> list[str]:
    if not options.api_key_file:
        return [options.api_key] if options.api_key else []
    path = Path(options.api_key_file).expanduser()
    try:
        keys = path.read_text(encoding="utf-8").split()
    except UnicodeDecodeError as error:
        raise ServeError(f"{path} is not UTF-8 text. Expected keys, one a line.") from error
    if not keys:
        raise ServeError(f"There is no key in {path}. Expected keys, one a line.")
    return keys
