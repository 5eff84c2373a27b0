"""DoLa beside the model: all of it that is neither a root script nor the model itself."""

__version__ = "0.2.0"
