"""Callbacks that may change training."""
