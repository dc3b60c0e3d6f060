"""The Personalizer dies over a fit: the caller is told to come again."""

from __future__ import annotations

import asyncio
from unittest.mock import AsyncMock, Mock

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from deployments.app import fitted_by
from deployments.fitting import FitRequest
from deployments.problems import Problem


@pytest.mark.parametrize("lost", [ActorDiedError(), ActorUnavailableError("gone", None)])
def test_a_fit_that_was_lost_with_its_machine_is_answered_503_so_that_clients_try_again(lost: Exception) -> None:
    personalizer = Mock(fit=Mock(remote=AsyncMock(side_effect=lost)))  # a fault at an exact moment
    with pytest.raises(Problem, match="try again") as refused:
        asyncio.run(fitted_by(personalizer, FitRequest(b"key", ["a text"], ["yes"])))
    assert refused.value.status == 503
