"""`retcon cache`: what is kept between runs, and how to get rid of it."""

import time
from dataclasses import asdict
from typing import Annotated

import typer

from retcon.cli.options import Json
from retcon.cli.printing import console, emit, plain_table, plural, size
from retcon.errors import InvalidSetting
from retcon.files import cache_dir
from retcon.shared_cache import shared_cache


def cache(
    kinds: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KIND...]", help="moments, passes, values, pre, corpora, fingerprints.", show_default="all"
        ),
    ] = None,
    prune: Annotated[
        bool,
        typer.Option("--prune", help="Remove what is damaged or half written; of KINDs that are named, everything."),
    ] = False,
    days: Annotated[
        float | None, typer.Option(min=0, metavar="N", help="With --prune: also what was written over N days ago.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List what is kept between runs, with its size, and remove it.

    Everything there is made again when it is needed: moments take a pass over text, values a search. Values are of
    runs that did not end; the same command goes on from them. Do not prune them while a run is at work.

    The cache is in $RETCON_CACHE, else in $XDG_CACHE_HOME/retcon or ~/.cache/retcon. Where $RETCON_SHARED_CACHE names a
    folder or a URL (s3://bucket/retcon), it is shared through that; what is there is neither listed nor removed.
    """
    from retcon.workflow.cache import KINDS, kept_files
    from retcon.workflow.cache import prune as remove

    if days is not None and not prune:
        raise InvalidSetting("--days says what --prune removes; add --prune")
    removed = remove(kinds or (), days=days) if prune else []
    kept = kept_files(kinds or ())
    if as_json:
        rows = [asdict(each) | {"path": str(each.path)} for each in kept]
        gone = [asdict(each) | {"path": str(each.path)} for each in removed]
        where = {"folder": str(cache_dir()), "shared": shared_cache()}
        emit({**where, "bytes": sum(k.n_bytes for k in kept), "kept": rows, "removed": gone})
        return
    show = console()
    if (shared := shared_cache()) is not None:
        show.print(f"shared through {shared}", soft_wrap=True)
    if prune:
        n_bytes = sum(each.n_bytes for each in removed)
        show.print(f"removed {plural(len(removed), 'file')}, {size(n_bytes)}" if removed else "nothing to remove")
    if not kept:
        show.print(f"nothing is kept in {cache_dir()}", soft_wrap=True)
        return
    table = plain_table("kind", "what it is", right=("files", "size", "last written"))
    for kind, what in KINDS.items():
        if own := [each for each in kept if each.kind == kind]:
            written = time.strftime("%Y-%m-%d", time.localtime(max(each.written for each in own)))
            table.add_row(kind, what, f"{len(own):,}", size(sum(each.n_bytes for each in own)), written)
    show.print(table)
    show.print(f"\n{size(sum(each.n_bytes for each in kept))} in {cache_dir()}", soft_wrap=True)
