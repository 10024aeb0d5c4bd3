"""Where data come from: the hub, archives, tables."""
