"""`dps-agent token`: a token for the assigned hub, for another program."""

from __future__ import annotations

from dps_agent.host import TOKEN_LIFE_LIMIT_S, TOKEN_LIFE_S
from dps_agent.host.cli.running import ask_service
from dps_agent.host.cli.verb import Outcome, Verb, configuration_of, seconds_up_to
from dps_agent.host.printed import utc_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from dps_agent.host.cli.verb import Arguments, Declared


def add_arguments(parser: Declared) -> None:
    """How long the token is valid."""
    parser.add_argument(
        "--life",
        type=seconds_up_to(TOKEN_LIFE_LIMIT_S),
        default=TOKEN_LIFE_S,
        metavar="S",
        help="valid for S seconds (default: %(default)s)",
    )


def run(arguments: Arguments) -> Outcome:
    """Checks that the stored assignment holds, then has the TPM sign."""
    configuration = configuration_of(arguments)
    answer = ask_service(configuration, f"/command/token?life={arguments.life}")
    if answer is not None:
        return Outcome([answer["token"]], answer)
    from dps_agent.host.parts import hub_token_once

    assignment, token = hub_token_once(configuration, arguments.life)
    text = token.header()
    return Outcome(
        [text],
        {
            "token": text,
            "expiresAt": utc_text(token.expires_at_s),
            "assignedHub": assignment.assigned_hub,
            "deviceId": assignment.device_id,
        },
    )


VERB = Verb("token", "print a token for the assigned hub, for another program", add_arguments, run)
