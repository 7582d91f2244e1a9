// Descriptors without files, in a known state, each under a number of its own. objects MODE: reads one byte to begin, prints
// "ready". Then letters: 'c' says "ok" if all is as at the beginning and uses it up, 'm' changes everything, 'p' prints
// PIDs, 'w' how often the session was told of its window, 'q' ends. Modes: all; terminal (a master here, a session with a job at the slave); session (a child that has
// neither session nor terminal).
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum { R = 100, W, EV, TI, SG, EP, IN, PS, PE, WO, RO, AR, AW, MASTER = 200, SLAVE };

static void say(const char *word, const char *what) {
    if (what) printf("%s %s: %s\n", word, what, strerror(errno)); else printf("%s\n", word);
    fflush(stdout);
}
static void die(const char *what) { say("bad", what); _exit(1); }
static void put(int fd, int number) { if (fd < 0 || dup2(fd, number) < 0) die("put"); close(fd); }
static void pipe_at(int r, int w, int flags) { int p[2]; if (pipe2(p, flags)) die("pipe"); put(p[0], r); put(p[1], w); }
static void add(int ep, int fd, uint32_t events, uint64_t data) {
    struct epoll_event e = {.events = events, .data.u64 = data};
    if (epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e)) die("epoll_ctl");
}
static int ready(int ep, uint64_t data, int ms) {
    struct epoll_event e[8];
    int n = epoll_wait(ep, e, 8, ms);
    for (int i = 0; i < n; i++) if (e[i].data.u64 == data) return 1;
    return 0;
}
static int send_nothing(int pidfd) { return (int)syscall(SYS_pidfd_send_signal, pidfd, 0, NULL, 0); }

static void begin(void) {
    signal(SIGPIPE, SIG_IGN);
    pipe_at(R, W, O_NONBLOCK);
    fcntl(R, F_SETPIPE_SZ, 1 << 17);
    if (write(W, "hello pipe", 10) != 10) die("write");
    put(eventfd(5, 0), EV);
    struct itimerspec t = {.it_value.tv_sec = 1000, .it_interval.tv_sec = 3};
    put(timerfd_create(CLOCK_MONOTONIC, 0), TI);
    timerfd_settime(TI, 0, &t, NULL);
    sigset_t s;
    sigemptyset(&s); sigaddset(&s, SIGUSR1); sigaddset(&s, SIGRTMIN + 2);
    sigprocmask(SIG_BLOCK, &s, NULL);
    sigdelset(&s, SIGRTMIN + 2);
    put(signalfd(-1, &s, SFD_NONBLOCK), SG);
    put(epoll_create1(0), EP);
    put(epoll_create1(0), IN);
    add(IN, TI, EPOLLIN, 31);
    add(EP, R, EPOLLIN, 21);
    add(EP, EV, EPOLLIN | EPOLLET, 22);
    add(EP, SG, EPOLLIN, 23);
    add(EP, IN, EPOLLIN, 24);
    put((int)syscall(SYS_pidfd_open, getpid(), 0), PS);
    pid_t ended = fork();
    if (ended == 0) _exit(0);
    put((int)syscall(SYS_pidfd_open, ended, 0), PE);
    waitpid(ended, NULL, 0);
    int p[2];
    if (pipe(p)) die("pipe");
    close(p[0]); put(p[1], WO);
    if (pipe(p) || write(p[1], "eof", 3) != 3) die("pipe");
    close(p[1]); put(p[0], RO);
    pipe_at(AR, AW, 0);
    struct f_owner_ex owner = {F_OWNER_PID, getpid()};
    if (fcntl(AR, F_SETOWN_EX, &owner) || fcntl(AR, F_SETSIG, SIGRTMIN + 2) || fcntl(AR, F_SETFL, O_ASYNC)) die("owner");
}

static void change(void) {
    char b[100];
    uint64_t n = 77;
    while (read(R, b, sizeof b) > 0) {}
    if (write(W, "garbage", 7) != 7) die("write");
    fcntl(R, F_SETPIPE_SZ, 4096);
    fcntl(R, F_SETFL, 0);
    if (write(EV, &n, 8) != 8) die("write");
    struct itimerspec none = {0};
    timerfd_settime(TI, 0, &none, NULL);
    epoll_ctl(EP, EPOLL_CTL_DEL, R, NULL);
    epoll_ctl(IN, EPOLL_CTL_DEL, TI, NULL);
    add(EP, W, EPOLLOUT, 99);
    close(PS); close(PE); close(SG);
    put(open("/dev/null", O_RDWR), WO);
    put(open("/dev/null", O_RDWR), RO);
    fcntl(AR, F_SETFL, 0);
    fcntl(AR, F_SETOWN, 1);
}

