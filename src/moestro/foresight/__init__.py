"""What is learned from traces: the nets of the learned predictor are trained and kept here."""

from moestro.foresight.fit import check_trace, fit_store
from moestro.foresight.net_file import NETS_FILE, load_nets, save_nets
from moestro.foresight.train import TrainingOptions, train

__all__ = ["NETS_FILE", "TrainingOptions", "check_trace", "fit_store", "load_nets", "save_nets", "train"]
