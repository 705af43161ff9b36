// The start of the emulated board, its reset, the module `mps2`, and a heap that can be made to fail.
//
// Semihosting: Arm Semihosting 2.0, SYS_OPEN, SYS_READ, SYS_CLOSE, SYS_GET_CMDLINE, SYS_EXIT.

#include <string.h>
#include "py/cstack.h"
#include "py/gc.h"
#include "py/mphal.h"
#include "py/runtime.h"
#include "extmod/modnetwork.h"
#include "shared/readline/readline.h"
#include "shared/runtime/pyexec.h"
#include "lwip/apps/mdns.h"
#include "lwip/init.h"
#include "lwip/timeouts.h"
#include "flash.h"
#include "parts.h"

#define VECTOR_TABLE REGISTER(0xe000ed08)
#define RESET_CONTROL REGISTER(0xe000ed0c)
#define RESET_NOW (0x05fa0004)
#define VECTORS (16)
#define NMI (2)
#define PICO_W_HEAP (210048)
#define PICO_STACK (8192)

extern uint32_t _estack, _ebss;
extern const uint32_t isr_vector[];

// The host.

enum { SYS_OPEN = 0x01, SYS_CLOSE = 0x02, SYS_READ = 0x06, SYS_GET_CMDLINE = 0x15, SYS_EXIT = 0x18 };

static int ask_host(int operation, const void *arguments) {
    register int r0 __asm("r0") = operation;
    register const void *r1 __asm("r1") = arguments;
    __asm volatile ("bkpt 0xab" : "+r" (r0) : "r" (r1) : "memory");
    return r0;
}

void board_read_host_file(const char *name, void *into, size_t count) {
    int file = ask_host(SYS_OPEN, (const uint32_t[]) {(uint32_t)name, 1, strlen(name)});
    ask_host(SYS_READ, (const uint32_t[]) {file, (uint32_t)into, count});
    ask_host(SYS_CLOSE, (const uint32_t[]) {file});
}

uint32_t board_setting(const char *name, uint32_t otherwise) {
    static char words[256];
    if (!words[0]) {
        ask_host(SYS_GET_CMDLINE, (const uint32_t[]) {(uint32_t)words, sizeof(words) - 1});
    }
    size_t length = strlen(name);
    for (const char *word = words; word != NULL; word = strchr(word, ' ')) {
        word += *word == ' ';
        if (strncmp(word, name, length) == 0 && word[length] == '=') {
            uint32_t number = 0;
            for (word += length + 1; '0' <= *word && *word <= '9'; word++) {
                number = 10 * number + (*word - '0');
            }
            return number;
        }
    }
    return otherwise;
}

void board_power_off(void) {
    ask_host(SYS_EXIT, (const void *)0x20026); // ADP_Stopped_ApplicationExit
    for (;;) {
    }
}

void board_reset(void) {
    RESET_CONTROL = RESET_NOW;
    for (;;) {
    }
}

void board_poll(void) {
    static bool polling; // lwIP must not be called from what lwIP calls
    if (!polling) {
        polling = true;
        board_ethernet_poll();
        sys_check_timeouts();
        polling = false;
    }
}

// The watchdog's feeding, and its longest gap.

static uint64_t fed_at;
static uint32_t longest_gap_ms;

void board_feeding(void) {
    uint64_t now = board_ticks();
    if (fed_at != 0) {
        longest_gap_ms = MAX(longest_gap_ms, (uint32_t)((now - fed_at) / TICKS_A_MS));
    }
    fed_at = now;
}

// The heap. The linker puts the second function in the place of the first: it counts, and lets one allocation fail.

static uint32_t allocations, failing_allocation, failing_run;
extern uint32_t _kept; // a word that is zero after power was cut, and outlives a reset: the allocation has failed

void *__real_gc_alloc(size_t bytes, unsigned int flags);
void *__wrap_gc_alloc(size_t bytes, unsigned int flags) {
    allocations++;
    if (failing_allocation != 0 && allocations >= failing_allocation && allocations < failing_allocation + failing_run) {
        _kept = 1;
        return NULL;
    }
    return __real_gc_alloc(bytes, flags);
}

// The stack of C. It is painted at the start; how much lost its paint is what was ever used.

#define PAINT (0x5aa5c33c)
#define PAINTED_WORDS (16384)

static void __attribute__((noinline)) paint_stack(void) {
    uint32_t *end = (uint32_t *)__builtin_frame_address(0) - 32;
    for (uint32_t *at = &_estack - PAINTED_WORDS; at < end; at++) {
        *(volatile uint32_t *)at = PAINT;
    }
}

static mp_obj_t mps2_stack_used(void) {
    const uint32_t *at = &_estack - PAINTED_WORDS;
    while (at < &_estack && *at == PAINT) {
        at++;
    }
    return MP_OBJ_NEW_SMALL_INT((&_estack - at) * sizeof(*at));
}
static MP_DEFINE_CONST_FUN_OBJ_0(mps2_stack_used_obj, mps2_stack_used);

// The other functions of the module: numbers since the start, for tests.

