// Who a process is, in a known state. person KIND[,KIND...]: reads one byte to begin, prints "ready". Then letters: 'm'
// changes everything, 'c' says "ok" if all is as at the beginning, 'f' goes on in a fork with the same PID, 'r' and a
// number of four bytes changes something, 'q' ends.
// All by raw calls: each thread has its own of what the library would make the same for all.
// SANDBOX=1: as in a sandbox. BARE=1: at the beginning it is nothing of what it should be.
#define _GNU_SOURCE
#include "sandbox.h"
#include <linux/sched.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/personality.h>
#include <sys/resource.h>
#include <sys/stat.h>

enum { MAX_THREADS = 3, MANY = 20 };
static int n_threads = MAX_THREADS;
static const char *kinds;
static pthread_t threads[MAX_THREADS];
static pthread_barrier_t together;
static const char *wrong;
static char letter;
static int nice_then;
static pid_t group_then, session_then, member;

static int read_all(void *to, size_t n) {
    for (size_t got = 0; got < n;) {
        ssize_t now = read(0, (char *)to + got, n - got);
        if (now <= 0) return -1;
        got += now;
    }
    return 0;
}
static int has_now(const char *kind) {
    size_t n = strlen(kind);
    for (const char *at = kinds; (at = strstr(at, kind)); at += n)
        if ((at == kinds || at[-1] == ',') && (at[n] == 0 || at[n] == ',')) return 1;
    return 0;
}
static int bare;
static int has(const char *kind) { return !bare && has_now(kind); }
static uint64_t ambient(void) {
    uint64_t found = 0;
    for (int cap = 0; cap < 41; cap++) found |= (uint64_t)(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, cap, 0, 0) == 1) << cap;
    return found;
}
static int score(void) {
    char text[32] = {0};
    int fd = open("/proc/self/oom_score_adj", O_RDONLY);
    if (fd < 0 || read(fd, text, sizeof text - 1) < 0) die("oom_score_adj");
    close(fd);
    return atoi(text);
}
struct attributes { uint32_t size, policy; uint64_t flags; int32_t nice; uint32_t priority; uint64_t runtime, deadline, period; };
static void schedule(int policy, int nice, int slack, int io, int all) {
    struct attributes a = {.size = sizeof a, .policy = policy, .nice = nice};
    MUST(syscall(SYS_sched_setattr, 0, &a, 0));
    MUST(prctl(PR_SET_TIMERSLACK, slack));
    MUST(syscall(SYS_ioprio_set, 1, 0, io));
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(0, &set);
    if (all) CPU_SET(1, &set);
    MUST(sched_setaffinity(0, sizeof set, &set));
}
static const char *compare_schedule(int policy, int nice, int slack, int io, int all) {
    struct attributes a = {0};
    MUST(syscall(SYS_sched_getattr, 0, &a, 48, 0));
    if ((int)a.policy != policy) return "policy";
    if (a.nice != nice) return "nice";
    if (prctl(PR_GET_TIMERSLACK) != slack) return "timer slack";
    if (syscall(SYS_ioprio_get, 1, 0) != io) return "priority of input and output";
    cpu_set_t set;
    MUST(sched_getaffinity(0, sizeof set, &set));
    if (!CPU_ISSET(0, &set) || !!CPU_ISSET(1, &set) != all) return "affinity";
    return NULL;
}
// Changed to what it cannot take back itself: nice values that are higher, SCHED_IDLE.
static int policies[MAX_THREADS] = {SCHED_OTHER, SCHED_BATCH, SCHED_OTHER};
static int other_policies[MAX_THREADS] = {SCHED_BATCH, SCHED_OTHER, SCHED_IDLE};
// Of each thread: CHOWN, DAC_OVERRIDE, NET_BIND_SERVICE.
static int own_cap[MAX_THREADS] = {0, 1, 10};
static struct sets sets_then[MAX_THREADS];
static uint64_t ambient_then[MAX_THREADS];

