"""Settings that would hurt are refused by name, before anything starts."""

import pytest
from pydantic import ValidationError

from service.settings import Settings


def make(**values: object) -> Settings:
    return Settings(_env_file=None, **values)  # type: ignore[call-arg, arg-type]


@pytest.mark.parametrize(("lease_s", "renew_s"), [(10.0, 15.0), (10.0, 10.0), (10.0, 4.0)])
def test_a_lease_that_would_end_before_its_renewals_is_refused(
    lease_s: float, renew_s: float
) -> None:
    with pytest.raises(ValidationError) as caught:
        make(lease_s=lease_s, renew_s=renew_s)

    problem = caught.value.errors()[0]
    assert problem["loc"] == ("renew_s",)
    assert "a third of lease_s" in problem["msg"]


def test_a_lease_that_outlives_two_lost_renewals_is_taken() -> None:
    assert make(lease_s=9.0, renew_s=3.0).renew_s == 3.0
    assert make().renew_s * 3 <= make().lease_s


def test_a_shorter_lease_needs_a_shorter_renewal_than_the_default() -> None:
    with pytest.raises(ValidationError, match="a third of lease_s"):
        make(lease_s=10.0)