static const char *compare(void) {
    char b[100] = "";
    uint64_t n = 0;
    struct epoll_event e[8];
    errno = 0;
    int got = epoll_wait(EP, e, 8, 0), seen = 0;
    for (int i = 0; i < got; i++) seen |= 1 << (e[i].data.u64 - 20);
    if (got != 2 || seen != (1 << 1 | 1 << 2)) return "what is ready";
    if (ready(EP, 22, 0)) return "an edge twice";
    if (fcntl(R, F_GETPIPE_SZ) != 1 << 17 || !(fcntl(R, F_GETFL) & O_NONBLOCK)) return "size or flags of a pipe";
    if (read(R, b, sizeof b) != 10 || memcmp(b, "hello pipe", 10) || read(R, b, 1) != -1) return "a pipe";
    if (write(W, "x", 1) != 1 || !ready(EP, 21, 0) || read(R, b, 1) != 1) return "a pipe once more";
    if (read(EV, &n, 8) != 8 || n != 5) return "an eventfd";
    struct itimerspec t;
    if (timerfd_gettime(TI, &t) || t.it_value.tv_sec < 900 || t.it_value.tv_sec > 1000 || t.it_interval.tv_sec != 3) return "a timer";
    kill(getpid(), SIGUSR1);
    if (!ready(EP, 23, 1000)) return "a signal in epoll";
    struct signalfd_siginfo si;
    if (read(SG, &si, sizeof si) != sizeof si || si.ssi_signo != SIGUSR1) return "a signalfd";
    memset(&t, 0, sizeof t);
    t.it_value.tv_nsec = 1;
    timerfd_settime(TI, 0, &t, NULL);
    if (!ready(EP, 24, 2000) || !ready(IN, 31, 2000)) return "a timer in a nested epoll";
    int targets[] = {R, EV, SG, IN};
    for (int i = 0; i < 4; i++) {
        struct epoll_event m = {.events = EPOLLIN, .data.u64 = 1};
        if (epoll_ctl(EP, EPOLL_CTL_MOD, targets[i], &m)) return "a target's number";
    }
    if (send_nothing(PS)) return "a pidfd";
    struct pollfd pe = {PE, POLLIN, 0};
    if (send_nothing(PE) == 0 || errno != ESRCH || poll(&pe, 1, 0) != 1) return "a pidfd of what has ended";
    if (write(WO, "x", 1) != -1 || errno != EPIPE) return "a pipe without readers";
    if (read(RO, b, 100) != 3 || memcmp(b, "eof", 3) || read(RO, b, 1) != 0) return "a pipe without writers";
    struct f_owner_ex owner;
    if (fcntl(AR, F_GETOWN_EX, &owner) || owner.type != F_OWNER_PID || owner.pid != getpid()) return "an owner";
    if (write(AW, "x", 1) != 1) return "a pipe with an owner";
    sigset_t s;
    siginfo_t info;
    struct timespec wait = {1, 0};
    sigemptyset(&s); sigaddset(&s, SIGRTMIN + 2);
    if (sigtimedwait(&s, &info, &wait) != SIGRTMIN + 2 || info.si_fd != AR) return "the signal of an owner";
    if (read(AR, b, 1) != 1) return "what an owner was told of";
    return NULL;
}

// The other end of a conversation in letters.
static int talk;
static pid_t child, job;
static char ask(char letter) {
    char answer = 0;
    if (write(talk, &letter, 1) != 1 || read(talk, &answer, 1) != 1) die("ask");
    return answer;
}
static void open_terminal(void) {
    put(posix_openpt(O_RDWR | O_NOCTTY), MASTER);
    if (grantpt(MASTER) || unlockpt(MASTER)) die("unlockpt");
    put(ioctl(MASTER, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_NONBLOCK), SLAVE);
}
static void drain(int fd) {
    char b[1000];
    struct pollfd p = {fd, POLLIN, 0};
    while (poll(&p, 1, 0) == 1 && p.revents & POLLIN && read(fd, b, sizeof b) > 0) {}
}

