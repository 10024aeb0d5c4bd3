"""Networks only: they know nothing of data files, training or runs."""
