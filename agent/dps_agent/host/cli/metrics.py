"""`dps-agent metrics`: what the running service counts, for a terminal or for node_exporter's textfile collector."""

from __future__ import annotations

import os

from dps_agent.host.cli.running import ask_metrics
from dps_agent.host.cli.verb import Outcome, UsageError, Verb, configuration_of
from dps_hal.errors import AskOperator, RetryLater

TYPE_CHECKING = False
if TYPE_CHECKING:
    from dps_agent.host.cli.verb import Arguments, Declared

_FILE_MODE = 0o644  # the collector is another user, and nothing in it is secret


def add_arguments(parser: Declared) -> None:
    """Where to write."""
    parser.add_argument(
        "--textfile",
        metavar="FILE",
        help="write them for node_exporter's textfile collector, to a name that ends in .prom; also without a service",
    )


def run(arguments: Arguments) -> Outcome:
    """Shows what the service says; a file is replaced as a whole."""
    from dps_agent.host import metrics

    text = ask_metrics(configuration_of(arguments, need_id_scope=False))
    if arguments.textfile is None:
        if text is None:
            raise RetryLater("agent.not_running", "no service runs that could be asked")
        return Outcome(text.splitlines(), {"samples": metrics.samples(text)})
    content = metrics.text_file_without_service() if text is None else metrics.for_text_file(text)
    _replace(arguments.textfile, content)
    samples = metrics.samples(content)
    return Outcome(
        [f"{len(samples)} samples in {arguments.textfile}"], {"file": arguments.textfile, "samples": samples}
    )


def _replace(path: str, content: str) -> None:
    from dps_hal.host.regular import replace_file

    if not path.endswith(".prom"):
        raise UsageError(f"--textfile: expected a name that ends in .prom, as the collector does; came {path!r}")
    try:
        replace_file(os.path.abspath(path), content.encode(), _FILE_MODE)
    except OSError as error:
        raise AskOperator("agent.file", f"{path} cannot be written: {error.strerror}") from None


VERB = Verb("metrics", "show what the service counts, or write it to a file", add_arguments, run)
