"""Loading, conversations, and the DoLa pieces that run beside the model."""
