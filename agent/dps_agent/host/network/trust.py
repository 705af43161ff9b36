"""Whom a TLS connection trusts, and what an earlier one left to be resumed.

Everything that a verdict on a certificate rests on is decided here: flags, versions, roots, and how long a verdict that
was reached counts.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import time

from dps_agent.der import certificates, validity
from dps_agent.host.settings_table import REQUEST, TPM_KEY
from dps_agent.utc import AGREEMENT_S
from dps_hal.errors import AskOperator, IdentityStale, RetryLater
from dps_hal.host.regular import open_regular, read_regular
from dps_text import NotText, without_mark

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeAlias

    from dps_agent.host.network.shown import Shown
    from dps_hal.contracts import TpmService
    from dps_hal.errors import DpsError
    from dps_hal.host.signing_key import KeyFile
    from dps_hal.host.tls_provider import TpmKey

    _FileState: TypeAlias = "tuple[int, ...] | None"  # changes with a file or folder; None where there is none
    _Sources: TypeAlias = "tuple[tuple[str, _FileState], ...]"

KEY_LIMIT = 16 * 1024  # bytes of a file with a key and the request for its certificate
CA_FILE_LIMIT = 8 * 1024 * 1024  # bytes; the roots of a distribution have a quarter of one MiB
# A certificate in ca_file or among the system's roots ends a chain, whether it is a root or not. The form that RFC 5280
# wants of certificates is not asked for: private authorities and inspecting proxies miss it, and it proves nothing.
VERIFY_FLAGS = ssl.VERIFY_X509_TRUSTED_FIRST | ssl.VERIFY_X509_PARTIAL_CHAIN
# How long roots that were read, and verdicts that were reached, count. OpenSSL never reads a file twice, so this is how
# long a root that was replaced in its file, without a trace in its folder, may still be trusted; and how long a session
# may be resumed without the chain being verified again. RFC 8446, 4.6.1 allows a week for the latter. A connection may
# stand as long without being verified again, so a shorter time would protect nobody.
TRUST_LIFE_S = 86400
SESSIONS_LIMIT = 4  # peers; a device has one DPS and one hub


class Trust:
    """The roots for one purpose, the one context in which its connections are verified, and its sessions.

    `ca_file` holds the only roots, in PEM; empty: the system's. `setting` is what the operator calls it. `certificate`
    is what this device shows to whoever asks; then no session is ever resumed, for that would show what the device was,
    and not what it is. `asked_later`: a peer may also ask for it once it has read a request. Used by one thread at a
    time.

    Where a TPM has the key, that is an object in the TPM, which has room for three: it is there from `borrow` to
    `take_back`, a connection has it from `lend` on, in another context than the one it begins and ends with.

    The context is made anew, and with it all sessions end, when a file, a folder or a variable of the environment that
    it was made from has changed; after TRUST_LIFE_S; and when the system's clock was set, for certificates were judged
    by what it said before. So a process that runs for months trusts what its system trusts.
    """

    def __init__(self, ca_file: str, setting: str, certificate: Shown | None = None, asked_later: bool = False) -> None:
        self._ca_file = ca_file
        self._certificate = certificate
        self._chain = b""  # of the certificate, where DPS issued it; it lies in no file
        self._in_tpm = certificate is not None and certificate.tcti != ""  # its key
        self._tpm: TpmService | None = None  # while the storage root key is put in its place
        self._srk_handle = 0  # where that is now; 0: where the key's file says
        self._asked_later = asked_later
        self._borrowed: tuple[ssl.SSLContext, TpmKey] | None = None
        self._lent: tuple[ssl.SSLSocket, ssl.SSLContext] | None = None
        if certificate is not None and self._in_tpm:
            from dps_hal.host import tls_provider

            tls_provider.require(certificate.tcti)
        self._setting = setting
        self._context: ssl.SSLContext | None = None
        # By the name that was verified, with the seconds at which the peer's certificate is valid.
        self._sessions: dict[str, tuple[ssl.SSLSession, range]] = {}
        self._sources: _Sources = ()
        self._made_at_s = self._clock_ahead_s = 0.0
        self._leaves_out = False  # there are roots of the system that it has not read

    @property
    def shows_certificate(self) -> bool:
        """Whether this device has a certificate for whoever asks."""
        return self._certificate is not None

    @property
    def asks_tpm(self) -> bool:
        """Whether a connection waits for a TPM as well as for its peer."""
        return self._in_tpm

    def show(self, chain: bytes, certificate: Shown) -> bool:
        """From now on connections show this chain, DER, in the handshake, with the key that `certificate` names.

        Where that lies its file says now: the agent itself may have made another. False: so did those that were begun
        before.
        """
        shown = self._certificate, self._chain, self._in_tpm
        self._certificate, self._chain = certificate, chain
        self._in_tpm = _is_in_tpm(certificate.key_file)
        if shown == (certificate, chain, self._in_tpm):
            return False
        self._context = None
        return True

    @property
    def creates_key(self) -> bool:
        """As `TpmService` has it: whether what waits for the TPM may take as long as that."""
        tpm = self._tpm  # once: another thread asks
        return bool(tpm is not None and tpm.creates_key)

    def context(self) -> ssl.SSLContext:
        """What a connection is to be verified in now; AskOperator `config.invalid` where `ca_file` makes no sense."""
        if self._context is None or not self._still_holds():
            self._make(all_roots=False)
        assert self._context is not None
        return self._context

    def borrow(self) -> None:
        """Has the TPM load the key for the connection that is about to begin, if it has one; as slow as the TPM.

        DpsError where it cannot be had: what the TPM says, AskOperator `tpm.certificate_key` where the key is gone, and
        `config.invalid` for the files. What the TPM refuses the provider counts where our own procedure, which looks
        for the storage root key or makes it anew, is refused the same: anybody who owns the TPM may have moved that.
        """
        shown = self._certificate
        if shown is None or not self._in_tpm:
            return
        from dps_hal.host import tls_provider

        self.take_back()
        if not shown.tcti:
            text = f'a TPM has the key in {shown.key_file}, and none is there with tpm.backend = "simulator"'
            raise AskOperator("config.invalid", f"{shown.key_setting}: expected a key in the clear: {text}")
        tls_provider.require(shown.tcti)
        tls_provider.load(shown.tcti)
        try:
            self._borrow(shown)
        except RetryLater:
            raise
        except (AskOperator, IdentityStale) as error:
            if not error.code.startswith("tpm."):
                raise
            self._ask_ourselves(shown)
            try:
                self._borrow(shown)
            except IdentityStale as again:
                text = f"OpenSSL's provider tpm2 does not get the key loaded with which the TPM signs: {again.message}"
                raise AskOperator("tpm.failed", text) from None

    def _borrow(self, shown: Shown) -> None:
        from dps_hal.host import tls_provider
        from dps_hal.host.signing_key import to_pem

        def make() -> ssl.SSLContext:
            return self._rooted(all_roots=not self._leaves_out)

        try:
            with self._chain_file(shown) as chain_file:
                key = _key_in_tpm(shown)
                key = key._replace(srk_handle=self._srk_handle or key.srk_handle)
                self._borrowed = tls_provider.held(make, chain_file, to_pem(key))
        except (OSError, ValueError) as error:
            raise _unsuitable(shown, "the TPM's key", error) from None

    def _ask_ourselves(self, shown: Shown) -> None:
        """Has our own procedure sign with the key, as a registration does; AskOperator, `tpm.certificate_key` among it.

        It looks for the storage root key, and makes it where it is gone; the provider can do neither, and finds it at a
        persistent handle alone.
        """
        from dps_hal.host.signing_key import place_of_srk

        key = _key_in_tpm(shown)
        tpm = self._tpm = shown.open_tpm()
        try:
            tpm.storage_root_key()
            tpm.sign_digest(key.public, key.private, bytes(32))
            self._srk_handle = place_of_srk(tpm.srk_found_at)
        except IdentityStale as error:
            text = f"the TPM does not take the key that it made: {error.message}"
            raise AskOperator("tpm.certificate_key", text) from None
        finally:
            tpm.release()
            self._tpm = None

    def lend(self, tls: ssl.SSLSocket) -> None:
        """Gives a connection that is about to begin the key that was borrowed, if there is one; asks no TPM."""
        if self._borrowed is not None:
            self._lent = tls, tls.context
            tls.context = self._borrowed[0]

    def has_lost_tpm(self, error: DpsError) -> bool:
        """Whether `borrow` will raise the same as long as this process lives."""
        from dps_hal.host.tls_provider import ConnectionLost

        return isinstance(error, ConnectionLost)

    def take_back(self) -> None:
        """Flushes the key that was borrowed from the TPM; a connection goes on without; as slow as the TPM."""
        lent, self._lent = self._lent, None
        if lent is not None:
            tls, context = lent
            with contextlib.suppress(AttributeError):  # it has ended, and with it its use of the key
                tls.context = context
        if self._borrowed is not None:
            key, self._borrowed = self._borrowed[1], None  # no context has it any more
            key.release()

    def look_further(self) -> bool:
        """Whether there are roots that had no say in a refusal; from now on they have."""
        if not self._leaves_out:
            return False
        try:
            self._make(all_roots=True)
        except AskOperator:  # the device's own files are not what they were: the next connection says what is wrong
            return False
        return True

    def session(self, name: str) -> ssl.SSLSession | None:
        """What a connection to `name` may resume, once (RFC 8446, C.4); None where a whole handshake is due.

        Nobody looks at a certificate when a session is resumed, so none is that outlives its peer's.
        """
        session, valid_s = self._sessions.pop(name, (None, range(0)))
        return session if int(time.time()) in valid_s else None

    def keep(self, tls: ssl.SSLSocket) -> None:
        """Takes what a verified connection leaves to the next one; to be called once the peer has said something.

        In TLS 1.3 it comes behind the handshake, ahead of all else that a server says.
        """
        if self.shows_certificate:
            return
        name, session = tls.server_hostname, tls.session
        if name and session is not None and tls.context is self._context and (session.has_ticket or session.id):
            self._sessions.pop(name, None)
            self._sessions[name] = session, validity_s(tls)
            if len(self._sessions) > SESSIONS_LIMIT:
                del self._sessions[next(iter(self._sessions))]

    def _still_holds(self) -> bool:
        up_s = _up_s()
        return (
            up_s - self._made_at_s < TRUST_LIFE_S
            and abs(time.time() - up_s - self._clock_ahead_s) <= AGREEMENT_S
            and self._sources == self._sources_now()
        )

    def _sources_now(self) -> _Sources:
        paths = (self._ca_file,) if self._ca_file else system_places()
        own = self._certificate[:2] if self._certificate is not None else ()
        return tuple((path, _state(path)) for path in (*paths, *own))

    def _make(self, all_roots: bool) -> None:
        self._context = None
        self._sessions.clear()
        self._made_at_s = _up_s()
        self._clock_ahead_s = time.time() - self._made_at_s
        self._sources = self._sources_now()  # before they are read: a change meanwhile is seen by the next connection
        context = self._rooted(all_roots)
        if self._certificate is not None and not self._in_tpm:
            self._show(context, self._certificate)
        self._allow_later(context)
        self._context = context

    def _rooted(self, all_roots: bool) -> ssl.SSLContext:
        context = tls_context()
        if self._ca_file:
            self._leaves_out = False
            _take_file(context, self._ca_file, self._setting)
        else:
            self._leaves_out = not all_roots and _take_hashed(context)
            if not self._leaves_out:
                context.load_default_certs()
        return context

    def _show(self, context: ssl.SSLContext, shown: Shown) -> None:
        """Lets connections show the chain wherever a peer asks for it; AskOperator."""
        try:
            with self._chain_file(shown) as chain_file:
                os.close(open_regular(shown.key_file))  # OpenSSL would wait for whoever writes to a FIFO
                if _is_in_tpm(shown.key_file):
                    raise AskOperator("config.invalid", _moved(shown, "in the TPM", "in a file"))
                context.load_cert_chain(chain_file, shown.key_file, password="")  # whose password asks nobody for it
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise _unsuitable(shown, "the key", error) from None

    @contextlib.contextmanager
    def _chain_file(self, shown: Shown) -> Iterator[str]:
        """The chain as a file, for OpenSSL takes no other; OSError, ValueError for one that is none."""
        if not self._chain:
            os.close(open_regular(shown.chain_file))  # as for the key
            yield shown.chain_file
            return
        fd = os.memfd_create("dps-agent", os.MFD_CLOEXEC)
        try:
            os.write(fd, "".join(ssl.DER_cert_to_PEM_cert(each) for each in certificates(self._chain)).encode())
            yield f"/proc/self/fd/{fd}"
        finally:
            os.close(fd)

    def _allow_later(self, context: ssl.SSLContext) -> None:
        """Lets a server ask for the certificate once it has read a request, if it may.

        By renegotiation in TLS 1.2, where that cannot be refused then, and in TLS 1.3 after the handshake, which a
        client has to offer.
        """
        if self._certificate and self._asked_later:
            context.options &= ~ssl.OP_NO_RENEGOTIATION
            context.post_handshake_auth = True


def tls_context() -> ssl.SSLContext:
    """What every TLS connection of the agent begins with, the same on every Python; the roots to trust come to it.

    `ssl.create_default_context` decides otherwise from Python 3.13 on, and lets $SSLKEYLOGFILE have the session's keys.
    Cipher suites are left to OpenSSL and to who configures it.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = True
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags = VERIFY_FLAGS
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # with it a send could have to wait for something to read
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF  # set by Python 3.11.2: a body cut off would look whole
    return context


