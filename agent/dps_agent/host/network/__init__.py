"""The ways out of a Linux device: sockets, TLS, proxies, HTTPS, WebSocket and MQTT."""
