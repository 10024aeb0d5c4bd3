"""The command line over trained models: what they make."""
