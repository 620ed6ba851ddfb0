"""What is learned from traces: the nets of the learned predictor are trained and kept here."""

from moestro.foresight.fit import check_trace, fit_store
from moestro.foresight.net_file import (
    NETS_FILE,
    encode_nets,
    load_nets,
    save_nets,
    worth_their_bytes,
)
from moestro.foresight.train import TrainingOptions, train

__all__ = [
    "NETS_FILE",
    "TrainingOptions",
    "check_trace",
    "encode_nets",
    "fit_store",
    "load_nets",
    "save_nets",
    "train",
    "worth_their_bytes",
]
