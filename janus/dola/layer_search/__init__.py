"""Choosing the contrast layer, offline: `python -m janus.dola.layer_search`."""