static mp_obj_t mps2_allocations(void) {
    return mp_obj_new_int_from_uint(allocations);
}
static MP_DEFINE_CONST_FUN_OBJ_0(mps2_allocations_obj, mps2_allocations);

static mp_obj_t mps2_flash_steps(void) {
    return mp_obj_new_int_from_uint(board_flash_steps);
}
static MP_DEFINE_CONST_FUN_OBJ_0(mps2_flash_steps_obj, mps2_flash_steps);

static mp_obj_t mps2_longest_gap_ms(void) {
    return mp_obj_new_int_from_uint(longest_gap_ms);
}
static MP_DEFINE_CONST_FUN_OBJ_0(mps2_longest_gap_ms_obj, mps2_longest_gap_ms);

static mp_obj_t mps2_ticks(void) { // of 25 MHz; at 125 million instructions a second each is five of them
    return mp_obj_new_int_from_ull(board_ticks());
}
static MP_DEFINE_CONST_FUN_OBJ_0(mps2_ticks_obj, mps2_ticks);

static mp_obj_t mps2_hurry(mp_obj_t times) {
    board_clock_hurry(mp_obj_get_int(times));
    return mp_const_none;
}
static MP_DEFINE_CONST_FUN_OBJ_1(mps2_hurry_obj, mps2_hurry);

static mp_obj_t mps2_setting(mp_obj_t name) { // 0 where there is none
    return mp_obj_new_int_from_uint(board_setting(mp_obj_str_get_str(name), 0));
}
static MP_DEFINE_CONST_FUN_OBJ_1(mps2_setting_obj, mps2_setting);

static const mp_rom_map_elem_t mps2_table[] = {
    { MP_ROM_QSTR(MP_QSTR___name__), MP_ROM_QSTR(MP_QSTR_mps2) },
    { MP_ROM_QSTR(MP_QSTR_Flash), MP_ROM_PTR(&board_flash_type) },
    { MP_ROM_QSTR(MP_QSTR_stack_used), MP_ROM_PTR(&mps2_stack_used_obj) },
    { MP_ROM_QSTR(MP_QSTR_allocations), MP_ROM_PTR(&mps2_allocations_obj) },
    { MP_ROM_QSTR(MP_QSTR_flash_steps), MP_ROM_PTR(&mps2_flash_steps_obj) },
    { MP_ROM_QSTR(MP_QSTR_longest_gap_ms), MP_ROM_PTR(&mps2_longest_gap_ms_obj) },
    { MP_ROM_QSTR(MP_QSTR_ticks), MP_ROM_PTR(&mps2_ticks_obj) },
    { MP_ROM_QSTR(MP_QSTR_hurry), MP_ROM_PTR(&mps2_hurry_obj) },
    { MP_ROM_QSTR(MP_QSTR_setting), MP_ROM_PTR(&mps2_setting_obj) },
};
static MP_DEFINE_CONST_DICT(mps2_dict, mps2_table);
const mp_obj_module_t mps2_module = { .base = {&mp_type_module}, .globals = (mp_obj_dict_t *)&mps2_dict };
MP_REGISTER_MODULE(MP_QSTR_mps2, mps2_module);

static void start_hardware(void) {
    static uint32_t vectors[VECTORS] __attribute__((aligned(128)));
    memcpy(vectors, isr_vector, sizeof(vectors));
    vectors[NMI] = (uint32_t)board_reset; // what the watchdog raises
    VECTOR_TABLE = (uint32_t)vectors;
    board_clock_start();
    board_random_start();
    board_flash_start();
    failing_allocation = _kept ? 0 : board_setting("fail", 0);
    failing_run = board_setting("run", 1);
    lwip_init();
    mdns_resp_init();
}

// boot.py, then main.py, as firmware has it; what ends them by Ctrl-D or SystemExit starts MicroPython anew.
static void run_files(void) {
    if (board_setting("repl", 0)) {
        return;
    }
    int ended = pyexec_file_if_exists("boot.py");
    if (ended && !(ended & PYEXEC_FORCED_EXIT)) {
        pyexec_file_if_exists("main.py");
    }
}

#undef main
int main(void) {
    __asm volatile ("cpsid i");
    paint_stack();
    start_hardware();
    mp_cstack_init_with_top(&_estack, board_setting("stack", PICO_STACK));
    uint8_t *heap = (uint8_t *)&_ebss;
    gc_init(heap, heap + board_setting("heap", PICO_W_HEAP));
    for (;;) {
        mp_init();
        mp_obj_list_append(mp_sys_path, mp_obj_new_str("/lib", 4));
        readline_init0();
        mod_network_init();
        pyexec_frozen_module("_boot.py", false);
        run_files();
        while ((pyexec_mode_kind == PYEXEC_MODE_RAW_REPL ? pyexec_raw_repl() : pyexec_friendly_repl()) == 0) {
        }
        mp_printf(MP_PYTHON_PRINTER, "MPY: soft reboot\n");
        mod_network_deinit();
        gc_sweep_all();
        mp_deinit();
    }
}
