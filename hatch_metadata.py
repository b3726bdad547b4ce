"""Metadata that depends on where the repository is: the README's links on a package index, and the project's addresses.

REPOSITORY=https://... names the place when a package is built. Without it no address is given, and links into the
repository become plain text, so that none is broken.
"""

import os
import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([^)\s]+)\)")


class Metadata(MetadataHookInterface):
    def update(self, metadata: dict) -> None:  # type: ignore[type-arg]
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        address = os.environ.get("REPOSITORY", "").rstrip("/")
        if address:
            metadata["urls"] = {"Repository": address, "Changelog": f"{address}/blob/main/CHANGELOG.md"}
        linked = LINK.sub(rf"[\1]({address}/blob/main/\2)" if address else r"\1", readme)
        metadata["readme"] = {"content-type": "text/markdown", "text": linked}
