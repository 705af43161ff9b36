"""What a factory enrols: one CSV line for each device, printed on the serial console.

    mpremote exec "import dps_board.factory as f; f.print_enrolment()"

`dps-emulator enroll-import` reads the lines of a whole line of devices, headers included.
"""

import binascii
import os

from dps_agent.settings import AUTO, SYMMETRIC_KEY
from dps_hal.errors import AskOperator
from dps_hal.platform import declare_random_source, sha256
from dps_hal.tpm.keys import registration_id_from_ek

TYPE_CHECKING = False
if TYPE_CHECKING:
    from dps_hal.contracts import BoardTpm

CSV_HEADER = "registrationId,endorsementKey,backend,ekCertificateSha256"


def enrolment_line(tpm: "BoardTpm", registration_id: str = AUTO) -> str:
    """Registration id, EK (base64 of its TPM2B_PUBLIC), "wire", and the SHA-256 of the EK certificate if it is read."""
    endorsement_key = tpm.endorsement_key()
    try:
        certificate = tpm.endorsement_certificate()
    except AskOperator:  # it is locked, which says nothing about whether this TPM can register
        certificate = None
    if registration_id == AUTO:
        registration_id = registration_id_from_ek(endorsement_key)
    encoded = binascii.b2a_base64(endorsement_key).decode().strip()
    digest = binascii.hexlify(sha256(certificate)).decode() if certificate else ""
    return f"{registration_id},{encoded},wire,{digest}"


def print_enrolment(path: str = "config.json") -> None:
    """Prints header and line for the TPM and the registration id that the settings in `path` name."""
    from dps_board.config import load
    from dps_board.parts import make_tpm

    declare_random_source(os.urandom)  # as app.py does: where there is no EK yet, it is made in a salted session
    config = load(path)
    if config.settings.attestation == SYMMETRIC_KEY:
        raise AskOperator("config.invalid", "attestation: expected a TPM to enrol; this board has a key of its own")
    tpm = make_tpm(config)
    try:
        line = enrolment_line(tpm, config.settings.registration_id)
    finally:
        tpm.release()
    print(CSV_HEADER)
    print(line)
