// One call that waits, disturbed by the engine, then its event: "ok" if it saw the event and nothing else.
// waits MODE: reads one byte to begin, prints "ready", reads one byte as the event.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <pty.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <stddef.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

static const char *mode;
static pthread_t waiter;
static int pair[2], listener, port, child_pid, semaphores, master, slave, counter, queue, file;
static char path[] = "/tmp/deltabox-waits-XXXXXX";
static volatile sig_atomic_t n_handled;
static volatile int flag, over;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
static sem_t semaphore;

static int is(const char *name) { return strcmp(mode, name) == 0; }
static void done(int good, const char *what) {
    if (good) printf("ok\n"); else printf("bad: %s %s: %s\n", mode, what, strerror(errno));
    fflush(stdout);
    _exit(!good);
}
static void handle(int signal) { (void)signal; n_handled++; }
static struct timespec now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t; }
static struct timespec later(struct timespec t, long ms) {
    t.tv_nsec += ms % 1000 * 1000000; t.tv_sec += ms / 1000 + t.tv_nsec / 1000000000; t.tv_nsec %= 1000000000; return t;
}
static int before(struct timespec a, struct timespec b) {
    return a.tv_sec < b.tv_sec || (a.tv_sec == b.tv_sec && a.tv_nsec < b.tv_nsec);
}

static void event(void) {
    struct sembuf up = {0, 1, 0};
    if (is("cond") || is("mutex")) {
        if (is("cond")) pthread_mutex_lock(&lock);
        flag = 1;
        pthread_cond_signal(&condition);
        pthread_mutex_unlock(&lock);
    } else if (is("sem")) sem_post(&semaphore);
    else if (is("semop")) semop(semaphores, &up, 1);
    else if (is("pause") || is("sigsuspend") || is("sigwait")) pthread_kill(waiter, SIGUSR1);
    else if (is("wait4")) kill(child_pid, SIGKILL);
    else if (is("tty-raw")) { if (write(master, "x\n", 2) != 2) done(0, "write to the terminal"); }
    else if (is("eventfd")) { if (eventfd_write(counter, 3)) done(0, "eventfd"); }
    else if (is("msgrcv")) { long m[2] = {7, 0}; if (msgsnd(queue, m, 1, 0)) done(0, "msgsnd"); }
    else if (is("flock") || is("fcntl")) close(file);  // of this descriptor table: that lets the lock go
    else if (is("fifo")) { if (open(path, O_WRONLY) < 0) done(0, "open for writing"); }
    else if (is("full")) { static char all[1 << 17]; if (read(pair[0], all, sizeof all) <= 0) done(0, "drain"); }
    else if (is("accept")) {
        struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = port, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        connect(socket(AF_INET, SOCK_STREAM, 0), (void *)&a, sizeof a);
    } else if (write(pair[1], "x", 1) != 1) done(0, "write");
}

static void *listen_for_event(void *nothing) {
    (void)nothing;
    if (is("mutex")) pthread_mutex_lock(&lock);
    flag = 2;
    char byte;
    if (read(0, &byte, 1) != 1) done(0, "read of the event");
    event();
    return NULL;
}

static void *churn_threads(void *nothing);
static void *one_thread(void *nothing) { return nothing; }
static void *churn_threads(void *nothing) {
    while (!over) { pthread_t t; if (pthread_create(&t, NULL, one_thread, NULL) == 0) pthread_join(t, NULL); }
    return nothing;
}
static void *churn_forks(void *nothing) {
    while (!over) { pid_t p = fork(); if (p == 0) _exit(7); int s; if (waitpid(p, &s, 0) != p || s != 7 << 8) done(0, "waitpid"); }
    return nothing;
}
static void *wait_for_all(void *nothing) {
    pthread_mutex_lock(&lock);
    while (!over) pthread_cond_wait(&condition, &lock);
    pthread_mutex_unlock(&lock);
    return nothing;
}

static void many(void *(*body)(void *), int n) {
    pthread_t threads[64];
    for (int i = 0; i < n; i++) if (pthread_create(&threads[i], NULL, body, NULL)) done(0, "pthread_create");
    printf("ready\n"); fflush(stdout);
    char byte;
    if (read(0, &byte, 1) != 1) done(0, "read");
    pthread_mutex_lock(&lock); over = 1; pthread_cond_broadcast(&condition); pthread_mutex_unlock(&lock);
    for (int i = 0; i < n; i++) pthread_join(threads[i], NULL);
    done(1, "");
}

static void deny_mmap(void) {
    struct sock_filter f[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mmap, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EACCES),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
    struct sock_fprog p = {4, f};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &p)) done(0, "filter");
}
static int mmap_denied(void) { return mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED && errno == EACCES; }

