"""`moestro inspect`: what a store or a checkpoint holds, and whether it is undamaged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moestro.cli.arguments import AsJson, Model
from moestro.cli.boundary import EXIT_USER_ERROR, say
from moestro.cli.console import Row, print_json, print_table, progress_bar
from moestro.cli.report import quality_rows
from moestro.errors import RouteError, StoreError, VariantError
from moestro.memory.budget import format_bytes

if TYPE_CHECKING:
    from moestro.runtime.subject import Subject
    from moestro.store.reader import Store


def inspect(
    model: Model,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare checksums.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a store or a checkpoint holds; --verify reads every byte of a store."""
    from moestro.runtime.subject import Subject

    subject = Subject.open(model)
    problems = _verify(subject) if verify else None
    if as_json:
        print_json({**_facts(subject), "problems": problems})
    else:
        _draw(subject, problems)
    for problem in problems or ():
        say("error", problem)
    if problems:
        raise typer.Exit(EXIT_USER_ERROR)


def _verify(subject: Subject) -> list[str]:
    if subject.store is None:
        raise StoreError(
            f"{subject.path} is a checkpoint, which has no checksums to verify. Make a store of it with "
            "`moestro pack`, or leave --verify out."
        )
    with progress_bar("verifying") as report:
        found = subject.store.verify(lambda step: report(step.done_bytes, step.total_bytes))
    again = "Copy the file again from where it was whole, or pack the model again."
    return [*(f"{problem}. {again}" for problem in found), *_verify_variants(subject.store)]


def _verify_variants(store: Store) -> list[str]:
    """Every byte of the store's variants, and of what chooses between them."""
    from moestro.domain import load_router, router_path
    from moestro.store.variant_file import list_variants, open_variant

    problems = []
    for name in list_variants(store.path):
        try:
            found = open_variant(store, name).verify()
        except VariantError as error:
            problems.append(str(error))
        else:
            again = "Remove the variant and add it again."
            problems += [f"Of the variant {name}, {problem}. {again}" for problem in found]
    router = router_path(store.path)
    if router.exists():
        try:
            load_router(router, fingerprint=store.manifest.source.fingerprint)
        except RouteError as error:
            problems.append(str(error))
    return problems


def _facts(subject: Subject) -> dict[str, Any]:
    """The object of `inspect --json`. Keys, once published, stay."""
    from moestro.store.variant_file import list_variants

    config, whole = subject.skeleton.config, subject.shape(max(subject.levels))
    return {
        "kind": "checkpoint" if subject.store is None else "store",
        "path": str(subject.path),
        "architecture": config.architectures[0] if config.architectures else type(subject.skeleton.model).__name__,
        "model_type": config.model_type,
        "layers": config.num_hidden_layers,
        "moe_layers": len(whole.experts),
        "experts": max(whole.experts),
        "active_experts": max(subject.experts_per_token),
        "dtypes": list(subject.dtypes),
        "levels": list(subject.levels),
        "encoding": subject.encoding,
        "exact_level": subject.exact_level,
        "bits_per_weight": {str(level): round(subject.bits_per_weight(level), 4) for level in subject.levels},
        "dense_bits": subject.dense_bits,
        "dense_bytes": whole.dense_bytes,
        "expert_bytes": whole.expert_bytes,
        "bytes_per_expert": max(whole.bytes_per_expert),
        "variants": [] if subject.store is None else list(list_variants(subject.store.path)),
        "files": dict(subject.files()),
    }


def _level_row(subject: Subject, level: int) -> Row:
    shape = subject.shape(level)
    exact = ", the exact one" if level == subject.exact_level else ""
    return (
        f"level {level}",
        f"{subject.bits_per_weight(level):.2f} bits per weight",
        f"{format_bytes(max(shape.bytes_per_expert))} an expert, {format_bytes(shape.expert_bytes)} in all{exact}",
    )


def _draw(subject: Subject, problems: list[str] | None) -> None:
    facts = _facts(subject)
    remark = "" if subject.store else "sizes are those that its store would have"
    experts = (
        f"{facts['experts']} in each of {facts['moe_layers']} MoE layers, {facts['active_experts']} active per token"
    )
    rows: list[Row] = [
        ("kind", facts["kind"], remark),
        ("architecture", facts["architecture"]),
        ("layers", str(facts["layers"])),
        ("experts", experts),
        ("dtype", ", ".join(facts["dtypes"])),
        ("encoding", facts["encoding"]),
        *(_level_row(subject, level) for level in subject.levels),
        ("dense weights", format_bytes(facts["dense_bytes"]), f"linear maps of {facts['dense_bits']} bits"),
        ("experts' weights", format_bytes(facts["expert_bytes"]), f"{format_bytes(facts['bytes_per_expert'])} each"),
    ]
    if facts["variants"]:
        rows.append(("variants", str(len(facts["variants"])), ", ".join(facts["variants"])))
    if problems is not None:
        rows.append(("verified", "every byte is as packed" if not problems else f"{len(problems)} problem(s)"))
    print_table(facts["path"], rows)
    if subject.store is not None and subject.store.manifest.calibration is not None:
        print_table("quality", quality_rows(subject.store.manifest))
    print_table("files", [(name, format_bytes(size)) for name, size in facts["files"].items()])
