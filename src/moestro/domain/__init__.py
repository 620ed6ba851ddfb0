"""The router of domains: which fine-tune of a store a prompt is for, told from its text or from what the base routes.

Pure but for one file in the store: knows no engine and no HTTP. Classifiers are fitted with scikit-learn and used with
numpy alone.
"""

from moestro.domain.classifiers import Classifier, Prompt, RoutedPrompt, TextClassifier, TraceClassifier
from moestro.domain.examples import MOST_EXAMPLES, read_examples
from moestro.domain.fit import RoutedExample, check_examples, fit_text, fit_trace
from moestro.domain.router import AUTO, BASE, Choice, DomainRouter
from moestro.domain.router_file import ROUTER_FILE, load_router, router_path, save_router

__all__ = [
    "AUTO",
    "BASE",
    "MOST_EXAMPLES",
    "ROUTER_FILE",
    "Choice",
    "Classifier",
    "DomainRouter",
    "Prompt",
    "RoutedExample",
    "RoutedPrompt",
    "TextClassifier",
    "TraceClassifier",
    "check_examples",
    "fit_text",
    "fit_trace",
    "load_router",
    "read_examples",
    "router_path",
    "save_router",
]
