"""The pytest plugin: a DPS, a hub, a TPM and a device for each test that asks for one.

Fixtures: `dps`, `hub`, `tpm`, `device` (see `fixtures` for what they offer), `dps_settings` and `agent_settings` to be
overridden. Settings of pytest: `dps_emulator_scope` (function, class, module, package or session; how long all of them
last) and `dps_emulator_tpm` (auto, swtpm or simulator). Ports are the system's choice, folders are new ones: tests may
run beside each other.

What serves is loaded when the first test asks for it; a run of tests that have no use for it pays nothing.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from dps_emulator.fixtures import Cloud, Device, Dps, Hub, Tpm

_SCOPES = ("function", "class", "module", "package", "session")
_TPMS = ("auto", "swtpm", "simulator")
_CLOUDS = pytest.StashKey[list["Cloud"]]()
_DEVICES = pytest.StashKey[list["Device"]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Two settings."""
    parser.addini(
        "dps_emulator_scope", f"how long dps, hub, tpm and device last: {', '.join(_SCOPES)}", default=_SCOPES[0]
    )
    parser.addini("dps_emulator_tpm", f"what tpm is: {', '.join(_TPMS)}", default=_TPMS[0])


def pytest_configure(config: pytest.Config) -> None:
    """Nothing runs yet; raises UsageError for a setting that there is not."""
    for name, choices in (("dps_emulator_scope", _SCOPES), ("dps_emulator_tpm", _TPMS)):
        if config.getini(name) not in choices:
            raise pytest.UsageError(f"{name}: expected one of {', '.join(choices)}; came '{config.getini(name)}'")
    config.stash[_CLOUDS] = []
    config.stash[_DEVICES] = []


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What came for the tests before does not count for this one."""
    for cloud in item.config.stash[_CLOUDS]:
        cloud.begin()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Shows with a test that failed what its cloud and its device have written."""
    report = yield
    if report.failed:
        for cloud in item.config.stash[_CLOUDS]:
            report.sections.append(("what the emulator wrote", cloud.written()))
        for device in item.config.stash[_DEVICES]:
            report.sections.append((f"what the agent of {device.id} wrote", device.written))
    return report


def _scope(fixture_name: str, config: pytest.Config) -> Any:
    return config.getini("dps_emulator_scope")


@pytest.fixture(scope=_scope)
def dps_settings() -> Mapping[str, Any]:
    """Settings of the emulator, the fields of `dps_emulator.service.Settings`; to be overridden."""
    return {}


@pytest.fixture(scope=_scope)
def agent_settings() -> str:
    """Further settings of the agent in `device`, as lines of its config.toml; to be overridden."""
    return ""


@pytest.fixture(scope=_scope)
def _cloud(dps_settings: Mapping[str, Any], pytestconfig: pytest.Config) -> "Iterator[Cloud]":
    from dps_emulator.fixtures import Cloud

    cloud = Cloud(dps_settings)
    with cloud.emulator:
        pytestconfig.stash[_CLOUDS].append(cloud)
        try:
            yield cloud
        finally:
            pytestconfig.stash[_CLOUDS].remove(cloud)


@pytest.fixture(scope=_scope)
def dps(_cloud: "Cloud") -> "Dps":
    """A Device Provisioning Service on a free port, with nobody enrolled."""
    from dps_emulator.fixtures import Dps

    return Dps(_cloud)


@pytest.fixture(scope=_scope)
def hub(_cloud: "Cloud") -> "Hub":
    """The hub that devices are assigned to, the first one where there are several."""
    from dps_emulator.fixtures import Hub

    return Hub(_cloud, _cloud.settings.hubs[0])


@pytest.fixture(scope=_scope)
def tpm(pytestconfig: pytest.Config) -> "Iterator[Tpm]":
    """A new TPM: swtpm where that is installed, otherwise the simulator of the agent."""
    from dps_emulator.fixtures import software_tpm

    with software_tpm(pytestconfig.getini("dps_emulator_tpm")) as found:
        yield found


@pytest.fixture(scope=_scope)
def device(
    _cloud: "Cloud", dps: "Dps", tpm: "Tpm", agent_settings: str, pytestconfig: pytest.Config
) -> "Iterator[Device]":
    """The agent as a process of its own, with `tpm`, enrolled at `dps`, connected to `hub`."""
    from dps_emulator.fixtures import running_device

    devices = pytestconfig.stash[_DEVICES]
    with running_device(_cloud, dps, tpm, agent_settings, devices) as found:
        yield found
