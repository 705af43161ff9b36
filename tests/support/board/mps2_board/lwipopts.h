// lwIP as MicroPython configures it for the RP2040.
#pragma once
#include <stdint.h>
#define LWIP_IPV4 1
#define LWIP_IPV6 1
#define LWIP_ND6_NUM_DESTINATIONS 4
#define LWIP_ND6_QUEUEING 0
#define LWIP_NETIF_EXT_STATUS_CALLBACK 1
#define LWIP_NETIF_STATUS_CALLBACK 1
uint32_t board_random(void);
#define LWIP_RAND() board_random()
#include "extmod/lwip-include/lwipopts_common.h"
