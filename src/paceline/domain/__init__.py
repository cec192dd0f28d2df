"""What exists: requests, workers, promises, tenants, and the facts and commands about them.

Frozen values and lifecycles only. Nothing here decides, reads a clock or touches the world.
"""
