"""Loading and conversations, as in the original, and the names that the plans give."""
