"""HTTP/1.1 on a socket, as lean as Python allows, for the gateway and the emulated engine."""
