"""Runs the contract of every Tpm over EsysTpm with whichever tpm2-pytss the Python that runs this has.

    /usr/bin/python3 tests/support/tpm/system_pytss.py PORT OTHER_PORT          (in the checkout)

Needs no pytest: it is for the Python of a distribution and that distribution's own packages. Prints their versions,
the traceback of each failure, one registration, and closes with "N passed, N failed". Exit status 0: nothing failed;
2: a package is missing, and stderr has a sentence that says which.
"""

import sys
from importlib.metadata import version

TYPE_CHECKING = False
if TYPE_CHECKING:
    from dps_hal.host.esys import EsysTpm


def main(ports: "list[str]") -> int:
    """Each claim with two TPMs of its own making, then the sequence of a registration."""
    sys.path[:0] = ["agent", "hal", "tests"]
    try:
        import tpm2_pytss  # noqa: F401
        import ujson  # noqa: F401
    except ImportError as error:
        print(
            f"{sys.executable} lacks a package: {error}; run: apt-get install python3-tpm2-pytss python3-ujson",
            file=sys.stderr,
        )
        return 2
    from contracts.tpm import CLAIMS
    from dps_hal.host.esys import EsysTpm
    from support.tpm.wire_contract import run_claims

    print(f"tpm2-pytss {version('tpm2-pytss')} on Python {sys.version.split()[0]}")
    return run_claims(
        (*CLAIMS, a_registration), lambda: [EsysTpm(f"swtpm:host=127.0.0.1,port={port}") for port in ports]
    )


def a_registration(tpm: "EsysTpm", other_tpm: "EsysTpm") -> None:
    """What a registration and what follows it ask of a TPM, the calls included that the contract does not have."""
    from contracts.tpm import KEY, blob_for
    from dps_hal.platform import hmac_sha256

    token = b"0ne00000000%2Fregistrations%2Fpress-07\n1800000000"
    challenge_key = tpm.import_key(blob_for(tpm, b"challenge"))
    assert tpm.sign(challenge_key, token) == hmac_sha256(b"challenge", token)
    hub_key = tpm.import_key(blob_for(tpm))
    assert tpm.sign(hub_key, bytes(1500)) == hmac_sha256(KEY, bytes(1500))
    tpm.persist(hub_key, 0x81000100)
    assert tpm.endorsement_certificate() is None
    assert tpm.condition().free_slots > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
