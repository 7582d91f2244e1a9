// Memory of many kinds, in a known state. memory KIND[,KIND...]: reads one byte to begin, prints "ready". Then a letter a line:
// 'm' changes everything, 'c' says "ok" if all is as at the beginning, 's' if nothing of the engine's shows, 'q' ends.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <stddef.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, N_THREADS = 6 };
static const char *kinds;
static volatile sig_atomic_t n_children;
static volatile int turn, n_waiting;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t turned = PTHREAD_COND_INITIALIZER;
static __thread uint64_t mine;
static volatile uint64_t sums[N_THREADS], locals[N_THREADS];
static char *heap, *huge, *locked, *guard, *unforked, *wiped, *shared, *moved, *gone, *file, *lazy, *named, *hole;
static size_t big = 200 << 20;
static char *rebuilt, *fresh, *breakpoint;
static char data[3 * PAGE] = {1}, zero[5 * PAGE];

static int has(const char *kind) {
    const char *at = strstr(kinds, kind);
    size_t n = strlen(kind);
    return at && (at == kinds || at[-1] == ',') && (at[n] == 0 || at[n] == ',');
}
static void say(const char *word, const char *what) {
    if (what) printf("%s %s: %s\n", word, what, strerror(errno)); else printf("%s\n", word);
    fflush(stdout);
}
static void die(const char *what) { say("bad", what); _exit(1); }
static char *map(size_t size, int flags) {
    char *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_ANONYMOUS | flags, -1, 0);
    if (at == MAP_FAILED) die("mmap");
    return at;
}
static void fill(char *at, size_t size, uint64_t seed) {
    for (size_t i = 0; i < size; i += 8) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        memcpy(at + i, &seed, 8);
    }
}
static int holds(const char *at, size_t size, uint64_t seed) {
    for (size_t i = 0; i < size; i += 8) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        if (memcmp(at + i, &seed, 8)) return 0;
    }
    return 1;
}
static int is_zero(const char *at, size_t size) {
    for (size_t i = 0; i < size; i++) if (at[i]) return 0;
    return 1;
}
static void on_child(int signal) { (void)signal; n_children++; }
static int flagged(const char *at, const char *flag) {
    char line[512], want[40];
    int found = 0, result = 0;
    FILE *smaps = fopen("/proc/self/smaps", "r");
    snprintf(want, sizeof want, "%lx-", (unsigned long)at);
    while (fgets(line, sizeof line, smaps)) {
        if (!strncmp(line, want, strlen(want))) found = 1;
        if (found && !strncmp(line, "VmFlags:", 8)) { result = strstr(line, flag) != NULL; break; }
    }
    fclose(smaps);
    return result;
}
static void *work(void *number) {
    long n = (long)number;
    uint64_t local = 1000 + n;
    mine = 77 * n;
    for (int seen = 0;;) {
        pthread_mutex_lock(&lock);
        n_waiting++;
        while (turn == seen) pthread_cond_wait(&turned, &lock);
        n_waiting--;
        seen = turn;
        pthread_mutex_unlock(&lock);
        mine += 1;
        local = local * 31 + mine;
        sums[n] = mine;
        locals[n] = local;
    }
    return NULL;
}
static volatile int n_short;
static void *nap(void *nothing) {
    for (;;) {
        struct timespec begin, end, time = {0, 30000000};
        clock_gettime(CLOCK_MONOTONIC, &begin);
        int slept = nanosleep(&time, NULL);
        clock_gettime(CLOCK_MONOTONIC, &end);
        long ns = (end.tv_sec - begin.tv_sec) * 1000000000 + end.tv_nsec - begin.tv_nsec;
        if (slept || ns < 30000000) n_short++;
    }
    return nothing;
}
// Refuses what making a template needs.
static void filter(void) {
    static const int refused[] = {SYS_clone3, SYS_socketpair, SYS_recvmsg, SYS_setsid, SYS_close_range, SYS_madvise};
    struct sock_filter code[20] = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr))};
    int n = 1;
    for (unsigned i = 0; i < sizeof refused / sizeof *refused; i++) {
        code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, refused[i], 0, 1);
        code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS);
    }
    code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog program = {n, code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program)) die("seccomp");
}
static int just_wait(void *nothing) { for (;;) pause(); return nothing == NULL; }
// The child goes on; the parent, a subreaper, must see nothing but its end.
static void found(void) {
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    pid_t child = fork();
    if (child == 0) { prctl(PR_SET_CHILD_SUBREAPER, 0); return; }
    int status = 1, reaper = 0;
    pid_t seen = waitpid(-1, &status, __WALL);
    if (seen != child || status) { say("bad", "another child"); _exit(1); }
    prctl(PR_GET_CHILD_SUBREAPER, &reaper);
    if (waitpid(-1, NULL, __WALL) != -1 || !reaper || n_children != 1) { say("bad", "family"); _exit(1); }
    say("end", NULL);
    _exit(0);
}
static void take_turn(void) {
    pthread_mutex_lock(&lock);
    turn++;
    pthread_cond_broadcast(&turned);
    pthread_mutex_unlock(&lock);
}
// A stack deep down, written and left again.
static __attribute__((noinline)) int dig(int depth) {
    volatile char frame[64 * 1024];
    memset((char *)frame, depth, sizeof frame);
    int below = depth ? dig(depth - 1) : 0;
    return below + frame[depth];
}

