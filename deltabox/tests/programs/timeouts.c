// One call with a timeout of 300 ms that nothing ends but its time: "ok" if it waited so long and said so.
// timeouts MODE: reads one byte to begin, prints "ready".
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

static const char *mode;
static int is(const char *name) { return strcmp(mode, name) == 0; }
static void done(int good, const char *what) {
    if (good) printf("ok\n"); else printf("bad: %s %s: %s\n", mode, what, strerror(errno));
    fflush(stdout);
    _exit(!good);
}
static long now_us(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec * 1000000 + t.tv_nsec / 1000; }
static const struct timespec limit = {0, 300000000};  // in memory that cannot be written

static int events[2];
static void *send_events(void *nothing) {
    for (;;) { usleep(10000); if (write(events[1], "x", 1) != 1) done(0, "write"); }
    return nothing;
}

int main(int n, char **args) {
    char byte, big[4096] = {0};
    int pair[2], r = -2, wanted = 0, error = 0;
    mode = n > 1 ? args[1] : "epoll";
    if (read(0, &byte, 1) != 1) return 2;
    struct epoll_event ev = {.events = EPOLLIN};
    int poller = epoll_create1(0), semaphores = is("semtimedop") ? semget(IPC_PRIVATE, 1, 0600) : 0;
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) || pipe(events)) done(0, "socketpair");
    struct timeval time = {0, 300000};
    setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &time, sizeof time);
    setsockopt(pair[0], SOL_SOCKET, SO_SNDTIMEO, &time, sizeof time);
    epoll_ctl(poller, EPOLL_CTL_ADD, pair[0], &ev);
    sigset_t set; sigemptyset(&set); sigaddset(&set, SIGUSR1); sigprocmask(SIG_BLOCK, &set, NULL);
    struct sockaddr_un name = {.sun_family = AF_UNIX};  // autobind
    socklen_t len = sizeof name;
    int listener = socket(AF_UNIX, SOCK_STREAM, 0), client = socket(AF_UNIX, SOCK_STREAM, 0);
    bind(listener, (void *)&name, sizeof(sa_family_t)); listen(listener, 0); getsockname(listener, (void *)&name, &len);
    setsockopt(listener, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof time);
    setsockopt(client, SOL_SOCKET, SO_SNDTIMEO, &time, sizeof time);
    if (is("connect") && connect(socket(AF_UNIX, SOCK_STREAM, 0), (void *)&name, len)) done(0, "first connect");
    if (is("send")) while (send(pair[0], big, sizeof big, MSG_DONTWAIT) > 0) {}
    printf("ready\n"); fflush(stdout);

    if (is("loop")) {  // the same call again and again, each ended by an event long before its time
        pthread_t t;
        pthread_create(&t, NULL, send_events, NULL);
        struct epoll_event some[2], in = {.events = EPOLLIN, .data.fd = 0}, event = {.events = EPOLLIN, .data.fd = events[0]};
        int both = epoll_create1(0);
        epoll_ctl(both, EPOLL_CTL_ADD, 0, &in); epoll_ctl(both, EPOLL_CTL_ADD, events[0], &event);
        for (;;) {
            int k = epoll_wait(both, some, 2, 300);
            if (k <= 0) done(0, k ? "epoll_wait" : "epoll_wait ended early");
            for (int i = 0; i < k; i++) {
                if (some[i].data.fd == 0) done(1, "");
                if (read(events[0], big, sizeof big) < 1) done(0, "read");
            }
        }
    }
    long begin = now_us();
    if (is("epoll")) r = epoll_wait(poller, &ev, 1, 300);
    if (is("epoll_pwait2")) r = syscall(SYS_epoll_pwait2, poller, &ev, 1, &limit, NULL, 8);
    if (is("pselect")) r = syscall(SYS_pselect6, 0, NULL, NULL, NULL, &limit, NULL);
    if (is("ppoll")) r = syscall(SYS_ppoll, NULL, 0, &limit, NULL, 8);
    error = EAGAIN;
    if (r == -2) {
        wanted = -1;
        struct sembuf down = {0, -1, 0};
        if (is("semtimedop")) { r = semtimedop(semaphores, &down, 1, &limit); error = errno; semctl(semaphores, 0, IPC_RMID); errno = error; error = EAGAIN; }
        if (is("sigtimedwait")) r = sigtimedwait(&set, NULL, &limit);
        if (is("recv")) r = recv(pair[0], &byte, 1, 0);
        if (is("read")) r = read(pair[0], &byte, 1);
        if (is("send")) r = send(pair[0], big, 1, 0);
        if (is("accept")) r = accept(listener, NULL, NULL);
        if (is("connect")) r = connect(client, (void *)&name, len);
    }
    if (r != wanted || (r < 0 && errno != error)) done(0, "result");
    done(now_us() - begin >= 300000, "early");
}
