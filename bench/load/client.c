/* What did the way through the gateway add? A client that holds many streams open and counts.
 *
 *   client --port P [--streams S] [--body B] [--tokens T] [--warm W] [--seconds D] [--requests R]
 *
 * S keep-alive connections, started evenly over the warm-up of W seconds, each posting one streamed
 * chat request of B bytes after the other; then D seconds are measured. With --requests R they are
 * short requests without streaming instead, R a second over the S connections.
 * Prints "measuring" when the warm-up is over, and at the end one JSON line. It then waits for its
 * input to close before it leaves, so that the gateway can be looked at under load.
 *
 * Times are in microseconds and are what the gateway and the two sockets added, for the engine says
 * in each chunk when it sent it: `delay_us` of tokens, `ttft_us` of first tokens (both ways, the
 * engine's own wait taken off), `gap_us` what a gap between two tokens grew by, `answer_us` of whole
 * answers that were not streamed.
 */
#include "net.h"

#include <math.h>
#include <poll.h>

#define MAX_STREAMS 20000
#define MAX_EVENT 4096

typedef struct {
    int64_t counts[64 * 32];
    int64_t n, max;
} Histogram; /* 32 buckets an octave: within 3 % */

typedef enum { IDLE, CONNECTING, HEAD, SIZE, DATA, DATA_END, TRAILER, LENGTH, WAITING } Phase;

typedef struct {
    int fd, streaming;
    Phase phase;
    long left; /* bytes of this chunk or body */
    int next_token, done;
    int64_t asked_ns, delay_ns, retry_ns;
    size_t len;
    char text[MAX_EVENT]; /* the head or the event being read */
} Stream;

static Stream streams[MAX_STREAMS];
static Histogram delays, firsts, gaps, answers;
static long tokens, requests, errors, disorder, late;
static int epoll_fd, port = 8080, n_streams = 200, body_size = 1024, n_tokens = 128, measuring;
static int idle[MAX_STREAMS], n_idle;
static double warm_s = 2, measure_s = 5, request_rate;

static void record(Histogram *h, int64_t ns) {
    if (!measuring) return;
    int64_t us = ns < 1000 ? 1 : ns / 1000;
    int octave = 63 - __builtin_clzll(us);
    int part = octave < 5 ? (int)((us << 5 >> octave) & 31) : (int)((us >> (octave - 5)) & 31);
    h->counts[octave * 32 + part]++;
    h->n++;
    if (us > h->max) h->max = us;
}

static double quantile(const Histogram *h, double q) {
    int64_t seen = 0, wanted = (int64_t)ceil(q * h->n);
    for (int i = 0; i < 64 * 32; i++)
        if ((seen += h->counts[i]) >= wanted && seen) return ldexp(1 + (i % 32 + 0.5) / 32, i / 32);
    return 0;
}

static void print_histogram(const char *name, const Histogram *h) {
    printf(", \"%s\": {\"n\": %lld, \"p50\": %.0f, \"p90\": %.0f, \"p99\": %.0f, \"max\": %lld}", name,
           (long long)h->n, quantile(h, .5), quantile(h, .9), quantile(h, .99), (long long)h->max);
}

static void drop(Stream *s, int is_error) {
    if (s->fd >= 0) close(s->fd);
    s->fd = -1;
    s->phase = WAITING;
    s->retry_ns = now_ns() + SECOND / 10;
    if (is_error && measuring) errors++;
}

static void connect_stream(Stream *s) {
    struct sockaddr_in where = loopback(port);
    struct epoll_event e = {.events = EPOLLIN | EPOLLOUT, .data.u32 = s - streams};
    s->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (s->fd < 0) fail("socket");
    set_no_delay(s->fd);
    if (connect(s->fd, (void *)&where, sizeof where) < 0 && errno != EINPROGRESS)
        return drop(s, 1);
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, s->fd, &e) < 0) fail("epoll_ctl");
    s->phase = CONNECTING;
}

