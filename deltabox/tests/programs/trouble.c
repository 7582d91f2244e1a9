// Programs that are hard to stop. trouble MODE: reads one byte to begin, prints "ready", reads one byte as the event,
// says "ok" if nothing unexpected happened.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *mode;
static int is(const char *name) { return strcmp(mode, name) == 0; }
static void done(int good, const char *what) {
    if (good) printf("ok\n"); else printf("bad: %s %s: %s\n", mode, what, strerror(errno));
    fflush(stdout);
    _exit(!good);
}
static void ready(void) { printf("ready\n"); fflush(stdout); }
static int over(void) { struct pollfd p = {.fd = 0, .events = POLLIN}; return poll(&p, 1, 0) == 1; }

static void *exec_again(void *path) {
    char *args[] = {path, "exec-thread", "again", NULL};
    execv(path, args);
    done(0, "execv");
    return NULL;
}
static void *just_wait(void *nothing) { for (;;) pause(); return nothing; }

// Only what is watched may end this wait.
static void *wait_for_event(void *nothing) {
    struct epoll_event e = {.events = EPOLLIN};
    int poller = epoll_create1(0);
    epoll_ctl(poller, EPOLL_CTL_ADD, 0, &e);
    if (epoll_wait(poller, &e, 1, -1) != 1) done(0, "epoll_wait");
    return nothing;
}

static volatile int over_gate;
// Tells its number, lets the leader go on when it is traced: it asks its own status.
static void *tell_and_wait(void *gate) {
    pid_t tid = gettid();
    if (write(*(int *)gate, &tid, sizeof tid) != sizeof tid) done(0, "tell");
    for (;;) {
        char line[128];
        FILE *status = fopen("/proc/thread-self/status", "r");
        int tracer = 0;
        while (fgets(line, sizeof line, status)) if (sscanf(line, "TracerPid: %d", &tracer) == 1) break;
        fclose(status);
        if (tracer) break;
    }
    over_gate = 1;
    for (;;) pause();
}

static void unmap_vdso(void) {
    char line[256];
    unsigned long from, to;
    FILE *maps = fopen("/proc/self/maps", "r");
    while (fgets(line, sizeof line, maps))
        if (strstr(line, "[vdso]") && sscanf(line, "%lx-%lx", &from, &to) == 2) { munmap((void *)from, to - from); return; }
    done(0, "find the vdso");
}

// A session of its own on a new terminal: the leader sleeps in it, a child reads from it.
static void terminal(int background) {
    int gate[2], master = posix_openpt(O_RDWR | O_NOCTTY), status;
    char byte, name[64];
    if (pipe(gate) || grantpt(master) || unlockpt(master) || ptsname_r(master, name, sizeof name)) done(0, "terminal");
    pid_t leader = fork();
    if (leader == 0) {
        setsid();
        int tty = open(name, O_RDWR);
        signal(SIGTTOU, SIG_IGN);
        pid_t reader = fork();
        if (reader == 0) {
            setpgid(0, 0);
            char text[16];
            if (!background) tcsetpgrp(tty, getpgrp());
            if (write(gate[1], "r", 1) != 1) _exit(2);
            _exit(read(tty, text, sizeof text) == 3 && memcmp(text, "hi\n", 3) == 0 ? 0 : 3);
        }
        setpgid(reader, reader);
        if (background) {
            if (waitpid(reader, &status, WUNTRACED) != reader || !WIFSTOPPED(status)) _exit(4);
            if (write(gate[1], "s", 1) != 1) _exit(2);
            if (read(0, &byte, 1) != 1) _exit(5);
            tcsetpgrp(tty, reader);
            kill(-reader, SIGCONT);
        }
        _exit(waitpid(reader, &status, 0) == reader && status == 0 ? 0 : 6);
    }
    for (int i = 0; i < (background ? 2 : 1); i++) if (read(gate[0], &byte, 1) != 1) done(0, "gate");
    ready();
    if (!background && read(0, &byte, 1) != 1) done(0, "event");
    if (write(master, "hi\n", 3) != 3) done(0, "write");
    done(waitpid(leader, &status, 0) == leader && status == 0, "reader");
}

