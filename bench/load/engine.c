/* How fast can a gateway be fed? An OpenAI-like engine that streams tokens on an exact schedule.
 *
 *   engine --port P [--workers N] [--rate R] [--tokens T] [--lockstep]
 *
 * N workers listen on P, P+1, ...; each of their streams gets R tokens a second, T in all (or the
 * body's max_tokens). --lockstep sends the tokens of all streams of a worker together, as the steps
 * of a continuous batch do; without it each stream keeps the phase it arrived with.
 * Each chunk carries the time it was sent (CLOCK_MONOTONIC), its number, and for how long the
 * engine itself kept the request waiting, so that a client can tell what the way there and back
 * added.
 */
#include "net.h"

#define MAX_FDS 65536
#define MAX_REQUEST (1 << 20)
#define MAX_WORKERS 512

typedef struct Stream {
    struct Stream *prev, *next; /* in its worker's queue, ordered by due_ns */
    int fd, worker;
    int streaming, usage;
    int sent, wanted;
    int64_t due_ns, arrived_ns;
    char *in; /* the request so far */
    size_t in_len, in_cap;
    char *out; /* what the socket did not take yet */
    size_t out_len, out_cap;
} Stream;

typedef struct {
    Stream queue; /* sentinel; all waits are one period long, so appending keeps the order */
    int64_t phase_ns;
    int running;
    long tokens;
} Worker;

static Stream *streams[MAX_FDS];
static Worker workers[MAX_WORKERS];
static int epoll_fd, n_workers = 1, lockstep, default_tokens = 128;
static int64_t period_ns = SECOND / 50;

static const char TOKEN[] = /* 247 bytes, as vLLM's are about */
    "data: {\"id\":\"chatcmpl-b0e3c5d7a9f14268\",\"object\":\"chat.completion.chunk\",\"created\":1760000000,"
    "\"model\":\"bench\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" pace\"},\"finish_reason\":null}],"
    "\"n\":%6d,\"wait_ns\":%11lld,\"sent_ns\":%17lld}\n\n";
static const char ROLE[] =
    "data: {\"id\":\"chatcmpl-b0e3c5d7a9f14268\",\"object\":\"chat.completion.chunk\",\"created\":1760000000,"
    "\"model\":\"bench\",\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},"
    "\"finish_reason\":null}]}\n\n";
static const char USAGE[] =
    "data: {\"id\":\"chatcmpl-b0e3c5d7a9f14268\",\"object\":\"chat.completion.chunk\",\"created\":1760000000,"
    "\"model\":\"bench\",\"choices\":[],\"usage\":{\"prompt_tokens\":%d,\"completion_tokens\":%d,"
    "\"total_tokens\":%d}}\n\n";
static const char FINISH[] =
    "data: {\"id\":\"chatcmpl-b0e3c5d7a9f14268\",\"object\":\"chat.completion.chunk\",\"created\":1760000000,"
    "\"model\":\"bench\",\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n";
static const char DONE[] = "data: [DONE]\n\n";

static void unlink_stream(Stream *s) {
    if (!s->next) return;
    s->prev->next = s->next;
    s->next->prev = s->prev;
    s->next = s->prev = NULL;
    workers[s->worker].running--;
}

static void append_stream(Stream *s, int64_t due_ns) {
    Worker *w = &workers[s->worker];
    s->due_ns = due_ns;
    s->prev = w->queue.prev;
    s->next = &w->queue;
    s->prev->next = s;
    w->queue.prev = s;
    w->running++;
}

static void close_stream(Stream *s) {
    unlink_stream(s);
    streams[s->fd] = NULL;
    close(s->fd);
    free(s->in);
    free(s->out);
    free(s);
}

static void watch(Stream *s, uint32_t events, int how) {
    struct epoll_event e = {.events = events, .data.fd = s->fd};
    if (epoll_ctl(epoll_fd, how, s->fd, &e) < 0) fail("epoll_ctl");
}

/* Send, or keep what the socket does not take. A broken socket shows at the next read. */
static void put(Stream *s, const char *data, size_t len) {
    ssize_t taken = s->out_len ? 0 : send(s->fd, data, len, MSG_NOSIGNAL);
    if (taken < 0) taken = errno == EAGAIN ? 0 : (ssize_t)len;
    if ((size_t)taken == len) return;
    size_t rest = len - taken;
    if (s->out_len + rest > s->out_cap) {
        s->out_cap = 2 * (s->out_len + rest);
        s->out = realloc(s->out, s->out_cap);
    }
    if (!s->out_len) watch(s, EPOLLIN | EPOLLOUT, EPOLL_CTL_MOD);
    memcpy(s->out + s->out_len, data + taken, rest);
    s->out_len += rest;
}

