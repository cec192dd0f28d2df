"""What to do: pure functions and learners, each module answering one question.

No I/O, no clock, no chance: `now` and seeds are arguments.
"""
