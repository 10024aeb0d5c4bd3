"""The background run on disk and in /proc: directory, lock, status, journal, list. Standard library only."""
