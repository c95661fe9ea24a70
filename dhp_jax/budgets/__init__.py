"""Which channels survive, within budgets that are counted or measured."""
