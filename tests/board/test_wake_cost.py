"""What one wake of a sleeping board costs is what the page for firmware says."""

from __future__ import annotations

from contextlib import ExitStack

from dps_bench.wake import MESSAGES, Board
from support.board.compiled import Image
from support.documents import CHECKOUT, table_under

PAGE = CHECKOUT / "docs" / "firmware.md"
ROWS = {
    "TPM commands": "tpmCommands",
    "TLS connections": "connections",
    "bytes sent, TLS included": "sentBytes",
    "bytes received": "receivedBytes",
    "packets with data sent": "sentPackets",
    "packets with data received": "receivedPackets",
    "records written": "commits",
    "flash sectors erased": "flashErases",
    "flash pages written": "flashPrograms",
}
# Of what follows the length of certificates, tokens and names; a kernel that is busy also puts what waits into fewer
# packets.
SLACK = {"Bytes": 1.1, "Packets": 1.4}


def test_a_wake_costs_what_the_page_says(image: Image) -> None:
    said = {row[0]: row[1:] for row in table_under(PAGE, "What a wake costs")}
    assert said.keys() == ROWS.keys()
    with ExitStack() as stack:
        board = Board(stack, image)
        first, later, many = board.wake("1"), board.wake("1"), board.wake(*["1"] * MESSAGES)
    for name, key in ROWS.items():
        slack = next((SLACK[what] for what in SLACK if key.endswith(what)), 1)
        for text, found in zip(said[name], (first[key], later[key]), strict=False):
            least, _, most = text.partition(" to ")
            assert int(least) / slack <= found <= int(most or least) * slack, (
                f"{name}: {found}, and the page has {text}"
            )
        more = (many[key] - later[key]) / (MESSAGES - 1)
        if slack > 1:
            each = int(said[name][2])
            assert each / slack - 1 <= more <= each * slack + 1, f"{name}: {more} for each message"
        else:
            assert said[name][2] == "0", name
    assert many["commits"] == later["commits"] == 2
    assert min(wake["awakeMs"] for wake in (first, later, many)) > 0
