"""From a command line to a trainer, and from a finished run to its models."""
