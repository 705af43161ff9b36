// The board's Ethernet, a LAN9118, as a network interface of lwIP, and network.LAN.
//
// Registers: SMSC LAN9118 data sheet, chapter 5, "Register Description", and 3.12, "Transmit Data Path Operation".

#include <string.h>
#include "py/mphal.h"
#include "py/runtime.h"
#include "extmod/modnetwork.h"
#include "lwip/dhcp.h"
#include "lwip/etharp.h"
#include "lwip/ethip6.h"
#include "lwip/netif.h"
#include "netif/ethernet.h"

#define LAN(offset) REGISTER(0x40200000 + (offset))
#define RX_DATA_FIFO LAN(0x00)
#define TX_DATA_FIFO LAN(0x20)
#define RX_STATUS_FIFO LAN(0x40)
#define TX_STATUS_FIFO LAN(0x48)
#define IRQ_CFG LAN(0x54)
#define INT_STS LAN(0x58)
#define INT_EN LAN(0x5c)
#define FIFO_INT LAN(0x68)
#define TX_CFG LAN(0x70)
#define HW_CFG LAN(0x74)
#define RX_FIFO_INF LAN(0x7c)
#define TX_FIFO_INF LAN(0x80)
#define MAC_CSR_CMD LAN(0xa4)
#define MAC_CSR_DATA LAN(0xa8)
#define CSR_BUSY (1u << 31)
#define CSR_READ (1u << 30)
enum { MAC_CR = 1, ADDRH = 2, ADDRL = 3, MII_ACC = 6, MII_DATA = 7 }; // reached through MAC_CSR_CMD
#define MAC_RUNS (1 << 20 | 1 << 3 | 1 << 2) // full duplex, transmitter, receiver
#define PHY_STATUS (1 << 11 | 1 << 6) // PHY 1, register 1
#define PHY_LINK_IS_UP (1 << 2)
#define RX_ERROR (1 << 15)
#define RX_HAS_MORE (1 << 3) // in INT_STS and INT_EN: the status FIFO has passed its level
#define FIRST_AND_LAST (1 << 13 | 1 << 12) // of a frame's segments: it is all in one
#define FRAME_LIMIT (1514)
#define CRC_BYTES (4)
#define LOOK_AT_LINK_MS (250)

static struct netif lan;
static bool is_active;

static uint32_t read_mac(uint32_t number) {
    MAC_CSR_CMD = CSR_BUSY | CSR_READ | number;
    while (MAC_CSR_CMD & CSR_BUSY) {
    }
    return MAC_CSR_DATA;
}

static void write_mac(uint32_t number, uint32_t value) {
    MAC_CSR_DATA = value;
    MAC_CSR_CMD = CSR_BUSY | number;
    while (MAC_CSR_CMD & CSR_BUSY) {
    }
}

static void follow_link(void) {
    write_mac(MII_ACC, PHY_STATUS);
    if (read_mac(MII_DATA) & PHY_LINK_IS_UP) {
        netif_set_link_up(&lan);
    } else {
        netif_set_link_down(&lan);
    }
}

static err_t send_frame(struct netif *netif, struct pbuf *frame) {
    static uint32_t words[(FRAME_LIMIT + 3) / 4];
    if (frame->tot_len > FRAME_LIMIT || (TX_FIFO_INF & 0xffff) < frame->tot_len + 16u) {
        return ERR_BUF;
    }
    pbuf_copy_partial(frame, words, frame->tot_len, 0);
    TX_DATA_FIFO = FIRST_AND_LAST | frame->tot_len;
    TX_DATA_FIFO = frame->tot_len;
    for (size_t i = 0; i < (frame->tot_len + 3u) / 4; i++) {
        TX_DATA_FIFO = words[i];
    }
    while (TX_FIFO_INF >> 16 & 0xff) {
        (void)TX_STATUS_FIFO;
    }
    return ERR_OK;
}

// One frame out of the FIFO, dropped where lwIP has no room for it or the chip found fault with it.
static void receive_frame(void) {
    uint32_t status = RX_STATUS_FIFO;
    uint32_t length = status >> 16 & 0x3fff;
    struct pbuf *frame = status & RX_ERROR ? NULL : pbuf_alloc(PBUF_RAW, length, PBUF_POOL);
    for (uint32_t at = 0; at < length; at += 4) {
        uint32_t word = RX_DATA_FIFO;
        if (frame != NULL) {
            pbuf_take_at(frame, &word, MIN(4, length - at), at);
        }
    }
    if (frame != NULL) {
        pbuf_realloc(frame, length - CRC_BYTES);
        if (lan.input(frame, &lan) != ERR_OK) {
            pbuf_free(frame);
        }
    }
}

