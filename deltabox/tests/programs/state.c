// What a process is apart from memory and descriptors, in a known state. state KIND[,KIND...]: reads one byte to begin,
// prints "ready". Then letters: 'm' changes everything, 'c' says "ok" if all is as at the beginning, 'q' ends.
// SANDBOX=1: as in a sandbox.
#define _GNU_SOURCE
#include "sandbox.h"
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { N_THREADS = 3 };
static const char *kinds;
static pthread_t threads[N_THREADS];
static pthread_barrier_t together;
static const char *wrong;
static char letter;
static char stacks[2 * N_THREADS][16384];

static int has(const char *kind) {
    const char *at = strstr(kinds, kind);
    size_t n = strlen(kind);
    return at && (at == kinds || at[-1] == ',') && (at[n] == 0 || at[n] == ',');
}
static void first(int s) { (void)s; }
static void second(int s, siginfo_t *i, void *c) { (void)s; (void)i; (void)c; }
static sigset_t waiting(void) {
    sigset_t s; sigemptyset(&s); sigaddset(&s, SIGUSR1); sigaddset(&s, SIGUSR2); sigaddset(&s, SIGTERM); sigaddset(&s, SIGRTMIN + 3);
    return s;
}

// What each thread has.
static void begin_thread(int k) {
    if (has("stacks")) { stack_t s = {.ss_sp = stacks[k], .ss_size = sizeof stacks[k]}; if (sigaltstack(&s, NULL)) die("sigaltstack"); }
    if (has("pending")) pthread_kill(pthread_self(), k == 1 ? SIGUSR1 : SIGUSR2);
}
static void change_thread(int k) {
    if (has("stacks")) { stack_t s = {.ss_sp = stacks[N_THREADS + k], .ss_size = sizeof stacks[k], .ss_flags = k == 1 ? SS_DISABLE : 0}; if (sigaltstack(&s, NULL)) die("sigaltstack"); }
    if (has("pending")) {
        sigset_t s = waiting();
        struct timespec none = {0, 0};
        sigtimedwait(&s, NULL, &none);
        if (k == 2) pthread_kill(pthread_self(), SIGTERM);
    }
}
static const char *compare_thread(int k) {
    if (has("stacks")) {
        stack_t s;
        if (sigaltstack(NULL, &s)) return "sigaltstack";
        if (s.ss_sp != stacks[k] || s.ss_size != sizeof stacks[k] || s.ss_flags != 0) return "stack";
    }
    if (has("pending")) {
        sigset_t s;
        sigpending(&s);
        int own = k == 1 ? SIGUSR1 : SIGUSR2, other = k == 1 ? SIGUSR2 : SIGUSR1;
        if (!sigismember(&s, own) || sigismember(&s, other)) return "waiting signals of a thread";
        if (sigismember(&s, SIGTERM) != 1) return "a waiting signal of the process";
    }
    return NULL;
}

static void *work(void *number) {
    int k = (int)(intptr_t)number;
    begin_thread(k);
    for (;;) {
        pthread_barrier_wait(&together);
        pthread_barrier_wait(&together);
        if (letter == 'm') change_thread(k);
        const char *found = letter == 'c' ? compare_thread(k) : NULL;
        if (found) wrong = found;
        pthread_barrier_wait(&together);
    }
}

