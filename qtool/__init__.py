"""qtool: turns a Hugging Face checkpoint into a quantized one, block by block."""

__version__ = "0.1.0"


def load(path, device="auto", dtype=None):  # type: ignore[no-untyped-def]
    """The checkpoint at `path` as a transformers module that computes with its weights as they are stored.

    See qtool.runtime.load.load: imported when called, so that `import qtool` costs nothing.
    """
    from qtool.runtime.load import load as load_model

    return load_model(path, device, dtype)
