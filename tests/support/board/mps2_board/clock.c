// Time on the emulated board: ticks, sleep, and a clock without battery, which starts in 2021.

#include <string.h>
#include <time.h>
#include "py/mphal.h"
#include "py/runtime.h"
#include "shared/timeutils/timeutils.h"
#include "mbedtls/platform_time.h"
#include "mbedtls/platform_util.h"

typedef struct _timer_t {
    volatile uint32_t control; // bit 0: run; bit 3: interrupt
    volatile uint32_t value; // counts down, and begins again at `reload`
    volatile uint32_t reload;
    volatile uint32_t interrupt; // written: clear
} timer_t_;

#define TICKING ((timer_t_ *)0x40000000)
#define WAKING ((timer_t_ *)0x40001000)
#define ENABLE_INTERRUPT REGISTER(0xe000e100)
#define CLEAR_PENDING REGISTER(0xe000e280)
#define FROM_CONSOLE (1 << 0)
#define FROM_WAKING (1 << 9)
#define FROM_ETHERNET (1 << 13)
#define LONGEST_SLEEP_MS (50) // lwIP's own timers are looked at after that
#define FROM_2000_TO_1970_S (946684800)

static uint32_t epoch_at_start; // seconds since 2000 at tick 0
static uint32_t speed; // ticks for each one of the machine's, so that a test need not wait as long as a device

void board_clock_start(void) {
    TICKING->reload = TICKING->value = UINT32_MAX;
    TICKING->control = 1;
    epoch_at_start = timeutils_seconds_since_2000(2021, 1, 1, 0, 0, 0);
    speed = MAX(1, board_setting("speed", 1));
}

void board_clock_hurry(uint32_t times) {
    board_ticks(); // what is behind went at the speed of before
    speed = MAX(1, times);
}

// To be called at least once in 171 s, which is what the timer's 32 bits last: LONGEST_SLEEP_MS sees to that.
uint64_t board_ticks(void) {
    static uint64_t before;
    static uint32_t seen;
    uint32_t now = UINT32_MAX - TICKING->value;
    before += (uint64_t)(uint32_t)(now - seen) * speed;
    seen = now;
    return before;
}

mp_uint_t mp_hal_ticks_cpu(void) {
    return (mp_uint_t)board_ticks();
}

mp_uint_t mp_hal_ticks_us(void) {
    return (mp_uint_t)(board_ticks() / (TICKS_A_SECOND / 1000000));
}

mp_uint_t mp_hal_ticks_ms(void) {
    return (mp_uint_t)(board_ticks() / TICKS_A_MS);
}

uint32_t sys_now(void) { // lwIP's
    return mp_hal_ticks_ms();
}

// Interrupts stay masked all the time; they wake the processor all the same.
static void sleep_for(uint64_t ticks) {
    WAKING->value = MAX(1, MIN(ticks, LONGEST_SLEEP_MS * TICKS_A_MS) / speed);
    ENABLE_INTERRUPT = FROM_WAKING | FROM_ETHERNET | FROM_CONSOLE;
    WAKING->control = 9;
    __asm volatile ("wfi");
    WAKING->control = 0;
    WAKING->interrupt = 1;
    CLEAR_PENDING = FROM_WAKING | FROM_ETHERNET | FROM_CONSOLE;
}

void board_wait(long limit_ms) {
    if (limit_ms != 0) {
        sleep_for((uint64_t)(limit_ms < 0 ? LONGEST_SLEEP_MS : limit_ms) * TICKS_A_MS);
    }
}

static void sleep_until(uint64_t end) {
    for (uint64_t now = board_ticks(); now < end; now = board_ticks()) {
        sleep_for(end - now);
        mp_event_handle_nowait();
    }
}

void mp_hal_delay_ms(mp_uint_t ms) {
    mp_event_handle_nowait();
    sleep_until(board_ticks() + (uint64_t)ms * TICKS_A_MS);
}

