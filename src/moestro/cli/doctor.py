"""`moestro doctor`: how fast this machine's disk, memory and processor are, and what is made of it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moestro.cli.arguments import AsJson
from moestro.cli.boundary import say
from moestro.cli.console import output, print_json, print_table
from moestro.cli.picture import check_picture_path
from moestro.errors import RequestError
from moestro.memory.budget import format_bytes

if TYPE_CHECKING:
    from moestro.doctor import Diagnosis


def doctor(
    path: Annotated[str, typer.Option("--path", help="Folder whose disk is measured (the cache folder).")] = "",
    store: Annotated[
        str, typer.Option("--store", help="Store whose own files are read instead; nothing is written to its disk.")
    ] = "",
    as_json: AsJson = False,
    picture: Annotated[
        str, typer.Option("--picture", help="Write a PNG of bandwidth over block size and reads at a time.")
    ] = "",
) -> None:
    """Measure the disk under a folder once, some ten seconds; later runs read from it as it turned out best.

    Writes 256 MiB into the folder, which are removed again, unless a store is given.
    """
    from moestro.doctor import examine
    from moestro.memory.disk_profile import save_profile
    from moestro.store.folders import cache_folder

    if path and store:
        raise RequestError("Both --path and --store are given. Give the folder to write into, or the store to read.")
    if picture:
        check_picture_path(Path(picture))
    where = Path(path).expanduser() if path else cache_folder()
    if not path and not store:
        where.mkdir(parents=True, exist_ok=True)
    found = examine(where, store=Path(store).expanduser() if store else None)
    try:
        kept = str(save_profile(found.profile, cache_folder()))
    except OSError as error:
        kept = ""
        say("note", f"The measurement cannot be kept in {cache_folder()} ({error.strerror}): runs use the defaults.")
    if picture:
        from moestro.cli.doctor_picture import draw_disk

        draw_disk(found, Path(picture))
    if as_json:
        print_json({**asdict(found), "words": found.words(), "kept": kept})
    else:
        _draw(found, kept)


def _draw(found: Diagnosis, kept: str) -> None:
    threads = sorted({one.threads for one in found.disk.grid})
    speeds = {(one.block_bytes, one.threads): one.bytes_per_s for one in found.disk.grid}
    what = found.read_file or "a temporary file"
    print_table(
        f"{found.profile.device}: GB/s of {what}, {', '.join(map(str, threads))} reads at a time",
        [
            (format_bytes(block), "  ".join(f"{speeds[block, count] / 1e9:5.2f}" for count in threads))
            for block in sorted({block for block, _ in speeds})
        ],
    )
    console = output()
    for text in found.words():
        console.print(f"- {text}", soft_wrap=True, markup=False)
    if kept:
        console.print(f"Kept in {kept}.", soft_wrap=True, markup=False)
