"""Random weights in place of a checkpoint's: a model of a config's real shape without a download.

Random numbers are drawn per tensor, expert and run of rows, each from a generator of its own, so that they do not
depend on what was drawn before: an interrupted pack goes on with the same bytes.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moestro.hf.skeleton import Skeleton
from moestro.quant import make_encoding
from moestro.quant.random_codes import random_flat, random_regions
from moestro.quant.tiles import HEADER
from moestro.store.calibration_facts import rounded
from moestro.store.checkpoint import Checkpoint, read_config
from moestro.store.data_free import decoded, relative_error
from moestro.store.dense_file import FLAT_BITS, DenseSpec
from moestro.store.dtypes import TORCH_DTYPES, dtype_name
from moestro.store.expert_work import ExpertWork, Findings, WithoutText
from moestro.store.layout import Layout
from moestro.store.pack_plan import PackPlan
from moestro.store.quantised import SourceTensor
from moestro.store.workers import in_order
from moestro.store.writer import EncodedExpert

PREFIX = "random-"
"""What the fingerprint of random weights begins with."""

_BLOCK_VALUES = 1 << 20
_PIECE_ROWS = 2048
_BIAS = 0.1
"""Deviation of biases, sinks and other vectors that are not factors."""

_SAMPLE = (64, 512)


class RandomCheckpoint(Checkpoint):
    """A checkpoint of the config in `folder` whose weights are drawn when they are read."""

    def __init__(self, folder: Path, skeleton: Skeleton, *, dtype: str, seed: int) -> None:
        self.folder, self.files, self._stack = folder, (), ExitStack()
        self.config = read_config(folder)
        self.origin = f"{PREFIX}{seed}-"
        sizes = RandomSizes(skeleton)
        experts = [f"{one.module}.{param.name}" for one in skeleton.expert_layers for param in one.params]
        state = skeleton.model.state_dict(keep_vars=True)
        self.tensors: dict[str, SourceTensor] = {
            name: RandomTensor(
                name,
                tuple(state[name].shape),
                dtype if state[name].is_floating_point() else dtype_name(state[name].dtype),
                sizes,
                seed,
            )
            for name in (*skeleton.dense, *experts)
        }

    @property
    def quantisation(self) -> str | None:
        """None, whatever the config's weights were published as."""
        return None


class RandomSizes:
    """How large a model's random weights are.

    Inputs of a matrix count as independent and of size 1, its outputs are too; factors are 1. So norms pass on what
    they get, experts and attention add about as much to the residual stream as a token brings, routers are near to
    uniform, and logits have a deviation of 1.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        state = skeleton.model.state_dict(keep_vars=True)
        embedding: Any = skeleton.model.get_input_embeddings().weight
        head = skeleton.model.get_output_embeddings()
        self._embeddings = frozenset(name for name in skeleton.dense if state[name] is embedding)
        self._inputs = {
            f"{layer.module}.{param.name}": param.shape[-1]
            for layer in skeleton.expert_layers
            for param in layer.params
            if len(param.shape) == 2
        }
        self._vectors = {
            f"{layer.module}.{param.name}"
            for layer in skeleton.expert_layers
            for param in layer.params
            if len(param.shape) == 1
        }
        # A head that is tied to embeddings of size 1 would make logits as large as the root of the width.
        tied = head is not None and head.weight is embedding
        self._last_norm = "model.norm.weight" if tied else ""
        self._factor = 1 / math.sqrt(embedding.shape[-1])

    def deviation(self, name: str, shape: tuple[int, ...]) -> float:
        """Of a tensor's values."""
        if name in self._embeddings:
            return 1.0
        if name in self._vectors or len(shape) == 1:
            return _BIAS
        return 1 / math.sqrt(self._inputs.get(name, shape[-1]))

    def constant(self, name: str, shape: tuple[int, ...]) -> float | None:
        """The value of a factor (a norm's weight); None for what is random."""
        if len(shape) != 1 or not name.endswith(".weight"):
            return None
        return self._factor if name == self._last_norm else 1.0


