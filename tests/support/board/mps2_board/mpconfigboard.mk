# A board that QEMU emulates whole, as a board of MicroPython's qemu port that lives outside MicroPython's tree:
#     make -C ports/qemu BOARD=DPS_MPS2 BOARD_DIR=<this folder> LIBRARIES=<folder with lib/lwip and lib/mbedtls>
#          LIBC=<folder of libc_nano.a> BUILD=... USER_C_MODULES=... FROZEN_MANIFEST=...
# The machine is the port's own mps2-an385. Added are what real boards have and that port leaves out: Ethernet with lwIP,
# mbedTLS in the garbage-collected heap, a littlefs on flash that behaves as NOR, a ROMFS, a clock that starts in 2021, a
# watchdog, reset, and I2C with a TPM on it.
QEMU_ARCH = arm
QEMU_MACHINE = mps2-an385

MICROPY_PY_LWIP = 1
MICROPY_VFS_LFS2 = 1
MICROPY_FLOAT_IMPL = float

vpath %.c $(LIBRARIES)

CFLAGS += -mthumb -mcpu=cortex-m3 -mfloat-abi=soft
CFLAGS += -DQEMU_SOC_MPS2
CFLAGS += -DMICROPY_HW_MCU_NAME='"Cortex-M3"'
CFLAGS += -DMP_CONFIGFILE='"board_config.h"' -I$(BOARD_DIR)
CFLAGS += $(addprefix -I$(LIBRARIES)/lib/,lwip/src/include mbedtls/include mbedtls/library)
CFLAGS += -DMICROPY_PY_SSL=1 -DMICROPY_SSL_MBEDTLS=1 -DMBEDTLS_CONFIG_FILE='"board_mbedtls.h"'

LDSCRIPT = $(BOARD_DIR)/board.ld
LDFLAGS += -L$(LIBC) -Wl,--wrap=gc_alloc

SRC_BOARD_O = shared/runtime/gchelper_native.o shared/runtime/gchelper_thumb2.o
MPY_CROSS_FLAGS += -march=armv7m

SRC_C += shared/timeutils/timeutils.c
SRC_THIRDPARTY_C += lib/mbedtls_errors/mp_mbedtls_errors.c
# Of mbedTLS all but what needs an operating system, PSA, TLS 1.3, and the table of errors in place of which is the above.
NOT_FOR_BOARDS = error.c psa_% net_sockets.c timing.c ssl_tls13_% mps_% lms.c lmots.c padlock.c aesce.c aesni.c threading.c
SRC_THIRDPARTY_C += $(addprefix lib/mbedtls/library/,$(filter-out $(NOT_FOR_BOARDS),\
	$(notdir $(wildcard $(LIBRARIES)/lib/mbedtls/library/*.c))))

$(BUILD)/main.o: CFLAGS += -Dmain=main_of_the_port
