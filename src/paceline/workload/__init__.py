"""What arrives, how it is sent, and what became of it: traces, generators, driver, reports.

Everything that is random takes a seeded generator, so that a replay can be repeated.
"""
