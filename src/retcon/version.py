"""The version of retcon, where every module can read it."""

__version__ = "0.2.0.dev0"


def versions(*more: str) -> dict[str, str]:
    """Return the versions of retcon, torch and transformers, which decide a result, and of packages beside them."""
    from importlib import metadata

    import torch

    return {"retcon": __version__, "torch": torch.__version__} | {
        name: metadata.version(name) for name in ("transformers", *more)
    }
