// A parent of one. Reads one byte to begin; if CHILD is set, starts that shell command as a child that speaks on the abstract
// socket NAME; prints "ready". Then letters: 'm' counts up, 'c' says the count, 'w' waits for a child and says its number and
// status, 'l' says how many SIGCHLD came and what a look for a child finds, 'p' says who it is, 'x' exits with 7.
// FILL_MB: so much memory more. LEADS=1: the child leads a session, GROUP=1: a group. The child's own CHILD is CHILD2.
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

static volatile int n_signals;
static char big[3 << 20];
static void on_child(int signal) { (void)signal; n_signals++; }

static void begin_child(const char *command) {
    struct sockaddr_un address = {AF_UNIX, ""};
    const char *name = getenv("NAME"), *next = getenv("CHILD2");
    if (getenv("LEADS") && setsid() < 0) _exit(101);
    if (getenv("GROUP") && setpgid(0, 0)) _exit(102);
    strcpy(address.sun_path + 1, name);
    int s = socket(AF_UNIX, SOCK_STREAM, 0);
    if (connect(s, (void *)&address, offsetof(struct sockaddr_un, sun_path) + 1 + strlen(name))) _exit(103);
    dup2(s, 0);
    dup2(s, 1);
    if (s > 1) close(s);
    if (next) setenv("CHILD", next, 1); else unsetenv("CHILD");
    unsetenv("CHILD2");
    signal(SIGCHLD, SIG_DFL);
    execl("/bin/sh", "sh", "-c", command, NULL);
    _exit(104);
}

int main(void) {
    char letter;
    int count = 0, status = 0;
    const char *command = getenv("CHILD");
    struct sigaction action = {.sa_handler = on_child, .sa_flags = SA_RESTART};
    sigaction(SIGCHLD, &action, NULL);
    memset(big, 7, sizeof big);
    if (getenv("FILL_MB")) { size_t size = (size_t)atoi(getenv("FILL_MB")) << 20; memset(malloc(size + 1), 5, size); }
    if (read(0, &letter, 1) != 1) return 1;
    if (command && fork() == 0) begin_child(command);
    dprintf(1, "ready\n");
    while (read(0, &letter, 1) == 1) {
        if (letter == 'm') { big[count]++; dprintf(1, "%d\n", ++count); }
        else if (letter == 'c') dprintf(1, "%d\n", count);
        else if (letter == 'w') { int pid = waitpid(-1, &status, __WALL); dprintf(1, "%d %d\n", pid, status); }
        else if (letter == 'l') { int pid = waitpid(-1, &status, __WALL | WNOHANG); dprintf(1, "%d %d\n", n_signals, pid < 0 ? -errno : pid); }
        else if (letter == 'p') dprintf(1, "%d %d %d %d\n", getpid(), getppid(), getpgrp(), getsid(0));
        else if (letter == 'x') return 7;
    }
    return 1;
}