void mp_hal_delay_us(mp_uint_t us) {
    sleep_until(board_ticks() + (uint64_t)us * (TICKS_A_SECOND / 1000000));
}

void mp_hal_delay_us_fast(uint32_t us) {
    uint64_t end = board_ticks() + us * (TICKS_A_SECOND / 1000000);
    while (board_ticks() < end) {
    }
}

uint32_t board_epoch_seconds(void) {
    return epoch_at_start + board_ticks() / TICKS_A_SECOND;
}

uint64_t mp_hal_time_ns(void) {
    return ((uint64_t)board_epoch_seconds() + FROM_2000_TO_1970_S) * 1000000000;
}

// mbedTLS verifies certificates under these.
time_t board_unix_time(time_t *at) {
    time_t now = (time_t)board_epoch_seconds() + FROM_2000_TO_1970_S;
    if (at != NULL) {
        *at = now;
    }
    return now;
}

mbedtls_ms_time_t mbedtls_ms_time(void) {
    return (mbedtls_ms_time_t)(board_ticks() / TICKS_A_MS);
}

struct tm *mbedtls_platform_gmtime_r(const mbedtls_time_t *at, struct tm *found) {
    timeutils_struct_time_t t;
    timeutils_seconds_since_2000_to_struct_time(*at - FROM_2000_TO_1970_S, &t);
    memset(found, 0, sizeof(*found));
    found->tm_year = t.tm_year - 1900;
    found->tm_mon = t.tm_mon - 1;
    found->tm_mday = t.tm_mday;
    found->tm_hour = t.tm_hour;
    found->tm_min = t.tm_min;
    found->tm_sec = t.tm_sec;
    return found;
}

// machine.RTC().datetime([(year, month, day, weekday, hours, minutes, seconds, subseconds)])
static mp_obj_t rtc_make_new(const mp_obj_type_t *type, size_t n_args, size_t n_kw, const mp_obj_t *args) {
    static const mp_obj_base_t the_clock = {&board_rtc_type};
    mp_arg_check_num(n_args, n_kw, 0, 0, false);
    return MP_OBJ_FROM_PTR(&the_clock);
}

static mp_obj_t rtc_datetime(size_t n_args, const mp_obj_t *args) {
    if (n_args == 2) {
        mp_obj_t *to;
        mp_obj_get_array_fixed_n(args[1], 8, &to);
        uint32_t now = timeutils_seconds_since_2000(mp_obj_get_int(to[0]), mp_obj_get_int(to[1]), mp_obj_get_int(to[2]),
            mp_obj_get_int(to[4]), mp_obj_get_int(to[5]), mp_obj_get_int(to[6]));
        epoch_at_start = now - board_ticks() / TICKS_A_SECOND;
        return mp_const_none;
    }
    timeutils_struct_time_t t;
    timeutils_seconds_since_2000_to_struct_time(board_epoch_seconds(), &t);
    const mp_uint_t numbers[8] = {t.tm_year, t.tm_mon, t.tm_mday, t.tm_wday, t.tm_hour, t.tm_min, t.tm_sec, 0};
    mp_obj_t items[8];
    for (size_t i = 0; i < 8; i++) {
        items[i] = MP_OBJ_NEW_SMALL_INT(numbers[i]);
    }
    return mp_obj_new_tuple(8, items);
}
static MP_DEFINE_CONST_FUN_OBJ_VAR_BETWEEN(rtc_datetime_obj, 1, 2, rtc_datetime);

static const mp_rom_map_elem_t rtc_table[] = {
    { MP_ROM_QSTR(MP_QSTR_datetime), MP_ROM_PTR(&rtc_datetime_obj) },
};
static MP_DEFINE_CONST_DICT(rtc_dict, rtc_table);
MP_DEFINE_CONST_OBJ_TYPE(board_rtc_type, MP_QSTR_RTC, MP_TYPE_FLAG_NONE, make_new, rtc_make_new, locals_dict, &rtc_dict);