static const char *compare_ids(const uid_t *users, const gid_t *groups, int fs) {
    uid_t u[3];
    gid_t g[3];
    MUST(syscall(SYS_getresuid, u, u + 1, u + 2));
    MUST(syscall(SYS_getresgid, g, g + 1, g + 2));
    if (memcmp(u, users, sizeof u)) return "users";
    if (memcmp(g, groups, sizeof g)) return "groups";
    if ((int)syscall(SYS_setfsuid, -1) != fs) return "the user of files";
    if ((int)syscall(SYS_setfsgid, -1) != (int)groups[1]) return "the group of files";
    return NULL;
}

// What each thread has.
static void begin_thread(int k) {
    if (has("ids")) {
        gid_t some[] = {7, 8, 90 + k};
        MUST(syscall(SYS_setgroups, 3, some));
        MUST(syscall(SYS_setresgid, 10 + k, 11, 12));
        MUST(syscall(SYS_setresuid, 0, 0, 1000 + k));
        syscall(SYS_setfsuid, 1234);
    }
    if (has("user")) {
        MUST(syscall(SYS_setgroups, 0, NULL));
        MUST(syscall(SYS_setresgid, 1000, 1001, 1002));
        MUST(syscall(SYS_setresuid, 1000, 1001, 1002));
    }
    if (has("caps")) {
        uint64_t own = 1ull << own_cap[k], permitted = get_sets().permitted;
        set_sets((struct sets){permitted, permitted, own | 1 << 5});
        MUST(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, own_cap[k], 0, 0));
        // No fixups for users, and that for good in the last.
        MUST(prctl(PR_SET_SECUREBITS, k == 2 ? 0x0c : k == 1 ? 0x41 : 0));
        set_sets((struct sets){own | 1 << 7, permitted, own | 1 << 5});
    }
    if (has("schedule")) schedule(policies[k], nice_then + 1 + k, 70000 + k, 2 << 13 | k, k != 1);
    if (has("habits")) {
        char name[16];
        snprintf(name, sizeof name, "a\n\\ %d)", k);
        MUST(prctl(PR_SET_NAME, name));
        MUST(personality(k ? ADDR_NO_RANDOMIZE : 0));
        // One has a umask of its own.
        if (k == 1) { MUST(unshare(CLONE_FS)); umask(026); }
    }
    // Last: all of the above forgets it.
    if (has("habits") || has("ids")) MUST(prctl(PR_SET_PDEATHSIG, k == 1 ? 0 : SIGWINCH));
    sets_then[k] = get_sets();
    ambient_then[k] = ambient();
}
static void change_thread(int k) {
    if (has("habits")) {
        if (k == 1) umask(011);
        char name[16];
        snprintf(name, sizeof name, "other %d", k);
        MUST(prctl(PR_SET_NAME, name));
        MUST(personality(k ? 0 : ADDR_NO_RANDOMIZE));
        MUST(prctl(PR_SET_PDEATHSIG, k == 1 ? SIGURG : 0));
    }
    if (has("schedule")) schedule(other_policies[k], nice_then + 5 + k, 60000, 3 << 13, k == 1);
    if (has("caps")) {
        // As far as the locks go.
        uint64_t permitted = get_sets().permitted;
        set_sets((struct sets){permitted, permitted, 0});
        MUST(prctl(PR_SET_SECUREBITS, k == 2 ? 0x1c : k == 1 ? 0x10 : 0x45));
        set_sets((struct sets){0, permitted, 0});
    }
    if (has("ids")) {
        syscall(SYS_setfsuid, 0);
        gid_t one[] = {1};
        MUST(syscall(SYS_setgroups, 1, one));
        MUST(syscall(SYS_setresgid, 5, 6, 7));
        MUST(syscall(SYS_setresuid, 0, 1000 + k, 0));
    }
    if (has("user")) {
        MUST(syscall(SYS_setresgid, 1002, 1000, 1001));
        MUST(syscall(SYS_setresuid, 1001, 1002, 1000));
    }
}
static const char *compare_thread(int k) {
    const char *found = NULL;
    if (has("ids")) {
        found = compare_ids((uid_t[]){0, 0, 1000 + k}, (gid_t[]){10 + k, 11, 12}, 1234);
        gid_t some[9];
        if (syscall(SYS_getgroups, 9, some) != 3 || some[0] != 7 || some[1] != 8 || some[2] != (gid_t)(90 + k)) found = "supplementary groups";
    }
    if (has("user")) found = compare_ids((uid_t[]){1000, 1001, 1002}, (gid_t[]){1000, 1001, 1002}, 1001);
    if (found) return found;
    if (has("caps") && prctl(PR_GET_SECUREBITS) != (k == 2 ? 0x0c : k == 1 ? 0x41 : 0)) return "securebits";
    if (has("schedule") && (found = compare_schedule(policies[k], nice_then + 1 + k, 70000 + k, 2 << 13 | k, k != 1))) return found;
    if (has("habits")) {
        char name[16], is[16];
        snprintf(name, sizeof name, "a\n\\ %d)", k);
        MUST(prctl(PR_GET_NAME, is));
        if (strcmp(name, is)) return "name";
        if (k == 1) {
            mode_t is = umask(0);
            umask(is);
            if (is != 026) return "umask of a thread";
        }
        if ((personality(0xffffffff) & ADDR_NO_RANDOMIZE) != (k ? ADDR_NO_RANDOMIZE : 0)) return "personality";
    }
    int signal;
    MUST(prctl(PR_GET_PDEATHSIG, &signal));
    if ((has("habits") || has("ids")) && signal != (k == 1 ? 0 : SIGWINCH)) return "signal at the parent's end";
    struct sets s = get_sets();
    if (!getenv("BARE") && memcmp(&s, &sets_then[k], sizeof s)) return "capabilities";
    if (ambient() != ambient_then[k]) return "ambient capabilities";
    return NULL;
}

