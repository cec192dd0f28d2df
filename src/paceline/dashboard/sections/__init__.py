"""The sections of the page, from top to bottom: each turns what it is shown into HTML."""