static void flush_stream(Stream *s) {
    ssize_t taken = send(s->fd, s->out, s->out_len, MSG_NOSIGNAL);
    if (taken <= 0) return;
    s->out_len -= taken;
    memmove(s->out, s->out + taken, s->out_len);
    if (!s->out_len) watch(s, EPOLLIN, EPOLL_CTL_MOD);
}

static size_t chunked(char *to, const char *text) {
    return sprintf(to, "%zx\r\n%s\r\n", strlen(text), text);
}

static void send_token(Stream *s) {
    char out[2048], text[512];
    size_t len = 0;
    if (s->sent == 0) {
        len += sprintf(out, "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
                            "transfer-encoding: chunked\r\n\r\n");
        len += chunked(out + len, ROLE);
    }
    int64_t now = now_ns();
    sprintf(text, TOKEN, ++s->sent, (long long)(now - s->arrived_ns), (long long)now);
    len += chunked(out + len, text);
    if (s->sent == s->wanted) {
        len += chunked(out + len, FINISH);
        sprintf(text, USAGE, 256, s->sent, 256 + s->sent);
        if (s->usage) len += chunked(out + len, text);
        len += chunked(out + len, DONE);
        len += sprintf(out + len, "0\r\n\r\n");
    }
    workers[s->worker].tokens++;
    put(s, out, len);
}

/* Send what is due on a worker, and say when the next token is. */
static int64_t run_worker(Worker *w, int64_t now) {
    while (w->queue.next != &w->queue) {
        Stream *s = w->queue.next;
        if (s->due_ns > now) return s->due_ns;
        unlink_stream(s);
        send_token(s);
        if (s->sent < s->wanted) append_stream(s, s->due_ns + period_ns);
    }
    return INT64_MAX;
}

static void answer(Stream *s, const char *type, const char *body) {
    char out[4096];
    int len = snprintf(out, sizeof out,
                       "HTTP/1.1 200 OK\r\ncontent-type: %s\r\ncontent-length: %zu\r\n\r\n%s", type,
                       strlen(body), body);
    put(s, out, len);
}

static void answer_get(Stream *s, const char *path) {
    Worker *w = &workers[s->worker];
    char body[2048];
    if (!strncmp(path, "/metrics", 8)) {
        sprintf(body,
                "# TYPE vllm:num_requests_running gauge\n"
                "vllm:num_requests_running{engine=\"0\",model_name=\"bench\"} %d.0\n"
                "# TYPE vllm:num_requests_waiting gauge\n"
                "vllm:num_requests_waiting{engine=\"0\",model_name=\"bench\"} 0.0\n"
                "# TYPE vllm:kv_cache_usage_perc gauge\n"
                "vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"bench\"} %.4f\n"
                "# TYPE vllm:generation_tokens_total counter\n"
                "vllm:generation_tokens_total{engine=\"0\",model_name=\"bench\"} %ld.0\n"
                "# TYPE vllm:cache_config_info gauge\n"
                "vllm:cache_config_info{block_size=\"16\",num_gpu_blocks=\"1000000\"} 1.0\n",
                w->running, w->running / 20000.0, w->tokens);
        answer(s, "text/plain; version=0.0.4", body);
    } else if (!strncmp(path, "/v1/models", 10)) {
        answer(s, "application/json",
               "{\"object\":\"list\",\"data\":[{\"id\":\"bench\",\"object\":\"model\","
               "\"owned_by\":\"vllm\",\"max_model_len\":131072}]}");
    } else if (!strncmp(path, "/version", 8)) {
        answer(s, "application/json", "{\"version\":\"0.11.0\"}");
    } else {
        answer(s, "application/json", "{}");
    }
}

static void start_generation(Stream *s, const char *body) {
    const char *streaming = json_value(body, "\"stream\""), *max = json_value(body, "\"max_tokens\"");
    const char *usage = json_value(body, "\"include_usage\"");
    int64_t now = now_ns();
    s->sent = 0;
    s->wanted = max && atoi(max) > 0 ? atoi(max) : default_tokens;
    s->usage = usage && *usage == 't';
    s->arrived_ns = now;
    if (!streaming || *streaming != 't') {
        workers[s->worker].tokens++;
        answer(s, "application/json",
               "{\"id\":\"chatcmpl-b0e3c5d7a9f14268\",\"object\":\"chat.completion\","
               "\"created\":1760000000,\"model\":\"bench\",\"choices\":[{\"index\":0,\"message\":"
               "{\"role\":\"assistant\",\"content\":\" pace\"},\"finish_reason\":\"length\"}],"
               "\"usage\":{\"prompt_tokens\":256,\"completion_tokens\":1,\"total_tokens\":257}}");
        return;
    }
    int64_t due = now + period_ns, phase = workers[s->worker].phase_ns;
    if (lockstep) due = (now - phase) / period_ns * period_ns + period_ns + phase;
    append_stream(s, due);
}

