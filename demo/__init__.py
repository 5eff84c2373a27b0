"""The page in the browser: what it does (device, inputs, paint, ask, layers), its look, and its command (app)."""
