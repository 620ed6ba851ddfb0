"""`moestro variants`: add fine-tunes of a store's base to it, look at them, and take them out."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moestro.cli.arguments import AsJson
from moestro.cli.boundary import EXIT_USER_ERROR, say
from moestro.cli.console import Row, pack_bar, print_json, print_table
from moestro.cli.opening import locate_store
from moestro.config import VariantOptions
from moestro.errors import VariantError
from moestro.memory.budget import format_bytes

if TYPE_CHECKING:
    from moestro.store.reader import Store
    from moestro.store.variant_file import StoredVariant

StoreName = Annotated[
    str,
    typer.Argument(
        metavar="STORE", help="A store, or what has one: a checkpoint folder, a Hugging Face id, a built-in model."
    ),
]
Name = Annotated[str, typer.Argument(help="The variant's name; requests say STORE:NAME.")]


def add(
    store: StoreName,
    name: Name,
    checkpoint: Annotated[str, typer.Argument(help="A fine-tune of the store's base: a folder or a Hugging Face id.")],
    options: VariantOptions,
    base: Annotated[
        str, typer.Option(help="The checkpoint that the store was packed from (empty: where that was).")
    ] = "",
) -> None:
    """Add a fine-tune of the store's base as a variant: the differences in few bits."""
    from moestro.variants.add import add_variant

    started = time.monotonic()
    opened = open_store(store, auto_pack=True)
    with pack_bar("adding") as report:
        variant = add_variant(opened, name, checkpoint, base=base, options=options, progress=report)
    print_table(f"added {name}", [*_rows(opened, variant), ("time", f"{time.monotonic() - started:.1f} s")])


def list_(store: StoreName, as_json: AsJson = False) -> None:
    """List the variants of a store."""
    from moestro.store.variant_file import list_variants, open_variant

    opened = open_store(store)
    found: list[StoredVariant] = []
    for name in list_variants(opened.path):
        try:
            found.append(open_variant(opened, name))
        except VariantError as error:
            say("note", error)
    if as_json:
        print_json({"variants": [_facts(opened, variant) for variant in found]})
    elif found:
        rows: list[Row] = [(one.name, format_bytes(one.manifest.nbytes), _how(one)) for one in found]
        print_table(store, rows)
    else:
        print_table(store, [("variants", "none")])


def show(
    store: StoreName,
    name: Name,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare checksums.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a variant holds; --verify reads every byte of it."""
    from moestro.store.variant_file import open_variant

    opened = open_store(store)
    variant = open_variant(opened, name)
    problems = variant.verify() if verify else None
    if as_json:
        print_json({**_facts(opened, variant), "problems": problems})
    else:
        rows = _rows(opened, variant)
        if problems is not None:
            rows.append(("verified", "every byte is as written" if not problems else f"{len(problems)} problem(s)"))
        print_table(f"{store}:{name}", rows)
    for problem in problems or ():
        say("error", f"{problem}. Remove the variant and add it again.")
    if problems:
        raise typer.Exit(EXIT_USER_ERROR)


def remove(store: StoreName, name: Name) -> None:
    """Take a variant out of a store; requests that run on it finish."""
    from moestro.store.variant_file import remove_variant

    remove_variant(open_store(store).path, name)
    print_table("", [("removed", f"{store}:{name}")])


def open_store(store: str, *, auto_pack: bool = False) -> Store:
    """The store that other commands take under this name; `auto_pack` makes one if need be. Raises MoestroError."""
    from moestro.store.reader import Store

    return Store.open(locate_store(store, auto_pack=auto_pack))


def _facts(store: Store, variant: StoredVariant) -> dict[str, Any]:
    """The object of `--json`. Keys, once published, stay."""
    manifest = variant.manifest
    whole = _whole_bytes(store)
    return {
        "name": variant.name,
        "source": manifest.source_name,
        "fingerprint": manifest.source,
        "method": manifest.method,
        "bits": manifest.bits,
        "dense_bits": manifest.dense_bits,
        "salient": manifest.salient,
        "calibrated_on": manifest.text.name if manifest.text else None,
        "tokens": manifest.tokens,
        "distilled": manifest.distilled,
        "bytes": manifest.nbytes,
        "plane_bytes": manifest.planes_file.nbytes,
        "dense_bytes": manifest.dense_file.nbytes,
        "share_of_16_bit": round(manifest.nbytes / whole, 4),
        "changed_experts": len(manifest.planes),
        "experts": sum(layer.num_experts for layer in store.layers),
        "deltas": len(manifest.deltas),
        "replacements": len(manifest.replacements),
        "warnings": list(manifest.warnings),
    }


def _rows(store: Store, variant: StoredVariant) -> list[Row]:
    facts = _facts(store, variant)
    return [
        ("source", facts["source"], facts["fingerprint"]),
        ("method", _how(variant)),
        ("experts", f"{facts['changed_experts']} of {facts['experts']} changed", format_bytes(facts["plane_bytes"])),
        (
            "dense weights",
            f"{facts['deltas']} matrices and {facts['replacements']} other tensors changed",
            format_bytes(facts["dense_bytes"]),
        ),
        ("bytes", format_bytes(facts["bytes"]), f"{facts['share_of_16_bit']:.3f} of the model in 16 bits"),
        *(("warning", warning) for warning in facts["warnings"]),
    ]


def _how(variant: StoredVariant) -> str:
    manifest = variant.manifest
    codes = f"{manifest.bits} bits"
    if manifest.dense_bits != manifest.bits:
        codes += f" (dense {manifest.dense_bits})"
    kept = f", {manifest.salient:.1%} of the channels kept" if manifest.salient else ""
    text = f", calibrated on {manifest.text.name}" if manifest.text else ", not calibrated"
    steps = f", {manifest.distilled} steps of distillation" if manifest.distilled else ""
    return f"{manifest.method}, {codes}{kept}{text}{steps}"


def _whole_bytes(store: Store) -> int:
    """Bytes of the whole model as numbers of 16 bits."""
    import math

    dense = sum(math.prod(tensor.shape) for tensor in store.dense.values())
    experts = sum(
        layer.num_experts * sum(math.prod(one.shape) for one in layer.layout.planes[0].tensors)
        for layer in store.layers
    )
    return 2 * (dense + experts)
