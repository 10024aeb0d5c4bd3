"""Callbacks that watch, record and ask, and never change what is computed."""
