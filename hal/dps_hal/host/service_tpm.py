"""What only Linux asks of a real TPM: keys for other programs, passwords tried out, the EK's template; CPython only."""

from __future__ import annotations

from dps_hal.contracts import EK_TEMPLATES
from dps_hal.errors import AskOperator
from dps_hal.tpm.commands import ENDORSEMENT, OWNER
from dps_hal.tpm.errors import RC_ALTERED, RefusedError
from dps_hal.tpm.keys import ek_template, object_name, unwrap
from dps_hal.tpm.procedure import TpmProcedure
from dps_hal.tpm.upkeep import EK_CERTIFICATE_INDEX, if_readable, template_in

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from dps_hal.tpm.commands import Commands, Given, Key

    class ServiceCommands(Commands, Protocol):
        """What a key for TLS takes beyond `Commands`."""

        def create(self, srk: Given, template: bytes, session: Any) -> tuple[bytes, bytes]:
            """A new key under the SRK, which stays outside the TPM: TPM2B_PUBLIC and TPM2B_PRIVATE."""
            ...

        def sign(self, key: Given, digest: bytes, scheme: bytes) -> bytes:
            """A TPMT_SIGNATURE by a TPMT_SIG_SCHEME; without a session, for nothing in it is a secret."""
            ...


PLAIN_L1 = "tcg-l1 without the maker's template"  # what `template_of` says where NV has another for tcg-l1
_LAST_EK_INDEX = 0x01C000FF  # the end of the low and the high range; behind it are the certificates of issuers


class ServiceTpm(TpmProcedure):
    """A `TpmService` over either set of commands: what a board asks for, and what a service on Linux does beyond."""

    def makers_template(self) -> bytes:
        """As `TpmService.makers_template`."""
        return self._operate(self._makers_template)

    def _makers_template(self) -> bytes:
        return template_in(lambda index: self._nv_content(index, self._salted_session))

    @property
    def unneeded_passwords(self) -> tuple[str, ...]:
        """As `TpmService.unneeded_passwords`."""
        return self._passwords.unneeded

    def ek_indices(self) -> tuple[int, ...]:
        """As `TpmService.ek_indices`."""
        found = self._operate(lambda: self._commands.handles(EK_CERTIFICATE_INDEX))
        return tuple(index for index in found if index <= _LAST_EK_INDEX)

    def template_of_endorsement_key(self) -> str:
        """As `TpmService.template_of_endorsement_key`."""

        def made_from(template: bytes) -> bytes:
            made = self._create_primary(ENDORSEMENT, template, self._salted_session())
            self._flush(made)
            return made.public

        def found() -> str:
            maker = if_readable(self._makers_template)
            likely = ek_template(self._ek_template)
            return _template_of(self._endorsement_key().public, likely, maker, made_from)

        return self._operate(found)

    def persist(self, wrapped_key: bytes, handle: int, former: bytes = b"") -> None:
        """As `TpmService.persist`.

        EvictControl overwrites nothing, so for a moment the handle is empty. The new key has been loaded by now, and
        the room that the old one took is free for it.
        """
        public, private = unwrap(wrapped_key)
        _check_owner_handle(handle)

        def put(key: Key) -> None:
            present = self._present(handle)
            if present is not None:
                if present.public == key.public:
                    return
                check_replaceable(present.public, handle, former)
                self._evict_control(present, handle, self._salted_session())
            self._evict_control(key, handle, self._salted_session())

        self._operate(lambda: self._with_loaded(public, private, put))

    def create_signing_key(self) -> tuple[int, bytes, bytes]:
        """As `TpmService.create_signing_key`."""
        from dps_hal.host.signing_key import TEMPLATE, place_of_srk, point

        def create() -> tuple[int, bytes, bytes]:
            srk = self._storage_root_key()
            srk_handle = place_of_srk(self.srk_found_at)
            commands: Any = self._commands
            public, private = commands.create(srk, TEMPLATE, self._salted_session())
            try:
                point(public)
            except ValueError as error:
                raise AskOperator("tpm.failed", f"the TPM made a key: {error}") from None
            return srk_handle, public, private

        return self._operate(create)

    def sign_digest(self, public: bytes, private: bytes, digest: bytes) -> tuple[int, int]:
        """As `TpmService.sign_digest`."""
        from dps_hal.host.signing_key import SCHEME, signature_numbers

        commands: Any = self._commands

        def sign(loaded: Key) -> tuple[int, int]:
            try:
                return signature_numbers(commands.sign(loaded, digest, SCHEME))
            except ValueError as error:
                raise RefusedError("sign", RC_ALTERED, str(error)) from None

        return self._operate(lambda: self._with_loaded(public, private, sign))

    def name_at(self, handle: int) -> bytes:
        """As `TpmService.name_at`."""

        def name() -> bytes:
            present = self._present(handle)
            return present.name if present else b""

        return self._operate(name)

    def withdraw(self, handle: int, names: tuple[bytes, ...]) -> None:
        """As `TpmService.withdraw`."""

        def remove() -> None:
            present = self._present(handle)
            if present is not None and present.name in names:
                self._evict_control(present, handle, self._salted_session())

        self._operate(remove)

    def try_passwords(self) -> None:
        """As `TpmService.try_passwords`."""

        def try_them() -> None:
            for hierarchy in (ENDORSEMENT, OWNER):
                if self._auth(hierarchy):
                    self._flush(self._policy_of(hierarchy))

        self._operate(try_them)


def _check_owner_handle(handle: int) -> None:
    """AskOperator `config.invalid` unless the owner may persist at `handle` (Part 2, 7.5)."""
    if not 0x81000000 <= handle < 0x81800000:
        raise AskOperator("config.invalid", f"persist_at: expected 0x81000000 to 0x817fffff; came 0x{handle:08x}")


def check_replaceable(public: bytes, handle: int, former: bytes) -> None:
    """AskOperator `tpm.handle_taken` unless the key whose TPM2B_PUBLIC is at `handle` has the name `former`.

    Other programs keep HMAC keys of the same kind, Azure's own clients at the very same handle.
    """
    if object_name(public) != former:
        raise AskOperator(
            "tpm.handle_taken",
            f"persist_at: expected a free handle or this agent's earlier key at 0x{handle:08x}; came another",
        )


def _template_of(ek: bytes, likely: bytes, maker: bytes, made_from: Callable[[bytes], bytes]) -> str:
    """Which of EK_TEMPLATES gives this EK, or PLAIN_L1, empty for none; the template `likely` is tried first.

    `maker` is what `TpmService.makers_template` says; `made_from(template)` is the public area of the key that the TPM
    makes: always the same from the same template.
    """
    templates = [(name, ek_template(name)) for name in EK_TEMPLATES]
    if maker:
        templates = [(PLAIN_L1 if name == "tcg-l1" else name, template) for name, template in templates]
        templates.append(("tcg-l1", maker))
    for name, template in sorted(templates, key=lambda named: named[1] != likely):
        if made_from(template) == ek:
            return name
    return ""
