"""What a run leaves for people: a page, a table of its layers, a summary, and plots."""
