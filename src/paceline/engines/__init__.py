"""Talks to model servers: one adapter a file, and engines to try without a GPU."""
