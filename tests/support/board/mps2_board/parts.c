// I2C and pins of the emulated board, and random numbers.

#include "py/mphal.h"
#include "py/runtime.h"
#include "extmod/modmachine.h"
#include "mbedtls/sha256.h"
#include "parts.h"

// I2C: four controllers, of which software moves each line.

#define CONTROLLER(address) { {(volatile uint32_t *)(address), 1}, {(volatile uint32_t *)(address), 2} }
const line_t board_lines[4][2] = {
    CONTROLLER(0x40022000), CONTROLLER(0x40023000), CONTROLLER(0x40029000), CONTROLLER(0x4002a000),
};

const line_t *board_line_of(mp_obj_t number_in) { // 2 * controller for its SCL, one more for its SDA
    mp_uint_t number = mp_obj_get_int(number_in);
    if (number >= 2 * MP_ARRAY_SIZE(board_lines)) {
        mp_raise_ValueError(MP_ERROR_TEXT("invalid pin"));
    }
    return &board_lines[number / 2][number % 2];
}

// Settings take away what is on the lines: at so many milliseconds from the start, and for so many.
bool board_bus_is_cut(void) {
    static uint64_t from, until;
    if (until == 0) {
        from = (uint64_t)board_setting("gone", 0) * TICKS_A_MS;
        until = from + (uint64_t)board_setting("goneFor", 0) * TICKS_A_MS + 1;
    }
    uint64_t now = until - from > 1 ? board_ticks() : until;
    return from <= now && now < until;
}

static mp_obj_t i2c_make_new(const mp_obj_type_t *type, size_t n_args, size_t n_kw, const mp_obj_t *all) {
    static const mp_arg_t allowed[] = {
        { MP_QSTR_id, MP_ARG_INT, {.u_int = 0} },
        { MP_QSTR_freq, MP_ARG_INT, {.u_int = 400000} },
    };
    mp_arg_val_t args[MP_ARRAY_SIZE(allowed)];
    mp_arg_parse_all_kw_array(n_args, n_kw, all, MP_ARRAY_SIZE(allowed), allowed, args);
    if (args[0].u_int < 0 || args[0].u_int >= (mp_int_t)MP_ARRAY_SIZE(board_lines) || args[1].u_int < 1) {
        mp_raise_ValueError(MP_ERROR_TEXT("invalid bus"));
    }
    mp_machine_soft_i2c_obj_t *self = mp_obj_malloc(mp_machine_soft_i2c_obj_t, type);
    self->us_delay = MAX(1, 500000 / args[1].u_int);
    self->us_timeout = 50000;
    self->scl = &board_lines[args[0].u_int][0];
    self->sda = &board_lines[args[0].u_int][1];
    mp_hal_pin_open_drain(self->scl);
    mp_hal_pin_open_drain(self->sda);
    return MP_OBJ_FROM_PTR(self);
}

static const mp_machine_i2c_p_t i2c_protocol = { .transfer = mp_machine_soft_i2c_transfer };
MP_DEFINE_CONST_OBJ_TYPE(machine_i2c_type, MP_QSTR_I2C, MP_TYPE_FLAG_NONE, make_new, i2c_make_new,
    protocol, &i2c_protocol, locals_dict, &mp_machine_i2c_locals_dict);

// A pin, for an LED: nothing is connected to it.

typedef struct _pin_obj_t {
    mp_obj_base_t base;
    mp_obj_t level;
} pin_obj_t;

static mp_obj_t pin_make_new(const mp_obj_type_t *type, size_t n_args, size_t n_kw, const mp_obj_t *args) {
    pin_obj_t *self = mp_obj_malloc(pin_obj_t, type);
    self->level = MP_OBJ_NEW_SMALL_INT(0);
    return MP_OBJ_FROM_PTR(self);
}

static mp_obj_t pin_value(size_t n_args, const mp_obj_t *args) {
    pin_obj_t *self = MP_OBJ_TO_PTR(args[0]);
    if (n_args == 1) {
        return self->level;
    }
    self->level = MP_OBJ_NEW_SMALL_INT(mp_obj_is_true(args[1]));
    return mp_const_none;
}
static MP_DEFINE_CONST_FUN_OBJ_VAR_BETWEEN(pin_value_obj, 1, 2, pin_value);

static const mp_rom_map_elem_t pin_table[] = {
    { MP_ROM_QSTR(MP_QSTR_value), MP_ROM_PTR(&pin_value_obj) },
    { MP_ROM_QSTR(MP_QSTR_IN), MP_ROM_INT(0) },
    { MP_ROM_QSTR(MP_QSTR_OUT), MP_ROM_INT(1) },
};
static MP_DEFINE_CONST_DICT(pin_dict, pin_table);
MP_DEFINE_CONST_OBJ_TYPE(board_pin_type, MP_QSTR_Pin, MP_TYPE_FLAG_NONE, make_new, pin_make_new, locals_dict, &pin_dict);

// Random numbers: SHA-256 of a seed from the host and a counter. Good for tests, where the host is trusted.

static struct {
    uint8_t seed[32];
    uint32_t counter;
} state;

void board_random_start(void) {
    board_read_host_file("/dev/urandom", state.seed, sizeof(state.seed));
}

uint32_t board_random(void) {
    uint32_t digest[8];
    state.counter++;
    mbedtls_sha256((const uint8_t *)&state, sizeof(state), (uint8_t *)digest, 0);
    return digest[0];
}

int mbedtls_hardware_poll(void *data, unsigned char *output, size_t length, size_t *given) {
    for (size_t i = 0; i < length; i++) {
        output[i] = board_random();
    }
    *given = length;
    return 0;
}
