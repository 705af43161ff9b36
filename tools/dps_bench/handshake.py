"""What a connection costs whose certificate's key the TPM has, beside one whose key lies in a file.

Both show their certificate to the same server, OpenSSL's, by TLS 1.3, and take turns. The time is that of the agent's
own `dial`, name and TCP included, and of the key in the TPM what it takes to load and to flush it. The TPM is a program
on this machine: a chip takes longer.
"""

from __future__ import annotations

import datetime
import os
import socket
import statistics
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from debian_micropython import tls_provider
from dps_agent.host.device_certificates import KEY_SETTING
from dps_agent.host.network.dial import Dialler
from dps_agent.host.network.proxy import NONE, ProxyRule
from dps_agent.host.network.shown import Shown
from dps_agent.host.tpm_private_key import TpmPrivateKey
from dps_bench.report import Report
from dps_hal.contracts import TpmService
from dps_hal.host.signing_key import KeyFile, to_pem
from dps_hal.host.transports import open_wire
from support.cloud.chains import CA, NO_CA, SIGNS_CERTIFICATES, Party, party, written
from support.tpm.swtpm import Swtpm

DEVICE = "press-07"
_PATIENCE_S = 60.0


def measured(count: int) -> Report:
    """`count` connections of each kind."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dps-bench-")))
        tpm = stack.enter_context(Swtpm(folder / "tpm"))
        os.environ["OPENSSL_MODULES"] = str(tls_provider())
        root = party("factory root", None, [*CA, SIGNS_CERTIFICATES])
        roots = folder / "roots.pem"
        roots.write_text(root.pem)
        in_file = written(folder / "in-file.pem", party(DEVICE, root, NO_CA))
        chain, key = _in_tpm(folder, tpm.tcti, root)
        port = stack.enter_context(_Server(folder, root, roots))

        def opened() -> TpmService:
            return open_wire(tpm.tcti)

        shown = {
            "key in the TPM": Shown(str(chain), str(key), tpm.tcti, opened, KEY_SETTING),
            "key in a file": Shown(str(in_file), str(in_file), "", opened, KEY_SETTING),
        }
        diallers = {name: Dialler(ProxyRule(NONE), str(roots), "ca_file", each) for name, each in shown.items()}
        times: dict[str, list[float]] = {name: [] for name in shown}
        for turn in range(count + 1):  # the first one of each loads what the others have
            for name, dialler in diallers.items():
                began_s = time.monotonic()
                dialler.begin()
                dialler.dial("localhost", "127.0.0.1", port, began_s + _PATIENCE_S)
                took_s = time.monotonic() - began_s
                dialler.close()
                if turn:
                    times[name].append(took_s * 1000)
        report = Report("handshake", f"median of {count}")
        for name, taken in times.items():
            report.row(name, {"wallMs": statistics.median(taken), "leastMs": min(taken)})
        for kind, of in (("wallMs", statistics.median), ("leastMs", min)):
            report.ratio(f"{kind}, in the TPM / in a file", of(times["key in the TPM"]), of(times["key in a file"]))
        return report


def _in_tpm(folder: Path, tcti: str, root: Party) -> tuple[Path, Path]:
    """The files of a certificate and of its key, which the TPM has made."""
    tpm = open_wire(tcti)
    made = KeyFile(*tpm.create_signing_key())
    tpm.release()
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    builder = x509.CertificateBuilder().issuer_name(root.name).serial_number(x509.random_serial_number())
    builder = builder.subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, DEVICE)]))
    builder = builder.not_valid_before(now - day).not_valid_after(now + day)
    signed = builder.public_key(TpmPrivateKey(tpm, made).public_key()).sign(root.key, SHA256())
    chain, key = folder / "in-tpm.pem", folder / "in-tpm.key"
    chain.write_bytes(signed.public_bytes(Encoding.PEM))
    key.write_bytes(to_pem(made))
    key.chmod(0o600)
    return chain, key


class _Server:
    """`openssl s_server`, which wants a certificate; its port. Use it with `with`."""

    def __init__(self, folder: Path, root: Party, roots: Path) -> None:
        named = x509.SubjectAlternativeName([x509.DNSName("localhost")])
        chain = str(written(folder / "server.pem", party("localhost", root, [(named, False)])))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port: int = probe.getsockname()[1]
        words = ["openssl", "s_server", "-accept", f"127.0.0.1:{self._port}", "-cert", chain, "-key", chain]
        words += ["-CAfile", str(roots), "-Verify", "5", "-no_ticket", "-quiet"]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def __enter__(self) -> int:
        until_s = time.monotonic() + _PATIENCE_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port), _PATIENCE_S).close()
            except ConnectionError:
                if self._process.poll() is not None or time.monotonic() > until_s:
                    raise
                time.sleep(0.05)
            else:
                return self._port

    def __exit__(self, *_of_error: object) -> None:
        self._process.kill()
        self._process.communicate()