static void begin(void) {
    if (has("heap")) { heap = malloc(3 << 20); fill(heap, 3 << 20, 1); fill(data, sizeof data, 2); }
    if (has("huge")) {
        huge = map(6 << 20, MAP_PRIVATE);
        huge = (char *)(((uintptr_t)huge + (2 << 20) - 1) & ~(uintptr_t)((2 << 20) - 1));
        if (madvise(huge, 4 << 20, MADV_HUGEPAGE)) die("madvise");
        fill(huge, 4 << 20, 3);
    }
    if (has("locked")) { locked = map(8 * PAGE, MAP_PRIVATE); if (mlock(locked, 8 * PAGE)) die("mlock"); fill(locked, 8 * PAGE, 4); }
    if (has("guard")) { guard = map(6 * PAGE, MAP_PRIVATE); fill(guard, 6 * PAGE, 5); mprotect(guard, 3 * PAGE, PROT_NONE); mprotect(guard + 3 * PAGE, PAGE, PROT_READ); }
    if (has("unforked")) { unforked = map(8 * PAGE, MAP_PRIVATE); fill(unforked, 8 * PAGE, 6); madvise(unforked, 8 * PAGE, MADV_DONTFORK); }
    if (has("wiped")) { wiped = map(8 * PAGE, MAP_PRIVATE); fill(wiped, 8 * PAGE, 7); madvise(wiped, 8 * PAGE, MADV_WIPEONFORK); }
    if (has("both")) { unforked = map(8 * PAGE, MAP_PRIVATE); fill(unforked, 8 * PAGE, 6); madvise(unforked, 8 * PAGE, MADV_DONTFORK); madvise(unforked, 8 * PAGE, MADV_WIPEONFORK); }
    // As many pieces as the memory of a big JavaScript program has.
    if (has("patchy")) { unforked = map(800 * PAGE, MAP_PRIVATE); fill(unforked, 800 * PAGE, 6); for (int n = 0; n < 800; n += 2) madvise(unforked + n * PAGE, PAGE, MADV_DONTFORK); }
    if (has("shared")) { shared = map(8 * PAGE, MAP_SHARED); fill(shared, 8 * PAGE, 8); }
    if (has("moved")) {
        moved = map(16 * PAGE, MAP_PRIVATE);
        mprotect(moved + 8 * PAGE, 8 * PAGE, PROT_NONE);
        fill(moved, 8 * PAGE, 9);
    }
    if (has("gone")) { gone = map(32 * PAGE, MAP_PRIVATE); fill(gone, 32 * PAGE, 10); }
    if (has("rebuilt")) { rebuilt = map(32 * PAGE, MAP_PRIVATE); fill(rebuilt, 32 * PAGE, 17); }
    if (has("file")) {
        int f = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
        file = mmap(NULL, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, f, 0);
        if (file == MAP_FAILED) die("mmap of a file");
        close(f);
        fill(file + PAGE, PAGE, 11);
    }
    if (has("lazy")) { lazy = map(64 * PAGE, MAP_PRIVATE); fill(lazy + 8 * PAGE, PAGE, 12); }
    if (has("hole")) { hole = map(16 * PAGE, MAP_PRIVATE); fill(hole, 16 * PAGE, 13); madvise(hole + 4 * PAGE, 4 * PAGE, MADV_DONTNEED); }
    if (has("named")) { named = map(4 * PAGE, MAP_PRIVATE); fill(named, 4 * PAGE, 14); prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, named, 4 * PAGE, "a name"); }
    if (has("brk")) { breakpoint = sbrk(16 * PAGE); fill(breakpoint, 16 * PAGE, 15); breakpoint = sbrk(0); }
    if (has("big")) {
        if (getenv("BIG_MB")) big = (size_t)atoi(getenv("BIG_MB")) << 20;
        heap = map(big + (2 << 20), MAP_PRIVATE);
        heap = (char *)(((uintptr_t)heap + (2 << 20) - 1) & ~(uintptr_t)((2 << 20) - 1));
        if (getenv("BIG_HUGE")) madvise(heap, big, MADV_HUGEPAGE);
        fill(heap, big, 1);
    }
    if (has("threads")) {
        for (long n = 0; n < N_THREADS; n++) {
            pthread_t thread;
            if (pthread_create(&thread, NULL, work, (void *)n)) die("pthread_create");
        }
        while (n_waiting < N_THREADS) usleep(1000);
    }
    if (has("reaper")) prctl(PR_SET_CHILD_SUBREAPER, 1);
    if (has("naps")) { pthread_t thread; if (pthread_create(&thread, NULL, nap, NULL)) die("pthread_create"); }
    if (has("filtered")) filter();
    if (has("cloned")) { char *stack = map(16 * PAGE, MAP_PRIVATE); if (clone(just_wait, stack + 16 * PAGE, CLONE_VM | SIGCHLD, NULL) < 0) die("clone"); }
    if (has("family")) found();
}

