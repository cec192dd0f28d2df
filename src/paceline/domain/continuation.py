"""Is an answer nothing but one run of tokens, so that it can go on elsewhere from its last one?

The partial answer becomes part of the prompt. That is the same generation only where each token
depends on nothing but the tokens before it. Whatever keeps state beside them (a grammar, a tool
parser, several choices, log-probabilities numbered from the start, penalties for what the answer
has said, which a prompt does not get) cannot go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STATEFUL = (
    "audio",
    "custom_logit_processor",
    "ebnf",
    "echo",
    "function_call",
    "functions",
    "grammar",
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "json_schema",
    "logprobs",
    "prompt_logprobs",
    "regex",
    "return_hidden_states",
    "session_params",
    "structured_outputs",
    "suffix",
    "tools",
    "top_logprobs",
    "truncate_prompt_tokens",
    "use_beam_search",
)
"""Fields that, when set, make an answer more than the tokens that follow its prompt."""
PENALTIES = ("frequency_penalty", "presence_penalty")
CHOICES = ("best_of", "n")
READ = (*STATEFUL, *PENALTIES, *CHOICES, "response_format")
"""All fields of a request's body that the judgement rests on."""


def can_go_on(body: Mapping[str, Any]) -> bool:
    """Can the answer to this request go on elsewhere without becoming another?"""
    if any(_is_set(body.get(name)) for name in STATEFUL):
        return False
    if any(body.get(name) for name in PENALTIES):
        return False
    if any((body.get(name) or 1) != 1 for name in CHOICES):
        return False
    form = body.get("response_format")
    return form is None or (isinstance(form, dict) and form.get("type") == "text")


def _is_set(value: Any) -> bool:
    """`logprobs: 0` asks for something; false, null and empty ask for nothing."""
    return type(value) is int or bool(value)
