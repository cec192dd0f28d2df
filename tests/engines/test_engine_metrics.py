"""Are the wanted figures found on a metrics page, and no others?"""

from hypothesis import given
from hypothesis import strategies as st

from paceline.engines.metrics import Metrics

NAMES = st.from_regex(r"[a-z]{1,3}(:[a-z_]{1,4})?", fullmatch=True)
LABELS = st.dictionaries(st.from_regex(r"[a-z]{1,4}", fullmatch=True), st.text(max_size=8))
VALUES = st.floats(allow_nan=False, allow_infinity=False)


def line(name: str, labels: dict[str, str], value: float) -> str:
    def escaped(text: str) -> str:
        return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    inside = ",".join(f'{key}="{escaped(text)}"' for key, text in labels.items())
    return f"{name}{{{inside}}} {value!r}" if labels else f"{name} {value!r}"


@given(st.lists(st.tuples(NAMES, LABELS, VALUES), max_size=20))
def test_each_metric_adds_up_whatever_stands_in_labels(
    series: list[tuple[str, dict[str, str], float]],
) -> None:
    page = Metrics("".join(line(*one) + "\n" for one in series).encode("utf-8", "surrogatepass"))
    for name in {name for name, _, _ in series}:
        values = [value for other, _, value in series if other == name]
        assert [value for _, value in page.samples(name)] == values


@given(st.binary(max_size=200), st.binary(max_size=20))
def test_no_page_is_too_broken_to_be_read(before: bytes, after: bytes) -> None:
    page = Metrics(before + b"\nx" + after + b"\nx 1\n")
    assert page.samples("x")[-1][1] == 1.0


def test_a_name_that_begins_like_another_is_another() -> None:
    page = Metrics(b'waiting_by_reason{reason="capacity"} 5\nwaiting{engine="0"} 2\n')
    assert page.total("waiting") == 2


def test_the_newest_spelling_counts() -> None:
    page = Metrics(b"old 1\nnew 2\n")
    assert page.total("new", "old") == 2
    assert page.total("newer", "old") == 1
    assert page.total("newer") is None


def test_comments_timestamps_and_exemplars_do_not_disturb() -> None:
    page = Metrics(b'# TYPE x counter\nx{a="b} 9"} 3 1395066363000 # {trace="1"} 7\n')
    assert page.samples("x") == [({"a": "b} 9"}, 3.0)]


def test_what_is_no_number_does_not_count() -> None:
    page = Metrics(b"x NaN\nx +Inf\nx ?\nx 4\n")
    assert page.total("x") == 4
    assert page.mean("x") == 4


def test_what_cannot_be_a_number_of_things_is_none() -> None:
    assert Metrics(b"x 1e300").count("x") is None
    assert Metrics(b"x -1").count("x") is None
    assert Metrics(b"x 3.0").count("x") == 3