static volatile sig_atomic_t n_windows;
static void count(int s) { (void)s; n_windows++; }
static char in_session(char letter) {
    char b[100];
    if (letter == 'w') return (char)('0' + n_windows);
    if (letter == 'm') {
        // Others than those in the foreground may not read.
        if (tcsetpgrp(SLAVE, getpid())) return 'b';
        drain(SLAVE);
        struct termios t;
        tcgetattr(SLAVE, &t);
        t.c_lflag &= ~(tcflag_t)(ICANON | ECHO);
        tcsetattr(SLAVE, TCSANOW, &t);
        return 'o';
    }
    if (letter == '1') {
        if (tcgetpgrp(SLAVE) != job || tcgetsid(SLAVE) != getpid()) return 'g';
        struct termios t;
        tcgetattr(SLAVE, &t);
        if (!(t.c_lflag & ICANON) || !(t.c_lflag & ECHO)) return 't';
        if (tcsetpgrp(SLAVE, getpid()) || read(SLAVE, b, 100) != 6 || memcmp(b, "typed\n", 6)) return 'l';
        return read(SLAVE, b, 100) == -1 && errno == EAGAIN ? 'o' : 'r';
    }
    return read(SLAVE, b, 100) == 6 && !memcmp(b, "party\n", 6) ? 'o' : 'p';
}
static void serve_session(void) {
    char letter;
    struct sigaction a = {.sa_handler = count, .sa_flags = SA_RESTART};
    sigaction(SIGWINCH, &a, NULL);
    signal(SIGTTOU, SIG_IGN);
    setsid();
    if (ioctl(SLAVE, TIOCSCTTY, 0)) _exit(1);
    job = fork();
    if (job == 0) { setpgid(0, 0); for (;;) pause(); }
    setpgid(job, job);
    if (tcsetpgrp(SLAVE, job)) _exit(2);
    if (write(talk, &job, sizeof job) != sizeof job) _exit(3);
    while (read(talk, &letter, 1) == 1) {
        char answer = in_session(letter);
        if (write(talk, &answer, 1) != 1) break;
    }
    kill(job, SIGKILL);
    _exit(0);
}
static void begin_terminal(void) {
    int pair[2];
    open_terminal();
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair)) die("socketpair");
    child = fork();
    talk = pair[child == 0];
    close(pair[child != 0]);
    if (child == 0) { close(MASTER); serve_session(); }
    close(SLAVE);
    if (read(talk, &job, sizeof job) != sizeof job) die("a session");
    if (write(MASTER, "typed\npart", 10) != 10) die("write");
}
static const char *compare_terminal(void) {
    static char what[20] = "a terminal, ";
    char b[100];
    struct pollfd p = {MASTER, POLLIN, 0};
    if (poll(&p, 1, 1000) != 1 || read(MASTER, b, 100) != 11 || memcmp(b, "typed\r\npart", 11)) return "the echo";
    if ((what[12] = ask('1')) != 'o') return what;
    if (write(MASTER, "y\n", 2) != 2) return "write";
    p.fd = MASTER;
    if (poll(&p, 1, 1000) != 1) return "an echo";
    if ((what[12] = ask('2')) != 'o') return what;
    return NULL;
}
static void change_terminal(void) {
    char b[100];
    if (write(MASTER, "dangerous\nmore", 14) != 14) die("write");
    struct pollfd p = {MASTER, POLLIN, 0};
    poll(&p, 1, 1000);
    if (read(MASTER, b, 100) < 1 || ask('m') != 'o') die("change");
}

// Without a session, with the terminal at hand.
static void serve_lonely(void) {
    char letter;
    while (read(talk, &letter, 1) == 1) {
        int fd = open("/dev/tty", O_RDWR);
        char answer = fd >= 0 && tcgetsid(SLAVE) == getpid() && getsid(0) == getpid() ? 'o' : 'n';
        close(fd);
        if (write(talk, &answer, 1) != 1) break;
    }
    _exit(0);
}
static void begin_session(void) {
    int pair[2];
    open_terminal();
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair)) die("socketpair");
    child = fork();
    talk = pair[child == 0];
    close(pair[child != 0]);
    if (child == 0) serve_lonely();
}

int main(int argc, char **argv) {
    const char *mode = argc > 1 ? argv[1] : "";
    char letter;
    if (read(0, &letter, 1) != 1) return 1;
    int terminal = !strcmp(mode, "terminal"), session = !strcmp(mode, "session");
    if (terminal) begin_terminal(); else if (session) begin_session(); else begin();
    say("ready", NULL);
    while (read(0, &letter, 1) == 1 && letter != 'q') {
        const char *wrong = NULL;
        if (letter == 'p') { printf("%d %d\n", child, job); fflush(stdout); continue; }
        if (letter == 'w') { printf("%c\n", ask('w')); fflush(stdout); continue; }
        if (letter == 'm') { if (terminal) change_terminal(); else change(); }
        if (letter == 'c') wrong = terminal ? compare_terminal() : session ? (ask('c') == 'o' ? NULL : "a session") : compare();
        if (wrong) say("bad", wrong); else say("ok", NULL);
    }
    if (child > 0) { close(talk); waitpid(child, NULL, 0); }
    return 0;
}
