"""The Python environment that Stoker runs in (`.venv`): made, filled and mended. Standard library only."""
