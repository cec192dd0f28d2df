"""Are blocks named by their text and nothing else, and is every break in a story noticed?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.domain.kvevents import (
    NAME_BITS,
    Follows,
    Position,
    contents,
    name_after,
    root_name,
    short,
    token_blocks,
)

tokens = st.lists(st.integers(0, (1 << 32) - 1), max_size=40)
sizes = st.integers(1, 8)


@given(tokens, tokens, sizes)
def test_names_are_the_same_as_far_as_the_text_is(
    one: list[int], other: list[int], size: int
) -> None:
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    a, b = token_blocks(one, size).names, token_blocks(other, size).names
    assert len(a) == len(one) // size
    for block, (x, y) in enumerate(zip(a, b, strict=False)):
        assert (x == y) == ((block + 1) * size <= same)
    assert all(0 <= name < 1 << NAME_BITS for name in a)


@given(tokens, sizes)
def test_a_prompt_has_the_names_that_the_kernel_chains(prompt: list[int], size: int) -> None:
    name, names = root_name(size), []
    for content in contents(prompt, size):
        name = name_after(name, content)
        names.append(name)
    assert token_blocks(prompt, size).names == tuple(names)


def test_salt_adapter_and_size_make_other_names() -> None:
    prompt = list(range(32))
    plain = token_blocks(prompt, 16).names
    others = (
        token_blocks(prompt, 16, "lora"),
        token_blocks(prompt, 16, salt="s"),
        token_blocks(prompt, 8),
    )
    assert not any(set(plain) & set(blocks.names) for blocks in others)


def test_what_is_no_token_id_is_refused() -> None:
    with pytest.raises(OverflowError):
        contents([-1], 1)


def test_a_hash_is_kept_alike_whether_told_as_a_number_or_as_bytes() -> None:
    digest = bytes(range(200, 232))
    assert short(digest) == short(int.from_bytes(digest, "big") & (1 << 64) - 1)
    assert 0 <= short(-5) < 1 << NAME_BITS


@pytest.mark.parametrize(
    ("number", "at", "follows"),
    [
        (8, 12.0, Follows.NEXT),
        (9, 12.0, Follows.GAP),
        (7, 11.0, Follows.REPEATED),
        (3, 10.0, Follows.REPEATED),
        (7, 11.5, Follows.RESTARTED),
        (0, 12.0, Follows.RESTARTED),
    ],
)
def test_how_a_batch_follows_the_seventh(number: int, at: float, follows: Follows) -> None:
    assert Position(7, 11.0).followed_by(number, at) is follows


def test_a_story_begins_with_the_number_nought() -> None:
    assert Position().followed_by(0, 5.0) is Follows.NEXT
    assert Position().followed_by(1, 5.0) is Follows.GAP
