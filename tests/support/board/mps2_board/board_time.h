// The clock, for extmod/modtime.c.
#include "shared/timeutils/timeutils.h"

static mp_obj_t mp_time_time_get(void) {
    return mp_obj_new_int_from_uint(board_epoch_seconds());
}

static mp_obj_t mp_time_localtime_get(void) {
    timeutils_struct_time_t t;
    timeutils_seconds_since_epoch_to_struct_time(board_epoch_seconds(), &t);
    const mp_uint_t numbers[] = {t.tm_year, t.tm_mon, t.tm_mday, t.tm_hour, t.tm_min, t.tm_sec, t.tm_wday, t.tm_yday};
    mp_obj_t items[MP_ARRAY_SIZE(numbers)];
    for (size_t i = 0; i < MP_ARRAY_SIZE(numbers); i++) {
        items[i] = MP_OBJ_NEW_SMALL_INT(numbers[i]);
    }
    return mp_obj_new_tuple(MP_ARRAY_SIZE(items), items);
}