def _is_in_tpm(key_file: str) -> bool:
    """Whether a TPM has the key in a file; False where that cannot be read, which whoever uses it says."""
    try:
        with open(open_regular(key_file), "rb") as file:
            return file.read(len(TPM_KEY)) == TPM_KEY
    except OSError:
        return False


def _key_in_tpm(shown: Shown) -> KeyFile:
    """The key of a TPM's in a file; AskOperator, ValueError for one that is damaged, OSError."""
    from dps_hal.host.signing_key import from_pem

    content = read_regular(shown.key_file, KEY_LIMIT)
    if not content.startswith(TPM_KEY):
        raise AskOperator("config.invalid", _moved(shown, "in a file", "in the TPM"))
    return from_pem(content.partition(REQUEST)[0])


def _moved(shown: Shown, now: str, before: str) -> str:
    """That a key is no longer where this process was told, or where that of an issued certificate just was."""
    lay = f"{shown.key_setting}: the key of '{shown.key_file}' lies {now}, and lay {before} when this began"
    return f"{lay}: restart the service" if shown.chain_file else f"{lay}: the next connection takes it from there"


def _unsuitable(shown: Shown, key: str, error: Exception) -> AskOperator:
    """That chain and key are none, or do not belong together."""
    reason = getattr(error, "reason", "") or getattr(error, "strerror", "") or str(error)
    if shown.chain_file:
        text = f"certificate_file: expected a chain in PEM in '{shown.chain_file}', for {key} in '{shown.key_file}'"
    else:
        text = f"{shown.key_setting}: expected the key of the certificate that DPS issued, in '{shown.key_file}'"
    return AskOperator("config.invalid", f"{text}: {reason}")


