// The flash of the emulated board. The host gives the machine a file as its PSRAM; here it behaves as NOR flash does: what
// is erased is all ones, programming makes zeros of ones and nothing else. The settings can take the power away in the
// middle of one page or one erase. Behind it lies a ROMFS, which MicroPython mounts by itself where there is one.

#include <string.h>
#include "py/mperrno.h"
#include "py/mphal.h"
#include "py/runtime.h"
#include "extmod/vfs.h"
#include "flash.h"

#define FLASH_START ((uint8_t *)0x21000000)
#define ROM_START (FLASH_START + 0x800000)
#define ROM_BYTES (0x400000)
#define BLOCK_BYTES (4096)
#define PAGE_BYTES (256)

typedef struct _flash_obj_t {
    mp_obj_base_t base;
    uint32_t length;
} flash_obj_t;

uint32_t board_flash_steps; // pages programmed and blocks erased since the start
static uint32_t cut_at; // the step in whose middle the power goes; 0: none

void board_flash_start(void) {
    cut_at = board_setting("cut", 0);
}

static bool is_cut(void) {
    return ++board_flash_steps == cut_at;
}

static void erase_block(uint8_t *block) {
    bool cut = is_cut();
    memset(block, 0xff, cut ? BLOCK_BYTES / 2 : BLOCK_BYTES);
    if (cut) {
        board_power_off();
    }
}

static void program_page(uint8_t *page, const uint8_t *content, size_t count) {
    bool cut = is_cut();
    for (size_t i = 0; i < (cut ? count / 2 : count); i++) {
        page[i] &= content[i];
    }
    if (cut) {
        board_power_off();
    }
}

static mp_obj_t flash_make_new(const mp_obj_type_t *type, size_t n_args, size_t n_kw, const mp_obj_t *args) {
    mp_arg_check_num(n_args, n_kw, 0, 0, false);
    flash_obj_t *self = mp_obj_malloc(flash_obj_t, type);
    self->length = board_setting("flash", 1 << 20);
    return MP_OBJ_FROM_PTR(self);
}

// The place that readblocks and writeblocks name: a block, and with four arguments bytes behind its begin.
static uint8_t *place_of(size_t n_args, const mp_obj_t *args, size_t count) {
    const flash_obj_t *self = MP_OBJ_TO_PTR(args[0]);
    uint32_t at = mp_obj_get_int(args[1]) * BLOCK_BYTES + (n_args == 4 ? mp_obj_get_int(args[3]) : 0);
    if (at > self->length || count > self->length - at) {
        mp_raise_OSError(MP_EINVAL);
    }
    return FLASH_START + at;
}

static mp_obj_t flash_readblocks(size_t n_args, const mp_obj_t *args) {
    mp_buffer_info_t into;
    mp_get_buffer_raise(args[2], &into, MP_BUFFER_WRITE);
    memcpy(into.buf, place_of(n_args, args, into.len), into.len);
    return mp_const_none;
}
static MP_DEFINE_CONST_FUN_OBJ_VAR_BETWEEN(flash_readblocks_obj, 3, 4, flash_readblocks);

static mp_obj_t flash_writeblocks(size_t n_args, const mp_obj_t *args) {
    mp_buffer_info_t from;
    mp_get_buffer_raise(args[2], &from, MP_BUFFER_READ);
    uint8_t *at = place_of(n_args, args, from.len);
    const uint8_t *content = from.buf;
    for (size_t done = 0; n_args == 3 && done < from.len; done += BLOCK_BYTES) {
        erase_block(at + done);
    }
    for (size_t done = 0; done < from.len; done += PAGE_BYTES) {
        program_page(at + done, content + done, MIN(PAGE_BYTES, from.len - done));
    }
    return mp_const_none;
}
static MP_DEFINE_CONST_FUN_OBJ_VAR_BETWEEN(flash_writeblocks_obj, 3, 4, flash_writeblocks);

static mp_obj_t flash_ioctl(mp_obj_t self_in, mp_obj_t what, mp_obj_t argument) {
    const flash_obj_t *self = MP_OBJ_TO_PTR(self_in);
    switch (mp_obj_get_int(what)) {
        case MP_BLOCKDEV_IOCTL_BLOCK_COUNT:
            return MP_OBJ_NEW_SMALL_INT(self->length / BLOCK_BYTES);
        case MP_BLOCKDEV_IOCTL_BLOCK_SIZE:
            return MP_OBJ_NEW_SMALL_INT(BLOCK_BYTES);
        case MP_BLOCKDEV_IOCTL_BLOCK_ERASE:
            erase_block(FLASH_START + mp_obj_get_int(argument) * BLOCK_BYTES);
            break;
    }
    return MP_OBJ_NEW_SMALL_INT(0);
}
static MP_DEFINE_CONST_FUN_OBJ_3(flash_ioctl_obj, flash_ioctl);

static const mp_rom_map_elem_t flash_table[] = {
    { MP_ROM_QSTR(MP_QSTR_readblocks), MP_ROM_PTR(&flash_readblocks_obj) },
    { MP_ROM_QSTR(MP_QSTR_writeblocks), MP_ROM_PTR(&flash_writeblocks_obj) },
    { MP_ROM_QSTR(MP_QSTR_ioctl), MP_ROM_PTR(&flash_ioctl_obj) },
};
static MP_DEFINE_CONST_DICT(flash_dict, flash_table);
MP_DEFINE_CONST_OBJ_TYPE(board_flash_type, MP_QSTR_Flash, MP_TYPE_FLAG_NONE, make_new, flash_make_new,
    locals_dict, &flash_dict);

static mp_int_t rom_get_buffer(mp_obj_t self, mp_buffer_info_t *found, mp_uint_t flags) {
    found->buf = ROM_START;
    found->len = ROM_BYTES;
    found->typecode = 'B';
    return 0;
}
static MP_DEFINE_CONST_OBJ_TYPE(rom_type, MP_QSTR_object, MP_TYPE_FLAG_NONE, buffer, rom_get_buffer);
static const mp_obj_base_t the_rom = {&rom_type};

mp_obj_t mp_vfs_rom_ioctl(size_t n_args, const mp_obj_t *args) {
    switch (mp_obj_get_int(args[0])) {
        case MP_VFS_ROM_IOCTL_GET_NUMBER_OF_SEGMENTS:
            return MP_OBJ_NEW_SMALL_INT(1);
        case MP_VFS_ROM_IOCTL_GET_SEGMENT:
            return MP_OBJ_FROM_PTR(&the_rom);
        default:
            return MP_OBJ_NEW_SMALL_INT(-MP_EINVAL);
    }
}