class RandomTensor(SourceTensor):
    """A tensor that is drawn, a run of rows at a time."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: str, sizes: RandomSizes, seed: int) -> None:
        self.dtype, self.shape = dtype, shape
        self._name, self._sizes, self._seed = name, sizes, seed

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        kind, width = TORCH_DTYPES[self.dtype], self.shape[1:]
        constant = self._sizes.constant(self._name, self.shape)
        if constant is not None or not kind.is_floating_point:
            return torch.full((stop - start, *width), constant or 0).to(kind)
        block = max(1, _BLOCK_VALUES // max(1, math.prod(width)))
        found = torch.empty((stop - start, *width), dtype=kind)
        for first in range(start // block * block, stop, block):
            rows = min(block, self.shape[0] - first)
            begin, end = max(first, start), min(first + rows, stop)
            found[begin - start : end - start] = self._block(first, rows)[begin - first : end - first]
        return found

    def read(self) -> torch.Tensor:
        return self.read_rows(0, self.shape[0]) if self.shape else torch.zeros((), dtype=TORCH_DTYPES[self.dtype])

    def _block(self, first: int, rows: int) -> torch.Tensor:
        values = generator(self._seed, self._name, first).standard_normal((rows, *self.shape[1:]), dtype=np.float32)
        return torch.from_numpy(values).mul_(self._sizes.deviation(self._name, self.shape))


class RandomCodes(WithoutText):
    """An `ExpertEncoder` that draws codes instead of looking for them. Quantised dense matrices are drawn, too."""

    def __init__(self, skeleton: Skeleton, seed: int) -> None:
        self._skeleton, self._sizes, self._seed = skeleton, RandomSizes(skeleton), seed

    def dense_units(self, plan: PackPlan) -> frozenset[int]:
        """Those that are quantised."""
        return frozenset(unit for unit, place in enumerate(plan.dense.places) if place.spec.dtype in FLAT_BITS)

    def run(self, work: ExpertWork) -> Findings:
        """Write everything that is missing."""
        for unit in sorted(self.dense_units(work.plan)):
            work.write_dense_pieces(unit, self._flat_pieces(work.plan.dense.places[unit].spec))
        layouts, options = work.plan.layouts, work.plan.options
        errors = [_errors(layout, options.encoding, options.promised_levels) for layout in layouts]
        missing = (
            partial(self._expert, work.plan, layer, expert, errors[entry.layout])
            for layer, entry in enumerate(work.plan.layers)
            for expert in range(entry.experts)
            if work.errors(layer, expert) is None
        )
        for layer, expert, vectors, encoded in in_order(missing):
            work.write(layer, expert, vectors, encoded)
        return Findings(warnings=(f"random weights of seed {self._seed}: no trained model",))

    def _flat_pieces(self, spec: DenseSpec) -> Iterator[torch.Tensor]:
        rows, columns = spec.shape
        random = generator(self._seed, spec.name, 0)
        for start in range(0, rows, _PIECE_ROWS):
            some = min(_PIECE_ROWS, rows - start)
            deviation = self._sizes.deviation(spec.name, spec.shape)
            piece = random_flat(some, columns, FLAT_BITS[spec.dtype], deviation, random)
            yield piece if start == 0 else piece[HEADER:]

    def _expert(
        self, plan: PackPlan, layer: int, expert: int, errors: tuple[float, ...]
    ) -> tuple[int, int, dict[str, torch.Tensor], EncodedExpert]:
        module, options = self._skeleton.expert_layers[layer].module, plan.options
        regions, vectors = {}, {}
        for tensor in plan.layouts[plan.layers[layer].layout].planes[0].tensors:
            random = generator(self._seed, f"{module}.{tensor.name}", expert)
            if tensor.group_size is None:
                drawn = random.standard_normal(tensor.shape, dtype=np.float32)
                vectors[tensor.name] = torch.from_numpy(drawn).mul_(_BIAS)
            else:
                rows, columns = tensor.shape
                deviation = 1 / math.sqrt(columns)
                regions[tensor.name] = random_regions(
                    options.encoding, rows, columns, options.promised_levels, deviation, random
                )
        return layer, expert, vectors, EncodedExpert(regions, errors)


def generator(seed: int, name: str, number: int) -> np.random.Generator:
    """Random numbers of one part of a tensor."""
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed, zlib.crc32(name.encode()), number])))


def _errors(layout: Layout, encoding: str, levels: tuple[int, ...]) -> tuple[float, ...]:
    """What an expert's lower levels lose against its highest, which stands for the original: the sum over matrices."""
    matrices = sum(tensor.group_size is not None for tensor in layout.planes[0].tensors)
    rows, columns = _SAMPLE
    regions = random_regions(encoding, rows, columns, levels, 1.0, generator(0, "sample", 0))
    like_NK, maker = torch.empty(_SAMPLE), make_encoding(encoding)
    best_NK = decoded(maker, regions, like_NK, levels[-1])
    return tuple(
        rounded(matrices * relative_error(best_NK, decoded(maker, regions, like_NK, level))) for level in levels
    )
