// The watchdog, for extmod/machine_wdt.c. When it has run out it raises an NMI, whose handler resets the board.
#define WATCHDOG_LOAD REGISTER(0x40008000)
#define WATCHDOG_CONTROL REGISTER(0x40008008) // bit 0: count, and the NMI; bit 1: reset the second time
#define WATCHDOG_CLEAR REGISTER(0x4000800c) // written: counts from the load value again
#define WATCHDOG_LOCK REGISTER(0x40008c00)
#define WATCHDOG_KEY (0x1acce551)
#define LONGEST_MS (8388) // as an RP2040 has it

struct _machine_wdt_obj_t {
    mp_obj_base_t base;
};

static machine_wdt_obj_t the_watchdog = {{&machine_wdt_type}};

static machine_wdt_obj_t *mp_machine_wdt_make_new_instance(mp_int_t id, mp_int_t timeout_ms) {
    if (timeout_ms < 1 || timeout_ms > LONGEST_MS) {
        mp_raise_ValueError(MP_ERROR_TEXT("timeout exceeds 8388"));
    }
    WATCHDOG_LOCK = WATCHDOG_KEY;
    WATCHDOG_LOAD = (uint32_t)timeout_ms * TICKS_A_MS;
    WATCHDOG_CONTROL = 3;
    return &the_watchdog;
}

static void mp_machine_wdt_feed(machine_wdt_obj_t *self) {
    board_feeding();
    WATCHDOG_CLEAR = 1;
}
