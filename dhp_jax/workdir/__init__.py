"""The directory of a run: what it holds, and reading it."""
