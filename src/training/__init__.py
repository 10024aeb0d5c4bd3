"""One trainer, the stages on it, and what plugs into it."""
