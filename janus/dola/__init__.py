"""DoLa beside the model: all of it that is neither a root script nor the model itself."""
