"""Several devices, several processes, and signals that stop a run."""
