// mbedTLS as MicroPython configures it for the RP2040: its memory comes from the garbage-collected heap.
#pragma once
#include <time.h>
time_t board_unix_time(time_t *at);
#define MBEDTLS_ECP_NIST_OPTIM
#define MBEDTLS_PLATFORM_TIME_MACRO board_unix_time
#define MBEDTLS_PLATFORM_MS_TIME_ALT mbedtls_ms_time
#define MBEDTLS_PLATFORM_GMTIME_R_ALT
#define MICROPY_MBEDTLS_CONFIG_BARE_METAL (1)
#include "extmod/mbedtls/mbedtls_config_common.h"
