"""A network on disk: its description, its arrays, saving and loading."""
