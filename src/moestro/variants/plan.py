"""What adding a variant will write and where, once it is known what changed."""

from __future__ import annotations

from dataclasses import dataclass

from moestro.config import VariantOptions
from moestro.hf.skeleton import ExpertLayer, Skeleton
from moestro.quant.delta import DeltaRegion, salient_channels
from moestro.quant.low_rank import Region, low_rank_region
from moestro.store.dense_file import DenseLayout, DenseSpec, dense_layout
from moestro.store.reader import Store
from moestro.store.variant_manifest import ExpertDelta, expert_delta
from moestro.variants.changes import Changes, Roles

DELTA_SUFFIX = ".delta"
"""What the name of a matrix's delta in the dense file ends with."""


@dataclass(frozen=True)
class VariantPlan:
    """`experts[layer]` are the changed experts, `layers[layer]` what their planes hold. `deltas` are the regions of
    dense matrices, `replacements` the names of tensors stored in full, in the order of `dense.places`."""

    options: VariantOptions
    layers: tuple[ExpertDelta | None, ...]
    experts: tuple[tuple[int, ...], ...]
    deltas: dict[str, Region]
    bias_of: dict[str, str]
    replacements: tuple[str, ...]
    dense: DenseLayout

    @property
    def planes_nbytes(self) -> int:
        """Bytes of all delta planes."""
        return sum(
            layer.nbytes * len(experts) for layer, experts in zip(self.layers, self.experts, strict=True) if layer
        )

    def plane_offset(self, layer: int, expert: int) -> int:
        """Where the plane of a changed expert begins."""
        before = sum(
            one.nbytes * len(experts)
            for one, experts in zip(self.layers[:layer], self.experts[:layer], strict=True)
            if one
        )
        own = self.layers[layer]
        assert own is not None
        return before + own.nbytes * self.experts[layer].index(expert)


def plan_variant(
    store: Store, skeleton: Skeleton, changes: Changes, roles: Roles, options: VariantOptions
) -> VariantPlan:
    """Lay out the deltas of everything that changed."""
    layers = tuple(
        _layer(layer, frozenset().union(*changed.values()), options) if changed else None
        for layer, changed in zip(skeleton.expert_layers, changes.experts, strict=True)
    )
    deltas, biases = _dense_regions(skeleton, changes, roles, options)
    rest = [name for name in skeleton.dense if name in changes.dense - deltas.keys() - biases]
    specs = [DenseSpec(name + DELTA_SUFFIX, "U8", (region.nbytes,)) for name, region in deltas.items()]
    specs += [DenseSpec(name, store.dense[name].dtype, store.dense[name].shape) for name in rest]
    return VariantPlan(
        options=options,
        layers=layers,
        experts=tuple(tuple(sorted(changed)) for changed in changes.experts),
        deltas=deltas,
        bias_of={name: roles.bias_of[name] for name, region in deltas.items() if region.bias},
        replacements=tuple(rest),
        dense=dense_layout(specs),
    )


def matrix_names(layer: ExpertLayer) -> tuple[str, str]:
    """The names of the parameters that are an expert's two projections."""
    names = {param.name for param in layer.params}
    return ("gate_up_proj" if "gate_up_proj" in names else "up_proj"), "down_proj"


def _layer(layer: ExpertLayer, changed: frozenset[str], options: VariantOptions) -> ExpertDelta:
    shapes = {param.name: param.shape for param in layer.params}
    up, down = (
        _region(shapes[name], options, options.bits, bias=f"{name}_bias" in changed)
        if changed & {name, f"{name}_bias"}
        else None
        for name in matrix_names(layer)
    )
    return expert_delta(up, down)


def _dense_regions(
    skeleton: Skeleton, changes: Changes, roles: Roles, options: VariantOptions
) -> tuple[dict[str, Region], set[str]]:
    """The regions of dense matrices, and the biases that go with them."""
    regions: dict[str, Region] = {}
    biases: set[str] = set()
    for name, (shape, _) in skeleton.dense.items():
        bias = roles.bias_of.get(name)
        has_bias = bias in changes.dense
        if name in roles.matrices and (name in changes.dense or has_bias):
            regions[name] = _region(shape, options, options.bits_of_dense, bias=has_bias)
            if bias and has_bias:
                biases.add(bias)
    return regions, biases


def _region(shape: tuple[int, ...], options: VariantOptions, bits: int, *, bias: bool) -> Region:
    rows, columns = shape
    flat = DeltaRegion(rows, columns, bits, salient_channels(columns, options.kept_share), bias)
    return low_rank_region(rows, columns, flat.nbytes, bias=bias) if options.is_low_rank else flat