static void change(void) {
    if (has("heap")) { memset(heap, 1, 1 << 20); heap = realloc(heap, 9 << 20); memset(heap, 2, 9 << 20); memset(data, 3, sizeof data); memset(zero, 4, sizeof zero); }
    if (has("huge")) { memset(huge + (1 << 20), 5, 7 * PAGE); madvise(huge + (2 << 20), 1 << 20, MADV_DONTNEED); madvise(huge, 4 << 20, MADV_NOHUGEPAGE); }
    if (has("locked")) { memset(locked, 1, PAGE); munlock(locked, 8 * PAGE); }
    if (has("guard")) { mprotect(guard, 6 * PAGE, PROT_READ | PROT_WRITE); memset(guard, 1, 6 * PAGE); mprotect(guard + 5 * PAGE, PAGE, PROT_NONE); }
    if (has("unforked") || has("both")) { memset(unforked, 1, PAGE); madvise(unforked, 4 * PAGE, MADV_DOFORK); }
    if (has("patchy")) { memset(unforked, 1, 20 * PAGE); madvise(unforked, 400 * PAGE, MADV_DOFORK); }
    if (has("wiped")) { memset(wiped, 1, PAGE); madvise(wiped, 4 * PAGE, MADV_KEEPONFORK); }
    if (has("moved")) {
        char *other = mremap(moved, 8 * PAGE, 12 * PAGE, MREMAP_MAYMOVE);
        if (other == MAP_FAILED || other == moved) die("mremap");
        memset(other, 1, 12 * PAGE);
    }
    if (has("gone")) { memset(gone, 1, PAGE); munmap(gone + 4 * PAGE, 20 * PAGE); fresh = map(7 * PAGE, MAP_PRIVATE); memset(fresh, 9, 7 * PAGE); }
    if (has("rebuilt")) {
        munmap(rebuilt, 32 * PAGE);
        if (mmap(rebuilt, 8 * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED) die("mmap");
        if (mmap(rebuilt + 16 * PAGE, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED) die("mmap");
        memset(rebuilt + 16 * PAGE, 3, PAGE);
    }
    if (has("file")) { memset(file, 1, 3 * PAGE); munmap(file + PAGE, PAGE); }
    if (has("lazy")) memset(lazy, 1, 64 * PAGE);
    if (has("hole")) { memset(hole + 4 * PAGE, 1, 4 * PAGE); madvise(hole + 8 * PAGE, 4 * PAGE, MADV_DONTNEED); }
    if (has("named")) memset(named, 1, PAGE);
    if (has("brk")) { memset(sbrk(64 * PAGE), 1, 64 * PAGE); }
    if (has("shrunk")) { sbrk(-8 * PAGE); }
    if (has("stack") && dig(40) < 0) die("dig");
    if (has("big")) for (size_t at = 0; at < big; at += 100 * PAGE) memset(heap + at, 1, 1);
    if (has("threads")) { take_turn(); usleep(20000); take_turn(); }
    if (has("more")) { pthread_t thread; pthread_create(&thread, NULL, work, (void *)0); }
}

static const char *compare(void) {
    if (has("heap") && !(holds(heap, 3 << 20, 1) && holds(data, sizeof data, 2) && is_zero(zero, sizeof zero))) return "heap";
    if (has("heap")) { char *more = malloc(1 << 16); heap = realloc(heap, 4 << 20); if (!more || !holds(heap, 3 << 20, 1)) return "malloc"; free(more); }
    if (has("huge") && !(holds(huge, 4 << 20, 3) && flagged(huge, " hg"))) return "huge";
    if (has("locked") && !(holds(locked, 8 * PAGE, 4) && flagged(locked, " lo"))) return "locked";
    if (has("guard")) {
        char byte, *at[] = {guard, guard + 2 * PAGE};
        int pipes[2];
        if (pipe(pipes)) return "pipe";
        for (int i = 0; i < 2; i++) if (write(pipes[1], at[i], 1) != -1 || errno != EFAULT) return "guard is open";
        if (write(pipes[1], "x", 1) != 1 || read(pipes[0], guard + 3 * PAGE, 1) != -1 || errno != EFAULT || read(pipes[0], &byte, 1) != 1) return "guard is writable";
        close(pipes[0]); close(pipes[1]);
        mprotect(guard, 6 * PAGE, PROT_READ | PROT_WRITE);
        if (!holds(guard, 6 * PAGE, 5)) return "guard";
        mprotect(guard, 3 * PAGE, PROT_NONE); mprotect(guard + 3 * PAGE, PAGE, PROT_READ);
    }
    if (has("unforked") && !(holds(unforked, 8 * PAGE, 6) && flagged(unforked, " dc"))) return "unforked";
    if (has("patchy") && !(holds(unforked, 800 * PAGE, 6) && flagged(unforked, " dc") && flagged(unforked + 600 * PAGE, " dc"))) return "patchy";
    if (has("both") && !(holds(unforked, 8 * PAGE, 6) && flagged(unforked, " dc") && flagged(unforked, " wf"))) return "both";
    if (has("wiped") && !(holds(wiped, 8 * PAGE, 7) && flagged(wiped, " wf"))) return "wiped";
    if (has("shared") && !holds(shared, 8 * PAGE, 8)) return "shared";
    if (has("moved") && !holds(moved, 8 * PAGE, 9)) return "moved";
    if (has("moved")) {
        // The program's own mremap wants one whole mapping.
        char *other = mremap(moved, 8 * PAGE, 64 * PAGE, MREMAP_MAYMOVE);
        if (other == MAP_FAILED || !holds(other, 8 * PAGE, 9)) return "mremap";
        if (mremap(other, 64 * PAGE, 8 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, moved) != moved) return "mremap back";
    }
    if (has("gone") && !(holds(gone, 32 * PAGE, 10) && fresh == NULL)) return "gone";
    if (has("rebuilt")) {
        if (!holds(rebuilt, 32 * PAGE, 17)) return "rebuilt";
        char *other = mremap(rebuilt, 32 * PAGE, 64 * PAGE, MREMAP_MAYMOVE);
        if (other == MAP_FAILED || mremap(other, 64 * PAGE, 32 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, rebuilt) != rebuilt) return "mremap of rebuilt";
    }
    if (has("file") && !(holds(file + PAGE, PAGE, 11) && !memcmp(file, "\177ELF", 4))) return "file";
    if (has("lazy") && !(holds(lazy + 8 * PAGE, PAGE, 12) && is_zero(lazy, 8 * PAGE) && is_zero(lazy + 9 * PAGE, 55 * PAGE))) return "lazy";
    if (has("hole") && !(holds(hole, 4 * PAGE, 13) && is_zero(hole + 4 * PAGE, 4 * PAGE))) return "hole";
    if (has("named") && !holds(named, 4 * PAGE, 14)) return "named";
    if (has("brk")) {
        if (!(sbrk(0) == breakpoint && holds(breakpoint - 16 * PAGE, 16 * PAGE, 15))) return "brk";
        if (sbrk(PAGE) != breakpoint || sbrk(-PAGE) != breakpoint + PAGE) return "sbrk";
    }
    if (has("big") && !holds(heap, big, 1)) return "big";
    if (has("threads")) {
        if (turn != 0) return "turn";
        take_turn();
        // Each thread has its own registers and its own memory again.
        for (int patience = 0; patience < 2000; patience++) {
            int n_right = 0;
            for (uint64_t n = 0; n < N_THREADS; n++) n_right += sums[n] == 77 * n + 1 && locals[n] == (1000 + n) * 31 + 77 * n + 1;
            if (n_right == N_THREADS) return NULL;
            usleep(1000);
        }
        return "threads";
    }
    return NULL;
}

static const char *look(void) {
    if (n_children) return "SIGCHLD";
    if (n_short) return "a short sleep";
    if (has("filtered")) {
        int pair[2];
        if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) != -1 || errno != ENOSYS) return "unfiltered";
    }
    if (waitpid(-1, NULL, WNOHANG | __WALL) != -1 || errno != ECHILD) return "a child";
    for (int fd = 3; fd < 64; fd++) if (fcntl(fd, F_GETFD) != -1) return "a descriptor";
    int reaper = 0;
    prctl(PR_GET_CHILD_SUBREAPER, &reaper);
    if (reaper != has("reaper")) return "subreaper";
    return NULL;
}