int main(int n, char **args) {
    char byte;
    pthread_t thread;
    mode = n > 1 ? args[1] : "read";
    setvbuf(stdout, malloc(4096), _IOFBF, 4096);
    if (read(0, &byte, 1) != 1) return 2;
    if (is("threads")) many(churn_threads, 4);
    if (is("forks")) many(churn_forks, 3);
    if (is("idle32")) many(wait_for_all, 31);
    if (is("idle4")) many(wait_for_all, 3);
    struct sigaction action = {.sa_handler = handle};
    sigset_t set; sigemptyset(&set); sigaddset(&set, SIGUSR1);
    if (is("count")) {  // counts SIGRTMIN until the event, then tells
        action.sa_flags = SA_RESTART;
        sigaction(SIGRTMIN, &action, NULL);
        printf("ready\n"); fflush(stdout);
        while (read(0, &byte, 1) != 1) {}
        printf("%d\n", (int)n_handled); fflush(stdout);
        return 0;
    }
    if (is("traced")) {
        pid_t p = fork();
        if (p == 0) { ptrace(PTRACE_TRACEME, 0, 0, 0); raise(SIGSTOP); _exit(9); }
        int s;
        waitpid(p, &s, 0);
        printf("ready\n"); fflush(stdout);
        if (read(0, &byte, 1) != 1) done(0, "read");
        ptrace(PTRACE_CONT, p, 0, 0);
        done(waitpid(p, &s, 0) == p && WIFEXITED(s) && WEXITSTATUS(s) == 9, "traced child");
    }
    if (is("vfork")) {
        printf("ready\n"); fflush(stdout);
        pid_t p = vfork();
        if (p == 0) { if (read(0, &byte, 1) != 1) _exit(3); execl("/bin/true", "true", NULL); _exit(4); }
        int s;
        done(p > 0 && waitpid(p, &s, 0) == p && s == 0, "vfork child");
    }
    if (is("naps")) {  // endless: every call's outcome is checked
        printf("ready\n"); fflush(stdout);
        if (pipe(pair)) done(0, "pipe");
        for (;;) {
            struct timespec t0 = now(), nap = {0, 1500000};
            if (nanosleep(&nap, NULL)) done(0, "nanosleep");
            if (before(now(), later(t0, 1))) done(0, "early nanosleep");
            struct pollfd p[2] = {{.fd = 0, .events = POLLIN}, {.fd = pair[0], .events = POLLIN}};
            int r = poll(p, 2, 2);
            if (r < 0) done(0, "poll");
            if (r > 0) done(1, "");
            sigset_t old; sigprocmask(SIG_SETMASK, NULL, &old);
            for (int i = 1; i < 32; i++) if (sigismember(&old, i)) done(0, "signal mask");
        }
    }
    if (is("late-leader")) {  // the leader ends, a thread stays
        extern void *second(void *);
        waiter = pthread_self();
        pthread_create(&thread, NULL, second, NULL);
        pthread_exit(NULL);
    }

    waiter = pthread_self();
    struct timespec t0 = now(), nap = {0, 900000000}, until = later(t0, 900);
    struct epoll_event ev = {.events = EPOLLIN};
    int status, poller = epoll_create1(0);
    sem_init(&semaphore, 0, 0);
    semaphores = is("semop") ? semget(IPC_PRIVATE, 1, 0600) : 0;
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair)) done(0, "socketpair");
    epoll_ctl(poller, EPOLL_CTL_ADD, pair[0], &ev);
    if (is("pause") || is("sigsuspend")) sigaction(SIGUSR1, &action, NULL);
    if (is("sigsuspend") || is("sigwait")) sigprocmask(SIG_BLOCK, &set, NULL);
    if (is("accept")) {
        struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        socklen_t len = sizeof a;
        listener = socket(AF_INET, SOCK_STREAM, 0);
        if (bind(listener, (void *)&a, len) || listen(listener, 1) || getsockname(listener, (void *)&a, &len)) done(0, "listen");
        port = a.sin_port;
    }
    if (is("wait4") && (child_pid = fork()) == 0) for (;;) pause();
    if (is("tty-raw")) {
        struct termios t;
        if (openpty(&master, &slave, NULL, NULL, NULL) || tcgetattr(slave, &t)) done(0, "openpty");
        cfmakeraw(&t);
        t.c_cc[VMIN] = 0;
        t.c_cc[VTIME] = 250;
        if (tcsetattr(slave, TCSANOW, &t)) done(0, "tcsetattr");
    }
    if (is("eventfd")) counter = eventfd(0, 0);
    if (is("msgrcv")) queue = msgget(IPC_PRIVATE, 0600);
    if (is("flock")) { file = mkstemp(path); if (flock(file, LOCK_EX)) done(0, "flock"); }
    if (is("fcntl")) {
        struct flock all = {.l_type = F_WRLCK};
        file = mkstemp(path);
        if (fcntl(file, F_OFD_SETLK, &all)) done(0, "lock");
    }
    if (is("fifo")) { close(mkstemp(path)); unlink(path); if (mkfifo(path, 0600)) done(0, "mkfifo"); }
    if (is("full")) {
        if (pipe(pair)) done(0, "pipe");
        fcntl(pair[1], F_SETFL, O_NONBLOCK);
        while (write(pair[1], path, sizeof path) > 0) {}
        while (write(pair[1], path, 1) > 0) {}
        fcntl(pair[1], F_SETFL, 0);
    }
    pthread_create(&thread, NULL, listen_for_event, NULL);
    while (!flag) {}
    if (is("filtered")) deny_mmap();  // of this thread only: the other needed a stack
    printf("ready\n"); fflush(stdout);

    if (is("read") || is("filtered")) done(read(pair[0], &byte, 1) == 1 && (is("read") || mmap_denied()), "read");
    if (is("recv")) done(recv(pair[0], &byte, 1, 0) == 1, "recv");
    if (is("recv-timeout")) {
        struct timeval limit = {60, 0};
        setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
        done(recv(pair[0], &byte, 1, 0) == 1, "recv with a timeout");
    }
    if (is("poll")) { struct pollfd p = {.fd = pair[0], .events = POLLIN}; done(poll(&p, 1, 60000) == 1, "poll"); }
    if (is("select")) { fd_set s; FD_ZERO(&s); FD_SET(pair[0], &s); done(select(pair[0] + 1, &s, NULL, NULL, NULL) == 1, "select"); }
    if (is("epoll")) done(epoll_wait(poller, &ev, 1, 60000) == 1, "epoll_wait");
    if (is("cond")) { pthread_mutex_lock(&lock); while (flag != 1) pthread_cond_wait(&condition, &lock); done(1, ""); }
    if (is("mutex")) { done(pthread_mutex_lock(&lock) == 0 && flag == 1, "mutex"); }
    if (is("sem")) { struct timespec limit; clock_gettime(CLOCK_REALTIME, &limit); limit.tv_sec += 60; done(sem_timedwait(&semaphore, &limit) == 0, "sem_timedwait"); }
    if (is("semop")) { struct sembuf down = {0, -1, 0}; int r = semop(semaphores, &down, 1); semctl(semaphores, 0, IPC_RMID); done(r == 0, "semop"); }
    if (is("pause")) { pause(); done(n_handled == 1, "pause"); }
    if (is("sigsuspend")) { sigset_t none; sigemptyset(&none); sigsuspend(&none); done(n_handled == 1, "sigsuspend"); }
    if (is("sigwait")) { siginfo_t info; done(sigwaitinfo(&set, &info) == SIGUSR1, "sigwaitinfo"); }
    if (is("accept")) done(accept(listener, NULL, NULL) >= 0, "accept");
    if (is("tty-raw")) done(read(slave, &byte, 1) == 1 && byte == 'x', "read of a terminal");
    if (is("eventfd")) { eventfd_t v; done(eventfd_read(counter, &v) == 0 && v == 3, "eventfd"); }
    if (is("msgrcv")) { long m[2]; int r = msgrcv(queue, m, 8, 7, 0); msgctl(queue, IPC_RMID, NULL); done(r == 1, "msgrcv"); }
    if (is("flock") || is("fcntl")) {
        struct flock all = {.l_type = F_WRLCK};
        int other = open(path, O_RDWR);
        unlink(path);
        done((is("flock") ? flock(other, LOCK_EX) : fcntl(other, F_OFD_SETLKW, &all)) == 0, "wait for a lock");
    }
    if (is("fifo")) { int r = open(path, O_RDONLY); unlink(path); done(r >= 0, "open of a FIFO"); }
    if (is("full")) done(write(pair[1], "x", 1) == 1, "write to a full pipe");
    if (is("wait4")) done(waitpid(child_pid, &status, 0) == child_pid, "wait4");
    if (is("nanosleep")) done(nanosleep(&nap, NULL) == 0 && !before(now(), until), "nanosleep");
    if (is("clock")) done(clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == 0 && !before(now(), until), "clock_nanosleep");
    done(0, "unknown mode");
}

void *second(void *nothing) {
    char byte;
    pthread_join(waiter, NULL);
    printf("ready\n"); fflush(stdout);
    done(read(0, &byte, 1) == 1, "read by a thread without leader");
    return nothing;
}
