"""Edited models for others to load: checkpoints, adapters, changed tensors, GGUF files.

    from retcon.export import export
    export(lm, "edited", format="hf")       # what lm has applied, as a checkpoint with a model card

Each format is a file of its own; `write.py` holds the one way in.
"""

from retcon.export.write import FORMATS, Exported, Format, export, push

__all__ = ["FORMATS", "Exported", "Format", "export", "push"]
