"""`dps-agent run`: the service, in the foreground."""

from dps_agent.host.cli.verb import Arguments, Outcome, Verb, configuration_of, no_arguments


def run(arguments: Arguments) -> Outcome:
    """Registers where that is needed, connects to the hub and stays connected; ends at SIGTERM or SIGINT."""
    from dps_agent.host.journal import Journal
    from dps_agent.host.service import Service

    options = ["--config", arguments.config] if arguments.config else []
    for override in (*arguments.set_before, *arguments.set_after):
        options += ["--set", override]
    Service(lambda: configuration_of(arguments), Journal(verbose=arguments.verbose), options).run()
    return Outcome([], {})


VERB = Verb("run", "be the service: get the hub, connect to it, stay connected", no_arguments, run)
