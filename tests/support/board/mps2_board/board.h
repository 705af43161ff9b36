// What the board's files share, and what MicroPython asks of a port's hardware.
//
// Addresses and registers: Arm Application Note AN385, tables 3-2, 4-1 and 5-1; Cortex-M System Design Kit, APB timer,
// UART and watchdog; Armv7-M Architecture Reference Manual, B3.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "py/mpconfig.h"
#include "py/obj.h"
#include "shared/runtime/interrupt_char.h"

#define REGISTER(address) (*(volatile uint32_t *)(address))

// Time: 25 million ticks a second since the start.
#define TICKS_A_SECOND (25000000)
#define TICKS_A_MS (TICKS_A_SECOND / 1000)
uint64_t board_ticks(void);
void board_clock_start(void);
void board_clock_hurry(uint32_t times);
uint32_t board_epoch_seconds(void); // since 2000, as STM32 and ESP32 count
void mp_hal_delay_us_fast(uint32_t us);

// A word of the command line, "name=number", as QEMU's -semihosting-config arg=… gives it.
uint32_t board_setting(const char *name, uint32_t otherwise);
uint32_t board_random(void);
__attribute__((noreturn)) void board_reset(void);
__attribute__((noreturn)) void board_power_off(void);
void board_feeding(void); // somebody feeds the watchdog
void board_ethernet_poll(void);

// A pin is a line of one of the I2C controllers, which are bit-banged: SCL or SDA.
typedef struct _line_t {
    volatile uint32_t *controller; // written: the line floats, 4 bytes on: it is pulled low; read: its levels
    uint32_t bit;
} line_t;
extern const line_t board_lines[4][2];
bool board_bus_is_cut(void); // nothing is on the lines, which are pulled up
#define mp_hal_pin_obj_t const line_t *
const line_t *board_line_of(mp_obj_t number);
#define mp_hal_get_pin_obj(number) board_line_of(number)
#define MP_HAL_PIN_FMT "%p"
#define mp_hal_pin_name(line) (line)

static inline void mp_hal_pin_od_high(const line_t *line) {
    line->controller[0] = line->bit;
}

static inline void mp_hal_pin_od_low(const line_t *line) {
    if (!board_bus_is_cut()) {
        line->controller[1] = line->bit;
    }
}

static inline void mp_hal_pin_open_drain(const line_t *line) {
    mp_hal_pin_od_high(line);
}

static inline int mp_hal_pin_read(const line_t *line) {
    return board_bus_is_cut() || (line->controller[0] & line->bit) != 0;
}
