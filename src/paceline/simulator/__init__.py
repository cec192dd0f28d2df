"""What would have happened? The kernel that serves, on a virtual clock, with models of engines.

A scenario says which workers, which requests, which promises and which troubles; a run plays it
with one policy and one seed. Same scenario, policy and seed: same result, byte for byte.
"""
