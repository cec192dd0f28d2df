"""Talks to clients, and relays their streams: the hot path.

What it needs of the host it states as Protocols (`ports`); it never decides where a request goes.
"""
