from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from vllm_runs import RUNS, Timeline, learn, predicted_itl_s, read

from paceline.policy.steptime import StepTimeEstimator

LEARNED_FROM = 60


def errors_after(path: Path, count: int) -> NDArray[np.float64]:
    """Relative errors of the predicted mean ITL of all requests but the first `count`."""
    requests = read(path)
    timeline, estimator = Timeline(requests), StepTimeEstimator()
    for request in requests[:count]:
        learn(estimator, request, timeline.spans(request))
    model = estimator.model()
    predicted = [predicted_itl_s(model, timeline.spans(r)) for r in requests[count:]]
    return np.array(predicted) / [r.itl_s for r in requests[count:]] - 1


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_sixty_requests_of_a_real_engine_tell_the_itl_of_the_rest_within_eight_percent(
    path: Path,
) -> None:
    assert np.median(np.abs(errors_after(path, LEARNED_FROM))) < 0.08


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_fifty_requests_tell_it_within_ten_percent(path: Path) -> None:
    assert np.median(np.abs(errors_after(path, 50))) < 0.1


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_each_request_is_foretold_from_those_before_it(path: Path) -> None:
    requests = read(path)
    timeline, estimator = Timeline(requests), StepTimeEstimator()
    errors: list[float] = []
    for request in requests:
        spans = timeline.spans(request)
        errors.append(predicted_itl_s(estimator.model(), spans) / request.itl_s - 1)
        learn(estimator, request, spans)
    assert np.median(np.abs(errors[20:])) < 0.05
    assert abs(np.median(errors[20:])) < 0.03


def test_all_three_runs_are_there() -> None:
    assert len(RUNS) == 3
