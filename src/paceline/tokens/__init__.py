"""Which tokens does an engine see in a prompt? Templates and tokenizers, in threads of their own.

Here may live what reads a model's tokenizer. It knows bodies of requests and nothing of who sends
them; jinja2 and tokenizers are loaded when a tokenizer is set.
"""

from paceline.tokens.service import Prompts, load

__all__ = ["Prompts", "load"]
