"""Pictures: read, checked, made, kept, augmented."""
