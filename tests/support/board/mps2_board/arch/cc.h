// What lwIP asks its port for.
#pragma once
#define LWIP_PLATFORM_DIAG(text)
#define LWIP_PLATFORM_ASSERT(text)
#define LWIP_NO_CTYPE_H 1
