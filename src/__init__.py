"""A background training daemon with monitors: one trainer for every part of an omni model."""