void board_ethernet_poll(void) {
    static uint32_t looked_ms;
    if (!is_active) {
        return;
    }
    uint32_t now_ms = mp_hal_ticks_ms();
    if (now_ms - looked_ms > LOOK_AT_LINK_MS) {
        looked_ms = now_ms;
        follow_link();
    }
    while (RX_FIFO_INF >> 16 & 0xff) {
        receive_frame();
    }
    INT_STS = RX_HAS_MORE;
}

static err_t set_up(struct netif *netif) {
    netif->linkoutput = send_frame;
    netif->output = etharp_output;
    netif->output_ip6 = ethip6_output;
    memcpy(netif->name, "e0", 2);
    netif->mtu = 1500;
    netif->flags = NETIF_FLAG_BROADCAST | NETIF_FLAG_ETHARP | NETIF_FLAG_ETHERNET | NETIF_FLAG_IGMP | NETIF_FLAG_MLD6;
    uint32_t address[2] = {read_mac(ADDRL), read_mac(ADDRH)};
    memcpy(netif->hwaddr, address, sizeof(netif->hwaddr));
    netif->hwaddr_len = sizeof(netif->hwaddr);
    NETIF_SET_CHECKSUM_CTRL(netif, NETIF_CHECKSUM_ENABLE_ALL);
    return ERR_OK;
}

static void activate(void) {
    HW_CFG = 1; // soft reset
    while (HW_CFG & 1) {
    }
    TX_CFG = 1 << 1; // transmitter on
    FIFO_INT = 0;
    INT_STS = UINT32_MAX;
    INT_EN = RX_HAS_MORE;
    IRQ_CFG = 1 << 8 | 1 << 4 | 1; // enabled, active high, push-pull
    write_mac(MAC_CR, MAC_RUNS);
    netif_add(&lan, IP4_ADDR_ANY4, IP4_ADDR_ANY4, IP4_ADDR_ANY4, NULL, set_up, ethernet_input);
    netif_set_hostname(&lan, mod_network_hostname_data);
    netif_create_ip6_linklocal_address(&lan, 1);
    netif_set_ip6_autoconfig_enabled(&lan, 1);
    netif_set_default(&lan);
    netif_set_up(&lan);
    follow_link();
    dhcp_start(&lan);
    is_active = true;
}

static void deactivate(void) {
    is_active = false;
    dhcp_stop(&lan);
    netif_remove(&lan);
    write_mac(MAC_CR, 0);
    INT_EN = 0;
}

static mp_obj_t lan_make_new(const mp_obj_type_t *type, size_t n_args, size_t n_kw, const mp_obj_t *args) {
    static const mp_obj_base_t the_lan = {&board_lan_type};
    mod_network_register_nic(MP_OBJ_FROM_PTR(&the_lan));
    return MP_OBJ_FROM_PTR(&the_lan);
}

static mp_obj_t lan_active(size_t n_args, const mp_obj_t *args) {
    if (n_args == 2 && mp_obj_is_true(args[1]) != is_active) {
        (is_active ? deactivate : activate)();
    }
    return mp_obj_new_bool(is_active);
}
static MP_DEFINE_CONST_FUN_OBJ_VAR_BETWEEN(lan_active_obj, 1, 2, lan_active);

static mp_obj_t lan_isconnected(mp_obj_t self) {
    return mp_obj_new_bool(is_active && netif_is_link_up(&lan) && !ip4_addr_isany(netif_ip4_addr(&lan)));
}
static MP_DEFINE_CONST_FUN_OBJ_1(lan_isconnected_obj, lan_isconnected);

static mp_obj_t lan_ifconfig(size_t n_args, const mp_obj_t *args) {
    return mod_network_nic_ifconfig(&lan, n_args - 1, args + 1);
}
static MP_DEFINE_CONST_FUN_OBJ_VAR_BETWEEN(lan_ifconfig_obj, 1, 2, lan_ifconfig);

static const mp_rom_map_elem_t lan_table[] = {
    { MP_ROM_QSTR(MP_QSTR_active), MP_ROM_PTR(&lan_active_obj) },
    { MP_ROM_QSTR(MP_QSTR_isconnected), MP_ROM_PTR(&lan_isconnected_obj) },
    { MP_ROM_QSTR(MP_QSTR_ifconfig), MP_ROM_PTR(&lan_ifconfig_obj) },
};
static MP_DEFINE_CONST_DICT(lan_dict, lan_table);
MP_DEFINE_CONST_OBJ_TYPE(board_lan_type, MP_QSTR_LAN, MP_TYPE_FLAG_NONE, make_new, lan_make_new, locals_dict, &lan_dict);
