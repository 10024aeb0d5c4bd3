"""Recordings of speech: read, checked, made, kept, augmented."""