/* Take whole requests off the input; a client that pipelines is none of ours. */
static void take_requests(Stream *s) {
    char *end;
    while (s->in_len && (s->in[s->in_len] = 0, end = strstr(s->in, "\r\n\r\n"))) {
        size_t head_len = end + 4 - s->in;
        char after_head = s->in[head_len];
        s->in[head_len] = 0;
        const char *length = header(s->in, "\r\ncontent-length:");
        int expects = header(s->in, "\r\nexpect:") != NULL;
        size_t body_len = length ? strtoul(length, NULL, 10) : 0;
        s->in[head_len] = after_head;
        if (s->in_len < head_len + body_len) {
            if (expects && s->in_len == head_len) put(s, "HTTP/1.1 100 Continue\r\n\r\n", 25);
            return;
        }
        if (!strncmp(s->in, "GET ", 4)) {
            answer_get(s, s->in + 4);
        } else {
            char after_body = s->in[head_len + body_len];
            s->in[head_len + body_len] = 0;
            start_generation(s, s->in + head_len);
            s->in[head_len + body_len] = after_body;
        }
        s->in_len -= head_len + body_len;
        memmove(s->in, s->in + head_len + body_len, s->in_len);
    }
}

static void read_stream(Stream *s) {
    if (s->in_cap - s->in_len < 2) {
        if (s->in_cap >= MAX_REQUEST) return close_stream(s);
        s->in_cap = s->in_cap ? 2 * s->in_cap : 4096;
        s->in = realloc(s->in, s->in_cap);
    }
    ssize_t got = recv(s->fd, s->in + s->in_len, s->in_cap - s->in_len - 1, 0);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) return close_stream(s);
    s->in_len += got;
    take_requests(s);
}

static void accept_all(int listener, int worker) {
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        set_no_delay(fd);
        Stream *s = calloc(1, sizeof *s);
        s->fd = fd;
        s->worker = worker;
        streams[fd] = s;
        watch(s, EPOLLIN, EPOLL_CTL_ADD);
    }
}

static int listen_on(int port) {
    struct sockaddr_in where = loopback(port);
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (void *)&where, sizeof where) < 0 || listen(fd, 4096) < 0) fail("listen");
    return fd;
}

static void read_options(int argc, char **argv, int *port) {
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "0";
        if (!strcmp(argv[i], "--lockstep")) { lockstep = 1; continue; }
        else if (!strcmp(argv[i], "--port")) *port = atoi(value);
        else if (!strcmp(argv[i], "--workers")) n_workers = atoi(value);
        else if (!strcmp(argv[i], "--rate")) period_ns = SECOND / atof(value);
        else if (!strcmp(argv[i], "--tokens")) default_tokens = atoi(value);
        else { fprintf(stderr, "engine: unknown option %s\n", argv[i]); exit(2); }
        i++;
    }
    if (n_workers < 1 || n_workers > MAX_WORKERS) { fprintf(stderr, "1 to 512 workers\n"); exit(2); }
}

int main(int argc, char **argv) {
    int port = 9001, listeners[MAX_WORKERS], first_listener, timer;
    read_options(argc, argv, &port);
    raise_file_limit();
    epoll_fd = epoll_create1(0);
    timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct epoll_event e = {.events = EPOLLIN, .data.fd = timer};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, timer, &e);
    for (int i = 0; i < n_workers; i++) {
        workers[i].queue.next = workers[i].queue.prev = &workers[i].queue;
        workers[i].phase_ns = period_ns * i / n_workers;
        listeners[i] = listen_on(port + i);
        e.data.fd = listeners[i];
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listeners[i], &e);
    }
    first_listener = listeners[0];
    for (;;) {
        struct epoll_event ready[256];
        int n = epoll_wait(epoll_fd, ready, 256, -1);
        for (int i = 0; i < n; i++) {
            int fd = ready[i].data.fd;
            uint64_t ticks;
            if (fd == timer) {
                if (read(timer, &ticks, sizeof ticks) < 0 && errno != EAGAIN) fail("timer");
            } else if (fd >= first_listener && fd < first_listener + n_workers) {
                accept_all(fd, fd - first_listener);
            } else if (streams[fd]) {
                if (ready[i].events & EPOLLOUT) flush_stream(streams[fd]);
                if (ready[i].events & ~EPOLLOUT) read_stream(streams[fd]);
            }
        }
        int64_t now = now_ns(), next = INT64_MAX;
        for (int i = 0; i < n_workers; i++) {
            int64_t due = run_worker(&workers[i], now);
            if (due < next) next = due;
        }
        if (next != INT64_MAX) set_alarm(timer, next);
    }
}
