// The flash, see flash.c.
#pragma once
#include "py/obj.h"

extern const mp_obj_type_t board_flash_type;
extern uint32_t board_flash_steps;
void board_flash_start(void);