/* Each prompt begins differently, so that no prefix cache can help. */
static void ask(Stream *s) {
    static char *out;
    static long serial;
    char body[512];
    if (!out) out = malloc(body_size + 1024);
    s->streaming = request_rate == 0;
    int start = s->streaming
                    ? sprintf(body, "{\"model\": \"bench\", \"stream\": true, \"max_tokens\": %d, "
                                    "\"stream_options\": {\"include_usage\": true}, ", n_tokens)
                    : sprintf(body, "{\"model\": \"bench\", \"max_tokens\": 1, ");
    start += sprintf(body + start, "\"messages\": [{\"role\": \"user\", \"content\": \"%ld ", ++serial);
    int padding = body_size - start - 4 > 0 ? body_size - start - 4 : 0;
    int len = sprintf(out, "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
                           "content-type: application/json\r\ncontent-length: %d\r\n\r\n%s",
                      start + padding + 4, body);
    for (int i = 0; i < padding; i++) out[len++] = i % 6 ? 'a' + (serial + i) % 26 : ' ';
    len += sprintf(out + len, "\"}]}");
    s->phase = HEAD;
    s->len = 0;
    s->next_token = 1;
    s->done = 0;
    s->asked_ns = now_ns();
    if (send(s->fd, out, len, MSG_NOSIGNAL) != len) drop(s, 1);
}

static void ready_for_more(Stream *s) {
    s->phase = IDLE;
    if (request_rate == 0) ask(s);
    else idle[n_idle++] = s - streams;
}

static void response_complete(Stream *s, int64_t now) {
    if (s->streaming && (!s->done || s->next_token != n_tokens + 1)) return drop(s, 1);
    if (measuring) requests++;
    if (!s->streaming) record(&answers, now - s->asked_ns);
    ready_for_more(s);
}

static void read_line(Stream *s, int64_t now) {
    if (!strncmp(s->text, "data: [DONE]", 12)) s->done = 1;
    const char *number = json_value(s->text, "\"n\""), *sent = json_value(s->text, "\"sent_ns\"");
    if (!number || !sent) return;
    if (atoi(number) != s->next_token && measuring) disorder++;
    int64_t delay = now - atoll(sent);
    if (s->next_token++ == 1) {
        const char *wait = json_value(s->text, "\"wait_ns\"");
        record(&firsts, now - s->asked_ns - (wait ? atoll(wait) : 0));
    } else {
        record(&delays, delay);
        record(&gaps, delay - s->delay_ns);
    }
    s->delay_ns = delay;
    if (measuring) tokens++;
}

static int head_complete(Stream *s) {
    return s->len >= 4 && !memcmp(s->text + s->len - 4, "\r\n\r\n", 4);
}

static void start_body(Stream *s) {
    s->text[s->len] = 0;
    const char *length = header(s->text, "\r\ncontent-length:");
    const char *coding = header(s->text, "\r\ntransfer-encoding:");
    int ok = !strncmp(s->text, "HTTP/1.1 200", 12);
    s->len = 0;
    if (!ok) fprintf(stderr, "client: got %.*s\n", (int)strcspn(s->text, "\r"), s->text);
    if (!ok || (!length && !coding)) return drop(s, 1);
    s->phase = coding ? SIZE : LENGTH;
    s->left = coding ? 0 : atol(length);
}

static void take_body(Stream *s, const char *data, size_t len, int64_t now) {
    if (!s->streaming) return;
    for (size_t i = 0; i < len; i++) {
        if (data[i] != '\n') {
            if (s->len < MAX_EVENT - 1) s->text[s->len++] = data[i];
            continue;
        }
        s->text[s->len] = 0;
        if (s->len) read_line(s, now);
        s->len = 0;
    }
}

/* Framing and events may be split anywhere: all state is in the stream, none in the buffer. `text`
 * may hold half an event while a size line is read, so that one is taken digit by digit. */
static void take(Stream *s, const char *data, size_t len, int64_t now) {
    for (size_t i = 0; i < len;) {
        char c = data[i];
        switch (s->phase) {
        case HEAD:
            if (s->len == MAX_EVENT - 1) return drop(s, 1);
            s->text[s->len++] = c;
            i++;
            if (head_complete(s)) start_body(s);
            if (s->phase == LENGTH && s->left == 0) response_complete(s, now);
            break;
        case SIZE:
            i++;
            if (c == '\n') {
                s->phase = s->left ? DATA : TRAILER;
            } else if (c != '\r') {
                int digit = c <= '9' ? c - '0' : (c | 32) - 'a' + 10;
                if (digit < 0 || digit > 15) return drop(s, 1);
                s->left = s->left * 16 + digit;
            }
            break;
        case DATA:
        case LENGTH: {
            size_t part = len - i < (size_t)s->left ? len - i : (size_t)s->left;
            take_body(s, data + i, part, now);
            i += part;
            s->left -= part;
            if (s->left) break;
            if (s->phase == DATA) s->phase = DATA_END;
            else response_complete(s, now);
            break;
        }
        case DATA_END:
            i++;
            if (c == '\n') s->phase = SIZE;
            break;
        case TRAILER:
            i++;
            if (c == '\n') response_complete(s, now);
            break;
        default: /* bytes nobody asked for */
            return drop(s, 1);
        }
    }
}