def validity_s(tls: ssl.SSLSocket) -> range:
    """The UTC seconds at which the verified peer's certificate is valid; none where its dates are none of RFC 5280's.

    Also of a resumed connection, whose peer has shown no certificate: of the one it showed at first.
    """
    try:
        first_s, last_s = validity(tls.getpeercert(True) or b"")
    except ValueError:
        return range(0)
    return range(first_s, last_s + 1)


def _take_file(context: ssl.SSLContext, ca_file: str, setting: str) -> None:
    """Takes the roots in a PEM file; AskOperator.

    OpenSSL passes over what stands in front of the first dashes of a line: behind a byte order mark that is a file's
    first certificate, without a word where there is a second one.
    """
    try:
        content = read_regular(ca_file, CA_FILE_LIMIT)
        unmarked = without_mark(content)
        if unmarked is content:
            context.load_verify_locations(ca_file)
        else:
            context.load_verify_locations(cadata=unmarked.decode("ascii", "ignore"))
    except (OSError, NotText) as error:  # ssl.SSLError is an OSError: the file holds no certificate
        reason = error.reason if isinstance(error, ssl.SSLError) else getattr(error, "strerror", str(error))
        raise AskOperator("config.invalid", f"{setting}: expected PEM certificates in '{ca_file}': {reason}") from None


