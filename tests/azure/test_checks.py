"""The checks against Azure before anything is created, and their errors."""

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


def test_sign_in_returns_the_account(azure: Fake) -> None:
    account = sign_in()
    assert account.subscription == SUBSCRIPTION
    assert azure.token not in repr(account)


@pytest.mark.parametrize(
    ("az", "quoted"),
    [
        ("ERROR: Please run 'az login' to setup account.", r"^(?!.*(ERROR|AADSTS)).*`az login`"),
        ("ERROR: AADSTS70043: The refresh token has expired. Please run: az login", r"\(AADSTS70043\).*`az login`"),
        ("ERROR: AADSTS50173: The provided grant has expired due to it being revoked.", r"\(AADSTS50173\).*`az login`"),
        ("ERROR: something else", "ERROR: something else"),
    ],
)
def test_each_login_failure_has_its_own_message(azure: Fake, az: str, quoted: str) -> None:
    azure.fail_az(az)
    with pytest.raises(ClusterError, match=quoted) as caught:
        sign_in()
    assert caught.value.exit_status == 2


def test_az_is_not_installed(azure: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match=r"PATH.*https://aka\.ms/azure-cli"):
        sign_in()


def test_a_subscription_without_access(azure: Fake) -> None:
    azure.fail_az("ERROR: The subscription of 'mine' doesn't exist in cloud 'AzureCloud'.")
    with pytest.raises(ClusterError, match=r"cluster\.subscription=mine"):
        sign_in("mine")


def test_a_token_that_expires_after_the_login(azure: Fake) -> None:
    account = sign_in()
    azure.token = "another"
    with pytest.raises(ClusterError, match=r"\(ExpiredAuthenticationToken\).*`az login`"):
        check(Api(account), spec_of())


def test_the_first_zone_with_both_sizes_is_chosen(azure: Fake) -> None:
    """All VMs are in one zone, because traffic between zones is slower."""
    azure.sizes[A100] = ["3", "2"]
    azure.sizes["Standard_D4s_v5"] = ["1", "2", "3"]
    spec = spec_of()
    assert check(Api(sign_in()), spec).zone == "2"
    azure.sizes[A100] = []
    with pytest.raises(ResourceError, match=r"cluster\.zone=2"):
        check(Api(sign_in()), spec)


@pytest.mark.parametrize(
    ("usages", "spot", "quoted"),
    [
        (
            {"StandardNCADSA100v4Family": (24, 1)},
            False,
            r"\b24 .*StandardNCADSA100v4Family in eastus,.* 24 and 1 ",
        ),
        ({"lowPriorityCores": (20, 0)}, True, r"\b24 .*LowPriorityCores .* 20 and 0 "),
        ({"cores": (24, 0)}, False, r"\b28 .*cores\b.* 24 and 0 "),
        ({"cores": (3, 0)}, True, r"\b4 .*cores\b.* 3 and 0 "),
        ({"lowPriorityCores": (0, 0), "StandardNCADSA100v4Family": (0, 0)}, "prefer", "StandardNCADSA100v4Family"),
    ],
)
def test_a_small_quota_is_reported_with_family_limit_and_usage(
    azure: Fake, usages: dict[str, tuple[int, int]], spot: bool | str, quoted: str
) -> None:
    azure.usages |= usages
    with pytest.raises(ResourceError, match=quoted):
        check(Api(sign_in()), spec_of(spot=spot))
    assert azure.groups == {}


def test_preferred_spot_needs_only_one_of_the_two_quotas(azure: Fake) -> None:
    azure.usages["lowPriorityCores"] = (0, 0)
    check(Api(sign_in()), spec_of(spot="prefer"))


def test_an_unavailable_size(azure: Fake) -> None:
    azure.blocked[A100] = "NotAvailableForSubscription"
    with pytest.raises(ResourceError, match=rf"{A100} .*eastus .*\(NotAvailableForSubscription\)"):
        check(Api(sign_in()), spec_of())
    del azure.sizes[A100]
    with pytest.raises(ResourceError, match=rf"{A100} .*eastus.*az vm list-skus --size {A100}"):
        check(Api(sign_in()), spec_of())


def test_throttled_requests_are_retried(azure: Fake) -> None:
    """Azure's SDK retries after the time in the response."""
    azure.throttle = 2
    assert check(Api(sign_in()), spec_of()).zone == "2"
    assert len(azure.requests) > 3


def test_azure_is_unreachable(azure: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    account = sign_in()
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("PATH", os.environ["PATH"])
    api = Api(account)
    api.compute._config.retry_policy.total_retries = 0
    with pytest.raises(ClusterError, match=r"127\.0\.0\.1"):
        check(api, spec_of())
