"""What requests did: traces of their routing, expert activation matrices and collections of them. Decides nothing."""

from moestro.trace.trace import Pass, Trace

__all__ = ["Pass", "Trace"]
