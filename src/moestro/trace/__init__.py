"""What requests did: traces of their routing, expert activation matrices and collections of them. Decides nothing."""

from moestro.trace.collection import EamCollection, Matcher
from moestro.trace.collection_file import COLLECTION_NAME, CollectionFile
from moestro.trace.recorder import Recorder, StepRouting
from moestro.trace.trace import Pass, Trace

__all__ = ["COLLECTION_NAME", "CollectionFile", "EamCollection", "Matcher", "Pass", "Recorder", "StepRouting", "Trace"]
