"""What a device meets in the network: DPS and hubs, honest and hostile, and the servers on the way."""
