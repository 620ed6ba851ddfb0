"""What a replay judges: a policy and a predictor by name, fitted to some requests of a trace.

Shapes: L MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moestro.foresight import NETS_FILE, load_nets, train
from moestro.policy.foresight import Foresight
from moestro.policy.keeping import KeepPolicy, make_keep_policy
from moestro.policy.keeping.eviction import WorthEviction
from moestro.policy.keeping.value import Value
from moestro.policy.observation import Routing, Shape
from moestro.policy.predictors import Predictor, make_predictor
from moestro.policy.predictors.learned import Learned
from moestro.policy.predictors.net import Nets
from moestro.policy.prefetch import Prefetcher
from moestro.simulate.passes import passes
from moestro.trace.trace import Trace
