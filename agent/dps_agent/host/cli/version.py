"""`dps-agent version`: what is installed, for a report."""

from dps_agent.host.cli.verb import Arguments, Outcome, Verb, no_arguments, table

PACKAGES = (  # all that may come with the agent, and it: the Debian packages bring what they have of it along
    "dps-agent",
    "paho-mqtt",
    "ujson",
    "tpm2-pytss",
    "cryptography",
    "cffi",
    "packaging",
    "pycparser",
)


def run(arguments: Arguments) -> Outcome:
    """Shows the versions of the agent, of what it uses, and of Python; imports none of them."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    rows = [(package, found or "not installed") for package, found in versions.items()]
    runtime = [("python", platform.python_version()), ("system", platform.platform(terse=True))]
    return Outcome(table(rows + runtime), {"version": versions["dps-agent"], "packages": versions, **dict(runtime)})


VERB = Verb("version", "show what is installed", no_arguments, run)