def system_places() -> tuple[str, ...]:
    """The file of the system's roots, what it would be if the environment named none, and the folders."""
    paths = ssl.get_default_verify_paths()
    file = os.environ.get(paths.openssl_cafile_env, paths.openssl_cafile)
    folders = os.environ.get(paths.openssl_capath_env, paths.openssl_capath)
    return (file, paths.openssl_cafile, *folders.split(os.pathsep))


def _take_hashed(context: ssl.SSLContext) -> bool:
    """Lets OpenSSL look up the system's roots one by one in its folders; False where they are not made for that.

    To read a distribution's 140 certificates takes 25 ms and 2 MiB, and a chain ends at one of them. The file is left
    out; a distribution has the same roots in both, but nobody is obliged to, so a refusal is no verdict before it was
    read. A file of somebody's own choice is read at once, for it has roots that are in no folder.
    """
    file, usual_file, *folders = system_places()
    if _state(file) != _state(usual_file) or not any(_is_hashed(folder) for folder in folders):
        return False
    context.load_verify_locations(capath=os.pathsep.join(folders))
    return True


def _is_hashed(folder: str) -> bool:
    """Whether there are certificates in `folder` under names such as "607986c7.0", by which OpenSSL looks them up."""
    try:
        with os.scandir(folder) as entries:
            return any(entry.name[8:9] == "." and entry.name[9:].isdecimal() for entry in entries)
    except OSError:
        return False


def _state(path: str) -> _FileState:
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a path that no file can have
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _up_s() -> float:
    """Seconds since the boot, those of suspension included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