static void *work(void *number) {
    int k = (int)(intptr_t)number;
    begin_thread(k);
    pthread_barrier_wait(&together);
    for (;;) {
        pthread_barrier_wait(&together);
        pthread_barrier_wait(&together);
        if (letter == 'm') change_thread(k);
        const char *found = letter == 'c' ? compare_thread(k) : NULL;
        if (found) wrong = found;
        pthread_barrier_wait(&together);
    }
    return NULL;
}

static void limit(int which, rlim_t soft) {
    struct rlimit l;
    MUST(getrlimit(which, &l));
    l.rlim_cur = soft < l.rlim_max ? soft : l.rlim_max;
    MUST(setrlimit(which, &l));
}
static int is_limit(int which, rlim_t soft) {
    struct rlimit l;
    MUST(getrlimit(which, &l));
    return l.rlim_cur == soft;
}
static void begin(void) {
    if (has("lonely")) {
        // A group whose leader has ended.
        pid_t child = fork();
        if (child == 0) { pause(); _exit(0); }
        MUST(setpgid(child, child));
        MUST(setpgid(0, child));
        MUST(kill(child, SIGKILL));
        MUST(waitpid(child, NULL, 0));
    }
    if (has("leader") || has("pair")) MUST(setpgid(0, 0));
    if (has("pair")) MUST(member = fork());
    if (has("pair") && member == 0) {
        MUST(prctl(PR_SET_PDEATHSIG, SIGKILL));
        for (;;) pause();
    }
    if (has("session")) MUST(setsid());
    if (has("limits")) { limit(RLIMIT_NOFILE, 100); limit(RLIMIT_CORE, 0); limit(RLIMIT_STACK, 1 << 20); limit(RLIMIT_MEMLOCK, 4096); }
    if (has("habits")) umask(027);
    if (has("traits")) {
        put("/proc/self/oom_score_adj", "300");
        MUST(prctl(PR_SET_CHILD_SUBREAPER, 1));
        MUST(prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0));
    }
    MUST(prctl(PR_SET_DUMPABLE, 1));
    if (has("poor")) {
        struct rlimit l = {100, 200};
        MUST(setrlimit(RLIMIT_NPROC, &l));
        MUST(prctl(PR_CAPBSET_DROP, 10));
        MUST(prctl(PR_CAPBSET_DROP, 37));
        MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    }
    group_then = getpgid(0);
    session_then = getsid(0);
}
static void change(void) {
    if (has("group") || has("lonely")) MUST(setpgid(0, 0));
    if (has("pair")) MUST(setpgid(member, member));
    if (has("leader") || has("pair")) MUST(setpgid(0, getpgid(getppid())));
    if (has("limits")) { limit(RLIMIT_NOFILE, 50); limit(RLIMIT_CORE, 4096); limit(RLIMIT_STACK, 2 << 20); limit(RLIMIT_MEMLOCK, 0); }
    if (has("habits")) umask(077);
    if (has("traits")) {
        put("/proc/self/oom_score_adj", "500");
        MUST(prctl(PR_SET_CHILD_SUBREAPER, 0));
        MUST(prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0));
        MUST(prctl(PR_SET_DUMPABLE, 0));
    }
    // What does not come back.
    if (has("gone-nnp")) MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    if (has("gone-filter")) filter();
    if (has("gone-caps")) set_sets((struct sets){0, 0, 0});
    if (has("gone-bound")) MUST(prctl(PR_CAPBSET_DROP, 10));
    if (has("gone-user")) MUST(syscall(SYS_setresuid, 1000, 1000, 1000));
    if (has("gone-locked")) MUST(prctl(PR_SET_SECUREBITS, 0x3));
    if (has("gone-session")) MUST(setsid());
    if (has("gone-limit")) { struct rlimit l = {10, 20}; MUST(setrlimit(RLIMIT_NPROC, &l)); }
    if (has("gone-thread")) { pthread_t t; MUST(-pthread_create(&t, NULL, (void *(*)(void *))pause, NULL)); }
    if (has("keyring")) MUST(syscall(SYS_keyctl, 0, -2, 1));
}
static const char *compare(void) {
    if (has("pair") && getpgid(member) != getpid()) return "process group of its child";
    if (getpgid(0) != group_then) return "process group";
    if (getsid(0) != session_then) return "session";
    if (has("limits") && !(is_limit(RLIMIT_NOFILE, 100) && is_limit(RLIMIT_CORE, 0) && is_limit(RLIMIT_STACK, 1 << 20) && is_limit(RLIMIT_MEMLOCK, 4096))) return "limits";
    if (has("habits")) {
        mode_t is = umask(0);
        umask(is);
        if (is != 027) return "umask";
    }
    if (has("traits")) {
        int subreaper;
        MUST(prctl(PR_GET_CHILD_SUBREAPER, &subreaper));
        if (!subreaper) return "subreaper";
        if (prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) != 1) return "huge pages";
        if (score() != 300) return "score";
    }
    if (has("poor")) {
        struct rlimit l;
        MUST(getrlimit(RLIMIT_NPROC, &l));
        if (l.rlim_cur != 100 || l.rlim_max != 200) return "hard limit";
        if (prctl(PR_CAPBSET_READ, 10) || prctl(PR_CAPBSET_READ, 37)) return "bound";
        if (prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) != 1) return "no_new_privs, wanted";
    }
    // Credentials change it too.
    if (prctl(PR_GET_DUMPABLE) != 1) return "dumpable";
    if (has("gone-nnp") && prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)) return "no_new_privs";
    return NULL;
}

