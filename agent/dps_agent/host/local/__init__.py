"""What a running service shows to other programs on this device: a file of its state, and a socket.

`statefile` is the file. The socket has five parts: `server` owns sockets, limits and the thread and knows no route;
`heads` reads a request's head; `routes` takes a request and the time and gives back what is to be answered; `events`
holds what the hub sends; `shares` counts what each user has.
"""
