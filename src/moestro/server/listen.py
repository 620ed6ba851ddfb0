"""The socket of a server, before anything heavy is loaded: a port that is taken is known at once."""

from __future__ import annotations

import errno
import socket

from moestro.config import ServeOptions
from moestro.errors import ServeError
from moestro.server.rules import is_loopback


def listen(options: ServeOptions) -> socket.socket:
    """The socket, bound and listening. Raises ServeError."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ServeError(f"host is {options.host!r}, which is no address of this machine ({error}).") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(512)
    except OSError as error:
        listener.close()
        raise ServeError(_why_not(options, error)) from error
    return listener


def address(listener: socket.socket, host: str) -> str:
    """The URL of a listening socket."""
    name = host if is_loopback(host) or host not in ("0.0.0.0", "::") else "127.0.0.1"
    return f"http://{f'[{name}]' if ':' in name else name}:{listener.getsockname()[1]}"


def _why_not(options: ServeOptions, error: OSError) -> str:
    where = f"{options.host}:{options.port}"
    if error.errno == errno.EADDRINUSE:
        return (
            f"{where} is taken: another program listens there (`moestro ps` lists moestro's own). Give another --port, "
            "or --port 0 for any that is free."
        )
    if error.errno == errno.EACCES:
        return f"{where} is not allowed: ports below 1024 are the administrator's. Give another --port."
    return f"{where} cannot be listened on ({error.strerror}). Give another --host or --port."
