// A program as in a sandbox: in a user and a PID namespace of its own, as PID 2, with a filter, without CAP_SYS_NICE and
// CAP_SYS_RESOURCE. It speaks by lines: a word, and what is wrong.
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static void say(const char *word, const char *what) {
    if (what) printf("%s %s: %s\n", word, what, strerror(errno)); else printf("%s\n", word);
    fflush(stdout);
}
static void die(const char *what) { say("dead", what); _exit(1); }
#define MUST(call) do { if ((call) < 0) die(#call); } while (0)

struct sets { uint64_t effective, permitted, inheritable; };
static struct sets get_sets(void) {
    uint32_t header[2] = {0x20080522, 0}, d[6];
    MUST(syscall(SYS_capget, header, d));
    return (struct sets){d[0] | (uint64_t)d[3] << 32, d[1] | (uint64_t)d[4] << 32, d[2] | (uint64_t)d[5] << 32};
}
static void set_sets(struct sets s) {
    uint32_t header[2] = {0x20080522, 0};
    uint32_t d[6] = {s.effective, s.permitted, s.inheritable, s.effective >> 32, s.permitted >> 32, s.inheritable >> 32};
    MUST(syscall(SYS_capset, header, d));
}
static void filter(void) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_keyctl, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {4, code};
    MUST(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program));
}
static void put(const char *path, const char *text) {
    int fd = open(path, O_WRONLY);
    if (fd < 0 || write(fd, text, strlen(text)) < 0) die(path);
    close(fd);
}
// Becomes a process of a sandbox; what made it relays its end.
static void enter_sandbox(void) {
    int go[2];
    MUST(pipe(go));
    pid_t init = syscall(SYS_clone, CLONE_NEWUSER | CLONE_NEWPID | SIGCHLD, 0, 0, 0, 0);
    MUST(init);
    if (init > 0) {
        char path[64];
        snprintf(path, sizeof path, "/proc/%d/uid_map", init);
        put(path, "0 100000 65536");
        snprintf(path, sizeof path, "/proc/%d/gid_map", init);
        put(path, "0 100000 65536");
        MUST(write(go[1], "x", 1));
        close(go[1]);
        close(0);
        close(1);
        waitpid(init, NULL, 0);
        _exit(0);
    }
    char byte;
    close(go[1]);
    MUST(read(go[0], &byte, 1));
    close(go[0]);
    MUST(setgroups(0, NULL));
    MUST(setresgid(0, 0, 0));
    MUST(setresuid(0, 0, 0));
    MUST(prctl(PR_SET_DUMPABLE, 1));
    MUST(setsid());
    filter();
    uint64_t kept = get_sets().permitted & ~(1ull << 23 | 1ull << 24);
    MUST(prctl(PR_CAPBSET_DROP, 23));
    MUST(prctl(PR_CAPBSET_DROP, 24));
    set_sets((struct sets){kept, kept, 0});
    pid_t body = fork();
    MUST(body);
    if (body == 0) return;
    close(0);
    close(1);
    for (;;) if (wait(NULL) < 0 && errno == ECHILD) _exit(0);
}
