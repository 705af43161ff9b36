"""The documents say what the code does."""

from pathlib import Path

from dps_agent.lifecycle import BOOT, PROVISIONED, TRANSITIONS

DESIGN = Path(__file__).parents[2] / "agent" / "DESIGN.md"


def diagram() -> str:
    """The lifecycle's table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {BOOT}"]
    lines += [f"    {source} --> {target}: {event}" for (source, event), target in TRANSITIONS.items()]
    return "\n".join([*lines, f"    {PROVISIONED} --> [*]"])


def test_the_diagram_in_the_design_is_the_table() -> None:
    wanted = f"```mermaid\n{diagram()}\n```"
    assert wanted in DESIGN.read_text(), f"put this into {DESIGN.name}:\n{wanted}"
