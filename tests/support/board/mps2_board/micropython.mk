# The board's own C code.
SRC_USERMOD_C += $(addprefix $(USERMOD_DIR)/,start.c clock.c flash.c ethernet.c parts.c)
