"""What is asked of Azure before anything is created, and how a refusal is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.clusters.azure.api import Api, sign_in
from launcher.clusters.azure.checks import check
from launcher.errors import ClusterError, ResourceError
from tests.azure.conftest import A100
from tests.azure.fake import SUBSCRIPTION, Fake
from tests.azure.test_spec import spec_of


def test_who_asks(azure: Fake) -> None:
    account = sign_in()
    assert account.subscription == SUBSCRIPTION
    assert azure.token not in repr(account)


@pytest.mark.parametrize(
    ("az", "said"),
    [
        ("ERROR: Please run 'az login' to setup account.", "Nobody is logged in"),
        ("ERROR: AADSTS70043: The refresh token has expired. Please run: az login", "login has expired"),
        ("ERROR: AADSTS50173: The provided grant has expired due to it being revoked.", "login has expired"),
        ("ERROR: something else", "gives no token: ERROR: something else"),
    ],
)
def test_no_login_is_told_by_its_cause(azure: Fake, az: str, said: str) -> None:
    azure.az_says(az)
    with pytest.raises(ClusterError, match=said) as caught:
        sign_in()
    assert caught.value.exit_status == 2


def test_no_az_is_told(azure: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match="there is none on PATH"):
        sign_in()


def test_a_subscription_that_is_not_yours(azure: Fake) -> None:
    azure.az_says("ERROR: The subscription of 'mine' doesn't exist in cloud 'AzureCloud'.")
    with pytest.raises(ClusterError, match=r"cluster\.subscription=mine is none"):
        sign_in("mine")


def test_a_token_that_expired_meanwhile(azure: Fake) -> None:
    account = sign_in()
    azure.token = "another"
    with pytest.raises(ClusterError, match="login has expired"):
        check(Api(account), spec_of())


def test_the_first_zone_that_has_both(azure: Fake) -> None:
    """One zone for all: traffic between zones is slower."""
    azure.sizes[A100] = ["3", "2"]
    azure.sizes["Standard_D4s_v5"] = ["1", "2", "3"]
    wish = spec_of()
    assert check(Api(sign_in()), wish).zone == "2"
    azure.sizes[A100] = []
    with pytest.raises(ResourceError, match=r"cluster\.zone=2.*no zone that has both"):
        check(Api(sign_in()), wish)


@pytest.mark.parametrize(
    ("usages", "spot", "said"),
    [
        (
            {"StandardNCADSA100v4Family": (24, 1)},
            False,
            r"24 vCPUs of StandardNCADSA100v4Family in eastus: .* limit is 24, and 1 ",
        ),
        ({"lowPriorityCores": (20, 0)}, True, r"24 vCPUs of LowPriorityCores .* limit is 20, and 0 are in use"),
        ({"cores": (24, 0)}, False, r"28 vCPUs of cores"),
        ({"cores": (3, 0)}, True, r"the head would need 4 vCPUs of cores"),
        ({"lowPriorityCores": (0, 0), "StandardNCADSA100v4Family": (0, 0)}, "prefer", "StandardNCADSA100v4Family"),
    ],
)
def test_too_little_quota_names_family_limit_and_use(
    azure: Fake, usages: dict[str, tuple[int, int]], spot: bool | str, said: str
) -> None:
    azure.usages |= usages
    with pytest.raises(ResourceError, match=said):
        check(Api(sign_in()), spec_of(spot=spot))
    assert azure.groups == {}


def test_preferred_spot_needs_one_of_the_two_quotas(azure: Fake) -> None:
    azure.usages["lowPriorityCores"] = (0, 0)
    check(Api(sign_in()), spec_of(spot="prefer"))


def test_a_size_that_is_not_there(azure: Fake) -> None:
    azure.blocked[A100] = "NotAvailableForSubscription"
    with pytest.raises(ResourceError, match="not available in eastus for your subscription"):
        check(Api(sign_in()), spec_of())
    del azure.sizes[A100]
    with pytest.raises(ResourceError, match="is not offered in eastus"):
        check(Api(sign_in()), spec_of())


def test_throttling_is_waited_out(azure: Fake) -> None:
    """Azure's SDK tries again after the time that the answer names."""
    azure.throttle = 2
    assert check(Api(sign_in()), spec_of()).zone == "2"
    assert len(azure.requests) > 3


def test_azure_that_cannot_be_reached(azure: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    account = sign_in()
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("PATH", os.environ["PATH"])
    api = Api(account)
    api.compute._config.retry_policy.total_retries = 0
    with pytest.raises(ClusterError, match="cannot be reached from here"):
        check(api, spec_of())
