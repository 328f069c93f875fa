/* A bare stream socket, as fast as C makes it: the floor for the tcp lane. Built by bench/lanes.py with the system's cc. */
#include <errno.h>
#include <stddef.h>
#include <sys/socket.h>
#include <sys/types.h>

/* Both return 0, or -1 where the peer is gone. */
int send_all(int socket, const char *data, size_t size) {
    while (size > 0) {
        ssize_t sent = send(socket, data, size, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EINTR) continue;
            return -1;
        }
        data += sent;
        size -= (size_t)sent;
    }
    return 0;
}

int receive_all(int socket, char *data, size_t size) {
    while (size > 0) {
        ssize_t got = recv(socket, data, size, 0);
        if (got <= 0) {
            if (got < 0 && errno == EINTR) continue;
            return -1;
        }
        data += got;
        size -= (size_t)got;
    }
    return 0;
}
