"""qtool: turns a Hugging Face checkpoint into a quantized one, block by block."""

__version__ = "0.1.0"
