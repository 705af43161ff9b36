// Time for the emulated board, and the module `cortex_m3`: a counter of time, and UARTs with a TPM at the other end.
//
// Addresses: Arm Application Note AN385, tables 4-1 and 5-1; Cortex-M System Design Kit, APB timer and UART.

#include "py/mphal.h"
#include "py/runtime.h"

typedef struct _timer_t {
    volatile uint32_t ctrl; // bit 0: run; bit 3: interrupt
    volatile uint32_t value; // counts down
    volatile uint32_t reload;
    volatile uint32_t intstatus; // written: clear
} timer_t;

#define TIMER0 ((timer_t *)0x40000000)
#define TICKS_HZ (25000000)
#define SLOW (*(volatile uint32_t *)0x40028014) // a counter, 100 Hz
#define TICKS_OF_10_MS (TICKS_HZ / 100)

#define TIMER1 ((timer_t *)0x40001000)
#define TIMER1_IRQ (1 << 9)
#define NVIC_ISER (*(volatile uint32_t *)0xe000e100) // Armv7-M Architecture Reference Manual, B3.4
#define NVIC_ICPR (*(volatile uint32_t *)0xe000e280)

typedef struct _uart_t {
    volatile uint32_t data;
    volatile uint32_t state; // bit 0: no room to send; bit 1: a byte has come
    volatile uint32_t ctrl; // bits 0 and 1: send, receive
    volatile uint32_t intstatus;
    volatile uint32_t bauddiv; // at least 16
} uart_t;

static uart_t *const uarts[] = {(uart_t *)0x40005000, (uart_t *)0x40006000}; // the one at 0x40004000 is the console
static uint64_t waited_ticks;

// Since the first call. The timer's 32 bits last 171 s; the slow counter, read first, says how often they went round.
typedef struct _moment_t {
    uint32_t slow; // 10 ms each
    int32_t ticks; // beyond those
} moment_t;

static moment_t now(void) {
    static uint32_t slow_at_start;
    if (!(TIMER0->ctrl & 1)) {
        slow_at_start = SLOW;
        TIMER0->reload = UINT32_MAX;
        TIMER0->value = UINT32_MAX;
        TIMER0->ctrl = 1;
    }
    moment_t moment;
    moment.slow = SLOW - slow_at_start;
    moment.ticks = UINT32_MAX - TIMER0->value - moment.slow * TICKS_OF_10_MS;
    return moment;
}

static uint64_t ticks_now(void) {
    moment_t moment = now();
    return (uint64_t)moment.slow * TICKS_OF_10_MS + moment.ticks;
}

mp_uint_t mp_hal_ticks_cpu(void) {
    return (mp_uint_t)ticks_now();
}

mp_uint_t mp_hal_ticks_us(void) { // no 64-bit division: what libgcc has for it does not link into this port
    moment_t moment = now();
    return moment.slow * 10000 + moment.ticks / (TICKS_HZ / 1000000);
}

mp_uint_t mp_hal_ticks_ms(void) {
    moment_t moment = now();
    return moment.slow * 10 + moment.ticks / (TICKS_HZ / 1000);
}

// The emulator goes on at once to the moment at which the timer wakes the processor. Interrupts stay masked.
static void sleep_until(uint64_t end) {
    for (uint64_t begin = ticks_now(); begin < end; begin = ticks_now()) {
        TIMER1->value = end - begin < UINT32_MAX ? end - begin : UINT32_MAX;
        NVIC_ISER = TIMER1_IRQ;
        __asm volatile ("cpsid i");
        TIMER1->ctrl = 9;
        __asm volatile ("wfi");
        TIMER1->ctrl = 0;
        TIMER1->intstatus = 1;
        NVIC_ICPR = TIMER1_IRQ;
        __asm volatile ("cpsie i");
        mp_event_handle_nowait();
    }
}

void mp_hal_delay_us(mp_uint_t us) {
    sleep_until(ticks_now() + (uint64_t)us * (TICKS_HZ / 1000000));
}

void mp_hal_delay_ms(mp_uint_t ms) {
    sleep_until(ticks_now() + (uint64_t)ms * (TICKS_HZ / 1000));
}

