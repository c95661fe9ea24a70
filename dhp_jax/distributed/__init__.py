"""Several devices, several processes, and being told to stop."""