int main(int argc, char **argv) {
    kinds = argc > 1 ? argv[1] : "";
    // The C library's own heap does not grow later.
    static char buffer[BUFSIZ];
    setvbuf(stdout, buffer, _IOFBF, sizeof buffer);
    free(malloc(1 << 16));
    for (int fd = 3; fd < 64; fd++) close(fd);
    signal(SIGCHLD, on_child);
    const char *limit = getenv("LIMIT_PROCESSES");
    if (limit) {
        struct rlimit r = {atoi(limit), atoi(limit)};
        if (setrlimit(RLIMIT_NPROC, &r)) die("setrlimit");
    }
    const char *files = getenv("LIMIT_FILES");
    if (files) { struct rlimit r = {atoi(files), atoi(files)}; if (setrlimit(RLIMIT_NOFILE, &r)) die("setrlimit"); }
    char letter;
    if (read(0, &letter, 1) != 1) return 1;
    begin();
    const char *user = getenv("USER_NUMBER");
    if (user && setresuid(atoi(user), atoi(user), atoi(user))) die("setresuid");
    say("ready", NULL);
    while (read(0, &letter, 1) == 1) {
        const char *wrong = NULL;
        if (letter == 'm') change();
        else if (letter == 'c') wrong = compare();
        else if (letter == 's') wrong = look();
        else break;
        if (wrong) say("bad", wrong); else say("ok", NULL);
    }
    return 0;
}