static void on_ready(Stream *s, uint32_t events) {
    static char buffer[1 << 18];
    if (s->phase == CONNECTING) {
        int problem = 0;
        socklen_t size = sizeof problem;
        getsockopt(s->fd, SOL_SOCKET, SO_ERROR, &problem, &size);
        if (problem) return drop(s, 1);
        struct epoll_event e = {.events = EPOLLIN, .data.u32 = s - streams};
        epoll_ctl(epoll_fd, EPOLL_CTL_MOD, s->fd, &e);
        return ready_for_more(s);
    }
    if (!(events & ~EPOLLOUT)) return;
    ssize_t got = recv(s->fd, buffer, sizeof buffer, 0);
    if (got < 0 && errno == EAGAIN) return;
    if (got > 0) return take(s, buffer, got, now_ns());
    for (int i = 0; i < n_idle && s->phase == IDLE; i++)
        if (&streams[idle[i]] == s) idle[i] = idle[--n_idle];
    drop(s, s->phase != IDLE); /* a server may close a connection that has nothing to do */
}

static void read_options(int argc, char **argv) {
    for (int i = 1; i + 1 < argc; i += 2) {
        const char *value = argv[i + 1];
        if (!strcmp(argv[i], "--port")) port = atoi(value);
        else if (!strcmp(argv[i], "--streams")) n_streams = atoi(value);
        else if (!strcmp(argv[i], "--body")) body_size = atoi(value);
        else if (!strcmp(argv[i], "--tokens")) n_tokens = atoi(value);
        else if (!strcmp(argv[i], "--warm")) warm_s = atof(value);
        else if (!strcmp(argv[i], "--seconds")) measure_s = atof(value);
        else if (!strcmp(argv[i], "--requests")) request_rate = atof(value);
        else { fprintf(stderr, "client: unknown option %s\n", argv[i]); exit(2); }
    }
    if (n_streams > MAX_STREAMS) n_streams = MAX_STREAMS;
}

static void reconnect(int64_t now) {
    for (int i = 0; i < n_streams; i++)
        if (streams[i].phase == WAITING && streams[i].retry_ns <= now) connect_stream(&streams[i]);
}

int main(int argc, char **argv) {
    read_options(argc, argv);
    raise_file_limit();
    epoll_fd = epoll_create1(0);
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct epoll_event e = {.events = EPOLLIN, .data.u32 = UINT32_MAX};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, timer, &e);
    int64_t start = now_ns(), warm = start + warm_s * SECOND, end = warm + measure_s * SECOND;
    int64_t next_request = warm - SECOND / 2, next_check = start;
    for (int i = 0; i < n_streams; i++) {
        streams[i].phase = WAITING;
        streams[i].retry_ns = start + (int64_t)(0.75 * warm_s * SECOND * i / n_streams);
    }
    for (int64_t now; (now = now_ns()) < end;) {
        if (!measuring && now >= warm) {
            measuring = 1;
            puts("measuring");
            fflush(stdout);
        }
        if (now >= next_check) {
            reconnect(now);
            next_check = now + SECOND / 200;
        }
        for (; request_rate && now >= next_request; next_request += SECOND / request_rate) {
            if (n_idle) ask(&streams[idle[--n_idle]]);
            else if (measuring) late++;
        }
        int64_t wake = next_check < end ? next_check : end;
        set_alarm(timer, request_rate && next_request < wake ? next_request : wake);
        struct epoll_event ready[256];
        int n = epoll_wait(epoll_fd, ready, 256, -1);
        for (int i = 0; i < n; i++) {
            uint64_t ticks;
            if (ready[i].data.u32 != UINT32_MAX) on_ready(&streams[ready[i].data.u32], ready[i].events);
            else if (read(timer, &ticks, sizeof ticks) < 0 && errno != EAGAIN) fail("timer");
        }
    }
    printf("{\"tokens\": %ld, \"requests\": %ld, \"errors\": %ld, \"disorder\": %ld, \"late\": %ld",
           tokens, requests, errors, disorder, late);
    print_histogram("delay_us", &delays);
    print_histogram("ttft_us", &firsts);
    print_histogram("gap_us", &gaps);
    print_histogram("answer_us", &answers);
    puts("}");
    fflush(stdout);
    while (getchar() != EOF) {}
}