static uart_t *uart_number(mp_obj_t number_in) {
    mp_uint_t number = mp_obj_get_int(number_in);
    if (number >= MP_ARRAY_SIZE(uarts)) {
        mp_raise_ValueError(MP_ERROR_TEXT("expected UART 0 or 1"));
    }
    uarts[number]->bauddiv = 16;
    uarts[number]->ctrl = 3;
    return uarts[number];
}

// ticks() -> int: ticks of the 25 MHz timer since the first call.
static mp_obj_t cortex_m3_ticks(void) {
    return mp_obj_new_int_from_ull(ticks_now());
}
static MP_DEFINE_CONST_FUN_OBJ_0(cortex_m3_ticks_obj, cortex_m3_ticks);

// waited_ticks() -> int: how many of them went by in write and read.
static mp_obj_t cortex_m3_waited_ticks(void) {
    return mp_obj_new_int_from_ull(waited_ticks);
}
static MP_DEFINE_CONST_FUN_OBJ_0(cortex_m3_waited_ticks_obj, cortex_m3_waited_ticks);

// write(uart, bytes, limit_ms) -> int: how many bytes were sent within the limit.
static mp_obj_t cortex_m3_write(mp_obj_t uart_in, mp_obj_t content_in, mp_obj_t limit_ms_in) {
    uart_t *uart = uart_number(uart_in);
    mp_buffer_info_t content;
    mp_get_buffer_raise(content_in, &content, MP_BUFFER_READ);
    uint64_t started = ticks_now();
    uint64_t until = started + (uint64_t)mp_obj_get_int(limit_ms_in) * (TICKS_HZ / 1000);
    size_t sent = 0;
    while (sent < content.len && ticks_now() < until) {
        if (!(uart->state & 1)) {
            uart->data = ((const uint8_t *)content.buf)[sent++];
        }
    }
    waited_ticks += ticks_now() - started;
    return MP_OBJ_NEW_SMALL_INT(sent);
}
static MP_DEFINE_CONST_FUN_OBJ_3(cortex_m3_write_obj, cortex_m3_write);

// read(uart, count, limit_ms) -> bytes: up to `count` bytes, fewer if the limit comes first.
static mp_obj_t cortex_m3_read(mp_obj_t uart_in, mp_obj_t count_in, mp_obj_t limit_ms_in) {
    uart_t *uart = uart_number(uart_in);
    vstr_t content;
    vstr_init_len(&content, mp_obj_get_int(count_in));
    uint64_t started = ticks_now();
    uint64_t until = started + (uint64_t)mp_obj_get_int(limit_ms_in) * (TICKS_HZ / 1000);
    size_t received = 0;
    while (received < content.len && ticks_now() < until) {
        if (uart->state & 2) {
            content.buf[received++] = uart->data;
        }
    }
    content.len = received;
    waited_ticks += ticks_now() - started;
    return mp_obj_new_bytes_from_vstr(&content);
}
static MP_DEFINE_CONST_FUN_OBJ_3(cortex_m3_read_obj, cortex_m3_read);

static const mp_rom_map_elem_t cortex_m3_globals_table[] = {
    { MP_ROM_QSTR(MP_QSTR___name__), MP_ROM_QSTR(MP_QSTR_cortex_m3) },
    { MP_ROM_QSTR(MP_QSTR_ticks), MP_ROM_PTR(&cortex_m3_ticks_obj) },
    { MP_ROM_QSTR(MP_QSTR_waited_ticks), MP_ROM_PTR(&cortex_m3_waited_ticks_obj) },
    { MP_ROM_QSTR(MP_QSTR_write), MP_ROM_PTR(&cortex_m3_write_obj) },
    { MP_ROM_QSTR(MP_QSTR_read), MP_ROM_PTR(&cortex_m3_read_obj) },
};
static MP_DEFINE_CONST_DICT(cortex_m3_globals, cortex_m3_globals_table);

const mp_obj_module_t cortex_m3_module = {
    .base = { &mp_type_module },
    .globals = (mp_obj_dict_t *)&cortex_m3_globals,
};
MP_REGISTER_MODULE(MP_QSTR_cortex_m3, cortex_m3_module);