static struct itimerval timer(long s, long us) {
    struct itimerval t = {.it_value = {s, us}, .it_interval = {s + 1, 0}};
    return t;
}
static void begin(void) {
    sigset_t s = waiting();
    if (has("pending")) {
        pthread_sigmask(SIG_BLOCK, &s, NULL);
        union sigval one = {.sival_int = 111}, two = {.sival_int = 222};
        if (sigqueue(getpid(), SIGRTMIN + 3, one) || sigqueue(getpid(), SIGRTMIN + 3, two)) die("sigqueue");
        kill(getpid(), SIGTERM);
    }
    if (has("actions")) {
        signal(SIGUSR1, first);
        signal(SIGWINCH, first);
        struct sigaction a = {.sa_sigaction = second, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART};
        sigaddset(&a.sa_mask, SIGHUP);
        sigaction(SIGRTMIN + 9, &a, NULL);
        signal(SIGPIPE, SIG_IGN);
    }
    if (has("timers")) {
        struct itimerval real = timer(1000, 0), virtual = timer(2000, 0), profile = timer(3000, 0);
        if (setitimer(ITIMER_REAL, &real, NULL) || setitimer(ITIMER_VIRTUAL, &virtual, NULL) || setitimer(ITIMER_PROF, &profile, NULL)) die("setitimer");
    }
}
static void change(void) {
    if (has("pending")) {
        sigset_t s = waiting();
        struct timespec none = {0, 0};
        while (sigtimedwait(&s, NULL, &none) > 0) {}
        union sigval three = {.sival_int = 333};
        sigqueue(getpid(), SIGRTMIN + 3, three);
        kill(getpid(), SIGUSR1);
    }
    if (has("actions")) {
        signal(SIGUSR1, SIG_DFL);
        signal(SIGWINCH, SIG_IGN);
        struct sigaction a = {.sa_handler = first};
        sigaction(SIGRTMIN + 9, &a, NULL);
        signal(SIGPIPE, SIG_DFL);
        signal(SIGHUP, first);
    }
    if (has("timers")) {
        struct itimerval none = {0}, other = timer(7, 0);
        setitimer(ITIMER_REAL, &none, NULL);
        setitimer(ITIMER_VIRTUAL, &other, NULL);
    }
}
static const char *compare(void) {
    if (has("pending")) {
        sigset_t s, real;
        sigpending(&s);
        if (sigismember(&s, SIGUSR1) || !sigismember(&s, SIGTERM)) return "waiting signals";
        siginfo_t info;
        struct timespec none = {0, 0};
        sigemptyset(&real);
        sigaddset(&real, SIGRTMIN + 3);
        for (int value = 111; value <= 222; value += 111) {
            if (sigtimedwait(&real, &info, &none) != SIGRTMIN + 3) return "a queued signal";
            if (info.si_value.sival_int != value || info.si_code != SI_QUEUE || info.si_pid != getpid()) return "what a queued signal says";
        }
        if (sigtimedwait(&real, &info, &none) != -1) return "one too many";
        // As it was.
        union sigval one = {.sival_int = 111}, two = {.sival_int = 222};
        if (sigqueue(getpid(), SIGRTMIN + 3, one) || sigqueue(getpid(), SIGRTMIN + 3, two)) die("sigqueue");
    }
    if (has("actions")) {
        struct sigaction a;
        sigaction(SIGUSR1, NULL, &a);
        if (a.sa_handler != first) return "SIGUSR1";
        sigaction(SIGWINCH, NULL, &a);
        if (a.sa_handler != first) return "SIGWINCH";
        sigaction(SIGRTMIN + 9, NULL, &a);
        if (a.sa_sigaction != second || (a.sa_flags & ~0x04000000) != (SA_SIGINFO | SA_ONSTACK | SA_RESTART) || !sigismember(&a.sa_mask, SIGHUP)) return "a real-time signal";
        sigaction(SIGPIPE, NULL, &a);
        if (a.sa_handler != SIG_IGN) return "SIGPIPE";
        sigaction(SIGHUP, NULL, &a);
        if (a.sa_handler != SIG_DFL) return "SIGHUP";
    }
    if (has("timers")) {
        struct itimerval real, virtual, profile;
        getitimer(ITIMER_REAL, &real);
        getitimer(ITIMER_VIRTUAL, &virtual);
        getitimer(ITIMER_PROF, &profile);
        if (real.it_value.tv_sec < 900 || real.it_value.tv_sec > 1000 || real.it_interval.tv_sec != 1001) return "ITIMER_REAL";
        if (virtual.it_value.tv_sec < 1900 || virtual.it_interval.tv_sec != 2001) return "ITIMER_VIRTUAL";
        if (profile.it_value.tv_sec < 2900 || profile.it_interval.tv_sec != 3001) return "ITIMER_PROF";
    }
    return NULL;
}

int main(int argc, char **argv) {
    kinds = argc > 1 ? argv[1] : "";
    if (read(0, &letter, 1) != 1) return 1;
    if (getenv("SANDBOX")) enter_sandbox();
    pthread_barrier_init(&together, NULL, N_THREADS);
    begin();
    for (int k = 1; k < N_THREADS; k++) if (pthread_create(&threads[k], NULL, work, (void *)(intptr_t)k)) die("pthread_create");
    begin_thread(0);
    pthread_barrier_wait(&together);
    say("ready", NULL);
    while (read(0, &letter, 1) == 1 && letter != 'q') {
        if (letter == 'm') change();
        wrong = letter == 'c' ? compare() : NULL;
        pthread_barrier_wait(&together);
        if (letter == 'm') change_thread(0);
        const char *found = letter == 'c' ? compare_thread(0) : NULL;
        pthread_barrier_wait(&together);
        if (found) wrong = found;
        if (wrong) say("bad", wrong); else say("ok", NULL);
        pthread_barrier_wait(&together);
    }
    return 0;
}