int main(int n, char **args) {
    char byte;
    int status;
    pthread_t thread;
    mode = n > 1 ? args[1] : "spawn";
    if (n > 2) {  // executed by a thread of itself
        if (over()) done(1, "");
        pthread_create(&thread, NULL, just_wait, NULL);
        pthread_create(&thread, NULL, exec_again, "/proc/self/exe");
        for (;;) pause();
    }
    if (read(0, &byte, 1) != 1) return 2;
    if (is("exec-thread")) { ready(); exec_again("/proc/self/exe"); }
    if (is("spawn")) {
        char *arguments[] = {"true", NULL};
        ready();
        while (!over()) {
            pid_t p;
            if (posix_spawn(&p, "/bin/true", NULL, NULL, arguments, NULL)) done(0, "posix_spawn");
            if (waitpid(p, &status, 0) != p || status) done(0, "waitpid");
        }
        done(1, "");
    }
    if (is("tty")) terminal(0);
    if (is("tty-background")) terminal(1);
    if (is("no-vdso")) { unmap_vdso(); ready(); done(read(0, &byte, 1) == 1, "read"); }
    if (is("traced-epoll")) {
        pid_t p = fork();
        if (p == 0) { ptrace(PTRACE_TRACEME, 0, 0, 0); raise(SIGSTOP); _exit(9); }
        waitpid(p, &status, 0);
        ready();
        wait_for_event(NULL);
        ptrace(PTRACE_CONT, p, 0, 0);
        done(waitpid(p, &status, 0) == p && WIFEXITED(status) && WEXITSTATUS(status) == 9, "traced child");
    }
    if (is("vfork-epoll")) {
        pthread_create(&thread, NULL, wait_for_event, NULL);
        ready();
        if (vfork() == 0) { struct pollfd p = {.fd = 0, .events = POLLIN}; while (poll(&p, 1, -1) != 1) {} _exit(0); }
        pthread_join(thread, NULL);
        done(1, "");
    }
    if (is("exec-held")) {  // an exec that waits for a thread which the parent traces and does not reap
        int gate[2];
        if (pipe(gate)) done(0, "pipe");
        pid_t p = fork();
        if (p == 0) {
            pthread_create(&thread, NULL, tell_and_wait, &gate[1]);
            for (;;) if (over_gate) { usleep(10000); execl("/bin/true", "true", NULL); }
        }
        pid_t tid;
        if (read(gate[0], &tid, sizeof tid) != sizeof tid || ptrace(PTRACE_SEIZE, tid, 0, 0)) done(0, "seize");
        siginfo_t info;
        if (waitid(P_PID, tid, &info, WEXITED | WNOWAIT | __WALL)) done(0, "waitid");
        printf("ready\n"); fflush(stdout);
        if (read(0, &byte, 1) != 1) done(0, "read");
        if (waitpid(tid, &status, __WALL) != tid) done(0, "reap");
        done(waitpid(p, &status, 0) == p && status == 0, "executed child");
    }
    if (is("pair")) {  // a child that is killed by whoever likes to, and a parent that sees how it ended
        pid_t p = fork();
        if (p == 0) for (;;) pause();
        printf("ready\n%d\n", p); fflush(stdout);
        if (read(0, &byte, 1) != 1) done(0, "read");
        done(waitpid(p, &status, 0) == p && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "killed child");
    }
    if (strncmp(mode, "write:", 6) == 0) {
        ready();
        int fd = open(mode + 6, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
        if (fd < 0 || write(fd, "x", 1) != 1) done(0, "write");
        done(1, "");
    }
    done(0, "unknown mode");
}
