// What parts.c needs at the start, and from the host.
#pragma once
#include <stddef.h>

void board_random_start(void);
void board_read_host_file(const char *name, void *into, size_t count);
