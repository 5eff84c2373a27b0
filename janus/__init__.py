"""The Janus model family, and DoLa decoding around it."""
