"""Labelled images, one module a data set."""
