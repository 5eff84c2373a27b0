"""Which decoding paints better: painted directories, scored and compared: `python -m janus.dola.compare`."""