// Some calls with some values that change who the first thread is, whatever becomes of them.
static uint32_t next(uint32_t *seed, uint32_t n) {
    *seed = *seed * 1664525 + 1013904223;
    return (*seed >> 8) % n;
}
static void change_somehow(uint32_t seed) {
    static const uid_t ids[] = {0, 1, 1000, -1};
#define ID ids[next(&seed, 4)]
    uint64_t some = 0;
    for (int bit = 0; bit < 41; bit++) some |= (uint64_t)(next(&seed, 16) != 0) << bit;
    for (int n = 2 + next(&seed, 6); n > 0; n--) switch (next(&seed, 12)) {
    case 0: syscall(SYS_setresuid, ID, ID, ID); break;
    case 1: syscall(SYS_setresgid, ID, ID, ID); break;
    case 2: syscall(SYS_setfsuid, ID); break;
    case 3: syscall(SYS_setfsgid, ID); break;
    case 4: { gid_t g[] = {next(&seed, 9), next(&seed, 9), 5}; syscall(SYS_setgroups, next(&seed, 4), g); break; }
    case 5: prctl(PR_SET_SECUREBITS, next(&seed, 128) & 0x55); break;
    case 6: prctl(PR_SET_SECUREBITS, next(&seed, 256)); break;
    case 7: prctl(PR_SET_KEEPCAPS, next(&seed, 2)); break;
    case 8: prctl(PR_CAPBSET_DROP, 20 + next(&seed, 20)); break;
    case 9: prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, next(&seed, 12), 0, 0); break;
    case 10: prctl(PR_SET_PDEATHSIG, next(&seed, 3)); break;
    case 11: {
        struct sets s = get_sets();
        uint32_t header[2] = {0x20080522, 0};
        uint64_t kept = next(&seed, 6) ? s.permitted : s.permitted & some;
        s = (struct sets){kept & (next(&seed, 2) ? some : 0), kept, next(&seed, 3) ? kept & 0xfff : s.inheritable};
        uint32_t d[6] = {s.effective, s.permitted, s.inheritable, s.effective >> 32, s.permitted >> 32, s.inheritable >> 32};
        syscall(SYS_capset, header, d);
        break;
    }
    }
}

