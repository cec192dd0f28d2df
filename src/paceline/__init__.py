"""Paceline: a gateway for LLM inference fleets that keeps promises about token timing."""

__version__ = "0.1.0"
