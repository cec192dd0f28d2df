"""What has the operator decided? One YAML file and the environment, read nowhere else.

`settings` says what may be set, `reader` turns text into it, `rules` says what must agree.
"""

from paceline.config.load import load, parse
from paceline.config.settings import KINDS, POLICIES, ROLES, Config
from paceline.config.values import Address, Secret

__all__ = ["KINDS", "POLICIES", "ROLES", "Address", "Config", "Secret", "load", "parse"]