// A fork with the same PID: what a process is that comes from its template. Its parent is init.
static void go_on_in_fork(void) {
    pid_t own = getpid(), maker = fork();
    MUST(maker);
    if (maker > 0) _exit(0);
    MUST(setsid());
    struct sets all = get_sets();
    all.effective = all.permitted;
    set_sets(all);
    struct clone_args args = {.flags = CLONE_PARENT, .set_tid = (uintptr_t)&own, .set_tid_size = 1};
    // With CLONE_PARENT the exit signal is that of the maker: SIGCHLD. It is there as soon as init has reaped the first.
    long child;
    while (getppid() != 1) sched_yield();
    while ((child = syscall(SYS_clone3, &args, sizeof args)) < 0 && errno == EEXIST) sched_yield();
    MUST(child);
    if (child > 0) _exit(0);
}

int main(int argc, char **argv) {
    kinds = argc > 1 ? argv[1] : "";
    if (read(0, &letter, 1) != 1) return 1;
    nice_then = getpriority(PRIO_PROCESS, 0);
    bare = getenv("BARE") != NULL;
    if (getenv("SANDBOX")) enter_sandbox();
    if (has_now("single")) n_threads = 1;
    pthread_barrier_init(&together, NULL, n_threads);
    begin();
    if (has("many")) for (int k = 0; k < MANY; k++) { pthread_t t; MUST(-pthread_create(&t, NULL, (void *(*)(void *))pause, NULL)); }
    for (int k = 1; k < n_threads; k++) if (pthread_create(&threads[k], NULL, work, (void *)(intptr_t)k)) die("pthread_create");
    begin_thread(0);
    // Credentials of any thread take it away.
    pthread_barrier_wait(&together);
    MUST(prctl(PR_SET_DUMPABLE, 1));
    pthread_barrier_wait(&together);
    bare = 0;
    say("ready", NULL);
    while (read(0, &letter, 1) == 1 && letter != 'q') {
        if (letter == 'm') change();
        if (letter == 'f') go_on_in_fork();
        if (letter == 'r') {
            uint32_t seed;
            MUST(read_all(&seed, sizeof seed));
            change_somehow(seed);
        }
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
