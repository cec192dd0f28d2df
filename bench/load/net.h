/* What do the engine and the client share? Sockets, the clock, and reading an HTTP head. */
#ifndef NET_H
#define NET_H

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000LL

static inline int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * SECOND + t.tv_nsec;
}

static inline void fail(const char *what) {
    perror(what);
    exit(1);
}

static inline void set_no_delay(int fd) {
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

static inline struct sockaddr_in loopback(int port) {
    return (struct sockaddr_in){.sin_family = AF_INET,
                                .sin_port = htons(port),
                                .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
}

static inline void raise_file_limit(void) {
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
}

/* epoll rounds to milliseconds; a timerfd wakes it to the microsecond. */
static inline void set_alarm(int timer, int64_t at_ns) {
    struct itimerspec when = {.it_value = {at_ns / SECOND, at_ns % SECOND}};
    timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, NULL);
}

/* The value of a header in a NUL-terminated head, or NULL. `name` is "\r\nname:". */
static inline const char *header(const char *head, const char *name) {
    const char *found = strcasestr(head, name);
    if (!found) return NULL;
    found += strlen(name);
    while (*found == ' ') found++;
    return found;
}

/* The text behind "key": in JSON, blanks skipped, or NULL. `key` comes quoted: "\"stream\"". */
static inline const char *json_value(const char *text, const char *key) {
    for (const char *at = text; (at = strstr(at, key));) {
        at += strlen(key);
        while (*at == ' ') at++;
        if (*at != ':') continue;
        do at++; while (*at == ' ');
        return at;
    }
    return NULL;
}

#endif
