"""A TPM on an SPI bus of Linux that no kernel driver has: /dev/spidevX.Y, shaped as `machine.SPI`; CPython only.

Where the kernel's driver tpm_tis_spi has the TPM, as it should, use /dev/tpmrm0. A TPM needs its chip select low from a
frame's header to its last byte, and wait states in between are only seen as they come, so that a frame is more than one
message: `cs_change` asks the controller to hold it until an empty message. Controllers whose chip select is a GPIO
(`cs-gpios`, as on a Raspberry Pi) do; on one that does not, no TPM is found. Nothing else may be on that bus.
"""

from __future__ import annotations

import fcntl
import os
import struct
from array import array

from dps_hal.errors import AskOperator, RetryLater
from dps_hal.host.ioctl import write_request
from dps_hal.host.tpm_node import open_device
from dps_hal.tpm.spi import SpiBus
from dps_hal.tpm.tis import TisTransport

TYPE_CHECKING = False
if TYPE_CHECKING:
    from dps_hal.contracts import WhileWaiting

_SPI_IOC_MESSAGE = write_request("k", 0, 32)  # linux/spi/spidev.h; one struct spi_ioc_transfer
_SPI_IOC_WR_MODE = write_request("k", 1, 1)
_SPI_IOC_WR_BITS_PER_WORD = write_request("k", 3, 1)
_MODE_0 = b"\x00"


class Spidev:
    """One open /dev/spidevX.Y as `machine.SPI` and, by `chip_select`, as its pin."""

    def __init__(self, path: str, frequency_hz: int) -> None:
        """As `open_device`; AskOperator `tpm.absent` for what is no SPI device.

        RetryLater `tpm.busy` while another process of ours has it.
        """
        self._frequency_hz = frequency_hz
        self._node = open_device(path)
        try:
            fcntl.flock(self._node, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.ioctl(self._node, _SPI_IOC_WR_MODE, _MODE_0)
            fcntl.ioctl(self._node, _SPI_IOC_WR_BITS_PER_WORD, b"\x08")
        except BlockingIOError:
            self.close()
            raise RetryLater("tpm.busy", f"{path} is in use by another program") from None
        except OSError as error:
            self.close()
            raise AskOperator("tpm.absent", f"{path} is no SPI device: {error.strerror}") from None

    def write_readinto(self, content: bytes, into: bytearray) -> None:
        """As `machine.SPI.write_readinto`."""
        into[:] = self._transfer(bytes(content), hold=True)

    def readinto(self, into: bytearray | memoryview) -> None:
        """As `machine.SPI.readinto`."""
        into[:] = self._transfer(bytes(len(into)), hold=True)

    def write(self, content: bytes | memoryview) -> None:
        """As `machine.SPI.write`."""
        self._transfer(bytes(content), hold=True)

    def chip_select(self, level: int) -> None:
        """Lets go of the chip select where `level` is 1; the next transfer takes it."""
        if level:
            self._transfer(b"", hold=False)

    def close(self) -> None:
        """Closes the device; it is not used any more."""
        os.close(self._node)

    def _transfer(self, content: bytes, hold: bool) -> bytes:
        outgoing = array("B", content)
        incoming = array("B", bytes(len(content)))
        # tx_buf, rx_buf, len, speed_hz, delay_usecs, bits_per_word, cs_change, and four bytes that stay 0
        message = struct.pack(
            "=QQIIHBBI",
            outgoing.buffer_info()[0],
            incoming.buffer_info()[0],
            len(content),
            self._frequency_hz,
            0,
            8,
            hold,
            0,
        )
        fcntl.ioctl(self._node, _SPI_IOC_MESSAGE, message)
        return incoming.tobytes()


class SpidevTransport:
    """A `Transport` to the TPM at a spidev; it is opened by the first command."""

    def __init__(self, path: str, frequency_hz: int) -> None:
        self._path = path
        self._frequency_hz = frequency_hz
        self._spi: Spidev | None = None
        self._tis: TisTransport | None = None

    def send(self, command: bytes, limit_s: float, while_waiting: WhileWaiting | None) -> bytes:
        """As `Transport.send`."""
        if self._tis is None:
            self._spi = Spidev(self._path, self._frequency_hz)
            self._tis = TisTransport(SpiBus(self._spi, self._spi.chip_select))
        return self._tis.send(command, limit_s, while_waiting)

    def close(self) -> None:
        """As `Transport.close`."""
        if self._tis is not None:
            self._tis.close()
            self._tis = None
        if self._spi is not None:
            self._spi.close()
            self._spi = None
