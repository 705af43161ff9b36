SRC_USERMOD_C += $(USERMOD_DIR)/cortex_m3.c
SRC_USERMOD_LIB_C += $(addprefix $(USERMOD_DIR)/, aes.c platform_util.c sha256.c)
CFLAGS_USERMOD += -I$(MBEDTLS)/library
