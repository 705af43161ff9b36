# A Cortex-M3 that QEMU emulates, as a board of MicroPython's qemu port that lives outside MicroPython's tree:
#     make -C ports/qemu BOARD=DPS_CORTEX_M3 BOARD_DIR=<this folder> MBEDTLS=<mbedtls sources> BUILD=... FROZEN_MANIFEST=...
# The machine is the port's own mps2-an385. Added are what real boards have and that port leaves out: time, AES and
# SHA-256 by mbedTLS; flash with a ROMFS; and two UARTs with a TPM at the other end.
QEMU_ARCH = arm
QEMU_MACHINE = mps2-an385

CFLAGS += -mthumb -mcpu=cortex-m3 -mfloat-abi=soft
CFLAGS += -DQEMU_SOC_MPS2
CFLAGS += -DMICROPY_HW_MCU_NAME='"Cortex-M3"'
CFLAGS += -DMP_CONFIGFILE='"dps_config.h"' -I$(BOARD_DIR) -I$(MBEDTLS)/include
CFLAGS += -DMICROPY_SSL_MBEDTLS=1 -DMBEDTLS_CONFIG_FILE='"dps_mbedtls_config.h"'

LDSCRIPT = mcu/arm/mps2.ld

SRC_BOARD_O = shared/runtime/gchelper_native.o shared/runtime/gchelper_thumb2.o
MPY_CROSS_FLAGS += -march=armv7m
